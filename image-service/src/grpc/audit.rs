//! Audit records of writes: caller, action, image, and outcome. They are logged under the target `audit`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use service_runtime::telemetry::{self, AUDIT};
use tonic::Code;

use super::{code_names, write_request};
use crate::access::Principal;

/// The write that streams its messages.
const UPLOAD: &str = "UploadContext";

/// The audit record of a call, filled in by the handler of a write. That of a read stays empty.
#[derive(Clone, Debug, Default)]
pub(super) struct Audit {
    /// Name of the RPC, if it writes.
    action: Option<&'static str>,
    record: Arc<Mutex<Option<Record>>>,
}

#[derive(Debug)]
struct Record {
    caller: String,
    action: &'static str,
    target: String,
    detail: String,
    /// Targets of a batch without a recorded outcome.
    parts: Vec<String>,
    request_id: String,
    validate_only: bool,
}

/// The subject of a write, as sent by the caller.
#[derive(Debug, Default)]
pub(super) struct About {
    /// The image or other object; empty if it is yet to be created.
    pub(super) target: String,
    /// Details that the name of the action leaves open.
    pub(super) detail: String,
    /// The images of a batch.
    pub(super) parts: Vec<String>,
}

impl Audit {
    /// Creates the record of a call of `package.Service/Method`.
    pub(super) fn for_call(method: &str) -> Self {
        let name = method.rsplit('/').next().unwrap_or_default();
        let action = write_request::NAMES.into_iter().chain([UPLOAD]).find(|action| *action == name);
        Self { action, ..Self::default() }
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

    /// Maximum number of characters recorded of each text from the caller.
    const LONGEST: usize = 128;

    /// Records the start of a write.
    pub(super) fn write(&self, caller: &Principal, about: About, request_id: &str, validate_only: bool) {
        let cut = |text: &str| text.chars().take(Self::LONGEST).collect::<String>();
        *self.record() = Some(Record {
            caller: caller.subject().to_owned(),
            action: self.action.unwrap_or_default(),
            target: cut(&about.target),
            detail: cut(&about.detail),
            // A preview writes nothing, and may be repeated at will.
            parts: if validate_only {
                Vec::new()
            } else {
                about.parts.iter().map(|part| cut(part)).collect()
            },
            request_id: cut(request_id),
            validate_only,
        });
    }

    /// Sets the target of the write, once it is known.
    pub(super) fn is_about(&self, target: impl ToString) {
        if let Some(record) = self.record().as_mut() {
            record.target = target.to_string();
        }
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
        let Self { caller, action, detail, request_id, validate_only, target: _, parts: _ } = self;
        let trace_id = telemetry::trace_id();
        tracing::info!(target: AUDIT, caller, action, target, detail, outcome, request_id, validate_only, trace_id, "write");
    }
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
            for target in record.parts.iter().chain([&record.target]) {
                record.log(target, outcome);
            }
        }
    }
}
