//! Connection to image-service: sends heartbeats and reports, takes builds, and reconnects.

use std::{collections::VecDeque, time::Duration};

use futures_util::StreamExt;
use proto::dispatch::{
    Attempt, ConnectRequest, ConnectResponse, Heartbeat, Hello, Welcome,
    connect_request::Message as ToService, connect_response::Message as FromService,
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    job::StopReason,
    jobs::Held,
    outbox::EventsDiscarded,
    service_client::{Responses, ServiceError},
    worker::Worker,
};

const PROTOCOL_VERSION: i32 = 1;
/// Maximum number of messages that wait for the network, which a heartbeat waits behind.
///
/// Further reports wait in their outboxes.
const OUTBOUND: usize = 4;
/// Silence after which the connection counts as dead; three heartbeats, if that is longer.
const SILENCE: Duration = Duration::from_secs(10);
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// The reason why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    ServiceClient(#[from] ServiceError),
    #[error("the service closed the connection")]
    Closed,
    #[error("the service was silent")]
    Silent,
    #[error("the service did not start with a welcome")]
    NoWelcome,
    #[error("the service requests reports that it has acknowledged")]
    EventsDiscarded,
}

/// A connection after its welcome.
struct Session<'a> {
    worker: &'a Worker,
    requests: mpsc::Sender<ConnectRequest>,
    responses: Responses,
    heartbeat_interval: Duration,
    /// Unacknowledged heartbeats, and the times at which they were sent.
    sent: VecDeque<(i64, Instant)>,
    heartbeats: i64,
    last_message_at: Instant,
}

/// Connects once and serves until the connection ends.
///
/// Calls `welcomed` after the service has sent its welcome.
///
/// # Errors
///
/// Returns the reason why the connection ended.
pub(crate) async fn connect(worker: &Worker, welcomed: impl FnOnce()) -> Result<(), SessionError> {
    let (requests, stream) = mpsc::channel(OUTBOUND);
    let said_hello = Instant::now();
    requests.send(request(ToService::Hello(hello(worker)))).await.map_err(|_| SessionError::Closed)?;
    let mut responses =
        timeout(SILENCE, worker.service.connect(stream)).await.map_err(|_| SessionError::Silent)??;
    let first = timeout(SILENCE, responses.next())
        .await
        .map_err(|_| SessionError::Silent)?
        .ok_or(SessionError::Closed)??;
    let Some(FromService::Welcome(welcome)) = first.message else {
        return Err(SessionError::NoWelcome);
    };
    welcomed();
    worker.lease.set_times(duration(welcome.stop_after.as_ref()), duration(welcome.stop_timeout.as_ref()));
    if worker.holds().is_empty() {
        // Nothing is held yet, so every lease will begin later than this.
        worker.lease.extend(said_hello);
    }
    let mut session = Session {
        worker,
        requests,
        responses,
        heartbeat_interval: duration(welcome.heartbeat_interval.as_ref())
            .filter(|interval| !interval.is_zero())
            .unwrap_or(HEARTBEAT_INTERVAL),
        sent: VecDeque::new(),
        heartbeats: 0,
        last_message_at: said_hello,
    };
    worker.image_gc.set_catalogue(welcome.catalogue_id.clone());
    tracing::info!(session = welcome.session_id, "connected to image-service");
    worker.sweep().await;
    session.resume(welcome)?;
    session.serve().await
}

