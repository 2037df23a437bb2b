//! Writes that are repeated, only validated, or batched.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use image_service::Role;
use proto::images as api;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    actor::{Actor, hello},
    answers::{fields, refused},
    client::{Client, grant_of, image, revoked_from},
    stack::Service,
};

/// Validates a call, makes it twice with one request id, and then reuses that id with other content.
///
/// `$client.$rpc($request)` must succeed once; `$change` makes another request of it.
macro_rules! assert_repeatable {
    ($client:expr, $service:ident.$rpc:ident, $request:expr, $change:expr) => {{
        let mut request = $request;
        let mut client = $client.$service.clone();
        request.validate_only = true;
        request.request_id = format!("{}-1", stringify!($rpc));
        client.$rpc(request.clone()).await?;
        request.validate_only = false;
        let first = client.$rpc(request.clone()).await?.into_inner();
        let repeated = client.$rpc(request.clone()).await?.into_inner();
        assert_eq!(first, repeated, "{}", stringify!($rpc));
        let mut other = request.clone();
        let change: fn(&mut _) = $change;
        change(&mut other);
        assert_eq!(
            refused(client.$rpc(other).await),
            (Code::InvalidArgument, "REQUEST_ID_REUSED".to_owned()),
            "{}",
            stringify!($rpc)
        );
        request.request_id = "x y".to_owned();
        assert_eq!(fields(&client.$rpc(request).await.expect_err("a bad request id")), ["request_id"]);
        first
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_write_gets_its_first_answer() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let platform = service.client(&service.token("workspaces", &[Role::Service]));
    let create = api::CreateImageRequest { image: Some(image("A", "FROM scratch")), ..Default::default() };
    let rename = |request: &mut api::CreateImageRequest| request.image = Some(image("B", "FROM scratch"));
    let created = assert_repeatable!(alice, images.create_image, create, rename).image.expect("an image");
    assert_eq!(alice.list().await?.len(), 1, "one image was created");
    let id = || created.id.clone();
    let other = || uuid::Uuid::now_v7().to_string();

    let cancel = api::CancelBuildRequest { id: id(), ..Default::default() };
    assert_repeatable!(alice, images.cancel_build, cancel, |request: &mut api::CancelBuildRequest| {
        request.build_id = uuid::Uuid::now_v7().to_string();
    });
    let build = api::BuildImageRequest { id: id(), ..Default::default() };
    let built =
        assert_repeatable!(alice, images.build_image, build, |request: &mut api::BuildImageRequest| {
            request.id = uuid::Uuid::now_v7().to_string();
        });
    // The first answer is repeated, not the current state of the build.
    alice.cancel(&created.id).await?;
    let again =
        api::BuildImageRequest { id: id(), request_id: "build_image-1".to_owned(), ..Default::default() };
    assert_eq!(alice.images.clone().build_image(again).await?.into_inner(), built);
    assert_eq!(built.build.map(|build| build.number), Some(2));

    let update = api::UpdateImageRequest {
        image: Some(api::Image { id: id(), name: "C".to_owned(), ..Default::default() }),
        ..Default::default()
    };
    assert_repeatable!(alice, images.update_image, update, |request: &mut api::UpdateImageRequest| {
        request.image.iter_mut().for_each(|image| image.name = "D".to_owned());
    });
    let disable = api::DisableImageRequest { id: id(), ..Default::default() };
    assert_repeatable!(alice, images.disable_image, disable, |request: &mut api::DisableImageRequest| {
        request.etag = "0".to_owned();
    });
    let enable = api::EnableImageRequest { id: id(), ..Default::default() };
    assert_repeatable!(alice, images.enable_image, enable, |request: &mut api::EnableImageRequest| {
        request.etag = "0".to_owned();
    });
    let grant = grant_of("bob", vec![api::Permission::Modify.into()]);
    let grant = api::GrantAccessRequest { image_id: id(), grant: Some(grant), ..Default::default() };
    assert_repeatable!(alice, access.grant_access, grant, |request: &mut api::GrantAccessRequest| {
        request.grant.iter_mut().for_each(|grant| grant.permissions.clear());
    });
    let revoke =
        api::RevokeAccessRequest { image_id: id(), grantee: revoked_from("bob"), ..Default::default() };
    assert_repeatable!(alice, access.revoke_access, revoke, |request: &mut api::RevokeAccessRequest| {
        request.grantee = revoked_from("carol");
    });
    let snapshot = api::SnapshotWorkspaceRequest {
        source_image_id: id(),
        worker: "w1".to_owned(),
        container: "c".to_owned(),
        creator: "alice".to_owned(),
        image: Some(image("S", "")),
        ..Default::default()
    };
    assert_repeatable!(
        platform,
        images.snapshot_workspace,
        snapshot,
        |request: &mut api::SnapshotWorkspaceRequest| {
            request.container = "d".to_owned();
        }
    );
    let batch = api::BatchImagesRequest {
        action: api::BatchAction::Build.into(),
        targets: [id(), other()].map(|id| api::BatchTarget { id, ..Default::default() }).into(),
        ..Default::default()
    };
    let batch =
        assert_repeatable!(alice, images.batch_images, batch, |request: &mut api::BatchImagesRequest| {
            request.targets.pop();
        });
    assert_eq!(batch.results.len(), 2);
    let delete = api::DeleteImageRequest { id: id(), ..Default::default() };
    assert_repeatable!(alice, images.delete_image, delete, |request: &mut api::DeleteImageRequest| {
        request.id = uuid::Uuid::now_v7().to_string();
    });
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_is_its_callers_own_and_refusals_are_not_remembered() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let request = |name: &str| api::CreateImageRequest {
        image: Some(image(name, "FROM scratch")),
        request_id: "once".to_owned(),
        ..Default::default()
    };
    assert_eq!(refused(alice.images.clone().create_image(request("")).await).1, "INVALID_FIELDS");
    let (one, other) = (alice.clone(), alice.clone());
    let (mut one, mut other) = (one.images, other.images);
    let (one, other) = tokio::join!(one.create_image(request("A")), other.create_image(request("A")));
    assert_eq!(one?.into_inner(), other?.into_inner(), "both at once are one");
    let bobs = bob.images.clone().create_image(request("B")).await?.into_inner().image.expect("an image");
    assert_eq!(bobs.creator, "bob");
    let service = service.restart().await?;
    let again = service.builder("alice").images.clone().create_image(request("A")).await?.into_inner();
    assert_eq!(again.image.map(|image| image.name).as_deref(), Some("A"));
    assert_eq!(service.builder("alice").list().await?.len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_validated_write_leaves_no_trace() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    let before = alice.get(&created.id).await?;
    let request = api::CreateImageRequest {
        image: Some(image("A", "FROM scratch")),
        validate_only: true,
        ..Default::default()
    };
    let would = alice.images.clone().create_image(request).await?.into_inner().image.expect("an image");
    assert_eq!(refused(alice.get(&would.id).await).0, Code::NotFound);
    assert_ne!(would.reference, created.reference, "it says which reference is free");
    let request =
        api::DeleteImageRequest { id: created.id.clone(), validate_only: true, ..Default::default() };
    alice.images.clone().delete_image(request).await?;
    let request =
        api::BuildImageRequest { id: created.id.clone(), validate_only: true, ..Default::default() };
    assert_eq!(refused(alice.images.clone().build_image(request).await).1, "BUILD_IN_PROGRESS");
    assert_eq!(alice.get(&created.id).await?, before);
    let next = alice.create(image("B", "FROM scratch")).await?.0;
    assert_eq!(next.revision, before.revision + 1, "no revision was taken");
    Ok(())
}

/// Returns the outcome of a row of a batch, in short.
fn outcome(result: &api::BatchResult) -> String {
    match &result.result {
        Some(api::batch_result::Result::Image(image)) => {
            format!("{} enabled={:?}", image.id, image.enabled())
        }
        Some(api::batch_result::Result::Error(error)) => {
            let code = Code::from_i32(error.code);
            let status = tonic_types::Status::clone(error);
            let details = prost::Message::encode_to_vec(&status).into();
            let status = Status::with_details(code, &error.message, details);
            let info = status.get_details_error_info().expect("a reason");
            format!("{code:?} {}", info.reason)
        }
        None => "nothing".to_owned(),
    }
}

async fn batch(
    client: &Client,
    action: api::BatchAction,
    targets: &[api::BatchTarget],
    validate_only: bool,
) -> Result<Vec<api::BatchResult>, Status> {
    let request = api::BatchImagesRequest {
        action: action.into(),
        targets: targets.to_vec(),
        validate_only,
        ..Default::default()
    };
    Ok(client.images.clone().batch_images(request).await?.into_inner().results)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_rows_get_a_thousand_answers_as_predicted() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-calls", "0"]).await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let mut targets = Vec::new();
    let mut expected = Vec::new();
    let target = |id: &str, etag: &str| api::BatchTarget { id: id.to_owned(), etag: etag.to_owned() };
    // As many calls at once as may wait for their turn.
    let creating = (0..1_000_usize).map(|i| {
        let (alice, bob) = (alice.clone(), bob.clone());
        async move {
            let owner = if matches!(i % 8, 4 | 5) { &bob } else { &alice };
            let template = i % 8 == 7;
            let request = api::CreateImageRequest {
                image: Some(api::Image { template, ..image(&format!("Image {i}"), "FROM scratch") }),
                ..Default::default()
            };
            let image =
                owner.images.clone().create_image(request).await?.into_inner().image.expect("an image");
            let id = image.id.clone();
            match i % 8 {
                // A cancelled build can be started again.
                0..=3 => {
                    owner.cancel(&id).await?;
                }
                5 => {
                    let grant = grant_of("alice", vec![api::Permission::Delete.into()]);
                    let request =
                        api::GrantAccessRequest { image_id: id, grant: Some(grant), ..Default::default() };
                    owner.access.clone().grant_access(request).await?;
                }
                _ => {}
            }
            Ok::<_, Status>((i, image))
        }
    });
    let images: std::collections::BTreeMap<usize, api::Image> =
        stream::iter(creating).buffer_unordered(100).try_collect().await?;
    for (i, image) in &images {
        let id = image.id.as_str();
        let (named, answer) = match i % 8 {
            0 => (target(id, ""), format!("{id} enabled=true")),
            1 => (target(id, &image.etag), format!("{id} enabled=true")),
            2 => (target(id, "0"), "Aborted ETAG_MISMATCH".to_owned()),
            3 => (target("nonsense", ""), "InvalidArgument INVALID_FIELDS".to_owned()),
            4 => (target(id, ""), "NotFound IMAGE_NOT_FOUND".to_owned()),
            5 => (target(id, ""), "PermissionDenied ACTION_FORBIDDEN".to_owned()),
            6 => (target(id, ""), "FailedPrecondition BUILD_IN_PROGRESS".to_owned()),
            _ => (target(id, ""), "FailedPrecondition TEMPLATE_NOT_BUILDABLE".to_owned()),
        };
        targets.push(named);
        expected.push(answer);
    }
    let predicted = batch(&alice, api::BatchAction::Build, &targets, true).await?;
    let done = batch(&alice, api::BatchAction::Build, &targets, false).await?;
    assert_eq!(done.iter().map(outcome).collect::<Vec<_>>(), expected);
    assert_eq!(predicted.iter().map(outcome).collect::<Vec<_>>(), expected);
    assert!(done.iter().zip(&targets).all(|(result, target)| result.id == target.id));
    // The started builds are in progress now.
    let again = batch(&alice, api::BatchAction::Build, &targets[..2], false).await?;
    assert_eq!(again.iter().map(outcome).collect::<Vec<_>>(), ["FailedPrecondition BUILD_IN_PROGRESS"; 2]);
    let cancelled = batch(&alice, api::BatchAction::CancelBuild, &targets[..2], false).await?;
    assert!(
        cancelled.iter().all(|result| !outcome(result).contains(' ') || outcome(result).contains("enabled"))
    );
    let disabled = batch(&alice, api::BatchAction::Disable, &targets[..1], false).await?;
    assert_eq!(outcome(&disabled[0]), format!("{} enabled=false", targets[0].id));
    let twice = [targets[0].clone(), targets[0].clone()];
    let deleted = batch(&alice, api::BatchAction::Delete, &twice, false).await?;
    assert_eq!(outcome(&deleted[1]), "NotFound IMAGE_NOT_FOUND");
    assert_eq!(refused(alice.get(&targets[0].id).await).0, Code::NotFound);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_one_to_a_thousand_rows_of_a_known_action() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let target = api::BatchTarget { id: uuid::Uuid::now_v7().to_string(), ..Default::default() };
    let invalid = async |action, count: usize| {
        let answer = batch(&alice, action, &vec![target.clone(); count], false).await;
        fields(&answer.expect_err("it is refused"))
    };
    assert_eq!(invalid(api::BatchAction::Unspecified, 0).await, ["targets", "action"]);
    assert_eq!(invalid(api::BatchAction::Build, 1_001).await, ["targets"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_reaches_the_workers() -> anyhow::Result<()> {
    use proto::dispatch::{Started, Stopped, connect_response::Message, report_event::Event};
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    actor.report(&attempt, 1, vec![Event::Started(Started {})]).await;
    actor.acknowledged().await?;
    let target = api::BatchTarget { id: created.id, ..Default::default() };
    batch(&alice, api::BatchAction::CancelBuild, std::slice::from_ref(&target), true).await?;
    batch(&alice, api::BatchAction::CancelBuild, &[target], false).await?;
    let message = actor.next().await?;
    assert!(
        matches!(&message, Message::Cancel(cancel) if cancel.attempt.as_ref() == Some(&attempt)),
        "{message:?}"
    );
    actor.report(&attempt, 2, vec![Event::Stopped(Stopped { confirmed: true })]).await;
    assert_eq!(alice.finished(&build.id).await?.state(), api::BuildState::Cancelled);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_go_away_leave_nothing_open() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    for i in 0..400_u64 {
        // Drop the call at every point, from before it is sent to after it is answered.
        let gone = std::time::Duration::from_micros(i * 20);
        let _ = tokio::time::timeout(gone, alice.get(&created.id)).await;
    }
    for i in 0..40 {
        let request = api::DisableImageRequest { id: created.id.clone(), ..Default::default() };
        if i % 2 == 0 {
            alice.images.clone().disable_image(request).await?;
        }
        let seen = alice.get(&created.id).await?;
        assert!(!seen.enabled(), "what was read is what was written");
    }
    Ok(())
}
