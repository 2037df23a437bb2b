//! `trailer.images.v1.ContextService`.

use std::{sync::Arc, time::Duration};

use proto::images::{self as wire, context_service_server::ContextService, upload_context_request::Part};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{
    audit::Audit, authentication::caller, caller_limits::Callers, dispatch_service::stream_error, field,
};
use crate::{
    build_context::ContextDigest,
    context_transfer::{Begun, Contexts, Taken, Upload},
    error::{Error, Violations},
    feed::deadline,
};

/// The implementation of the context service.
#[derive(Debug)]
pub(super) struct Uploads {
    contexts: Contexts,
    callers: Arc<Callers>,
    shutdown: CancellationToken,
}

impl Uploads {
    /// Maximum time between two messages of a client.
    const PATIENCE: Duration = Duration::from_secs(60);
    /// Minimum rate of an upload, in bytes per second, once it has lasted for [`Self::GRACE`].
    const LEAST_RATE: f64 = 16.0 * 1024.0;
    const GRACE: Duration = Duration::from_secs(10);
    /// Maximum duration of an upload.
    const LONGEST: Duration = Duration::from_secs(3_600);

    pub(super) fn new(contexts: Contexts, callers: Arc<Callers>, shutdown: CancellationToken) -> Self {
        Self { contexts, callers, shutdown }
    }

    /// Returns the next part of a stream; `None` at its end.
    async fn next(&self, parts: &mut Streaming<wire::UploadContextRequest>) -> Result<Option<Part>, Status> {
        let request = tokio::select! {
            biased;
            () = self.shutdown.cancelled() => return Err(Error::Draining.into()),
            request = tokio::time::timeout(Self::PATIENCE, parts.message()) => {
                request.map_err(|_| Status::from(Error::UploadStalled))?.map_err(stream_error)?
            }
        };
        match request {
            Some(wire::UploadContextRequest { part: Some(part) }) => Ok(Some(part)),
            Some(_) => Err(invalid("part", "must be given: `start` or `chunk`")),
            None => Ok(None),
        }
    }

    async fn take_all(
        &self,
        upload: &mut Upload,
        parts: &mut Streaming<wire::UploadContextRequest>,
    ) -> Result<(), Status> {
        let (begun, mut received) = (Instant::now(), 0.0);
        while let Some(part) = self.next(parts).await? {
            match part {
                Part::Chunk(bytes) if bytes.is_empty() => return Err(invalid("chunk", "must not be empty")),
                Part::Chunk(bytes) => {
                    received += bytes.len() as f64;
                    let elapsed = begun.elapsed();
                    if elapsed > Self::GRACE && received < elapsed.as_secs_f64() * Self::LEAST_RATE {
                        return Err(Error::UploadStalled.into());
                    }
                    upload.take(bytes).await?;
                }
                Part::Start(_) => return Err(invalid("start", "must be the first part, and only that")),
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl ContextService for Uploads {
    async fn upload_context(
        &self,
        request: Request<Streaming<wire::UploadContextRequest>>,
    ) -> Result<Response<wire::UploadContextResponse>, Status> {
        let caller = caller(&request)?;
        let audit = Audit::new(&request);
        let _permit = self.callers.open_stream(&caller)?;
        let expiry = deadline(&caller);
        let mut parts = request.into_inner();
        let Some(Part::Start(start)) = self.next(&mut parts).await? else {
            return Err(invalid("start", "must be the first part"));
        };
        let expected = match start.digest.as_str() {
            "" => None,
            digest => Some(ContextDigest::parse(digest).map_err(|rule| invalid("start.digest", rule))?),
        };
        let taken = match self.contexts.begin(&caller, expected).await? {
            Begun::Known(taken) => taken,
            Begun::Upload(mut upload) => {
                let taken = tokio::select! {
                    biased;
                    taken = self.take_all(&mut upload, &mut parts) => taken,
                    () = tokio::time::sleep_until(expiry) => Err(Error::TokenExpired.into()),
                    () = tokio::time::sleep(Self::LONGEST) => Err(Error::UploadStalled.into()),
                };
                match taken {
                    Ok(()) => upload.finish().await?,
                    Err(status) => {
                        upload.give_up().await;
                        return Err(status);
                    }
                }
            }
        };
        audit.is_about(&taken.digest);
        Ok(Response::new(taken.into()))
    }
}

impl From<Taken> for wire::UploadContextResponse {
    fn from(taken: Taken) -> Self {
        Self {
            digest: taken.digest.to_string(),
            size_bytes: taken.size_bytes,
            expire_time: Some(field::time(taken.expires_at)),
        }
    }
}

fn invalid(field: &str, rule: &str) -> Status {
    Error::Invalid(Violations::one(field, rule)).into()
}
