//! Conversion of builds and their histories to messages.

use proto::images as wire;

use super::field;
use crate::{
    build::{
        BuildInView, Failure, Fault, Kind, LineStart, LogStream, PendingReason, Record, RecordedEvent, State,
        StepState,
    },
    image::Status,
};

impl From<BuildInView> for wire::Build {
    fn from(view: BuildInView) -> Self {
        let BuildInView { build, pending, worker_offline } = view;
        Self {
            id: build.id.to_string(),
            image_id: build.image.to_string(),
            number: build.number,
            kind: wire::BuildKind::from(build.kind).into(),
            state: wire::BuildState::from(build.state).into(),
            attempt: build.attempt,
            failures: build.failures,
            requested_by: build.requester.subject,
            queue_time: Some(field::time(build.queued_at)),
            start_time: build.started_at.map(field::time),
            finish_time: build.finished_at.map(field::time),
            worker: build.worker.unwrap_or_default(),
            pending_reason: pending.map(|pending| wire::PendingReason::from(pending.reason).into()),
            queue_position: pending
                .map_or(0, |pending| i32::try_from(pending.queue_position).unwrap_or(i32::MAX)),
            cancel_requested: build.cancel_requested_at.is_some(),
            stop_confirmed: build.stop_confirmed && build.state == State::Cancelled,
            steps: Some(wire::StepCounts {
                total: build.steps.total,
                done: build.steps.done,
                cached: build.steps.cached,
            }),
            error: build.error.map(Into::into),
            log_bytes: build.log_bytes,
            log_truncated: build.log_truncated,
            last_sequence: build.last_sequence,
            config_revision: build.configuration_revision,
            reference: build.reference.to_string(),
            worker_offline,
            retry_time: build
                .not_before
                .filter(|_| pending.is_some_and(|pending| pending.reason == PendingReason::BackingOff))
                .map(field::time),
        }
    }
}

/// Converts a record from the history of a build of this kind.
pub(super) fn event(kind: Kind, record: Record) -> wire::BuildEvent {
    use wire::build_event::Event;
    let event = match record.event {
        RecordedEvent::State { state, message, cancel_requested } => Event::StateChange(wire::StateChange {
            state: wire::BuildState::from(state).into(),
            message,
            cancel_requested,
            image_status: wire::ImageStatus::from(Status::from_build(kind, state)).into(),
        }),
        RecordedEvent::Step { step, name, state, error } => Event::StepChange(wire::StepChange {
            step,
            name,
            state: wire::StepState::from(state).into(),
            error,
        }),
        RecordedEvent::Line { step, stream, text, start } => Event::LogLine(wire::LogLine {
            step,
            stream: wire::LogStream::from(stream).into(),
            text,
            start: wire::LineStart::from(start).into(),
        }),
        RecordedEvent::Gap { lines, message } => Event::LogGap(wire::LogGap { lines, message }),
    };
    wire::BuildEvent {
        sequence: record.sequence,
        time: Some(field::time(record.time)),
        attempt: record.attempt,
        event: Some(event),
    }
}

impl From<Kind> for wire::BuildKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Build => Self::Build,
            Kind::Pull => Self::Pull,
            Kind::Snapshot => Self::Snapshot,
        }
    }
}

impl From<State> for wire::BuildState {
    fn from(state: State) -> Self {
        match state {
            State::Queued => Self::Queued,
            State::Claimed => Self::Claimed,
            State::Running => Self::Running,
            State::Publishing => Self::Publishing,
            State::Succeeded => Self::Succeeded,
            State::Failed => Self::Failed,
            State::Cancelled => Self::Cancelled,
        }
    }
}

impl From<PendingReason> for wire::PendingReason {
    fn from(reason: PendingReason) -> Self {
        match reason {
            PendingReason::NoWorkerOnline => Self::NoWorkerOnline,
            PendingReason::NoSuitableWorker => Self::NoSuitableWorker,
            PendingReason::WorkersUnsupported => Self::WorkersUnsupported,
            PendingReason::WorkersDraining => Self::WorkersDraining,
            PendingReason::AllSlotsTaken => Self::AllSlotsTaken,
            PendingReason::Dispatching => Self::Dispatching,
            PendingReason::BackingOff => Self::BackingOff,
            PendingReason::BaseElsewhere => Self::BaseElsewhere,
            PendingReason::RunningLimit => Self::RunningLimit,
        }
    }
}

impl From<StepState> for wire::StepState {
    fn from(state: StepState) -> Self {
        match state {
            StepState::Pending => Self::Pending,
            StepState::Started => Self::Started,
            StepState::Done => Self::Done,
            StepState::Cached => Self::Cached,
            StepState::Failed => Self::Failed,
        }
    }
}

impl From<LogStream> for wire::LogStream {
    fn from(stream: LogStream) -> Self {
        match stream {
            LogStream::Stdout => Self::Stdout,
            LogStream::Stderr => Self::Stderr,
        }
    }
}

impl From<LineStart> for wire::LineStart {
    fn from(start: LineStart) -> Self {
        match start {
            LineStart::NewLine => Self::NewLine,
            LineStart::Continuation => Self::Continuation,
            LineStart::Replacement => Self::Replacement,
        }
    }
}

impl From<Failure> for wire::BuildError {
    fn from(failure: Failure) -> Self {
        let kind = match failure.fault {
            Fault::User => wire::BuildErrorKind::User,
            Fault::Timeout => wire::BuildErrorKind::Timeout,
            Fault::Infrastructure => wire::BuildErrorKind::Infrastructure,
        };
        Self {
            kind: kind.into(),
            step: failure.step,
            message: failure.message,
            last_lines: failure.last_lines,
        }
    }
}
