//! All calls on a single image, and their outcomes.

use prost::Message as _;
use proto::images::{self as api, batch_result::Result as Outcome};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    answers::{reason, without_ids},
    client::{Client, grant_of, revoked_from},
};

#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Call {
    GetImage,
    ListBuilds,
    GetBuild,
    WatchBuild,
    ResolveImage,
    RenderDockerfile,
    CloneImage,
    UpdateImage,
    BuildImage,
    CancelBuild,
    EnableImage,
    DisableImage,
    DeleteImage,
    ListGrants,
    GrantAccess,
    RevokeAccess,
}

/// The target of a call: an image and its latest build, if it has one.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) state: &'static str,
    pub(super) image: String,
    pub(super) build: String,
}

/// The mode of a call.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum How {
    /// A call with `validate_only`, if it has that field.
    Ask,
    /// A call with `validate_only` and an etag that the image does not have.
    AskWithStaleEtag,
    Do,
}

/// Subject that `GrantAccess` adds; [`REVOKED`] is the one that `RevokeAccess` removes.
const GRANTED: &str = "let-in";
pub(super) const REVOKED: &str = "shut-out";

impl Call {
    /// Returns whether the call takes an etag.
    pub(super) fn takes_etag(self) -> bool {
        use Call::{
            BuildImage, CancelBuild, DeleteImage, DisableImage, EnableImage, GrantAccess, RevokeAccess,
            UpdateImage,
        };
        matches!(
            self,
            UpdateImage
                | BuildImage
                | CancelBuild
                | EnableImage
                | DisableImage
                | DeleteImage
                | GrantAccess
                | RevokeAccess
        )
    }
}

impl How {
    fn fields(self) -> (String, bool) {
        match self {
            Self::Ask => (String::new(), true),
            Self::AskWithStaleEtag => ("stale".to_owned(), true),
            Self::Do => (String::new(), false),
        }
    }
}

/// Makes a call and returns the image in its response, if there is one.
pub(super) async fn attempt(
    client: &Client,
    call: Call,
    target: &Target,
    how: How,
) -> Result<Option<api::Image>, Status> {
    let Client { mut images, mut builds, mut access, .. } = client.clone();
    let (id, image_id, build_id) = (target.image.clone(), target.image.clone(), target.build.clone());
    let (etag, validate_only) = how.fields();
    let request_id = String::new();
    Ok(match call {
        Call::GetImage => images.get_image(api::GetImageRequest { id }).await?.into_inner().image,
        Call::ListBuilds => {
            let request = api::ListBuildsRequest { image_id, ..Default::default() };
            let found = builds.list_builds(request).await?.into_inner().builds;
            assert_eq!(found.first().map(|build| build.id.clone()).unwrap_or_default(), build_id);
            None
        }
        Call::GetBuild => {
            builds.get_build(api::GetBuildRequest { id: build_id }).await?;
            None
        }
        Call::WatchBuild => {
            let request = api::WatchBuildRequest { id: build_id, after_sequence: 0 };
            let first = builds.watch_build(request).await?.into_inner().message().await?;
            assert!(first.is_some(), "a build begins with an event");
            None
        }
        Call::ResolveImage => {
            images.resolve_image(api::ResolveImageRequest { id }).await?;
            None
        }
        Call::RenderDockerfile => {
            let subject = Some(api::render_dockerfile_request::Subject::Id(id));
            match images.render_dockerfile(api::RenderDockerfileRequest { subject }).await {
                // Only callers that see the image get this error.
                Err(status) if reason(&status) == "NO_DOCKERFILE" => None,
                answer => answer.map(|_| None)?,
            }
        }
        Call::CloneImage => {
            images.clone_image(api::CloneImageRequest { id }).await?;
            None
        }
        Call::UpdateImage => {
            let description = "edited".to_owned();
            let image = Some(api::Image { id, etag, description, ..Default::default() });
            let request = api::UpdateImageRequest { image, validate_only, ..Default::default() };
            images.update_image(request).await?.into_inner().image
        }
        Call::BuildImage => {
            let request = api::BuildImageRequest { id, etag, request_id, validate_only };
            images.build_image(request).await?.into_inner().image
        }
        Call::CancelBuild => {
            let request =
                api::CancelBuildRequest { id, etag, request_id, validate_only, ..Default::default() };
            images.cancel_build(request).await?.into_inner().image
        }
        Call::EnableImage => {
            let request = api::EnableImageRequest { id, etag, request_id, validate_only };
            images.enable_image(request).await?.into_inner().image
        }
        Call::DisableImage => {
            let request = api::DisableImageRequest { id, etag, request_id, validate_only };
            images.disable_image(request).await?.into_inner().image
        }
        Call::DeleteImage => {
            images.delete_image(api::DeleteImageRequest { id, etag, request_id, validate_only }).await?;
            None
        }
        Call::ListGrants => {
            access.list_grants(api::ListGrantsRequest { image_id, ..Default::default() }).await?;
            None
        }
        Call::GrantAccess => {
            let permissions = vec![api::Permission::View.into()];
            let grant = Some(grant_of(GRANTED, permissions));
            access
                .grant_access(api::GrantAccessRequest { image_id, etag, grant, request_id, validate_only })
                .await?;
            None
        }
        Call::RevokeAccess => {
            let grantee = revoked_from(REVOKED);
            let request = api::RevokeAccessRequest { image_id, etag, grantee, request_id, validate_only };
            access.revoke_access(request).await?;
            None
        }
    })
}

/// Makes a call for many images in one batch. Each outcome is as [`attempt`] returns it.
pub(super) async fn batch(
    client: &Client,
    action: api::BatchAction,
    targets: &[Target],
    how: How,
) -> Result<Vec<Result<Option<api::Image>, Status>>, Status> {
    let (etag, validate_only) = how.fields();
    let targets =
        targets.iter().map(|target| api::BatchTarget { id: target.image.clone(), etag: etag.clone() });
    let request = api::BatchImagesRequest {
        action: action.into(),
        targets: targets.collect(),
        validate_only,
        ..Default::default()
    };
    let results = client.images.clone().batch_images(request).await?.into_inner().results;
    let outcome = |result: api::BatchResult| match result.result.expect("an outcome") {
        Outcome::Image(image) => Ok(Some(image)),
        Outcome::Error(error) => {
            let details = error.encode_to_vec().into();
            Err(Status::with_details(Code::from(error.code), error.message, details))
        }
    };
    Ok(results.into_iter().map(outcome).collect())
}

/// Returns `OK`, or the code, the reason, the forbidden action, and the violated preconditions.
pub(super) fn status_text<T>(answer: &Result<T, Status>) -> String {
    let Err(status) = answer else {
        return "OK".to_owned();
    };
    let mut words = vec![format!("{:?}", status.code()), reason(status)];
    words.extend(status.get_details_error_info().and_then(|info| info.metadata.get("action").cloned()));
    let failed =
        status.get_details_precondition_failure().map(|failure| failure.violations).unwrap_or_default();
    if !failed.is_empty() {
        words.push(failed.into_iter().map(|violation| violation.r#type).collect::<Vec<_>>().join("+"));
    }
    words.join(" ")
}

/// An error as its caller receives it, except for the id that the request named; `None` for a success.
pub(super) type Wording = Option<(Code, String, String)>;

pub(super) fn wording<T>(answer: &Result<T, Status>) -> Wording {
    let status = answer.as_ref().err()?;
    Some((status.code(), without_ids(status.message().as_bytes()), without_ids(status.details())))
}
