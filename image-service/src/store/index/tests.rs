use std::time::Duration;

use fastrand::Rng;
use sea_orm::ConnectionTrait as _;

use super::number;
use crate::{
    store::{
        Store,
        known::{fill, policy, update},
    },
    timestamp::Timestamp,
};

async fn unsettled(store: &Store) -> Result<i64, Box<dyn std::error::Error>> {
    let count = number(&store.reader, "SELECT COUNT(*) FROM unsettled_places", vec![]).await?;
    Ok(count.ok_or("a count")?)
}

#[tokio::test]
async fn however_much_is_changed_few_places_are_unsettled_and_in_the_end_none()
-> Result<(), Box<dyn std::error::Error>> {
    let directory = tempfile::tempdir()?;
    let store = Store::open(directory.path(), None, policy()).await?;
    let mut known = fill(&store, &mut Rng::with_seed(11), 1_200).await?;
    assert_eq!(unsettled(&store).await?, 0, "who changes too many settles them");
    let mut most = 0;
    for (number, known) in (10_000..).zip(&mut known) {
        update(&store, known, number).await?;
        most = most.max(unsettled(&store).await?);
    }
    assert!((900..=1_000).contains(&most), "{most}");
    while store.settle_places(Duration::ZERO).await? {}
    assert_eq!(unsettled(&store).await?, 0);
    let left = "SELECT COUNT(*) FROM image_places WHERE place NOT IN (SELECT rowid FROM image_index WHERE image_index MATCH 'e0 OR e1')";
    assert_eq!(number(&store.reader, left, vec![]).await?, Some(0));
    let left = "SELECT COUNT(*) FROM image_index WHERE image_index MATCH 'e0 OR e1'";
    assert_eq!(number(&store.reader, left, vec![]).await?, Some(1_200));
    store.close().await?;
    Ok(())
}

#[tokio::test]
async fn a_place_is_settled_when_its_image_has_been_left_alone() -> Result<(), Box<dyn std::error::Error>> {
    const LONG: Duration = Duration::from_secs(3_600);
    let directory = tempfile::tempdir()?;
    let store = Store::open(directory.path(), None, policy()).await?;
    let mut known = fill(&store, &mut Rng::with_seed(13), 3).await?;
    let now = Timestamp::now().micros();
    store.writer.execute_unprepared(&format!("UPDATE images SET updated_at = {now}")).await?;
    assert!(!store.settle_places(LONG).await?);
    assert_eq!(unsettled(&store).await?, 3);
    // It leaves the first place, where there is nothing to wait for.
    update(&store, &mut known[0], 10).await?;
    assert!(!store.settle_places(LONG).await?);
    assert_eq!(unsettled(&store).await?, 3);
    // The clock was set back since.
    store.writer.execute_unprepared("UPDATE images SET updated_at = updated_at + 7200000000").await?;
    assert!(!store.settle_places(LONG).await?);
    assert_eq!(unsettled(&store).await?, 0);
    store.close().await?;
    Ok(())
}

/// What a version has left that wrote the index with each change.
#[tokio::test]
async fn an_index_that_was_never_behind_is_not_made_anew() -> Result<(), Box<dyn std::error::Error>> {
    const INDEXED: &str = "SELECT COUNT(*) FROM image_index WHERE image_index MATCH 'e0 OR e1'";
    let directory = tempfile::tempdir()?;
    let store = Store::open(directory.path(), None, policy()).await?;
    fill(&store, &mut Rng::with_seed(12), 60).await?;
    while store.settle_places(Duration::ZERO).await? {}
    // One that is made anew has it again.
    store.writer.execute_unprepared("DELETE FROM image_index WHERE rowid = 1").await?;
    store.writer.execute_unprepared("PRAGMA user_version = 1").await?;
    store.close().await?;
    for _ in 0..2 {
        let store = Store::open(directory.path(), None, policy()).await?;
        assert_eq!(number(&store.reader, INDEXED, vec![]).await?, Some(59));
        store.close().await?;
    }
    Ok(())
}
