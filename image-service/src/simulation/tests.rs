//! Agreement of the in-memory tables with the databases: the same random history on both, operation by
//! operation.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use uuid::Uuid;

use super::Tables;
use crate::{
    access::{Pools, Principal, Role},
    build::{Build, BuildId, Failure, Fault, LineStart, LogStream, PendingReason, RecordedEvent},
    dispatch::{
        Attempt, Connected, Decision, DispatchStore as _, Event, Hello, PROTOCOL_VERSION, Policy, Report,
        Reported, WorkerEvent,
    },
    error::{Error, Violations},
    image::{
        Capability, Configuration, ConfigurationDraft, Dockerfile, ImageDraft, ImageId, RepositoryPrefixes,
        Source,
    },
    request::Request,
    store::{Store, execute},
    timestamp::Timestamp,
};

const WORKERS: [&str; 3] = ["w1", "w2", "w3"];

/// A store and tables that go through the same history.
struct Both {
    random: fastrand::Rng,
    clock: Arc<AtomicI64>,
    store: Store,
    tables: Tables,
    builds: Vec<(ImageId, BuildId)>,
    sessions: Vec<(usize, Uuid)>,
    /// Number of builds that prefer a worker.
    preferences: usize,
}

fn configuration(worker: &str) -> ConfigurationDraft {
    let dockerfile = Dockerfile { text: "FROM scratch".to_owned(), ..Dockerfile::default() };
    let mut draft = ConfigurationDraft::from_source(Source::Dockerfile(dockerfile));
    draft.worker = worker.to_owned();
    draft
}

fn request(subject: &str) -> Request {
    let caller = Principal::new(
        subject.to_owned(),
        vec![Role::Builder, Role::Admin],
        Timestamp::from_micros(i64::MAX),
    );
    Request::plain(caller)
}

/// Formats the outcome of an operation for comparison.
fn outcome<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    format!("{result:?}")
}

impl Both {
    async fn step(&mut self) -> (String, String) {
        self.clock.fetch_add(self.random.i64(0..4_000_000), Ordering::Relaxed);
        let now = Timestamp::from_micros(self.clock.load(Ordering::Relaxed));
        match self.random.u8(0..20) {
            0..2 => self.create(now).await,
            2 => self.rebuild(now).await,
            3 | 4 => self.open_session(now).await,
            5 => self.close_session().await,
            6..10 => self.claim(now).await,
            10 | 11 => self.heartbeat(now).await,
            12 => {
                let (worker, drained) = (WORKERS[self.random.usize(0..3)], self.random.bool());
                let stored = self
                    .store
                    .transact(&request("root"), async |write| write.drain(worker, drained).await)
                    .await
                    .map(|_| ());
                (outcome(stored), outcome(self.tables.drain_worker(worker, drained)))
            }
            13 => {
                self.tables.renew_leases(now);
                (outcome(self.store.renew_leases().await), outcome(Ok(())))
            }
            14 => {
                let mut stored = self.store.overdue().await;
                if let Ok(stored) = &mut stored {
                    stored.sort_by_key(|build| build.id);
                }
                (outcome(stored), outcome(Ok(self.tables.overdue(now))))
            }
            15 => (
                outcome(
                    self.store.waiting_too_long().await.map(|found| found.into_iter().collect::<Vec<_>>()),
                ),
                outcome(Ok(self.tables.waiting_too_long(now))),
            ),
            16 if self.random.u8(0..4) == 0 => self.delete(now).await,
            _ => self.decide(now).await,
        }
    }

