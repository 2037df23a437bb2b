//! `trailer.images.v1.ImageService`.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use prost::Message as _;
use proto::{
    codec,
    images::{self as wire, image_service_server::ImageService},
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    audit::Audit,
    authentication::caller,
    caller_limits::{self, Callers},
    configuration, cost,
    cursor::Binding,
    field,
    image::{self, Encoder},
    image_query, page, write_request,
};
use crate::{
    build::BuildId,
    catalog::Catalog,
    error::{Error, Violations},
    feed::{Feed, ImageWatch, Notice, Revision, WatchEvent},
    image::{Configuration, ImageId, View},
    index::{ChangeView, Encoded},
};

pub(super) mod batch;
mod edit;
mod snapshot;

/// Maximum size of a page with configurations, in images. More would not fit a response.
const MAX_FULL_PAGE: u64 = 50;

/// The implementation of the image service.
#[derive(Debug)]
pub(super) struct Images {
    catalog: Catalog,
    feed: Feed,
    callers: Arc<Callers>,
    encoder: Arc<Encoder>,
    catalogue_id: Uuid,
}

impl Images {
    pub(super) fn new(catalog: Catalog, feed: Feed, callers: Arc<Callers>, catalogue_id: Uuid) -> Self {
        Self { catalog, feed, callers, encoder: Arc::new(Encoder::new()), catalogue_id }
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn create_image(
        &self,
        request: Request<wire::CreateImageRequest>,
    ) -> Result<Response<wire::CreateImageResponse>, Status> {
        let audit = Audit::new(&request);
        let (message, request, mut violations) = write_request::open(request)?;
        let image = image::given(&mut violations, message.image);
        let (image, build) = self.catalog.create_image(&request, image, violations).await?;
        audit.is_about(image.image.id);
        Ok(Response::new(wire::CreateImageResponse {
            image: Some(image.into()),
            build: build.map(Into::into),
        }))
    }

    async fn get_image(
        &self,
        request: Request<wire::GetImageRequest>,
    ) -> Result<Response<codec::GetImageResponse>, Status> {
        let caller = caller(&request)?;
        let id = ImageId(field::id("id", &request.into_inner().id)?);
        let (found, configuration) = self.catalog.image(&caller, id).await?;
        let image = self.encoder.encode(&found, Some(&configuration), &[]);
        Ok(Response::new(codec::GetImageResponse { image }))
    }

    async fn list_images(
        &self,
        request: Request<wire::ListImagesRequest>,
    ) -> Result<Response<codec::ListImagesResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let query = image_query::query(&request)?;
        let view = field::view(request.view)?;
        let size = match view {
            View::Basic => field::page_size(request.page_size)?,
            View::Full => field::page_size(request.page_size)?.min(MAX_FULL_PAGE),
        };
        self.callers.admit_cost(&caller, cost::of_page(size, view))?;
        let binding = Binding::new(self.catalogue_id, &image_query::bound(&request), view, &caller);
        let after = match request.page_token.as_str() {
            "" => None,
            token => {
                let position = binding
                    .reveal(token)
                    .and_then(|position| image_query::read_position(&position, &query.order));
                Some(position.ok_or_else(field::foreign_page_token)?)
            }
        };
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let with_total = request.include_total_size;
        let page = self.catalog.images(&caller, &query, after.as_ref(), size, with_total).await?;
        self.callers.charge(&caller, cost::of_scan(page.searched));
        let configurations = match view {
            View::Basic => vec![None; page.images.len()],
            View::Full => self.catalog.configurations(&page.images).await?,
        };
        let encoded = page.images.iter().zip(&configurations);
        let encoded = encoded.map(|(found, cached)| {
            let hits = query.search.as_ref().map(|term| self.catalog.hits(found, term)).unwrap_or_default();
            self.encoder.encode(found, cached.as_deref(), &hits)
        });
        let images = page::fitting_by(encoded, bytes::Bytes::len);
        // Images that did not fit the message go to the next page.
        let next = match page.images.get(images.len()) {
            Some(_) => {
                page.images.get(images.len() - 1).map(|last| query.order.position_of(&last.entry.image))
            }
            None => page.next,
        };
        let next_page_token = match next {
            Some(position) => binding.conceal(&image_query::write_position(&position)?)?,
            None => String::new(),
        };
        let total_size = page.total.map(|total| i64::try_from(total).unwrap_or(i64::MAX));
        let watch = image_query::watch_bound(&image_query::watch_of(&request));
        let watch = Binding::new(self.catalogue_id, &watch, view, &caller);
        let resume_revision = watch.seal(&write_revision(page.revision));
        Ok(Response::new(codec::ListImagesResponse { images, next_page_token, total_size, resume_revision }))
    }

