//! Registry credentials for an engine: with the request for a transfer, or over the session of a build.
//!
//! A session gives credentials for the images that were decided about, and only to pull them. The engine asks
//! by host, so it gets only what all of these images on the host have in common. Pushes have requests of
//! their own.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use bollard::{
    auth::DockerCredentials,
    moby::filesync::v1::{
        CredentialsRequest, CredentialsResponse, FetchTokenRequest, FetchTokenResponse,
        GetTokenAuthorityRequest, GetTokenAuthorityResponse, VerifyTokenAuthorityRequest,
        VerifyTokenAuthorityResponse, auth_server::Auth,
    },
};
use ring::{
    rand::SystemRandom,
    signature::{Ed25519KeyPair, KeyPair},
};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::{
    engine::{EngineError, ImageDecision, SourcePolicy},
    reference,
    registry_credentials::{Credentials, CredentialsError, DockerConfig},
};

/// The credentials for a request to the engine, and the reason if they cannot be had.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) credentials: Option<DockerCredentials>,
    failure: Option<CredentialsError>,
}

/// A service for the registry credentials of one build, which are looked up on demand.
#[derive(Debug)]
pub(super) struct SessionCredentials {
    docker_config: DockerConfig,
    /// Creator of the image.
    creator: String,
    /// References of the images that the build may use, by the hosts of their registries.
    images: BTreeMap<String, Vec<String>>,
    /// Credentials by host, each looked up once, although an engine may ask often.
    found: Mutex<HashMap<String, Arc<OnceCell<Lookup>>>>,
    /// Token that ends lookups with the session.
    closed: CancellationToken,
    /// Key by which the engine knows the tokens of this session; `None` if the host has no random numbers.
    authority: Option<Ed25519KeyPair>,
}

type Lookup = Result<Option<Credentials>, CredentialsError>;

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
    pub(super) fn explain(&self, error: EngineError) -> EngineError {
        explain(error, self.failure.as_slice())
    }
}

impl SessionCredentials {
    /// Time for which the engine may keep a token, in seconds.
    const TOKEN_LIFETIME: i64 = 60;

    /// Creates the service for a build that may use what was decided about until now.
    pub(super) fn of_build(docker_config: DockerConfig, sources: &dyn SourcePolicy) -> Self {
        let usable = sources.images().into_values().filter_map(|decision| match decision {
            ImageDecision::Usable { name, .. } => Some(name),
            ImageDecision::Missing(_) | ImageDecision::Refused | ImageDecision::Elsewhere { .. } => None,
        });
        Self::of_images(docker_config, sources.creator(), usable)
    }

    /// Creates the service for work of this creator with some images.
    pub(super) fn of_images(
        docker_config: DockerConfig,
        creator: &str,
        names: impl IntoIterator<Item = String>,
    ) -> Self {
        let mut images: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for name in names {
            let host = reference::host_and_path(&name).0.to_owned();
            images.entry(host).or_default().push(name);
        }
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).ok();
        Self {
            docker_config,
            creator: creator.to_owned(),
            images,
            found: Mutex::default(),
            closed: CancellationToken::new(),
            authority: pkcs8.and_then(|pkcs8| Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).ok()),
        }
    }

    /// Ends all lookups.
    pub(super) fn close(&self) {
        self.closed.cancel();
    }

    /// Adds to a registry's refusal that credentials could not be had.
    pub(super) fn explain(&self, error: EngineError) -> EngineError {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = found.values().filter_map(|found| found.get()?.as_ref().err().cloned());
        explain(error, &failures.collect::<Vec<_>>())
    }

    /// Returns the credentials for a host; none if they cannot be had, because the registry may require none.
    async fn of_host(&self, host: &str) -> Result<Option<Credentials>, Status> {
        let host = reference::canonical_host(host);
        let Some(images) = self.images.get(host) else { return Ok(None) };
        let cell = {
            let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(found.entry(host.to_owned()).or_default())
        };
        let images: Vec<&str> = images.iter().map(String::as_str).collect();
        let look_up = cell.get_or_init(|| self.docker_config.common_credentials(&images, &self.creator));
        let found = self.closed.run_until_cancelled(look_up).await;
        let found = found.ok_or_else(|| Status::cancelled("the session is over"))?;
        Ok(found.as_ref().ok().cloned().flatten())
    }

    /// Returns the token for the registry at a host, if that is what the worker has.
    async fn registry_token(&self, host: &str) -> Result<Option<String>, Status> {
        Ok(match self.of_host(host).await? {
            Some(Credentials::RegistryToken(token)) => Some(token),
            Some(Credentials::Password { .. } | Credentials::IdentityToken { .. }) | None => None,
        })
    }

    /// Reports whether a token's scope is to pull an image that the build may use.
    fn may_pull(&self, host: &str, scope: &str) -> bool {
        let Some((repository, "pull")) =
            scope.strip_prefix("repository:").and_then(|scope| scope.rsplit_once(':'))
        else {
            return false;
        };
        let images = self.images.get(reference::canonical_host(host)).into_iter().flatten();
        images.map(|image| reference::host_and_path(image).1).any(|path| path == repository)
    }
}

