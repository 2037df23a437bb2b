//! Fifty builds on three workers, each with an engine of its own, while one of the seven processes after the other is killed.

use std::{
    collections::BTreeMap,
    env,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use fastrand::Rng;
use proto::images::{Build, BuildEvent, BuildState, ImageStatus, StepState, build_event::Event};
use tempfile::TempDir;
use tonic::Status;

use crate::{
    answers::{lines, states},
    client::{Client, image},
    engine::{BASE, Engine},
    stack::{LIMIT, SHORT_LEASE, Service, Worker, counted, counting, directory, ended, last_attempt, watch},
};

const BUILDS: usize = 50;
const WORKERS: usize = 3;
/// How many builds have to succeed: one whose engines are killed three times under it fails.
const SUCCEED: usize = 45;
/// How many processes there are, of which one after the other is killed until every build has ended, or as often as
/// `TRAILER_TEST_KILLS` says.
const PROCESSES: usize = 1 + 2 * WORKERS;
const MOST_KILLS: usize = 10 * PROCESSES;
const BETWEEN_KILLS: Duration = Duration::from_secs(5);
/// How many builds end meanwhile, however slow the machine is, unless it takes too long: else the kills decide what succeeds.
const ENDED_BETWEEN_KILLS: usize = 3;
const LONGEST_BETWEEN_KILLS: Duration = Duration::from_secs(20);
/// How long a process is away.
const AWAY: Duration = Duration::from_millis(500);
/// How long an image that nothing needs may stay.
const COLLECTED: Duration = Duration::from_secs(75);
/// How long all builds may take to end once nothing is killed any more.
const RECOVERY: Duration = Duration::from_secs(120);

/// The seven processes.
struct Seven {
    service: Service,
    workers: Vec<Worker>,
    engines: Vec<Engine>,
    _directory: TempDir,
}

/// What a build does, and prints.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Quick,
    Talking,
    Slow,
}

impl Seven {
    async fn start() -> anyhow::Result<Self> {
        let directory = directory()?;
        let service = Service::start(directory.path(), &SHORT_LEASE).await?;
        let (mut workers, mut engines) = (Vec::new(), Vec::new());
        for i in 0..WORKERS {
            let engine = Engine::start(directory.path(), &format!("e{i}")).await?;
            workers.push(Worker::start(
                directory.path(),
                &service,
                service.addr,
                &format!("w{i}"),
                &engine,
                2,
            )?);
            engines.push(engine);
        }
        Ok(Self { service, workers, engines, _directory: directory })
    }

    /// Kills a process by its number and starts it again.
    async fn kill(&mut self, number: usize) -> anyhow::Result<()> {
        match number {
            0 => self.service.kill()?,
            1..=WORKERS => self.workers[number - 1].kill()?,
            _ => self.engines[number - 1 - WORKERS].kill()?,
        }
        tokio::time::sleep(AWAY).await;
        match number {
            0 => {
                self.service.start_again()?;
                self.service.answers().await
            }
            1..=WORKERS => self.workers[number - 1].start_again(),
            _ => {
                let engine = &mut self.engines[number - 1 - WORKERS];
                engine.start_again().await?;
                engine.answers().await
            }
        }
    }

    /// The engine of a worker.
    fn engine_of(&self, worker: &str) -> Option<&Engine> {
        self.engines.get(worker.strip_prefix('w')?.parse::<usize>().ok()?)
    }
}

impl Kind {
    fn of(number: usize) -> Self {
        [Self::Quick, Self::Talking, Self::Slow][number % 3]
    }

    fn dockerfile(self) -> String {
        let unique = uuid::Uuid::new_v4().simple();
        match self {
            Self::Quick => format!("FROM {BASE}\nENV UNIQUE={unique}\nRUN echo 1"),
            Self::Talking => {
                format!("FROM {BASE}\nENV UNIQUE={unique}\nRUN /bin/busybox seq 1 1000; /bin/busybox sleep 4")
            }
            Self::Slow => counting(100, "0.1"),
        }
    }

    fn prints(self) -> Vec<String> {
        counted(match self {
            Self::Quick => 1,
            Self::Talking => 1_000,
            Self::Slow => 100,
        })
    }
}

/// The order in which processes are killed: every one of them once, and then again in another order.
fn order(seed: u64, kills: usize) -> Vec<usize> {
    let mut rng = Rng::with_seed(seed);
    let rounds = std::iter::repeat_with(|| {
        let mut round: Vec<usize> = (0..PROCESSES).collect();
        rng.shuffle(&mut round);
        round
    });
    rounds.flatten().take(kills).collect()
}

fn number<T: std::str::FromStr>(variable: &str) -> Option<T> {
    env::var(variable).ok()?.parse().ok()
}

