//! The claims that a token needs to be accepted, beside its signature.

use std::time::Duration;

use jsonwebtoken::{Algorithm, DecodingKey, Validation, errors::Error};
use serde_json::{Map, Value};

use crate::{
    access::{Pools, Principal, Role, WorkerClaims, is_subject},
    timestamp::Timestamp,
};

/// Requirements on the claims of a token.
#[derive(Clone, Debug)]
pub(crate) struct Requirements {
    /// Only accepted `iss`; any if `None`.
    pub(crate) issuer: Option<String>,
    /// Value that `aud` has to be or to contain; any if `None`.
    pub(crate) audience: Option<String>,
    /// Name of the claim that holds the roles.
    pub(crate) roles_claim: String,
    /// Name of the claim that holds the pools.
    pub(crate) pools_claim: String,
}

impl Requirements {
    pub(super) const ROLES: &str = "roles";
    pub(super) const POOLS: &str = "pools";

    /// Verifies a token with a key, and returns the principal that its claims name, if they are complete.
    ///
    /// The principal may have expired. That is checked by the caller, which has to check it again whenever a
    /// token is presented.
    pub(super) fn verify(
        &self,
        token: &str,
        algorithm: Algorithm,
        key: &DecodingKey,
    ) -> Result<Option<Principal>, Error> {
        let claims: Map<String, Value> =
            jsonwebtoken::decode(token, key, &self.validation(algorithm))?.claims;
        Ok(self.principal(&claims))
    }

    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut required = vec!["exp", "sub"];
        // Only the algorithm of the key, because a token has no say in how it is verified.
        let mut validation = Validation::new(algorithm);
        validation.leeway = 0;
        validation.validate_exp = false;
        validation.validate_nbf = true;
        validation.validate_aud = self.audience.is_some();
        if let Some(issuer) = &self.issuer {
            validation.set_issuer(&[issuer]);
            required.push("iss");
        }
        if let Some(audience) = &self.audience {
            validation.set_audience(&[audience]);
            required.push("aud");
        }
        validation.set_required_spec_claims(&required);
        validation
    }

    fn principal(&self, claims: &Map<String, Value>) -> Option<Principal> {
        let subject = claims.get("sub")?.as_str().filter(|subject| is_subject(subject))?;
        let expires_at = time(claims.get("exp")?)?;
        let roles = claims.get(&self.roles_claim).map(roles).unwrap_or_default();
        // A claim that cannot be understood must not admit to the default pool.
        let pools = claims.get(&self.pools_claim).map_or_else(|| Some(Pools::default()), Pools::parse)?;
        let worker_claims = WorkerClaims::parse(claims)?;
        Some(Principal::new(subject.to_owned(), roles, expires_at).with_claims(pools, worker_claims))
    }
}

/// Parses a `NumericDate`: seconds, which need not be whole.
fn time(value: &Value) -> Option<Timestamp> {
    let since_epoch = match value.as_u64() {
        Some(seconds) => Duration::from_secs(seconds),
        None => Duration::try_from_secs_f64(value.as_f64()?).ok()?,
    };
    Some(Timestamp::from_micros(0).after(since_epoch))
}

/// Parses the roles in an array, or in a string with spaces. Unknown names are ignored as roles of other
/// services.
fn roles(value: &Value) -> Vec<Role> {
    let names: Vec<&str> = match value {
        Value::String(names) => names.split_ascii_whitespace().collect(),
        Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => Vec::new(),
    };
    let mut roles: Vec<Role> = Vec::new();
    for role in names.into_iter().filter_map(|name| name.parse().ok()) {
        if !roles.contains(&role) {
            roles.push(role);
        }
    }
    roles
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn roles_are_an_array_or_one_text_and_strangers_are_ignored() {
        for (value, expected) in [
            (json!(["builder", "admin"]), &[Role::Builder, Role::Admin][..]),
            (json!("builder  worker"), &[Role::Builder, Role::Worker]),
            (json!(["builder", "offline_access", 7, null, "builder", "Admin", " admin"]), &[Role::Builder]),
            (json!("openid profile"), &[]),
            (json!({"admin": true}), &[]),
            (json!(true), &[]),
            (json!(null), &[]),
        ] {
            assert_eq!(roles(&value), expected, "{value}");
        }
    }

    #[test]
    fn a_time_may_have_a_fraction_and_be_far_away() {
        assert_eq!(time(&json!(1_300_819_380)), Some(Timestamp::from_micros(1_300_819_380_000_000)));
        assert_eq!(time(&json!(1.5)), Some(Timestamp::from_micros(1_500_000)));
        assert_eq!(time(&json!(u64::MAX)), Some(Timestamp::from_micros(i64::MAX)));
        for value in [json!(-1), json!(1e300), json!("1300819380"), json!(null), json!([1])] {
            assert_eq!(time(&value), None, "{value}");
        }
    }
}
