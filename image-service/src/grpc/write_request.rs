//! The options that all writes share: `request_id` and `validate_only`.

use std::collections::BTreeSet;

use prost::Message;
use proto::images as wire;
use ring::digest::{SHA256, digest};
use service_runtime::telemetry;
use tracing::Span;

use super::{
    audit::{About, Audit, Details},
    authentication::caller,
    caller_limits, cost,
    image_service::batch,
};
use crate::{
    access::Grantee,
    error::{Error, Violations},
    request::{Request, RequestId},
};

/// The request of a write.
pub(super) trait WriteRequest: Message {
    const NAME: &str;
    fn request_id(&mut self) -> &mut String;
    fn validate_only(&self) -> bool;
    fn about(&self) -> About;

    /// Returns the cost of the call, in units of the call rate.
    fn cost(&self) -> u32 {
        cost::of_message(self.encoded_len())
    }
}

macro_rules! write_requests {
    ($($name:ident by $about:expr $(=> $cost:expr)?),+ $(,)?) => {
        /// The RPCs that write by a single message.
        pub(super) const NAMES: [&str; [$(stringify!($name)),+].len()] = [$(rpc(stringify!($name))),+];

        $(impl WriteRequest for wire::$name {
            const NAME: &str = stringify!($name);

            fn request_id(&mut self) -> &mut String {
                &mut self.request_id
            }

            fn validate_only(&self) -> bool {
                self.validate_only
            }

            fn about(&self) -> About {
                let about: fn(&Self) -> About = $about;
                about(self)
            }

            $(fn cost(&self) -> u32 {
                let cost: fn(&Self) -> u32 = $cost;
                cost(self)
            })?
        })+
    };
}

write_requests!(
    CreateImageRequest by |_| About::default(),
    UpdateImageRequest by |write| about(write.image.as_ref().map_or("", |image| &image.id)),
    DeleteImageRequest by |write| about(&write.id),
    EnableImageRequest by |write| about(&write.id),
    DisableImageRequest by |write| about(&write.id),
    BuildImageRequest by |write| about(&write.id),
    CancelBuildRequest by |write| about(&write.id),
    BatchImagesRequest by |write| About {
        target: format!("{} images", write.targets.len()),
        details: Details { batch_action: write.action().as_str_name(), ..Details::default() },
        parts: write.targets.iter().take(batch::MAX_TARGETS).map(|target| target.id.clone()).collect(),
    } => |write| cost::of_batch(write.targets.len()),
    SnapshotWorkspaceRequest by |write| About {
        details: Details {
            source: write.source_image_id.clone(),
            container: write.container.clone(),
            worker: write.worker.clone(),
            creator: write.creator.clone(),
            ..Details::default()
        },
        ..About::default()
    },
    GrantAccessRequest by |write| {
        let grant = write.grant.clone().unwrap_or_default();
        // A set, so that repeated ones cannot fill the record.
        let permissions: BTreeSet<&str> = grant.permissions().map(|permission| permission.as_str_name()).collect();
        let permissions = permissions.into_iter().collect::<Vec<_>>().join(" ");
        About {
            details: Details { grantee: shown(grant.grantee.map(Grantee::from)), permissions, ..Details::default() },
            ..about(&write.image_id)
        }
    },
    RevokeAccessRequest by |write| About {
        details: Details { grantee: shown(write.grantee.clone().map(Grantee::from)), ..Details::default() },
        ..about(&write.image_id)
    },
    DrainWorkerRequest by |write| about(&write.name),
    ResumeWorkerRequest by |write| about(&write.name),
);

/// Returns a grantee with its kind; empty if there is none.
fn shown(grantee: Option<Grantee>) -> String {
    grantee.map(|grantee| grantee.to_string()).unwrap_or_default()
}

/// Returns the name of the RPC of a request message.
const fn rpc(request: &str) -> &str {
    match request.as_bytes().split_last_chunk::<7>() {
        Some((_, b"Request")) => request.split_at(request.len() - 7).0,
        Some(_) | None => request,
    }
}

fn about(target: &str) -> About {
    About { target: target.to_owned(), ..About::default() }
}

/// Opens a write: returns its message, its options, and the violations found in these.
///
/// The request id is removed from the message, which leaves the content of the write.
///
/// # Errors
///
/// Returns [`Error::TooManyCalls`] if the caller has too few units left for the call.
pub(super) fn open<T: WriteRequest>(
    request: tonic::Request<T>,
) -> Result<(T, Request, Violations), tonic::Status> {
    let caller = caller(&request)?;
    let audit = Audit::new(&request);
    let admitted = caller_limits::admit_cost(&request, request.get_ref().cost());
    let mut message = request.into_inner();
    let mut violations = Violations::default();
    let text = std::mem::take(message.request_id());
    audit.write(&caller, message.about(), &text, message.validate_only());
    let created = audit.created();
    admitted?;
    let mut id = None;
    if !text.is_empty() {
        let mut content = T::NAME.as_bytes().to_vec();
        // Otherwise the content could equal that of a request with a longer name.
        content.push(0);
        message.encode(&mut content).map_err(|error| Error::Internal(Box::new(error)))?;
        let digest = hex::encode(digest(&SHA256, &content));
        id = violations.take("request_id", RequestId::parse(text, digest));
    }
    let trace = telemetry::traceparent(&Span::current());
    let request = Request { caller, id, validate_only: message.validate_only(), trace, created };
    Ok((message, request, violations))
}
