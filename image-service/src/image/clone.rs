//! Drafts for clones of images.

use std::collections::BTreeMap;

use super::{Configuration, ConfigurationDraft, Generate, Image, ImageDraft, Name, Source};

impl Image {
    /// Returns a draft for a clone of the image, which can be created as it is. `configuration` is the
    /// image's own.
    pub(crate) fn clone_draft(&self, configuration: &Configuration) -> ImageDraft {
        let tag = if self.writes_reference() { self.reference.tag() } else { "" };
        ImageDraft {
            name: Name::of_copy(&self.name),
            description: self.description.clone(),
            // Derived from the new name, with a number if it is taken.
            repository: String::new(),
            tag: tag.to_owned(),
            template: false,
            enabled: None,
            configuration: Some(self.clone_configuration(configuration)),
        }
    }

    fn clone_configuration(&self, configuration: &Configuration) -> ConfigurationDraft {
        let draft = ConfigurationDraft::clone(configuration);
        let Some(artifact) = self.artifact().filter(|_| self.snapshot) else {
            return draft;
        };
        // Only the engine that committed the snapshot can start from it, unless a registry holds it.
        let (base_image, worker, worker_labels) = match (&artifact.repo_digest, &artifact.reference) {
            (Some(digest), Some(reference)) => {
                (format!("{}@{digest}", reference.repository()), draft.worker, draft.worker_labels)
            }
            (_, Some(reference)) => (reference.to_string(), artifact.worker.clone(), BTreeMap::new()),
            (_, None) => (self.reference.to_string(), artifact.worker.clone(), BTreeMap::new()),
        };
        // The snapshot contains whatever the configuration had installed.
        let source = Source::Generate(Generate { base_image, ..Generate::default() });
        ConfigurationDraft {
            worker,
            worker_labels,
            build_timeout_ms: draft.build_timeout_ms,
            ..ConfigurationDraft::from_source(source)
        }
    }
}
