//! Pulls of images from their registries.

use super::{
    Job,
    outcome::{Artifact, Ended},
};
use crate::{output::Output, reference};

impl Job {
    /// Pulls an image and checks that the engine has it.
    pub(super) async fn pull(&self, reference: &str, output: &mut Output) -> Result<Artifact, Ended> {
        let pull = self.engine.pull(reference)?;
        self.follow(pull, output).await?;
        let image = self.engine.image(reference).await?;
        let image = image
            .ok_or_else(|| Ended::by_broken_engine(format!("{reference} was pulled and is not there")))?;
        Ok(Artifact {
            repo_digest: digest_of(reference, &image.repo_digests),
            image_id: image.id,
            config_digest: image.config_digest,
            size_bytes: image.size_bytes,
            replaced: None,
        })
    }
}

/// Returns the digest that belongs to the repository of `reference`.
///
/// One image may have been pulled from several repositories.
fn digest_of(reference: &str, repo_digests: &[String]) -> String {
    if let Some((_, digest)) = reference.split_once('@') {
        return digest.to_owned();
    }
    let (repository, _) = reference::parts(reference);
    let familiar = |name: &str| {
        let name = name.strip_prefix("docker.io/").unwrap_or(name);
        name.strip_prefix("library/").unwrap_or(name).to_owned()
    };
    repo_digests
        .iter()
        .filter_map(|known| known.split_once('@'))
        .find(|(known, _)| familiar(known) == familiar(repository))
        .map(|(_, digest)| digest.to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_that_of_the_repository() {
        let known = ["nginx@sha256:1".to_owned(), "127.0.0.1:5000/nginx@sha256:2".to_owned()];
        for (reference, expected) in [
            ("nginx:1", "sha256:1"),
            ("docker.io/library/nginx", "sha256:1"),
            ("127.0.0.1:5000/nginx", "sha256:2"),
            ("127.0.0.1:5000/nginx:1", "sha256:2"),
            ("other@sha256:3", "sha256:3"),
            ("other", ""),
        ] {
            assert_eq!(digest_of(reference, &known), expected, "{reference}");
        }
    }
}
