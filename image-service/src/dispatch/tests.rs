//! Invariants that hold for a build, whatever happens to it and in whatever order.

use std::time::Duration;

use super::*;
use crate::{
    access::Identity,
    build::{Failure, Fault, Job, Kind, LineStart, LogStream, RecordedEvent, State},
    image::{ConfigurationDraft, Dockerfile, ImageId, Reference, Source},
};

const POLICY: Policy = Policy::OF_TESTS;

/// Deterministic pseudo-random numbers (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: i32) -> i32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        i32::try_from(self.0 % u64::from(limit.unsigned_abs())).expect("it is below an i32")
    }

    fn worker_event(&mut self) -> WorkerEvent {
        let failed = |fault| {
            WorkerEvent::Failed(Failure {
                fault,
                step: String::new(),
                message: "it broke".to_owned(),
                last_lines: Vec::new(),
            })
        };
        match self.below(9) {
            0 => WorkerEvent::Started,
            1 | 2 => WorkerEvent::Happened(RecordedEvent::Line {
                step: 0,
                stream: LogStream::Stdout,
                text: "line".to_owned(),
                start: LineStart::NewLine,
            }),
            3 => WorkerEvent::Built,
            4 => WorkerEvent::Succeeded {
                image_id: "sha256:0".to_owned(),
                size_bytes: 1,
                repo_digest: None,
                config_digest: None,
            },
            5 => failed(Fault::User),
            6 => failed(Fault::Infrastructure),
            7 => WorkerEvent::HandedBack { reason: "no room".to_owned(), base: None },
            _ => WorkerEvent::Stopped { confirmed: self.below(2) == 0 },
        }
    }

    fn event(&mut self, build: &Build, now: Timestamp) -> Event {
        let worker = format!("w{}", self.below(2));
        match self.below(10) {
            0..3 => Event::Claim { worker },
            3 if self.below(4) == 0 => Event::Waited { reason: PendingReason::AllSlotsTaken },
            3 => Event::Cancel { by: "alice".to_owned() },
            4 => Event::Abandoned { attempt: build.attempt - self.below(2) },
            5 => Event::Tick { worker_online: self.below(2) == 0 },
            _ => {
                let attempt = Attempt { build: build.id, number: build.attempt - self.below(2) };
                let first_sequence = (build.report_sequence + 1 - i64::from(self.below(2))).max(1);
                let events =
                    (0..=self.below(3)).map(|_| Reported { time: now, event: self.worker_event() }).collect();
                Event::Report { worker, report: Report { attempt, first_sequence, events } }
            }
        }
    }
}

fn queued() -> Build {
    let reference = Reference::new("trailer/a", "").expect("a reference");
    let requirements = configuration().requirements();
    let job = Job {
        kind: Kind::Build,
        creator: "alice".to_owned(),
        configuration_revision: 1,
        reference,
        requirements,
        preferred_worker: None,
        workspace: None,
    };
    Build::queued(ImageId::new(), 1, alice(), job, Timestamp::from_micros(0))
}

fn configuration() -> Arc<Configuration> {
    let mut violations = crate::error::Violations::default();
    let dockerfile = Dockerfile { text: "FROM scratch".to_owned(), ..Dockerfile::default() };
    let draft = ConfigurationDraft::from_source(Source::Dockerfile(dockerfile));
    Arc::new(Configuration::parse(draft, "", &mut violations))
}

