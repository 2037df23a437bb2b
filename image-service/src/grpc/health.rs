//! `grpc.health.v1`, which tells the truth.

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
};

/// The server as a whole, and each service.
const NAMES: [&str; 7] = ["", IMAGES, BUILDS, ACCESS, CONTEXTS, WORKERS, DISPATCH];

/// SERVING while the database answers, NOT_SERVING while it does not and from the shutdown on; the watches end then.
pub(super) async fn service(
    mut store_answers: watch::Receiver<bool>,
    shutdown: &CancellationToken,
    tasks: &TaskTracker,
) -> HealthServer<impl Health> {
    let (mut reporter, service) = tonic_health::server::health_reporter();
    for name in NAMES {
        reporter.set_service_status(name, ServingStatus::Serving).await;
    }
    let shutdown = shutdown.clone();
    tasks.spawn(async move {
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                // Whoever asks the database ends with the shutdown only.
                changed = store_answers.changed() => if changed.is_err() {
                    break;
                }
            }
            let answers = *store_answers.borrow_and_update();
            let status = if answers { ServingStatus::Serving } else { ServingStatus::NotServing };
            for name in NAMES {
                reporter.set_service_status(name, status).await;
            }
        }
        for name in NAMES {
            reporter.set_service_status(name, ServingStatus::NotServing).await;
        }
        for name in NAMES {
            // Ends the watches, once they have told of it.
            reporter.clear_service_status(name).await;
        }
    });
    service
}
