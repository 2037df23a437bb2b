//! The source of a JWKS: a file or a URL.

use std::{fmt, io, path::PathBuf, str::FromStr, time::Duration};

use http::{Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::{
        legacy::{
            Client,
            connect::{HttpConnector, proxy::Tunnel},
        },
        proxy::matcher::{Intercept, Matcher},
    },
    rt::{TokioExecutor, TokioIo},
};
use tokio::{io::AsyncReadExt as _, net::TcpStream};
use tokio_util::task::AbortOnDropHandle;

/// The location of a JWKS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JwksSource {
    /// A file.
    File(PathBuf),
    /// An `http` or `https` URL.
    Url(Uri),
}

/// Reason why a JWKS cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JwksError {
    #[error("cannot read the file")]
    File(#[source] io::Error),
    #[error("cannot use the root certificates of the system")]
    Roots(#[source] io::Error),
    #[error("cannot fetch it")]
    Fetch(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the server responded with {0}")]
    Status(StatusCode),
    #[error("it did not arrive within {} s", JwksSource::LIMIT.as_secs())]
    Late,
    #[error("it is larger than {} bytes", JwksSource::MAX_SIZE)]
    Large,
    #[error("it is not a JWKS")]
    Malformed(#[source] serde_json::Error),
    #[error("it has no key for EdDSA, RS256 or ES256 signatures")]
    NoKey,
}

impl JwksSource {
    /// Maximum time for reading the document.
    pub(super) const LIMIT: Duration = Duration::from_secs(10);
    const MAX_SIZE: usize = 1024 * 1024;

    /// Reads the document. The future may be dropped at any time.
    pub(super) async fn read(&self) -> Result<Vec<u8>, JwksError> {
        let reading = async {
            match self {
                Self::File(path) => read_file(path).await,
                Self::Url(url) => fetch(url).await,
            }
        };
        tokio::time::timeout(Self::LIMIT, reading).await.unwrap_or(Err(JwksError::Late))
    }

    /// Reports whether others could change the document in transit.
    pub(super) fn is_exposed(&self) -> bool {
        match self {
            Self::File(_) => false,
            Self::Url(url) => url.scheme_str() != Some("https") && !is_loopback(url),
        }
    }
}

fn is_loopback(url: &Uri) -> bool {
    let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
}

async fn read_file(path: &std::path::Path) -> Result<Vec<u8>, JwksError> {
    let limit = u64::try_from(JwksSource::MAX_SIZE).unwrap_or(u64::MAX);
    let file = tokio::fs::File::open(path).await.map_err(JwksError::File)?;
    let mut document = Vec::new();
    file.take(limit + 1).read_to_end(&mut document).await.map_err(JwksError::File)?;
    if document.len() > JwksSource::MAX_SIZE { Err(JwksError::Large) } else { Ok(document) }
}

async fn fetch(url: &Uri) -> Result<Vec<u8>, JwksError> {
    let request = Request::get(url)
        .header(header::ACCEPT, "application/jwk-set+json, application/json")
        .header(header::USER_AGENT, concat!("trailer-image-service/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .map_err(fetching)?;
    let (response, _connection) = send(request).await?;
    // Redirects are not followed, because only the place that the operator names is trusted.
    if response.status() != StatusCode::OK {
        return Err(JwksError::Status(response.status()));
    }
    match Limited::new(response.into_body(), JwksSource::MAX_SIZE).collect().await {
        Ok(body) => Ok(body.to_bytes().into()),
        Err(error) if error.is::<LengthLimitError>() => Err(JwksError::Large),
        Err(error) => Err(JwksError::Fetch(error)),
    }
}

/// Sends a request over a connection of its own, because fetches are far apart, and by the proxy that
/// `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` of the environment name for it.
async fn send(request: Request<Empty<Bytes>>) -> Result<(Response<Incoming>, OwnConnection), JwksError> {
    let mut client = Client::builder(TokioExecutor::new());
    client.pool_max_idle_per_host(0);
    let is_https = request.uri().scheme_str() == Some("https");
    let response = match Matcher::from_env().intercept(request.uri()) {
        None if is_https => client.build(https(direct()).await?).request(request).await.map_err(fetching),
        None => client.build_http().request(request).await.map_err(fetching),
        Some(proxy) if is_https => {
            let tunnel = Tunnel::new(proxy.uri().clone(), HttpConnector::new());
            let tunnel = match proxy.basic_auth() {
                Some(login) => tunnel.with_auth(login.clone()),
                None => tunnel,
            };
            client.build(https(tunnel).await?).request(request).await.map_err(fetching)
        }
        Some(proxy) => return send_by(&proxy, request).await,
    };
    Ok((response?, None))
}

/// The task of a connection that no client owns, needed until the response was read.
type OwnConnection = Option<AbortOnDropHandle<hyper::Result<()>>>;

/// Sends a request by a proxy that answers in the name of the server.
async fn send_by(
    proxy: &Intercept,
    mut request: Request<Empty<Bytes>>,
) -> Result<(Response<Incoming>, OwnConnection), JwksError> {
    const PORT: u16 = 80;
    let host = proxy.uri().host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let stream =
        TcpStream::connect((host, proxy.uri().port_u16().unwrap_or(PORT))).await.map_err(fetching)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(fetching)?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let server = request.uri().authority().map(|authority| authority.as_str().parse());
    if let Some(Ok(server)) = server {
        request.headers_mut().insert(header::HOST, server);
    }
    if let Some(login) = proxy.basic_auth() {
        request.headers_mut().insert(header::PROXY_AUTHORIZATION, login.clone());
    }
    Ok((sender.send_request(request).await.map_err(fetching)?, Some(connection)))
}

fn direct() -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector
}

/// Returns a connector that trusts the certificates of the system.
///
/// They are read for every fetch, because they may be renewed, and on a blocking thread.
async fn https<C>(connector: C) -> Result<HttpsConnector<C>, JwksError> {
    let provider = rustls::crypto::ring::default_provider;
    let builder = tokio::task::spawn_blocking(move || {
        HttpsConnectorBuilder::new().with_provider_and_native_roots(provider())
    });
    let builder = builder.await.map_err(fetching)?.map_err(JwksError::Roots)?;
    Ok(builder.https_only().enable_http1().wrap_connector(connector))
}

fn fetching(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> JwksError {
    JwksError::Fetch(error.into())
}

impl FromStr for JwksSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let starts_with =
            |scheme: &str| text.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme));
        if text.is_empty() {
            return Err("must name a file, or an http or https URL".to_owned());
        }
        if !starts_with("http://") && !starts_with("https://") {
            return Ok(Self::File(text.into()));
        }
        let url: Uri = text.parse().map_err(|error| format!("is no URL: {error}"))?;
        if url.authority().is_none_or(|authority| authority.as_str().contains('@')) {
            return Err("must not contain credentials, which logs would show".to_owned());
        }
        Ok(Self::Url(url))
    }
}

impl fmt::Display for JwksSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Url(url) => url.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_distinguished_from_a_file() {
        for (text, is_url, is_exposed) in [
            ("jwks.json", false, false),
            ("/etc/trailer/http://jwks.json", false, false),
            ("https://id.example/jwks?tenant=7", true, false),
            ("HTTPS://id.example", true, false),
            ("http://id.example:8080/jwks", true, true),
            ("http://127.0.0.1:8080/jwks", true, false),
            ("http://[::1]/jwks", true, false),
            ("http://localhost/jwks", true, false),
            ("http://localhost.example/jwks", true, true),
        ] {
            let source: JwksSource = text.parse().expect(text);
            assert_eq!(matches!(source, JwksSource::Url(_)), is_url, "{text}");
            assert_eq!(source.is_exposed(), is_exposed, "{text}");
        }
        for text in ["", "http://", "https:///jwks", "https://user:secret@id.example/", "http://a b/"] {
            assert!(text.parse::<JwksSource>().is_err(), "{text}");
        }
    }
}
