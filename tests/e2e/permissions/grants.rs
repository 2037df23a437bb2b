//! Grants, which take effect at once and leave the record unchanged.

use proto::images::{self as api, ImageAction, Permission, WatchImagesRequest, watch_images_response::Event};
use tonic::{Code, Streaming};

use super::{calls::status_text, cast::client};
use crate::{
    answers::{fields, reason},
    client::{Client, grant_of, image, subject_of},
    stack::{LIMIT, Service},
};

/// Opens a watch and reads its initial state.
async fn watch(client: &Client) -> anyhow::Result<Streaming<api::WatchImagesResponse>> {
    let mut stream = client.images.clone().watch_images(WatchImagesRequest::default()).await?.into_inner();
    while !matches!(next(&mut stream).await?, Event::Synced(_)) {}
    Ok(stream)
}

async fn next(stream: &mut Streaming<api::WatchImagesResponse>) -> anyhow::Result<Event> {
    tokio::time::timeout(LIMIT, async {
        loop {
            match stream.message().await?.and_then(|message| message.event) {
                Some(Event::Bookmark(_)) => {}
                Some(event) => return Ok(event),
                None => anyhow::bail!("the watch ended without saying why"),
            }
        }
    })
    .await?
}

fn changed(event: Event) -> anyhow::Result<api::Image> {
    let Event::Changed(image) = event else {
        anyhow::bail!("{event:?} is no change");
    };
    Ok(*image)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creator_has_all_permissions_whatever_it_is_granted() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let creator = service.builder("creator");
    let (created, _) = creator.create(image("Own", "FROM scratch")).await?;
    let all: Vec<i32> = [Permission::View, Permission::Modify, Permission::Delete].map(Into::into).into();
    for validate_only in [true, false] {
        for permissions in [vec![], vec![Permission::View.into()]] {
            let grant = Some(grant_of("creator", permissions));
            let request = api::GrantAccessRequest {
                image_id: created.id.clone(),
                grant,
                validate_only,
                ..Default::default()
            };
            let granted = creator.access.clone().grant_access(request).await?.into_inner().grant;
            assert_eq!(granted.map(|grant| grant.permissions), Some(all.clone()));
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_follows_what_its_caller_is_granted() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (creator, bob) = (client(&service, "creator"), service.builder("bob"));
    let (shared, _) = creator.create(image("Shared", "FROM scratch")).await?;
    let (hidden, _) = creator.create(image("Hidden", "FROM scratch")).await?;
    let (zoe, mut watched) = (client(&service, "zoe"), watch(&bob).await?);
    let mut of_zoe = watch(&zoe).await?;

    // No event about the other images and callers may come in between.
    creator.cancel(&hidden.id).await?;
    creator.grant(&hidden.id, "zoe", &[Permission::View]).await?;
    creator.revoke(&hidden.id, "zoe").await?;
    creator.grant(&shared.id, "bob", &[Permission::View]).await?;
    let seen = changed(next(&mut watched).await?)?;
    assert_eq!((seen.id, seen.allowed_actions), (shared.id.clone(), vec![ImageAction::Clone.into()]));

    creator.grant(&shared.id, "zoe", &[Permission::Modify]).await?;
    let seen = changed(next(&mut watched).await?)?;
    assert_eq!((seen.id, seen.allowed_actions), (shared.id.clone(), vec![ImageAction::Clone.into()]));
    creator.grant(&shared.id, "bob", &[Permission::Modify, Permission::Delete]).await?;
    let seen = changed(next(&mut watched).await?)?;
    assert_eq!(seen.allowed_actions, bob.get(&shared.id).await?.allowed_actions);
    assert!(seen.allowed_actions().any(|action| action == ImageAction::Delete));

    creator.delete(&hidden.id).await?;
    creator.revoke(&shared.id, "bob").await?;
    assert!(matches!(next(&mut watched).await?, Event::Removed(removed) if removed.id == shared.id));
    creator.delete(&shared.id).await?;
    let (own, _) = bob.create(image("Own", "FROM scratch")).await?;
    assert_eq!(changed(next(&mut watched).await?)?.id, own.id);

    // Zoe hears of the removal of what she saw, and of nothing else.
    loop {
        match next(&mut of_zoe).await? {
            Event::Changed(image) => assert!([&shared.id, &hidden.id].contains(&&image.id)),
            Event::Removed(removed) if removed.id == shared.id => break,
            Event::Removed(removed) => assert_eq!(removed.id, hidden.id),
            event @ (Event::Image(_) | Event::Synced(_) | Event::Bookmark(_)) => {
                anyhow::bail!("{event:?} is no news")
            }
        }
    }
    Ok(())
}

/// Checks that each change reaches its grantees, although the feed does not always reread grants.
#[tokio::test(flavor = "multi_thread")]
async fn every_change_goes_to_those_of_then() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (creator, bob, zoe) = (client(&service, "creator"), service.builder("bob"), client(&service, "zoe"));
    let mut template = image("Shared", "FROM scratch");
    template.template = true;
    let request = api::CreateImageRequest { image: Some(template), ..Default::default() };
    let shared = creator.images.clone().create_image(request).await?.into_inner().image.expect("an image");
    let (mut of_bob, mut of_zoe) = (watch(&bob).await?, watch(&zoe).await?);
    let mut enabled = true;
    let mut toggle = async || {
        enabled = !enabled;
        let (id, mut images) = (shared.id.clone(), creator.images.clone());
        let image = if enabled {
            let request = api::EnableImageRequest { id, ..Default::default() };
            images.enable_image(request).await?.into_inner().image
        } else {
            let request = api::DisableImageRequest { id, ..Default::default() };
            images.disable_image(request).await?.into_inner().image
        };
        Ok::<_, tonic::Status>(image.expect("an image"))
    };
    for round in 0..5 {
        toggle().await?;
        creator.grant(&shared.id, "bob", &[Permission::View]).await?;
        assert_eq!(changed(next(&mut of_bob).await?)?.id, shared.id, "{round}");
        let revision = toggle().await?.revision;
        assert_eq!(changed(next(&mut of_bob).await?)?.revision, revision, "{round}");
        creator.grant(&shared.id, "zoe", &[Permission::View]).await?;
        let revision = toggle().await?.revision;
        while changed(next(&mut of_zoe).await?)?.revision < revision {}
        while changed(next(&mut of_bob).await?)?.revision < revision {}

        // Without a pause, so that the feed may read the image in its state after both changes.
        creator.revoke(&shared.id, "zoe").await?;
        let revision = toggle().await?.revision;
        assert!(
            matches!(next(&mut of_zoe).await?, Event::Removed(removed) if removed.id == shared.id),
            "{round}"
        );
        while changed(next(&mut of_bob).await?)?.revision < revision {}
        creator.revoke(&shared.id, "bob").await?;
        toggle().await?;
        assert!(
            matches!(next(&mut of_bob).await?, Event::Removed(removed) if removed.id == shared.id),
            "{round}"
        );
    }
    let (own, _) = bob.create(image("Own", "FROM scratch")).await?;
    assert_eq!(changed(next(&mut of_bob).await?)?.id, own.id);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_of_a_build_ends_when_it_goes_out_of_sight() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (creator, bob) = (client(&service, "creator"), client(&service, "bob"));
    let (created, build) = creator.create(image("A", "FROM scratch")).await?;
    creator.grant(&created.id, "bob", &[Permission::Delete]).await?;
    let request = api::WatchBuildRequest { id: build.id.clone(), after_sequence: 0 };
    let mut events = bob.builds.clone().watch_build(request).await?.into_inner();
    assert!(events.message().await?.is_some());
    creator.revoke(&created.id, "bob").await?;
    let ended = tokio::time::timeout(LIMIT, events.message()).await?.expect_err("it is out of sight");
    assert_eq!((ended.code(), reason(&ended).as_str()), (Code::NotFound, "BUILD_NOT_FOUND"));
    assert_eq!(status_text(&bob.get_build(&build.id).await), "NotFound BUILD_NOT_FOUND");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn grants_are_no_change_of_the_record() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (creator, bob) = (client(&service, "creator"), client(&service, "bob"));
    let (created, _) = creator.create(image("A", "FROM scratch")).await?;
    let mut revision = created.revision;
    for permissions in [&[Permission::Delete][..], &[Permission::Modify], &[]] {
        let granted = creator.grant(&created.id, "bob", permissions).await?;
        let view = (!permissions.is_empty()).then_some(Permission::View);
        let implied: Vec<Permission> = view.into_iter().chain(permissions.iter().copied()).collect();
        assert_eq!((subject_of(&granted), granted.permissions().collect()), ("bob", implied));
        let now = creator.get(&created.id).await?;
        assert!(now.revision > revision, "{permissions:?}");
        revision = now.revision;
        assert_ne!(now.state_etag, created.state_etag);
        let state_etag = created.state_etag.clone();
        assert_eq!(api::Image { revision: created.revision, state_etag, ..now }, created);
    }
    // An empty grant is the same as no grant.
    assert_eq!(status_text(&bob.get(&created.id).await), "NotFound IMAGE_NOT_FOUND");
    assert_eq!(creator.grants(&created.id, 0).await?, []);

    creator.grant(&created.id, "bob", &[Permission::Delete]).await?;
    assert_eq!(
        status_text(&bob.cancel(&created.id).await),
        "PermissionDenied ACTION_FORBIDDEN IMAGE_ACTION_CANCEL_BUILD"
    );
    bob.delete(&created.id).await?;
    assert_eq!(status_text(&creator.get(&created.id).await), "NotFound IMAGE_NOT_FOUND");
    assert_eq!(status_text(&creator.grants(&created.id, 0).await), "NotFound IMAGE_NOT_FOUND");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn grants_are_listed_by_subject_and_page_by_page() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (creator, admin) = (client(&service, "creator"), client(&service, "admin"));
    let (created, _) = creator.create(image("A", "FROM scratch")).await?;
    let (other, _) = creator.create(image("B", "FROM scratch")).await?;
    // In the order of code points, on every database.
    let subjects = ["Zoe", "a b", "a-b", "ab", "bob", "zoe", "ä"];
    for subject in subjects.iter().rev() {
        creator.grant(&created.id, subject, &[Permission::View]).await?;
    }
    for page_size in [0, 1, 2, 7, 1_001] {
        let listed = creator.grants(&created.id, page_size).await?;
        assert_eq!(listed.iter().map(subject_of).collect::<Vec<_>>(), subjects);
    }
    let first = api::ListGrantsRequest { image_id: created.id.clone(), page_size: 2, ..Default::default() };
    let page = creator.access.clone().list_grants(first.clone()).await?.into_inner();
    assert_eq!(page.grants.len(), 2);
    let next = api::ListGrantsRequest { page_token: page.next_page_token, ..first };
    // A grant that is added or removed between two pages moves no other.
    creator.revoke(&created.id, "Zoe").await?;
    creator.grant(&created.id, "a", &[Permission::View]).await?;
    let page = creator.access.clone().list_grants(next.clone()).await?.into_inner();
    assert_eq!(page.grants.iter().map(subject_of).collect::<Vec<_>>(), ["a-b", "ab"]);

    let of_other = api::ListGrantsRequest { image_id: other.id, ..next.clone() };
    let negative = api::ListGrantsRequest { page_size: -1, ..next.clone() };
    for (client, request, field) in
        [(&creator, of_other, "page_token"), (&admin, next, "page_token"), (&creator, negative, "page_size")]
    {
        let refused = client.access.clone().list_grants(request).await.expect_err("it is refused");
        assert_eq!((refused.code(), fields(&refused)), (Code::InvalidArgument, vec![field.to_owned()]));
    }
    Ok(())
}