    async fn create(&mut self, now: Timestamp) -> (String, String) {
        let subject = ["alice", "bob"][self.random.usize(0..2)];
        let pin = if self.random.u8(0..4) == 0 { WORKERS[self.random.usize(0..3)] } else { "" };
        let draft = ImageDraft {
            name: format!("Image {}", self.builds.len()),
            configuration: Some(configuration(pin)),
            description: String::new(),
            repository: String::new(),
            tag: String::new(),
            template: false,
            enabled: None,
        };
        let prefixes = RepositoryPrefixes::parse(&["trailer.invalid/".to_owned()]).expect("a prefix");
        let new = draft.check(&prefixes.namespace("alice", false), Violations::default()).expect("a draft");
        let (created, _) = self
            .store
            .transact(&request(subject), async |write| write.create(&new).await)
            .await
            .expect("created");
        let stored = created.1.expect("its first build");
        // The build as the database made it, before anything was counted.
        let mut build = Build { round: 0, last_sequence: 0, ..stored.build.clone() };
        assert_eq!(build.queued_at, now);
        build.id = stored.build.id;
        self.builds.push((build.image, build.id));
        let id = build.id;
        self.tables.enqueue(build, Configuration::parse(configuration(pin), "", &mut Violations::default()));
        (format!("{:?}", stored.build), format!("{:?}", self.tables.build(id).expect("it is there")))
    }

    /// Builds an image again, which then prefers the worker of its last artifact.
    async fn rebuild(&mut self, now: Timestamp) -> (String, String) {
        let Some((image, _)) = self.random.choice(self.builds.clone()) else { return Default::default() };
        let of_image = self.builds.iter().filter(|(other, _)| *other == image);
        let of_image: Vec<&Build> = of_image.filter_map(|(_, id)| self.tables.build(*id)).collect();
        if of_image.iter().any(|build| !build.state.is_final()) {
            return Default::default();
        }
        let artifact = of_image.iter().rev().find_map(|build| self.tables.artifact(build.id));
        let pin = of_image.last().map(|build| build.requirements.worker.clone()).unwrap_or_default();
        let preferred = artifact.filter(|_| pin.is_empty()).map(|artifact| artifact.worker.clone());
        let (built, _) = self
            .store
            .transact(&request("alice"), async |write| write.build(image, None).await)
            .await
            .expect("queued");
        let stored = built.1.expect("its build").build;
        assert_eq!((stored.queued_at, &stored.preferred_worker), (now, &preferred));
        self.preferences += usize::from(preferred.is_some());
        self.builds.push((image, stored.id));
        let build = Build { round: 0, last_sequence: 0, ..stored.clone() };
        let configuration = Configuration::parse(configuration(&pin), "", &mut Violations::default());
        self.tables.enqueue(build, configuration);
        (format!("{stored:?}"), format!("{:?}", self.tables.build(stored.id).expect("it is there")))
    }

    async fn delete(&mut self, now: Timestamp) -> (String, String) {
        let Some((image, _)) = self.random.choice(self.builds.clone()) else { return Default::default() };
        let (of_image, others): (Vec<_>, Vec<_>) =
            self.builds.drain(..).partition(|(other, _)| *other == image);
        self.builds = others;
        let Some(((_, build), earlier)) = of_image.split_last() else { return Default::default() };
        for (_, earlier) in earlier {
            let _ = self.tables.delete(*earlier, now);
        }
        let stored =
            self.store.transact(&request("root"), async |write| write.delete(image, None).await).await;
        let (deleted, _) = self.tables.delete(*build, now);
        let messages = deleted.map(|decided| decided.map_or_else(Vec::new, |decision| decision.messages));
        (outcome(stored.map(|(_, effects)| effects.messages)), outcome(messages))
    }

