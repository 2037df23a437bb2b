//! Output of a build: converts the engine's progress to events.
//!
//! Steps are numbered as the engine announces them; bytes become lines; a log over its limit keeps its beginning and
//! its end, with a gap reported between them.

use std::collections::{HashMap, VecDeque};

use prost_types::Timestamp;
use proto::dispatch::{Gap, Line, Step, StepState, report_event::Event};

use self::tail::{Tail, cost};
use crate::steps::StepUnderWay;

mod tail;

/// The progress of a build, as the engine reports it.
#[derive(Debug)]
pub(crate) enum Progress {
    /// An announcement or a change of a step.
    Step {
        /// ID of the step in the engine.
        id: String,
        /// Name of the step in the engine.
        name: String,
        /// State of the step.
        state: StepState,
        /// Error of the step; empty unless it failed.
        error: String,
        /// Time of the change, by the engine's clock.
        at: Option<Timestamp>,
    },
    /// Output of a step.
    Output {
        /// ID of the step in the engine.
        step: String,
        /// Set for standard error.
        stderr: bool,
        /// Bytes of the output, not always whole lines.
        bytes: Vec<u8>,
        /// Time of the output, by the engine's clock.
        at: Option<Timestamp>,
    },
    /// A point from which the engine has left out output of a step.
    Clip {
        /// ID of the step in the engine.
        step: String,
        /// Set for standard error.
        stderr: bool,
        /// Message of the engine.
        message: String,
        /// Time of the message, by the engine's clock.
        at: Option<Timestamp>,
    },
}

/// An event and its time, by the engine's clock.
pub(crate) type Timed = (Option<Timestamp>, Event);

/// The conversion of one build's progress to events.
#[derive(Debug)]
pub(crate) struct Output {
    steps: Vec<StepOutput>,
    index: HashMap<String, usize>,
    /// Remaining budget for lines that are reported at once; `None` once it is used up.
    ///
    /// From then on all lines go to the tail, so that they keep their order.
    budget: Option<usize>,
    tail: Tail,
}

#[derive(Debug)]
struct StepOutput {
    /// ID of the step in the engine.
    id: String,
    name: String,
    /// Last reported state.
    state: StepState,
    /// Set while the step runs; the engine may run a step again after its end.
    runs: bool,
    ended_at: Option<Timestamp>,
    error: String,
    /// Unfinished lines of standard output and standard error.
    partial: [Vec<u8>; 2],
    last_lines: VecDeque<String>,
}

/// The step that made a build fail.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FailedStep {
    pub(crate) name: String,
    pub(crate) error: String,
    pub(crate) last_lines: Vec<String>,
}

impl Output {
    const LAST_LINES: usize = 20;
    const MAX_LINE: usize = 16 * 1024;

    pub(crate) fn new(log_limit: usize) -> Self {
        Self { steps: Vec::new(), index: HashMap::new(), budget: Some(log_limit), tail: Tail::default() }
    }

    /// Takes in progress, and appends the resulting events to `events`.
    pub(crate) fn take(&mut self, progress: Progress, events: &mut Vec<Timed>) {
        match progress {
            Progress::Step { id, name, state, error, at } => {
                self.take_step(&id, name, state, error, at, events)
            }
            Progress::Output { step, stderr, bytes, at } => {
                self.take_bytes(&step, stderr, &bytes, at, events)
            }
            Progress::Clip { step, stderr, message, at } => {
                let step = self.step(&step, String::new());
                if !self.steps[step].partial[usize::from(stderr)].is_empty() {
                    self.finish_line(step, usize::from(stderr), at, events);
                }
                events.push((at, Event::Gap(Gap { lines: 0, message })));
            }
        }
    }

    /// Reports that the following progress is missing.
    pub(crate) fn leave_out(&mut self, why: &str, events: &mut Vec<Timed>) {
        events.push((None, Event::Gap(Gap { lines: 0, message: why.to_owned() })));
    }

    /// Ends the output: reports unfinished lines, and the end of a log that is over its limit.
    pub(crate) fn finish(&mut self, events: &mut Vec<Timed>) {
        for step in 0..self.steps.len() {
            self.finish_lines(step, events);
        }
        let tail = std::mem::take(&mut self.tail);
        if tail.dropped > 0 {
            let message = "the log is over its limit; its end follows".to_owned();
            events.push((None, Event::Gap(Gap { lines: tail.dropped, message })));
        }
        events.extend(tail.lines.into_iter().map(|(at, line)| (at, Event::Line(line))));
    }

