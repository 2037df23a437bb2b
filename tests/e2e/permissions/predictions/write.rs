//! Any write, previewed or performed.

use prost::Message as _;
use proto::images::{self as api, batch_result::Result as Outcome};
use tonic::{Code, Status};

use super::answer::Answer;
use crate::client::Client;

#[derive(Debug)]
pub(super) enum Write {
    Create(api::CreateImageRequest),
    Update(api::UpdateImageRequest),
    Delete(api::DeleteImageRequest),
    Enable(api::EnableImageRequest),
    Disable(api::DisableImageRequest),
    Build(api::BuildImageRequest),
    Cancel(api::CancelBuildRequest),
    Batch(api::BatchImagesRequest),
    Snapshot(api::SnapshotWorkspaceRequest),
    Grant(api::GrantAccessRequest),
    Revoke(api::RevokeAccessRequest),
    Drain(api::DrainWorkerRequest),
    Resume(api::ResumeWorkerRequest),
}

impl Write {
    pub(super) async fn perform(&self, client: &Client, validate_only: bool) -> Result<Answer, Status> {
        macro_rules! call {
            ($service:ident.$rpc:ident($request:expr)) => {{
                let mut request = $request.clone();
                request.validate_only = validate_only;
                client.$service.clone().$rpc(request).await?.into_inner()
            }};
        }
        Ok(match self {
            Self::Create(request) => {
                let response = call!(images.create_image(request));
                Answer::new(response.image, response.build)
            }
            Self::Update(request) => Answer::new(call!(images.update_image(request)).image, None),
            Self::Delete(request) => {
                call!(images.delete_image(request));
                Answer::default()
            }
            Self::Enable(request) => Answer::new(call!(images.enable_image(request)).image, None),
            Self::Disable(request) => Answer::new(call!(images.disable_image(request)).image, None),
            Self::Build(request) => {
                let response = call!(images.build_image(request));
                Answer::new(response.image, response.build)
            }
            Self::Cancel(request) => {
                let response = call!(images.cancel_build(request));
                Answer::new(response.image, response.build)
            }
            Self::Batch(request) => {
                let rows = call!(images.batch_images(request)).results;
                Answer { images: rows.into_iter().map(outcome).collect(), ..Answer::default() }
            }
            Self::Snapshot(request) => {
                let response = call!(images.snapshot_workspace(request));
                Answer::new(response.image, response.build)
            }
            Self::Grant(request) => {
                Answer { grant: call!(access.grant_access(request)).grant, ..Answer::default() }
            }
            Self::Revoke(request) => {
                call!(access.revoke_access(request));
                Answer::default()
            }
            Self::Drain(request) => {
                Answer { worker: call!(workers.drain_worker(request)).worker, ..Answer::default() }
            }
            Self::Resume(request) => {
                Answer { worker: call!(workers.resume_worker(request)).worker, ..Answer::default() }
            }
        })
    }

    /// Returns whether the write is a batch that names an image twice.
    pub(super) fn repeats_a_row(&self) -> bool {
        let Self::Batch(batch) = self else {
            return false;
        };
        let mut ids: Vec<_> = batch.targets.iter().map(|target| &target.id).collect();
        ids.sort();
        ids.windows(2).any(|pair| pair[0] == pair[1])
    }
}

fn outcome(row: api::BatchResult) -> Result<api::Image, Status> {
    match row.result.expect("an outcome") {
        Outcome::Image(image) => Ok(image),
        Outcome::Error(error) => {
            let details = error.encode_to_vec().into();
            Err(Status::with_details(Code::from(error.code), error.message, details))
        }
    }
}
