//! The audit record of a write: who did what to which image, and what came of it. It goes to the log, under the target `audit`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use edge::telemetry::{self, AUDIT};
use tonic::Code;

use super::code;
use crate::access::Principal;

/// Where the handler of a write leaves what is to be recorded. Every call has one; those that only read leave it empty.
#[derive(Clone, Debug, Default)]
pub(super) struct Audit(Arc<Mutex<Option<Record>>>);

#[derive(Debug)]
struct Record {
    caller: String,
    action: &'static str,
    target: String,
    request_id: String,
    validate_only: bool,
}

impl Audit {
    /// That of a call.
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    /// A write has begun: `target` is the image, or what else it is about; empty for what it makes.
    pub(super) fn write(
        &self,
        caller: &Principal,
        action: &'static str,
        target: String,
        request_id: &str,
        validate_only: bool,
    ) {
        let (caller, request_id) = (caller.subject().to_owned(), request_id.to_owned());
        *self.record() = Some(Record { caller, action, target, request_id, validate_only });
    }

    /// The write was about this, as is known by now.
    pub(super) fn is_about(&self, target: impl ToString) {
        if let Some(record) = self.record().as_mut() {
            record.target = target.to_string();
        }
    }

    /// A part of the write, a row of a batch, ended with `code`.
    pub(super) fn part(&self, target: &str, code: Code) {
        if let Some(record) = self.record().as_ref() {
            record.tell(target, code::name(code));
        }
    }

    /// Records the write when it is concluded, or given up.
    pub(super) fn begin(self) -> Audited {
        Audited { audit: self, code: None }
    }

    fn record(&self) -> MutexGuard<'_, Option<Record>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Record {
    fn tell(&self, target: &str, outcome: &str) {
        let Self { caller, action, request_id, validate_only, target: _ } = self;
        let trace_id = telemetry::trace_id();
        tracing::info!(target: AUDIT, caller, action, target, outcome, request_id, validate_only, trace_id, "write");
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
            record.tell(&record.target, self.code.map_or("UNKNOWN", code::name));
        }
    }
}