    /// Returns the step that failed, if there is one.
    ///
    /// When a step fails, the engine cancels the steps beside it. These count only if no other step has failed.
    pub(crate) fn failed_step(&self) -> Option<FailedStep> {
        let failed = || self.steps.iter().filter(|step| step.state == StepState::Failed);
        let step =
            failed().find(|step| !step.error.ends_with("context canceled")).or_else(|| failed().next())?;
        Some(FailedStep {
            name: step.name.clone(),
            error: step.error.clone(),
            last_lines: step.last_lines.iter().cloned().collect(),
        })
    }

    /// Returns the steps that the engine has announced and not finished.
    pub(crate) fn steps_under_way(&self) -> Vec<StepUnderWay> {
        let unfinished = |step: &&StepOutput| step.runs || !is_over(step.state);
        self.steps
            .iter()
            .filter(unfinished)
            .map(|step| StepUnderWay { id: step.id.clone(), name: step.name.clone(), started: step.runs })
            .collect()
    }

    fn take_step(
        &mut self,
        id: &str,
        name: String,
        state: StepState,
        error: String,
        at: Option<Timestamp>,
        events: &mut Vec<Timed>,
    ) {
        let step = self.step(id, name);
        let known = &mut self.steps[step];
        if is_over(state) {
            (known.runs, known.ended_at) = (false, at);
        } else if state == StepState::Started {
            // The engine repeats itself; only a later start is another run of the step.
            known.runs |= known.ended_at.is_none() || order(at) > order(known.ended_at);
        }
        // A step is reported after its end only if another run of it has failed.
        if known.state == state || (is_over(known.state) && state != StepState::Failed) {
            return;
        }
        // An unfinished line may continue after the end of its step: the engine reports the end before the rest of the
        // output.
        let known = &mut self.steps[step];
        known.state = state;
        known.error.clone_from(&error);
        let event = Step { index: number(step), name: known.name.clone(), state: state.into(), error };
        events.push((at, Event::Step(event)));
    }

    fn take_bytes(
        &mut self,
        id: &str,
        stderr: bool,
        bytes: &[u8],
        at: Option<Timestamp>,
        events: &mut Vec<Timed>,
    ) {
        let step = self.step(id, String::new());
        let stream = usize::from(stderr);
        let mut rest = bytes;
        while !rest.is_empty() {
            let partial = &mut self.steps[step].partial[stream];
            let room = Self::MAX_LINE - partial.len();
            let end = rest.iter().take(room).position(|&byte| byte == b'\n');
            let taken = end.unwrap_or_else(|| room.min(rest.len()));
            partial.extend_from_slice(&rest[..taken]);
            rest = &rest[taken + usize::from(end.is_some())..];
            if end.is_some() || partial.len() == Self::MAX_LINE {
                self.finish_line(step, stream, at, events);
            }
        }
    }

    fn finish_lines(&mut self, step: usize, events: &mut Vec<Timed>) {
        for stream in 0..2 {
            if !self.steps[step].partial[stream].is_empty() {
                self.finish_line(step, stream, None, events);
            }
        }
    }

    fn finish_line(&mut self, step: usize, stream: usize, at: Option<Timestamp>, events: &mut Vec<Timed>) {
        let mut bytes = std::mem::take(&mut self.steps[step].partial[stream]);
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        let text = String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        let last_lines = &mut self.steps[step].last_lines;
        if last_lines.len() == Self::LAST_LINES {
            last_lines.pop_front();
        }
        last_lines.push_back(text.clone());
        let line = Line { step: number(step), stderr: stream == 1, text };
        match self.budget.and_then(|budget| budget.checked_sub(cost(&line))) {
            Some(rest) => {
                self.budget = Some(rest);
                events.push((at, Event::Line(line)));
            }
            None => {
                self.budget = None;
                self.tail.push(at, line);
            }
        }
    }

    /// Returns the index of a step, which is new if the engine has not announced it yet.
    fn step(&mut self, id: &str, name: String) -> usize {
        if let Some(&step) = self.index.get(id) {
            if self.steps[step].name.is_empty() {
                self.steps[step].name = name;
            }
            return step;
        }
        let step = self.steps.len();
        self.index.insert(id.to_owned(), step);
        self.steps.push(StepOutput {
            id: id.to_owned(),
            name,
            state: StepState::Unspecified,
            runs: false,
            ended_at: None,
            error: String::new(),
            partial: [Vec::new(), Vec::new()],
            last_lines: VecDeque::new(),
        });
        step
    }
}

fn order(at: Option<Timestamp>) -> Option<(i64, i32)> {
    at.map(|at| (at.seconds, at.nanos))
}

fn is_over(state: StepState) -> bool {
    match state {
        StepState::Done | StepState::Cached | StepState::Failed => true,
        StepState::Unspecified | StepState::Pending | StepState::Started => false,
    }
}

