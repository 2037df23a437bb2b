//! `trailer.images.v1.ImageService`.

use futures_util::stream::{self, BoxStream, StreamExt};
use proto::images::{self as wire, image_service_server::ImageService};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{authentication::caller, cursor::Binding, field, image, page};
use crate::{
    build::BuildId,
    catalog::Catalog,
    error::{Error, Violations},
    feed::{Feed, Notice, WatchEvent},
    image::{ImageId, ImageKey, View},
    timestamp::Timestamp,
};

/// Images with their configurations are large: more would not fit an answer anyway.
const MAX_FULL_PAGE: u64 = 50;

/// The catalogue on the wire.
#[derive(Debug)]
pub(super) struct Images {
    catalog: Catalog,
    feed: Feed,
    history: Uuid,
}

impl Images {
    pub(super) fn new(catalog: Catalog, feed: Feed, history: Uuid) -> Self {
        Self { catalog, feed, history }
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn create_image(
        &self,
        request: Request<wire::CreateImageRequest>,
    ) -> Result<Response<wire::CreateImageResponse>, Status> {
        let caller = caller(&request)?;
        let image = request
            .into_inner()
            .image
            .ok_or_else(|| Error::Invalid(Violations::one("image", "must be given")))?;
        let (image, build) = self.catalog.create_image(&caller, image::draft(image)).await?;
        Ok(Response::new(wire::CreateImageResponse { image: Some(image.into()), build: Some(build.into()) }))
    }

    async fn get_image(
        &self,
        request: Request<wire::GetImageRequest>,
    ) -> Result<Response<wire::GetImageResponse>, Status> {
        let caller = caller(&request)?;
        let id = ImageId(field::id("id", &request.into_inner().id)?);
        let image = self.catalog.image(&caller, id).await?;
        Ok(Response::new(wire::GetImageResponse { image: Some(image.into()) }))
    }

    async fn list_images(
        &self,
        request: Request<wire::ListImagesRequest>,
    ) -> Result<Response<wire::ListImagesResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let view = field::view(request.view)?;
        let size = match view {
            View::Basic => field::page_size(request.page_size)?,
            View::Full => field::page_size(request.page_size)?.min(MAX_FULL_PAGE),
        };
        let binding = Binding::new(self.history, "ListImages", view, &caller);
        let after = match request.page_token.as_str() {
            "" => None,
            token => {
                let key = binding.open(token).and_then(parse_key);
                Some(key.ok_or_else(field::foreign_page_token)?)
            }
        };
        let found = self.catalog.images(&caller, after, size, view).await?;
        let keys: Vec<ImageKey> = found.iter().map(|found| found.image.key()).collect();
        let images = page::fitting(found.into_iter().map(wire::Image::from));
        let is_last = (keys.len() as u64) < size && images.len() == keys.len();
        let next_page_token = match images.len().checked_sub(1).and_then(|last| keys.get(last)) {
            Some(last) if !is_last => binding.seal(format_args!("{}:{}", last.updated_at.micros(), last.id)),
            Some(_) | None => String::new(),
        };
        Ok(Response::new(wire::ListImagesResponse { images, next_page_token }))
    }

    async fn delete_image(
        &self,
        request: Request<wire::DeleteImageRequest>,
    ) -> Result<Response<wire::DeleteImageResponse>, Status> {
        let caller = caller(&request)?;
        let id = ImageId(field::id("id", &request.into_inner().id)?);
        self.catalog.delete_image(&caller, id).await?;
        Ok(Response::new(wire::DeleteImageResponse {}))
    }

    async fn build_image(
        &self,
        request: Request<wire::BuildImageRequest>,
    ) -> Result<Response<wire::BuildImageResponse>, Status> {
        let caller = caller(&request)?;
        let id = ImageId(field::id("id", &request.into_inner().id)?);
        let (image, build) = self.catalog.build_image(&caller, id).await?;
        Ok(Response::new(wire::BuildImageResponse { image: Some(image.into()), build: Some(build.into()) }))
    }

    async fn cancel_build(
        &self,
        request: Request<wire::CancelBuildRequest>,
    ) -> Result<Response<wire::CancelBuildResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let id = ImageId(field::id("id", &request.id)?);
        let meant = match request.build_id.as_str() {
            "" => None,
            meant => Some(BuildId(field::id("build_id", meant)?)),
        };
        let (image, build) = self.catalog.cancel_build(&caller, id, meant).await?;
        Ok(Response::new(wire::CancelBuildResponse { image: Some(image.into()), build: Some(build.into()) }))
    }

    type WatchImagesStream = BoxStream<'static, Result<wire::WatchImagesResponse, Status>>;

    async fn watch_images(
        &self,
        request: Request<wire::WatchImagesRequest>,
    ) -> Result<Response<Self::WatchImagesStream>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let view = field::view(request.view)?;
        let binding = Binding::new(self.history, "WatchImages", view, &caller);
        let after = match request.after_revision.as_str() {
            "" => None,
            revision => match binding.open(revision).and_then(|revision| revision.parse().ok()) {
                Some(revision) => Some(revision),
                None => {
                    let oldest = self.feed.oldest().await?;
                    return Err(Error::RevisionUnavailable { oldest }.into());
                }
            },
        };
        let watch = self.feed.watch(&caller, after, view).await?;
        let messages = stream::unfold(Some(watch), move |watch| {
            let binding = binding.clone();
            async move {
                let mut watch = watch?;
                match watch.next().await {
                    Ok(notice) => Some((Ok(message(notice, &binding)), Some(watch))),
                    Err(error) => Some((Err(Status::from(error)), None)),
                }
            }
        });
        Ok(Response::new(messages.boxed()))
    }
}

fn parse_key(place: &str) -> Option<ImageKey> {
    let (updated_at, id) = place.split_once(':')?;
    Some(ImageKey {
        updated_at: Timestamp::from_micros(updated_at.parse().ok()?),
        id: ImageId(Uuid::try_parse(id).ok()?),
    })
}

fn message(notice: Notice, binding: &Binding) -> wire::WatchImagesResponse {
    use wire::watch_images_response::Event;
    let event = match notice.event {
        WatchEvent::Image(image) => Event::Image(image.into()),
        WatchEvent::Synced => Event::Synced(wire::Synced {}),
        WatchEvent::Changed(image) => Event::Changed(image.into()),
        WatchEvent::Removed(id) => Event::Removed(wire::ImageRemoved { id: id.to_string() }),
        WatchEvent::Bookmark => Event::Bookmark(wire::Bookmark {}),
    };
    wire::WatchImagesResponse { resume_revision: binding.seal(notice.revision), event: Some(event) }
}
