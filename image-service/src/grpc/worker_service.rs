//! `trailer.images.v1.WorkerService`.

use proto::images::{self as wire, worker_service_server::WorkerService};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{authentication::caller, cursor::Binding, field, page, write_request};
use crate::{
    catalog::Catalog,
    dispatch::{WithheldAbility, Worker},
    image::View,
};

/// The implementation of the worker service.
#[derive(Debug)]
pub(super) struct AllWorkers {
    catalog: Catalog,
    /// Identifies the catalogue.
    catalogue_id: Uuid,
}

impl AllWorkers {
    pub(super) fn new(catalog: Catalog, catalogue_id: Uuid) -> Self {
        Self { catalog, catalogue_id }
    }

    /// Converts a worker, with the fields for admins if `for_admin`.
    fn on_wire(worker: Worker, for_admin: bool) -> wire::Worker {
        let draining = !worker.takes_builds();
        let public = wire::Worker {
            name: worker.name,
            labels: worker.labels.into_iter().collect(),
            online: worker.online,
            pools: worker.pools.names().map(str::to_owned).collect(),
            ..wire::Worker::default()
        };
        if !for_admin {
            return public;
        }
        wire::Worker {
            slots: worker.slots,
            slots_taken: i32::try_from(worker.slots_taken).unwrap_or(i32::MAX),
            engine_version: worker.engine_version,
            connect_time: Some(field::time(worker.connected_at)),
            heartbeat_time: Some(field::time(worker.heard_at)),
            draining,
            drained: worker.drained,
            unsupported_reason: worker.unsupported_reason,
            withheld: worker.withheld.into_iter().map(Into::into).collect(),
            protocol_version: worker.protocol_version,
            engine_warning: worker.engine_warning,
            ..public
        }
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
        let binding = Binding::new(self.catalogue_id, "ListWorkers", View::Basic, &caller);
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(binding.open(token).ok_or_else(field::foreign_page_token)?),
        };
        let found = self.catalog.workers(after, size).await?;
        let mut workers = Vec::with_capacity(found.len());
        for worker in found {
            workers.push(Self::on_wire(worker, caller.is_admin()));
        }
        let read = workers.len();
        let workers = page::fitting(workers.into_iter());
        let next_page_token = match workers.last() {
            Some(last) if workers.len() < read || read as u64 == size => binding.seal(&last.name),
            Some(_) | None => String::new(),
        };
        Ok(Response::new(wire::ListWorkersResponse { workers, next_page_token }))
    }

    async fn drain_worker(
        &self,
        request: Request<wire::DrainWorkerRequest>,
    ) -> Result<Response<wire::DrainWorkerResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        field::subject(&mut violations, "name", &message.name);
        violations.check()?;
        let worker = self.catalog.drain_worker(&request, &message.name, true).await?;
        Ok(Response::new(wire::DrainWorkerResponse { worker: Some(Self::on_wire(worker, true)) }))
    }

    async fn resume_worker(
        &self,
        request: Request<wire::ResumeWorkerRequest>,
    ) -> Result<Response<wire::ResumeWorkerResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        field::subject(&mut violations, "name", &message.name);
        violations.check()?;
        let worker = self.catalog.drain_worker(&request, &message.name, false).await?;
        Ok(Response::new(wire::ResumeWorkerResponse { worker: Some(Self::on_wire(worker, true)) }))
    }
}

impl From<WithheldAbility> for wire::WithheldAbility {
    fn from(withheld: WithheldAbility) -> Self {
        Self { ability: withheld.ability, flaw: withheld.flaw, fixed_in: withheld.fixed_in }
    }
}
