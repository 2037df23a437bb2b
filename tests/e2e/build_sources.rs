//! The meaning of the references that builds name, which depends on the requester of the build.

use image_service::Role;
use proto::{
    dispatch::{Attempt, Hello, ResolveSourcesRequest, Started, report_event::Event, source::Source},
    images::{self as api, Permission},
};
use tonic::Code;

use crate::{
    actor::{Actor, hello},
    answers::refused,
    client::{Client, image, repository, repository_of, repository_under},
    edits::update,
    stack::Service,
};

const PREFIXES: [&str; 4] =
    ["--repository-prefix", "trailer.invalid/", "--repository-prefix", "registry.example:5000/team/"];

/// Asks as a worker what a reference stands for: `foreign`, `missing`, or the build that made the artifact.
async fn resolve(worker: &Client, attempt: &Attempt, reference: &str) -> anyhow::Result<String> {
    let request =
        ResolveSourcesRequest { attempt: Some(attempt.clone()), references: vec![reference.to_owned()] };
    let response = worker.dispatch.clone().resolve_sources(request).await?.into_inner();
    let source = response.sources.into_iter().next().and_then(|source| source.source);
    Ok(match source {
        Some(Source::Foreign(_)) => "foreign".to_owned(),
        Some(Source::Missing(missing)) if missing.is_elsewhere => "missing elsewhere".to_owned(),
        Some(Source::Missing(_)) => "missing".to_owned(),
        Some(Source::Artifact(artifact)) => artifact.name.map(|name| name.build_id).unwrap_or_default(),
        None => anyhow::bail!("no answer about {reference}"),
    })
}

