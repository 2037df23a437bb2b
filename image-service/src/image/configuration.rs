//! The configuration that an image is built from, checked once when it is received.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
    time::Duration,
};

use serde::{Deserialize, Serialize};

mod apt_package;
mod python_requirement;
mod rules;
mod secret;
mod validation;

pub(crate) use self::secret::{GeneratedStep, Secret, SshAgent};

/// A configuration that satisfies every rule. The store keeps the serialised form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Configuration(ConfigurationDraft);

/// An unchecked configuration; the API documents the meaning of each part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConfigurationDraft {
    #[serde(flatten)]
    pub(crate) source: Source,
    /// Set if no source was given, so that `source` is a placeholder. Never set in a checked configuration.
    #[serde(skip)]
    pub(crate) lacks_source: bool,
    #[serde(default)]
    pub(crate) services: Vec<Service>,
    #[serde(default)]
    pub(crate) pull_base: bool,
    #[serde(default)]
    pub(crate) squash: bool,
    #[serde(default)]
    pub(crate) push: bool,
    #[serde(default)]
    pub(crate) no_cache: bool,
    /// Only worker that may build the image; empty for any.
    #[serde(default)]
    pub(crate) worker: String,
    #[serde(default)]
    pub(crate) worker_labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) build_timeout_ms: Option<i64>,
    #[serde(default)]
    pub(crate) secrets: Vec<Secret>,
    #[serde(default)]
    pub(crate) ssh_agents: Vec<SshAgent>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Source {
    Dockerfile(Dockerfile),
    Generate(Generate),
    Pull(Pull),
}

/// A hand-written Dockerfile and its context.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Dockerfile {
    pub(crate) text: String,
    pub(crate) files: Vec<File>,
    #[serde(default)]
    pub(crate) build_args: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) target: String,
    /// Digest of the archive that is the context, instead of `files`; empty for none.
    #[serde(default)]
    pub(crate) archive: String,
    /// URL from which the worker fetches the context, instead of `files`; empty for none.
    #[serde(default)]
    pub(crate) remote: String,
    /// Path of the Dockerfile in the archive or the remote context if `text` is empty.
    #[serde(default)]
    pub(crate) dockerfile_path: String,
    /// Name of the worker's secret with the credentials for the remote context; empty for none.
    #[serde(default)]
    pub(crate) remote_credentials: String,
}

/// The parts from which a Dockerfile is generated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Generate {
    pub(crate) base_image: String,
    pub(crate) apt_packages: Vec<String>,
    pub(crate) python_packages: Vec<String>,
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) user: String,
    pub(crate) start_commands: Vec<String>,
    pub(crate) files: Vec<File>,
}

/// An image that is pulled from a registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pull {
    pub(crate) reference: String,
}

/// A service of a workspace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) packages: Vec<String>,
    pub(crate) command: String,
    pub(crate) ports: Vec<i32>,
    pub(crate) environment: BTreeMap<String, String>,
}

/// A file of a build context or of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct File {
    pub(crate) path: String,
    #[serde(with = "base64_bytes")]
    pub(crate) content: Vec<u8>,
    pub(crate) executable: bool,
}

/// An ability that not every worker has.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Capability {
    Dockerfile,
    Generate,
    Pull,
    Snapshot,
    Push,
    Squash,
    Archive,
    /// Builds that an earlier version has queued may also require a directory of a remote context.
    #[serde(alias = "remote_directory")]
    Remote,
    /// Capability of a later version that shares the database; no worker of this version has it.
    #[serde(other)]
    Unknown,
}

/// Requirements that a worker has to meet to take a build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Requirements {
    /// Name of the worker; empty for any.
    pub(crate) worker: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) capabilities: BTreeSet<Capability>,
}

impl Configuration {
    /// Returns the digest of the archive that is the build context.
    pub(crate) fn archive(&self) -> Option<&str> {
        self.dockerfile().map(|dockerfile| dockerfile.archive.as_str()).filter(|archive| !archive.is_empty())
    }

    /// Returns the maximum running time of a build, if the configuration has one.
    pub(crate) fn build_timeout(&self) -> Option<Duration> {
        self.build_timeout_ms.and_then(|ms| u64::try_from(ms).ok()).map(Duration::from_millis)
    }

    /// Returns the path of the Dockerfile in the archive, if it is there.
    pub(crate) fn dockerfile_in_archive(&self) -> Option<&str> {
        const DEFAULT: &str = "Dockerfile";
        let dockerfile = self.dockerfile()?;
        let path = &*dockerfile.dockerfile_path;
        let is_there = !dockerfile.archive.is_empty() && dockerfile.text.is_empty();
        is_there.then_some(if path.is_empty() { DEFAULT } else { path })
    }

    /// Returns the image that a generated Dockerfile starts from.
    pub(crate) fn base(&self) -> Option<&str> {
        match &self.source {
            Source::Generate(generate) => Some(&generate.base_image),
            Source::Dockerfile(_) | Source::Pull(_) => None,
        }
    }

    /// Returns the URL of the build context.
    pub(crate) fn remote(&self) -> Option<&str> {
        self.dockerfile().map(|dockerfile| dockerfile.remote.as_str()).filter(|remote| !remote.is_empty())
    }

    fn dockerfile(&self) -> Option<&Dockerfile> {
        match &self.source {
            Source::Dockerfile(dockerfile) => Some(dockerfile),
            Source::Generate(_) | Source::Pull(_) => None,
        }
    }

    /// Reports whether the image is pulled from a registry.
    pub(crate) fn is_pull(&self) -> bool {
        matches!(self.source, Source::Pull(_))
    }

