//! The claims of a worker's token, which bound what the worker reports about itself.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::image::Capability;

/// Limits that a token sets on what its worker reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkerClaims {
    /// Labels that the worker may report; any if `None`.
    labels: Option<BTreeMap<String, String>>,
    /// Capabilities that the worker may offer; any if `None`.
    capabilities: Option<BTreeSet<Capability>>,
}

impl WorkerClaims {
    const LABELS: &str = "worker_labels";
    const CAPABILITIES: &str = "worker_capabilities";

    /// Parses the claims of a token.
    ///
    /// Returns `None` unless the labels, if given, are an object of strings, and the capabilities, if given,
    /// an array of strings.
    pub(crate) fn parse(claims: &Map<String, Value>) -> Option<Self> {
        let labels = match claims.get(Self::LABELS) {
            Some(labels) => Some(serde_json::from_value(labels.clone()).ok()?),
            None => None,
        };
        let capabilities = match claims.get(Self::CAPABILITIES) {
            Some(names) => {
                let names: Vec<String> = serde_json::from_value(names.clone()).ok()?;
                Some(names.iter().flat_map(|name| Capability::of_worker(name)).copied().collect())
            }
            None => None,
        };
        Some(Self { labels, capabilities })
    }

    /// Removes the labels that the worker may not report, and returns their names.
    pub(crate) fn retain_labels(&self, labels: &mut BTreeMap<String, String>) -> Vec<String> {
        let Some(claimed) = &self.labels else { return Vec::new() };
        let (kept, removed) =
            std::mem::take(labels).into_iter().partition(|(name, value)| claimed.get(name) == Some(value));
        *labels = kept;
        let removed: BTreeMap<String, String> = removed;
        removed.into_keys().collect()
    }

    /// Removes the capabilities that the worker may not offer.
    pub(crate) fn retain_capabilities(&self, capabilities: &mut BTreeSet<Capability>) {
        if let Some(claimed) = &self.capabilities {
            capabilities.retain(|capability| claimed.contains(capability));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claims(claims: Value) -> Option<WorkerClaims> {
        WorkerClaims::parse(claims.as_object().expect("an object"))
    }

    #[test]
    fn a_worker_is_what_its_token_claims_at_most() {
        let labels =
            [("gpu", "a100"), ("zone", "a")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        let capabilities =
            BTreeSet::from([Capability::Dockerfile, Capability::Generate, Capability::Snapshot]);
        for (claim, expected_labels, expected_capabilities) in [
            (json!({}), &["gpu", "zone"][..], 3),
            (json!({"worker_labels": {}}), &[], 3),
            (json!({"worker_labels": {"gpu": "a100", "zone": "b"}}), &["gpu"], 3),
            (json!({"worker_capabilities": ["dockerfile", "later"]}), &["gpu", "zone"], 2),
            (json!({"worker_capabilities": []}), &["gpu", "zone"], 0),
        ] {
            let worker = claims(claim.clone()).expect("claims");
            let mut kept = BTreeMap::from(labels.clone());
            let removed = worker.retain_labels(&mut kept);
            assert_eq!(kept.keys().collect::<Vec<_>>(), expected_labels, "{claim}");
            assert_eq!(removed.len() + kept.len(), labels.len(), "{claim}");
            let mut offered = capabilities.clone();
            worker.retain_capabilities(&mut offered);
            assert_eq!(offered.len(), expected_capabilities, "{claim}");
        }
        for claim in [
            json!({"worker_labels": ["gpu"]}),
            json!({"worker_labels": {"gpu": 1}}),
            json!({"worker_labels": null}),
            json!({"worker_capabilities": "dockerfile"}),
            json!({"worker_capabilities": [1]}),
        ] {
            assert_eq!(claims(claim.clone()), None, "{claim}");
        }
    }
}
