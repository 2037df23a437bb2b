//! Registry credentials for an engine, which come with the request for a transfer.

use bollard::auth::DockerCredentials;

use crate::{
    engine::EngineError,
    registry_credentials::{Credentials, CredentialsError, DockerConfig},
};

/// The credentials for a request to the engine, and the reason if they cannot be had.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) credentials: Option<DockerCredentials>,
    failure: Option<CredentialsError>,
}

impl Found {
    /// Looks up the credentials for a reference, as they are for images of this creator.
    ///
    /// The registry may require none, so a failure is only part of the registry's refusal: see
    /// [`Self::explain`].
    pub(super) async fn look_up(docker_config: &DockerConfig, reference: &str, creator: &str) -> Self {
        match docker_config.credentials(reference, creator).await {
            Ok(credentials) => Self { credentials: credentials.map(Into::into), failure: None },
            Err(failure) => Self { credentials: None, failure: Some(failure) },
        }
    }

    /// Adds to a registry's refusal that credentials could not be had.
    ///
    /// The operator of the worker has to fix that, so it is worth a retry.
    pub(super) fn explain(&self, error: EngineError) -> EngineError {
        /// Words of a refusal that credentials may change, in lower case.
        const WORDS: [&str; 5] =
            ["denied", "unauthorized", "authentication required", "no basic auth credentials", "forbidden"];
        let (EngineError::Refused(message), Some(failure)) = (&error, &self.failure) else { return error };
        let lower = message.to_lowercase();
        if WORDS.iter().any(|words| lower.contains(words)) {
            EngineError::Unreachable(format!("{message} ({failure})"))
        } else {
            error
        }
    }
}

impl From<Credentials> for DockerCredentials {
    fn from(credentials: Credentials) -> Self {
        match credentials {
            Credentials::Password { user, password } => {
                Self { username: Some(user), password: Some(password), ..Self::default() }
            }
            Credentials::IdentityToken { token, user, password } => {
                let [username, password] =
                    [user, password].map(|text| Some(text).filter(|text| !text.is_empty()));
                Self { identitytoken: Some(token), username, password, ..Self::default() }
            }
            Credentials::RegistryToken(token) => Self { registrytoken: Some(token), ..Self::default() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_that_cannot_be_had_are_part_of_the_refusal() {
        let failure = CredentialsError { registry: "p.example".to_owned(), reason: "it is empty".to_owned() };
        let found = Found { credentials: None, failure: Some(failure) };
        let explained = |found: &Found, words: &str| found.explain(EngineError::Refused(words.to_owned()));
        let denied = explained(&found, "pull access denied");
        assert!(matches!(&denied, EngineError::Unreachable(message) if message.contains("it is empty")));
        for (found, words) in [(&found, "manifest unknown"), (&Found::default(), "pull access denied")] {
            let as_it_was = explained(found, words);
            assert!(matches!(&as_it_was, EngineError::Refused(message) if message == words));
        }
    }
}
