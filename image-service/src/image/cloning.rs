//! What a clone of an image begins as.

use std::collections::BTreeMap;

use super::{Configuration, ConfigurationDraft, Generate, Image, ImageDraft, Name, Source};

impl Image {
    /// A draft of another image like this one, which can be created as it is. The configuration is this image's.
    pub(crate) fn clone_draft(&self, configuration: &Configuration) -> ImageDraft {
        let tag = if self.writes_reference() { self.reference.tag() } else { "" };
        ImageDraft {
            name: Name::of_copy(&self.name),
            description: self.description.clone(),
            // Derived from the new name, and varied until it is free.
            repository: String::new(),
            tag: tag.to_owned(),
            template: false,
            enabled: None,
            configuration: Some(self.clone_configuration(configuration)),
        }
    }

    fn clone_configuration(&self, configuration: &Configuration) -> ConfigurationDraft {
        let draft = ConfigurationDraft::clone(configuration);
        let Some(artifact) = self.artifact.as_ref().filter(|_| self.snapshot) else {
            return draft;
        };
        // Only the engine that has committed it can start from it, unless a registry holds it.
        let (base_image, worker, worker_labels) = match (&artifact.repo_digest, &artifact.reference) {
            (Some(digest), Some(reference)) => {
                (format!("{}@{digest}", reference.repository()), draft.worker, draft.worker_labels)
            }
            (_, Some(reference)) => (reference.to_string(), artifact.worker.clone(), BTreeMap::new()),
            (_, None) => (self.reference.to_string(), artifact.worker.clone(), BTreeMap::new()),
        };
        // Whatever the configuration had installed is in the snapshot.
        let source = Source::Generate(Generate { base_image, ..Generate::default() });
        ConfigurationDraft {
            worker,
            worker_labels,
            build_timeout_ms: draft.build_timeout_ms,
            ..ConfigurationDraft::of(source)
        }
    }
}
