//! Who calls: every request carries a bearer token, unless anonymous callers are let in, and every handler gets the
//! principal.

use std::sync::Arc;

use tonic::{Request, Status, metadata::AsciiMetadataValue, service::Interceptor};
use tracing::Span;

use super::{
    audit::Audit,
    callers::{CallSlot, Callers},
    status,
};
use crate::{
    access::{Principal, Role},
    error::Error,
    token::Verifier,
};

/// Lets in whoever has a token for this API.
#[derive(Clone, Debug)]
pub(super) struct Authentication {
    verifier: Arc<Verifier>,
    callers: Arc<Callers>,
    api: Api,
}

/// Which callers an API is for: a worker's token is good for dispatch alone.
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
        let principal = match request.metadata().get("authorization") {
            None => self.verifier.anonymous().ok_or_else(|| status::unauthenticated(None))?,
            // Who says who it is, and says it wrong, is nobody else.
            Some(value) => {
                let token = bearer(value).ok_or_else(|| status::unauthenticated(None))?;
                self.verifier.verify(token).map_err(|error| status::unauthenticated(Some(error)))?
            }
        };
        if let Some(audit) = request.extensions().get::<Audit>() {
            audit.asked_by(&principal);
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

/// The token of an `authorization: Bearer …`.
fn bearer(value: &AsciiMetadataValue) -> Option<&str> {
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// The principal of a request that was let in.
pub(super) fn caller<T>(request: &Request<T>) -> Result<Principal, Status> {
    request.extensions().get::<Principal>().cloned().ok_or_else(|| status::unauthenticated(None))
}
