//! Docker configuration directory: registry credentials and the proxies of builds.
//!
//! The credentials are those that `docker login` and credential helpers keep, and are found as the docker
//! command finds them. In addition, an entry for a path of a registry applies to the repositories below that
//! path alone, and a member `trailer`, which docker ignores, says which creators of images may use an entry.

use std::{
    collections::HashMap,
    fmt, fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use self::{
    config_file::{ConfigFile, Origin},
    helper::Helpers,
};
use crate::reference;

mod config_file;
mod helper;
mod json;
#[cfg(test)]
mod tests;

/// A Docker configuration directory.
///
/// Its file is read again for every lookup, so that credentials can be renewed.
#[derive(Clone, Debug)]
pub(crate) struct DockerConfig {
    directory: PathBuf,
    helpers: Helpers,
    /// Hash of the fault in the file that was logged last, so that each is logged once.
    logged: Arc<Mutex<Option<u64>>>,
}

/// The credentials for a registry; never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// A token to get access tokens with.
    IdentityToken {
        token: String,
        /// User and password for registries that give no tokens; empty if there are none.
        user: String,
        password: String,
    },
    /// A token that the registry itself accepts.
    RegistryToken(String),
}

/// The reason why there are no credentials, which the operator of the worker has to fix, without secrets.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the credentials for {registry}: {reason}")]
pub(crate) struct CredentialsError {
    pub(crate) registry: String,
    pub(crate) reason: String,
}

impl DockerConfig {
    const FILE: &str = "config.json";
    /// Maximum size of the configuration file, in bytes.
    const LARGEST_FILE: u64 = 1024 * 1024;

    /// Creates the configuration of a directory, which need not exist.
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory, helpers: Helpers::default(), logged: Arc::default() }
    }

    /// Returns the credentials for the repository of a reference, or `None` if the creator of an image may
    /// use none.
    ///
    /// May run a credential helper, which dropping the future ends. A failure is logged.
    ///
    /// # Errors
    ///
    /// Returns an error if the configuration cannot be read or its helper fails.
    pub(crate) async fn credentials(
        &self,
        reference: &str,
        creator: &str,
    ) -> Result<Option<Credentials>, CredentialsError> {
        let (host, _) = reference::host_and_path(reference);
        let unavailable = |reason| CredentialsError { registry: host.to_owned(), reason };
        let config = self.config().map_err(unavailable)?;
        match config.origin(reference, creator).map_err(unavailable)? {
            Origin::Nothing => Ok(None),
            Origin::Entry(credentials) => Ok(Some(credentials)),
            Origin::Helper { name, server, in_file } => match self.helpers.get(&name, &server).await {
                Ok(found) => Ok(found),
                Err(error) => {
                    tracing::warn!(registry = host, %error, "a credential helper has failed");
                    in_file.map(Some).ok_or_else(|| unavailable(error.to_string()))
                }
            },
        }
    }

    /// Reports whether there are credentials for the repository of a reference, whoever may use them; true if
    /// that is unknown.
    pub(crate) fn covers(&self, reference: &str) -> bool {
        let (host, path) = reference::host_and_path(reference);
        self.config().map_or(true, |config| config.covers(host, &path))
    }

    /// Returns the build arguments that name the proxies of builds on an engine.
    ///
    /// Each is set in upper and in lower case, as the docker command does.
    pub(crate) fn proxy_arguments(&self, engine: &str) -> HashMap<String, String> {
        // The fault was logged.
        let config = self.config().unwrap_or_default();
        config
            .proxies(engine)
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .flat_map(|(name, value)| [(name.to_uppercase(), value.clone()), (name.to_owned(), value)])
            .collect()
    }

    /// Reads the file; one that is not there counts as empty. Logs a fault once per change of the file.
    fn config(&self) -> Result<ConfigFile, String> {
        let content = self.read();
        let config = match &content {
            Ok(Some(content)) => ConfigFile::parse(content),
            Ok(None) => Ok(ConfigFile::default()),
            Err(error) => Err(error.to_string()),
        };
        let config = config.map_err(|reason| format!("{}: {reason}", Self::FILE));
        let fault = config.as_ref().err().map(|reason| {
            let mut hasher = DefaultHasher::new();
            (reason, content.unwrap_or_default()).hash(&mut hasher);
            hasher.finish()
        });
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Err(error), true) = (&config, *logged != fault) {
            let directory = self.directory.display();
            tracing::warn!(%directory, error, "there are neither registry credentials nor proxies of builds");
        }
        *logged = fault;
        config
    }

    fn read(&self) -> io::Result<Option<Vec<u8>>> {
        let file = match fs::File::open(self.directory.join(Self::FILE)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut content = Vec::new();
        file.take(Self::LARGEST_FILE + 1).read_to_end(&mut content)?;
        if content.len() as u64 > Self::LARGEST_FILE {
            return Err(io::Error::other(format!("it is larger than {} bytes", Self::LARGEST_FILE)));
        }
        Ok(Some(content))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}
