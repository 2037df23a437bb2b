//! Gets the context of a build: what was uploaded comes from the service, whenever that answers.

use std::{io, sync::Arc, time::Duration};

use futures_util::StreamExt;
use proto::dispatch::{Attempt, DockerBuild};
use tokio::time::{sleep, timeout};
use tonic::Code;

use crate::{
    context::{Context, Incoming, LargeContext, pack},
    dial::{Dial, DialError},
    spool::Spool,
};

/// How long to wait before the service is asked again.
const PAUSE: Duration = Duration::from_millis(500);
/// How long the next part of an archive may take.
const SILENCE: Duration = Duration::from_secs(30);

/// Why there is no context.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("cannot fetch the context")]
    Dial(#[from] DialError),
    #[error("nothing more of the context comes")]
    Silent,
    #[error("cannot keep the context")]
    Keep(#[from] io::Error),
    #[error("the context that was sent is not the one that was named")]
    Other,
}

/// Gets a build's context. Waits for a service that is away, for as long as it is not dropped.
pub(crate) async fn context_of(
    build: &DockerBuild,
    attempt: &Attempt,
    dial: &dyn Dial,
    spool: &dyn Spool,
) -> Result<Context, FetchError> {
    if !build.remote.is_empty() {
        return Ok(Context::Remote(build.remote.clone()));
    }
    if build.archive.is_empty() {
        return Ok(Context::Small(pack(build)?));
    }
    loop {
        match fetch(build, attempt, dial, spool).await {
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
    dial: &dyn Dial,
    spool: &dyn Spool,
) -> Result<LargeContext, FetchError> {
    let mut parts = dial.fetch_context(attempt.clone()).await?;
    let mut incoming = Incoming::new(build, spool.create().await?);
    while let Some(part) = timeout(SILENCE, parts.next()).await.map_err(|_| FetchError::Silent)? {
        incoming.take(part?).await?;
    }
    incoming.finish().await?.ok_or(FetchError::Other)
}

/// Whether the same may work a little later.
fn may_pass(error: &FetchError) -> bool {
    let error = match error {
        FetchError::Dial(error) => error,
        FetchError::Silent => return true,
        FetchError::Keep(_) | FetchError::Other => return false,
    };
    match error {
        DialError::NoToken => false,
        DialError::Connect(_) | DialError::Token(_) | DialError::Endpoint(_) => true,
        DialError::Refused(status) => !matches!(
            status.code(),
            Code::NotFound | Code::InvalidArgument | Code::PermissionDenied | Code::Unimplemented
        ),
    }
}
