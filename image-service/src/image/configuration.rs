//! What an image is built from, checked once when it comes in.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::Violations;

/// A configuration that every rule holds for. Serialised, it is what the store keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Configuration {
    Dockerfile(DockerfileSource),
}

/// A hand-written Dockerfile and its context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DockerfileSource {
    text: String,
    files: Vec<ContextFile>,
}

/// One file of a build context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContextFile {
    pub(crate) path: String,
    #[serde(with = "base64_bytes")]
    pub(crate) content: Vec<u8>,
    pub(crate) executable: bool,
}

impl Configuration {
    /// The most that a configuration may hold: texts, paths and contents together.
    const MAX_BYTES: usize = 256 * 1024;
}

impl DockerfileSource {
    const MAX_PATH: usize = 255;

    /// Checks every rule and notes each violation under `field`.
    pub(crate) fn parse(
        text: String,
        files: Vec<ContextFile>,
        field: &str,
        violations: &mut Violations,
    ) -> Self {
        if text.trim().is_empty() {
            violations.add(format!("{field}.text"), "must not be empty");
        }
        if text.contains('\0') {
            violations.add(format!("{field}.text"), "must not contain NUL");
        }
        let contents: usize = files.iter().map(|f| f.path.len() + f.content.len()).sum();
        let bytes = text.len() + contents;
        if bytes > Configuration::MAX_BYTES {
            violations.add(
                field,
                format!("must have at most {} bytes in all, has {bytes}", Configuration::MAX_BYTES),
            );
        }
        let mut paths = BTreeSet::new();
        for (i, file) in files.iter().enumerate() {
            let field = format!("{field}.files[{i}].path");
            if let Err(rule) = check_path(&file.path) {
                violations.add(field, rule);
            } else if !paths.insert(file.path.as_str()) {
                violations.add(field, "must be unique among the files");
            }
        }
        for (i, file) in files.iter().enumerate() {
            let above = file.path.match_indices('/').map(|(end, _)| &file.path[..end]);
            if let Some(other) = above.into_iter().find(|above| paths.contains(above)) {
                violations.add(
                    format!("{field}.files[{i}].path"),
                    format!("must not lie below the file {other:?}"),
                );
            }
        }
        Self { text, files }
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn files(&self) -> &[ContextFile] {
        &self.files
    }
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        Err("must not be empty")
    } else if path.len() > DockerfileSource::MAX_PATH {
        Err("must have at most 255 bytes")
    } else if path.chars().any(char::is_control) {
        Err("must not contain control characters")
    } else if path.starts_with('/') {
        Err("must be relative")
    } else if path.split('/').any(|name| matches!(name, "" | "." | "..")) {
        Err("must not contain empty, `.` or `..` names")
    } else if path == "Dockerfile" {
        Err("must not be `Dockerfile`: that is the configuration's `text`")
    } else {
        Ok(())
    }
}

mod base64_bytes {
    //! Bytes as base64 text within JSON.

    use base64::{Engine, prelude::BASE64_STANDARD};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(text: &str, paths: &[&str]) -> Vec<String> {
        let files = paths
            .iter()
            .map(|path| ContextFile { path: (*path).to_owned(), content: Vec::new(), executable: false })
            .collect();
        let mut violations = Violations::default();
        DockerfileSource::parse(text.to_owned(), files, "config.dockerfile", &mut violations);
        violations.iter().map(|v| format!("{}: {}", v.field, v.rule)).collect()
    }

    #[test]
    fn a_good_configuration_violates_nothing() {
        assert_eq!(violations("FROM scratch", &["a", "b/c", "b/d.txt", "..e/f"]), [""; 0]);
    }

    #[test]
    fn all_violations_are_found_together() {
        let found = violations("", &["", "/etc/passwd", "a/../b", "Dockerfile", "x", "x", "x/y", "a\nb"]);
        assert_eq!(found.len(), 8, "{found:#?}");
        assert!(found.iter().any(|v| v.starts_with("config.dockerfile.files[6].path: must not lie below")));
    }

    #[test]
    fn the_size_is_bounded() {
        assert_eq!(violations(&"#".repeat(256 * 1024), &[]), [""; 0]);
        assert_eq!(violations(&"#".repeat(256 * 1024), &["a"]).len(), 1);
    }
}
