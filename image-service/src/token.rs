//! Bearer tokens: who a JSON Web Token names, if a trusted key has signed it.
//!
//! The keys are those of a JWKS, or without one the key pair of the data directory, never both. Verifying waits for
//! nothing: a task keeps the keys fresh, and a token whose key is not known is refused while it does.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jsonwebtoken::{Algorithm, errors::ErrorKind};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

pub(crate) use self::{claims::Requirements, key_pair::make_data_dir, source::JwksError};
use self::{
    jwks::KeySet,
    refresh::Refresh,
    verified::{Fingerprint, Verified},
};
pub use self::{
    key_pair::{MintError, TokenKeys},
    source::JwksSource,
};
use crate::{
    access::{Principal, Role},
    timestamp::Timestamp,
};

mod claims;
mod jwks;
mod key_pair;
mod refresh;
mod signatures;
mod source;
mod verified;

/// Tells who calls.
#[derive(Debug)]
pub(crate) struct Verifier {
    trust: RwLock<Arc<Trust>>,
    requirements: Requirements,
    refresh: Option<Refresh>,
    /// Wakes the refresh. A hint: what is asked for while one is under way is asked for once.
    unknown_key: Notify,
    anonymous: Option<Principal>,
}

/// Why a token is not accepted.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("the token is not valid")]
    Invalid,
    #[error("the token expired")]
    Expired,
}

/// The keys that are trusted at one time, with what they have verified. Other keys begin with an empty memory of their
/// own: so nothing that a removed key has signed is remembered, whatever is being verified at that moment.
#[derive(Debug, Default)]
struct Trust {
    keys: KeySet,
    document: Vec<u8>,
    verified: RwLock<Verified>,
}

impl Verifier {
    /// Trusts the key pair of the data directory.
    pub(crate) fn of_key_pair(keys: &TokenKeys) -> Self {
        let keys = KeySet::of(Algorithm::EdDSA, keys.verifying().clone());
        let requirements =
            Requirements { issuer: None, audience: None, roles_claim: Requirements::ROLES.to_owned() };
        Self::new(Trust { keys, ..Trust::default() }, requirements, None)
    }

    /// Trusts the keys of a JWKS, which are loaded before this returns, and kept fresh by [`Verifier::keep_fresh`].
    pub(crate) async fn of_jwks(
        source: JwksSource,
        interval: Duration,
        requirements: Requirements,
    ) -> Result<Self, JwksError> {
        let refresh = Refresh::new(source, interval);
        Ok(Self::new(refresh.first().await?, requirements, Some(refresh)))
    }

    fn new(trust: Trust, requirements: Requirements, refresh: Option<Refresh>) -> Self {
        signatures::install();
        Self {
            trust: RwLock::new(Arc::new(trust)),
            requirements,
            refresh,
            unknown_key: Notify::new(),
            anonymous: None,
        }
    }

    /// Lets callers without a token in: they may create images, and are neither admins nor workers.
    pub(crate) fn with_anonymous(self) -> Self {
        let never = Timestamp::from_micros(i64::MAX);
        Self { anonymous: Some(Principal::new("anonymous".to_owned(), vec![Role::Builder], never)), ..self }
    }

    /// Who a caller without a token is; nobody, unless that is allowed.
    pub(crate) fn anonymous(&self) -> Option<Principal> {
        self.anonymous.clone()
    }

    /// Whom a token names that a trusted key has signed, that says what it has to and has not expired.
    pub(crate) fn verify(&self, token: &str) -> Result<Principal, TokenError> {
        let trust = self.trust();
        let fingerprint = Fingerprint::of(token);
        let known = trust.remember(&fingerprint);
        let is_new = known.is_none();
        let principal = known.or_else(|| self.check(&trust.keys, token)).ok_or(TokenError::Invalid)?;
        if is_over(principal.expires_at()) {
            return Err(TokenError::Expired);
        }
        if is_new {
            let mut verified = trust.verified.write().unwrap_or_else(PoisonError::into_inner);
            verified.insert(fingerprint, principal.clone());
        }
        Ok(principal)
    }

    /// Whom a token names, expired or not.
    fn check(&self, keys: &KeySet, token: &str) -> Option<Principal> {
        let header = jsonwebtoken::decode_header(token).ok()?;
        if !KeySet::ALGORITHMS.contains(&header.alg) || header.crit.is_some() {
            // `crit` names extensions that have to be understood, and none are.
            return None;
        }
        let id = header.kid.as_deref();
        if id.is_some_and(|id| !keys.knows(id)) {
            self.unknown_key.notify_one();
            return None;
        }
        for key in keys.candidates(id, header.alg) {
            match self.requirements.verify(token, header.alg, key) {
                Ok(principal) => return principal,
                Err(error) if *error.kind() == ErrorKind::InvalidSignature => {}
                Err(error) => {
                    // The caller is not told, but who runs the service has to find out.
                    tracing::debug!(%error, "a token with a good signature is refused");
                    return None;
                }
            }
        }
        None
    }

    /// Keeps the keys fresh until `shutdown`.
    pub(crate) async fn keep_fresh(&self, shutdown: CancellationToken) {
        if let Some(refresh) = &self.refresh {
            shutdown.run_until_cancelled(refresh.run(self)).await;
        }
    }

    fn replace(&self, trust: Trust) {
        *self.trust.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(trust);
    }

    fn trust(&self) -> Arc<Trust> {
        Arc::clone(&self.trust.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Trust {
    fn remember(&self, token: &Fingerprint) -> Option<Principal> {
        self.verified.read().unwrap_or_else(PoisonError::into_inner).get(token).cloned()
    }
}

/// A token is valid until the moment that it names.
fn is_over(expires_at: Timestamp) -> bool {
    expires_at <= Timestamp::now()
}

#[cfg(test)]
mod tests;
