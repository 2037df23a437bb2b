//! What goes on beside the calls: hints from other replicas are passed on, and what is kept for a time is forgotten.

use std::{error::Error as _, sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{error::Error, signals::Signals, store::Store};

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