fn number(step: usize) -> i32 {
    i32::try_from(step).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(output: &mut Output, text: &str) -> Vec<Event> {
        let mut events = Vec::new();
        let progress = Progress::Output {
            step: "a".to_owned(),
            stderr: false,
            bytes: text.as_bytes().to_vec(),
            at: None,
        };
        output.take(progress, &mut events);
        events.into_iter().map(|(_, event)| event).collect()
    }

    fn finish(output: &mut Output) -> Vec<Event> {
        let mut events = Vec::new();
        output.finish(&mut events);
        events.into_iter().map(|(_, event)| event).collect()
    }

    fn texts(events: &[Event]) -> Vec<String> {
        let text = |event: &Event| match event {
            Event::Line(line) => line.text.clone(),
            Event::Gap(gap) => format!("<{}>", gap.lines),
            Event::Started(_)
            | Event::Step(_)
            | Event::Built(_)
            | Event::Succeeded(_)
            | Event::Failed(_)
            | Event::HandedBack(_)
            | Event::Stopped(_) => "no output".to_owned(),
        };
        events.iter().map(text).collect()
    }

    /// Returns the number of events for a state of the step `a`, `second` being the engine's clock.
    fn step(output: &mut Output, state: StepState, second: i64) -> usize {
        let mut events = Vec::new();
        let progress = Progress::Step {
            id: "a".to_owned(),
            name: "[1/1] RUN".to_owned(),
            state,
            error: if state == StepState::Failed { "exit code: 1".to_owned() } else { String::new() },
            at: Some(Timestamp { seconds: second, nanos: 0 }),
        };
        output.take(progress, &mut events);
        events.len()
    }

    #[test]
    fn bytes_become_lines_wherever_they_are_cut() {
        let mut log = Output::new(1_000_000);
        assert_eq!(texts(&output(&mut log, "on")), [""; 0]);
        assert_eq!(texts(&output(&mut log, "e\r\n\ntw")), ["one", ""]);
        assert_eq!(texts(&finish(&mut log)), ["tw"]);
    }

    #[test]
    fn a_line_goes_on_after_the_end_of_its_step() {
        let mut log = Output::new(1_000_000);
        step(&mut log, StepState::Started, 1);
        assert_eq!(texts(&output(&mut log, "on")), [""; 0]);
        assert_eq!(step(&mut log, StepState::Done, 2), 1);
        assert_eq!(texts(&output(&mut log, "e\ntwo")), ["one"]);
        assert_eq!(texts(&finish(&mut log)), ["two"]);
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let mut log = Output::new(1_000_000);
        let lines = texts(&output(&mut log, &"x".repeat(2 * Output::MAX_LINE + 5)));
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [Output::MAX_LINE; 2]);
        assert_eq!(texts(&finish(&mut log)), ["xxxxx"]);
    }

    #[test]
    fn a_log_over_its_limit_keeps_its_beginning_and_its_end() {
        let mut log = Output::new(2 * (32 + 5));
        let line = "y".repeat(1_000 - 32);
        assert_eq!(texts(&output(&mut log, "12345\n67890\n\n")), ["12345", "67890"]);
        for _ in 0..100 {
            assert_eq!(texts(&output(&mut log, &format!("{line}\n"))), [""; 0]);
        }
        output(&mut log, "end\n");
        let rest = texts(&finish(&mut log));
        let kept = Tail::BYTES / 1_000;
        assert_eq!(rest.len(), 1 + kept + 1);
        assert_eq!(rest[0], format!("<{}>", 101 - kept));
        assert_eq!(rest.last().map(String::as_str), Some("end"));
    }

    #[test]
    fn a_step_says_each_state_once() {
        let mut log = Output::new(10);
        assert_eq!(step(&mut log, StepState::Pending, 0), 1);
        assert_eq!(step(&mut log, StepState::Pending, 0), 0);
        assert_eq!(step(&mut log, StepState::Started, 1), 1);
        assert_eq!(step(&mut log, StepState::Done, 2), 1);
        assert_eq!(step(&mut log, StepState::Started, 1), 0);
        assert!(log.steps_under_way().is_empty(), "what the engine repeats is not another run");
        assert_eq!(step(&mut log, StepState::Done, 2), 0);
        assert!(log.failed_step().is_none());
    }

    #[test]
    fn a_step_that_runs_again_and_fails_has_failed() {
        let mut log = Output::new(1_000);
        step(&mut log, StepState::Started, 1);
        step(&mut log, StepState::Done, 2);
        step(&mut log, StepState::Started, 3);
        assert_eq!(log.steps_under_way().len(), 1);
        output(&mut log, "last words\n");
        assert_eq!(step(&mut log, StepState::Failed, 4), 1);
        assert!(log.steps_under_way().is_empty());
        let failed = log.failed_step().expect("it failed");
        assert_eq!((failed.name.as_str(), failed.last_lines), ("[1/1] RUN", vec!["last words".to_owned()]));
    }
}
