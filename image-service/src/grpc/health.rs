//! `grpc.health.v1`, by service name.

use proto::{
    dispatch::dispatch_service_server::SERVICE_NAME as DISPATCH,
    images::{
        access_service_server::SERVICE_NAME as ACCESS, build_service_server::SERVICE_NAME as BUILDS,
        context_service_server::SERVICE_NAME as CONTEXTS, image_service_server::SERVICE_NAME as IMAGES,
        worker_service_server::SERVICE_NAME as WORKERS,
    },
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::HealthReporter,
};

/// The services grouped by shared status: dispatch, those that read the catalogue, and uploads.
///
/// The second group includes the server as a whole, which load balancers of clients query.
const GROUPS: [&[&str]; 3] = [&[DISPATCH], &["", IMAGES, BUILDS, ACCESS, WORKERS], &[CONTEXTS]];

/// The conditions that determine the statuses.
#[derive(Clone, Debug)]
pub(crate) struct Readiness {
    /// True while the database responds. The dispatch service needs nothing else.
    pub(crate) store_answers: watch::Receiver<bool>,
    /// True while the catalogue can be read.
    pub(crate) catalogue_ready: watch::Receiver<bool>,
    /// True while the disk of the catalogue is full.
    pub(crate) storage_full: watch::Receiver<bool>,
}

impl Readiness {
    /// Waits for a change; returns `None` if there will be none.
    async fn changed(&mut self) -> Option<()> {
        tokio::select! {
            changed = self.store_answers.changed() => changed.ok(),
            changed = self.catalogue_ready.changed() => changed.ok(),
            changed = self.storage_full.changed() => changed.ok(),
        }
    }

    /// Returns whether each group of services serves now.
    fn now(&mut self) -> [bool; 3] {
        // All are marked as seen, whatever their values: otherwise the unseen one would be reported as
        // changed again and again.
        let store_answers = *self.store_answers.borrow_and_update();
        let catalogue_ready = *self.catalogue_ready.borrow_and_update();
        let storage_full = *self.storage_full.borrow_and_update();
        let is_readable = store_answers && catalogue_ready;
        [store_answers, is_readable, is_readable && !storage_full]
    }
}

/// Creates the health service, which reports `SERVING` while a service can serve.
///
/// From shutdown on it reports `NOT_SERVING`, and its watches end. The dispatch service needs only the
/// database: workers are served while the catalogue loads, so that no restart stops a build. The catalogue
/// services need both, and uploads need disk space, too: with a full disk, the others still read.
pub(super) async fn service(
    mut readiness: Readiness,
    shutdown: &CancellationToken,
    tasks: &TaskTracker,
) -> HealthServer<impl Health> {
    let (mut reporter, service) = tonic_health::server::health_reporter();
    let mut reported = readiness.now();
    for (names, serves) in GROUPS.into_iter().zip(reported) {
        set(&mut reporter, names, serves).await;
    }
    let shutdown = shutdown.clone();
    tasks.spawn(async move {
        // The senders of the conditions live until shutdown.
        while let Some(Some(())) = shutdown.run_until_cancelled(readiness.changed()).await {
            let now = readiness.now();
            for ((names, serves), before) in GROUPS.into_iter().zip(now).zip(reported) {
                // Setting a status notifies the watches even if it is the same.
                if serves != before {
                    set(&mut reporter, names, serves).await;
                }
            }
            reported = now;
        }
        for names in GROUPS {
            set(&mut reporter, names, false).await;
        }
        for name in GROUPS.concat() {
            // Ends the watches, once they have reported the status.
            reporter.clear_service_status(name).await;
        }
    });
    service
}

async fn set(reporter: &mut HealthReporter, names: &[&str], serves: bool) {
    let status = if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in names {
        reporter.set_service_status(*name, status).await;
    }
}

#[cfg(test)]
mod tests;
