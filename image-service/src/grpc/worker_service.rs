//! `trailer.images.v1.WorkerService`.

use proto::images::{self as wire, worker_service_server::WorkerService};
use tonic::{Request, Response, Status};

use super::{authentication::caller, field};
use crate::catalog::Catalog;

/// The workers on the wire.
#[derive(Debug)]
pub(super) struct AllWorkers {
    catalog: Catalog,
}

impl AllWorkers {
    pub(super) fn new(catalog: Catalog) -> Self {
        Self { catalog }
    }
}

#[tonic::async_trait]
impl WorkerService for AllWorkers {
    async fn list_workers(
        &self,
        request: Request<wire::ListWorkersRequest>,
    ) -> Result<Response<wire::ListWorkersResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let size = field::page_size(request.page_size)?;
        // The token is the name of the last worker, which every caller may know.
        let after = Some(request.page_token.as_str()).filter(|token| !token.is_empty());
        let found = self.catalog.workers(after, size).await?;
        let next_page_token = match found.last() {
            Some(last) if found.len() as u64 == size => last.name.clone(),
            Some(_) | None => String::new(),
        };
        let mut workers = Vec::with_capacity(found.len());
        for worker in found {
            let online = self.catalog.is_online(&worker);
            let mut on_wire = wire::Worker {
                name: worker.name,
                labels: worker.labels.into_iter().collect(),
                online,
                ..wire::Worker::default()
            };
            if caller.is_admin() {
                on_wire.slots = worker.slots;
                on_wire.slots_taken = i32::try_from(worker.slots_taken).unwrap_or(i32::MAX);
                on_wire.engine_version = worker.engine_version;
                on_wire.connect_time = Some(field::time(worker.connected_at));
                on_wire.heartbeat_time = Some(field::time(worker.heard_at));
            }
            workers.push(on_wire);
        }
        Ok(Response::new(wire::ListWorkersResponse { workers, next_page_token }))
    }
}
