//! Placement of queued builds on workers.
//!
//! Builds are placed in the order of their turn. A build goes to the worker that has its layers in the cache,
//! for which it waits a few seconds if necessary ([`Build::MAX_CACHE_WAIT`]), and otherwise to the suitable
//! worker with the most free slots. A build that cannot be placed does not hold up the builds behind it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use super::{Connected, RunningBuilds, Worker};
use crate::{
    access::Pools,
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
    pub(crate) pools: Pools,
    /// Number of builds that the worker can be given now; 0 for a worker that only another replica reaches.
    pub(crate) free_slots: usize,
}

impl Candidate {
    fn suits(&self, build: &Build) -> bool {
        build.suits(&self.name, &self.labels, &self.capabilities, &self.pools)
    }
}

/// A build and the worker that it is placed on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Placement {
    pub(crate) build: Build,
    pub(crate) worker: String,
}

/// Returns the workers that a queued build may go to or wait for.
///
/// These are the connected workers, and the workers that are online at other replicas. A worker whose session
/// was replaced has no free slots.
pub(crate) fn candidates(workers: Vec<Worker>, connected: &[Connected]) -> Vec<Candidate> {
    let sessions: HashMap<_, _> =
        connected.iter().map(|worker| (worker.name.as_str(), worker.session)).collect();
    let candidate = |worker: Worker| {
        let session = sessions.get(worker.name.as_str()).copied();
        let is_elsewhere = worker.online && !worker.draining;
        let is_candidate =
            !worker.drained && worker.unsupported_reason.is_empty() && (session.is_some() || is_elsewhere);
        is_candidate.then(|| Candidate {
            free_slots: if session.is_some() && session == worker.session { worker.free_slots() } else { 0 },
            name: worker.name,
            labels: worker.labels,
            capabilities: worker.capabilities,
            pools: worker.pools,
        })
    };
    workers.into_iter().filter_map(candidate).collect()
}

/// Returns the placements that are possible now, in the order of the builds' turns and at most `limit`.
///
/// A build without a placement backs off, suits no candidate with a free slot, waits for its preferred worker,
/// or is one too many of its requester. The placed builds are added to `running`.
pub(crate) fn place(
    queued: &[Build],
    candidates: &[Candidate],
    running: &mut RunningBuilds,
    now: Timestamp,
    limit: usize,
) -> Vec<Placement> {
    let mut queued: Vec<&Build> = queued.iter().filter(|build| !build.is_backing_off(now)).collect();
    queued.sort_by_key(|build| build.turn());
    let mut free_slots: Vec<usize> = candidates.iter().map(|candidate| candidate.free_slots).collect();
    let limit = limit.min(free_slots.iter().sum());
    let mut placements = Vec::with_capacity(limit.min(queued.len()));
    for build in queued {
        if placements.len() == limit {
            break;
        }
        if running.is_at_limit(&build.requester.subject) {
            continue;
        }
        if let Some(chosen) = choose(build, candidates, &free_slots, now) {
            free_slots[chosen] -= 1;
            running.add(&build.requester.subject);
            placements.push(Placement { build: build.clone(), worker: candidates[chosen].name.clone() });
        }
    }
    placements
}

/// Returns the index of the candidate with a free slot that a build goes to, if there is one.
fn choose(build: &Build, candidates: &[Candidate], free_slots: &[usize], now: Timestamp) -> Option<usize> {
    let is_preferred = |candidate: &Candidate| {
        build.preferred_worker.as_ref() == Some(&candidate.name) && candidate.suits(build)
    };
    if let Some(preferred) = candidates.iter().position(is_preferred) {
        if free_slots[preferred] > 0 {
            return Some(preferred);
        }
        if build.may_wait_for_cache(now) {
            return None;
        }
    }
    let suitable =
        (0..candidates.len()).filter(|index| free_slots[*index] > 0 && candidates[*index].suits(build));
    suitable.max_by_key(|index| (free_slots[*index], tie_break(build.id, &candidates[*index].name)))
}

/// Returns a number that breaks ties between equal workers, without favouring any of them.
fn tie_break(build: BuildId, worker: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (build, worker).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
