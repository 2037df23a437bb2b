//! Bearer tokens: the principals that JSON Web Tokens name, if a trusted key has signed them.
//!
//! The keys are those of a JWKS or, without one, the key pair of the data directory, never both. Verification
//! never blocks: a task keeps the keys up to date, and a token with an unknown key is rejected in the
//! meantime.

use std::{
    collections::HashMap,
    mem::Discriminant,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use jsonwebtoken::Algorithm;
use service_runtime::tally::Tally;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::{
    cache::{Fingerprint, TokenCache},
    jwks::KeySet,
    jws::Jws,
    refresh::Refresh,
};
pub(crate) use self::{claims::Requirements, key_pair::make_data_dir, source::JwksError};
pub use self::{
    key_pair::{MintError, TokenKeys},
    source::JwksSource,
};
use crate::{
    access::{Principal, Role},
    timestamp::Timestamp,
};

mod cache;
mod claims;
mod jwks;
mod jws;
mod key_pair;
mod refresh;
mod signatures;
mod source;

/// The verifier of bearer tokens.
#[derive(Debug)]
pub(crate) struct Verifier {
    trust: RwLock<Arc<Trust>>,
    requirements: Requirements,
    refresh: Option<Refresh>,
    /// Wake-up of the refresh. It is a hint: requests during a refresh are merged into one.
    unknown_key: Notify,
    anonymous: Option<Principal>,
    refusals: Refusals,
}

/// Reason why a token is rejected.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("the token is not valid")]
    Invalid,
    #[error("the token expired")]
    Expired,
}

/// The log of refused tokens: each reason once a minute, because anyone can send any number of them.
#[derive(Debug, Default)]
struct Refusals(Mutex<HashMap<Discriminant<Refusal>, Tally>>);

impl Refusals {
    fn log(&self, reason: &Refusal) {
        let tally = {
            let mut tallies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            tallies.entry(std::mem::discriminant(reason)).or_default().count(Instant::now())
        };
        match tally {
            Some(count) => tracing::info!(%reason, count, "a token is refused"),
            None => tracing::debug!(%reason, "a token is refused"),
        }
    }
}

/// The reason why a token is invalid, for operators.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("it is no JSON Web Token")]
    Malformed,
    #[error("the algorithm {0:?} is not accepted")]
    Algorithm(String),
    #[error("its header requires extensions (`crit`), and none is known")]
    Extensions,
    #[error("no trusted key has the id {0:?}")]
    UnknownKey(String),
    #[error("no trusted key has made its signature")]
    Signature,
    #[error("the claim `{0}` is missing or invalid")]
    Claim(String),
}

/// The keys that are trusted at one time, with a cache of the tokens that they have verified.
///
/// New keys begin with an empty cache of their own, so that no token signed by a removed key stays in a
/// cache, whatever is being verified at that moment.
#[derive(Debug, Default)]
struct Trust {
    keys: KeySet,
    document: Vec<u8>,
    verified: RwLock<TokenCache>,
}

impl Verifier {
    /// Creates a verifier that trusts the key pair of the data directory.
    pub(crate) fn of_key_pair(keys: &TokenKeys) -> Self {
        let keys = KeySet::single(Algorithm::EdDSA, keys.verifying().clone());
        let requirements = Requirements {
            issuer: None,
            audience: None,
            roles_claim: Requirements::ROLES.to_owned(),
            groups_claim: Requirements::GROUPS.to_owned(),
            pools_claim: Requirements::POOLS.to_owned(),
        };
        Self::new(Trust { keys, ..Trust::default() }, requirements, None)
    }

    /// Creates a verifier that trusts the keys of a JWKS.
    ///
    /// The keys are loaded before this returns, and are kept up to date by [`Verifier::keep_fresh`].
    ///
    /// # Errors
    ///
    /// Returns [`JwksError`] if the keys cannot be loaded.
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
            refusals: Refusals::default(),
        }
    }

    /// Admits callers without a token, who may create images and are neither admins nor workers.
    pub(crate) fn with_anonymous(self) -> Self {
        let never = Timestamp::from_micros(i64::MAX);
        Self {
            anonymous: Some(Principal::anonymous("anonymous".to_owned(), vec![Role::Builder], never)),
            ..self
        }
    }

    /// Returns the principal of callers without a token, or `None` if they are not admitted.
    pub(crate) fn anonymous(&self) -> Option<Principal> {
        self.anonymous.clone()
    }

    /// Returns the principal that a token names.
    ///
    /// # Errors
    ///
    /// Returns [`TokenError::Invalid`] unless a trusted key has signed the token and its claims meet the
    /// requirements, and [`TokenError::Expired`] if it has expired.
    pub(crate) fn verify(&self, token: &str) -> Result<Principal, TokenError> {
        self.verify_at(token, Timestamp::now())
    }

    fn verify_at(&self, token: &str, now: Timestamp) -> Result<Principal, TokenError> {
        let trust = self.trust();
        let fingerprint = Fingerprint::new(token);
        let known = trust.remember(&fingerprint);
        let is_new = known.is_none();
        let checked = known.map_or_else(|| self.check(&trust.keys, token), Ok);
        let principal = checked.map_err(|reason| {
            // Logged for operators; the caller does not learn the reason.
            self.refusals.log(&reason);
            TokenError::Invalid
        })?;
        if is_over(principal.expires_at(), now) {
            tracing::debug!(subject = principal.subject(), reason = "it has expired", "a token is refused");
            return Err(TokenError::Expired);
        }
        if is_new {
            let mut verified = trust.verified.write().unwrap_or_else(PoisonError::into_inner);
            verified.insert(fingerprint, principal.clone());
        }
        Ok(principal)
    }

    /// Returns the principal that a token names, expired or not.
    ///
    /// # Errors
    ///
    /// Returns the reason why the token is invalid.
    fn check(&self, keys: &KeySet, token: &str) -> Result<Principal, Refusal> {
        let token = Jws::parse(token).ok_or(Refusal::Malformed)?;
        let header = &token.header;
        let algorithm =
            KeySet::algorithm(&header.alg).ok_or_else(|| Refusal::Algorithm(header.alg.clone()))?;
        // `crit` names extensions that have to be understood, and none are.
        if header.crit.is_some() {
            return Err(Refusal::Extensions);
        }
        let id = header.kid.as_deref();
        if let Some(id) = id.filter(|id| !keys.knows(id)) {
            self.unknown_key.notify_one();
            return Err(Refusal::UnknownKey(id.to_owned()));
        }
        if !keys.candidates(id, algorithm).any(|key| token.is_signed_by(key, algorithm)) {
            return Err(Refusal::Signature);
        }
        let claims = token.claims().ok_or(Refusal::Malformed)?;
        self.requirements.principal(&claims, Timestamp::now())
    }

    /// Keeps the keys up to date until `shutdown`.
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

/// Reports whether a token with this expiry has expired at `now`.
///
/// A token is valid until the moment of its expiry.
fn is_over(expires_at: Timestamp, now: Timestamp) -> bool {
    expires_at <= now
}

#[cfg(test)]
mod tests;