#[tonic::async_trait]
impl Auth for SessionCredentials {
    async fn credentials(
        &self,
        request: Request<CredentialsRequest>,
    ) -> Result<Response<CredentialsResponse>, Status> {
        let (username, secret) = match self.of_host(&request.into_inner().host).await? {
            Some(Credentials::Password { user, password }) => (user, password),
            Some(Credentials::IdentityToken { token, .. }) => (String::new(), token),
            Some(Credentials::RegistryToken(_)) | None => (String::new(), String::new()),
        };
        Ok(Response::new(CredentialsResponse { username, secret }))
    }

    // Unless the worker has a token for the registry, the engine itself asks the registry's token server,
    // with the credentials.

    async fn fetch_token(
        &self,
        request: Request<FetchTokenRequest>,
    ) -> Result<Response<FetchTokenResponse>, Status> {
        let FetchTokenRequest { host, scopes, .. } = request.into_inner();
        let mut scopes = scopes.iter().flat_map(|scopes| scopes.split_ascii_whitespace());
        if !scopes.all(|scope| self.may_pull(&host, scope)) {
            return Err(Status::permission_denied("the build may only pull what was decided about"));
        }
        let token = self.registry_token(&host).await?;
        let token =
            token.ok_or_else(|| Status::unimplemented("the worker has no token for this registry"))?;
        Ok(Response::new(FetchTokenResponse { token, expires_in: Self::TOKEN_LIFETIME, issued_at: 0 }))
    }

    async fn get_token_authority(
        &self,
        request: Request<GetTokenAuthorityRequest>,
    ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        match (&self.authority, self.registry_token(&request.into_inner().host).await?) {
            (Some(authority), Some(_)) => {
                let public_key = authority.public_key().as_ref().to_vec();
                Ok(Response::new(GetTokenAuthorityResponse { public_key }))
            }
            (_, None) | (None, _) => Err(Status::unimplemented("the worker has no token for this registry")),
        }
    }

    async fn verify_token_authority(
        &self,
        request: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        let VerifyTokenAuthorityRequest { host, payload, .. } = request.into_inner();
        match (&self.authority, self.registry_token(&host).await?) {
            (Some(authority), Some(_)) => {
                let signed = [authority.sign(&payload).as_ref(), &payload].concat();
                Ok(Response::new(VerifyTokenAuthorityResponse { signed }))
            }
            (_, None) | (None, _) => Err(Status::unimplemented("the worker has no token for this registry")),
        }
    }
}

