//! Conversion from and to the messages of the dispatch protocol.

use std::collections::{BTreeMap, BTreeSet};

use proto::dispatch as wire;

use crate::{
    access::{Pools, is_subject},
    build::{BuildId, DistantBase, Failure, Fault, LineStart, LogStream, RecordedEvent, StepState},
    build_context::ContextDigest,
    dispatch::{
        Attempt, Hello, KeptAttempt, PROTOCOL_VERSION, Report, Reported, ToWorker, Welcome, WithheldAbility,
        WorkerEvent,
    },
    error::{Error, Violations},
    grpc::{dispatch_service::assignment, field},
    image::{Capability, ImageId},
    queue::Queue,
    timestamp::Timestamp,
};

const MAX_LABELS: usize = 64;
const MAX_CAPABILITIES: usize = 64;
const MAX_INSTANCE: usize = 64;
const MAX_REASON: usize = 1024;
const MAX_WITHHELD: usize = 64;
const MAX_WITHHELD_TEXT: usize = 120;
const MAX_HELD: usize = 2_000;
const MAX_EVENTS: usize = 4_096;
/// Maximum length of a line, a name or a message, in bytes. Longer ones are truncated.
const MAX_TEXT: usize = 16 * 1024;
const MAX_STEPS: i32 = 10_000;
const MAX_LAST_LINES: usize = 20;

/// Parses and checks the hello of a worker.
///
/// A worker with another version of the protocol may give its fields another meaning. From its hello only the
/// name, the instance, the labels and the version of the engine are taken, as far as they are valid.
///
/// # Errors
///
/// Returns [`Error::Invalid`] if the hello has invalid fields.
pub(super) fn hello(hello: wire::Hello) -> Result<Hello, Error> {
    if hello.protocol_version != PROTOCOL_VERSION {
        return Ok(foreign_hello(hello));
    }
    let mut violations = Violations::default();
    if !(1..=1_000).contains(&hello.slots) {
        violations.add("hello.slots", "must be from 1 to 1,000");
    }
    if !labels_fit(&hello.labels) {
        violations.add(
            "hello.labels",
            format!("must be at most {MAX_LABELS}, of at most 255 bytes each and without control characters"),
        );
    }
    if hello.holds.len() > MAX_HELD {
        violations.add("hello.holds", format!("must be at most {MAX_HELD}"));
    }
    if hello.capabilities.len() > MAX_CAPABILITIES {
        violations.add("hello.capabilities", format!("must be at most {MAX_CAPABILITIES}"));
    }
    if hello.instance.is_empty() || !fits(&hello.instance, MAX_INSTANCE) {
        violations.add("hello.instance", "must have 1 to 64 bytes and no control characters");
    }
    for (field, text) in [
        ("hello.unsupported_reason", &hello.unsupported_reason),
        ("hello.engine_warning", &hello.engine_warning),
    ] {
        if !fits(text, MAX_REASON) {
            violations.add(field, format!("must have at most {MAX_REASON} bytes and no control characters"));
        }
    }
    if hello.withheld.len() > MAX_WITHHELD || !hello.withheld.iter().all(withheld_fits) {
        let rule = format!(
            "must be at most {MAX_WITHHELD}, each with an ability and a flaw, of at most {MAX_WITHHELD_TEXT} bytes a field and \
             without control characters"
        );
        violations.add("hello.withheld", rule);
    }
    violations.check()?;
    let holds =
        hello.holds.into_iter().map(|held| attempt("hello.holds", Some(held))).collect::<Result<_, _>>()?;
    Ok(Hello {
        name: hello.name,
        instance: hello.instance,
        labels: hello.labels,
        slots: hello.slots,
        engine_version: cut(hello.engine_version),
        capabilities: hello
            .capabilities
            .iter()
            .flat_map(|name| Capability::of_worker(name))
            .copied()
            .collect(),
        pools: Pools::default(),
        holds,
        protocol_version: hello.protocol_version,
        unsupported_reason: hello.unsupported_reason,
        withheld: hello.withheld.into_iter().map(Into::into).collect(),
        engine_warning: hello.engine_warning,
    })
}

/// Extracts what can be known of a worker with another version of the protocol.
fn foreign_hello(hello: wire::Hello) -> Hello {
    Hello {
        name: hello.name,
        instance: if fits(&hello.instance, MAX_INSTANCE) { hello.instance } else { String::new() },
        labels: if labels_fit(&hello.labels) { hello.labels } else { BTreeMap::new() },
        slots: 0,
        engine_version: cut(hello.engine_version),
        capabilities: BTreeSet::new(),
        pools: Pools::default(),
        holds: Vec::new(),
        protocol_version: hello.protocol_version,
        unsupported_reason: String::new(),
        withheld: Vec::new(),
        engine_warning: String::new(),
    }
}

fn labels_fit(labels: &BTreeMap<String, String>) -> bool {
    labels.len() <= MAX_LABELS && labels.iter().all(|(name, value)| fits(name, 255) && fits(value, 255))
}

