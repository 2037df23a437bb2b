//! Unfinished steps of this worker's builds. The engine runs equal steps of several builds once.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The unfinished steps of every build, by the build's name.
#[derive(Clone, Debug, Default)]
pub(crate) struct StepsUnderWay(Arc<Mutex<BTreeMap<String, Build>>>);

#[derive(Debug, Default)]
struct Build {
    steps: Vec<StepUnderWay>,
    /// Set once the build is to stop and needs none of its steps any more.
    is_stopping: bool,
}

/// A step that the engine has announced and not finished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepUnderWay {
    /// ID of the step in the engine.
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) started: bool,
}

impl StepUnderWay {
    /// Reports whether its processes run on the engine's host; other steps are the engine's own work.
    fn runs_processes(&self) -> bool {
        self.name.contains("RUN ")
    }
}

impl StepsUnderWay {
    /// Replaces the unfinished steps of a build.
    pub(crate) fn set(&self, build: &str, steps: Vec<StepUnderWay>) {
        self.builds().entry(build.to_owned()).or_default().steps = steps;
    }

    /// Marks a build that is to stop.
    pub(crate) fn stop(&self, build: &str) {
        self.builds().entry(build.to_owned()).or_default().is_stopping = true;
    }

    /// Removes a build that has ended.
    pub(crate) fn remove(&self, build: &str) {
        self.builds().remove(build);
    }

    /// Returns the names of the started steps of a build that run processes.
    pub(crate) fn running(&self, build: &str) -> Vec<String> {
        let builds = self.builds();
        let steps = builds.get(build).into_iter().flat_map(|build| &build.steps);
        steps.filter(|step| step.started && step.runs_processes()).map(|step| step.name.clone()).collect()
    }

    /// Returns the number of steps that may go on after a build has stopped, because others need them.
    ///
    /// These are the steps that other builds have started, and one that they wait for while this build has
    /// started one of the same name. Only steps whose name `is_left` accepts count.
    pub(crate) fn needed_by_others(&self, build: &str, is_left: impl Fn(&str) -> bool) -> usize {
        let builds = self.builds();
        let ours: BTreeSet<&str> = builds
            .get(build)
            .into_iter()
            .flat_map(|build| &build.steps)
            .filter(|step| step.started)
            .map(|step| step.name.as_str())
            .collect();
        let others = || {
            let others = builds.iter().filter(|(other, of_other)| *other != build && !of_other.is_stopping);
            others
                .flat_map(|(_, other)| &other.steps)
                .filter(|step| step.runs_processes() && is_left(&step.name))
        };
        let started: BTreeSet<&str> =
            others().filter(|step| step.started).map(|step| step.id.as_str()).collect();
        let awaited: BTreeSet<&str> = others()
            .filter(|step| !step.started && ours.contains(step.name.as_str()))
            .map(|step| step.name.as_str())
            .collect();
        started.len() + awaited.len()
    }

    fn builds(&self) -> MutexGuard<'_, BTreeMap<String, Build>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(id: &str, name: &str, started: bool) -> StepUnderWay {
        StepUnderWay { id: id.to_owned(), name: name.to_owned(), started }
    }

    #[test]
    fn others_need_what_they_have_started_or_wait_for() {
        let steps = StepsUnderWay::default();
        steps.set("a", vec![step("1", "RUN make", true)]);
        assert_eq!(steps.needed_by_others("a", |_| true), 0);
        // The engine runs one step for both builds, and reports it to both.
        steps.set("b", vec![step("1", "RUN make", true)]);
        steps.set("c", vec![step("1", "RUN make", true)]);
        assert_eq!(steps.needed_by_others("a", |_| true), 1);
        // The engine runs one step for both builds, and reports it to one.
        steps.set("b", vec![step("2", "RUN make", false)]);
        steps.set("c", vec![step("3", "RUN test", false)]);
        assert_eq!(steps.needed_by_others("a", |_| true), 1);
        assert_eq!(steps.needed_by_others("a", |step| step == "RUN test"), 0);
        steps.remove("b");
        assert_eq!(steps.needed_by_others("a", |_| true), 0);
        // A build that is to stop needs nothing.
        steps.set("b", vec![step("4", "RUN make", true)]);
        assert_eq!(steps.needed_by_others("a", |_| true), 1);
        steps.stop("b");
        steps.set("b", vec![step("4", "RUN make", true)]);
        assert_eq!(steps.needed_by_others("a", |_| true), 0);
        assert_eq!(steps.running("b"), ["RUN make"]);
    }
}
