//! The one table of a build's transitions: which event leads from which state to which.
//!
//! Pure: no clock, no store. What is not in the table is refused.

use serde::{Deserialize, Serialize};

use super::{Kind, State};

/// What can happen to a build.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A worker takes it from the queue.
    Claimed,
    /// The worker cannot take it, or did not accept it in time.
    HandedBack,
    /// The worker has begun.
    Started,
    /// The engine has built it; the worker asks whether it may set the tag.
    Built,
    /// The artifact is verified.
    Succeeded,
    /// The worker reports that it failed.
    Failed(Fault),
    /// The attempt is gone: its lease ran out, or its worker came back without it.
    Lost,
    /// A client wants it stopped.
    CancelRequested,
    /// The worker has stopped the work.
    Stopped,
    /// The worker answers, but has not stopped the work in time.
    StopOverdue,
    /// No worker has taken it in time.
    QueueTimedOut,
}

#[cfg(any(test, feature = "simulation"))]
impl Event {
    pub(crate) const ALL: [Self; 13] = [
        Self::Claimed,
        Self::HandedBack,
        Self::Started,
        Self::Built,
        Self::Succeeded,
        Self::Failed(Fault::User),
        Self::Failed(Fault::Timeout),
        Self::Failed(Fault::Infrastructure),
        Self::Lost,
        Self::CancelRequested,
        Self::Stopped,
        Self::StopOverdue,
        Self::QueueTimedOut,
    ];
}

/// Who has to act on a failure.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Fault {
    /// The Dockerfile or the configuration.
    User,
    /// Over its time.
    Timeout,
    /// The engine or the worker: worth another attempt.
    Infrastructure,
}

/// Where a transition leads.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Into a state.
    To(State),
    /// Back into the queue at no cost.
    Requeue,
    /// Back into the queue, one failure nearer to the limit.
    RequeueAfterFailure,
    /// The state stays; the worker is asked to stop.
    RequestStop,
}

/// Decides what `event` does to a build of this kind in this state; `None` when it is refused.
///
/// `cancelling`: a cancel was requested before. `last_failure`: one more failure is one too many.
pub(crate) fn transition(
    kind: Kind,
    state: State,
    event: Event,
    cancelling: bool,
    last_failure: bool,
) -> Option<Next> {
    use State::{Cancelled, Claimed, Failed, Publishing, Queued, Running, Succeeded};

    let next = match (event, state) {
        (Event::Claimed, Queued) => Next::To(Claimed),
        (Event::HandedBack, Claimed | Running) if cancelling => Next::To(Cancelled),
        (Event::HandedBack, Claimed | Running) => Next::Requeue,
        (Event::Started, Claimed) => Next::To(Running),
        (Event::Built, Running) if kind == Kind::Build && !cancelling => Next::To(Publishing),
        (Event::Succeeded, Publishing) => Next::To(Succeeded),
        (Event::Succeeded, Running) if kind != Kind::Build => Next::To(Succeeded),
        (Event::Failed(Fault::User | Fault::Timeout), Claimed | Running | Publishing) => Next::To(Failed),
        (Event::Failed(Fault::Infrastructure) | Event::Lost, Claimed | Running | Publishing) => {
            if cancelling {
                Next::To(Cancelled)
            } else if last_failure {
                Next::To(Failed)
            } else {
                Next::RequeueAfterFailure
            }
        }
        (Event::CancelRequested, Queued) => Next::To(Cancelled),
        (Event::CancelRequested, Claimed | Running | Publishing) if kind != Kind::Snapshot => {
            Next::RequestStop
        }
        (Event::Stopped | Event::StopOverdue, Claimed | Running | Publishing) if cancelling => {
            Next::To(Cancelled)
        }
        (Event::QueueTimedOut, Queued) => Next::To(Failed),
        _ => return None,
    };
    Some(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 3] = [Kind::Build, Kind::Pull, Kind::Snapshot];
    const STATES: [State; 7] = [
        State::Queued,
        State::Claimed,
        State::Running,
        State::Publishing,
        State::Succeeded,
        State::Failed,
        State::Cancelled,
    ];

    /// One letter an outcome, one column a state in the order of `STATES`:
    /// `c`laimed, `r`unning, `p`ublishing, `S`ucceeded, `F`ailed, `X` cancelled, `q` queued again, `Q` the same with a
    /// failure, `s` stop requested, `.` refused.
    fn row(kind: Kind, event: Event, cancelling: bool, last_failure: bool) -> String {
        STATES
            .map(|state| match transition(kind, state, event, cancelling, last_failure) {
                None => '.',
                Some(Next::To(State::Queued)) => '!',
                Some(Next::To(State::Claimed)) => 'c',
                Some(Next::To(State::Running)) => 'r',
                Some(Next::To(State::Publishing)) => 'p',
                Some(Next::To(State::Succeeded)) => 'S',
                Some(Next::To(State::Failed)) => 'F',
                Some(Next::To(State::Cancelled)) => 'X',
                Some(Next::Requeue) => 'q',
                Some(Next::RequeueAfterFailure) => 'Q',
                Some(Next::RequestStop) => 's',
            })
            .iter()
            .collect()
    }

    /// (event, plain, on the last failure, after a cancel was requested), as in the contract.
    const BUILD: [(&str, &str, &str, &str); 13] = [
        ("Claimed", "c......", "c......", "c......"),
        ("HandedBack", ".qq....", ".qq....", ".XX...."),
        ("Started", ".r.....", ".r.....", ".r....."),
        ("Built", "..p....", "..p....", "......."),
        ("Succeeded", "...S...", "...S...", "...S..."),
        ("Failed(User)", ".FFF...", ".FFF...", ".FFF..."),
        ("Failed(Timeout)", ".FFF...", ".FFF...", ".FFF..."),
        ("Failed(Infrastructure)", ".QQQ...", ".FFF...", ".XXX..."),
        ("Lost", ".QQQ...", ".FFF...", ".XXX..."),
        ("CancelRequested", "Xsss...", "Xsss...", "Xsss..."),
        ("Stopped", ".......", ".......", ".XXX..."),
        ("StopOverdue", ".......", ".......", ".XXX..."),
        ("QueueTimedOut", "F......", "F......", "F......"),
    ];

    /// Where pulls and snapshots differ from builds.
    fn expected(kind: Kind, event: &str, of_build: &str) -> String {
        match (kind, event) {
            (Kind::Build, _) => of_build,
            (Kind::Pull | Kind::Snapshot, "Built") => ".......",
            (Kind::Pull | Kind::Snapshot, "Succeeded") => "..SS...",
            (Kind::Snapshot, "CancelRequested") => "X......",
            (Kind::Pull | Kind::Snapshot, _) => of_build,
        }
        .to_owned()
    }

    #[test]
    fn every_kind_state_and_event_leads_where_the_contract_says() {
        for kind in KINDS {
            for (event, (name, plain, last, cancelling)) in Event::ALL.into_iter().zip(BUILD) {
                assert_eq!(format!("{event:?}"), name);
                let found = [
                    row(kind, event, false, false),
                    row(kind, event, false, true),
                    row(kind, event, true, false),
                    row(kind, event, true, true),
                ];
                let wanted = [plain, last, cancelling, cancelling].map(|row| expected(kind, name, row));
                assert_eq!(found, wanted, "{kind:?} {name}");
            }
        }
    }
}
