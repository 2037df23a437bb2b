//! Writes that are pinned by an etag.

use proto::images as api;
use tonic::Code;

use crate::{
    answers::refused,
    client::{grant_of, image, revoked_from},
    stack::Service,
};

/// A dialog shows more than clients write: the etag that covers all of it changes with all of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_etag_pins_what_was_shown() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("Pinned", "FROM scratch")).await?;
    let id = || created.id.clone();
    let (mut images, mut access) = (alice.images.clone(), alice.access.clone());
    let mismatch = (Code::Aborted, "ETAG_MISMATCH".to_owned());

    let shown = alice.get(&created.id).await?;
    alice.grant(&created.id, "bob", &[api::Permission::View]).await?;
    let granted = alice.get(&created.id).await?;
    assert_eq!(granted.etag, shown.etag);
    alice.cancel(&created.id).await?;
    let cancelled = alice.get(&created.id).await?;
    assert_eq!(cancelled.etag, shown.etag);
    images
        .disable_image(api::DisableImageRequest { id: id(), etag: shown.etag, ..Default::default() })
        .await?;
    let disabled = alice.get(&created.id).await?;
    for stale in [shown.state_etag, granted.state_etag, cancelled.state_etag] {
        let etag = || stale.clone();
        let enable = api::EnableImageRequest { id: id(), etag: etag(), ..Default::default() };
        assert_eq!(refused(images.enable_image(enable).await), mismatch);
        let built =
            images.build_image(api::BuildImageRequest { id: id(), etag: etag(), ..Default::default() });
        assert_eq!(refused(built.await), mismatch);
        let cancel = api::CancelBuildRequest { id: id(), etag: etag(), ..Default::default() };
        assert_eq!(refused(images.cancel_build(cancel).await), mismatch);
        let named = api::Image { id: id(), name: "New".to_owned(), etag: etag(), ..Default::default() };
        let update = api::UpdateImageRequest { image: Some(named), ..Default::default() };
        assert_eq!(refused(images.update_image(update).await), mismatch);
        let grant = Some(grant_of("carol", Vec::new()));
        let grant = api::GrantAccessRequest { image_id: id(), grant, etag: etag(), ..Default::default() };
        assert_eq!(refused(access.grant_access(grant).await), mismatch);
        let revoke = api::RevokeAccessRequest {
            image_id: id(),
            grantee: revoked_from("bob"),
            etag: etag(),
            ..Default::default()
        };
        assert_eq!(refused(access.revoke_access(revoke).await), mismatch);
        let deleted =
            images.delete_image(api::DeleteImageRequest { id: id(), etag: etag(), ..Default::default() });
        assert_eq!(refused(deleted.await), mismatch);
        let row = api::BatchTarget { id: id(), etag: etag() };
        let batch = api::BatchImagesRequest {
            action: api::BatchAction::Enable.into(),
            targets: vec![row],
            ..Default::default()
        };
        let results = images.batch_images(batch).await?.into_inner().results;
        assert!(
            matches!(&results[0].result, Some(api::batch_result::Result::Error(error)) if error.code == Code::Aborted as i32),
            "{results:?}"
        );
    }
    let other = alice.create(image("Other", "FROM scratch")).await?.1;
    for (build_id, expected) in [
        (other.id, (Code::NotFound, "BUILD_NOT_FOUND")),
        (uuid::Uuid::now_v7().to_string(), (Code::NotFound, "BUILD_NOT_FOUND")),
        (build.id, (Code::FailedPrecondition, "NO_BUILD_IN_PROGRESS")),
    ] {
        let cancel = api::CancelBuildRequest { id: id(), build_id, ..Default::default() };
        let (code, reason) = refused(images.cancel_build(cancel).await);
        assert_eq!((code, reason.as_str()), expected);
    }
    let enable = api::EnableImageRequest { id: id(), etag: disabled.state_etag, ..Default::default() };
    images.enable_image(enable).await?;
    Ok(())
}
