//! The work beside the calls: hints from other replicas are passed on, what is kept for a time is forgotten, the database is
//! asked whether it answers, and the queue is measured.

use std::{error::Error as _, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{error::Error, image::ImageId, signals::Signals, store::Store};

/// How long to wait before the database is asked again to tell what others do.
const PAUSE: Duration = Duration::from_secs(1);

/// How often what is old is looked for, whatever it is kept for.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(60);

/// Passes on what other replicas commit, until shutdown.
pub(crate) async fn hear(store: Store, signals: Arc<Signals>, shutdown: CancellationToken) {
    let hearing = async {
        loop {
            match store.hints().await {
                Ok(None) => return,
                Ok(Some(mut hints)) => loop {
                    match hints.next().await {
                        Ok(hint) => signals.hint(hint),
                        Err(error) => {
                            tracing::warn!(%error, "cannot hear what other replicas do");
                            break;
                        }
                    }
                },
                Err(error) => tracing::warn!(%error, "cannot hear what other replicas do"),
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = hearing => {}
    }
}

/// For how long what is no longer needed is kept all the same.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Retention {
    /// What watches can be resumed from.
    pub(crate) changes: Duration,
    /// Archives that no image names.
    pub(crate) contexts: Duration,
}

/// Forgets what was kept for long enough, and answers to old requests, in small batches, until shutdown.
pub(crate) async fn forget(store: Store, retain: Retention, shutdown: CancellationToken) {
    let mut tick = interval((retain.changes.min(retain.contexts) / 4).clamp(SHORTEST, LONGEST));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        loop {
            let forgotten = async {
                let changes = store.forget_changes(retain.changes).await?;
                let answers = store.forget_answers().await?;
                let contexts = store.forget_contexts(retain.contexts).await?;
                Ok::<_, Error>(changes || answers || contexts)
            };
            match forgotten.await {
                Ok(true) if !shutdown.is_cancelled() => tokio::task::yield_now().await,
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, source = ?error.source(), "cannot forget what is old");
                    break;
                }
            }
        }
    }
}

/// Forgets builds that are beyond `keep` of their image: soon after one has ended, and of all images now and then; until shutdown.
pub(crate) async fn trim(store: Store, signals: Arc<Signals>, keep: u64, shutdown: CancellationToken) {
    const EVERYWHERE: Duration = Duration::from_secs(3_600);
    let trimming = async {
        let mut everywhere = interval(EVERYWHERE);
        everywhere.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let trimmed = tokio::select! {
                biased;
                image = signals.build_ended() => store.forget_builds_of(image, keep).await,
                _ = everywhere.tick() => trim_everywhere(&store, keep).await,
            };
            if let Err(error) = trimmed {
                tracing::warn!(%error, source = ?error.source(), "cannot forget older builds");
            }
        }
    };
    shutdown.run_until_cancelled(trimming).await;
}

async fn trim_everywhere(store: &Store, keep: u64) -> Result<(), Error> {
    let mut after = ImageId(uuid::Uuid::nil());
    while let Some(last) = store.forget_builds_after(after, keep).await? {
        after = last;
    }
    Ok(())
}

/// Asks the database again and again whether it answers, until shutdown.
pub(crate) fn ask(
    tasks: &mut JoinSet<()>,
    store: &Store,
    shutdown: &CancellationToken,
) -> watch::Receiver<bool> {
    const EVERY: Duration = Duration::from_secs(1);
    const PATIENCE: Duration = Duration::from_secs(2);
    let (sender, receiver) = watch::channel(true);
    let (store, shutdown) = (store.clone(), shutdown.clone());
    let asking = async move {
        loop {
            let answers = matches!(timeout(PATIENCE, store.ask()).await, Ok(Ok(())));
            if sender.send_if_modified(|known| std::mem::replace(known, answers) != answers) {
                if answers {
                    tracing::info!("the database answers again");
                } else {
                    tracing::error!("the database does not answer; health says NOT_SERVING");
                }
            }
            tokio::time::sleep(EVERY).await;
        }
    };
    tasks.spawn(async move {
        shutdown.run_until_cancelled(asking).await;
    });
    receiver
}

/// Measures the queue, until shutdown. Every replica tells the same.
pub(crate) async fn measure(store: Store, shutdown: CancellationToken) {
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
        .with_description("How long the oldest build in the queue has been there")
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