fn withheld_fits(withheld: &wire::WithheldAbility) -> bool {
    let wire::WithheldAbility { ability, flaw, fixed_in } = withheld;
    !ability.is_empty()
        && !flaw.is_empty()
        && [ability, flaw, fixed_in].into_iter().all(|text| fits(text, MAX_WITHHELD_TEXT))
}

/// Reports whether a text is short enough and has no control characters.
fn fits(text: &str, max_bytes: usize) -> bool {
    text.len() <= max_bytes && !text.chars().any(char::is_control)
}

pub(super) fn report(report: wire::Report) -> Result<Report, Error> {
    if report.events.is_empty() || report.events.len() > MAX_EVENTS {
        let rule = format!("must be 1 to {MAX_EVENTS}");
        return Err(Error::Invalid(Violations::one("report.events", rule)));
    }
    if report.first_sequence < 1 || report.first_sequence > i64::MAX - MAX_EVENTS as i64 {
        return Err(Error::Invalid(Violations::one("report.first_sequence", "must be 1 or more")));
    }
    let attempt = attempt("report.attempt", report.attempt)?;
    let events = report.events.into_iter().map(reported).collect::<Result<_, _>>()?;
    Ok(Report { attempt, first_sequence: report.first_sequence, events })
}

fn reported(event: wire::ReportEvent) -> Result<Reported, Error> {
    use wire::report_event::Event;
    let time = event.time.map_or_else(Timestamp::now, |time| {
        let micros = time.seconds.saturating_mul(1_000_000);
        Timestamp::from_micros(micros.saturating_add(i64::from(time.nanos / 1_000)))
    });
    let event = match event.event {
        Some(Event::Started(_)) => WorkerEvent::Started,
        Some(Event::Step(step)) => WorkerEvent::Happened(RecordedEvent::Step {
            step: step.index.clamp(0, MAX_STEPS),
            name: cut(step.name),
            state: step_state(step.state)?,
            error: cut(step.error),
        }),
        Some(Event::Line(line)) => WorkerEvent::Happened(RecordedEvent::Line {
            step: line.step.clamp(-1, MAX_STEPS),
            stream: if line.stderr { LogStream::Stderr } else { LogStream::Stdout },
            start: line_start(line.start)?,
            text: cut(line.text),
        }),
        Some(Event::Gap(gap)) => {
            WorkerEvent::Happened(RecordedEvent::Gap { lines: gap.lines.max(0), message: cut(gap.message) })
        }
        Some(Event::Built(_)) => WorkerEvent::Built,
        Some(Event::Succeeded(succeeded)) => WorkerEvent::Succeeded {
            image_id: digest("image_id", succeeded.image_id)?.ok_or_else(|| {
                Error::Invalid(Violations::one("report.events.succeeded.image_id", "must be given"))
            })?,
            size_bytes: succeeded.size_bytes.max(0),
            repo_digest: digest("repo_digest", succeeded.repo_digest)?,
            config_digest: digest("config_digest", succeeded.config_digest)?,
        },
        Some(Event::Failed(failed)) => WorkerEvent::Failed(failure(failed)?),
        Some(Event::HandedBack(handed_back)) => WorkerEvent::HandedBack {
            reason: cut(handed_back.reason),
            base: handed_back.base.map(distant_base).transpose()?,
        },
        Some(Event::Stopped(stopped)) => WorkerEvent::Stopped { confirmed: stopped.confirmed },
        None => {
            return Err(Error::Invalid(Violations::one("report.events.event", "must be given")));
        }
    };
    Ok(Reported { time, event })
}

/// Parses a digest of an artifact; `None` if it was not reported.
fn digest(field: &str, digest: String) -> Result<Option<String>, Error> {
    if digest.is_empty() {
        return Ok(None);
    }
    match ContextDigest::parse(&digest) {
        Ok(_) => Ok(Some(digest)),
        Err(rule) => Err(Error::Invalid(Violations::one(format!("report.events.succeeded.{field}"), rule))),
    }
}

fn distant_base(base: wire::DistantBase) -> Result<DistantBase, Error> {
    const FIELD: &str = "report.events.handed_back.base";
    let image = ImageId(field::id(&format!("{FIELD}.image_id"), &base.image_id)?);
    if !is_subject(&base.worker) {
        let violation = Violations::one(format!("{FIELD}.worker"), "must be the name of a worker");
        return Err(Error::Invalid(violation));
    }
    Ok(DistantBase { image, worker: base.worker })
}

fn failure(failed: wire::Failed) -> Result<Failure, Error> {
    let fault = match failed.kind() {
        wire::FailureKind::User => Fault::User,
        wire::FailureKind::Timeout => Fault::Timeout,
        wire::FailureKind::Infrastructure => Fault::Infrastructure,
        wire::FailureKind::Unspecified => {
            let violation = Violations::one("report.events.failed.kind", "must be given");
            return Err(Error::Invalid(violation));
        }
    };
    Ok(Failure {
        fault,
        step: cut(failed.step),
        message: cut(failed.message),
        last_lines: failed.last_lines.into_iter().take(MAX_LAST_LINES).map(cut).collect(),
    })
}

