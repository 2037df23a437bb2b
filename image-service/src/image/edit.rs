//! Changes that a caller requests of an image.

use super::{
    Configuration, ConfigurationDraft, Description, Image, Name, Namespace, Reference, WantedReference,
    draft::{check_configuration, check_given, check_pulled, note, pulled},
};
use crate::error::{Error, Violations};

/// An unchecked change; fields that are `None` stay as they are. Violations name its fields as `image.…`.
#[derive(Clone, Debug, Default)]
pub(crate) struct EditDraft {
    pub(crate) name: Option<String>,
    pub(crate) description: Option<String>,
    /// Repository; derived from the name again if empty.
    pub(crate) repository: Option<String>,
    /// Tag; `latest` if empty.
    pub(crate) tag: Option<String>,
    /// Configuration; `Some(None)` requests its removal, which is refused.
    pub(crate) configuration: Option<Option<ConfigurationDraft>>,
    /// Values that cannot be changed in this way, and must be those of the image.
    pub(crate) enabled: Option<bool>,
    pub(crate) template: bool,
}

/// The checked fields of an image after a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Edit {
    pub(crate) name: Name,
    pub(crate) description: Description,
    /// New reference; `None` if it stays as it is.
    pub(crate) reference: Option<WantedReference>,
    /// New configuration; `None` if it stays as it is.
    pub(crate) configuration: Option<Configuration>,
}

impl EditDraft {
    /// Reports whether the change names a field that decides what builds make.
    pub(crate) fn names_what_is_built(&self) -> bool {
        self.repository.is_some() || self.tag.is_some() || self.configuration.is_some()
    }

    /// Checks everything against the current image, and reports all violations together.
    ///
    /// A derived reference follows the name only if the caller may change references.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Invalid`] with all violations.
    pub(crate) fn check(
        self,
        image: &Image,
        namespace: &Namespace,
        may_change_reference: bool,
    ) -> Result<Edit, Error> {
        let mut violations = Violations::default();
        if self.enabled.is_some_and(|enabled| enabled != image.enabled) {
            violations.add("image.enabled", "is changed by EnableImage and DisableImage");
        }
        if self.template && !image.template {
            violations.add("image.template", "is fixed at creation");
        }
        let name = violations.take("image.name", Name::parse(self.name.as_deref().unwrap_or(&image.name)));
        let description = self.description.unwrap_or_else(|| image.description.clone());
        let description = violations.take("image.description", Description::parse(description));
        let becomes_pulled = match &self.configuration {
            Some(Some(draft)) if !image.snapshot => pulled(draft),
            Some(_) => None,
            None => image.pulled.then(|| image.reference.clone()),
        };
        let (repository, tag) = (self.repository.as_deref(), self.tag.as_deref());
        let reference = if let Some(pulled) = becomes_pulled {
            check_pulled(&mut violations, &pulled, repository, tag);
            Some(WantedReference::Pulled(pulled))
        } else if !may_change_reference && !image.pulled {
            check_unchanged(&mut violations, image, repository, tag);
            let unchanged = image.reference.clone();
            Some(if image.reference_given {
                WantedReference::Given(unchanged)
            } else {
                WantedReference::Derived(unchanged)
            })
        } else {
            let name = name.clone().or_else(|| Name::parse("any").ok());
            name.and_then(|name| wanted(&mut violations, image, &name, repository, tag, namespace))
        };
        let configuration = self.configuration.and_then(|draft| check_configuration(&mut violations, draft));
        violations.check()?;
        let (Some(name), Some(description), Some(reference)) = (name, description, reference) else {
            return Err(Error::Internal("a part is missing without a violation".into()));
        };
        let is_same = match &reference {
            WantedReference::Given(wanted) => image.reference_given && *wanted == image.reference,
            WantedReference::Derived(wanted) => !image.reference_given && *wanted == image.reference,
            WantedReference::Pulled(wanted) => image.pulled && *wanted == image.reference,
        };
        Ok(Edit { name, description, reference: (!is_same).then_some(reference), configuration })
    }
}

impl Edit {
    /// Applies the change to an image, except for its reference, which has to be free.
    ///
    /// Returns the new configuration if it differs from `current`.
    pub(crate) fn apply(&self, image: &mut Image, current: &Configuration) -> Option<&Configuration> {
        self.name.as_str().clone_into(&mut image.name);
        self.description.as_str().clone_into(&mut image.description);
        let configuration = self.configuration.as_ref().filter(|configuration| *configuration != current)?;
        image.configuration_revision += 1;
        image.pulled = configuration.is_pull() && !image.snapshot;
        Some(configuration)
    }
}

/// Checks that a caller that may not change the reference of an image leaves it as it is.
fn check_unchanged(violations: &mut Violations, image: &Image, repository: Option<&str>, tag: Option<&str>) {
    const RULE: &str = "is changed by the creator and admins only";
    let current = if image.reference_given { image.reference.repository() } else { "" };
    if repository.is_some_and(|repository| repository != current) {
        violations.add("image.repository", RULE);
    }
    let is_same_tag =
        |tag: &str| image.reference.tag() == if tag.is_empty() { Reference::DEFAULT_TAG } else { tag };
    if tag.is_some_and(|tag| !is_same_tag(tag)) {
        violations.add("image.tag", RULE);
    }
}