    async fn update_image(
        &self,
        request: Request<wire::UpdateImageRequest>,
    ) -> Result<Response<wire::UpdateImageResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        let image = message.image.unwrap_or_default();
        let id = field::image(&mut violations, "image.id", &image.id);
        let etag = field::etag(&image.etag);
        let edit = edit::draft(&mut violations, image, message.update_mask);
        violations.check()?;
        let image = self.catalog.update_image(&request, id, etag, edit).await?;
        Ok(Response::new(wire::UpdateImageResponse { image: Some(image.into()) }))
    }

    async fn delete_image(
        &self,
        request: Request<wire::DeleteImageRequest>,
    ) -> Result<Response<wire::DeleteImageResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        let id = field::image(&mut violations, "id", &message.id);
        violations.check()?;
        self.catalog.delete_image(&request, id, field::etag(&message.etag)).await?;
        Ok(Response::new(wire::DeleteImageResponse {}))
    }

    async fn enable_image(
        &self,
        request: Request<wire::EnableImageRequest>,
    ) -> Result<Response<wire::EnableImageResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        let id = field::image(&mut violations, "id", &message.id);
        violations.check()?;
        let image = self.catalog.enable_image(&request, id, field::etag(&message.etag), true).await?;
        Ok(Response::new(wire::EnableImageResponse { image: Some(image.into()) }))
    }

    async fn disable_image(
        &self,
        request: Request<wire::DisableImageRequest>,
    ) -> Result<Response<wire::DisableImageResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        let id = field::image(&mut violations, "id", &message.id);
        violations.check()?;
        let image = self.catalog.enable_image(&request, id, field::etag(&message.etag), false).await?;
        Ok(Response::new(wire::DisableImageResponse { image: Some(image.into()) }))
    }

    async fn build_image(
        &self,
        request: Request<wire::BuildImageRequest>,
    ) -> Result<Response<wire::BuildImageResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        let id = field::image(&mut violations, "id", &message.id);
        violations.check()?;
        let (image, build) = self.catalog.build_image(&request, id, field::etag(&message.etag)).await?;
        Ok(Response::new(wire::BuildImageResponse {
            image: Some(image.into()),
            build: build.map(Into::into),
        }))
    }

    async fn cancel_build(
        &self,
        request: Request<wire::CancelBuildRequest>,
    ) -> Result<Response<wire::CancelBuildResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        let id = field::image(&mut violations, "id", &message.id);
        let meant = match message.build_id.as_str() {
            "" => None,
            meant => Some(BuildId(field::image(&mut violations, "build_id", meant).0)),
        };
        violations.check()?;
        let (image, build) =
            self.catalog.cancel_build(&request, id, field::etag(&message.etag), meant).await?;
        Ok(Response::new(wire::CancelBuildResponse {
            image: Some(image.into()),
            build: build.map(Into::into),
        }))
    }

    async fn clone_image(
        &self,
        request: Request<wire::CloneImageRequest>,
    ) -> Result<Response<wire::CloneImageResponse>, Status> {
        let caller = caller(&request)?;
        let id = ImageId(field::id("id", &request.into_inner().id)?);
        let draft = self.catalog.clone_image(&caller, id).await?;
        let create = wire::CreateImageRequest { image: Some(draft.into()), ..Default::default() };
        Ok(Response::new(wire::CloneImageResponse { create_image_request: Some(create) }))
    }

    async fn render_dockerfile(
        &self,
        request: Request<wire::RenderDockerfileRequest>,
    ) -> Result<Response<wire::RenderDockerfileResponse>, Status> {
        use wire::render_dockerfile_request::Subject;
        let caller = caller(&request)?;
        self.callers.admit_cost(&caller, cost::of_message(request.get_ref().encoded_len()))?;
        let written = match request.into_inner().subject {
            Some(Subject::Id(id)) => self.catalog.dockerfile(&caller, ImageId(field::id("id", &id)?)).await?,
            Some(Subject::Config(config)) => {
                let mut violations = Violations::default();
                let configuration =
                    Configuration::parse(configuration::draft(config), "config", &mut violations);
                violations.check()?;
                configuration.rendered().map_err(Error::Refused)?
            }
            None => {
                let violations = Violations::one("subject", "must be given: `id` or `config`");
                return Err(Error::Invalid(violations).into());
            }
        };
        Ok(Response::new(wire::RenderDockerfileResponse {
            dockerfile: written.text,
            files: written.files.into_iter().map(Into::into).collect(),
        }))
    }

    async fn batch_images(
        &self,
        request: Request<wire::BatchImagesRequest>,
    ) -> Result<Response<wire::BatchImagesResponse>, Status> {
        let audit = Audit::new(&request);
        let (message, request, violations) = write_request::open(request)?;
        let (action, targets) = batch::order(&message, violations)?;
        let outcomes = self.catalog.batch_images(&request, action, targets).await?;
        let response = batch::response(message.targets, outcomes);
        audit.parts_ended(response.results.iter().map(batch::code));
        Ok(Response::new(response))
    }

    async fn resolve_image(
        &self,
        request: Request<wire::ResolveImageRequest>,
    ) -> Result<Response<wire::ResolveImageResponse>, Status> {
        let caller = caller(&request)?;
        let id = ImageId(field::id("id", &request.into_inner().id)?);
        let artifact = self.catalog.resolve_image(&caller, id).await?;
        let reference = match (&artifact.reference, &artifact.repo_digest) {
            (Some(reference), Some(digest)) => format!("{}@{digest}", reference.repository()),
            (Some(_) | None, None) | (None, Some(_)) => artifact.engine_name(self.catalogue_id, id),
        };
        Ok(Response::new(wire::ResolveImageResponse {
            reference,
            repo_digest: artifact.repo_digest.unwrap_or_default(),
            image_id: artifact.image_id,
            worker: artifact.worker,
        }))
    }

    async fn snapshot_workspace(
        &self,
        request: Request<wire::SnapshotWorkspaceRequest>,
    ) -> Result<Response<wire::SnapshotWorkspaceResponse>, Status> {
        let audit = Audit::new(&request);
        let (message, request, mut violations) = write_request::open(request)?;
        let order = snapshot::order(&mut violations, &message);
        let image = image::given(&mut violations, message.image);
        let (image, build) = self.catalog.snapshot_workspace(&request, image, order, violations).await?;
        audit.is_about(image.image.id);
        let (image, build) = (Some(image.into()), build.map(Into::into));
        Ok(Response::new(wire::SnapshotWorkspaceResponse { image, build }))
    }

    type WatchImagesStream = BoxStream<'static, Result<codec::WatchImagesResponse, Status>>;

    async fn watch_images(
        &self,
        request: Request<wire::WatchImagesRequest>,
    ) -> Result<Response<Self::WatchImagesStream>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let query = image_query::watched(&request)?;
        let view = field::view(request.view)?;
        self.callers.admit_cost(&caller, cost::of_watch(query.search.is_some()))?;
        let binding = Binding::new(self.catalogue_id, &image_query::watch_bound(&request), view, &caller);
        let after = match request.after_revision.as_str() {
            "" => None,
            revision => match binding.open(revision).and_then(read_revision) {
                Some(revision) => Some(revision),
                None => return Err(field::foreign_revision().into()),
            },
        };
        let permit = self.callers.open_stream(&caller)?;
        let watch = self.feed.watch(&caller, query, after, view).await?;
        // Boxed, because it is large, and the stream moves its state with every message.
        let (callers, encoder) = (Arc::clone(&self.callers), Arc::clone(&self.encoder));
        let watch = Box::new(OpenWatch { watch, binding, callers, encoder, _permit: permit });
        let messages = stream::unfold(Some(watch), async |watch| {
            let mut watch = watch?;
            let next = watch.watch.next().await;
            watch.charge_search();
            match next {
                Ok(notice) => Some((Ok(watch.message(notice)), Some(watch))),
                Err(error) => Some((Err(Status::from(error)), None)),
            }
        });
        Ok(Response::new(messages.boxed()))
    }
}

