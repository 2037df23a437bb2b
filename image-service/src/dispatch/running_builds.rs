//! The limit on the builds of one requester that run at the same time.

use std::collections::HashMap;

/// The builds that workers hold, counted by requester if there is a limit.
#[derive(Clone, Debug, Default)]
pub(crate) struct RunningBuilds {
    /// Maximum number per requester; `None` for no limit.
    limit: Option<u64>,
    by_requester: HashMap<String, u64>,
}

impl RunningBuilds {
    pub(crate) fn new(limit: Option<u64>, counted: impl IntoIterator<Item = (String, u64)>) -> Self {
        Self { limit, by_requester: counted.into_iter().collect() }
    }

    /// Counts one more build of a requester.
    pub(crate) fn add(&mut self, requester: &str) {
        if self.limit.is_some() {
            *self.by_requester.entry(requester.to_owned()).or_default() += 1;
        }
    }

    /// Reports whether a requester may have no more builds running.
    pub(crate) fn is_at_limit(&self, requester: &str) -> bool {
        let running = self.by_requester.get(requester).copied().unwrap_or(0);
        self.limit.is_some_and(|limit| running >= limit)
    }

    /// Returns the requesters that may have no more builds running.
    pub(crate) fn at_limit(&self) -> impl Iterator<Item = &str> {
        self.by_requester.keys().map(String::as_str).filter(|requester| self.is_at_limit(requester))
    }
}
