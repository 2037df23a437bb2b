//! Retrieval of build contexts; uploaded ones are fetched from the service once it responds, remote ones from
//! their URL.

use std::{io, sync::Arc, time::Duration};

use futures_util::StreamExt;
use proto::dispatch::{Attempt, DockerBuild};
use ring::digest::{Context as Hashing, SHA256};
use tokio::time::{sleep, timeout};
use tonic::Code;

use crate::{
    context::{Context, LargeContext, pack},
    remote_context::{RemoteContexts, RemoteError},
    secrets::Netrc,
    service_client::{ServiceClient, ServiceError},
    spool::Spool,
};

/// Pause before the service is asked again.
const PAUSE: Duration = Duration::from_millis(500);
/// Maximum time until the next part of an archive.
const SILENCE: Duration = Duration::from_secs(30);

/// The reason why a context is not available.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("cannot fetch the context")]
    ServiceClient(#[from] ServiceError),
    #[error("the transfer of the context stalled")]
    Silent,
    #[error("cannot store the context")]
    Keep(#[from] io::Error),
    #[error("the received context does not have the expected digest")]
    Other,
    #[error(transparent)]
    Remote(#[from] RemoteError),
}

/// Returns a build's context; retries while the service is unavailable, until the future is dropped.
///
/// A remote context is fetched with `credentials`.
///
/// # Errors
///
/// Returns [`FetchError`] if the service refuses the request, the archive is not the one that the build
/// names, the remote context is not available, or the context cannot be packed or written to the spool.
pub(crate) async fn context_of(
    build: &DockerBuild,
    attempt: &Attempt,
    service: &dyn ServiceClient,
    spool: &dyn Spool,
    remotes: &RemoteContexts,
    credentials: &Netrc,
) -> Result<Context, FetchError> {
    if !build.remote.is_empty() {
        return Ok(Context::Large(Arc::new(remotes.fetch(&build.remote, credentials, spool).await?)));
    }
    if build.archive.is_empty() {
        return Ok(Context::Small(pack(build)?));
    }
    loop {
        match fetch(build, attempt, service, spool).await {
            Err(error) if may_pass(&error) => {
                tracing::warn!(build = attempt.build_id, %error, "cannot fetch a context yet");
                sleep(PAUSE).await;
            }
            fetched => return Ok(Context::Large(Arc::new(fetched?))),
        }
    }
}

async fn fetch(
    build: &DockerBuild,
    attempt: &Attempt,
    service: &dyn ServiceClient,
    spool: &dyn Spool,
) -> Result<LargeContext, FetchError> {
    let mut parts = service.fetch_context(attempt.clone()).await?;
    let mut context = LargeContext::new(spool.create().await?);
    let mut hashing = Hashing::new(&SHA256);
    while let Some(part) = timeout(SILENCE, parts.next()).await.map_err(|_| FetchError::Silent)? {
        let chunk = part?.chunk;
        hashing.update(&chunk);
        context.append(chunk.into()).await?;
    }
    let digest = format!("sha256:{}", hex::encode(hashing.finish()));
    if build.archive == digest { Ok(context) } else { Err(FetchError::Other) }
}

/// Reports whether a retry may succeed.
fn may_pass(error: &FetchError) -> bool {
    let error = match error {
        FetchError::ServiceClient(error) => error,
        FetchError::Silent => return true,
        FetchError::Keep(_) | FetchError::Other | FetchError::Remote(_) => return false,
    };
    match error {
        ServiceError::NoToken => false,
        ServiceError::Connect(_)
        | ServiceError::Token(_)
        | ServiceError::Endpoint(_)
        | ServiceError::Silent => true,
        ServiceError::Refused(status) => !matches!(
            status.code(),
            Code::NotFound | Code::InvalidArgument | Code::PermissionDenied | Code::Unimplemented
        ),
    }
}
