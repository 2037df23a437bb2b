//! `trailer.images.v1.BuildService`.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use proto::images::{self as wire, build_service_server::BuildService};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{authentication::caller, build, caller_limits::Callers, cursor::Binding, field, page};
use crate::{
    build::BuildId,
    build_watch::Histories,
    catalog::Catalog,
    error::{Error, Violations},
    image::{ImageId, View},
};

/// The implementation of the build service.
#[derive(Debug)]
pub(super) struct Builds {
    catalog: Catalog,
    histories: Histories,
    callers: Arc<Callers>,
    /// Identifies the catalogue.
    catalogue_id: Uuid,
}

impl Builds {
    pub(super) fn new(
        catalog: Catalog,
        histories: Histories,
        callers: Arc<Callers>,
        catalogue_id: Uuid,
    ) -> Self {
        Self { catalog, histories, callers, catalogue_id }
    }
}

#[tonic::async_trait]
impl BuildService for Builds {
    async fn get_build(
        &self,
        request: Request<wire::GetBuildRequest>,
    ) -> Result<Response<wire::GetBuildResponse>, Status> {
        let caller = caller(&request)?;
        let id = BuildId(field::id("id", &request.into_inner().id)?);
        let build = self.catalog.build(&caller, id).await?;
        Ok(Response::new(wire::GetBuildResponse { build: Some(build.into()) }))
    }

    async fn list_builds(
        &self,
        request: Request<wire::ListBuildsRequest>,
    ) -> Result<Response<wire::ListBuildsResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let image = ImageId(field::id("image_id", &request.image_id)?);
        let size = field::page_size(request.page_size)?;
        let binding = Binding::new(self.catalogue_id, &format!("ListBuilds/{image}"), View::Basic, &caller);
        let before = match request.page_token.as_str() {
            "" => None,
            token => {
                let number = binding.open(token).and_then(|number| number.parse().ok());
                Some(number.ok_or_else(field::foreign_page_token)?)
            }
        };
        let found = self.catalog.builds(&caller, image, before, size).await?;
        let builds = page::fitting(found.into_iter().map(wire::Build::from));
        // The first build of an image has number 1.
        let next_page_token = match builds.last() {
            Some(last) if last.number > 1 => binding.seal(&last.number.to_string()),
            Some(_) | None => String::new(),
        };
        Ok(Response::new(wire::ListBuildsResponse { builds, next_page_token }))
    }

    type WatchBuildStream = BoxStream<'static, Result<wire::WatchBuildResponse, Status>>;

    async fn watch_build(
        &self,
        request: Request<wire::WatchBuildRequest>,
    ) -> Result<Response<Self::WatchBuildStream>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let id = BuildId(field::id("id", &request.id)?);
        if request.after_sequence < 0 {
            let violation = Violations::one("after_sequence", "must not be negative");
            return Err(Error::Invalid(violation).into());
        }
        let permit = self.callers.open_stream(&caller)?;
        let watch = self.histories.watch(&caller, id, request.after_sequence).await?;
        let messages = stream::unfold(Some((watch, permit)), |watch| async {
            let (mut watch, permit) = watch?;
            match watch.next().await {
                Ok(None) => None,
                Ok(Some(records)) => {
                    let kind = watch.build().kind;
                    let events = records.into_iter().map(|record| build::event(kind, record)).collect();
                    Some((Ok(wire::WatchBuildResponse { events }), Some((watch, permit))))
                }
                Err(error) => Some((Err(Status::from(error)), None)),
            }
        });
        Ok(Response::new(messages.boxed()))
    }
}