/// A watch while its stream is open.
struct OpenWatch {
    watch: ImageWatch,
    binding: Binding,
    callers: Arc<Callers>,
    encoder: Arc<Encoder>,
    _permit: caller_limits::StreamPermit,
}

impl OpenWatch {
    /// Charges the search for the initial state.
    fn charge_search(&mut self) {
        let searched = self.watch.take_searched();
        if searched > 0 {
            self.callers.charge(self.watch.caller(), cost::of_scan(searched));
        }
    }

    fn message(&self, notice: Notice) -> codec::WatchImagesResponse {
        use codec::Event;
        let encode =
            |shown: &ChangeView| self.encoder.encode(&shown.image, shown.configuration.as_deref(), &[]);
        let event = match notice.event {
            WatchEvent::Changed(shown) => {
                // Encoded once for all watches, of which there are many.
                let Encoded { image, revision } = shown.encoded(|shown| Encoded {
                    image: encode(shown),
                    revision: write_revision(notice.revision),
                });
                let (resume_revision, event) = (self.binding.seal(revision), Event::Changed(image.clone()));
                return codec::WatchImagesResponse { resume_revision, event: Some(event) };
            }
            WatchEvent::Image(shown, _) => Event::Image(encode(&shown)),
            WatchEvent::Synced => Event::Synced(wire::Synced {}),
            WatchEvent::Removed(id) => Event::Removed(wire::ImageRemoved { id: id.to_string() }),
            WatchEvent::Bookmark => Event::Bookmark(wire::Bookmark {}),
        };
        let resume_revision = self.binding.seal(&write_revision(notice.revision));
        codec::WatchImagesResponse { resume_revision, event: Some(event) }
    }
}

fn read_revision(text: &str) -> Option<Revision> {
    let (number, nonce) = text.split_once('.')?;
    Some(Revision { number: number.parse().ok()?, nonce: i64::from_str_radix(nonce, 16).ok()? })
}

fn write_revision(Revision { number, nonce }: Revision) -> String {
    format!("{number}.{nonce:x}")
}
