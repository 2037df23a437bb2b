//! The table of a build's transitions: the outcome of every event in every state.
//!
//! Pure: no clock and no store. A transition that is not in the table is refused.

use serde::{Deserialize, Serialize};

use super::{Kind, State};

/// An event in the life of a build.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Claim of the queued build by a worker.
    Claimed,
    /// Return of the build by a worker that cannot take it, or that did not accept it in time.
    HandedBack,
    /// Start of the work.
    Started,
    /// End of the engine's build; the worker asks for permission to set the tag.
    Built,
    /// Verification of the artifact.
    Succeeded,
    /// Failure that the worker reports.
    Failed(Fault),
    /// Loss of the attempt: its lease expired, or its worker came back without it.
    Lost,
    /// Request of a client to cancel the build.
    CancelRequested,
    /// Report of the worker that it has stopped the work.
    Stopped,
    /// Deadline for stopping the work missed by a worker that is online.
    StopOverdue,
    /// Maximum time in the queue exceeded.
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

/// Cause of a failure, which decides who has to act on it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Fault {
    /// The Dockerfile or the configuration.
    User,
    /// An exceeded time limit.
    Timeout,
    /// The engine or the worker; another attempt may succeed.
    Infrastructure,
}

/// Outcome of a transition.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Entry into a state.
    To(State),
    /// Return to the queue that does not count as a failure.
    Requeue,
    /// Return to the queue that counts as a failure.
    RequeueAfterFailure,
    /// Request to the worker to stop; the state does not change.
    RequestStop,
}

/// Returns the outcome of `event` for a build of this kind in this state, or `None` if it is refused.
///
/// `cancelling` is set if a cancellation was requested before, and `last_failure` if one more failure fails
/// the build.
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

    /// Formats the outcomes of an event, one letter per state in the order of `STATES`.
    ///
    /// The letters are `c`laimed, `r`unning, `p`ublishing, `S`ucceeded, `F`ailed, `X` cancelled, `q` queued
    /// again, `Q` queued again with a failure, `s` stop requested, `.` refused.
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

    /// Expected rows for builds, by event: normally, on the last failure, and after a cancellation was
    /// requested.
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

    /// Returns the expected row for a kind, given the row for builds.
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
