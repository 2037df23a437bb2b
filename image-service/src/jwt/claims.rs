//! The claims that a token needs to be accepted, beside its signature.

use std::time::Duration;

use serde_json::{Map, Value};

use super::Refusal;
use crate::{
    access::{Groups, Pools, Principal, Role, WorkerClaims, is_subject},
    timestamp::Timestamp,
};

/// Requirements on the claims of a token.
#[derive(Clone, Debug)]
pub(crate) struct Requirements {
    /// Only accepted `iss`; any if `None`.
    pub(crate) issuer: Option<String>,
    /// Value that `aud` has to be or to contain; any if `None`.
    pub(crate) audience: Option<String>,
    /// Name or path of the claim that holds the roles.
    pub(crate) roles_claim: String,
    /// Name or path of the claim that holds the groups.
    pub(crate) groups_claim: String,
    /// Name or path of the claim that holds the pools.
    pub(crate) pools_claim: String,
}

impl Requirements {
    pub(super) const ROLES: &str = "roles";
    pub(super) const GROUPS: &str = "groups";
    pub(super) const POOLS: &str = "pools";

    /// Tolerated difference of the clocks of the issuer and this machine.
    const LEEWAY: Duration = Duration::from_secs(5);

    /// Returns the principal that the claims of a token name.
    ///
    /// It may have expired. That is checked by the caller, which has to check it again whenever the token is
    /// presented.
    ///
    /// # Errors
    ///
    /// Returns the claim that is missing or invalid.
    pub(super) fn principal(
        &self,
        claims: &Map<String, Value>,
        now: Timestamp,
    ) -> Result<Principal, Refusal> {
        let invalid = |claim: &str| Refusal::Claim(claim.to_owned());
        let is_text = |claim: &str, wanted: &str| claims.get(claim).and_then(Value::as_str) == Some(wanted);
        if self.issuer.as_ref().is_some_and(|issuer| !is_text("iss", issuer)) {
            return Err(invalid("iss"));
        }
        let has_audience = |audience: &String| {
            let all = claims.get("aud").and_then(Value::as_array).into_iter().flatten();
            is_text("aud", audience) || all.filter_map(Value::as_str).any(|one| one == audience)
        };
        if self.audience.as_ref().is_some_and(|audience| !has_audience(audience)) {
            return Err(invalid("aud"));
        }
        let is_valid_from = |from: &Value| time(from).is_some_and(|from| from <= now.after(Self::LEEWAY));
        if claims.get("nbf").is_some_and(|from| !is_valid_from(from)) {
            return Err(invalid("nbf"));
        }
        let subject = claims.get("sub").and_then(Value::as_str).filter(|subject| is_subject(subject));
        let subject = subject.ok_or_else(|| invalid("sub"))?;
        let expires_at = claims.get("exp").and_then(time).ok_or_else(|| invalid("exp"))?.after(Self::LEEWAY);
        let roles = claim(claims, &self.roles_claim).map(roles).unwrap_or_default();
        let groups = claim(claims, &self.groups_claim).map_or_else(|| Some(Groups::default()), Groups::parse);
        let groups = groups.ok_or_else(|| invalid(&self.groups_claim))?;
        // A claim that cannot be understood must not admit to the default pool.
        let pools = claim(claims, &self.pools_claim).map_or_else(|| Some(Pools::default()), Pools::parse);
        let pools = pools.ok_or_else(|| invalid(&self.pools_claim))?;
        let worker_claims =
            WorkerClaims::parse(claims).ok_or_else(|| invalid("worker_labels or worker_capabilities"))?;
        Ok(Principal::new(subject.to_owned(), roles, expires_at).with_claims(groups, pools, worker_claims))
    }
}

/// Returns the claim of this name or, if there is none, the one at this path of names that are joined by dots.
fn claim<'a>(claims: &'a Map<String, Value>, path: &str) -> Option<&'a Value> {
    claims.get(path).or_else(|| {
        path.match_indices('.')
            .find_map(|(dot, _)| claim(claims.get(&path[..dot])?.as_object()?, &path[dot + 1..]))
    })
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
    fn a_claim_is_found_by_its_name_or_its_path() {
        let claims = json!({
            "roles": 1, "a.b": 2, "a": {"b": 3, "c": {"d": 4}, "c.e": 5}, "https://x.example/roles": 6, "n": null
        });
        let claims = claims.as_object().expect("an object");
        for (path, expected) in [
            ("roles", Some(json!(1))),
            ("a.b", Some(json!(2))),
            ("a.c.d", Some(json!(4))),
            ("a.c.e", Some(json!(5))),
            ("https://x.example/roles", Some(json!(6))),
            ("a.c", Some(json!({"d": 4}))),
            ("a.x", None),
            ("roles.x", None),
            (".", None),
            ("", None),
        ] {
            assert_eq!(claim(claims, path), expected.as_ref(), "{path}");
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
