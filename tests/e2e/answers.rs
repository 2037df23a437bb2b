//! Helpers that extract what tests check in responses.

use std::collections::{HashMap, HashSet};

use proto::images as api;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Returns the printed lines, in order.
pub(crate) fn lines(events: &[api::BuildEvent]) -> Vec<&str> {
    events
        .iter()
        .filter_map(|event| match &event.event {
            Some(api::build_event::Event::LogLine(line)) => Some(line.text.as_str()),
            Some(
                api::build_event::Event::StateChange(_)
                | api::build_event::Event::StepChange(_)
                | api::build_event::Event::LogGap(_),
            )
            | None => None,
        })
        .collect()
}

/// Returns the lines that the steps of a Dockerfile printed, in order, without those of pulls.
pub(crate) fn lines_of_steps(events: &[api::BuildEvent]) -> Vec<&str> {
    let mut steps = HashSet::new();
    let mut lines = Vec::new();
    for event in events {
        match &event.event {
            Some(api::build_event::Event::StepChange(change)) if change.name.starts_with('[') => {
                steps.insert((event.attempt, change.step));
            }
            Some(api::build_event::Event::LogLine(line)) if steps.contains(&(event.attempt, line.step)) => {
                lines.push(line.text.as_str());
            }
            Some(_) | None => {}
        }
    }
    lines
}

/// Returns the lines and pieces of lines that were printed, in order.
pub(crate) fn pieces(events: &[api::BuildEvent]) -> Vec<(api::LineStart, &str)> {
    let mut pieces = Vec::new();
    for event in events {
        match &event.event {
            Some(api::build_event::Event::LogLine(line)) => pieces.push((line.start(), line.text.as_str())),
            Some(
                api::build_event::Event::StateChange(_)
                | api::build_event::Event::StepChange(_)
                | api::build_event::Event::LogGap(_),
            )
            | None => {}
        }
    }
    pieces
}

/// Returns the lines, put together from their pieces, in the order of their first pieces.
pub(crate) fn joined_lines(events: &[api::BuildEvent]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut current: HashMap<_, usize> = HashMap::new();
    for event in events {
        let Some(api::build_event::Event::LogLine(line)) = &event.event else { continue };
        let stream = (event.attempt, line.step, line.stream);
        match (line.start(), current.get(&stream)) {
            (api::LineStart::Continuation, Some(&known)) => lines[known].push_str(&line.text),
            (api::LineStart::Replacement, Some(&known)) => lines[known].clone_from(&line.text),
            (start, _) => {
                assert_eq!(start, api::LineStart::NewLine, "{line:?} has no beginning");
                current.insert(stream, lines.len());
                lines.push(line.text.clone());
            }
        }
    }
    lines
}

/// Returns the states that the build entered, in order.
pub(crate) fn states(events: &[api::BuildEvent]) -> Vec<api::BuildState> {
    events
        .iter()
        .filter_map(|event| match &event.event {
            Some(api::build_event::Event::StateChange(change)) => Some(change.state()),
            Some(
                api::build_event::Event::LogLine(_)
                | api::build_event::Event::StepChange(_)
                | api::build_event::Event::LogGap(_),
            )
            | None => None,
        })
        .collect()
}

/// Checks that events are numbered from `first` without a gap.
pub(crate) fn assert_gapless(events: &[api::BuildEvent], first: i64) {
    let numbers: Vec<i64> = events.iter().map(|event| event.sequence).collect();
    let expected: Vec<i64> = (first..).take(events.len()).collect();
    assert_eq!(numbers, expected);
}

/// Returns the reason of an error, which every error of the service has.
pub(crate) fn reason(status: &Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

/// Returns the code and the reason of a response that must be an error.
pub(crate) fn refused<T: std::fmt::Debug>(answer: Result<T, Status>) -> (Code, String) {
    let status = answer.expect_err("it is refused");
    (status.code(), reason(&status))
}

/// Returns a text with one word in the place of every UUID, to compare errors about different resources.
pub(crate) fn without_ids(text: &[u8]) -> String {
    const LENGTH: usize = 36;
    let text = String::from_utf8_lossy(text);
    let mut rest = &*text;
    let mut replaced = String::new();
    while let Some(character) = rest.chars().next() {
        match rest.get(..LENGTH).filter(|id| uuid::Uuid::try_parse(id).is_ok()) {
            Some(_) => {
                replaced.push_str("<id>");
                rest = &rest[LENGTH..];
            }
            None => {
                replaced.push(character);
                rest = &rest[character.len_utf8()..];
            }
        }
    }
    replaced
}

/// Returns the fields that an error names.
pub(crate) fn fields(status: &Status) -> Vec<String> {
    let violations = status.get_details_bad_request().map(|bad_request| bad_request.field_violations);
    violations.into_iter().flatten().map(|violation| violation.field).collect()
}
