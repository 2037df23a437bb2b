//! The change to a build that results from decisions, in the form in which the store writes it.

use std::{collections::BTreeMap, slice};

use super::Decision;
use crate::{
    build::{Build, BuildId, Record, RecordedEvent},
    image::Artifact,
};

/// The combined effects of the decisions about one build.
#[derive(Debug)]
pub(crate) struct BuildChange<'a> {
    pub(crate) build: &'a Build,
    /// Records of each decision.
    pub(crate) records: Vec<&'a [Record]>,
    pub(crate) artifact: Option<&'a Artifact>,
}

impl<'a> BuildChange<'a> {
    /// Creates the change for a build that has just been queued.
    pub(crate) fn queued(build: &'a Build, first: &'a Record) -> Self {
        Self { build, records: vec![slice::from_ref(first)], artifact: None }
    }

    /// Combines decisions into one change per build, in the order of the builds. The last row of each build
    /// wins.
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

    /// Reports whether the build enters a state. No other change of a build affects its image.
    pub(crate) fn enters_a_state(&self) -> bool {
        let is_state = |record: &Record| matches!(record.event, RecordedEvent::State { .. });
        self.records.iter().any(|records| records.iter().any(is_state))
    }
}
