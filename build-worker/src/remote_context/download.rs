//! Download of a file: a tar archive, or a Dockerfile.
//!
//! The bytes are kept as the server sends them; the file is recognised when its context is prepared for the
//! engine.

use std::{io, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Bytes, Incoming};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use tokio::time::timeout;
use url::Url;

use super::{RemoteError, location::web_url};
use crate::{
    context::LargeContext,
    egress::{Egress, Obstacle},
    secrets::Netrc,
};

/// Maximum number of redirects.
const MAX_REDIRECTS: usize = 10;

/// Downloads a file into a context.
///
/// # Errors
///
/// Returns [`RemoteError`] if the server cannot be reached, refuses the request or sends too much, or the
/// context cannot be written.
pub(super) async fn download(
    url: &Url,
    credentials: &Netrc,
    egress: &Arc<Egress>,
    mut context: LargeContext,
) -> Result<LargeContext, RemoteError> {
    let first = url;
    let mut url = url.clone();
    let mut redirects = 0;
    let response = loop {
        let response = get(&url, credentials.of(&url, first), egress).await?;
        match redirection(response.status(), response.headers()) {
            None => break response,
            Some(_) if redirects == MAX_REDIRECTS => {
                return Err(RemoteError::Refused(format!("{url}: more than {MAX_REDIRECTS} redirects")));
            }
            Some(target) => {
                let joined = url.join(&target);
                let joined = joined.map_err(|error| RemoteError::Refused(format!("{target}: {error}")))?;
                url = web_url(joined.as_str())?;
                redirects += 1;
            }
        }
    };
    let status = response.status();
    if status != StatusCode::OK {
        let message = format!("{url}: the server responded with {status}");
        let is_busy = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
        return Err(if is_busy { RemoteError::Unreachable(message) } else { RemoteError::Refused(message) });
    }
    let mut body = response.into_body();
    while let Some(frame) = in_time(&url, body.frame()).await? {
        let frame = frame.map_err(|error| RemoteError::Unreachable(format!("{url}: {}", chain(&error))))?;
        if let Ok(data) = frame.into_data() {
            egress.count(data.len())?;
            context.append(data.into()).await?;
        }
    }
    Ok(context)
}

/// Requests a URL over a connection of its own, with a user and a password.
async fn get(
    url: &Url,
    credentials: Option<(&str, &str)>,
    egress: &Arc<Egress>,
) -> Result<Response<Incoming>, RemoteError> {
    let connector = {
        let egress = Arc::clone(egress);
        tower::service_fn(move |uri: Uri| {
            let egress = Arc::clone(&egress);
            async move {
                let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
                let default = if uri.scheme_str() == Some("https") { 443 } else { 80 };
                let port = uri.port_u16().unwrap_or(default);
                let connection = egress.connect(host, port).await.map_err(io::Error::other)?;
                Ok::<_, io::Error>(TokioIo::new(connection))
            }
        })
    };
    let provider = rustls::crypto::ring::default_provider;
    // The certificates may be renewed, and are read from files.
    let tls = tokio::task::spawn_blocking(move || {
        HttpsConnectorBuilder::new().with_provider_and_native_roots(provider())
    });
    let tls = tls.await.map_err(io::Error::other)??;
    let connector = tls.https_or_http().enable_http1().wrap_connector(connector);
    let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);

    let refused = |error: http::Error| RemoteError::Refused(format!("{url}: {error}"));
    let mut request = Request::get(url.as_str())
        .header(header::USER_AGENT, concat!("trailer-build-worker/", env!("CARGO_PKG_VERSION")));
    if let Some((user, password)) = credentials {
        let basic = format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")));
        let mut value = HeaderValue::try_from(basic).map_err(|error| refused(error.into()))?;
        value.set_sensitive(true);
        request = request.header(header::AUTHORIZATION, value);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(refused)?;
    let responded = in_time(url, client.request(request)).await?;
    responded.map_err(|error| match egress.take_obstacle() {
        Some(obstacle) => obstacle.into(),
        None => {
            let message = format!("{url}: {}", chain(&error));
            // Nobody but the author or the operator makes it valid.
            let is_certificate = message.contains("invalid peer certificate");
            if is_certificate { RemoteError::Refused(message) } else { RemoteError::Unreachable(message) }
        }
    })
}

/// Returns the target of a redirect.
fn redirection(status: StatusCode, headers: &HeaderMap) -> Option<String> {
    let is_redirect = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308);
    let target = headers.get(header::LOCATION).filter(|_| is_redirect)?;
    Some(String::from_utf8_lossy(target.as_bytes()).into_owned())
}

/// Waits for a server, but not for long.
async fn in_time<T>(url: &Url, waiting: impl Future<Output = T>) -> Result<T, RemoteError> {
    let silent = |_| Obstacle::Silent(url.host_str().unwrap_or_default().to_owned()).into();
    timeout(Egress::SILENCE, waiting).await.map_err(silent)
}

/// Returns an error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