    /// Returns the requirements that a worker has to meet to build the image.
    pub(crate) fn requirements(&self) -> Requirements {
        let source = match &self.source {
            Source::Dockerfile(_) => Capability::Dockerfile,
            Source::Generate(_) => Capability::Generate,
            Source::Pull(_) => Capability::Pull,
        };
        let options = [
            (self.push, Capability::Push),
            (self.squash, Capability::Squash),
            (self.archive().is_some(), Capability::Archive),
            (self.remote().is_some(), Capability::Remote),
        ];
        let wanted =
            options.into_iter().filter_map(|(is_wanted, capability)| is_wanted.then_some(capability));
        Requirements {
            worker: self.worker.clone(),
            labels: self.worker_labels.clone(),
            capabilities: wanted.chain([source]).collect(),
        }
    }
}

impl Capability {
    /// Returns what a worker can do that names this capability of the dispatch protocol; nothing if the name
    /// is unknown.
    pub(crate) fn of_worker(name: &str) -> &'static [Self] {
        match name {
            // The worker gets generated images as Dockerfiles.
            "dockerfile" => &[Self::Dockerfile, Self::Generate],
            "pull" => &[Self::Pull],
            "push" => &[Self::Push],
            "squash" => &[Self::Squash],
            "snapshot" => &[Self::Snapshot],
            "archive" => &[Self::Archive],
            "remote" => &[Self::Remote],
            _ => &[],
        }
    }
}

impl Requirements {
    /// Returns the requirements of a snapshot, which only the worker that runs the workspace can take.
    pub(crate) fn of_snapshot(worker: String) -> Self {
        Self { worker, labels: BTreeMap::new(), capabilities: [Capability::Snapshot].into() }
    }

    /// Reports whether a worker meets the requirements.
    pub(crate) fn fit(
        &self,
        name: &str,
        labels: &BTreeMap<String, String>,
        capabilities: &BTreeSet<Capability>,
    ) -> bool {
        (self.worker.is_empty() || self.worker == name)
            && self.labels.iter().all(|(label, value)| labels.get(label) == Some(value))
            && self.capabilities.is_subset(capabilities)
            && !self.capabilities.contains(&Capability::Unknown)
    }
}

impl Deref for Configuration {
    type Target = ConfigurationDraft;

    fn deref(&self) -> &ConfigurationDraft {
        &self.0
    }
}

impl ConfigurationDraft {
    /// Returns a configuration that has this source and is otherwise empty.
    pub(crate) fn from_source(source: Source) -> Self {
        Self {
            source,
            lacks_source: false,
            services: Vec::new(),
            pull_base: false,
            squash: false,
            push: false,
            no_cache: false,
            worker: String::new(),
            worker_labels: BTreeMap::new(),
            build_timeout_ms: None,
            secrets: Vec::new(),
            ssh_agents: Vec::new(),
        }
    }

    /// Returns every searchable text of the configuration, each as a separate value.
    pub(crate) fn texts(&self) -> Vec<&str> {
        let mut texts = Vec::new();
        match &self.source {
            Source::Dockerfile(Dockerfile {
                text,
                files,
                build_args,
                target,
                archive,
                remote,
                dockerfile_path,
                remote_credentials,
            }) => {
                texts.extend([text.as_str(), target, archive, remote, dockerfile_path, remote_credentials]);
                texts.extend(pairs(build_args));
                texts.extend(files.iter().flat_map(File::texts));
            }
            Source::Generate(Generate {
                base_image,
                apt_packages,
                python_packages,
                environment,
                user,
                start_commands,
                files,
            }) => {
                texts.extend([base_image.as_str(), user]);
                for list in [apt_packages, python_packages, start_commands] {
                    texts.extend(list.iter().map(String::as_str));
                }
                texts.extend(pairs(environment));
                texts.extend(files.iter().flat_map(File::texts));
            }
            Source::Pull(Pull { reference }) => texts.push(reference),
        }
        for Service { name, packages, command, ports: _, environment } in &self.services {
            texts.extend([name.as_str(), command]);
            texts.extend(packages.iter().map(String::as_str));
            texts.extend(pairs(environment));
        }
        texts.extend(self.secrets.iter().flat_map(Secret::texts));
        texts.extend(self.ssh_agents.iter().flat_map(SshAgent::texts));
        texts.push(&self.worker);
        texts.extend(pairs(&self.worker_labels));
        texts.retain(|text| !text.is_empty());
        texts
    }
}

impl Service {
    /// Returns the ports as searchable texts.
    pub(crate) fn port_texts(&self) -> impl Iterator<Item = String> {
        self.ports.iter().map(i32::to_string)
    }
}

impl File {
    /// Returns the content if it is text. Content with NUL is not, because no database could keep it as text.
    fn text(&self) -> Option<&str> {
        std::str::from_utf8(&self.content).ok().filter(|text| !text.contains('\0'))
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        [Some(self.path.as_str()), self.text()].into_iter().flatten()
    }
}

fn pairs(map: &BTreeMap<String, String>) -> impl Iterator<Item = &str> {
    map.iter().flat_map(|(name, value)| [name.as_str(), value])
}

mod base64_bytes {
    //! Serialisation of bytes as base64 text in JSON.

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

    #[test]
    fn a_build_that_waits_since_an_earlier_version_needs_nothing_that_is_gone() {
        let stored = r#"{"capabilities": ["dockerfile", "remote", "remote_directory"]}"#;
        let requirements: Requirements = serde_json::from_str(stored).expect("an earlier version wrote it");
        assert_eq!(requirements.capabilities, [Capability::Dockerfile, Capability::Remote].into());
    }
}
