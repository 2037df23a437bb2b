//! The terms that watches look for: each change is searched once for each of them, not once for each watch.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::search::Term;

/// How many watches look for each term.
#[derive(Debug, Default)]
pub(super) struct Terms(Mutex<BTreeMap<Term, usize>>);

/// As long as it lives, changes are searched for its term.
#[derive(Debug)]
pub(super) struct LookingFor {
    terms: Arc<Terms>,
    term: Term,
}

impl Terms {
    pub(super) fn look_for(self: &Arc<Self>, term: Term) -> LookingFor {
        *self.counts().entry(term.clone()).or_default() += 1;
        LookingFor { terms: Arc::clone(self), term }
    }

    pub(super) fn all(&self) -> Vec<Term> {
        self.counts().keys().cloned().collect()
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<Term, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LookingFor {
    pub(super) fn term(&self) -> &Term {
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
