//! Lists of random images compared with a plain model, at rest and with many changes between pages.
//!
//! `TRAILER_TEST_SEED` runs a single seed.

use std::{collections::BTreeMap, env, ops::Range};

use anyhow::Context as _;
use proto::images::{self as api, ImageView};

use super::{model::compare, world::World};

const SEEDS: [u64; 2] = [1, 2];
const IMAGES: usize = 150;

fn seeds() -> anyhow::Result<Vec<u64>> {
    match env::var("TRAILER_TEST_SEED") {
        Ok(seed) => Ok(vec![seed.parse().context("TRAILER_TEST_SEED is no number")?]),
        Err(_) => Ok(SEEDS.into()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_what_a_plain_model_says() -> anyhow::Result<()> {
    for seed in seeds()? {
        // Shown if the test fails.
        eprintln!("TRAILER_TEST_SEED={seed}");
        let mut world = World::create(seed, IMAGES).await?;
        let (values, creators) = (world.values(), world.creators());
        let mut found = [0; 2];
        for _ in 0..300 {
            let request = world.random.request(&values, &creators);
            let caller = world.random.within(0..world.callers.len());
            let listed = list(&mut world, caller, request, 200..1_000, 0).await?;
            found[usize::from(listed > 0)] += 1;
        }
        assert!(
            found.iter().all(|count| *count > 50),
            "what is asked for is seldom there, or always: {found:?}"
        );
        for _ in 0..30 {
            let request = world.random.request(&values, &creators);
            let caller = world.random.within(0..world.callers.len());
            list(&mut world, caller, request, 1..20, 3).await?;
        }
        for caller in 0..world.callers.len() {
            for view in [ImageView::Basic, ImageView::Full] {
                let request = api::ListImagesRequest { view: view.into(), ..Default::default() };
                list(&mut world, caller, request, 0..60, 0).await?;
            }
        }
    }
    Ok(())
}

/// Fetches all pages, with up to `changes` changes between them, and compares each with the model.
///
/// Returns the number of images listed.
async fn list(
    world: &mut World,
    caller: usize,
    mut request: api::ListImagesRequest,
    sizes: Range<usize>,
    changes: usize,
) -> anyhow::Result<usize> {
    let caller = world.callers[caller].clone();
    let order = request.order_by.clone();
    let is_before = |a: &api::Image, b: &api::Image| compare(&order, a, b).is_lt();
    let mut listed: Vec<api::Image> = Vec::new();
    // Images that keep their place in the list.
    let mut staying = by_id(world.model.listed(&caller, &request));
    loop {
        let now = world.model.listed(&caller, &request);
        let rest = now.iter().filter(|image| listed.last().is_none_or(|last| is_before(last, image)));
        let size = world.random.within(sizes.clone());
        let most = if request.view() == ImageView::Full { 50 } else { 1_000 };
        let expected: Vec<&api::Image> =
            rest.clone().take(if size == 0 { 50 } else { size.min(most) }).collect();
        request.page_size = i32::try_from(size)?;
        let page = caller.client.images.clone().list_images(request.clone()).await?.into_inner();

        let context = || format!("{} lists {request:?} after {:?}", caller.subject, listed.last());
        let ids = |images: &[&api::Image]| images.iter().map(|image| image.id.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&page.images.iter().collect::<Vec<_>>()), ids(&expected), "{}", context());
        for (found, expected) in page.images.iter().zip(expected) {
            assert_eq!(found.search_hits.is_empty(), request.search.is_empty(), "{}", context());
            let found = api::Image { search_hits: Vec::new(), ..found.clone() };
            assert_eq!(&found, expected, "{}", context());
        }
        let total = request.include_total_size.then(|| i64::try_from(now.len())).transpose()?;
        assert_eq!(page.total_size, total, "{}", context());
        assert_eq!(page.next_page_token.is_empty(), page.images.len() == rest.count(), "{}", context());

        let now = by_id(now);
        staying.retain(|id, image| now.get(id).is_some_and(|now| compare(&order, now, image).is_eq()));
        listed.extend(page.images.into_iter().map(|image| api::Image { search_hits: Vec::new(), ..image }));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
        for _ in 0..world.random.within(0..changes + 1) {
            world.change().await?;
        }
    }
    assert!(listed.is_sorted_by(is_before), "no place of {order:?} comes twice");
    for id in staying.keys() {
        assert_eq!(
            listed.iter().filter(|image| image.id == *id).count(),
            1,
            "{id} had its place all the time"
        );
    }
    Ok(listed.len())
}

fn by_id(images: Vec<api::Image>) -> BTreeMap<String, api::Image> {
    images.into_iter().map(|image| (image.id.clone(), image)).collect()
}