/// Lets a client build an image, and leaves the build with the worker.
async fn begin(actor: &mut Actor, client: &Client, name: &str) -> anyhow::Result<Attempt> {
    client.create(image(name, "FROM scratch")).await?;
    let (_, attempt) = actor.assignment().await?;
    actor.report(&attempt, 1, vec![Event::Started(Started {})]).await;
    actor.acknowledged().await?;
    Ok(attempt)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_sees_what_its_requester_sees() -> anyhow::Result<()> {
    let service = Service::start_with(&PREFIXES).await?;
    let [alice, bob] = ["alice", "bob"].map(|name| service.builder(name));
    let admin = service.client(&service.token("root", &[Role::Admin]));
    let worker = service.client(&service.token("w1", &[Role::Worker]));
    let mut actor = Actor::connect(&service, Hello { slots: 10, ..hello("w1", &[]) }).await?;
    let [digest, other_digest] = ["a", "b"].map(|digit| format!("sha256:{}", digit.repeat(64)));

    let (secret, secret_build) = alice.create(image("Secret", "FROM scratch")).await?;
    actor.build_next().await?;
    let at = repository_under("registry.example:5000/team", "alice", "pushed");
    let pushed = api::Image { repository: at.clone(), ..image("Pushed", "FROM scratch") };
    let (pushed, pushed_build) = alice.create(pushed).await?;
    actor.build_and_push_next(&digest).await?;
    let (own, own_build) = bob.create(image("Own", "FROM scratch")).await?;
    actor.build_next().await?;
    let elsewhere = api::Image { repository: "tools/go".to_owned(), ..image("Elsewhere", "FROM scratch") };
    let (_, elsewhere_build) = admin.create(elsewhere).await?;
    actor.build_next().await?;

    let of_bob = begin(&mut actor, &bob, "Of bob").await?;
    let of_alice = begin(&mut actor, &alice, "Of alice").await?;
    let of_admin = begin(&mut actor, &admin, "Of the admin").await?;
    let (unbuilt, _) = alice.create(image("Unbuilt", "FROM scratch")).await?;

    let [foreign, missing, elsewhere] = ["foreign", "missing", "missing elsewhere"];
    let [secret_build, pushed_build, own_build, elsewhere_build] =
        [&secret_build, &pushed_build, &own_build, &elsewhere_build].map(|build| build.id.as_str());
    let upper_case = at.replace("registry", "Registry");
    let secret_id = &secret.id;
    for (reference, for_bob, for_alice, for_admin) in [
        (repository_of(&secret).to_owned(), missing, secret_build, secret_build),
        (format!("{}:latest", repository_of(&secret)), missing, secret_build, secret_build),
        (format!("{}:old", repository_of(&secret)), missing, missing, missing),
        (repository_of(&own).to_owned(), own_build, missing, own_build),
        (repository_of(&unbuilt).to_owned(), missing, missing, missing),
        (at.clone(), missing, pushed_build, pushed_build),
        (upper_case, missing, pushed_build, pushed_build),
        (at.replace(":5000", ":05000"), missing, pushed_build, pushed_build),
        (format!("{at}@{digest}"), missing, pushed_build, pushed_build),
        (format!("{at}:other@{digest}"), missing, pushed_build, pushed_build),
        (format!("{at}@{other_digest}"), missing, missing, missing),
        (format!("{}@{digest}", repository_of(&secret)), missing, missing, missing),
        // What the engine calls it is no way around.
        (
            format!("trailer.invalid/artifact/{}/{secret_id}:{secret_build}", actor.welcome.catalogue_id),
            missing,
            missing,
            missing,
        ),
        (repository("carol", "none"), missing, missing, missing),
        ("trailer.invalid/none".to_owned(), missing, missing, missing),
        ("registry.example:5000/team/base:1".to_owned(), missing, missing, missing),
        ("docker.io/tools/go:latest".to_owned(), elsewhere, elsewhere, elsewhere_build),
        ("tools/go:1".to_owned(), elsewhere, elsewhere, elsewhere),
        ("registry.example:5000/other/base:1".to_owned(), foreign, foreign, foreign),
        // Another registry may answer with any digest.
        (format!("elsewhere.example/a@{digest}"), elsewhere, foreign, foreign),
        (format!("elsewhere.example/a@{other_digest}"), foreign, foreign, foreign),
        // An address may be that of the catalogue's registry.
        (at.replace("registry.example", "192.0.2.1"), missing, missing, missing),
        ("192.0.2.1:5001/team/base:1".to_owned(), foreign, foreign, foreign),
        ("ubuntu:24.04".to_owned(), foreign, foreign, foreign),
        ("docker.io/library/ubuntu".to_owned(), foreign, foreign, foreign),
        ("UBUNTU".to_owned(), missing, missing, missing),
        (String::new(), missing, missing, missing),
    ] {
        for (attempt, expected) in [(&of_bob, for_bob), (&of_alice, for_alice), (&of_admin, for_admin)] {
            let found = resolve(&worker, attempt, &reference).await?;
            assert_eq!(found, expected, "{reference} for build {}", attempt.build_id);
        }
    }

    // What counts is what the requester may see at the moment.
    for permissions in [&[Permission::View][..], &[Permission::Delete]] {
        alice.grant(&secret.id, "bob", permissions).await?;
        assert_eq!(resolve(&worker, &of_bob, repository_of(&secret)).await?, secret_build);
        alice.revoke(&secret.id, "bob").await?;
        assert_eq!(resolve(&worker, &of_bob, repository_of(&secret)).await?, missing);
    }
    // The artifact keeps its old reference until the image is built again.
    let renamed =
        api::Image { id: pushed.id.clone(), repository: repository("alice", "new"), ..Default::default() };
    update(&alice, renamed, &["repository"]).await?;
    assert_eq!(resolve(&worker, &of_alice, &at).await?, pushed_build);
    assert_eq!(resolve(&worker, &of_alice, &repository("alice", "new")).await?, missing);
    alice.delete(&pushed.id).await?;
    // What was pushed stays known by its digest, under whatever name its registry has.
    for (reference, expected) in [
        (at.clone(), missing),
        (format!("{at}@{digest}"), missing),
        (format!("alias.example/a@{digest}"), elsewhere),
    ] {
        assert_eq!(resolve(&worker, &of_alice, &reference).await?, expected);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_for_another_creator_sees_what_that_one_sees() -> anyhow::Result<()> {
    let service = Service::start_with(&PREFIXES).await?;
    let [alice, bob] = ["alice", "bob"].map(|name| service.builder(name));
    let admin = service.client(&service.token("root", &[Role::Admin]));
    let worker = service.client(&service.token("w1", &[Role::Worker]));
    let mut actor = Actor::connect(&service, Hello { slots: 10, ..hello("w1", &[]) }).await?;
    let repository = repository_under("registry.example:5000/team", "alice", "secret");
    let secret = api::Image { repository, ..image("Secret", "FROM scratch") };
    let (secret, secret_build) = alice.create(secret).await?;
    let digest = format!("sha256:{}", "a".repeat(64));
    actor.build_and_push_next(&digest).await?;
    // Its registry may have another name.
    let alias = format!("alias.example/a@{digest}");
    // Bob reads the log of every build of this image.
    let (of_bob, _) = bob.create(image("Of bob", "FROM scratch")).await?;
    actor.build_next().await?;
    admin.build(&of_bob.id).await?;
    let (_, attempt) = actor.assignment().await?;
    for (reference, expected) in [(repository_of(&secret), "missing"), (&alias, "missing elsewhere")] {
        assert_eq!(resolve(&worker, &attempt, reference).await?, expected, "{reference}");
    }
    alice.grant(&secret.id, "bob", &[Permission::View]).await?;
    assert_eq!(resolve(&worker, &attempt, repository_of(&secret)).await?, secret_build.id);
    assert_eq!(resolve(&worker, &attempt, &alias).await?, "foreign");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_worker_of_an_attempt_is_answered() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let attempt = begin(&mut actor, &alice, "A").await?;
    let resolve = async |worker: &str, attempt: Option<Attempt>, references: Vec<String>| {
        let worker = service.client(&service.token(worker, &[Role::Worker]));
        let request = ResolveSourcesRequest { attempt, references };
        worker.dispatch.clone().resolve_sources(request).await
    };
    let one = || vec!["ubuntu".to_owned()];
    resolve("w1", Some(attempt.clone()), one()).await?;
    let missing = (Code::NotFound, "BUILD_NOT_FOUND".to_owned());
    let next = Attempt { number: attempt.number + 1, ..attempt.clone() };
    let unknown = Attempt { build_id: uuid::Uuid::now_v7().to_string(), number: 1 };
    for (worker, attempt) in [("w2", attempt.clone()), ("w1", next), ("w1", unknown)] {
        assert_eq!(refused(resolve(worker, Some(attempt), one()).await), missing, "{worker}");
    }
    let invalid = (Code::InvalidArgument, "INVALID_FIELDS".to_owned());
    for references in [vec![], vec!["a".to_owned(); 65], vec!["a".repeat(1025)]] {
        assert_eq!(refused(resolve("w1", Some(attempt.clone()), references).await), invalid);
    }
    assert_eq!(refused(resolve("w1", None, one()).await), invalid);
    Ok(())
}
