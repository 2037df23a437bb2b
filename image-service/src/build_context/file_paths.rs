//! The paths of an archive's files, in a form that is small and can be stored.

use ring::digest::{SHA256, digest};

/// The paths of files and links, each as a part of its SHA-256, in order. Links are there with a slash, too.
///
/// Another path has the same part once in 2^64 times, and then the engine finds that there is no such file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FilePaths(Vec<u8>);

impl FilePaths {
    /// Number of bytes for a path.
    const LENGTH: usize = 8;

    /// Creates the set of paths, each with whether it is a link.
    pub(super) fn new<'a>(paths: impl Iterator<Item = (&'a str, bool)>) -> Self {
        let with_slash = |(path, is_link): (&str, bool)| is_link.then(|| part(&format!("{path}/")));
        let mut parts: Vec<_> =
            paths.flat_map(|path| std::iter::once(part(path.0)).chain(with_slash(path))).collect();
        parts.sort_unstable();
        Self(parts.concat())
    }

    /// Restores paths from their stored form.
    pub(crate) fn from_stored(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Returns the stored form.
    pub(crate) fn into_stored(self) -> Vec<u8> {
        self.0
    }

    /// Reports whether a Dockerfile may be found at a path: it is a file or a link there, or lies behind a link.
    ///
    /// As for docker, `dockerfile` stands for a missing `Dockerfile`.
    pub(crate) fn may_have_dockerfile(&self, path: &str) -> bool {
        let lower_case = path.strip_suffix("Dockerfile").map(|directory| format!("{directory}dockerfile"));
        let above = path.match_indices('/').map(|(end, _)| &path[..=end]);
        above.chain([path]).chain(lower_case.as_deref()).any(|path| self.contain(path))
    }

    fn contain(&self, path: &str) -> bool {
        let (parts, _) = self.0.as_chunks::<{ Self::LENGTH }>();
        parts.binary_search(&part(path)).is_ok()
    }
}

fn part(path: &str) -> [u8; FilePaths::LENGTH] {
    let mut part = [0; FilePaths::LENGTH];
    part.copy_from_slice(&digest(&SHA256, path.as_bytes()).as_ref()[..FilePaths::LENGTH]);
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dockerfile_is_where_a_file_or_a_link_is() {
        let files = ["a/Dev", "lower/dockerfile", "Containerfile"].map(|path| (path, false));
        let paths = FilePaths::new(files.into_iter().chain([("docker", true)]));
        let paths = FilePaths::from_stored(paths.into_stored());
        for (path, is_there) in [
            ("a/Dev", true),
            ("Containerfile", true),
            ("lower/Dockerfile", true),
            ("docker/Dockerfile", true),
            ("a", false),
            ("Dockerfile", false),
            ("a/dev", false),
            ("lower", false),
            ("Containerfile/Dockerfile", false),
            ("docker", true),
        ] {
            assert_eq!(paths.may_have_dockerfile(path), is_there, "{path}");
        }
        assert!(!FilePaths::new(std::iter::empty()).may_have_dockerfile("Dockerfile"));
    }
}
