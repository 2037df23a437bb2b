//! Which steps run now in the builds of this worker: the engine runs equal steps of several builds once.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The running steps of every build, by the marker of the build.
#[derive(Clone, Debug, Default)]
pub(crate) struct RunningSteps(Arc<Mutex<HashMap<String, BTreeSet<String>>>>);

impl RunningSteps {
    /// These steps of a build run now.
    pub(crate) fn set<'a>(&self, build: &str, steps: impl Iterator<Item = &'a str>) {
        self.builds()
            .insert(build.to_owned(), steps.map(str::to_owned).collect());
    }

    /// The build is over.
    pub(crate) fn forget(&self, build: &str) {
        self.builds().remove(build);
    }

    /// Whether another build runs a step of the same name as one that ran in this build when it was last heard of.
    pub(crate) fn is_shared(&self, build: &str) -> bool {
        let builds = self.builds();
        let Some(steps) = builds.get(build) else {
            return false;
        };
        builds
            .iter()
            .any(|(other, running)| other != build && !running.is_disjoint(steps))
    }

    fn builds(&self) -> MutexGuard<'_, HashMap<String, BTreeSet<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_the_same_name_in_another_build_is_shared() {
        let running = RunningSteps::default();
        running.set("a", ["[2/2] RUN make"].into_iter());
        assert!(!running.is_shared("a"));
        running.set("b", ["[2/2] RUN make"].into_iter());
        assert!(running.is_shared("a") && running.is_shared("b"));
        running.set("b", [].into_iter());
        assert!(!running.is_shared("a"));
    }
}
