//! The operator's word on who may use which secret.

use std::{collections::BTreeMap, fmt, io};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

/// The rules for secrets, by name. A secret without a rule is for nobody.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Policy {
    #[serde(deserialize_with = "distinct")]
    secrets: BTreeMap<String, Rule>,
}

/// Those who may use a secret. What is misspelt here must not lift a restriction.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// Subjects, of which both the creator of the image and the requester of the build must be one; anybody if
    /// absent.
    #[serde(default, deserialize_with = "given")]
    creators: Option<Vec<String>>,
    /// Pools, of which the requester must have one; any if absent. Which pools a creator has is not known, so
    /// that without `creators` the requester must be the creator.
    #[serde(default, deserialize_with = "given")]
    pools: Option<Vec<String>>,
}

/// Takes a list, and no `null`, which is what becomes of a variable that somebody forgot to set.
fn given<'de, D: Deserializer<'de>>(list: D) -> Result<Option<Vec<String>>, D::Error> {
    Vec::deserialize(list).map(Some)
}

/// Takes rules of which no two have the same name.
fn distinct<'de, D: Deserializer<'de>>(rules: D) -> Result<BTreeMap<String, Rule>, D::Error> {
    struct Rules;
    impl<'de> Visitor<'de> for Rules {
        type Value = BTreeMap<String, Rule>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut rules = BTreeMap::new();
            while let Some((name, rule)) = map.next_entry::<String, Rule>()? {
                if rules.contains_key(&name) {
                    return Err(A::Error::custom(format!("{name:?} is there twice")));
                }
                rules.insert(name, rule);
            }
            Ok(rules)
        }
    }
    rules.deserialize_map(Rules)
}

/// Those for whom a build runs.
#[derive(Copy, Clone, Debug)]
pub(super) struct User<'a> {
    /// Creator of the image.
    pub(super) creator: &'a str,
    /// Requester of the build.
    pub(super) requester: &'a str,
    /// Pools of the requester.
    pub(super) pools: &'a [String],
}

impl Policy {
    /// Parses the content of the file.
    ///
    /// # Errors
    ///
    /// Returns the reason, with the line.
    pub(super) fn parse(content: &[u8]) -> io::Result<Self> {
        serde_json::from_slice(content).map_err(io::Error::other)
    }

    /// Reports whether a build may use a secret.
    pub(super) fn allows(&self, name: &str, user: &User<'_>) -> bool {
        let Some(rule) = self.secrets.get(name) else { return false };
        let contains = |list: &Option<Vec<String>>, wanted: &[&str]| {
            list.as_ref().is_none_or(|list| wanted.iter().all(|wanted| list.iter().any(|one| one == wanted)))
        };
        let has_pool = |pools: &Vec<String>| user.pools.iter().any(|pool| pools.contains(pool));
        let is_for_creator =
            rule.pools.is_none() || rule.creators.is_some() || user.creator == user.requester;
        contains(&rule.creators, &[user.creator, user.requester])
            && rule.pools.as_ref().is_none_or(has_pool)
            && is_for_creator
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_for_whom_the_operator_names() {
        let policy = r#"{"secrets": {"all": {}, "alice": {"creators": ["alice"]}, "team": {"creators": ["alice", "bob"]},
            "pool": {"pools": ["a", "b"]}, "both": {"creators": ["alice"], "pools": ["a"]}, "none": {"pools": []}}}"#;
        let policy = Policy::parse(policy.as_bytes()).expect("a policy");
        for (creator, requester, pools, expected) in [
            ("alice", "alice", &["a"][..], &["all", "alice", "team", "pool", "both"][..]),
            ("alice", "alice", &["c"], &["all", "alice", "team"]),
            ("alice", "bob", &["b"], &["all", "team"]),
            ("bob", "alice", &[], &["all", "team"]),
            ("carol", "alice", &["a", "c"], &["all"]),
            ("carol", "carol", &["a", "c"], &["all", "pool"]),
        ] {
            let pools: Vec<String> = pools.iter().map(|pool| (*pool).to_owned()).collect();
            let user = User { creator, requester, pools: &pools };
            let names = ["all", "alice", "team", "pool", "both", "none", "other"];
            let allowed: Vec<&str> = names.into_iter().filter(|name| policy.allows(name, &user)).collect();
            assert_eq!(allowed, expected, "{user:?}");
        }
    }

    #[test]
    fn a_misspelt_policy_is_none() {
        for wrong in [
            "",
            "[]",
            "{}",
            r#"{"secrets": {"a": {"creator": ["x"]}}}"#,
            r#"{"secrets": {"a": {"pools": "x"}}}"#,
            r#"{"secrets": {"a": {"creators": null}}}"#,
            r#"{"secrets": {"a": {"creators": ["x"]}, "a": {}}}"#,
        ] {
            assert!(Policy::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
