//! An API client with methods for frequent test steps.

use std::net::SocketAddr;

use anyhow::Context as _;
use proto::{
    dispatch::dispatch_service_client::DispatchServiceClient,
    images::{
        self as api, access_service_client::AccessServiceClient, build_service_client::BuildServiceClient,
        context_service_client::ContextServiceClient, grant::Grantee, image_config::Source,
        image_service_client::ImageServiceClient, upload_context_request::Part,
        worker_service_client::WorkerServiceClient,
    },
};
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::stack::LIMIT;

/// The clients of all services for one caller.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) images: ImageServiceClient<Caller>,
    pub(crate) access: AccessServiceClient<Caller>,
    pub(crate) builds: BuildServiceClient<Caller>,
    pub(crate) contexts: ContextServiceClient<Caller>,
    pub(crate) workers: WorkerServiceClient<Caller>,
    pub(crate) dispatch: DispatchServiceClient<Caller>,
}

pub(crate) type Caller = InterceptedService<Channel, Bearer>;

/// An interceptor that adds a bearer token to every call, if it has one.
#[derive(Clone, Debug)]
pub(crate) struct Bearer(Option<AsciiMetadataValue>);

/// Returns a client of the service at `addr`.
pub(crate) fn client(addr: SocketAddr, token: &str) -> Client {
    client_on(channel(addr), token)
}

/// Returns a client on a connection that may be shared.
pub(crate) fn client_on(channel: Channel, token: &str) -> Client {
    let value = (!token.is_empty()).then(|| format!("Bearer {token}").parse().expect("tokens are ASCII"));
    let bearer = Bearer(value);
    Client {
        images: ImageServiceClient::with_interceptor(channel.clone(), bearer.clone()),
        access: AccessServiceClient::with_interceptor(channel.clone(), bearer.clone()),
        builds: BuildServiceClient::with_interceptor(channel.clone(), bearer.clone()),
        contexts: ContextServiceClient::with_interceptor(channel.clone(), bearer.clone()),
        workers: WorkerServiceClient::with_interceptor(channel.clone(), bearer.clone()),
        dispatch: DispatchServiceClient::with_interceptor(channel, bearer),
    }
}

/// Returns the repository with this name below a prefix that belongs to `creator`, a subject of ASCII letters
/// and dashes.
pub(crate) fn repository_under(prefix: impl std::fmt::Display, creator: &str, name: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, creator.as_bytes());
    let distinct = u32::from_be_bytes(digest.as_ref()[..4].try_into().expect("4 bytes"));
    format!("{prefix}/{}-{distinct:08x}/{name}", creator.to_lowercase())
}

/// Returns the repository with this name below the default prefix that belongs to `creator`.
pub(crate) fn repository(creator: &str, name: &str) -> String {
    repository_under("trailer.invalid", creator, name)
}

/// Returns the repository of an image's reference.
pub(crate) fn repository_of(image: &api::Image) -> &str {
    image.reference.rsplit_once(':').map_or(&image.reference, |(repository, _)| repository)
}

