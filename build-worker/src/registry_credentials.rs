//! Docker configuration directory: registry credentials and the proxies of builds.
//!
//! The credentials are those that `docker login` and credential helpers keep.

use std::{collections::HashMap, fmt, fs, io, path::PathBuf, sync::Arc};

use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};
use serde::Deserialize;

use crate::reference;

/// The registries for which a Docker configuration directory has credentials.
///
/// The directory is read again for every lookup, so that credentials can be renewed.
#[derive(Clone, Debug)]
pub(crate) struct DockerConfig {
    directory: PathBuf,
}

/// The credentials for a registry; never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    Password { user: String, password: String },
    IdentityToken(String),
}

/// The reason why there are no credentials, in a text without secrets.
#[derive(Debug, thiserror::Error)]
#[error("the credentials for {registry}: {reason}")]
pub(crate) struct CredentialsError {
    registry: String,
    reason: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ConfigFile {
    /// Proxies by the address of an engine, or `default`.
    proxies: HashMap<String, Proxies>,
}

/// The proxies for builds.
#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Proxies {
    http_proxy: String,
    https_proxy: String,
    no_proxy: String,
    ftp_proxy: String,
    all_proxy: String,
}

impl DockerConfig {
    /// Creates the registries of a directory, which need not exist.
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Returns the credentials for the registry of a reference, or `None` if none are configured.
    ///
    /// May run a credential helper.
    ///
    /// # Errors
    ///
    /// Returns [`CredentialsError`] if the configuration cannot be read or its helper fails.
    pub(crate) async fn credentials(&self, reference: &str) -> Result<Option<Credentials>, CredentialsError> {
        self.find(reference::registry(reference)).await
    }

    /// Returns the credentials for a registry by its host, as [`Self::credentials`] does by a reference.
    ///
    /// # Errors
    ///
    /// Returns [`CredentialsError`] under the same conditions.
    pub(crate) async fn credentials_of_host(
        &self,
        host: &str,
    ) -> Result<Option<Credentials>, CredentialsError> {
        self.find(reference::registry_of_host(host)).await
    }

    async fn find(&self, registry: &str) -> Result<Option<Credentials>, CredentialsError> {
        match self.read().map_err(|error| refused(registry, error.to_string()))? {
            Some(config) => find(Arc::from(config), registry.to_owned()).await,
            None => Ok(None),
        }
    }

    /// Returns the build arguments that name the proxies of builds on an engine.
    ///
    /// Each is set in upper and in lower case, as the docker command does.
    pub(crate) fn proxy_arguments(&self, engine: &str) -> HashMap<String, String> {
        let text = match self.read() {
            Ok(text) => text.unwrap_or_else(|| "{}".to_owned()),
            Err(error) => {
                tracing::warn!(%error, "the Docker configuration cannot be read: builds get no proxies");
                return HashMap::new();
            }
        };
        let config: ConfigFile = serde_json::from_str(&text).unwrap_or_else(|_| {
            tracing::warn!("the Docker configuration cannot be understood: builds get no proxies");
            ConfigFile::default()
        });
        let Some(proxies) = config.proxies.get(engine).or_else(|| config.proxies.get("default")) else {
            return HashMap::new();
        };
        let Proxies { http_proxy, https_proxy, no_proxy, ftp_proxy, all_proxy } = proxies.clone();
        [
            ("http_proxy", http_proxy),
            ("https_proxy", https_proxy),
            ("no_proxy", no_proxy),
            ("ftp_proxy", ftp_proxy),
            ("all_proxy", all_proxy),
        ]
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .flat_map(|(name, value)| [(name.to_uppercase(), value.clone()), (name.to_owned(), value)])
        .collect()
    }

    fn read(&self) -> io::Result<Option<String>> {
        match fs::read_to_string(self.directory.join("config.json")) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Returns the credentials for a registry in a configuration.
async fn find(config: Arc<str>, registry: String) -> Result<Option<Credentials>, CredentialsError> {
    let asked = registry.clone();
    let found = tokio::task::spawn_blocking(move || get_credential_from_reader(config.as_bytes(), &asked));
    match found.await {
        Ok(Ok(DockerCredential::UsernamePassword(user, password))) => {
            Ok(Some(Credentials::Password { user, password }))
        }
        Ok(Ok(DockerCredential::IdentityToken(token))) => Ok(Some(Credentials::IdentityToken(token))),
        Ok(Err(CredentialRetrievalError::NoCredentialConfigured)) => Ok(None),
        // The output of the helper may contain the secret.
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
        let docker_config = DockerConfig::new(directory.path().to_owned());
        assert_eq!(docker_config.credentials("r.example/x").await.expect("no file"), None);
        let config = r#"{"auths": {"r.example": {"auth": "dHJhaWxlcjpzZXNhbWU="}, "other.example": {}},
                         "credHelpers": {"helped.example": "there-is-none"}}"#;
        fs::write(directory.path().join("config.json"), config).expect("a file");
        let found = docker_config.credentials("r.example/x:1").await.expect("a file").expect("credentials");
        assert_eq!(
            found,
            Credentials::Password { user: "trailer".to_owned(), password: "sesame".to_owned() }
        );
        assert!(!format!("{found:?}").contains("sesame"));
        assert_eq!(docker_config.credentials("r2.example/x:1").await.expect("a file"), None);
        let by_host = docker_config.credentials_of_host("r.example").await.expect("a file");
        assert_eq!(by_host, Some(found));
        let error =
            docker_config.credentials("helped.example/x").await.expect_err("a helper that is missing");
        assert!(error.to_string().starts_with("the credentials for helped.example: "), "{error}");
    }

    #[test]
    fn proxies_become_build_arguments() {
        let directory = tempfile::tempdir().expect("a directory");
        let docker_config = DockerConfig::new(directory.path().to_owned());
        assert!(docker_config.proxy_arguments("unix:///x").is_empty());
        let config = r#"{"proxies": {"default": {"httpProxy": "http://p:1", "noProxy": "a,b"},
                         "tcp://e:2375": {"allProxy": "socks5://p:2"}}}"#;
        fs::write(directory.path().join("config.json"), config).expect("a file");
        let arguments = |engine: &str| {
            let mut arguments: Vec<String> = docker_config
                .proxy_arguments(engine)
                .into_iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            arguments.sort();
            arguments
        };
        assert_eq!(
            arguments("unix:///x"),
            ["HTTP_PROXY=http://p:1", "NO_PROXY=a,b", "http_proxy=http://p:1", "no_proxy=a,b"]
        );
        assert_eq!(arguments("tcp://e:2375"), ["ALL_PROXY=socks5://p:2", "all_proxy=socks5://p:2"]);
    }
}
