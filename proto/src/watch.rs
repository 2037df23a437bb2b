//! Watches that resume where they were when the connection breaks or the service drains.
//!
//! A watch whose revision is too old starts over.
//!
//! ```no_run
//! # async fn example<T>(client: proto::images::image_service_client::ImageServiceClient<T>) -> Result<(), tonic::Status>
//! # where
//! #     T: proto::watch::Service + Clone,
//! #     T::ResponseBody: Send + 'static,
//! #     <T::ResponseBody as tonic::codegen::Body>::Error: Send,
//! # {
//! use std::collections::BTreeMap;
//! use proto::{images::{WatchImagesRequest, watch_images_response::Event}, watch::{ImagesWatch, Watched}};
//!
//! let mut images = BTreeMap::new();
//! let mut watch = ImagesWatch::new(client, WatchImagesRequest::default());
//! loop {
//!     match watch.next().await? {
//!         Watched::Begun => images.clear(),
//!         Watched::Event(Event::Image(image) | Event::Changed(image)) => {
//!             images.insert(image.id.clone(), image);
//!         }
//!         Watched::Event(Event::Removed(removed)) => {
//!             images.remove(&removed.id);
//!         }
//!         Watched::Event(Event::Synced(_) | Event::Bookmark(_)) => {}
//!     }
//! }
//! # }
//! ```

use std::{collections::VecDeque, time::Duration};

use tonic::{
    Code, Status, Streaming,
    body::Body as RequestBody,
    client::GrpcService,
    codegen::{Body, Bytes, StdError},
};

use crate::images::{
    BuildEvent, WatchBuildRequest, WatchBuildResponse, WatchImagesRequest, WatchImagesResponse,
    build_service_client::BuildServiceClient, image_service_client::ImageServiceClient,
    watch_images_response::Event,
};

/// The transport of the generated clients: a channel, with or without interceptors.
pub trait Service:
    GrpcService<RequestBody, Error: Into<StdError>, ResponseBody: Body<Data = Bytes, Error: Into<StdError>>>
{
}

impl<T> Service for T where
    T: GrpcService<
            RequestBody,
            Error: Into<StdError>,
            ResponseBody: Body<Data = Bytes, Error: Into<StdError>>,
        >
{
}

/// A watch of the images that a caller sees: their current state, and their changes.
///
/// A connection without a message for 30 s counts as dead.
#[derive(Debug)]
pub struct ImagesWatch<T> {
    client: ImageServiceClient<T>,
    /// Request with the revision to resume from.
    request: WatchImagesRequest,
    stream: Option<Streaming<WatchImagesResponse>>,
    retry: Retry,
}

/// An item of an [`ImagesWatch`].
#[derive(Clone, Debug, PartialEq)]
pub enum Watched {
    /// Start of the watch: the known images are obsolete, and the current ones follow.
    ///
    /// It comes first, and again whenever the watch could not be resumed.
    Begun,
    /// A change of the images, or of the watch's position.
    Event(Event),
}

/// A watch of a build: each event once and in order, until the build's end.
///
/// A connection without a message for 30 s counts as dead.
#[derive(Debug)]
pub struct BuildWatch<T> {
    client: BuildServiceClient<T>,
    /// Request with the last event that was returned.
    request: WatchBuildRequest,
    stream: Option<Streaming<WatchBuildResponse>>,
    brought: VecDeque<BuildEvent>,
    retry: Retry,
}

/// The pause before the next attempt, doubled every time up to a limit, with jitter.
#[derive(Debug)]
struct Retry {
    pause: Duration,
}

