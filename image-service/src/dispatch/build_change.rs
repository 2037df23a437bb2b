//! The change that decisions make to a build, as it is to be written.

use std::{collections::BTreeMap, slice};

use super::Decision;
use crate::{
    build::{Build, BuildId, Happening, Record},
    image::Artifact,
};

/// The decisions about one build, together.
#[derive(Debug)]
pub(crate) struct BuildChange<'a> {
    pub(crate) build: &'a Build,
    /// Of each decision those that it has brought.
    pub(crate) records: Vec<&'a [Record]>,
    pub(crate) artifact: Option<&'a Artifact>,
}

impl<'a> BuildChange<'a> {
    /// Makes the change of a build that has just been queued.
    pub(crate) fn queued(build: &'a Build, first: &'a Record) -> Self {
        Self { build, records: vec![slice::from_ref(first)], artifact: None }
    }

    /// Makes a change of each build from decisions, in the order of the builds. The last row of a build counts.
    pub(crate) fn of_decisions(decisions: impl IntoIterator<Item = &'a Decision>) -> Vec<Self> {
        let mut all: BTreeMap<BuildId, Self> = BTreeMap::new();
        for decision in decisions {
            let Some(build) = &decision.build else {
                continue;
            };
            let change = Self { build, records: Vec::new(), artifact: None };
            let change = all.entry(build.id).or_insert(change);
            change.build = build;
            change.records.extend((!decision.records.is_empty()).then_some(decision.records.as_slice()));
            change.artifact = decision.artifact.as_ref().or(change.artifact);
        }
        all.into_values().collect()
    }

    /// Returns whether the build enters a state: nothing else says anything of its image.
    pub(crate) fn enters_a_state(&self) -> bool {
        let is_state = |record: &Record| matches!(record.happening, Happening::State { .. });
        self.records.iter().any(|records| records.iter().any(is_state))
    }
}
