//! Audit records of writes, and of what workers read: caller, action, image, and outcome. They are logged under the
//! target `audit`.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use service_runtime::telemetry::{self, AUDIT};
use tonic::Code;

use super::{code_names, write_request};
use crate::{access::Principal, request::Created};

/// The write that streams its messages.
const UPLOAD: &str = "UploadContext";
/// The read of an archive by a worker.
const FETCH: &str = "FetchContext";
/// The connection of a worker.
const CONNECT: &str = "Connect";

/// The audit record of a call, filled in by the handler of a write. That of a read stays empty.
#[derive(Clone, Debug, Default)]
pub(super) struct Audit {
    /// Name of the RPC, if it writes.
    action: Option<&'static str>,
    peer: Option<SocketAddr>,
    record: Arc<Mutex<Option<Record>>>,
}

#[derive(Debug)]
struct Record {
    caller: String,
    /// Address of the caller's connection.
    peer: Option<SocketAddr>,
    action: &'static str,
    target: String,
    details: Details,
    /// Targets of a batch without a recorded outcome.
    parts: Vec<String>,
    request_id: String,
    validate_only: bool,
    created: Created,
}

/// The subject of a write, as sent by the caller.
#[derive(Debug, Default)]
pub(super) struct About {
    /// The image or other object; empty if it is yet to be created.
    pub(super) target: String,
    pub(super) details: Details,
    /// The images of a batch.
    pub(super) parts: Vec<String>,
}

/// Details of a write beyond the name of its action, each in a field of its own; empty if it does not apply.
#[derive(Debug, Default)]
pub(super) struct Details {
    /// Action of a batch.
    pub(super) batch_action: &'static str,
    /// Subject whose permissions change, and those that it is granted.
    pub(super) grantee: String,
    pub(super) permissions: String,
    /// Image, container and worker of a snapshot, and the subject that it is created for.
    pub(super) source: String,
    pub(super) container: String,
    pub(super) worker: String,
    pub(super) creator: String,
}

impl Audit {
    /// Creates the record of a call of `package.Service/Method`.
    pub(super) fn for_call(method: &str, peer: Option<SocketAddr>) -> Self {
        let name = method.rsplit('/').next().unwrap_or_default();
        let action = write_request::NAMES.into_iter().chain([UPLOAD, FETCH]).find(|action| *action == name);
        Self { action, peer, ..Self::default() }
    }

    /// Records the caller of a write, which may be refused before its target is known.
    pub(super) fn asked_by(&self, caller: &Principal) {
        if self.action.is_some() {
            self.write(caller, About::default(), "", false);
        }
    }

    /// Returns the record of a call.
    pub(super) fn new<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    /// Records the start of a write.
    pub(super) fn write(&self, caller: &Principal, about: About, request_id: &str, validate_only: bool) {
        let cut = |text: &str| cut(text).to_owned();
        *self.record() = Some(Record {
            caller: caller.subject().to_owned(),
            peer: self.peer,
            action: self.action.unwrap_or_default(),
            target: cut(&about.target),
            details: about.details,
            // A preview writes nothing, and may be repeated at will.
            parts: if validate_only {
                Vec::new()
            } else {
                about.parts.iter().map(|part| cut(part)).collect()
            },
            request_id: cut(request_id),
            validate_only,
            created: Created::default(),
        });
    }

    /// Returns where the write leaves the image that it creates.
    pub(super) fn created(&self) -> Created {
        self.record().as_ref().map(|record| record.created.clone()).unwrap_or_default()
    }

    /// Sets the target of the write, once it is known.
    pub(super) fn is_about(&self, target: impl ToString) {
        if let Some(record) = self.record().as_mut() {
            record.target = target.to_string();
        }
    }

    /// Records a connection of a worker, which was admitted or refused with this status.
    pub(super) fn connected(worker: &Principal, peer: Option<SocketAddr>, code: Code) {
        let audit = Self { action: Some(CONNECT), peer, ..Self::default() };
        audit.write(worker, About { target: worker.subject().to_owned(), ..About::default() }, "", false);
        audit.begin().conclude(code);
    }

    /// Records the outcomes of the rows of a batch.
    pub(super) fn parts_ended(&self, codes: impl Iterator<Item = Code>) {
        if let Some(record) = self.record().as_mut() {
            for (part, code) in std::mem::take(&mut record.parts).into_iter().zip(codes) {
                record.log(&part, code_names::name(code));
            }
        }
    }

    /// Returns a guard that records the write when it is concluded or abandoned.
    pub(super) fn begin(self) -> Audited {
        Audited { audit: self, code: None }
    }

    fn record(&self) -> MutexGuard<'_, Option<Record>> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Record {
    fn log(&self, target: &str, outcome: &str) {
        let Self { caller, peer, action, details, request_id, validate_only, .. } = self;
        let Details { batch_action, grantee, permissions, source, container, worker, creator } = details;
        let trace_id = telemetry::trace_id();
        tracing::info!(
            target: AUDIT,
            caller,
            peer = peer.map(tracing::field::display),
            action,
            target,
            batch_action = given(batch_action),
            grantee = given(grantee),
            permissions = given(permissions),
            source = given(source),
            container = given(container),
            worker = given(worker),
            creator = given(creator),
            outcome,
            request_id,
            validate_only,
            trace_id,
            "write"
        );
    }
}

/// Returns what is logged of a text that is not empty; an empty field is left out.
fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then(|| cut(text))
}

/// Returns the beginning of a text from the caller. A subject fits as a whole: it has at most 255 bytes.
fn cut(text: &str) -> &str {
    const MAX_CHARS: usize = 255;
    text.char_indices().nth(MAX_CHARS).map_or(text, |(end, _)| &text[..end])
}

/// A guard that records the write of a call, if there is one, when dropped.
#[derive(Debug)]
pub(super) struct Audited {
    audit: Audit,
    code: Option<Code>,
}

impl Audited {
    pub(super) fn conclude(mut self, code: Code) {
        self.code = Some(code);
    }
}

impl Drop for Audited {
    fn drop(&mut self) {
        if let Some(record) = self.audit.record().take() {
            // It is unknown whether an abandoned write was committed.
            let outcome = self.code.map_or("UNKNOWN", code_names::name);
            let created = record.created.get().map(|image| image.to_string()).unwrap_or_default();
            let target = if record.target.is_empty() { &created } else { &record.target };
            for target in record.parts.iter().chain([target]) {
                record.log(target, outcome);
            }
        }
    }
}
