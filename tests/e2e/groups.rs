//! Grants to groups and to everybody.

use std::collections::BTreeSet;

use anyhow::Context as _;
use image_service::Role;
use proto::{
    dispatch::{ResolveSourcesRequest, Started, report_event::Event, source::Source},
    images::{
        self as api, Everybody, ImageAction, Permission, WatchImagesRequest, grant::Grantee,
        watch_images_response::Event as Change,
    },
};
use serde_json::json;
use tonic::Code;

use crate::{
    actor::{Actor, hello},
    answers::{fields, refused},
    client::{Client, grant_of, image, repository_of},
    issuer::{SigningKey, jwks},
    stack::{LIMIT, Service},
};

fn group(name: &str) -> Grantee {
    Grantee::Group(name.to_owned())
}

fn everybody() -> Grantee {
    Grantee::Everybody(Everybody {})
}

fn member(service: &Service, subject: &str, groups: &[&str]) -> Client {
    service.client(&service.token_of_member(subject, &[Role::Builder], groups))
}

async fn sees(client: &Client, id: &str) -> anyhow::Result<bool> {
    let is_found = match client.get(id).await {
        Ok(_) => true,
        Err(status) if status.code() == Code::NotFound => false,
        Err(status) => return Err(status.into()),
    };
    let is_listed = client.list().await?.iter().any(|image| image.id == id);
    anyhow::ensure!(is_found == is_listed, "found: {is_found}, listed: {is_listed}");
    Ok(is_found)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_may_do_what_any_of_its_grants_allows() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    let bob = member(&service, "bob", &["red", "blue"]);
    let actions = async || -> anyhow::Result<BTreeSet<ImageAction>> {
        Ok(bob.get(&created.id).await?.allowed_actions().collect())
    };
    assert!(!sees(&bob, &created.id).await?);
    alice.grant_to(&created.id, group("green"), &[Permission::View]).await?;
    assert!(!sees(&bob, &created.id).await?, "bob is not in that group");
    alice.grant_to(&created.id, everybody(), &[Permission::View]).await?;
    assert!(sees(&bob, &created.id).await? && sees(&service.builder("carol"), &created.id).await?);
    assert_eq!(actions().await?, [ImageAction::Clone].into());
    alice.grant_to(&created.id, group("blue"), &[Permission::Delete]).await?;
    assert_eq!(actions().await?, [ImageAction::Clone, ImageAction::Delete].into());
    alice.grant_to(&created.id, group("red"), &[Permission::Modify]).await?;
    assert!(actions().await?.is_superset(&[ImageAction::Edit, ImageAction::Delete].into()));
    assert!(!actions().await?.contains(&ImageAction::Share), "owners alone share");
    // One grant that is revoked leaves the others.
    alice.grant_to(&created.id, everybody(), &[]).await?;
    alice.grant_to(&created.id, group("red"), &[]).await?;
    assert_eq!(actions().await?, [ImageAction::Clone, ImageAction::Delete].into());
    assert!(!sees(&service.builder("carol"), &created.id).await?);
    // A subject is no group of that name, and the other way round.
    alice.grant_to(&created.id, Grantee::Subject("red".to_owned()), &[Permission::Modify]).await?;
    alice.grant_to(&created.id, group("bob"), &[Permission::Modify]).await?;
    assert_eq!(actions().await?, [ImageAction::Clone, ImageAction::Delete].into());
    // Groups count with the next token.
    assert!(!sees(&member(&service, "bob", &["red"]), &created.id).await?);

    let kinds: Vec<String> = alice
        .grants(&created.id, 1)
        .await?
        .into_iter()
        .map(|grant| match grant.grantee {
            Some(Grantee::Subject(subject)) => format!("subject {subject}"),
            Some(Grantee::Group(group)) => format!("group {group}"),
            Some(Grantee::Everybody(_)) => "everybody".to_owned(),
            None => "nobody".to_owned(),
        })
        .collect();
    assert_eq!(kinds, ["group blue", "group bob", "group green", "subject red"]);
    let request = api::GrantAccessRequest {
        image_id: created.id.clone(),
        grant: Some(api::Grant { grantee: None, ..grant_of("", Vec::new()) }),
        ..Default::default()
    };
    let missing = alice.access.clone().grant_access(request).await.expect_err("no grantee");
    assert_eq!(fields(&missing), ["grant.grantee"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_without_a_token_is_not_among_everybody() -> anyhow::Result<()> {
    let service = Service::start_with(&["--anonymous"]).await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    alice.grant_to(&created.id, everybody(), &[Permission::View]).await?;
    assert!(!sees(&service.client(""), &created.id).await?);
    assert!(sees(&service.builder("bob"), &created.id).await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_follows_the_grants_of_groups() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    let bob = member(&service, "bob", &["red"]);
    let mut watch = bob.images.clone().watch_images(WatchImagesRequest::default()).await?.into_inner();
    let mut next = async || -> anyhow::Result<(String, String)> {
        let message = tokio::time::timeout(LIMIT, watch.message()).await??.context("it goes on")?;
        let event = match message.event {
            Some(Change::Synced(_)) => "synced".to_owned(),
            Some(Change::Changed(changed)) => format!("changed {}", changed.id),
            Some(Change::Removed(removed)) => format!("removed {}", removed.id),
            other => format!("{other:?}"),
        };
        Ok((event, message.resume_revision))
    };
    assert_eq!(next().await?.0, "synced");
    for grantee in [group("red"), everybody()] {
        alice.grant_to(&created.id, grantee.clone(), &[Permission::View]).await?;
        assert_eq!(next().await?.0, format!("changed {}", created.id));
        alice.grant_to(&created.id, grantee, &[]).await?;
        assert_eq!(next().await?.0, format!("removed {}", created.id));
    }
    alice.grant_to(&created.id, group("red"), &[Permission::View]).await?;
    let (_, after_revision) = next().await?;
    // With other groups it is another caller for resuming.
    let resume = WatchImagesRequest { after_revision, ..WatchImagesRequest::default() };
    member(&service, "bob", &["red"]).images.watch_images(resume.clone()).await?;
    for groups in [&["red", "blue"][..], &[]] {
        let other = member(&service, "bob", groups).images.watch_images(resume.clone()).await;
        let status = other.map(drop).expect_err("it sees other images");
        assert_eq!(fields(&status), ["after_revision"], "{groups:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_sees_what_the_groups_of_its_requester_see() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let worker = service.client(&service.token("w1", &[Role::Worker]));
    let (base, _) = alice.create(image("Base", "FROM scratch")).await?;
    actor.build_next().await?;
    let (_, queued) = member(&service, "bob", &["red"]).create(image("Of bob", "FROM scratch")).await?;
    let (_, attempt) = actor.assignment().await?;
    assert_eq!(attempt.build_id, queued.id);
    actor.report(&attempt, 1, vec![Event::Started(Started {})]).await;
    actor.acknowledged().await?;
    let resolve = async || -> anyhow::Result<bool> {
        let references = vec![repository_of(&base).to_owned()];
        let request = ResolveSourcesRequest { attempt: Some(attempt.clone()), references };
        let answer = worker.dispatch.clone().resolve_sources(request).await?.into_inner();
        let source = answer.sources.into_iter().next().and_then(|source| source.source);
        Ok(matches!(source, Some(Source::Artifact(_))))
    };
    assert!(!resolve().await?);
    // The creator of what is built sees it, too: bob, whose groups are those of the build.
    alice.grant_to(&base.id, group("red"), &[Permission::View]).await?;
    assert!(resolve().await?);
    alice.grant_to(&base.id, group("red"), &[]).await?;
    assert!(!resolve().await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_come_from_a_claim() -> anyhow::Result<()> {
    let key = SigningKey::p256("p");
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), jwks(&[&key]))?;
    let path = file.path().to_str().context("a path in UTF-8")?;
    let service = Service::start_with(&["--jwks", path, "--groups-claim", "realm.groups"]).await?;
    let exp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs() + 3_600;
    for (groups, expected) in [
        (json!(["/team/red", "a b", 7, ""]), Some(vec!["/team/red", "a b"])),
        (json!("red blue"), Some(vec!["blue", "red"])),
        (json!(null), Some(vec![])),
        (json!((0..1_001).map(|i| i.to_string()).collect::<Vec<_>>()), None),
    ] {
        let claims = json!({"sub": "bob", "exp": exp, "groups": ["other"], "realm": {"groups": groups}});
        let token = key.token(&claims);
        let known = service.client(&token).access.clone().who_am_i(api::WhoAmIRequest {}).await;
        match expected {
            Some(expected) => assert_eq!(known?.into_inner().groups, expected),
            None => assert_eq!(refused(known), (Code::Unauthenticated, "TOKEN_INVALID".to_owned())),
        }
    }
    Ok(())
}