    async fn open_session(&mut self, now: Timestamp) -> (String, String) {
        let worker = self.random.usize(0..3);
        let hello = Hello {
            name: WORKERS[worker].to_owned(),
            instance: format!("process {}", self.random.u8(0..2)),
            labels: Default::default(),
            slots: 2,
            engine_version: String::new(),
            capabilities: BTreeSet::from([Capability::Dockerfile]),
            pools: Pools::default(),
            holds: Vec::new(),
            protocol_version: PROTOCOL_VERSION,
            unsupported_reason: if self.random.u8(0..6) == 0 { "too old".to_owned() } else { String::new() },
            withheld: Vec::new(),
            engine_warning: String::new(),
        };
        if self.random.u8(0..10) == 0 {
            let refused = Hello { unsupported_reason: "it speaks another".to_owned(), ..hello };
            return (
                outcome(self.store.refuse_worker(&refused).await),
                outcome(self.tables.refuse_worker(&refused, now)),
            );
        }
        let session = Uuid::from_u128(self.random.u128(..));
        self.sessions.push((worker, session));
        (
            outcome(self.store.open_session(&hello, session).await),
            outcome(self.tables.open_session(&hello, session, now)),
        )
    }

    fn session(&mut self) -> (&'static str, Uuid) {
        let latest = self.sessions.len().saturating_sub(6);
        let sessions = self.sessions.get(latest..).unwrap_or_default().to_vec();
        let (worker, session) = self.random.choice(sessions).unwrap_or((0, Uuid::nil()));
        (WORKERS[worker], session)
    }

    async fn close_session(&mut self) -> (String, String) {
        let (worker, session) = self.session();
        self.tables.close_session(worker, session);
        (outcome(self.store.close_session(worker, session).await), outcome(Ok(())))
    }

    async fn claim(&mut self, now: Timestamp) -> (String, String) {
        let mut workers: Vec<Connected> = Vec::new();
        for _ in 0..=self.random.u8(0..3) {
            let (name, session) = self.session();
            if workers.iter().all(|worker| worker.name != name) {
                workers.push(Connected { name: name.to_owned(), session });
            }
        }
        let builds = |(decisions, _): (Vec<Decision>, _)| {
            decisions.into_iter().map(|decision| decision.build).collect::<Vec<_>>()
        };
        (
            outcome(self.store.claim(&workers).await.map(builds)),
            outcome(self.tables.claim(&workers, now).map(builds)),
        )
    }

    async fn heartbeat(&mut self, now: Timestamp) -> (String, String) {
        let ((worker, session), draining) = (self.session(), self.random.u8(0..4) == 0);
        let ids = |held: Vec<Build>| held.into_iter().map(|build| build.id).collect::<BTreeSet<_>>();
        (
            outcome(self.store.heartbeat(worker, session, draining).await.map(ids)),
            outcome(self.tables.heartbeat(worker, session, draining, now).map(ids)),
        )
    }

    /// Decides some events: together in the store, and one after the other in the tables.
    async fn decide(&mut self, now: Timestamp) -> (String, String) {
        let (mut events, mut modelled) = (Vec::new(), Vec::new());
        for _ in 0..=self.random.u8(0..4) {
            let Some((_, id)) = self.random.choice(self.builds.clone()) else { return Default::default() };
            let Some(build) = self.tables.build(id).cloned() else { continue };
            let event = self.event(&build, now);
            modelled.push(self.tables.decide(id, &event, now).0);
            events.push((id, Arc::new(event)));
        }
        if events.is_empty() {
            return Default::default();
        }
        let stored = self.store.decide(&events).await.map(|(decided, _)| decided);
        (outcome(stored), outcome(Ok(modelled)))
    }

    fn event(&mut self, build: &Build, now: Timestamp) -> Event {
        match self.random.u8(0..12) {
            0 => Event::Cancel { by: "alice".to_owned() },
            1 => Event::Abandoned { attempt: build.attempt },
            2 => Event::Tick { worker_online: self.random.bool() },
            3 => Event::Waited { reason: PendingReason::AllSlotsTaken },
            4 | 5 => {
                let artifact = WorkerEvent::Succeeded {
                    image_id: format!("sha256:{}", build.id),
                    size_bytes: 1,
                    repo_digest: None,
                    config_digest: None,
                };
                let steps = [WorkerEvent::Started, WorkerEvent::Built, artifact];
                let left = steps.into_iter().skip(usize::try_from(build.report_sequence).unwrap_or(0));
                let events = left.map(|event| Reported { time: now, event }).collect();
                let attempt = Attempt { build: build.id, number: build.attempt };
                let report = Report { attempt, first_sequence: build.report_sequence + 1, events };
                Event::Report { worker: build.worker.clone().unwrap_or_default(), report }
            }
            _ => {
                let mut events = Vec::new();
                for _ in 0..=self.random.u8(0..3) {
                    events.push(Reported { time: now, event: self.worker_event() });
                }
                let report = Report {
                    attempt: Attempt { build: build.id, number: build.attempt },
                    first_sequence: (build.report_sequence + self.random.i64(0..2)).max(1),
                    events,
                };
                Event::Report { worker: build.worker.clone().unwrap_or_default(), report }
            }
        }
    }

