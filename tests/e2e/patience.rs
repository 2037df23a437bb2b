//! Retries of calls, as the manual prescribes.

use std::{
    future::Future,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use proto::images as api;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::client::Client;

/// Reports whether the manual says that a call should be retried.
fn may_be_tried_again(status: &Status) -> bool {
    let is_ours = status.get_details_error_info().is_some();
    let by_connection = matches!(status.code(), Code::Unknown | Code::Cancelled | Code::Internal) && !is_ours;
    let has_retry_info = status.get_details_retry_info().is_some();
    status.code() == Code::Unavailable || by_connection || has_retry_info
}

/// Retries a call as the manual prescribes until it is answered, and counts the retries.
pub(crate) async fn patiently<T, F>(tries: &AtomicUsize, mut call: impl FnMut() -> F) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let mut pause = Duration::from_millis(20);
    loop {
        match call().await {
            Err(status) if may_be_tried_again(&status) => {
                tries.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            answered => return answered,
        }
    }
}

/// Creates an image exactly once, with retries, and returns it with its first build.
pub(crate) async fn create(
    client: &Client,
    image: api::Image,
    tries: &AtomicUsize,
) -> Result<(api::Image, api::Build), Status> {
    let request = api::CreateImageRequest {
        image: Some(image),
        request_id: uuid::Uuid::new_v4().to_string(),
        ..Default::default()
    };
    let created = patiently(tries, || async { client.images.clone().create_image(request.clone()).await });
    let created = created.await?.into_inner();
    Ok((created.image.expect("an image"), created.build.expect("a build")))
}
