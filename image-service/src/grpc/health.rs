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

/// The services that have one status: dispatch; and the server as a whole, as balancers of clients ask for it, with what reads
/// from the catalogue.
const GROUPS: [&[&str]; 2] = [&[DISPATCH], &["", IMAGES, BUILDS, ACCESS, CONTEXTS, WORKERS]];

/// The conditions that the statuses follow.
#[derive(Clone, Debug)]
pub(crate) struct Readiness {
    /// Set while the database answers. The dispatch service needs nothing else.
    pub(crate) store_answers: watch::Receiver<bool>,
    /// Set while the catalogue can be read.
    pub(crate) catalogue_ready: watch::Receiver<bool>,
}

impl Readiness {
    /// Waits for a change; `None` when there will be none.
    async fn changed(&mut self) -> Option<()> {
        tokio::select! {
            changed = self.store_answers.changed() => changed.ok(),
            changed = self.catalogue_ready.changed() => changed.ok(),
        }
    }

    /// Returns whether the dispatch service serves now, and whether the services of the catalogue do.
    fn now(&mut self) -> [bool; 2] {
        // Both are marked as seen, whatever they are: or the one that is not would be news again and again.
        let store_answers = *self.store_answers.borrow_and_update();
        let catalogue_ready = *self.catalogue_ready.borrow_and_update();
        [store_answers, store_answers && catalogue_ready]
    }
}

/// Reports SERVING while a service can answer, and NOT_SERVING from the shutdown on; the watches end then.
///
/// The dispatch service needs the database alone: workers are served while the catalogue is loading, so that no restart
/// stops a build. The others need the catalogue, too.
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
        // Whoever tells of the database and the catalogue ends with the shutdown only.
        while let Some(Some(())) = shutdown.run_until_cancelled(readiness.changed()).await {
            let now = readiness.now();
            for ((names, serves), before) in GROUPS.into_iter().zip(now).zip(reported) {
                // A status that is set is told to the watches, the same one too.
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
            // Ends the watches, once they have told of it.
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