impl<T> ImagesWatch<T>
where
    T: Service + Clone,
    T::ResponseBody: Send + 'static,
    <T::ResponseBody as Body>::Error: Send,
{
    /// Creates a watch of the images that `request` selects; calls the service in [`Self::next`].
    pub fn new(client: ImageServiceClient<T>, request: WatchImagesRequest) -> Self {
        Self { client, request, stream: None, retry: Retry::new() }
    }

    /// Returns the `after_revision` for another watch to resume from here; empty in the initial state.
    pub fn resume_revision(&self) -> &str {
        &self.request.after_revision
    }

    /// Waits for the next item; dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// Returns an error that a retry cannot fix: `UNAUTHENTICATED` when the token has expired,
    /// `PERMISSION_DENIED`, `INVALID_ARGUMENT` or `UNIMPLEMENTED`. The watch can be polled again after an
    /// error, and then retries.
    pub async fn next(&mut self) -> Result<Watched, Status> {
        loop {
            let Some(stream) = &mut self.stream else {
                let begins = self.request.after_revision.is_empty();
                match self.client.clone().watch_images(self.request.clone()).await {
                    Ok(response) => self.stream = Some(response.into_inner()),
                    Err(status) => {
                        self.failed(status).await?;
                        continue;
                    }
                }
                if begins {
                    return Ok(Watched::Begun);
                }
                continue;
            };
            match next_message(stream).await {
                Ok(Some(WatchImagesResponse { resume_revision, event })) => {
                    self.retry = Retry::new();
                    // The initial state cannot be resumed: a watch that is cut off meanwhile starts over.
                    if !matches!(event, Some(Event::Image(_))) {
                        self.request.after_revision = resume_revision;
                    }
                    if let Some(event) = event {
                        return Ok(Watched::Event(event));
                    }
                }
                Ok(None) => self.failed(Status::unavailable("the watch ended without saying why")).await?,
                Err(status) => self.failed(status).await?,
            }
        }
    }

    async fn failed(&mut self, status: Status) -> Result<(), Status> {
        self.stream = None;
        // Either the changes are no longer known, or the caller has other roles since.
        let is_of_resuming = status.code() == Code::OutOfRange || status.code() == Code::InvalidArgument;
        if is_of_resuming && !self.request.after_revision.is_empty() {
            self.request.after_revision.clear();
            return self.retry.after(Status::unavailable("what was missed is no longer available")).await;
        }
        self.retry.after(status).await
    }
}

impl<T> BuildWatch<T>
where
    T: Service + Clone,
    T::ResponseBody: Send + 'static,
    <T::ResponseBody as Body>::Error: Send,
{
    /// Creates a watch of a build, from its first event.
    pub fn new(client: BuildServiceClient<T>, id: String) -> Self {
        let request = WatchBuildRequest { id, after_sequence: 0 };
        Self { client, request, stream: None, brought: VecDeque::new(), retry: Retry::new() }
    }

    /// Waits for the next event; returns `None` once the build is over and every event was returned.
    ///
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// Returns an error that a retry cannot fix: `NOT_FOUND` when the image is gone or out of sight,
    /// `OUT_OF_RANGE` when the service went back to a backup that has fewer events, and the errors of
    /// [`ImagesWatch::next`].
    pub async fn next(&mut self) -> Result<Option<BuildEvent>, Status> {
        loop {
            if let Some(event) = self.brought.pop_front() {
                self.request.after_sequence = event.sequence;
                return Ok(Some(event));
            }
            let Some(stream) = &mut self.stream else {
                match self.client.clone().watch_build(self.request.clone()).await {
                    Ok(response) => self.stream = Some(response.into_inner()),
                    Err(status) => self.retry.after(status).await?,
                }
                continue;
            };
            match next_message(stream).await {
                Ok(Some(message)) => {
                    self.retry = Retry::new();
                    self.brought = message.events.into();
                }
                Ok(None) => {
                    self.stream = None;
                    return Ok(None);
                }
                Err(status) => {
                    self.stream = None;
                    self.retry.after(status).await?;
                }
            }
        }
    }
}

/// Maximum time without a message of a live stream, which has one about every 10 s.
const SILENCE: Duration = Duration::from_secs(30);

/// Returns the next message, or an error if the stream is so silent that its connection must be dead.
async fn next_message<T>(stream: &mut Streaming<T>) -> Result<Option<T>, Status> {
    let message = tokio::time::timeout(SILENCE, stream.message()).await;
    message.unwrap_or_else(|_| Err(Status::unavailable("the connection is dead")))
}

impl Retry {
    const FIRST: Duration = Duration::from_millis(50);
    const LONGEST: Duration = Duration::from_secs(5);

    fn new() -> Self {
        Self { pause: Self::FIRST }
    }

    /// Waits before the next attempt, or returns the error if a retry cannot help.
    async fn after(&mut self, status: Status) -> Result<(), Status> {
        match status.code() {
            Code::Unauthenticated
            | Code::PermissionDenied
            | Code::InvalidArgument
            | Code::NotFound
            | Code::FailedPrecondition
            | Code::AlreadyExists
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::DataLoss => return Err(status),
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable => {}
        }
        // Between half of the pause and all of it, so that clients do not come all at once.
        let random = std::hash::BuildHasher::hash_one(&std::collections::hash_map::RandomState::new(), ());
        let share = 0.5 + f64::from(u32::try_from(random % 1_000).unwrap_or(0)) / 2_000.0;
        tokio::time::sleep(self.pause.mul_f64(share)).await;
        self.pause = (self.pause * 2).min(Self::LONGEST);
        Ok(())
    }
}
