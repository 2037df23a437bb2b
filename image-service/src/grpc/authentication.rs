//! Authentication of callers.
//!
//! Every request carries a bearer token unless anonymous callers are allowed, and every handler gets the
//! principal.

use std::sync::Arc;

use service_runtime::{call_limits::BodyMeter, listener::ConnectInfo};
use tonic::{Request, Status, metadata::AsciiMetadataValue, service::Interceptor};
use tracing::Span;

use super::{
    audit::Audit,
    caller_limits::{CallSlot, Callers},
    status,
};
use crate::{
    access::{Principal, Role},
    error::Error,
    jwt::{TokenError, Verifier},
    timestamp::Timestamp,
};

/// An interceptor that admits callers with a token for its API.
#[derive(Clone, Debug)]
pub(super) struct Authentication {
    verifier: Arc<Verifier>,
    callers: Arc<Callers>,
    api: Api,
}

/// An API, by the callers that may use it. A worker's token is valid for dispatch only.
#[derive(Copy, Clone, Debug)]
pub(super) enum Api {
    Public,
    Dispatch,
}

impl Authentication {
    pub(super) fn new(verifier: Arc<Verifier>, callers: Arc<Callers>, api: Api) -> Self {
        Self { verifier, callers, api }
    }
}

impl Interceptor for Authentication {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let mut headers = request.metadata().get_all("authorization").iter();
        let header = headers.next();
        // It would be unclear which of several counts.
        if headers.next().is_some() {
            return Err(status::unauthenticated(Some(TokenError::Invalid)));
        }
        let principal = match header {
            None => self.verifier.anonymous().ok_or_else(|| status::unauthenticated(None))?,
            // A caller with an invalid token is not treated as anonymous.
            Some(value) => {
                let token = bearer(value).ok_or_else(|| status::unauthenticated(None))?;
                self.verifier.verify(token).map_err(|error| status::unauthenticated(Some(error)))?
            }
        };
        if let Some(audit) = request.extensions().get::<Audit>() {
            audit.asked_by(&principal);
        }
        let extensions = request.extensions();
        if let Some(info) = extensions.get::<ConnectInfo>() {
            info.connection().admit();
        }
        if let Some(meter) = extensions.get::<BodyMeter>() {
            meter.set(Box::new(self.callers.received_bytes(&principal)));
        }
        match self.api {
            Api::Public if principal.is_worker() => return Err(Error::WrongApi.into()),
            Api::Dispatch => principal.require(Role::Worker)?,
            Api::Public => {
                self.callers.begin_call(&principal, request.extensions().get::<CallSlot>())?;
                request.extensions_mut().insert(Arc::clone(&self.callers));
            }
        }
        Span::current().record("enduser.id", principal.subject());
        request.extensions_mut().insert(principal);
        Ok(request)
    }
}

/// Returns the token of an `authorization: Bearer …` header.
fn bearer(value: &AsciiMetadataValue) -> Option<&str> {
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Returns the principal of an authenticated request, whose token may have expired while the request was received.
pub(super) fn caller<T>(request: &Request<T>) -> Result<Principal, Status> {
    let caller = request.extensions().get::<Principal>().cloned();
    let caller = caller.ok_or_else(|| status::unauthenticated(None))?;
    if caller.expires_at() <= Timestamp::now() {
        return Err(Error::TokenExpired.into());
    }
    Ok(caller)
}
