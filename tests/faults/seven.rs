//! Fifty builds on three workers with an engine each, while the seven processes are killed in turn.

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
    docker_engine::{BASE, Engine},
    stack::{LIMIT, SHORT_LEASE, Service, Worker, counted, counting, directory, ended, last_attempt, watch},
};

const BUILDS: usize = 50;
const WORKERS: usize = 3;
/// Minimum number of builds that succeed. One whose engines are killed three times under it fails.
const SUCCEED: usize = 45;
/// Number of processes.
///
/// They are killed in turn until every build has ended, or as often as `TRAILER_TEST_KILLS` says.
const PROCESSES: usize = 1 + 2 * WORKERS;
const MOST_KILLS: usize = 10 * PROCESSES;
const BETWEEN_KILLS: Duration = Duration::from_secs(5);
/// Number of builds that must end between two kills, unless this takes `LONGEST_BETWEEN_KILLS`.
///
/// Without it, the kills would decide how many builds succeed on a slow machine.
const ENDED_BETWEEN_KILLS: usize = 3;
const LONGEST_BETWEEN_KILLS: Duration = Duration::from_secs(20);
/// Time between a kill and the restart.
const AWAY: Duration = Duration::from_millis(500);
/// Maximum time until an image that nothing needs is garbage-collected.
const COLLECTED: Duration = Duration::from_secs(180);
/// Maximum time for all builds to end after the last kill.
const RECOVERY: Duration = Duration::from_secs(120);

/// The seven processes.
struct Seven {
    service: Service,
    workers: Vec<Worker>,
    engines: Vec<Engine>,
    _directory: TempDir,
}

/// The work and output of a build.
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

    /// Returns the engine of a worker.
    fn engine_of(&self, worker: &str) -> Option<&Engine> {
        self.engines.get(worker.strip_prefix('w')?.parse::<usize>().ok()?)
    }
}

impl Kind {
    fn new(number: usize) -> Self {
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

/// Returns the order of the kills: every process once, then all again in another order, and so on.
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

/// Repeats a call until it succeeds.
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

/// Returns whether the engine took the step from its cache.
fn is_cached(events: &[BuildEvent]) -> bool {
    events.iter().any(|event| match &event.event {
        Some(Event::StepChange(step)) => step.name.contains("RUN ") && step.state() == StepState::Cached,
        Some(Event::StateChange(_) | Event::LogLine(_) | Event::LogGap(_)) | None => false,
    })
}

/// Checks that the result of an ended build is consistent, and returns whether the build succeeded.
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
    // If an earlier attempt got far enough, the engine takes the step from its cache and prints nothing.
    let prints = if is_cached(won) { Vec::new() } else { kind.prints() };
    assert_eq!(lines(won), prints, "{kind:?} of {}: {won:?}", finished.id);
    assert!(!finished.log_truncated);
    let artifact = image.artifact.context("an artifact")?;
    assert_eq!(artifact.worker, finished.worker);
    let engine = seven.engine_of(&artifact.worker).context("a worker")?;
    let reference = image.reference.clone();
    assert_eq!(engine.image_id(&reference).await, Some(artifact.image_id), "{reference}");
    // Tags set by a lost attempt are garbage-collected.
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
        let (caller, kind) = (&callers[i % callers.len()], Kind::new(i));
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
        while let [first, ..] = engine.tags_with("trailer.invalid/attempt/").await?.as_slice() {
            anyhow::ensure!(begun.elapsed() < COLLECTED, "{first} is left");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(())
}
