//! Output of a build: converts the engine's progress to events.
//!
//! Steps are numbered as the engine announces them; bytes become lines, and pieces of lines that have no end
//! for some time; a log over its limit keeps its beginning and its end, with a gap reported between them.

use std::{collections::HashMap, sync::Arc, time::Instant};

use prost_types::Timestamp;
use proto::dispatch::{Gap, Line, Step, StepState, report_event::Event};

use self::{
    last_lines::LastLines,
    stream::{Piece, Stream},
    tail::{Tail, cost},
};
use crate::{
    secrets::{Held, Scrubber},
    steps::StepUnderWay,
};

mod decoder;
mod last_lines;
mod stream;
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
    /// Earliest time at which a line without an end may have to be reported.
    due: Option<Instant>,
    /// Step that was running when the work was stopped.
    interrupted: Option<usize>,
    /// The filter of secrets.
    scrubber: Arc<Scrubber>,
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
    started_at: Option<Timestamp>,
    /// Standard output and standard error.
    streams: [Stream; 2],
    /// Their last bytes, as far as these may be the begin of a secret.
    held: [Held; 2],
    last_lines: LastLines,
}

/// The step that made a build fail, or that its end has interrupted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FailedStep {
    pub(crate) name: String,
    pub(crate) error: String,
    pub(crate) last_lines: Vec<String>,
}

impl Output {
    pub(crate) fn new(log_limit: usize) -> Self {
        Self {
            steps: Vec::new(),
            index: HashMap::new(),
            budget: Some(log_limit),
            tail: Tail::default(),
            due: None,
            interrupted: None,
            scrubber: Arc::default(),
        }
    }

    /// Hides secrets in what follows.
    pub(crate) fn hide(&mut self, scrubber: Arc<Scrubber>) {
        self.scrubber = scrubber;
    }

    /// Hides secrets in a text about the build.
    pub(crate) fn scrubbed(&self, text: String) -> String {
        self.scrubber.text(text)
    }

    /// Takes in the progress of this moment, and appends the resulting events to `events`.
    pub(crate) fn take(&mut self, progress: Progress, now: Instant, events: &mut Vec<Timed>) {
        match progress {
            Progress::Step { id, name, state, error, at } => {
                let (name, error) = (self.scrubbed(name), self.scrubbed(error));
                self.take_step(&id, name, state, error, at, events)
            }
            Progress::Output { step, stderr, bytes, at } => {
                let step = self.step(&step, String::new());
                let mut pieces = Vec::new();
                let StepOutput { streams, held, .. } = &mut self.steps[step];
                let stream = &mut streams[usize::from(stderr)];
                let shown = self.scrubber.take(&mut held[usize::from(stderr)], &bytes);
                stream.take(&shown, at, now, &mut pieces);
                self.due = earlier(self.due, stream.due());
                self.report(step, stderr, pieces, events);
            }
            Progress::Clip { step, stderr, message, at } => {
                let step = self.step(&step, String::new());
                self.finish_line(step, stderr, events);
                events.push((at, Event::Gap(Gap { lines: 0, message: self.scrubbed(message) })));
            }
        }
    }

    /// Returns the time at which [`Self::report_unfinished`] may have something to report.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Reports the lines that have had no end for some time, such as prompts and progress bars.
    pub(crate) fn report_unfinished(&mut self, now: Instant, events: &mut Vec<Timed>) {
        if self.due.is_none_or(|due| now < due) {
            return;
        }
        self.due = None;
        for step in 0..self.steps.len() {
            for stderr in [false, true] {
                let stream = &mut self.steps[step].streams[usize::from(stderr)];
                if stream.due().is_some_and(|due| due <= now) {
                    let piece = stream.report();
                    self.report(step, stderr, piece, events);
                } else {
                    self.due = earlier(self.due, stream.due());
                }
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
        let (dropped, lines) = std::mem::take(&mut self.tail).into_lines();
        if dropped > 0 {
            let message = "the log is over its limit; its end follows".to_owned();
            events.push((None, Event::Gap(Gap { lines: dropped, message })));
        }
        events.extend(lines.map(|(at, line)| (at, Event::Line(line))));
    }

    /// Returns the step that failed, if there is one.
    ///
    /// When a step fails, the engine cancels the steps beside it. These count only if no other step has
    /// failed.
    pub(crate) fn failed_step(&self) -> Option<FailedStep> {
        let failed = || self.steps.iter().filter(|step| step.state == StepState::Failed);
        let step =
            failed().find(|step| !step.error.ends_with("context canceled")).or_else(|| failed().next())?;
        Some(step.failure())
    }

    /// Marks the step that the end of the work interrupts: of those that run, the one that started first.
    pub(crate) fn interrupt(&mut self) {
        let running = self.steps.iter().enumerate().filter(|(_, step)| step.runs);
        self.interrupted = running.min_by_key(|(_, step)| order(step.started_at)).map(|(step, _)| step);
    }

    /// Returns the step that was running when the work was stopped, or that the stop made fail, if there is
    /// one.
    pub(crate) fn interrupted_step(&self) -> Option<FailedStep> {
        self.interrupted.map(|step| self.steps[step].failure()).or_else(|| self.failed_step())
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
        } else if state == StepState::Started && !known.runs {
            // The engine repeats itself; only a later start is another run of the step.
            known.runs = known.ended_at.is_none() || order(at) > order(known.ended_at);
            if known.runs {
                known.started_at = at;
                self.finish_lines(step, events);
            }
        }
        let known = &mut self.steps[step];
        // A step is reported after its end only if another run of it has failed.
        if known.state == state || (is_over(known.state) && state != StepState::Failed) {
            return;
        }
        // An unfinished line may continue after the end of its step: the engine reports the end before the
        // rest of the output.
        known.state = state;
        known.error.clone_from(&error);
        let event = Step { index: number(step), name: known.name.clone(), state: state.into(), error };
        events.push((at, Event::Step(event)));
    }

    fn finish_lines(&mut self, step: usize, events: &mut Vec<Timed>) {
        for stderr in [false, true] {
            self.finish_line(step, stderr, events);
        }
    }

    fn finish_line(&mut self, step: usize, stderr: bool, events: &mut Vec<Timed>) {
        let mut pieces = Vec::new();
        let StepOutput { streams, held, .. } = &mut self.steps[step];
        let rest = self.scrubber.finish(&mut held[usize::from(stderr)]);
        streams[usize::from(stderr)].finish(&rest, &mut pieces);
        self.report(step, stderr, pieces, events);
    }

    /// Reports pieces of lines, or keeps them for the tail.
    fn report(
        &mut self,
        step: usize,
        stderr: bool,
        pieces: impl IntoIterator<Item = Piece>,
        events: &mut Vec<Timed>,
    ) {
        for Piece { start, text, at } in pieces {
            self.steps[step].last_lines.take(stderr, start, &text);
            let line = Line { step: number(step), stderr, text, start: start.into() };
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
            started_at: None,
            streams: Default::default(),
            held: Default::default(),
            last_lines: LastLines::default(),
        });
        step
    }
}

impl StepOutput {
    fn failure(&self) -> FailedStep {
        FailedStep {
            name: self.name.clone(),
            error: self.error.clone(),
            last_lines: self.last_lines.to_vec(),
        }
    }
}

fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    a.into_iter().chain(b).min()
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
mod tests;