impl Session<'_> {
    /// Continues the attempts that the service keeps, and fences those that it drops.
    fn resume(&self, welcome: Welcome) -> Result<(), SessionError> {
        for attempt in welcome.drop {
            self.worker.fence(&attempt);
        }
        for kept in welcome.keep {
            let Some(held) = kept.attempt.as_ref().and_then(|attempt| self.worker.held(attempt)) else {
                continue;
            };
            held.outbox
                .rewind(kept.acknowledged_sequence)
                .map_err(|EventsDiscarded| self.give_up(kept.attempt.as_ref()))?;
            if kept.publish_granted {
                held.control.grant_publish();
            }
            if kept.cancel_requested {
                held.control.stop(StopReason::Cancelled);
            }
        }
        Ok(())
    }

    /// Gives up an attempt, and with it the connection.
    ///
    /// The next connection starts without the attempt, so that the service queues the build again.
    fn give_up(&self, attempt: Option<&Attempt>) -> SessionError {
        if let Some(attempt) = attempt {
            tracing::error!(
                build = attempt.build_id,
                "the service was restored from a backup; abandoning the build"
            );
            self.worker.give_up(attempt);
        }
        SessionError::EventsDiscarded
    }

    async fn serve(&mut self) -> Result<(), SessionError> {
        let mut heartbeat = interval(self.heartbeat_interval);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let requests = self.requests.clone();
        let mut may_have_reports = true;
        let mut beat_is_due = false;
        loop {
            tokio::select! {
                biased;
                response = self.responses.next() => {
                    let response = response.ok_or(SessionError::Closed)??;
                    self.last_message_at = Instant::now();
                    self.take(response)?;
                }
                _ = heartbeat.tick() => {
                    self.require_life()?;
                    beat_is_due = true;
                }
                () = self.worker.draining_begun() => beat_is_due = true,
                () = self.worker.reports_ready.notified() => may_have_reports = true,
                permit = requests.reserve(), if beat_is_due || may_have_reports => {
                    let permit = permit.map_err(|_| SessionError::Closed)?;
                    if beat_is_due {
                        beat_is_due = false;
                        permit.send(request(ToService::Heartbeat(self.next_heartbeat())));
                    } else if let Some(report) = self.worker.next_report() {
                        permit.send(request(ToService::Report(report)));
                    } else {
                        may_have_reports = false;
                    }
                }
            }
        }
    }

    fn take(&mut self, response: ConnectResponse) -> Result<(), SessionError> {
        match response.message {
            Some(FromService::HeartbeatAck(ack)) => {
                while let Some((number, at)) = self.sent.pop_front() {
                    if number == ack.number {
                        self.worker.lease.extend(at);
                        break;
                    }
                }
            }
            Some(FromService::Assignment(assignment)) => self.worker.accept(assignment),
            Some(FromService::ReportAck(ack)) => {
                if let Some(held) = self.held(ack.attempt.as_ref()) {
                    // A late acknowledgement of an earlier connection looks the same. The next welcome
                    // distinguishes them.
                    held.outbox
                        .acknowledge(ack.sequence)
                        .map_err(|EventsDiscarded| SessionError::EventsDiscarded)?;
                }
            }
            Some(FromService::PublishGrant(grant)) => {
                if let Some(held) = self.held(grant.attempt.as_ref()) {
                    held.control.grant_publish();
                }
            }
            Some(FromService::Cancel(cancel)) => {
                if let Some(held) = self.held(cancel.attempt.as_ref()) {
                    held.control.stop(StopReason::Cancelled);
                }
            }
            Some(FromService::Drop(drop)) => {
                if let Some(attempt) = &drop.attempt {
                    self.worker.fence(attempt);
                }
            }
            // A message of a later version, or a second welcome, which this version cannot act on.
            Some(FromService::Welcome(_)) | None => {
                tracing::warn!("received an unknown message")
            }
        }
        Ok(())
    }

    fn held(&self, attempt: Option<&Attempt>) -> Option<Held> {
        self.worker.held(attempt?)
    }

    fn require_life(&self) -> Result<(), SessionError> {
        let is_silent = self.last_message_at.elapsed() > SILENCE.max(self.heartbeat_interval * 3);
        if is_silent { Err(SessionError::Silent) } else { Ok(()) }
    }

    fn next_heartbeat(&mut self) -> Heartbeat {
        self.heartbeats += 1;
        self.sent.push_back((self.heartbeats, Instant::now()));
        Heartbeat { number: self.heartbeats, draining: !self.worker.takes_builds() }
    }
}

/// Abilities of every worker.
const CAPABILITIES: [&str; 6] = ["dockerfile", "archive", "pull", "push", "snapshot", "squash"];
/// Ability of a worker that has `git`.
const REMOTE: &str = "remote";

fn hello(worker: &Worker) -> Hello {
    let support = worker.readiness.support();
    let remote = worker.remotes.are_available().then_some(REMOTE);
    let capabilities = CAPABILITIES.into_iter().chain(remote);
    Hello {
        name: worker.config.name.clone(),
        labels: worker.config.label_map(),
        slots: i32::from(worker.config.slots),
        engine_version: worker.readiness.engine_info().borrow().version.clone(),
        protocol_version: PROTOCOL_VERSION,
        holds: worker.holds(),
        instance: worker.instance.clone(),
        capabilities: capabilities.map(str::to_owned).collect(),
        unsupported_reason: support.unsupported.unwrap_or_default(),
        withheld: support.withheld,
        engine_warning: worker.config.exceptions().warning().unwrap_or_default().to_owned(),
    }
}

fn request(message: ToService) -> ConnectRequest {
    ConnectRequest { message: Some(message) }
}

/// Converts a duration of the service to at most a day, because longer times might overflow in sums.
fn duration(wire: Option<&prost_types::Duration>) -> Option<Duration> {
    const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
    wire.and_then(|&wire| Duration::try_from(wire).ok()).map(|duration| duration.min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::duration;
    use crate::lease::Lease;

    #[test]
    fn a_service_may_say_any_time() {
        let longest = prost_types::Duration { seconds: i64::MAX, nanos: 999_999_999 };
        let time = duration(Some(&longest));
        let lease = Lease::new();
        lease.set_times(time, time);
        assert!(lease.end().elapsed().is_zero(), "it is over much later");
        assert!(lease.stop_timeout().checked_mul(10).is_some(), "several times as long can be waited for");
    }
}