fn step_state(number: i32) -> Result<StepState, Error> {
    Ok(match wire::StepState::try_from(number) {
        Ok(wire::StepState::Pending) => StepState::Pending,
        Ok(wire::StepState::Started) => StepState::Started,
        Ok(wire::StepState::Done) => StepState::Done,
        Ok(wire::StepState::Cached) => StepState::Cached,
        Ok(wire::StepState::Failed) => StepState::Failed,
        Ok(wire::StepState::Unspecified) | Err(_) => {
            let violation = Violations::one("report.events.step.state", "must be a known state");
            return Err(Error::Invalid(violation));
        }
    })
}

fn line_start(number: i32) -> Result<LineStart, Error> {
    Ok(match wire::LineStart::try_from(number) {
        Ok(wire::LineStart::Unspecified | wire::LineStart::NewLine) => LineStart::NewLine,
        Ok(wire::LineStart::Continuation) => LineStart::Continuation,
        Ok(wire::LineStart::Replacement) => LineStart::Replacement,
        Err(_) => {
            let violation = Violations::one("report.events.line.start", "must be a known start");
            return Err(Error::Invalid(violation));
        }
    })
}

pub(super) fn attempt(name: &str, attempt: Option<wire::Attempt>) -> Result<Attempt, Error> {
    let attempt = attempt.ok_or_else(|| Error::Invalid(Violations::one(name, "must be given")))?;
    let build = BuildId(field::id(&format!("{name}.build_id"), &attempt.build_id)?);
    if attempt.number < 1 {
        return Err(Error::Invalid(Violations::one(format!("{name}.number"), "must be at least 1")));
    }
    Ok(Attempt { build, number: attempt.number })
}

pub(super) fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|&end| text.is_char_boundary(end));
        text.truncate(end.unwrap_or(0));
    }
    // Not every database can store NUL.
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

pub(super) fn welcome(welcome: Welcome, queue: &Queue) -> wire::ConnectResponse {
    let (times, stop_timeout) = (queue.times(), queue.policy().stop_timeout);
    answer(wire::connect_response::Message::Welcome(wire::Welcome {
        session_id: welcome.session,
        heartbeat_interval: prost_types::Duration::try_from(times.heartbeat).ok(),
        stop_after: prost_types::Duration::try_from(times.stop_after).ok(),
        stop_timeout: prost_types::Duration::try_from(stop_timeout).ok(),
        keep: welcome.keep.into_iter().map(kept).collect(),
        drop: welcome.drop.into_iter().map(Into::into).collect(),
        catalogue_id: queue.catalogue_id().to_string(),
    }))
}

fn kept(kept: KeptAttempt) -> wire::KeptAttempt {
    wire::KeptAttempt {
        attempt: Some(kept.attempt.into()),
        acknowledged_sequence: kept.acknowledged,
        publish_granted: kept.publish_granted,
        cancel_requested: kept.cancel_requested,
    }
}

pub(super) fn to_worker(message: ToWorker) -> wire::ConnectResponse {
    use wire::connect_response::Message;
    answer(match message {
        ToWorker::HeartbeatAck(number) => Message::HeartbeatAck(wire::HeartbeatAck { number }),
        ToWorker::Assignment {
            attempt,
            image,
            reference,
            trust_domain,
            creator,
            requester,
            configuration,
            timeout,
            workspace,
            trace,
        } => Message::Assignment(wire::Assignment {
            attempt: Some(attempt.into()),
            image_id: image.to_string(),
            reference: reference.to_string(),
            timeout: prost_types::Duration::try_from(timeout).ok(),
            work: assignment::work(&configuration, workspace),
            traceparent: trace.unwrap_or_default(),
            trust_domain: trust_domain.to_string(),
            creator,
            pools: requester.pools.names().map(str::to_owned).collect(),
            requested_by: requester.subject,
        }),
        ToWorker::ReportAck { attempt, sequence } => {
            Message::ReportAck(wire::ReportAck { attempt: Some(attempt.into()), sequence })
        }
        ToWorker::PublishGrant(attempt) => {
            Message::PublishGrant(wire::PublishGrant { attempt: Some(attempt.into()) })
        }
        ToWorker::Cancel(attempt) => Message::Cancel(wire::Cancel { attempt: Some(attempt.into()) }),
        ToWorker::Drop(attempt) => Message::Drop(wire::Drop { attempt: Some(attempt.into()) }),
    })
}

fn answer(message: wire::connect_response::Message) -> wire::ConnectResponse {
    wire::ConnectResponse { message: Some(message) }
}

impl From<wire::WithheldAbility> for WithheldAbility {
    fn from(withheld: wire::WithheldAbility) -> Self {
        Self { ability: withheld.ability, flaw: withheld.flaw, fixed_in: withheld.fixed_in }
    }
}

impl From<Attempt> for wire::Attempt {
    fn from(attempt: Attempt) -> Self {
        Self { build_id: attempt.build.to_string(), number: attempt.number }
    }
}
