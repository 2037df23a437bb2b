//! Background tasks: forwarding hints of other replicas, removing old data, probing the database, and
//! measuring the queue.

use std::{error::Error as _, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{error::Error, image::ImageId, signals::Signals, store::Store};

/// Pause before the hints are read again.
const PAUSE: Duration = Duration::from_secs(1);

/// Minimum interval between removals of old data, however short the retention periods are.
const SHORTEST: Duration = Duration::from_millis(100);
/// Maximum interval between removals of old data, however long the retention periods are.
const LONGEST: Duration = Duration::from_secs(60);

/// Forwards hints about the commits of other replicas until shutdown.
pub(crate) async fn relay_hints(store: Store, signals: Arc<Signals>, shutdown: CancellationToken) {
    let hearing = async {
        loop {
            match store.hints().await {
                Ok(None) => return,
                Ok(Some(mut hints)) => loop {
                    match hints.next().await {
                        Ok(hint) => signals.hint(hint),
                        Err(error) => {
                            tracing::warn!(%error, "cannot receive the hints of other replicas");
                            break;
                        }
                    }
                },
                Err(error) => tracing::warn!(%error, "cannot receive the hints of other replicas"),
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = hearing => {}
    }
}

/// Retention periods of data that is no longer needed.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Retention {
    /// Retention period of the changes that watches can be resumed from.
    pub(crate) changes: Duration,
    /// Retention period of archives that no configuration names.
    pub(crate) contexts: Duration,
}

/// Removes old changes, archives and responses to requests, in small batches, until shutdown.
pub(crate) async fn purge_expired(store: Store, retain: Retention, shutdown: CancellationToken) {
    let mut tick = interval((retain.changes.min(retain.contexts) / 4).clamp(SHORTEST, LONGEST));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        loop {
            let purged = async {
                let changes = store.compact_change_log(retain.changes).await?;
                let answers = store.purge_answers().await?;
                let contexts = store.purge_contexts(retain.contexts).await?;
                Ok::<_, Error>(changes || answers || contexts)
            };
            match purged.await {
                Ok(true) if !shutdown.is_cancelled() => tokio::task::yield_now().await,
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, source = ?error.source(), "cannot purge expired data");
                    break;
                }
            }
        }
    }
}

/// Removes the builds of each image beyond the last `keep`, until shutdown.
///
/// That happens soon after a build of the image has ended, and for all images once an hour.
pub(crate) async fn prune_builds(
    store: Store,
    signals: Arc<Signals>,
    keep: u64,
    shutdown: CancellationToken,
) {
    const EVERYWHERE: Duration = Duration::from_secs(3_600);
    let trimming = async {
        let mut everywhere = interval(EVERYWHERE);
        everywhere.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let trimmed = tokio::select! {
                biased;
                image = signals.build_ended() => store.prune_builds_of(image, keep).await,
                _ = everywhere.tick() => prune_all_builds(&store, keep).await,
            };
            if let Err(error) = trimmed {
                tracing::warn!(%error, source = ?error.source(), "cannot prune older builds");
            }
        }
    };
    shutdown.run_until_cancelled(trimming).await;
}

async fn prune_all_builds(store: &Store, keep: u64) -> Result<(), Error> {
    let mut after = ImageId(uuid::Uuid::nil());
    while let Some(last) = store.prune_builds_after(after, keep).await? {
        after = last;
    }
    Ok(())
}

/// Probes the database until shutdown. The receiver holds whether the database has answered within
/// [`Store::OUTAGE`].
pub(crate) fn probe_database(
    tasks: &mut JoinSet<()>,
    store: &Store,
    shutdown: &CancellationToken,
) -> watch::Receiver<bool> {
    const EVERY: Duration = Duration::from_secs(1);
    const PATIENCE: Duration = Duration::from_secs(2);
    let (sender, receiver) = watch::channel(true);
    let (store, shutdown) = (store.clone(), shutdown.clone());
    let probing = async move {
        let mut last_response = Instant::now();
        loop {
            if matches!(timeout(PATIENCE, store.ping()).await, Ok(Ok(()))) {
                last_response = Instant::now();
            }
            let answers = last_response.elapsed() < Store::OUTAGE;
            if sender.send_if_modified(|known| std::mem::replace(known, answers) != answers) {
                if answers {
                    tracing::info!("the database responds again");
                } else {
                    tracing::error!("the database does not respond; health is NOT_SERVING");
                }
            }
            tokio::time::sleep(EVERY).await;
        }
    };
    tasks.spawn(async move {
        shutdown.run_until_cancelled(probing).await;
    });
    receiver
}

/// Looks for free disk space until shutdown.
pub(crate) async fn probe_storage(store: Store, shutdown: CancellationToken) {
    const EVERY: Duration = Duration::from_secs(1);
    let probing = async {
        loop {
            store.probe_storage().await;
            tokio::time::sleep(EVERY).await;
        }
    };
    shutdown.run_until_cancelled(probing).await;
}

/// Measures the queue until shutdown. Every replica reports the same values.
pub(crate) async fn record_queue_metrics(store: Store, shutdown: CancellationToken) {
    const EVERY: Duration = Duration::from_secs(5);
    let meter = opentelemetry::global::meter(crate::PROGRAM);
    let depth = meter
        .u64_gauge("trailer.queue.depth")
        .with_unit("{build}")
        .with_description("Builds in the queue of the catalogue: the same at every replica")
        .build();
    let age = meter
        .f64_gauge("trailer.queue.age")
        .with_unit("s")
        .with_description("Time that the oldest queued build has spent in the queue")
        .build();
    let measuring = async {
        loop {
            match store.queue_load().await {
                Ok((builds, oldest)) => {
                    depth.record(builds, &[]);
                    age.record(oldest.as_secs_f64(), &[]);
                }
                Err(error) => tracing::debug!(%error, "cannot measure the queue"),
            }
            tokio::time::sleep(EVERY).await;
        }
    };
    shutdown.run_until_cancelled(measuring).await;
}
