use std::collections::BTreeMap;

use service_runtime::call_limits::CallRefusal;

use super::*;
use crate::{
    access::{Action, Role},
    build::BuildId,
    error::{CreatorQuota, Violations},
    image::ImageId,
};

/// Returns a status of every kind.
fn statuses() -> Vec<Status> {
    let time = Duration::from_secs(1);
    let obstacles =
        [Obstacle::Template, Obstacle::NotFinished, Obstacle::ArtifactMissing, Obstacle::Disabled];
    let refusals = [
        Refusal::BuildInProgress,
        Refusal::NoBuildInProgress,
        Refusal::BuildNotCancellable,
        Refusal::TemplateNotBuildable,
        Refusal::PulledNotWritten,
        Refusal::SnapshotNotWritten,
        Refusal::DockerfileInContext,
        Refusal::SnapshotNotFinished,
        Refusal::TooManyGrants,
        Refusal::SnapshotNotBuildable,
        Refusal::OtherBuild,
    ];
    let errors = [
        Error::Invalid(Violations::one("image.name", "must be given")),
        Error::NotFound(Resource::Image(ImageId::new())),
        Error::NotFound(Resource::Build(BuildId::new())),
        Error::NotFound(Resource::Worker("w1".to_owned())),
        Error::RoleMissing(Role::Builder),
        Error::WrongApi,
        Error::OtherWorker,
        Error::Forbidden(Action::Edit),
        Error::ReferenceTaken("a:b".to_owned()),
        Error::EtagMismatch,
        Error::RequestIdReused,
        Error::NotResolvable(obstacles.to_vec()),
        Error::RevisionUnavailable { oldest: 1 },
        Error::SequenceUnavailable { requested: 9, last: 1 },
        Error::TokenExpired,
        Error::WorkerConnected("w1".to_owned()),
        Error::ProtocolUnsupported { spoken: 0 },
        Error::SessionLost,
        Error::Draining,
        Error::UploadStalled,
        Error::TooManyUploads,
        Error::TooManyCalls { retry_after: time },
        Error::TooManyConcurrentCalls { limit: 1 },
        Error::TooManyBytes { limit: 1 },
        Error::TooManyStreams { limit: 1 },
        Error::TooManyWrites { limit: 1 },
        Error::TooManyPendingBuilds { limit: 1 },
        Error::CatalogueFull,
        Error::CreatorQuotaExceeded { quota: CreatorQuota::Bytes, limit: 1 },
        Error::CatalogueLoading,
        Error::Busy,
        Error::StorageFull,
        Error::Internal("broken".into()),
    ];
    let before_authentication = [
        CallRefusal::TooManyConnections,
        CallRefusal::TooManyCalls,
        CallRefusal::HeadersTooLarge,
        CallRefusal::RequestIncomplete,
    ];
    let tokens = [None, Some(TokenError::Invalid), Some(TokenError::Expired)];
    let others = [undecodable(), too_large(), too_late(), unimplemented(false), unimplemented(true)];
    (errors.into_iter().map(Status::from))
        .chain(refusals.into_iter().map(|refusal| Error::Refused(refusal).into()))
        .chain(before_authentication.into_iter().map(refused))
        .chain(tokens.into_iter().map(unauthenticated))
        .chain(others)
        .collect()
}

/// Returns the code and the details of a status, as the manual describes them.
fn described(status: &Status) -> (String, String) {
    let details = status.get_error_details();
    let metadata = details.error_info().map(|info| &info.metadata).into_iter().flatten();
    let described = metadata
        .map(|(key, _)| format!("metadata `{key}`"))
        .chain(details.bad_request().map(|_| "BadRequest".to_owned()))
        .chain(details.precondition_failure().map(|_| "PreconditionFailure".to_owned()))
        .chain(details.retry_info().map(|_| "RetryInfo".to_owned()));
    let code = super::super::code_names::name(status.code()).to_owned();
    (code, described.collect::<Vec<_>>().join(", "))
}

/// Returns the manual's table: the code and the details of each reason.
fn table() -> BTreeMap<String, (String, String)> {
    let manual = include_str!("../../../../proto/api/trailer/images/v1/image_service.proto");
    let rows = manual.lines().skip_while(|line| !line.starts_with("//   UNAUTHENTICATED"));
    let mut table = BTreeMap::new();
    for row in rows.take_while(|line| line.contains('|')) {
        let cells: Vec<&str> = row.trim_start_matches("//").split('|').map(str::trim).collect();
        let [code, reasons, details] = cells[..] else { panic!("{row}") };
        for reason in reasons.split(", ") {
            table.insert(reason.to_owned(), (code.to_owned(), details.to_owned()));
        }
    }
    table
}

#[test]
fn every_status_is_as_the_manual_says() {
    let mut given = BTreeMap::new();
    for status in statuses() {
        let details = status.get_error_details();
        let info = details.error_info().unwrap_or_else(|| panic!("{status:?} has no ErrorInfo"));
        assert_eq!(info.domain, DOMAIN);
        let described = described(&status);
        let before = given.insert(info.reason.clone(), described.clone());
        assert!(before.is_none_or(|before| before == described), "{}: {described:?}", info.reason);
    }
    assert_eq!(given, table());
}