/// Returns a channel that connects at the first call.
pub(crate) fn channel(addr: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{addr}")).expect("an address makes a URL").connect_lazy()
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// Returns an image with a hand-written Dockerfile.
pub(crate) fn image(name: &str, dockerfile: &str) -> api::Image {
    let source = api::DockerfileSource { text: dockerfile.to_owned(), ..Default::default() };
    of_source(name, Source::Dockerfile(source))
}

/// Returns an image of a source.
pub(crate) fn of_source(name: &str, source: Source) -> api::Image {
    let config = api::ImageConfig { source: Some(source), ..Default::default() };
    api::Image { name: name.to_owned(), config: Some(config), ..Default::default() }
}

/// Returns a grant to a subject.
pub(crate) fn grant_of(subject: &str, permissions: Vec<i32>) -> api::Grant {
    api::Grant { grantee: Some(Grantee::Subject(subject.to_owned())), permissions }
}

/// Returns the grantee of a revocation.
pub(crate) fn revoked_from(subject: &str) -> Option<api::revoke_access_request::Grantee> {
    Some(api::revoke_access_request::Grantee::Subject(subject.to_owned()))
}

/// Returns the subject of a grant; empty if it is to others.
pub(crate) fn subject_of(grant: &api::Grant) -> &str {
    match &grant.grantee {
        Some(Grantee::Subject(subject)) => subject,
        Some(Grantee::Group(_) | Grantee::Everybody(_)) | None => "",
    }
}

impl Client {
    /// Creates an image and returns it with its first build.
    pub(crate) async fn create(&self, image: api::Image) -> Result<(api::Image, api::Build), Status> {
        let request = api::CreateImageRequest { image: Some(image), ..Default::default() };
        let response = self.images.clone().create_image(request).await?.into_inner();
        Ok((response.image.expect("an image"), response.build.expect("a build")))
    }

    /// Creates a template, which has no build.
    pub(crate) async fn create_template(&self, name: &str) -> Result<api::Image, Status> {
        let image = api::Image { template: true, ..image(name, "FROM scratch") };
        let request = api::CreateImageRequest { image: Some(image), ..Default::default() };
        Ok(self.images.clone().create_image(request).await?.into_inner().image.expect("an image"))
    }

    /// Uploads an archive in chunks of 64 KiB, after announcing its digest unless that is empty.
    pub(crate) async fn upload(
        &self,
        digest: &str,
        archive: &[u8],
    ) -> Result<api::UploadContextResponse, Status> {
        let start = Part::Start(api::UploadContextStart { digest: digest.to_owned() });
        let chunks = archive.chunks(64 * 1024).map(|chunk| Part::Chunk(chunk.to_vec().into()));
        self.upload_parts(std::iter::once(start).chain(chunks).collect()).await
    }

    pub(crate) async fn upload_parts(&self, parts: Vec<Part>) -> Result<api::UploadContextResponse, Status> {
        let parts = parts.into_iter().map(|part| api::UploadContextRequest { part: Some(part) });
        let parts = futures_util::stream::iter(parts.collect::<Vec<_>>());
        Ok(self.contexts.clone().upload_context(parts).await?.into_inner())
    }

    pub(crate) async fn get(&self, id: &str) -> Result<api::Image, Status> {
        let request = api::GetImageRequest { id: id.to_owned() };
        Ok(self.images.clone().get_image(request).await?.into_inner().image.expect("an image"))
    }

    pub(crate) async fn list(&self) -> Result<Vec<api::Image>, Status> {
        Ok(self.images.clone().list_images(api::ListImagesRequest::default()).await?.into_inner().images)
    }

    pub(crate) async fn build(&self, id: &str) -> Result<api::Build, Status> {
        let request = api::BuildImageRequest { id: id.to_owned(), ..Default::default() };
        Ok(self.images.clone().build_image(request).await?.into_inner().build.expect("a build"))
    }

    pub(crate) async fn cancel(&self, id: &str) -> Result<api::Build, Status> {
        let request = api::CancelBuildRequest { id: id.to_owned(), ..Default::default() };
        Ok(self.images.clone().cancel_build(request).await?.into_inner().build.expect("a build"))
    }

    pub(crate) async fn delete(&self, id: &str) -> Result<(), Status> {
        let request = api::DeleteImageRequest { id: id.to_owned(), ..Default::default() };
        self.images.clone().delete_image(request).await.map(|_| ())
    }

    pub(crate) async fn get_build(&self, id: &str) -> Result<api::Build, Status> {
        let request = api::GetBuildRequest { id: id.to_owned() };
        Ok(self.builds.clone().get_build(request).await?.into_inner().build.expect("a build"))
    }

    /// Returns all events of a build after a sequence number, once the build has ended.
    pub(crate) async fn history(&self, build: &str, after: i64) -> Result<Vec<api::BuildEvent>, Status> {
        let request = api::WatchBuildRequest { id: build.to_owned(), after_sequence: after };
        let mut messages = self.builds.clone().watch_build(request).await?.into_inner();
        let mut events = Vec::new();
        while let Some(message) = messages.message().await? {
            events.extend(message.events);
        }
        Ok(events)
    }

    /// Waits for the end of a build and returns it.
    pub(crate) async fn finished(&self, build: &str) -> anyhow::Result<api::Build> {
        tokio::time::timeout(LIMIT * 3, self.history(build, 0)).await.context("the build did not end")??;
        Ok(self.get_build(build).await?)
    }

    /// Waits until a build meets a condition, which is checked after each message of a watch.
    pub(crate) async fn until(
        &self,
        build: &str,
        condition: impl Fn(&api::Build) -> bool,
    ) -> anyhow::Result<api::Build> {
        let waiting = async {
            let request = api::WatchBuildRequest { id: build.to_owned(), after_sequence: 0 };
            let mut messages = self.builds.clone().watch_build(request).await?.into_inner();
            loop {
                let found = self.get_build(build).await?;
                if condition(&found) {
                    return Ok(found);
                }
                anyhow::ensure!(messages.message().await?.is_some(), "the build ended as {found:?}");
            }
        };
        tokio::time::timeout(LIMIT, waiting).await.context("the condition was not met")?
    }

    /// Sets what a subject may do with an image.
    pub(crate) async fn grant(
        &self,
        image: &str,
        subject: &str,
        permissions: &[api::Permission],
    ) -> Result<api::Grant, Status> {
        self.grant_to(image, Grantee::Subject(subject.to_owned()), permissions).await
    }

    /// Sets what a grantee may do with an image.
    pub(crate) async fn grant_to(
        &self,
        image: &str,
        grantee: Grantee,
        permissions: &[api::Permission],
    ) -> Result<api::Grant, Status> {
        let permissions = permissions.iter().map(|permission| i32::from(*permission)).collect();
        let grant = Some(api::Grant { grantee: Some(grantee), permissions });
        let request = api::GrantAccessRequest { image_id: image.to_owned(), grant, ..Default::default() };
        Ok(self.access.clone().grant_access(request).await?.into_inner().grant.expect("a grant"))
    }

    pub(crate) async fn revoke(&self, image: &str, subject: &str) -> Result<(), Status> {
        let (image_id, grantee) = (image.to_owned(), revoked_from(subject));
        let request = api::RevokeAccessRequest { image_id, grantee, ..Default::default() };
        self.access.clone().revoke_access(request).await.map(|_| ())
    }

    /// Returns all grants of an image, read page by page.
    pub(crate) async fn grants(&self, image: &str, page_size: i32) -> Result<Vec<api::Grant>, Status> {
        let mut request =
            api::ListGrantsRequest { image_id: image.to_owned(), page_size, ..Default::default() };
        let mut grants = Vec::new();
        loop {
            let page = self.access.clone().list_grants(request.clone()).await?.into_inner();
            grants.extend(page.grants);
            if page.next_page_token.is_empty() {
                return Ok(grants);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Returns the initial images of a new watch.
    pub(crate) async fn first_state(&self) -> Result<Vec<api::Image>, Status> {
        let request = api::WatchImagesRequest::default();
        let mut stream = self.images.clone().watch_images(request).await?.into_inner();
        let mut images = Vec::new();
        loop {
            match stream.message().await?.and_then(|message| message.event) {
                Some(api::watch_images_response::Event::Image(image)) => images.push(*image),
                Some(api::watch_images_response::Event::Synced(_)) => return Ok(images),
                event => panic!("{event:?} is not of the first state"),
            }
        }
    }
}
