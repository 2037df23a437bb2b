//! Previews of random writes, which must predict the answers of the writes themselves.
//!
//! `TRAILER_TEST_SEED` selects another sequence of writes, and `TRAILER_TEST_PREDICTIONS` its length.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use proto::images as api;
use tokio::task::JoinHandle;

use self::random::World;
use super::{
    PATIENT,
    calls::{status_text, wording},
    cast::{self, Stage},
};
use crate::{
    actor::{Actor, hello},
    client::{Client, grant_of, image},
    stack::{Service, number},
};

mod answer;
mod random;
mod write;

/// Outcomes that random writes must have, sooner or later.
const REASONS: [&str; 16] = [
    "OK",
    "INVALID_FIELDS",
    "IMAGE_NOT_FOUND",
    "WORKER_NOT_FOUND",
    "ROLE_MISSING",
    "ACTION_FORBIDDEN",
    "ETAG_MISMATCH",
    "REFERENCE_TAKEN",
    "TOO_MANY_PENDING_BUILDS",
    "BUILD_IN_PROGRESS",
    "NO_BUILD_IN_PROGRESS",
    "OTHER_BUILD",
    "BUILD_NOT_CANCELLABLE",
    "TEMPLATE_NOT_BUILDABLE",
    "SNAPSHOT_NOT_BUILDABLE",
    "rows that depend on others",
];

#[tokio::test(flavor = "multi_thread")]
async fn random_writes_have_their_predicted_outcome() -> anyhow::Result<()> {
    let flags = [&PATIENT[..], &["--max-pending-builds", "3"]].concat();
    let service = Service::start_with(&flags).await?;
    let admin = cast::client(&service, "admin");
    let mut stage = Stage::set(&service).await?;
    let targets = stage.fill().await?;
    let actor = stage.leave();
    let _actor = rest(&admin, actor).await?;
    let mut idle = hello(random::IDLE_WORKER, &[]);
    idle.capabilities.clear();
    let _idle = listen(Actor::connect(&service, idle).await?);
    let archive = admin.upload("", &archive()?).await?.digest;

    let seed = number("TRAILER_TEST_SEED", 1);
    let mut world = World::new(seed, targets.into_iter().map(|target| target.image).collect(), archive);
    let mut seen = BTreeSet::new();
    for step in 0..number("TRAILER_TEST_PREDICTIONS", 600) {
        let before = all(&admin).await?;
        let (caller, write) = world.next(&before);
        let client = random::client(&service, caller);
        let case = format!("TRAILER_TEST_SEED={seed}, step {step}, {caller}: {write:?}");
        let predicted = write.perform(&client, true).await;
        let done = write.perform(&client, false).await;
        assert_eq!(wording(&predicted), wording(&done), "{case}");
        seen.insert(reason(&status_text(&done)));
        let (Ok(predicted), Ok(done)) = (predicted, done) else {
            continue;
        };
        world.remember(&done);
        let [predicted, done] = [predicted, done].map(|answer| answer.comparable(&before));
        assert_eq!(predicted, done, "{case}");
        seen.extend(done.rows.iter().flat_map(|row| row.as_ref().err()).map(|(text, _)| reason(text)));
        seen.extend(write.repeats_a_row().then(|| REASONS[15].to_owned()));
    }
    let missing: Vec<_> = REASONS.into_iter().filter(|reason| !seen.contains(*reason)).collect();
    assert!(missing.is_empty(), "{missing:?} did not come up, only {seen:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_too_many_is_predicted() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let creator = service.builder("creator");
    let (created, _) = creator.create(image("A", "FROM scratch")).await?;
    let fill = "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 999) \
                INSERT INTO grants (image, grantee, view, modify, \"delete\") \
                SELECT id, 'subject:' || n, true, false, false FROM images, numbers";
    service.database().execute(fill).await?;
    creator.grant(&created.id, "the-last", &[api::Permission::View]).await?;
    for (subject, expected) in
        [("one-more", "FailedPrecondition TOO_MANY_GRANTS TOO_MANY_GRANTS"), ("the-last", "OK")]
    {
        for validate_only in [true, false] {
            let permissions = vec![api::Permission::Modify.into()];
            let request = api::GrantAccessRequest {
                image_id: created.id.clone(),
                grant: Some(grant_of(subject, permissions)),
                validate_only,
                ..Default::default()
            };
            assert_eq!(
                status_text(&creator.access.clone().grant_access(request).await),
                expected,
                "{subject}"
            );
        }
    }
    Ok(())
}

/// Drains a worker, so that nothing changes by itself.
async fn rest(admin: &Client, actor: Actor) -> anyhow::Result<JoinHandle<Actor>> {
    let request = api::DrainWorkerRequest { name: cast::WORKER.to_owned(), ..Default::default() };
    admin.workers.clone().drain_worker(request).await?;
    Ok(listen(actor))
}

/// Reads what the service sends to a worker, and ignores it.
fn listen(mut actor: Actor) -> JoinHandle<Actor> {
    tokio::spawn(async move {
        while let Ok(Some(_)) = actor.responses.message().await {}
        actor
    })
}

fn archive() -> anyhow::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let (mut header, content) = (tar::Header::new_gnu(), b"FROM scratch\n");
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, "Dockerfile", &content[..])?;
    archive.into_inner().context("an archive in memory")
}

/// Returns all images by id.
async fn all(admin: &Client) -> anyhow::Result<BTreeMap<String, api::Image>> {
    let request = api::ListImagesRequest { page_size: 1_000, ..Default::default() };
    let images = admin.images.clone().list_images(request).await?.into_inner().images;
    Ok(super::by_id(images))
}

/// Returns the reason in the words of [`status_text`].
fn reason(text: &str) -> String {
    text.split(' ').nth(1).unwrap_or(text).to_owned()
}
