//! The terms that watches look for: each change is searched once for each of them, not once for each watch.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::search::Term;

/// How many watches look for each term.
#[derive(Debug, Default)]
pub(super) struct Terms(Mutex<BTreeMap<Arc<Term>, usize>>);

/// As long as it lives, changes are searched for its term.
#[derive(Debug)]
pub(super) struct LookingFor {
    terms: Arc<Terms>,
    term: Arc<Term>,
}

impl Terms {
    pub(super) fn look_for(self: &Arc<Self>, term: Term) -> LookingFor {
        let mut counts = self.counts();
        let term = counts.get_key_value(&term).map_or_else(|| Arc::new(term), |(known, _)| Arc::clone(known));
        *counts.entry(Arc::clone(&term)).or_default() += 1;
        LookingFor { terms: Arc::clone(self), term }
    }

    pub(super) fn all(&self) -> Arc<[Arc<Term>]> {
        self.counts().keys().cloned().collect()
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<Arc<Term>, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LookingFor {
    pub(super) fn term(&self) -> &Arc<Term> {
        &self.term
    }
}

impl Drop for LookingFor {
    fn drop(&mut self) {
        let mut counts = self.terms.counts();
        if let Some(count) = counts.get_mut(&self.term) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.term);
            }
        }
    }
}
