//! The audit record of a write: who did what to which image, and what came of it. It goes to the log, under the target `audit`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use edge::telemetry::{self, AUDIT};
use tonic::Code;

use super::{code, write};
use crate::access::Principal;

/// The one that does not come in one message.
const UPLOAD: &str = "UploadContext";

/// Where the handler of a write leaves what is to be recorded. Every call has one; those that only read leave it empty.
#[derive(Clone, Debug, Default)]
pub(super) struct Audit {
    /// The name of the RPC if it writes.
    action: Option<&'static str>,
    record: Arc<Mutex<Option<Record>>>,
}

#[derive(Debug)]
struct Record {
    caller: String,
    action: &'static str,
    target: String,
    detail: String,
    /// The targets of a batch that nothing was told of yet.
    parts: Vec<String>,
    request_id: String,
    validate_only: bool,
}

/// What a write is about, as it was sent.
#[derive(Debug, Default)]
pub(super) struct About {
    /// The image, or what else; empty for what is made.
    pub(super) target: String,
    /// What is done, where the action does not say it.
    pub(super) detail: String,
    /// The images of a batch.
    pub(super) parts: Vec<String>,
}

impl Audit {
    /// For a call of `package.Service/Method`.
    pub(super) fn for_call(method: &str) -> Self {
        let name = method.rsplit('/').next().unwrap_or_default();
        let action = write::NAMES.into_iter().chain([UPLOAD]).find(|action| *action == name);
        Self { action, ..Self::default() }
    }

    /// Somebody asks for a write, who may yet be refused before it is known for what.
    pub(super) fn asked_by(&self, caller: &Principal) {
        if self.action.is_some() {
            self.write(caller, About::default(), "", false);
        }
    }

    /// That of a call.
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    /// How many characters of what a caller has sent are told.
    const LONGEST: usize = 128;

    /// A write has begun.
    pub(super) fn write(&self, caller: &Principal, about: About, request_id: &str, validate_only: bool) {
        let cut = |text: &str| text.chars().take(Self::LONGEST).collect::<String>();
        *self.record() = Some(Record {
            caller: caller.subject().to_owned(),
            action: self.action.unwrap_or_default(),
            target: cut(&about.target),
            detail: cut(&about.detail),
            // A preview writes nothing, and may be asked for again and again.
            parts: if validate_only {
                Vec::new()
            } else {
                about.parts.iter().map(|part| cut(part)).collect()
            },
            request_id: cut(request_id),
            validate_only,
        });
    }

    /// The write was about this, as is known by now.
    pub(super) fn is_about(&self, target: impl ToString) {
        if let Some(record) = self.record().as_mut() {
            record.target = target.to_string();
        }
    }

    /// The parts of the write, the rows of a batch, ended with these codes.
    pub(super) fn parts_ended(&self, codes: impl Iterator<Item = Code>) {
        if let Some(record) = self.record().as_mut() {
            for (part, code) in std::mem::take(&mut record.parts).into_iter().zip(codes) {
                record.tell(&part, code::name(code));
            }
        }
    }

    /// Records the write when it is concluded, or given up.
    pub(super) fn begin(self) -> Audited {
        Audited { audit: self, code: None }
    }

    fn record(&self) -> MutexGuard<'_, Option<Record>> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Record {
    fn tell(&self, target: &str, outcome: &str) {
        let Self { caller, action, detail, request_id, validate_only, target: _, parts: _ } = self;
        let trace_id = telemetry::trace_id();
        tracing::info!(target: AUDIT, caller, action, target, detail, outcome, request_id, validate_only, trace_id, "write");
    }
}

/// A call whose write, if it is one, is recorded when this is dropped.
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
            // Whether a write that was given up is durable nobody has been told.
            let outcome = self.code.map_or("UNKNOWN", code::name);
            for target in record.parts.iter().chain([&record.target]) {
                record.tell(target, outcome);
            }
        }
    }
}
