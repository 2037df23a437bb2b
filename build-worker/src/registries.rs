//! What a Docker configuration directory knows of registries: the credentials that `docker login` and credential helpers keep.

use std::{collections::HashMap, fmt, fs, io, path::PathBuf, sync::Arc};

use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};
use serde::Deserialize;

use crate::reference;

/// The registries that a Docker configuration directory has credentials for. It is read again whenever it is asked, so that
/// they can be renewed.
#[derive(Clone, Debug)]
pub(crate) struct Registries {
    directory: PathBuf,
}

/// What a registry is to be convinced with. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    Password { user: String, password: String },
    IdentityToken(String),
}

/// Why there are no credentials, in words that hold none.
#[derive(Debug, thiserror::Error)]
#[error("the credentials for {registry}: {reason}")]
pub(crate) struct CredentialsError {
    registry: String,
    reason: String,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ConfigFile {
    auths: HashMap<String, serde::de::IgnoredAny>,
    cred_helpers: HashMap<String, serde::de::IgnoredAny>,
}

impl Registries {
    /// Those of a directory that need not exist.
    pub(crate) fn of(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// The credentials for the registry of a reference; none when none are configured. May run a credential helper.
    pub(crate) async fn credentials(&self, reference: &str) -> Result<Option<Credentials>, CredentialsError> {
        let registry = reference::registry(reference);
        match self.read().map_err(|error| refused(registry, error.to_string()))? {
            Some(config) => find(Arc::from(config), registry.to_owned()).await,
            None => Ok(None),
        }
    }

    /// The credentials of every registry that has an entry of its own, by the name that it is configured by. Those that
    /// cannot be had are left out: most builds do not need them.
    pub(crate) async fn all(&self) -> HashMap<String, Credentials> {
        let text: Arc<str> = match self.read() {
            Ok(text) => Arc::from(text.unwrap_or_else(|| "{}".to_owned())),
            Err(error) => {
                tracing::warn!(%error, "the Docker configuration cannot be read");
                return HashMap::new();
            }
        };
        let config: ConfigFile = serde_json::from_str(&text).unwrap_or_else(|_| {
            tracing::warn!("the Docker configuration cannot be understood");
            ConfigFile::default()
        });
        let mut all = HashMap::new();
        for registry in config.auths.into_keys().chain(config.cred_helpers.into_keys()) {
            match find(Arc::clone(&text), registry.clone()).await {
                Ok(Some(credentials)) => drop(all.insert(registry, credentials)),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "credentials are left out"),
            }
        }
        all
    }

    fn read(&self) -> io::Result<Option<String>> {
        match fs::read_to_string(self.directory.join("config.json")) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What a configuration has for a registry.
async fn find(config: Arc<str>, registry: String) -> Result<Option<Credentials>, CredentialsError> {
    let asked = registry.clone();
    let found = tokio::task::spawn_blocking(move || get_credential_from_reader(config.as_bytes(), &asked));
    match found.await {
        Ok(Ok(DockerCredential::UsernamePassword(user, password))) => {
            Ok(Some(Credentials::Password { user, password }))
        }
        Ok(Ok(DockerCredential::IdentityToken(token))) => Ok(Some(Credentials::IdentityToken(token))),
        Ok(Err(CredentialRetrievalError::NoCredentialConfigured)) => Ok(None),
        // What the helper has printed may hold the secret.
        Ok(Err(CredentialRetrievalError::HelperFailure { helper, .. })) => {
            Err(refused(&registry, format!("the credential helper {helper} has failed")))
        }
        Ok(Err(error)) => Err(refused(&registry, error.to_string())),
        Err(error) => Err(refused(&registry, error.to_string())),
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

fn refused(registry: &str, reason: String) -> CredentialsError {
    CredentialsError { registry: registry.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn credentials_come_from_the_directory_and_are_not_shown() {
        let directory = tempfile::tempdir().expect("a directory");
        let registries = Registries::of(directory.path().to_owned());
        assert_eq!(registries.credentials("r.example/x").await.expect("no file"), None);
        let config = r#"{"auths": {"r.example": {"auth": "dHJhaWxlcjpzZXNhbWU="}, "other.example": {}},
                         "credHelpers": {"helped.example": "there-is-none"}}"#;
        fs::write(directory.path().join("config.json"), config).expect("a file");
        let found = registries.credentials("r.example/x:1").await.expect("a file").expect("credentials");
        assert_eq!(
            found,
            Credentials::Password { user: "trailer".to_owned(), password: "sesame".to_owned() }
        );
        assert!(!format!("{found:?}").contains("sesame"));
        assert_eq!(registries.credentials("r2.example/x:1").await.expect("a file"), None);
        let error = registries.credentials("helped.example/x").await.expect_err("a helper that is missing");
        assert!(error.to_string().starts_with("the credentials for helped.example: "), "{error}");
    }
}
