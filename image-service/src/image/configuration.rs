//! What an image is built from, checked once when it comes in.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
};

use serde::{Deserialize, Serialize};

mod checking;
mod remote;
mod rules;

/// A configuration that every rule holds for. Serialised, it is what the store keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Configuration(ConfigurationDraft);

/// A configuration before anything of it has been checked; see the API for what each part means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConfigurationDraft {
    #[serde(flatten)]
    pub(crate) source: Source,
    /// Whether none was given, and `source` stands for nothing. Never in what has been checked.
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
    /// The only worker that may build it; any when empty.
    #[serde(default)]
    pub(crate) worker: String,
    #[serde(default)]
    pub(crate) worker_labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) build_timeout_ms: Option<i64>,
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
    /// The digest of the archive that is the context, instead of `files`; none when empty.
    #[serde(default)]
    pub(crate) archive: String,
    /// The URL that the engine gets the context from, instead of `files`; none when empty.
    #[serde(default)]
    pub(crate) remote: String,
    /// Where the Dockerfile lies in the archive or the remote context when `text` is empty.
    #[serde(default)]
    pub(crate) dockerfile_path: String,
}

/// What a Dockerfile is written from.
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

/// An image from a registry.
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

/// One file, of a build context or for an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct File {
    pub(crate) path: String,
    #[serde(with = "base64_bytes")]
    pub(crate) content: Vec<u8>,
    pub(crate) executable: bool,
}

/// Something that not every worker can do.
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
    Remote,
    RemoteDirectory,
    /// A later version's, which shares the database: no worker of this one's has it.
    #[serde(other)]
    Unknown,
}

/// What a worker must be to take a build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Requirements {
    /// Its name; any when empty.
    pub(crate) worker: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) capabilities: BTreeSet<Capability>,
}

impl Configuration {
    /// The digest of the archive that is its context.
    pub(crate) fn archive(&self) -> Option<&str> {
        self.dockerfile().map(|dockerfile| dockerfile.archive.as_str()).filter(|archive| !archive.is_empty())
    }

    /// The image that what is generated starts from.
    pub(crate) fn base(&self) -> Option<&str> {
        match &self.source {
            Source::Generate(generate) => Some(&generate.base_image),
            Source::Dockerfile(_) | Source::Pull(_) => None,
        }
    }

    /// The URL of its context.
    pub(crate) fn remote(&self) -> Option<&str> {
        self.dockerfile().map(|dockerfile| dockerfile.remote.as_str()).filter(|remote| !remote.is_empty())
    }

    fn dockerfile(&self) -> Option<&Dockerfile> {
        match &self.source {
            Source::Dockerfile(dockerfile) => Some(dockerfile),
            Source::Generate(_) | Source::Pull(_) => None,
        }
    }

    /// Whether the image comes from a registry.
    pub(crate) fn is_pull(&self) -> bool {
        matches!(self.source, Source::Pull(_))
    }

    /// What a worker must be to build it.
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
            (self.remote().is_some_and(remote::is_git_directory), Capability::RemoteDirectory),
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

impl Requirements {
    /// What only the worker that runs a workspace can do.
    pub(crate) fn of_snapshot(worker: String) -> Self {
        Self { worker, labels: BTreeMap::new(), capabilities: [Capability::Snapshot].into() }
    }

    /// Whether a worker is what is required.
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
    /// A configuration with this source and nothing beside it.
    pub(crate) fn of(source: Source) -> Self {
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
        }
    }

    /// Every text of it that can be searched for, each a value of its own.
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
            }) => {
                texts.extend([text.as_str(), target, archive, remote, dockerfile_path]);
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
        texts.push(&self.worker);
        texts.extend(pairs(&self.worker_labels));
        texts.retain(|text| !text.is_empty());
        texts
    }
}

impl Service {
    /// Its ports as they are searched for.
    pub(crate) fn port_texts(&self) -> impl Iterator<Item = String> {
        self.ports.iter().map(i32::to_string)
    }
}

impl File {
    /// Its content, if that is a text: what holds NUL is none, and no database could keep it as one.
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
