//! Secrets and SSH agents of this worker, which builds use by name.
//!
//! A directory holds them as Kubernetes and Docker mount them: a file for each secret, a socket for each SSH
//! agent. Its file `trailer.json` says who may use which. All is read anew for each build, so that a value can
//! be rotated.

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use proto::dispatch::{Assignment, DockerBuild, NamedSecret};
use tokio::io::AsyncReadExt;

use self::policy::{Policy, User};
pub(crate) use self::{
    netrc::Netrc,
    scrubber::{Held, Scrubber},
};

mod encodings;
mod netrc;
mod policy;
mod scrubber;

/// The secrets of this worker.
#[derive(Clone, Debug, Default)]
pub(crate) struct SecretStore {
    /// `None` if there are none.
    directory: Option<PathBuf>,
}

/// The value of a secret, which no log shows.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct SecretValue(Arc<[u8]>);

/// The secrets and SSH agents of one build.
#[derive(Debug, Default)]
pub(crate) struct BuildSecrets {
    /// Values by the ids by which steps mount them.
    pub(crate) values: BTreeMap<String, SecretValue>,
    /// Sockets of SSH agents by the ids by which steps mount them.
    pub(crate) ssh_agents: BTreeMap<String, PathBuf>,
    /// Credentials for the remote context.
    pub(crate) remote_credentials: Netrc,
    /// The filter of all values.
    pub(crate) scrubber: Arc<Scrubber>,
}

/// The reason why a build does not get its secrets.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretError {
    /// A secret that the build may not use, or cannot.
    #[error("the secret {name:?} {rule}")]
    Refused { name: String, rule: &'static str },
    /// A failure that the operator has to mend, and that the log of the worker shows.
    #[error("the worker cannot read its secrets")]
    Unreadable,
}

impl SecretStore {
    /// Name of the file that says who may use which secret.
    const POLICY: &str = "trailer.json";
    /// Maximum size of a value, in bytes.
    const MAX_BYTES: u64 = 64 * 1024;
    const NOT_FOUND: &str = "is none that this build may use on this worker";
    const NO_AGENT: &str = "is no SSH agent that this build may use on this worker";

    pub(crate) fn new(directory: Option<PathBuf>) -> Self {
        Self { directory }
    }

    /// Checks that the policy can be read.
    ///
    /// # Errors
    ///
    /// Returns the reason why it cannot.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Some(directory) = &self.directory else { return Ok(()) };
        let path = directory.join(Self::POLICY);
        let policy = std::fs::read(&path).and_then(|content| Policy::parse(&content));
        policy.map(drop).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Reads the secrets that a build names.
    ///
    /// # Errors
    ///
    /// Returns [`SecretError::Refused`] if the worker does not have something, or not for this build, or if a
    /// value is empty or too large, and [`SecretError::Unreadable`] if it cannot be read.
    pub(crate) async fn resolve(
        &self,
        assignment: &Assignment,
        order: &DockerBuild,
    ) -> Result<BuildSecrets, SecretError> {
        let credentials = Some(order.remote_credentials.as_str()).filter(|name| !name.is_empty());
        let names = order.secrets.iter().chain(&order.ssh_agents).map(|secret| secret.name.as_str());
        let Some(first) = names.chain(credentials).next() else { return Ok(BuildSecrets::default()) };
        let Some(directory) = &self.directory else { return Err(refused(first, Self::NOT_FOUND)) };
        let policy_path = directory.join(Self::POLICY);
        let policy = tokio::fs::read(&policy_path).await.and_then(|content| Policy::parse(&content));
        let policy = policy.map_err(|error| unreadable(&policy_path, error))?;
        let user = User {
            creator: &assignment.creator,
            requester: &assignment.requested_by,
            pools: &assignment.pools,
        };
        let path_of = |name: &str| {
            let is_allowed = name != Self::POLICY && policy.allows(name, &user);
            is_allowed.then(|| directory.join(name)).ok_or_else(|| refused(name, Self::NOT_FOUND))
        };

        let mut secrets = BuildSecrets::default();
        let mut hidden = Vec::new();
        for NamedSecret { id, name } in &order.secrets {
            let value = read(name, &path_of(name)?).await?;
            hidden.push((name.as_str(), value.clone()));
            secrets.values.insert(id.clone(), value);
        }
        for NamedSecret { id, name } in &order.ssh_agents {
            let no_agent = || refused(name, Self::NO_AGENT);
            let path = path_of(name).map_err(|_| no_agent())?;
            if !is_socket(&path).await.map_err(|error| unreadable(&path, error))? {
                return Err(no_agent());
            }
            secrets.ssh_agents.insert(id.clone(), path);
        }
        if let Some(name) = credentials {
            let value = read(name, &path_of(name)?).await?;
            let parsed = Netrc::parse(value.as_bytes());
            secrets.remote_credentials = parsed.ok_or_else(|| {
                refused(name, "is not in the format of netrc: `machine HOST login USER password PASSWORD`")
            })?;
            hidden.push((name, value));
        }
        let hidden: Vec<(String, SecretValue)> =
            hidden.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let preparing = tokio::task::spawn_blocking(move || {
            Scrubber::new(hidden.iter().map(|(name, value)| (name.as_str(), value.as_bytes())))
        });
        let scrubber = preparing.await.map_err(|error| unreadable(directory, io::Error::other(error)))?;
        secrets.scrubber = Arc::new(scrubber);
        Ok(secrets)
    }
}

async fn read(name: &str, path: &Path) -> Result<SecretValue, SecretError> {
    let is_file = match tokio::fs::metadata(path).await {
        Ok(metadata) => metadata.is_file(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(unreadable(path, error)),
    };
    if !is_file {
        return Err(refused(name, SecretStore::NOT_FOUND));
    }
    let file = tokio::fs::File::open(path).await.map_err(|error| unreadable(path, error))?;
    let mut value = Vec::new();
    let reading = file.take(SecretStore::MAX_BYTES + 1);
    tokio::pin!(reading);
    reading.read_to_end(&mut value).await.map_err(|error| unreadable(path, error))?;
    match u64::try_from(value.len()) {
        Ok(0) => Err(refused(name, "is empty")),
        Ok(1..=SecretStore::MAX_BYTES) if value.trim_ascii().len() < Scrubber::SHORTEST => {
            Err(refused(name, "has fewer than 4 bytes, which could not be hidden in the log"))
        }
        Ok(1..=SecretStore::MAX_BYTES) => Ok(SecretValue(value.into())),
        Ok(_) | Err(_) => Err(refused(name, "has more than 65,536 bytes")),
    }
}

async fn is_socket(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::FileTypeExt;
    match tokio::fs::metadata(path).await {
        Ok(metadata) => Ok(metadata.file_type().is_socket()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn refused(name: &str, rule: &'static str) -> SecretError {
    SecretError::Refused { name: name.to_owned(), rule }
}

fn unreadable(path: &Path, error: io::Error) -> SecretError {
    tracing::error!(path = %path.display(), %error, "cannot read secrets");
    SecretError::Unreadable
}

impl SecretValue {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue")
    }
}

#[cfg(test)]
mod tests;
