//! The unchecked input for creating an image.

use super::{
    Configuration, ConfigurationDraft, Description, Name, Namespace, NewImage, PulledReference, Reference,
    Source, WantedReference, reference::ReferenceError,
};
use crate::error::{Error, Violations};

/// An unchecked image. Violations name its fields as `image.…`.
#[derive(Clone, Debug)]
pub(crate) struct ImageDraft {
    pub(crate) name: String,
    pub(crate) description: String,
    /// Repository; derived from the name if empty.
    pub(crate) repository: String,
    /// Tag; `latest` if empty.
    pub(crate) tag: String,
    pub(crate) template: bool,
    pub(crate) enabled: Option<bool>,
    pub(crate) configuration: Option<ConfigurationDraft>,
}

impl ImageDraft {
    /// Checks everything and reports all violations together, those found before first.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Invalid`] with all violations.
    pub(crate) fn check(
        mut self,
        namespace: &Namespace,
        mut violations: Violations,
    ) -> Result<NewImage, Error> {
        let template = self.template;
        let configuration = self.configuration.take();
        let pulled = configuration.as_ref().and_then(pulled);
        let record = self.check_record(pulled, namespace, &mut violations);
        let configuration = check_configuration(&mut violations, configuration);
        violations.check()?;
        let (Some(record), Some(configuration)) = (record, configuration) else {
            return Err(Error::Internal("a part is missing without a violation".into()));
        };
        Ok(record.with(configuration, template))
    }

    /// Checks the draft of a snapshot, which takes its configuration from another image.
    ///
    /// A snapshot is no template, and has a reference of its own whatever that configuration says.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Invalid`] with all violations.
    pub(crate) fn check_snapshot(
        self,
        namespace: &Namespace,
        mut violations: Violations,
    ) -> Result<impl FnOnce(Configuration) -> NewImage, Error> {
        let record = self.check_record(None, namespace, &mut violations);
        violations.check()?;
        let record = record.ok_or_else(|| Error::Internal("a part is missing without a violation".into()))?;
        Ok(move |configuration| record.with(configuration, false))
    }

    fn check_record(
        self,
        pulled: Option<Reference>,
        namespace: &Namespace,
        violations: &mut Violations,
    ) -> Option<Record> {
        let name = violations.take("image.name", Name::parse(&self.name));
        let description = violations.take("image.description", Description::parse(self.description));
        let reference = if let Some(pulled) = pulled {
            check_pulled(violations, &pulled, Some(&self.repository), Some(&self.tag));
            Some(WantedReference::Pulled(pulled))
        } else if self.repository.is_empty() {
            // The tag can be checked even without a valid name.
            let any_name = name.clone().or_else(|| Name::parse("any").ok());
            any_name
                .map(|name| namespace.derive(&name, &self.tag))
                .and_then(|derived| note(violations, derived))
                .map(WantedReference::Derived)
        } else {
            check_given(violations, &self.repository, &self.tag, namespace).map(WantedReference::Given)
        };
        Some(Record {
            name: name?,
            description: description?,
            enabled: self.enabled.unwrap_or(true),
            reference: reference?,
        })
    }
}

/// A new image without its configuration.
struct Record {
    name: Name,
    description: Description,
    enabled: bool,
    reference: WantedReference,
}

impl Record {
    fn with(self, configuration: Configuration, template: bool) -> NewImage {
        let Self { name, description, enabled, reference } = self;
        NewImage { name, description, template, enabled, reference, configuration }
    }
}

/// Returns the reference that a configuration pulls, if it pulls one.
pub(super) fn pulled(draft: &ConfigurationDraft) -> Option<Reference> {
    match &draft.source {
        Source::Pull(pull) => {
            PulledReference::parse(&pull.reference).map(|parsed| parsed.reference().clone())
        }
        Source::Dockerfile(_) | Source::Generate(_) => None,
    }
}

