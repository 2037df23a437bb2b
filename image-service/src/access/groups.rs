//! Groups: names that tokens carry, and that images can be granted to.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::is_subject;

/// The groups of a token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Groups(BTreeSet<String>);

impl Groups {
    /// Maximum number of groups of a token. A caller sees what is granted to any of them.
    pub(crate) const MAX: usize = 1_000;

    /// Parses the value of a claim: an array of names, or one string with spaces between names.
    ///
    /// What cannot be the name of a group is left out. Returns `None` for more than 1,000 groups.
    pub(crate) fn parse(claim: &Value) -> Option<Self> {
        let names: BTreeSet<&str> = match claim {
            Value::String(names) => names.split_ascii_whitespace().collect(),
            Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => BTreeSet::new(),
        };
        let names = names.into_iter().filter(|name| is_subject(name)).map(str::to_owned);
        let groups: BTreeSet<String> = names.collect();
        (groups.len() <= Self::MAX).then_some(Self(groups))
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_claim_names_groups() {
        let many: Vec<String> = (0..=Groups::MAX).map(|i| i.to_string()).collect();
        for (claim, expected) in [
            (json!(["/team/b", "data science", "/team/b"]), Some(&["/team/b", "data science"][..])),
            (json!("b a"), Some(&["a", "b"])),
            (json!(["a", 1, null, "", "b\u{200b}"]), Some(&["a"])),
            (json!([]), Some(&[])),
            (json!(null), Some(&[])),
            (json!({"a": true}), Some(&[])),
            (json!(many), None),
        ] {
            let parsed = Groups::parse(&claim);
            let names = parsed.as_ref().map(|groups| groups.names().collect::<Vec<_>>());
            assert_eq!(names.as_deref(), expected, "{claim}");
        }
    }
}
