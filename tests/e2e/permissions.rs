//! The table of permissions, checked over the network for every caller, state and call.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures_util::future::try_join_all;
use image_service::Role;
use proto::images::{self as api, ImageAction, ImageStatus};
use tonic::Code;

use self::{
    calls::{Call, How, REVOKED, Target, Wording, attempt, batch, status_text, wording},
    cast::{Stage, admit, client, nowhere},
};
use crate::{
    client::{Client, image},
    eventually::eventually_true,
    stack::Service,
};

mod calls;
mod cast;
mod grants;
mod predictions;
mod table;

/// Flags with which a silent worker loses nothing for as long as a test lasts.
const PATIENT: [&str; 8] =
    ["--offline-after", "1h", "--stop-after", "1h", "--stop-timeout", "1h", "--lease", "3h"];

#[tokio::test(flavor = "multi_thread")]
async fn everybody_may_do_what_the_table_says_and_nothing_else() -> anyhow::Result<()> {
    let service = Service::start_with(&PATIENT).await?;
    let mut stage = Stage::set(&service).await?;
    let targets = stage.fill().await?;
    let admin = client(&service, "admin");
    let before = admin.list().await?;
    let statuses: BTreeSet<i32> = before.iter().map(|image| i32::from(image.status())).collect();
    assert_eq!(statuses, (0..=ImageStatus::Error.into()).collect(), "every status is there");

    try_join_all(table::callers().into_iter().map(|caller| walk(&service, caller, &targets))).await?;
    shut_out(&service, &targets).await?;
    // Validation alone has changed neither images nor grants.
    assert_eq!(admin.list().await?, before);
    Ok(())
}

/// Validates every call as one caller and compares the answers with the table.
async fn walk(service: &Service, caller: &'static str, targets: &[Target]) -> anyhow::Result<()> {
    let client = client(service, caller);
    let targets = [targets, &[nowhere()]].concat();
    let mut seen = BTreeMap::new();
    let mut spoken = HashMap::new();
    for target in &targets {
        let (image, answers) = walk_image(&client, caller, target).await?;
        seen.extend(image.map(|image| (target.image.clone(), image)));
        spoken.extend(answers.into_iter().map(|(call, how, answer)| ((target.state, call, how), answer)));
    }
    for ((state, call, _), answer) in &spoken {
        if matches!(answer, Some((Code::NotFound, ..))) {
            let missing = &spoken[&("missing", *call, How::Ask)];
            assert_eq!(answer, missing, "{caller}, {call:?}, {state}: it differs from what does not exist");
        }
    }
    assert_eq!(by_id(client.list().await?), seen, "{caller}");
    assert_eq!(by_id(client.first_state().await?), seen, "{caller}");

    for (action, call) in table::BATCHES {
        for how in [How::Ask, How::AskWithStaleEtag] {
            let outcomes = batch(&client, action, &targets, how).await?;
            assert_eq!(outcomes.len(), targets.len());
            for (target, outcome) in targets.iter().zip(outcomes) {
                let case = format!("{caller}, {action:?}, {}, {how:?}", target.state);
                assert_eq!(status_text(&outcome), table::expected(caller, call, target.state, how), "{case}");
                // Not every call was made alone with a stale etag.
                if let Some(alone) = spoken.get(&(target.state, call, how)) {
                    assert_eq!(wording(&outcome), *alone, "{case}");
                }
            }
        }
    }
    Ok(())
}

type Answers = Vec<(Call, How, Wording)>;

/// Validates every call on one image.
///
/// Returns the image as lists show it, if the caller sees it, and how each call was refused.
async fn walk_image(
    client: &Client,
    caller: &str,
    target: &Target,
) -> anyhow::Result<(Option<api::Image>, Answers)> {
    let mut seen = None;
    let mut answers = Vec::new();
    for (call, action) in table::CALLS {
        if target.build.is_empty() && matches!(call, Call::GetBuild | Call::WatchBuild) {
            continue;
        }
        // The batches cover the other calls that take an etag; a cancel differs from one in a batch.
        let is_in_no_batch =
            matches!(call, Call::UpdateImage | Call::GrantAccess | Call::RevokeAccess | Call::CancelBuild);
        let stale = is_in_no_batch.then_some(How::AskWithStaleEtag);
        for how in [Some(How::Ask), stale].into_iter().flatten() {
            let case = format!("{caller}, {call:?}, {}, {how:?}", target.state);
            let answer = attempt(client, call, target, how).await;
            assert_eq!(status_text(&answer), table::expected(caller, call, target.state, how), "{case}");
            answers.push((call, how, wording(&answer)));
            if call == Call::GetImage {
                seen = answer.ok().flatten();
            } else if let (Some(image), Some(action), How::Ask) = (&seen, table::listed_action(action), how) {
                let already_so = if image.enabled() { ImageAction::Enable } else { ImageAction::Disable };
                let is_listed = image.allowed_actions().any(|allowed| allowed == action);
                assert_eq!(
                    is_listed,
                    answer.is_ok() && action != already_so,
                    "{case}: it does what it lists"
                );
            }
        }
    }
    if let Some(image) = &seen {
        let allowed: Vec<ImageAction> = image.allowed_actions().collect();
        assert_eq!(allowed, table::allowed(caller, target.state), "{caller}, {}", target.state);
    }
    // Lists omit the configuration.
    Ok((seen.map(|image| api::Image { config: None, ..image }), answers))
}