pub(super) fn check_configuration(
    violations: &mut Violations,
    draft: Option<ConfigurationDraft>,
) -> Option<Configuration> {
    let Some(draft) = draft else {
        violations.add("image.config", "must have a source: `dockerfile`, `generate` or `pull`");
        return None;
    };
    Some(Configuration::parse(draft, "image.config", violations))
}

/// Checks that the reference given for a pulled image, if any, is that of the pulled image.
pub(super) fn check_pulled(
    violations: &mut Violations,
    pulled: &Reference,
    repository: Option<&str>,
    tag: Option<&str>,
) {
    for (field, given, is) in
        [("image.repository", repository, pulled.repository()), ("image.tag", tag, pulled.tag())]
    {
        if given.is_some_and(|given| !given.is_empty() && given != is) {
            violations.add(field, format!("must be empty, or that of `config.pull.reference`: {is:?}"));
        }
    }
}

pub(super) fn check_given(
    violations: &mut Violations,
    repository: &str,
    tag: &str,
    namespace: &Namespace,
) -> Option<Reference> {
    let parsed = match Reference::new(repository, tag) {
        // The repository can be checked even if the tag is invalid.
        Err(error @ ReferenceError::Tag) => {
            note(violations, Reference::new(repository, ""));
            Err(error)
        }
        parsed => parsed,
    };
    note(violations, parsed).filter(|reference| {
        let is_allowed = namespace.contains(reference);
        if !is_allowed {
            violations.add("image.repository", format!("must be empty or begin with one of {namespace}"));
        }
        is_allowed
    })
}

pub(super) fn note(
    violations: &mut Violations,
    parsed: Result<Reference, ReferenceError>,
) -> Option<Reference> {
    let field = match &parsed {
        Err(ReferenceError::Tag) => "image.tag",
        Ok(_) | Err(ReferenceError::Repository(_)) => "image.repository",
    };
    violations.take(field, parsed.map_err(|error| error.rule()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Pull, RepositoryPrefixes};

    fn draft() -> ImageDraft {
        ImageDraft {
            name: " ".to_owned(),
            description: "x".repeat(5_000),
            repository: "ubuntu".to_owned(),
            tag: String::new(),
            template: false,
            enabled: None,
            configuration: None,
        }
    }

    fn namespace(is_unlimited: bool) -> Namespace {
        let prefixes = RepositoryPrefixes::parse(&["trailer.invalid/".to_owned()]).expect("a prefix");
        prefixes.namespace("alice", is_unlimited)
    }

    fn fields(draft: ImageDraft, anywhere: bool) -> Vec<String> {
        match draft.check(&namespace(anywhere), Violations::default()) {
            Err(Error::Invalid(violations)) => violations.iter().map(|v| v.field.clone()).collect(),
            other => vec![format!("{other:?}")],
        }
    }

    #[test]
    fn every_violation_is_reported_at_once() {
        let all = ["image.name", "image.description", "image.repository", "image.config"];
        assert_eq!(fields(draft(), false), all);
        assert_eq!(fields(draft(), true), ["image.name", "image.description", "image.config"]);
        let bad_tag = ImageDraft { repository: String::new(), tag: "a b".to_owned(), ..draft() };
        assert_eq!(fields(bad_tag, true)[2], "image.tag");
    }

    #[test]
    fn a_pulled_image_has_the_reference_of_what_is_pulled() {
        let pulling = |reference: &str, repository: &str| ImageDraft {
            name: "Pulled".to_owned(),
            description: String::new(),
            repository: repository.to_owned(),
            configuration: Some(ConfigurationDraft::from_source(Source::Pull(Pull {
                reference: reference.to_owned(),
            }))),
            ..draft()
        };
        let checked = pulling("docker.io/library/nginx", "nginx")
            .check(&namespace(false), Violations::default())
            .expect("it is good");
        let WantedReference::Pulled(reference) = checked.reference else {
            panic!("{:?}", checked.reference);
        };
        assert_eq!(reference.to_string(), "nginx:latest");
        assert_eq!(fields(pulling("nginx", "trailer.invalid/nginx"), true), ["image.repository"]);
    }
}
