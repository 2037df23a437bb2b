//! References: each belongs to one image, and each namespace to one creator.

use std::sync::{Arc, atomic::AtomicUsize};

use image_service::Role;
use proto::images as api;
use tonic::Code;

use crate::{
    actor::{Actor, hello},
    answers::refused,
    client::{image, repository, repository_of, repository_under},
    edits::{named, update},
    fake_engine::FakeEngine,
    patience,
    stack::{Service, Worker, number},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_belongs_to_one_image() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let at = |name: &str| api::Image { repository: repository("alice", name), ..image("A", "FROM scratch") };
    let taken = (Code::AlreadyExists, "REFERENCE_TAKEN".to_owned());
    let (first, _) = alice.create(at("one")).await?;
    assert_eq!(refused(alice.create(at("one")).await), taken);
    let admin = service.client(&service.token("root", &[Role::Admin]));
    assert_eq!(refused(admin.create(at("one")).await), taken);

    // The reference that a build writes stays taken when the image's reference changes, and so does the
    // artifact's.
    let to = api::Image { repository: repository("alice", "two"), ..named(&first.id, "") };
    update(&alice, to, &["repository"]).await?;
    assert_eq!(refused(alice.create(at("one")).await), taken);
    assert_eq!(refused(alice.create(at("two")).await), taken);
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    actor.build_next().await?;
    let artifact = alice.get(&first.id).await?.artifact.expect("an artifact");
    assert_eq!(artifact.reference, format!("{}:latest", repository("alice", "one")));
    assert_eq!(refused(alice.create(at("one")).await), taken);
    alice.build(&first.id).await?;
    actor.build_next().await?;
    let (second, _) = alice.create(at("one")).await?;
    actor.build_next().await?;

    // Templates and pulled images write no reference.
    let template = api::Image { template: true, ..at("one") };
    let request = api::CreateImageRequest { image: Some(template), ..Default::default() };
    alice.images.clone().create_image(request).await?;
    let pull = api::PullSource { reference: "nginx:1".to_owned() };
    let pull = api::image_config::Source::Pull(pull);
    let config = Some(api::ImageConfig { source: Some(pull), ..Default::default() });
    for _ in 0..2 {
        let (pulled, build) = bob.create(api::Image { config: config.clone(), ..image("P", "") }).await?;
        assert_eq!((&*pulled.reference, &*pulled.repository, &*pulled.tag), ("nginx:1", "", ""));
        assert!(pulled.pulled);
        assert_eq!(build.kind(), api::BuildKind::Pull);
    }
    alice.delete(&second.id).await?;
    alice.create(at("one")).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_belongs_to_one_creator() -> anyhow::Result<()> {
    let service = Service::start_with(&[
        "--repository-prefix",
        "trailer.invalid/",
        "--repository-prefix",
        "registry.example/team/",
    ])
    .await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let admin = service.client(&service.token("root", &[Role::Admin]));
    let invalid = (Code::InvalidArgument, "INVALID_FIELDS".to_owned());
    let at = |repository: &str| api::Image {
        repository: repository.to_owned(),
        ..image("Ärger mit 日本語", "FROM scratch")
    };
    let own = repository_under("registry.example/team", "alice", "tools/go");
    let (first, _) = alice.create(at(&own)).await?;
    assert_eq!(first.repository, own);
    let (derived, _) = alice.create(at("")).await?;
    assert_eq!(derived.repository, "");
    assert_eq!(repository_of(&derived), repository("alice", "arger-mit-ri-ben-yu"));

    // It makes no difference whether a reference is free, was ever taken, or belongs to an image that the
    // caller sees.
    alice.grant(&first.id, "bob", &[api::Permission::Modify]).await?;
    alice.delete(&derived.id).await?;
    for elsewhere in [
        own.as_str(),
        repository_of(&derived),
        &repository("alice", "new"),
        &repository("carol", "new"),
        "trailer.invalid/new",
        "registry.example/team/new",
        "ubuntu",
    ] {
        assert_eq!(refused(bob.create(at(elsewhere)).await), invalid, "{elsewhere}");
    }
    // Whoever edits an image of alice's leaves its reference as it is: others would show which of hers exist.
    alice.create(at(&repository("alice", "hidden"))).await?;
    let before = alice.get(&first.id).await?;
    for taken_or_free in ["hidden", "free"] {
        let to = api::Image { repository: repository("alice", taken_or_free), ..named(&first.id, "") };
        assert_eq!(refused(update(&bob, to, &["repository"]).await), invalid, "{taken_or_free}");
    }
    let tagged = api::Image { tag: "other".to_owned(), ..before.clone() };
    assert_eq!(refused(update(&bob, tagged, &["repository", "tag"]).await), invalid);
    let renamed = api::Image { name: "Of bob".to_owned(), ..before.clone() };
    let renamed = update(&bob, renamed, &["name", "repository", "tag"]).await?;
    assert_eq!((&renamed.name[..], renamed.build_reference), ("Of bob", before.build_reference));
    for anywhere in ["ubuntu", "trailer.invalid/new", &repository("carol", "new")] {
        admin.create(at(anywhere)).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_one_name_have_each_a_reference_of_its_own() -> anyhow::Result<()> {
    let images = number("TRAILER_TEST_IMAGES", 2_000);
    let service = Service::start_with(&["--max-calls", "0"]).await?;
    let mut creating = tokio::task::JoinSet::new();
    let alice = service.builder("alice");
    let tries = Arc::new(AtomicUsize::new(0));
    for _ in 0..images {
        let (alice, tries) = (alice.clone(), Arc::clone(&tries));
        // A call that has waited for too long is retried.
        creating.spawn(async move {
            patience::create(&alice, image("The same name", "FROM scratch"), &tries).await
        });
    }
    let mut references = std::collections::BTreeSet::new();
    while let Some(created) = creating.join_next().await {
        let (created, _) = created??;
        assert!(
            created.reference.starts_with(&repository("alice", "the-same-name")),
            "{}",
            created.reference
        );
        references.insert(created.reference);
    }
    assert_eq!(references.len() as u64, images);
    assert!(references.contains(&repository("alice", "the-same-name:latest")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_exists_and_what_will_be_written_are_told_apart() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let engine = FakeEngine::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let references = |image: &api::Image| {
        let built = image.artifact.as_ref().map(|artifact| artifact.reference.clone()).unwrap_or_default();
        [image.reference.clone(), image.build_reference.clone(), built]
    };
    let [old, new] = ["old", "new"].map(|name| repository("alice", &format!("{name}:latest")));
    let (created, build) = alice.create(image("Old", "FROM scratch")).await?;
    assert_eq!(references(&created), [&*old, &old, ""]);
    alice.finished(&build.id).await?;
    let renamed = update(&alice, named(&created.id, "New"), &["name"]).await?;
    assert_eq!(references(&renamed), [&*old, &new, &old], "no build has written the other yet");
    let order = api::ListImagesRequest { order_by: "image_name".to_owned(), ..Default::default() };
    alice.create(image("Not built", "FROM scratch")).await?;
    let listed = alice.images.clone().list_images(order).await?.into_inner().images;
    assert_eq!(listed.iter().map(|image| image.name.as_str()).collect::<Vec<_>>(), ["Not built", "New"]);

    // An image that is sent back as it was read stays as it is.
    let same = update(&alice, alice.get(&created.id).await?, &["*"]).await?;
    assert_eq!((same.repository.as_str(), &same.etag), ("", &renamed.etag));
    let build = alice.build(&created.id).await?;
    alice.finished(&build.id).await?;
    assert_eq!(references(&alice.get(&created.id).await?), [&*new, &new, &new]);

    let given = api::Image {
        repository: repository("alice", "given"),
        tag: "v1".to_owned(),
        ..named(&created.id, "")
    };
    let given = update(&alice, given, &["repository", "tag"]).await?;
    assert_eq!(references(&given), [&*new, &repository("alice", "given:v1"), &new]);
    let derived = update(&alice, named(&created.id, ""), &["repository"]).await?;
    assert_eq!(
        (derived.repository.as_str(), derived.build_reference.as_str()),
        ("", &*repository("alice", "new:v1"))
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_predicted_reference_is_the_one_that_is_written() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mut expected = std::collections::BTreeSet::new();
    for _ in 0..20 {
        let request = api::CreateImageRequest {
            image: Some(image("Tools", "FROM scratch")),
            validate_only: true,
            ..Default::default()
        };
        let predicted = alice.images.clone().create_image(request.clone()).await?.into_inner().image;
        let request = api::CreateImageRequest { validate_only: false, ..request };
        let created = alice.images.clone().create_image(request).await?.into_inner().image;
        let [predicted, created] =
            [predicted, created].map(|image| image.unwrap_or_default().build_reference);
        assert_eq!(predicted, created);
        expected.insert(created);
    }
    assert_eq!(expected.len(), 20);
    assert!(expected.contains(&repository("alice", "tools-2:latest")), "{expected:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_changes_the_reference_only_for_builders() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("Base tool", "FROM scratch")).await?;
    alice.grant(&created.id, "carol", &[api::Permission::Modify]).await?;
    let carol = service.client(&service.token("carol", &[]));
    let renamed = update(&carol, named(&created.id, "Hijack"), &["name"]).await?;
    assert_eq!((renamed.name.as_str(), &renamed.reference), ("Hijack", &created.reference));
    let renamed = update(&alice, named(&created.id, "Tool"), &["name"]).await?;
    assert_eq!(repository_of(&renamed), repository("alice", "tool"));
    Ok(())
}