/// Makes every call with tokens that are refused, or with none.
async fn shut_out(service: &Service, targets: &[Target]) -> anyhow::Result<()> {
    let expired = service.token_for("creator", &[Role::Admin], std::time::Duration::ZERO);
    // A token is valid until the end of its last second.
    let late = service.client(&expired);
    eventually_true("the token expires", async || Ok(late.list().await.is_err())).await?;
    for (outsider, expected) in table::OUTSIDERS {
        let token = match outsider {
            "worker" => service.token("creator", &[Role::Admin, Role::Worker]),
            "expired" => expired.clone(),
            _ => String::new(),
        };
        let client = service.client(&token);
        assert_eq!(status_text(&client.list().await), expected, "{outsider}");
        assert_eq!(status_text(&client.first_state().await), expected, "{outsider}");
        for (action, _) in table::BATCHES {
            assert_eq!(
                status_text(&batch(&client, action, targets, How::Ask).await),
                expected,
                "{outsider}, {action:?}"
            );
        }
        for (target, (call, _)) in targets.iter().flat_map(|target| table::CALLS.map(|call| (target, call))) {
            let answer = attempt(&client, call, target, How::Ask).await;
            assert_eq!(status_text(&answer), expected, "{outsider}, {call:?}, {}", target.state);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_have_their_predicted_outcome() -> anyhow::Result<()> {
    let service = Service::start().await?;
    try_join_all(table::callers().into_iter().map(|caller| act(&service, caller))).await?;
    Ok(())
}

/// Makes every write as one caller, each on an image of its own.
async fn act(service: &Service, caller: &str) -> anyhow::Result<()> {
    let (admin, creator) = (client(service, "admin"), client(service, "creator"));
    let client = client(service, caller);
    for (call, action) in table::CALLS.into_iter().filter(|(call, _)| call.takes_etag()) {
        let state = STATES.into_iter().find(|state| table::does(state, action)).expect("it does something");
        let target = fresh(&creator, caller, state).await?;
        let case = format!("{caller}, {call:?}, {state}");
        if call == Call::RevokeAccess {
            creator.grant(&target.image, REVOKED, &[api::Permission::View]).await?;
        }
        let before = admin.get(&target.image).await?;
        let predicted = attempt(&client, call, &target, How::Ask).await;
        assert_eq!(status_text(&predicted), table::expected(caller, call, state, How::Ask), "{case}");
        let done = attempt(&client, call, &target, How::Do).await;
        assert_eq!(wording(&done), wording(&predicted), "{case}");
        let after = admin.get(&target.image).await.ok();
        let has_changed = after.is_none_or(|after| after.revision != before.revision);
        assert_eq!(has_changed, done.is_ok(), "{case}");
        if let (Some(predicted), Some(done)) = (predicted.ok().flatten(), done.ok().flatten()) {
            let now = client.get(&target.image).await?;
            for image in [predicted, done] {
                assert_eq!((image.status, image.enabled), (now.status, now.enabled), "{case}");
                assert_eq!(image.allowed_actions, now.allowed_actions, "{case}");
            }
        }
    }
    for (action, call) in table::BATCHES {
        let mut targets = vec![nowhere()];
        for state in STATES {
            targets.push(fresh(&creator, caller, state).await?);
        }
        let predicted = batch(&client, action, &targets, How::Ask).await?;
        let done = batch(&client, action, &targets, How::Do).await?;
        for ((target, predicted), done) in targets.iter().zip(predicted).zip(done) {
            let case = format!("{caller}, {action:?}, {}", target.state);
            assert_eq!(status_text(&done), table::expected(caller, call, target.state, How::Ask), "{case}");
            assert_eq!(wording(&done), wording(&predicted), "{case}");
            let is_gone = admin.get(&target.image).await.is_err();
            let is_deleted = call == Call::DeleteImage && done.is_ok();
            assert_eq!(is_gone, is_deleted || target.state == "missing", "{case}");
        }
    }
    Ok(())
}

/// States that between them let every write have an effect.
const STATES: [&str; 2] = ["image-queued", "image-cancelled-disabled"];

/// Creates an image of the creator's and admits the caller to it.
async fn fresh(creator: &Client, caller: &str, state: &'static str) -> anyhow::Result<Target> {
    let is_at_rest = state != "image-queued";
    let wanted = api::Image { enabled: Some(!is_at_rest), ..image(state, "FROM scratch") };
    let (created, build) = creator.create(wanted).await?;
    if is_at_rest {
        creator.cancel(&created.id).await?;
    }
    admit(creator, caller, &created.id, false).await?;
    Ok(Target { state, image: created.id, build: build.id })
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_decide_which_callers_create_images() -> anyhow::Result<()> {
    const MISSING: &str = "PermissionDenied ROLE_MISSING";
    const WORKER: &str = "PermissionDenied WORKER_TOKEN";
    let service = Service::start().await?;
    let creator = client(&service, "creator");
    let (source, _) = creator.create(image("Source", "FROM scratch")).await?;
    for (roles, create, snapshot) in [
        (&[][..], MISSING, MISSING),
        (&[Role::Builder], "OK", MISSING),
        (&[Role::Service], MISSING, "OK"),
        (&[Role::Builder, Role::Service], "OK", "OK"),
        (&[Role::Admin], "OK", "OK"),
        (&[Role::Worker], WORKER, WORKER),
        (&[Role::Worker, Role::Admin], WORKER, WORKER),
    ] {
        let client = service.client(&service.token("somebody", roles));
        for validate_only in [true, false] {
            let wanted = Some(image("Another", "FROM scratch"));
            let request =
                api::CreateImageRequest { image: wanted.clone(), validate_only, ..Default::default() };
            assert_eq!(status_text(&client.images.clone().create_image(request).await), create, "{roles:?}");
            let request = api::SnapshotWorkspaceRequest {
                source_image_id: source.id.clone(),
                worker: "w1".to_owned(),
                container: "workspace".to_owned(),
                creator: "creator".to_owned(),
                image: wanted,
                validate_only,
                ..Default::default()
            };
            let answer = client.images.clone().snapshot_workspace(request).await;
            assert_eq!(status_text(&answer), snapshot, "{roles:?}");
            let Some(taken) = answer.ok().and_then(|response| response.into_inner().image) else {
                continue;
            };
            assert_eq!(taken.creator, "creator");
            if !validate_only {
                // The image belongs to the creator: the caller that requested it sees it no more than others
                // do.
                let seen = client.get(&taken.id).await;
                assert_eq!(seen.is_ok(), roles.contains(&Role::Admin), "{roles:?}");
                let allowed = seen.map(|image| image.allowed_actions).unwrap_or_default();
                assert_eq!(taken.allowed_actions, allowed, "{roles:?}");
                assert_eq!(creator.get(&taken.id).await?.status(), ImageStatus::Snapshotting);
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_builders_change_the_configuration_and_reference() -> anyhow::Result<()> {
    const MISSING: &str = "PermissionDenied ROLE_MISSING";
    let service = Service::start().await?;
    let (created, _) = client(&service, "creator").create(image("Tools", "FROM scratch")).await?;
    admit(&client(&service, "creator"), "guest-m*", &created.id, false).await?;
    admit(&client(&service, "creator"), "guest-m", &created.id, true).await?;
    let other = image("Tools", "FROM scratch\nENV A=1");
    for (path, without_role) in [
        ("name", "OK"),
        ("description", "OK"),
        ("repository", MISSING),
        ("tag", MISSING),
        ("config", MISSING),
        ("*", MISSING),
    ] {
        for (caller, expected) in [
            ("creator*", without_role),
            ("guest-m*", without_role),
            ("guest-m", "OK"),
            ("creator", "OK"),
            ("admin", "OK"),
        ] {
            for validate_only in [true, false] {
                let request = api::UpdateImageRequest {
                    image: Some(api::Image { id: created.id.clone(), ..other.clone() }),
                    update_mask: Some(prost_types::FieldMask { paths: vec![path.to_owned()] }),
                    validate_only,
                    ..Default::default()
                };
                let answer = client(&service, caller).images.clone().update_image(request).await;
                assert_eq!(status_text(&answer), expected, "{caller}, {path}");
            }
        }
    }
    Ok(())
}

fn by_id(images: Vec<api::Image>) -> BTreeMap<String, api::Image> {
    images.into_iter().map(|image| (image.id.clone(), image)).collect()
}