/// Returns the reference that an image is to have if it is not pulled.
fn wanted(
    violations: &mut Violations,
    image: &Image,
    name: &Name,
    repository: Option<&str>,
    tag: Option<&str>,
    namespace: &Namespace,
) -> Option<WantedReference> {
    let current = (!image.pulled).then_some(&image.reference);
    let tag = tag.or_else(|| current.map(Reference::tag)).unwrap_or_default();
    match (repository, current) {
        (Some(repository), _) if !repository.is_empty() => {
            given(violations, current, repository, tag, namespace)
        }
        (None, Some(current)) if image.reference_given => {
            given(violations, Some(current), current.repository(), tag, namespace)
        }
        (None, Some(current)) if name.has_slug_of(&image.name) => {
            // The reference may have been varied, and stays so.
            note(violations, Reference::new(current.repository(), tag)).map(WantedReference::Derived)
        }
        _ => note(violations, namespace.derive(name, tag)).map(WantedReference::Derived),
    }
}

/// Checks a given reference. The current one is always allowed; any other has to lie in the namespace.
fn given(
    violations: &mut Violations,
    current: Option<&Reference>,
    repository: &str,
    tag: &str,
    namespace: &Namespace,
) -> Option<WantedReference> {
    let stays = current.is_some_and(|current| current.repository() == repository && current.tag() == tag);
    if stays {
        return note(violations, Reference::new(repository, tag)).map(WantedReference::Given);
    }
    check_given(violations, repository, tag, namespace).map(WantedReference::Given)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Etag, ImageId, Pull, RepositoryPrefixes, Source, Status};
    use crate::timestamp::Timestamp;

    fn image(repository: &str, reference_given: bool) -> Image {
        Image {
            id: ImageId::new(),
            name: "Go tools".to_owned(),
            description: String::new(),
            creator: "alice".to_owned(),
            template: false,
            snapshot: false,
            status: Some(Status::Error),
            status_message: String::new(),
            reference: Reference::new(repository, "v1").expect("a reference"),
            artifact_reference: None,
            reference_given,
            enabled: true,
            pulled: false,
            configuration_revision: 1,
            artifact: None,
            artifact_missing: false,
            created_at: Timestamp::now(),
            updated_at: Timestamp::now(),
            revision: 1,
            etag: Etag(1),
            latest_build: None,
        }
    }

    fn reference(draft: EditDraft, image: &Image) -> Option<String> {
        let prefixes = RepositoryPrefixes::parse(&["trailer.invalid/".to_owned()]).expect("a prefix");
        match draft.check(image, &prefixes.namespace(&image.creator, false), true) {
            Ok(edit) => edit.reference.map(|reference| format!("{reference:?}").replace(['"', ' '], "")),
            Err(error) => Some(error.to_string()),
        }
    }

    fn is(kind: &str, repository: &str, tag: &str) -> Option<String> {
        Some(format!("{kind}(Reference{{repository:{repository},tag:{tag}}})"))
    }

    #[test]
    fn a_reference_follows_the_name_until_it_is_set() {
        let derived = image("trailer.invalid/alice-2bd806c9/go-tools-a1b2", false);
        let given = image("trailer.invalid/alice-2bd806c9/mine", true);
        let rename = |name: &str| EditDraft { name: Some(name.to_owned()), ..EditDraft::default() };
        assert_eq!(reference(rename("Go  Tools!"), &derived), None);
        assert_eq!(
            reference(rename("Rust"), &derived),
            is("Derived", "trailer.invalid/alice-2bd806c9/rust", "v1")
        );
        assert_eq!(reference(rename("Rust"), &given), None);
        let set =
            |repository: &str| EditDraft { repository: Some(repository.to_owned()), ..EditDraft::default() };
        assert_eq!(reference(set("trailer.invalid/alice-2bd806c9/mine"), &given), None);
        assert_eq!(
            reference(set(""), &given),
            is("Derived", "trailer.invalid/alice-2bd806c9/go-tools", "v1")
        );
        assert_eq!(
            reference(set("trailer.invalid/alice-2bd806c9/other"), &derived),
            is("Given", "trailer.invalid/alice-2bd806c9/other", "v1")
        );
        assert!(
            reference(set("ubuntu"), &derived)
                .is_some_and(|error| error.contains("must be empty or begin with"))
        );
        let elsewhere = image("ubuntu", true);
        assert_eq!(reference(set("ubuntu"), &elsewhere), None, "it is there already");
        assert_eq!(reference(rename("Rust"), &elsewhere), None);
        let moved = EditDraft { tag: Some("24.04".to_owned()), ..EditDraft::default() };
        assert!(
            reference(moved, &elsewhere).is_some_and(|error| error.contains("must be empty or begin with"))
        );
        let tag = EditDraft { tag: Some("v2".to_owned()), ..EditDraft::default() };
        assert_eq!(reference(tag.clone(), &given), is("Given", "trailer.invalid/alice-2bd806c9/mine", "v2"));
        assert_eq!(
            reference(tag, &derived),
            is("Derived", "trailer.invalid/alice-2bd806c9/go-tools-a1b2", "v2")
        );
    }

    #[test]
    fn a_pulled_image_has_the_reference_that_it_pulls() {
        let pull = Source::Pull(Pull { reference: "nginx:1".to_owned() });
        let draft = EditDraft {
            configuration: Some(Some(ConfigurationDraft::from_source(pull))),
            ..EditDraft::default()
        };
        assert_eq!(
            reference(draft, &image("trailer.invalid/alice-2bd806c9/mine", true)),
            is("Pulled", "nginx", "1")
        );
        let pulled = Image { pulled: true, ..image("nginx", false) };
        let rename = EditDraft { name: Some("Web".to_owned()), ..EditDraft::default() };
        assert_eq!(reference(rename, &pulled), None);
    }
}
