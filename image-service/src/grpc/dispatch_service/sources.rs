//! Conversion of the references that builds name, and of what they stand for.

use proto::dispatch as wire;

use super::engine_contents::artifact_name;
use crate::{
    error::{Error, Violations},
    image::{Artifact, ImageId, ResolvedSource},
};

/// Checks the references of a request.
pub(super) fn check(references: &[String]) -> Result<(), Error> {
    const MAX: usize = 64;
    const MAX_BYTES: usize = 1024;
    let mut violations = Violations::default();
    if references.is_empty() || references.len() > MAX {
        violations.add("references", format!("must be 1 to {MAX}"));
    }
    for (i, reference) in references.iter().enumerate().take(MAX) {
        if reference.len() > MAX_BYTES {
            violations.add(format!("references[{i}]"), format!("must have at most {MAX_BYTES} bytes"));
        }
    }
    violations.check()
}

pub(super) fn resolved(sources: Vec<ResolvedSource>) -> wire::ResolveSourcesResponse {
    use wire::source::Source;
    let source = |source| match source {
        ResolvedSource::Foreign => Source::Foreign(wire::ForeignSource {}),
        ResolvedSource::Missing { is_elsewhere } => Source::Missing(wire::MissingSource { is_elsewhere }),
        ResolvedSource::Artifact { image, artifact, worker_may_build } => {
            Source::Artifact(artifact_source(image, *artifact, worker_may_build))
        }
    };
    let sources = sources.into_iter().map(|resolved| wire::Source { source: Some(source(resolved)) });
    wire::ResolveSourcesResponse { sources: sources.collect() }
}

fn artifact_source(image: ImageId, artifact: Artifact, worker_may_build: bool) -> wire::ArtifactSource {
    let registry_reference = artifact.reference.zip(artifact.repo_digest);
    wire::ArtifactSource {
        name: Some(artifact_name(image, artifact.build)),
        worker: artifact.worker,
        registry_reference: registry_reference
            .map(|(reference, digest)| format!("{}@{digest}", reference.repository()))
            .unwrap_or_default(),
        worker_may_build,
    }
}
