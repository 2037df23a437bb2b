//! Who calls: every request carries a bearer token, and every handler gets the principal that it names.

use std::sync::Arc;

use tonic::{Request, Status, service::Interceptor};

use super::status;
use crate::{
    access::{Principal, Role},
    error::Error,
    token::TokenKeys,
};

/// Lets in whoever has a token for this API.
#[derive(Clone, Debug)]
pub(super) struct Authentication {
    keys: Arc<TokenKeys>,
    api: Api,
}

/// Which callers an API is for: a worker's token is good for dispatch alone.
#[derive(Copy, Clone, Debug)]
pub(super) enum Api {
    Public,
    Dispatch,
}

impl Authentication {
    pub(super) fn new(keys: Arc<TokenKeys>, api: Api) -> Self {
        Self { keys, api }
    }
}

impl Interceptor for Authentication {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let token = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| {
                let (scheme, token) = value.split_once(' ')?;
                scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
            })
            .ok_or_else(|| status::unauthenticated(None))?;
        let principal = self.keys.verify(token).map_err(|error| status::unauthenticated(Some(error)))?;
        match self.api {
            Api::Public if principal.is_worker() => return Err(Error::WrongApi.into()),
            Api::Dispatch => principal.require(Role::Worker)?,
            Api::Public => {}
        }
        request.extensions_mut().insert(principal);
        Ok(request)
    }
}

/// The principal of a request that was let in.
pub(super) fn caller<T>(request: &Request<T>) -> Result<Principal, Status> {
    request.extensions().get::<Principal>().cloned().ok_or_else(|| status::unauthenticated(None))
}
