//! Pools: sets of build hosts, by which operators keep tenants apart.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::subject::is_invisible;

/// The pools of a token: those that a worker serves, or whose workers a caller may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Pools(BTreeSet<String>);

impl Pools {
    /// Pool of tokens that name none.
    const DEFAULT: &str = "default";
    const MAX: usize = 64;
    const MAX_BYTES: usize = 63;

    /// Parses the value of a claim: an array of names, or one string with spaces between names.
    ///
    /// Returns `None` unless these are at most 64 names, each of 1 to 63 bytes without white space and
    /// characters that are not shown.
    pub(crate) fn parse(claim: &Value) -> Option<Self> {
        let names: BTreeSet<String> = match claim {
            Value::String(names) => names.split_ascii_whitespace().map(str::to_owned).collect(),
            Value::Array(names) => {
                names.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<_>>()?
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => return None,
        };
        let is_name = |name: &String| {
            (1..=Self::MAX_BYTES).contains(&name.len())
                && !name.chars().any(|character| character.is_whitespace() || is_invisible(character))
        };
        (names.len() <= Self::MAX && names.iter().all(is_name)).then_some(Self(names))
    }

    /// Reports whether a caller of these pools may use a worker of the others.
    pub(crate) fn meet(&self, others: &Self) -> bool {
        !self.0.is_disjoint(&others.0)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl Default for Pools {
    fn default() -> Self {
        Self(BTreeSet::from([Self::DEFAULT.to_owned()]))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_claim_names_pools() {
        for (claim, expected) in [
            (json!(["a", "b", "a"]), Some(&["a", "b"][..])),
            (json!("b a"), Some(&["a", "b"])),
            (json!([]), Some(&[])),
            (json!(""), Some(&[])),
            (json!(["a b"]), None),
            (json!([""]), None),
            (json!(["a\u{200b}"]), None),
            (json!(["a", 1]), None),
            (json!("x".repeat(64)), None),
            (json!((0..65).map(|i| i.to_string()).collect::<Vec<_>>()), None),
            (json!(null), None),
            (json!({"a": true}), None),
        ] {
            let parsed = Pools::parse(&claim);
            let names = parsed.as_ref().map(|pools| pools.names().collect::<Vec<_>>());
            assert_eq!(names.as_deref(), expected, "{claim}");
        }
    }

    #[test]
    fn a_caller_and_a_worker_meet_in_a_common_pool() {
        let pools = |names| Pools::parse(&json!(names)).expect("pools");
        assert!(pools("a b").meet(&pools("b c")));
        assert!(!pools("a").meet(&pools("b")));
        assert!(!pools("").meet(&pools("")));
        assert!(Pools::default().meet(&pools("default")));
    }
}
