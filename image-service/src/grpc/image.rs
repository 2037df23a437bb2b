//! Images on the wire.

use proto::images as wire;

use super::field;
use crate::image::{
    Artifact, Configuration, ContextFile, Image, ImageDraft, ImageInView, SourceDraft, Status,
};

/// Takes what a caller may set.
pub(super) fn draft(image: wire::Image) -> ImageDraft {
    let source = image.config.and_then(|config| config.source).map(|source| match source {
        wire::image_config::Source::Dockerfile(dockerfile) => SourceDraft::Dockerfile {
            text: dockerfile.text,
            files: dockerfile
                .files
                .into_iter()
                .map(|file| ContextFile {
                    path: file.path,
                    content: file.content.into(),
                    executable: file.executable,
                })
                .collect(),
        },
    });
    ImageDraft {
        name: image.name,
        description: image.description,
        repository: image.repository,
        tag: image.tag,
        source,
    }
}

impl From<ImageInView> for wire::Image {
    fn from(view: ImageInView) -> Self {
        Self { config: view.configuration.map(Into::into), ..view.image.into() }
    }
}

impl From<Image> for wire::Image {
    fn from(image: Image) -> Self {
        Self {
            id: image.id.to_string(),
            name: image.name,
            description: image.description,
            creator: image.creator,
            status: wire::ImageStatus::from(image.status).into(),
            status_message: image.status_message,
            repository: image.reference.repository().to_owned(),
            tag: image.reference.tag().to_owned(),
            config: None,
            config_revision: image.configuration_revision,
            artifact: image.artifact.map(Into::into),
            create_time: Some(field::time(image.created_at)),
            update_time: Some(field::time(image.updated_at)),
            revision: image.revision,
            latest_build_id: image.latest_build.to_string(),
        }
    }
}

impl From<Status> for wire::ImageStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::BuildPending => Self::BuildPending,
            Status::Building => Self::Building,
            Status::BuildFinished => Self::BuildFinished,
            Status::BuildCancelled => Self::BuildCancelled,
            Status::Snapshotting => Self::Snapshotting,
            Status::Error => Self::Error,
        }
    }
}

impl From<Configuration> for wire::ImageConfig {
    fn from(configuration: Configuration) -> Self {
        let source = match configuration {
            Configuration::Dockerfile(source) => {
                wire::image_config::Source::Dockerfile(wire::DockerfileSource {
                    text: source.text().to_owned(),
                    files: source
                        .files()
                        .iter()
                        .map(|file| wire::ContextFile {
                            path: file.path.clone(),
                            content: file.content.clone().into(),
                            executable: file.executable,
                        })
                        .collect(),
                })
            }
        };
        Self { source: Some(source) }
    }
}

impl From<Artifact> for wire::Artifact {
    fn from(artifact: Artifact) -> Self {
        Self {
            image_id: artifact.image_id,
            size_bytes: artifact.size_bytes,
            worker: artifact.worker,
            finish_time: Some(field::time(artifact.finished_at)),
            config_revision: artifact.configuration_revision,
            build_id: artifact.build.to_string(),
        }
    }
}