#[test]
fn no_history_breaks_what_must_hold() {
    let configuration = configuration();
    let mut seen = std::collections::BTreeMap::new();
    for seed in 1..=2_000 {
        let mut random = Random(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let mut build = queued();
        let mut now = Timestamp::from_micros(0);
        let mut next_sequence = 1;
        for _ in 0..40 {
            now = now.after(Duration::from_secs(random.below(20).unsigned_abs().into()));
            let event = random.event(&build, now);
            let rows = Rows { build: build.clone(), configuration: Some(Arc::clone(&configuration)) };
            let Ok(decision) = decide(rows, &event, &POLICY, now) else {
                assert!(matches!(event, Event::Cancel { .. }), "only clients are refused");
                continue;
            };
            for record in &decision.records {
                assert_eq!(record.sequence, next_sequence, "seed {seed}: records have no gap");
                next_sequence += 1;
            }
            let granted =
                decision.messages.iter().any(|(_, message)| matches!(message, ToWorker::PublishGrant(_)));
            let Some(after) = decision.build else {
                assert!(decision.records.is_empty() && decision.artifact.is_none() && !granted);
                continue;
            };
            assert!(!build.state.is_final(), "seed {seed}: {event:?} changed {:?}", build.state);
            let attempts = i32::from(matches!(event, Event::Claim { .. }));
            assert_eq!(after.attempt, build.attempt + attempts, "seed {seed}: only a claim makes an attempt");
            assert!(after.failures >= build.failures && after.failures <= POLICY.max_failures);
            assert_eq!(
                after.lease_expires_at.is_some(),
                after.state.is_held(),
                "seed {seed}: {:?}",
                after.state
            );
            assert_eq!(after.finished_at.is_some(), after.state.is_final());
            assert_eq!(decision.artifact.is_some(), after.state == State::Succeeded);
            assert!(!granted || after.cancel_requested_at.is_none(), "seed {seed}: a grant after a cancel");
            assert_eq!(after.error.is_some(), after.state == State::Failed);
            assert!(after.not_before.is_none() || after.state == State::Queued, "seed {seed}");
            let is_claimed = matches!(event, Event::Claim { .. });
            assert!(!is_claimed || !build.is_backing_off(now), "seed {seed}: claimed while it backed off");
            if let Event::Report { worker, report } = &event {
                let fenced = report.attempt.number != build.attempt || build.worker.as_ref() != Some(worker);
                assert!(!fenced, "seed {seed}: a fenced report changed the build");
            }
            *seen.entry(format!("{:?}", after.state)).or_insert(0) += 1;
            build = after;
        }
    }
    assert_eq!(seen.len(), 7, "every state was come into: {seen:?}");
}

#[test]
fn a_cancel_that_is_not_confirmed_ends_at_its_deadline_or_with_the_lease() {
    for (worker_online, seconds, ends) in
        [(true, 9, false), (true, 11, true), (false, 11, false), (false, 46, true)]
    {
        let mut build = queued();
        for event in [Event::Claim { worker: "w".to_owned() }, Event::Cancel { by: "alice".to_owned() }] {
            let rows = Rows { build: build.clone(), configuration: Some(configuration()) };
            let decision = decide(rows, &event, &POLICY, Timestamp::from_micros(0)).expect("allowed");
            build = decision.build.expect("it changes");
        }
        let now = Timestamp::from_micros(0).after(Duration::from_secs(seconds));
        let rows = Rows { build, configuration: None };
        let decision = decide(rows, &Event::Tick { worker_online }, &POLICY, now).expect("allowed");
        let ended = decision.build.map(|build| (build.state, build.stop_confirmed));
        assert_eq!(
            ended,
            ends.then_some((State::Cancelled, false)),
            "online {worker_online} after {seconds} s"
        );
    }
}

/// Applies events to a build, each at its time in seconds, and returns the build.
fn after(mut build: Build, policy: &Policy, events: &[(u64, Event)]) -> Build {
    for (seconds, event) in events {
        let now = Timestamp::from_micros(0).after(Duration::from_secs(*seconds));
        let rows = Rows { build: build.clone(), configuration: Some(configuration()) };
        build = decide(rows, event, policy, now).expect("allowed").build.unwrap_or(build);
    }
    build
}

fn report(build: &Build, number: i32, event: WorkerEvent) -> Event {
    let events = [WorkerEvent::Started, event];
    let events = events.map(|event| Reported { time: Timestamp::from_micros(0), event }).into();
    let attempt = Attempt { build: build.id, number };
    Event::Report { worker: "w".to_owned(), report: Report { attempt, first_sequence: 1, events } }
}

#[test]
fn only_a_reported_failure_of_the_infrastructure_backs_off() {
    let failed = |fault| {
        let (step, message) = (String::new(), "it broke".to_owned());
        WorkerEvent::Failed(Failure { fault, step, message, last_lines: Vec::new() })
    };
    let claim = Event::Claim { worker: "w".to_owned() };
    let build = queued();
    let handed_back = WorkerEvent::HandedBack { reason: "no room".to_owned(), base: None };
    let gap = WorkerEvent::Happened(RecordedEvent::Gap { lines: 0, message: String::new() });
    for (what, events, state, seconds) in [
        ("reported", vec![report(&build, 1, failed(Fault::Infrastructure))], State::Queued, Some(1)),
        ("handed back", vec![report(&build, 1, handed_back)], State::Queued, None),
        ("given up", vec![report(&build, 1, gap), Event::Abandoned { attempt: 1 }], State::Queued, None),
        ("at fault", vec![report(&build, 1, failed(Fault::User))], State::Failed, None),
    ] {
        let events: Vec<_> = [claim.clone()].into_iter().chain(events).map(|event| (0, event)).collect();
        let ended = after(build.clone(), &POLICY, &events);
        let expected = seconds.map(|seconds| Timestamp::from_micros(seconds * 1_000_000));
        assert_eq!((ended.state, ended.not_before), (state, expected), "{what}");
    }

    let broken = after(
        build.clone(),
        &POLICY,
        &[(0, claim.clone()), (0, report(&build, 1, failed(Fault::Infrastructure)))],
    );
    assert_eq!(
        after(broken.clone(), &POLICY, &[(0, claim.clone())]),
        broken,
        "it is not claimed while it waits"
    );
    let again = after(broken, &POLICY, &[(1, claim.clone())]);
    assert_eq!((again.state, again.attempt, again.not_before), (State::Claimed, 2, None));
    let at_once = Policy { retry_backoff: Duration::ZERO, ..POLICY };
    let broken =
        after(build.clone(), &at_once, &[(0, claim), (0, report(&build, 1, failed(Fault::Infrastructure)))]);
    assert_eq!(broken.not_before, None);
}

#[test]
fn the_pause_doubles_up_to_its_limit() {
    let seconds = [1, 2, 3, 4, 5, 6, 7, 100].map(|failures| POLICY.backoff(failures).as_secs());
    assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30, 30]);
}

#[test]
fn a_clock_that_was_put_back_holds_nothing_up() {
    let mut build = queued();
    build.not_before = Some(Timestamp::from_micros(0).after(Duration::from_secs(100)));
    for (seconds, waits) in [(0, false), (69, false), (70, true), (99, true), (100, false)] {
        let now = Timestamp::from_micros(0).after(Duration::from_secs(seconds));
        assert_eq!(build.is_backing_off(now), waits, "at {seconds} s");
    }
}

fn alice() -> Identity {
    Identity::new("alice".to_owned(), Vec::new())
}
