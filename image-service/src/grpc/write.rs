//! What every write has: a `request_id` and `validate_only`.

use prost::Message;
use proto::images as wire;
use ring::digest::{SHA256, digest};

use super::authentication::caller;
use crate::{
    error::{Error, Violations},
    request::{Request, RequestId},
};

/// The request of a write.
pub(super) trait WriteRequest: Message {
    const NAME: &str;
    fn request_id(&mut self) -> &mut String;
    fn validate_only(&self) -> bool;
}

macro_rules! write_requests {
    ($($name:ident),+ $(,)?) => {
        $(impl WriteRequest for wire::$name {
            const NAME: &str = stringify!($name);

            fn request_id(&mut self) -> &mut String {
                &mut self.request_id
            }

            fn validate_only(&self) -> bool {
                self.validate_only
            }
        })+
    };
}

write_requests!(
    CreateImageRequest,
    UpdateImageRequest,
    DeleteImageRequest,
    EnableImageRequest,
    DisableImageRequest,
    BuildImageRequest,
    CancelBuildRequest,
    BatchImagesRequest,
    SnapshotWorkspaceRequest,
    GrantAccessRequest,
    RevokeAccessRequest,
    DrainWorkerRequest,
    ResumeWorkerRequest,
);

/// Opens a write: its message, how the caller wants it written, and what is wrong with that. What is left of the message is its
/// content.
pub(super) fn open<T: WriteRequest>(
    request: tonic::Request<T>,
) -> Result<(T, Request, Violations), tonic::Status> {
    let caller = caller(&request)?;
    let mut message = request.into_inner();
    let mut violations = Violations::default();
    let text = std::mem::take(message.request_id());
    let mut id = None;
    if !text.is_empty() {
        let mut content = T::NAME.as_bytes().to_vec();
        // Otherwise the content of one call could be read as that of a call of a longer name.
        content.push(0);
        message.encode(&mut content).map_err(|error| Error::Internal(Box::new(error)))?;
        let digest: String =
            digest(&SHA256, &content).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        id = violations.take("request_id", RequestId::parse(text, digest));
    }
    let request = Request { caller, id, validate_only: message.validate_only() };
    Ok((message, request, violations))
}