/// An answer, whenever there is one.
async fn patiently<T, F>(call: impl Fn() -> F) -> anyhow::Result<T>
where
    F: Future<Output = Result<T, Status>>,
{
    let begun = Instant::now();
    loop {
        match call().await {
            Ok(answer) => return Ok(answer),
            Err(status) => anyhow::ensure!(begun.elapsed() < LIMIT, "{status}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Whether the engine had the result of the step already.
fn is_cached(events: &[BuildEvent]) -> bool {
    events.iter().any(|event| match &event.event {
        Some(Event::StepChange(step)) => step.name.contains("RUN ") && step.state() == StepState::Cached,
        Some(Event::StateChange(_) | Event::LogLine(_) | Event::LogGap(_)) | None => false,
    })
}

/// Checks what holds of a build that has ended, whatever was killed; whether it has succeeded.
async fn check(
    seven: &Seven,
    caller: &Client,
    build: &Build,
    kind: Kind,
    events: &[BuildEvent],
) -> anyhow::Result<bool> {
    let finished = patiently(|| caller.get_build(&build.id)).await?;
    let image = patiently(|| caller.get(&build.image_id)).await?;
    let states = states(events);
    let is_final = |state: &BuildState| matches!(state, BuildState::Succeeded | BuildState::Failed);
    assert_eq!(states.iter().filter(|state| is_final(state)).count(), 1, "{states:?}");
    assert_eq!(states.last(), Some(&finished.state()), "a final state is never left");
    if finished.state() != BuildState::Succeeded {
        println!("    failed, attempt {}: {:?}", finished.attempt, finished.error);
        assert_eq!((image.status(), image.artifact), (ImageStatus::Error, None));
        assert_eq!(finished.failures, 3, "{finished:?}");
        return Ok(false);
    }
    assert_eq!(image.status(), ImageStatus::BuildFinished);
    let won = last_attempt(events);
    // An attempt before it may have come so far that the engine need not run the step again, and then prints nothing.
    let prints = if is_cached(won) { Vec::new() } else { kind.prints() };
    assert_eq!(lines(won), prints, "{kind:?} of {}: {won:?}", finished.id);
    assert!(!finished.log_truncated);
    let artifact = image.artifact.context("an artifact")?;
    assert_eq!(artifact.worker, finished.worker);
    let engine = seven.engine_of(&artifact.worker).context("a worker")?;
    let reference = format!("{}:{}", image.repository, image.tag);
    assert_eq!(engine.image_id(&reference).await, Some(artifact.image_id), "{reference}");
    // What an attempt that was lost has named is collected.
    for other in seven.engines.iter().filter(|other| other.host() != engine.host()) {
        let begun = Instant::now();
        while let Some(id) = other.image_id(&reference).await {
            anyhow::ensure!(begun.elapsed() < COLLECTED, "{reference} is {id} in another engine, too");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(true)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_build_ends_whatever_is_killed() -> anyhow::Result<()> {
    let seed = number("TRAILER_TEST_SEED").unwrap_or_else(|| fastrand::u64(..));
    let kills = order(seed, number("TRAILER_TEST_KILLS").unwrap_or(MOST_KILLS));
    println!("TRAILER_TEST_SEED={seed}");
    let mut seven = Seven::start().await?;
    let callers: Vec<Client> = (0..5).map(|i| seven.service.builder(&format!("user{i}"))).collect();
    let mut builds = Vec::new();
    for i in 0..BUILDS {
        let (caller, kind) = (&callers[i % callers.len()], Kind::of(i));
        let (_, build) = caller.create(image(&format!("Build {i}"), &kind.dockerfile())).await?;
        builds.push((caller, watch(caller, &build.id), build, kind));
    }
    let begun = Instant::now();
    let (mut killed, mut ended_before) = (0, 0);
    let ended_by_now = || builds.iter().filter(|(_, watching, ..)| watching.is_finished()).count();
    for &number in &kills {
        let since = Instant::now();
        tokio::time::sleep(BETWEEN_KILLS).await;
        while ended_by_now() < BUILDS.min(ended_before + ENDED_BETWEEN_KILLS)
            && since.elapsed() < LONGEST_BETWEEN_KILLS
        {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        ended_before = ended_by_now();
        if ended_before == BUILDS {
            break;
        }
        seven.kill(number).await?;
        killed += 1;
    }
    let last_kill = begun.elapsed();
    let (mut succeeded, mut cached, mut attempts) = (0, 0, BTreeMap::new());
    for (caller, watching, build, kind) in builds {
        let limit = (last_kill + RECOVERY).saturating_sub(begun.elapsed());
        let events = ended(watching, limit).await.with_context(|| format!("{kind:?} {}", build.id))?;
        succeeded += usize::from(check(&seven, caller, &build, kind, &events).await?);
        let claims = states(&events).iter().filter(|&&state| state == BuildState::Claimed).count();
        cached += usize::from(is_cached(last_attempt(&events)));
        *attempts.entry(claims).or_insert(0) += 1;
    }
    println!(
        "{killed} kills, {succeeded} of {BUILDS} succeeded ({cached} from the cache), the last {:?} after the last kill; \
         builds by attempts: {attempts:?}",
        begun.elapsed().saturating_sub(last_kill)
    );
    assert!(succeeded >= SUCCEED, "{succeeded} succeeded");
    for engine in &seven.engines {
        engine.runs_nothing().await?;
        let begun = Instant::now();
        while let [first, ..] = engine.tags_with("trailer-attempt/").await?.as_slice() {
            anyhow::ensure!(begun.elapsed() < COLLECTED, "{first} is left");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(())
}
