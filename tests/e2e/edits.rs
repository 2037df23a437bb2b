//! Edits of images: their effects, conflicts and refusals.

use image_service::Role;
use proto::{
    dispatch::{Started, report_event::Event},
    images::{self as api, ImageStatus},
};
use tonic::{Code, Status};

use crate::{
    actor::{Actor, hello},
    answers::{fields, reason, refused},
    client::{Client, image, repository},
    stack::Service,
};

/// Updates the fields of an image that the paths name.
pub(crate) async fn update(client: &Client, image: api::Image, paths: &[&str]) -> Result<api::Image, Status> {
    let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
    let request = api::UpdateImageRequest {
        image: Some(image),
        update_mask: Some(prost_types::FieldMask { paths }),
        ..Default::default()
    };
    let response = client.images.clone().update_image(request).await?.into_inner();
    Ok(response.image.expect("an image"))
}

/// Returns an image with this id and name, for an update.
pub(crate) fn named(id: &str, name: &str) -> api::Image {
    api::Image { id: id.to_owned(), name: name.to_owned(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_changes_what_the_mask_names_and_nothing_else() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let described = api::Image { description: "first".to_owned(), ..image("Go tools", "FROM scratch") };
    let (created, _) = alice.create(described).await?;
    assert_eq!((&created.reference, created.config_revision), (&repository("alice", "go-tools:latest"), 1));

    let sent = api::Image { description: "ignored".to_owned(), ..named(&created.id, " Rust ") };
    let renamed = update(&alice, sent, &["name"]).await?;
    assert_eq!((renamed.name.as_str(), renamed.description.as_str()), ("Rust", "first"));
    assert_eq!(renamed.reference, repository("alice", "rust:latest"), "a derived reference follows the name");
    assert!(renamed.etag != created.etag && renamed.revision > created.revision);
    assert_ne!(renamed.update_time, created.update_time);
    assert_eq!(renamed.config, created.config);
    assert_eq!(renamed, alice.get(&created.id).await?);

    let same = update(&alice, named(&created.id, "Rust"), &["name"]).await?;
    assert_eq!(same, renamed, "what changes nothing changes nothing");

    let given = api::Image {
        repository: repository("alice", "mine"),
        tag: "v1".to_owned(),
        ..named(&created.id, "")
    };
    let given = update(&alice, given, &["repository", "tag"]).await?;
    assert_eq!((&given.repository, given.tag.as_str()), (&repository("alice", "mine"), "v1"));
    let renamed = update(&alice, named(&created.id, "C"), &["name"]).await?;
    assert_eq!(renamed.reference, repository("alice", "mine:v1"), "a reference that was set stays");

    // What cannot be updated is refused, whatever the mask.
    for paths in [&[][..], &["name"], &["*"]] {
        let other = api::Image { enabled: Some(false), template: true, ..renamed.clone() };
        let status = update(&alice, other, paths).await.expect_err("it is refused");
        assert_eq!(fields(&status), ["image.enabled", "image.template"], "{paths:?}");
    }

    // Without a mask, all non-empty fields are meant; with `*`, all fields.
    let request = api::UpdateImageRequest { image: Some(named(&created.id, "Zig")), ..Default::default() };
    let implied = alice.images.clone().update_image(request).await?.into_inner().image.expect("an image");
    assert_eq!((implied.name.as_str(), implied.description.as_str()), ("Zig", "first"));
    let whole = api::Image { id: created.id.clone(), ..image("All", "FROM scratch\nLABEL a=b") };
    let whole = update(&alice, whole, &["*"]).await?;
    assert_eq!((whole.description.as_str(), &whole.reference), ("", &repository("alice", "all:latest")));
    assert_eq!((whole.tag.as_str(), whole.config_revision), ("latest", 2));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_updates_are_refused_by_field() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    let id = created.id.as_str();
    let bad = api::Image {
        description: "x".repeat(5_000),
        repository: "ubuntu".to_owned(),
        config: Some(api::ImageConfig::default()),
        ..named(id, "")
    };
    let invalid = |answer: Result<api::Image, Status>| fields(&answer.expect_err("it is refused"));
    assert_eq!(
        invalid(update(&alice, bad, &["*"]).await),
        ["image.name", "image.description", "image.repository", "image.config"]
    );
    let paths = ["name", "creator", "config.dockerfile", "*", "id"];
    assert_eq!(
        invalid(update(&alice, named(id, "B"), &paths).await),
        ["update_mask.paths[1]", "update_mask.paths[2]", "update_mask.paths[3]", "update_mask.paths[4]"]
    );
    assert_eq!(invalid(update(&alice, named("x", "B"), &["name"]).await), ["image.id"]);
    assert_eq!(alice.get(id).await?, created);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_edits_of_the_same_state_one_wins_and_builds_disturb_neither() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("A", "FROM scratch")).await?;
    let seen = alice.get(&created.id).await?;

    // The build goes on meanwhile, from pending to building.
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    actor.report(&attempt, 1, vec![Event::Started(Started {})]).await;
    actor.acknowledged().await?;
    let building = alice.get(&created.id).await?;
    assert_eq!((building.status(), &building.etag), (ImageStatus::Building, &seen.etag));

    let edit = |name: &str| api::Image { etag: seen.etag.clone(), ..named(&created.id, name) };
    let (one, other) =
        tokio::join!(update(&alice, edit("One"), &["name"]), update(&alice, edit("Other"), &["name"]));
    let (winner, loser) = if one.is_ok() { (one, other) } else { (other, one) };
    assert_eq!(refused(loser), (Code::Aborted, "ETAG_MISMATCH".to_owned()));
    let winner = winner?;
    assert_eq!(alice.get(&created.id).await?.name, winner.name);
    assert_eq!(alice.get_build(&build.id).await?.state(), api::BuildState::Running, "the build goes on");

    let stale =
        api::DisableImageRequest { id: created.id.clone(), etag: seen.etag.clone(), ..Default::default() };
    assert_eq!(
        refused(alice.images.clone().disable_image(stale).await),
        (Code::Aborted, "ETAG_MISMATCH".to_owned())
    );
    let unknown = api::Image { etag: "no etag".to_owned(), ..named(&created.id, "X") };
    assert_eq!(
        refused(update(&alice, unknown, &["name"]).await),
        (Code::Aborted, "ETAG_MISMATCH".to_owned())
    );
    let fresh = api::Image { etag: winner.etag, ..named(&created.id, "X") };
    assert_eq!(update(&alice, fresh, &["name"]).await?.name, "X");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_is_stale_once_its_configuration_has_changed() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    actor.build_next().await?;
    let built = alice.get(&created.id).await?;
    assert_eq!((built.status(), built.stale), (ImageStatus::BuildFinished, false));
    let renamed = update(&alice, named(&created.id, "B"), &["name"]).await?;
    assert!(!renamed.stale);
    let config = image("", "FROM scratch\nLABEL a=b").config;
    let changed = api::Image { config, ..named(&created.id, "") };
    let changed = update(&alice, changed, &["config"]).await?;
    assert!(changed.stale && changed.status() == ImageStatus::BuildFinished, "an edit queues nothing");
    assert_eq!(changed.artifact, built.artifact);
    alice.build(&created.id).await?;
    actor.build_next().await?;
    assert!(!alice.get(&created.id).await?.stale);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_can_be_submitted_as_it_is() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let clone = async |id: &str| {
        let request = api::CloneImageRequest { id: id.to_owned() };
        let response = alice.images.clone().clone_image(request).await?.into_inner();
        Ok::<_, Status>(response.create_image_request.expect("a request"))
    };
    let original =
        api::Image { description: "what for".to_owned(), tag: "v1".to_owned(), ..image("A", "FROM scratch") };
    let (original, _) = alice.create(original).await?;
    let before = alice.list().await?.len();
    let request = clone(&original.id).await?;
    assert_eq!(alice.list().await?.len(), before, "nothing is saved");
    let created = alice.images.clone().create_image(request.clone()).await?.into_inner();
    let created = created.image.expect("an image");
    assert_eq!((created.name.as_str(), created.description.as_str()), ("Copy of A", "what for"));
    assert_eq!((&created.reference, created.tag.as_str()), (&repository("alice", "copy-of-a:v1"), "v1"));
    assert_eq!(created.config, original.config);
    let again = alice.images.clone().create_image(request).await?.into_inner().image.expect("an image");
    assert_eq!(again.reference, repository("alice", "copy-of-a-2:v1"));
    let long = api::Image { name: "ä".repeat(120), ..image("", "FROM scratch") };
    let (long, _) = alice.create(long).await?;
    alice.images.clone().create_image(clone(&long.id).await?).await?;

    let template = api::Image { template: true, ..image("T", "FROM scratch") };
    let request = api::CreateImageRequest { image: Some(template), ..Default::default() };
    let response = alice.images.clone().create_image(request).await?.into_inner();
    assert_eq!(response.build, None, "a template cannot be built");
    let template = response.image.expect("a template");
    assert_eq!((template.status(), template.latest_build_id.as_str()), (ImageStatus::Unspecified, ""));
    let response = alice.images.clone().create_image(clone(&template.id).await?).await?.into_inner();
    assert!(response.build.is_some() && response.image.is_some_and(|image| !image.template));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_starts_clones_from_what_it_has_committed() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let platform = service.client(&service.token("workspaces", &[Role::Service]));
    let (source, _) = alice.create(image("A", "FROM scratch")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    actor.build_next().await?;
    let request = api::SnapshotWorkspaceRequest {
        source_image_id: source.id.clone(),
        worker: "w1".to_owned(),
        container: "workspace-7".to_owned(),
        creator: "alice".to_owned(),
        image: Some(image("Mine", "")),
        ..Default::default()
    };
    let response = platform.images.clone().snapshot_workspace(request.clone()).await?.into_inner();
    let snapshot = response.image.expect("an image");
    assert_eq!((snapshot.creator.as_str(), snapshot.status()), ("alice", ImageStatus::Snapshotting));
    assert!(snapshot.snapshot && snapshot.config.is_none(), "whoever vouches for alice sees nothing of hers");
    assert_eq!(alice.get(&snapshot.id).await?.config, source.config);
    let clone = api::CloneImageRequest { id: snapshot.id.clone() };
    assert_eq!(
        refused(alice.images.clone().clone_image(clone.clone()).await),
        (Code::FailedPrecondition, "SNAPSHOT_NOT_FINISHED".to_owned())
    );
    actor.build_next().await?;
    assert_eq!(alice.get(&snapshot.id).await?.status(), ImageStatus::BuildFinished);
    let answered = alice.images.clone().clone_image(clone).await?.into_inner();
    let config =
        answered.create_image_request.and_then(|request| request.image).and_then(|image| image.config);
    let config = config.expect("a configuration");
    let Some(api::image_config::Source::Generate(generate)) = config.source else {
        panic!("{config:?}");
    };
    let base = format!("{}:latest", repository("alice", "mine"));
    assert_eq!((generate.base_image, config.worker.as_str()), (base, "w1"));

    let bad = api::SnapshotWorkspaceRequest {
        source_image_id: "x".to_owned(),
        worker: String::new(),
        container: "a b".to_owned(),
        creator: "\n".to_owned(),
        ..request.clone()
    };
    let bad = platform.images.clone().snapshot_workspace(bad).await.expect_err("it is refused");
    assert_eq!(fields(&bad), ["source_image_id", "worker", "creator", "container"]);
    let missing = api::SnapshotWorkspaceRequest {
        source_image_id: uuid::Uuid::now_v7().to_string(),
        ..request.clone()
    };
    assert_eq!(refused(platform.images.clone().snapshot_workspace(missing).await).0, Code::NotFound);
    assert_eq!(
        refused(alice.images.clone().snapshot_workspace(request).await),
        (Code::PermissionDenied, "ROLE_MISSING".to_owned())
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn resolving_names_every_missing_condition() -> anyhow::Result<()> {
    use tonic_types::StatusExt as _;
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    let id = created.id.as_str();
    let resolve = || {
        let request = api::ResolveImageRequest { id: id.to_owned() };
        let mut images = alice.images.clone();
        async move { images.resolve_image(request).await }
    };
    let disable = api::DisableImageRequest { id: id.to_owned(), ..Default::default() };
    alice.images.clone().disable_image(disable).await?;
    let refused = resolve().await.expect_err("it is neither built nor enabled");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "NOT_RESOLVABLE"));
    let violations = refused.get_details_precondition_failure().expect("conditions").violations;
    assert_eq!(
        violations.iter().map(|v| v.r#type.as_str()).collect::<Vec<_>>(),
        ["NOT_FINISHED", "DISABLED"]
    );
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    actor.build_next().await?;
    let refused = resolve().await.expect_err("it is not enabled");
    let violations = refused.get_details_precondition_failure().expect("conditions").violations;
    assert_eq!(violations.iter().map(|v| v.r#type.as_str()).collect::<Vec<_>>(), ["DISABLED"]);
    let enable = api::EnableImageRequest { id: id.to_owned(), ..Default::default() };
    alice.images.clone().enable_image(enable).await?;
    let resolved = resolve().await?.into_inner();
    let artifact = alice.get(id).await?.artifact.expect("an artifact");
    assert!(resolved.reference.starts_with("trailer.invalid/artifact/"), "{}", resolved.reference);
    assert!(resolved.reference.ends_with(&format!("/{id}:{}", artifact.build_id)), "{}", resolved.reference);
    assert_eq!((resolved.image_id, resolved.worker.as_str()), (artifact.image_id, "w1"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_waits_for_a_worker_that_can_take_it() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let config = |change: fn(&mut api::ImageConfig)| {
        let mut image = image("A", "FROM scratch");
        image.config.iter_mut().for_each(change);
        image
    };
    let (_, pinned) = alice.create(config(|config| config.worker = "w2".to_owned())).await?;
    let labels = |config: &mut api::ImageConfig| {
        config.worker_labels = [("zone".to_owned(), "a".to_owned())].into();
    };
    let (_, labelled) = alice.create(config(labels)).await?;
    let (_, any) = alice.create(config(|_| {})).await?;
    let mut w1 = Actor::connect(&service, hello("w1", &[])).await?;
    let (assignment, _) = w1.assignment().await?;
    assert_eq!(
        assignment.attempt.map(|attempt| attempt.build_id),
        Some(any.id),
        "the first that it can take"
    );
    for build in [&pinned, &labelled] {
        let build = alice.get_build(&build.id).await?;
        assert_eq!(build.pending_reason(), api::PendingReason::NoSuitableWorker);
    }
    let in_zone =
        proto::dispatch::Hello { labels: [("zone".to_owned(), "a".to_owned())].into(), ..hello("w3", &[]) };
    let mut w3 = Actor::connect(&service, in_zone).await?;
    let (assignment, _) = w3.assignment().await?;
    assert_eq!(assignment.attempt.map(|attempt| attempt.build_id), Some(labelled.id));
    let mut w2 = Actor::connect(&service, hello("w2", &[])).await?;
    let (assignment, _) = w2.assignment().await?;
    assert_eq!(assignment.attempt.map(|attempt| attempt.build_id), Some(pinned.id));
    Ok(())
}
