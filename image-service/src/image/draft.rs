//! What a caller asks to create, before anything of it has been checked.

use super::{
    Configuration, ContextFile, Description, DockerfileSource, Name, NewImage, Reference, RepositoryPrefixes,
    WantedReference, reference::ReferenceError,
};
use crate::error::{Error, Violations};

/// An unchecked image. Fields are named in violations as `image.…`.
#[derive(Clone, Debug)]
pub(crate) struct ImageDraft {
    pub(crate) name: String,
    pub(crate) description: String,
    /// Empty: derived from the name.
    pub(crate) repository: String,
    /// Empty: `latest`.
    pub(crate) tag: String,
    pub(crate) source: Option<SourceDraft>,
}

#[derive(Clone, Debug)]
pub(crate) enum SourceDraft {
    Dockerfile { text: String, files: Vec<ContextFile> },
}

impl ImageDraft {
    /// Checks everything and reports every violation together. With `anywhere` a reference may lie outside the prefixes.
    pub(crate) fn check(self, prefixes: &RepositoryPrefixes, anywhere: bool) -> Result<NewImage, Error> {
        let mut violations = Violations::default();
        let name = violations.take("image.name", Name::parse(&self.name));
        let description = violations.take("image.description", Description::parse(self.description));
        let reference = if self.repository.is_empty() {
            // Without a name the tag can still be checked.
            let any_name = name.clone().or_else(|| Name::parse("any").ok());
            any_name
                .map(|name| Reference::derived(prefixes, &name, &self.tag))
                .and_then(|derived| note(&mut violations, derived))
                .map(WantedReference::Derived)
        } else {
            note(&mut violations, Reference::new(&self.repository, &self.tag))
                .filter(|reference| {
                    let allowed = anywhere || prefixes.allow(reference);
                    if !allowed {
                        violations.add(
                            "image.repository",
                            format!("must begin with one of the prefixes {prefixes}"),
                        );
                    }
                    allowed
                })
                .map(WantedReference::Given)
        };
        let configuration = match self.source {
            Some(SourceDraft::Dockerfile { text, files }) => Some(Configuration::Dockerfile(
                DockerfileSource::parse(text, files, "image.config.dockerfile", &mut violations),
            )),
            None => {
                violations.add("image.config", "must have a source, such as `dockerfile`");
                None
            }
        };
        violations.check()?;
        match (name, description, reference, configuration) {
            (Some(name), Some(description), Some(reference), Some(configuration)) => {
                Ok(NewImage { name, description, reference, configuration })
            }
            _ => Err(Error::Internal("a part is missing without a violation".into())),
        }
    }
}

fn note(violations: &mut Violations, parsed: Result<Reference, ReferenceError>) -> Option<Reference> {
    let field = match &parsed {
        Err(ReferenceError::Tag) => "image.tag",
        Ok(_) | Err(ReferenceError::Repository(_)) => "image.repository",
    };
    violations.take(field, parsed.map_err(|error| error.rule()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_violation_is_reported_at_once() {
        let prefixes = RepositoryPrefixes::parse(&["trailer/".to_owned()]).expect("a prefix");
        let draft = ImageDraft {
            name: " ".to_owned(),
            description: "x".repeat(5_000),
            repository: "ubuntu".to_owned(),
            tag: String::new(),
            source: None,
        };
        let fields = |draft: &ImageDraft, anywhere| match draft.clone().check(&prefixes, anywhere) {
            Err(Error::Invalid(violations)) => violations.iter().map(|v| v.field.clone()).collect::<Vec<_>>(),
            other => vec![format!("{other:?}")],
        };
        let all = ["image.name", "image.description", "image.repository", "image.config"];
        assert_eq!(fields(&draft, false), all);
        assert_eq!(fields(&draft, true), ["image.name", "image.description", "image.config"]);
        let bad_tag = ImageDraft { repository: String::new(), tag: "a b".to_owned(), ..draft };
        assert_eq!(fields(&bad_tag, true)[2], "image.tag");
    }
}
