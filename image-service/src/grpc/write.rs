//! What every write has: a `request_id` and `validate_only`.

use edge::telemetry;
use prost::Message;
use proto::images as wire;
use ring::digest::{SHA256, digest};
use tracing::Span;

use super::{audit::Audit, authentication::caller};
use crate::{
    error::{Error, Violations},
    request::{Request, RequestId},
};

/// The request of a write.
pub(super) trait WriteRequest: Message {
    const NAME: &str;
    fn request_id(&mut self) -> &mut String;
    fn validate_only(&self) -> bool;
    /// What it is about; empty for what it makes.
    fn target(&self) -> String;
}

macro_rules! write_requests {
    ($($name:ident by $target:expr),+ $(,)?) => {
        $(impl WriteRequest for wire::$name {
            const NAME: &str = stringify!($name);

            fn request_id(&mut self) -> &mut String {
                &mut self.request_id
            }

            fn validate_only(&self) -> bool {
                self.validate_only
            }

            fn target(&self) -> String {
                let target: fn(&Self) -> String = $target;
                target(self)
            }
        })+
    };
}

write_requests!(
    CreateImageRequest by |_| String::new(),
    UpdateImageRequest by |write| write.image.as_ref().map(|image| image.id.clone()).unwrap_or_default(),
    DeleteImageRequest by |write| write.id.clone(),
    EnableImageRequest by |write| write.id.clone(),
    DisableImageRequest by |write| write.id.clone(),
    BuildImageRequest by |write| write.id.clone(),
    CancelBuildRequest by |write| write.id.clone(),
    BatchImagesRequest by |write| format!("{} images", write.targets.len()),
    SnapshotWorkspaceRequest by |_| String::new(),
    GrantAccessRequest by |write| write.image_id.clone(),
    RevokeAccessRequest by |write| write.image_id.clone(),
    DrainWorkerRequest by |write| write.name.clone(),
    ResumeWorkerRequest by |write| write.name.clone(),
);

/// Opens a write: its message, how the caller wants it written, and what is wrong with that. What is left of the message is its
/// content.
pub(super) fn open<T: WriteRequest>(
    request: tonic::Request<T>,
) -> Result<(T, Request, Violations), tonic::Status> {
    let caller = caller(&request)?;
    let audit = Audit::of(&request);
    let mut message = request.into_inner();
    let mut violations = Violations::default();
    let text = std::mem::take(message.request_id());
    audit.write(
        &caller,
        T::NAME.trim_end_matches("Request"),
        message.target(),
        &text,
        message.validate_only(),
    );
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
    let trace = telemetry::traceparent(&Span::current());
    let request = Request { caller, id, validate_only: message.validate_only(), trace };
    Ok((message, request, violations))
}