/// Adds to a registry's refusal the failures to find credentials.
fn explain(error: EngineError, failures: &[CredentialsError]) -> EngineError {
    /// Words of a refusal that credentials may change, in lower case.
    const WORDS: [&str; 4] =
        ["unauthorized", "authentication required", "no basic auth credentials", "forbidden"];
    let EngineError::Refused(message) = error else { return error };
    let lower = message.to_lowercase();
    let is_policy = lower.contains("denied by policy");
    let is_refusal = lower.contains("denied") || WORDS.iter().any(|words| lower.contains(words));
    if failures.is_empty() || is_policy || !is_refusal {
        return EngineError::Refused(message);
    }
    let reasons: Vec<String> = failures.iter().map(ToString::to_string).collect();
    let message = format!("{message} ({})", reasons.join("; "));
    // What the operator of the worker has to fix is worth a retry.
    if failures.iter().any(|failure| matches!(failure, CredentialsError::Unavailable { .. })) {
        EngineError::Unreachable(message)
    } else {
        EngineError::Refused(message)
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
    use ring::signature::{ED25519, UnparsedPublicKey};

    use super::*;
    use crate::docker::source_policy::tests::FixedDecisions;

    /// Returns the service of a build that may use these images, with the content of the worker's file.
    fn session(config: &str, images: &[&str]) -> (tempfile::TempDir, SessionCredentials) {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("config.json"), config).expect("a file");
        let usable = |image: &&str| ImageDecision::Usable { name: (*image).to_owned(), id: None };
        let mut decisions: BTreeMap<String, ImageDecision> =
            images.iter().map(|image| ((*image).to_owned(), usable(image))).collect();
        decisions.insert("refused.example/x:1".to_owned(), ImageDecision::Refused);
        let docker_config = DockerConfig::new(directory.path().to_owned());
        let session = SessionCredentials::of_build(docker_config, &FixedDecisions(decisions));
        (directory, session)
    }

    async fn given(session: &SessionCredentials, host: &str) -> String {
        let request = CredentialsRequest { host: host.to_owned() };
        let given = session.credentials(Request::new(request)).await.expect("a response").into_inner();
        format!("{}:{}", given.username, given.secret)
    }

    #[tokio::test]
    async fn a_session_gives_only_what_all_decided_images_of_a_host_share() {
        let config = r#"{"auths": {
            "https://index.docker.io/v1/": {"username": "hub", "password": "1"},
            "r.example": {"username": "all", "password": "2"},
            "p.example/team": {"username": "team", "password": "3"},
            "p.example/team/secret": {"username": "secret", "password": "4"},
            "t.example": {"identitytoken": "5"},
            "refused.example": {"username": "no", "password": "6"},
            "a.example": {"username": "alice", "password": "7"},
            "b.example": {"username": "bob", "password": "8"}
        }, "trailer": {"a.example": {"creators": ["alice"]}, "b.example": {"creators": ["bob"]}}}"#;
        for (images, host, expected) in [
            (&["docker.io/library/a:1", "docker.io/b/c:1"][..], "registry-1.docker.io", "hub:1"),
            (&["r.example/a:1"], "r.example", "all:2"),
            (&["r.example/a:1"], "registry-1.docker.io", ":"),
            (&["r.example/a:1"], "refused.example", ":"),
            (&["t.example/a:1"], "t.example", ":5"),
            (&["a.example/a:1"], "a.example", "alice:7"),
            (&["b.example/a:1"], "b.example", ":"),
            (&["p.example/team/a:1", "p.example/team/b/c:1"], "p.example", "team:3"),
            (&["p.example/team/secret/a:1"], "p.example", "secret:4"),
            (&["p.example/team/a:1", "p.example/team/secret/a:1"], "p.example", ":"),
            (&["p.example/team/a:1", "p.example/public:1"], "p.example", ":"),
            (&["p.example/teamwork/a:1"], "p.example", ":"),
        ] {
            let (_directory, session) = session(config, images);
            assert_eq!(given(&session, host).await, expected, "{images:?} {host}");
        }
    }

    #[tokio::test]
    async fn what_a_session_cannot_give_is_part_of_the_refusal() {
        let refusal = |words: &str| EngineError::Refused(words.to_owned());
        let config = r#"{"auths": {"p.example/team": {"username": "team", "password": "3"}}}"#;
        let (_directory, differing) = session(config, &["p.example/team/a:1", "p.example/b:1"]);
        assert_eq!(given(&differing, "p.example").await, ":");
        let explained = differing.explain(refusal("401 Unauthorized"));
        assert!(matches!(&explained, EngineError::Refused(message)
            if message.starts_with("401 Unauthorized (one build cannot use both p.example/b:1 and ")));
        assert_eq!(differing.explain(refusal("exit code: 1")).to_string(), "exit code: 1");
        let denied = "source \"docker-image://x\" denied by policy";
        assert_eq!(differing.explain(refusal(denied)).to_string(), denied);
        let (_directory, broken) = session("", &["p.example/a:1"]);
        assert_eq!(given(&broken, "p.example").await, ":");
        let explained = broken.explain(refusal("pull access denied"));
        assert!(matches!(&explained, EngineError::Unreachable(message) if message.contains("it is empty")));
    }

    #[tokio::test]
    async fn a_registry_token_is_given_to_pull_decided_images() {
        let config = r#"{"auths": {"r.example": {"registrytoken": "token"}, "o.example": {"auth": "YTpi"}}}"#;
        let (_directory, session) = session(config, &["r.example/a/b:1", "o.example/x:1"]);
        assert_eq!(given(&session, "r.example").await, ":");
        let authority = async |host: &str| {
            let request = GetTokenAuthorityRequest { host: host.to_owned(), salt: Vec::new() };
            session.get_token_authority(Request::new(request)).await
        };
        let public_key = authority("r.example").await.expect("a key").into_inner().public_key;
        // The engine continues with a user and a password.
        assert_eq!(authority("o.example").await.expect_err("no key").code(), tonic::Code::Unimplemented);
        let request = VerifyTokenAuthorityRequest {
            host: "r.example".to_owned(),
            payload: b"payload".to_vec(),
            salt: Vec::new(),
        };
        let signed = session.verify_token_authority(Request::new(request)).await.expect("a signature");
        let signed = signed.into_inner().signed;
        let (signature, payload) = signed.split_at(64);
        assert_eq!(payload, b"payload");
        UnparsedPublicKey::new(&ED25519, public_key).verify(payload, signature).expect("a valid signature");
        for (scope, expected) in [
            ("repository:a/b:pull", Some("token")),
            ("repository:a/b:pull,push", None),
            ("repository:a/b:push", None),
            ("repository:a/b:pull repository:a/c:pull", None),
            ("registry:catalog:*", None),
        ] {
            let request = FetchTokenRequest {
                host: "r.example".to_owned(),
                scopes: vec![scope.to_owned()],
                ..FetchTokenRequest::default()
            };
            let token = session.fetch_token(Request::new(request)).await;
            assert_eq!(token.ok().map(|token| token.into_inner().token).as_deref(), expected, "{scope}");
        }
    }
}