    fn worker_event(&mut self) -> WorkerEvent {
        let failed = |fault| {
            let (step, message) = ("RUN".to_owned(), "it broke".to_owned());
            WorkerEvent::Failed(Failure { fault, step, message, last_lines: vec!["last".to_owned()] })
        };
        match self.random.u8(0..9) {
            0..3 => WorkerEvent::Started,
            3 => WorkerEvent::Happened(RecordedEvent::Line {
                step: 0,
                stream: LogStream::Stdout,
                text: "a".to_owned(),
                start: LineStart::NewLine,
            }),
            4 => WorkerEvent::Built,
            5 => WorkerEvent::Succeeded {
                image_id: "sha256:0".to_owned(),
                size_bytes: 1,
                repo_digest: None,
                config_digest: None,
            },
            6 => failed(Fault::User),
            7 => failed(Fault::Infrastructure),
            _ => WorkerEvent::Stopped { confirmed: true },
        }
    }
}

/// Runs a random history, and returns the number of builds that preferred a worker.
async fn follow(url: Option<&str>, seed: u64) -> usize {
    let policy = Policy { offline_after: Duration::from_secs(20), ..Policy::OF_TESTS };
    let directory = tempfile::tempdir().expect("a directory");
    let clock = Arc::new(AtomicI64::new(1_800_000_000_000_000));
    let store = Store::open(directory.path(), url, policy).await.expect("a database");
    let tables = Tables::new(policy);
    let random = fastrand::Rng::with_seed(seed);
    let store = store.with_clock(Arc::clone(&clock));
    let mut both =
        Both { random, clock, store, tables, builds: Vec::new(), sessions: Vec::new(), preferences: 0 };
    for step in 0..300 {
        let (stored, modelled) = both.step().await;
        assert_eq!(stored, modelled, "seed {seed}, step {step}");
        let ids = both.builds.iter().map(|(_, id)| *id);
        let held = both.store.builds_by_id(ids).await.expect("read");
        for (_, id) in &both.builds {
            assert_eq!(held.get(id), both.tables.build(*id), "seed {seed}, step {step}");
        }
    }
    both.store.close().await.expect("closed");
    both.preferences
}

#[tokio::test]
async fn random_histories_agree_with_sqlite() {
    let mut preferences = 0;
    for seed in 1..=4 {
        preferences += follow(None, seed).await;
    }
    assert!(preferences > 0);
}

#[tokio::test]
async fn random_histories_agree_with_postgres() {
    let Ok(url) = std::env::var("TRAILER_TEST_POSTGRES_URL") else {
        return;
    };
    for seed in 1..=4 {
        let name = format!("agreement_{}", Uuid::new_v4().simple());
        let (on_server, database) = of_database(&url, &name);
        execute(&on_server, &format!("CREATE DATABASE {name}")).await.expect("made");
        follow(Some(&database), seed).await;
        execute(&on_server, &format!("DROP DATABASE {name}")).await.expect("dropped");
    }
}

/// Returns the URL of the server, and the URL of one of its databases.
fn of_database(url: &str, name: &str) -> (String, String) {
    (url.to_owned(), url.replacen("/postgres?", &format!("/{name}?"), 1))
}
