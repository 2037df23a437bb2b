//! Placement: which worker gets which of the queued builds.
//!
//! Builds are placed in the order of their turn. A build goes to the worker that has its layers in the cache, for which it waits a
//! few seconds if need be ([`Build::MAX_CACHE_WAIT`]), and else to the suitable worker with the most free slots. Whatever cannot be
//! placed holds up nothing behind it.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use crate::{
    build::{Build, BuildId},
    image::Capability,
    timestamp::Timestamp,
};

/// A worker that is online and takes builds.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) capabilities: BTreeSet<Capability>,
    /// How many builds it can be given now; 0 for a worker that only another replica reaches.
    pub(crate) free_slots: usize,
}

impl Candidate {
    fn suits(&self, build: &Build) -> bool {
        build.requirements.fit(&self.name, &self.labels, &self.capabilities)
    }
}

/// A build and the worker that it goes to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Placement {
    pub(crate) build: Build,
    pub(crate) worker: String,
}

/// Returns which of the queued builds go to which worker now, in the order of their turn and at most `limit`.
///
/// A build without a placement backs off, suits no candidate with a free slot, or waits for its preferred worker.
pub(crate) fn place(
    mut queued: Vec<Build>,
    mut candidates: Vec<Candidate>,
    now: Timestamp,
    limit: usize,
) -> Vec<Placement> {
    queued.sort_by_key(Build::turn);
    let free_slots = candidates.iter().map(|candidate| candidate.free_slots).sum::<usize>();
    let limit = limit.min(free_slots);
    let mut placements = Vec::with_capacity(limit.min(queued.len()));
    for build in queued {
        if placements.len() == limit {
            break;
        }
        if let Some(candidate) = choose(&build, &mut candidates, now) {
            candidate.free_slots -= 1;
            placements.push(Placement { worker: candidate.name.clone(), build });
        }
    }
    placements
}

/// Returns the candidate with a free slot that a build goes to, if there is one.
fn choose<'a>(build: &Build, candidates: &'a mut [Candidate], now: Timestamp) -> Option<&'a mut Candidate> {
    if build.is_backing_off(now) {
        return None;
    }
    let is_preferred = |candidate: &Candidate| {
        build.preferred_worker.as_ref() == Some(&candidate.name) && candidate.suits(build)
    };
    if let Some(preferred) = candidates.iter().position(is_preferred) {
        if candidates[preferred].free_slots > 0 {
            return Some(&mut candidates[preferred]);
        }
        if build.may_wait_for_cache(now) {
            return None;
        }
    }
    candidates
        .iter_mut()
        .filter(|candidate| candidate.free_slots > 0 && candidate.suits(build))
        .max_by_key(|candidate| (candidate.free_slots, lot(build.id, &candidate.name)))
}

/// Returns the lot that a build draws for a worker: it decides between equals, without favouring any of them.
fn lot(build: BuildId, worker: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (build, worker).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
