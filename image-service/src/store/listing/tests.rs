//! Pages of very short walks against a plain model: whatever is asked for, all pages together are what sorting gives.

use std::{
    cmp::Ordering,
    collections::BTreeSet,
    time::{Duration, Instant},
};

use fastrand::Rng;
use sea_orm::{
    ConnectionTrait, EntityTrait, Set, TransactionTrait,
    sea_query::{Expr, Query as SqlQuery},
};
use tokio::time::{sleep, timeout};

use super::Bounds;
use crate::{
    access::Sight,
    image::{Direction, Image, ImageId, Order, Query, Status, View},
    search::Term,
    store::{
        Committed, Store, changes, connecting,
        entity::image,
        eras,
        known::{CREATORS, GUEST, Known, SELDOM, fill, policy, share_or_not, update},
        texts,
    },
    timestamp::Timestamp,
};

const TERMS: [&str; 13] =
    ["ubuntu", "rust", "日本語", "q", "bu", "語", "st", "zzz", "z", "::;", ":::", SELDOM, "m"];

#[tokio::test]
async fn all_pages_together_are_what_sorting_gives() -> Result<(), Box<dyn std::error::Error>> {
    list_all(None).await
}

#[tokio::test]
async fn all_pages_together_are_what_sorting_gives_on_postgres() -> Result<(), Box<dyn std::error::Error>> {
    on_postgres(async |url| list_all(Some(url)).await).await
}

/// In an empty database on Postgres.
async fn on_postgres(
    test: impl AsyncFnOnce(&str) -> Result<(), Box<dyn std::error::Error>>,
) -> Result<(), Box<dyn std::error::Error>> {
    let Ok(server) = std::env::var("TRAILER_TEST_POSTGRES_URL") else {
        return Ok(());
    };
    let (path, parameters) = server.split_once('?').unwrap_or((server.as_str(), ""));
    let (host, _) = path.rsplit_once('/').ok_or("a database in the URL")?;
    let name = format!("listing_{}", fastrand::u64(..));
    let on_server = connecting::connect(&server, 1).await?;
    on_server.execute_unprepared(&format!("CREATE DATABASE {name}")).await?;
    let tested = test(&format!("{host}/{name}?{parameters}")).await;
    on_server.execute_unprepared(&format!("DROP DATABASE {name} WITH (FORCE)")).await?;
    on_server.close().await?;
    tested
}

/// On SQLite, or in an empty database on Postgres.
async fn list_all(url: Option<&str>) -> Result<(), Box<dyn std::error::Error>> {
    let directory = tempfile::tempdir()?;
    let mut store = Store::open(directory.path(), url, policy()).await?;
    let mut random = Rng::with_seed(8);
    let mut known = fill(&store, &mut random, 90).await?;
    let (mut pages, mut empty) = (0, 0);
    for number in 0..120 {
        store.bounds = Bounds {
            few: random.u64(0..8),
            stretch: random.u64(3..40),
            candidates: random.u64(1..40),
            near: random.u64(0..40),
            granted: random.u64(0..60),
            eras: eras::Sizes {
                era: random.i64(1..20),
                latest: random.i64(0..10),
                at_once: random.i64(1..8),
                looked_into: random.i64(1..60),
            },
        };
        let updated = random.usize(0..known.len());
        update(&store, &mut known[updated], 1_000 + number).await?;
        let shared = random.usize(0..known.len());
        share_or_not(&store, &mut known[shared]).await?;
        while store.advance_eras().await? {}
        if random.bool() {
            while store.settle_places(Duration::ZERO).await? {}
        }
        let query = query(&mut random)?;
        let sight = match random.usize(0..4) {
            0 => Sight::Everything,
            1 => Sight::Of(GUEST.to_owned()),
            _ => Sight::Of(CREATORS[random.usize(0..3)].to_owned()),
        };
        let mut listed = Vec::new();
        let mut after = None;
        loop {
            let limit = random.u64(1..8);
            let page = store.list(&sight, &query, after.as_ref(), limit, View::Basic, false).await?;
            assert!(page.images.len() as u64 <= limit);
            pages += 1;
            empty += usize::from(page.images.is_empty());
            listed.extend(page.images.into_iter().map(|found| found.image.id));
            let Some(next) = page.next else {
                break;
            };
            assert!(query.order.fits(&next), "{next:?}");
            assert!(after.as_ref() != Some(&next), "{query:?} stays at {next:?}");
            after = Some(next);
        }
        assert_eq!(
            listed,
            expected(&known, &sight, &query),
            "{number}: {sight:?} {query:?} {:?}",
            store.bounds
        );
    }
    assert!(empty > 10 && pages > 400, "{empty} of {pages} pages were empty");
    store.close().await?;
    Ok(())
}

#[tokio::test]
async fn on_postgres_what_only_old_images_hold_is_on_the_first_page() -> Result<(), Box<dyn std::error::Error>>
{
    on_postgres(async |url| {
        let directory = tempfile::tempdir()?;
        let mut store = Store::open(directory.path(), Some(url), policy()).await?;
        let mut known = fill(&store, &mut Rng::with_seed(10), 200).await?;
        known.sort_by_key(|known| known.image.updated_at);
        let oldest: Vec<String> = known[..5].iter().map(|known| format!("'{}'", known.image.id)).collect();
        let oldest = oldest.join(", ");
        for statement in [
            "UPDATE image_texts SET text = 'young'".to_owned(),
            format!("UPDATE image_texts SET text = 'legacy' WHERE image IN ({oldest})"),
        ] {
            store.writer.execute_unprepared(&statement).await?;
        }
        // A first stretch ends among the latest.
        let eras = eras::Sizes { era: 10, latest: 30, at_once: 5, looked_into: 40 };
        store.bounds = Bounds { few: 0, stretch: 150, candidates: 1, near: 1, granted: 0, eras };
        let first = async |store: &Store, term: &str| {
            let query = Query { search: Term::parse(term)?, ..Query::default() };
            let page = store.list(&Sight::Everything, &query, None, 5, View::Basic, false).await?;
            Ok::<_, Box<dyn std::error::Error>>((page.images.len(), page.next.is_some()))
        };
        for term in ["legacy", "none"] {
            assert_eq!(first(&store, term).await?, (0, true), "{term}, before there are eras");
        }
        while store.advance_eras().await? {}
        assert_eq!(first(&store, "legacy").await?, (5, false));
        assert_eq!(first(&store, "none").await?, (0, false));
        assert_eq!(first(&store, "young").await?, (5, true));

        // Who is updated is among the latest again, and in a later era when others are.
        update(&store, &mut known[0], 1_000).await?;
        assert_eq!(first(&store, "legacy").await?.0, 1);
        for (number, known) in (1_001..).zip(&mut known[100..150]) {
            update(&store, known, number).await?;
        }
        while store.advance_eras().await? {}
        let page = first(&store, "legacy").await?;
        assert_eq!(page, (1, true));
        Ok(store.close().await?)
    })
    .await
}

/// As a backup reads when an upgrade begins.
#[tokio::test]
async fn on_postgres_nobody_waits_behind_an_upgrade_for_who_reads_long()
-> Result<(), Box<dyn std::error::Error>> {
    on_postgres(async |url| {
        let directory = tempfile::tempdir()?;
        Store::open(directory.path(), Some(url), policy()).await?.close().await?;
        let others = connecting::connect(url, 2).await?;
        for statement in [
            "ALTER TABLE image_texts DROP COLUMN era",
            "DROP TABLE eras",
            "DELETE FROM seaql_migrations WHERE version = 'm0014_eras'",
        ] {
            others.execute_unprepared(statement).await?;
        }
        let long = others.begin().await?;
        long.execute_unprepared("SELECT COUNT(*) FROM image_texts").await?;
        let (path, url) = (directory.path().to_owned(), url.to_owned());
        let mut upgrade = tokio::spawn(async move { Store::open(&path, Some(&url), policy()).await });
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(2) {
            let read = others.execute_unprepared("SELECT COUNT(*) FROM image_texts");
            timeout(Duration::from_secs(1), read).await??;
            sleep(Duration::from_millis(10)).await;
        }
        assert!(!upgrade.is_finished());
        long.commit().await?;
        let upgraded = timeout(Duration::from_secs(20), &mut upgrade).await???;
        upgraded.close().await?;
        Ok(others.close().await?)
    })
    .await
}

/// On Postgres, where a term can take long to be found.
#[tokio::test]
async fn what_is_not_found_in_time_is_given_up() -> Result<(), Box<dyn std::error::Error>> {
    let Ok(url) = std::env::var("TRAILER_TEST_POSTGRES_URL") else {
        return Ok(());
    };
    let database = connecting::connect(&url, 1).await?;
    let txn = database.begin().await?;
    let after = |seconds: u8| {
        let mut select = SqlQuery::select();
        select.expr(Expr::cust(format!("gen_random_uuid() FROM pg_sleep({seconds})")));
        select
    };
    assert_eq!(texts::found_in_time(&txn, after(0), 9).await?.map(|found| found.len()), Some(1));
    assert_eq!(texts::found_in_time(&txn, after(60), 9).await?, None);
    // The transaction goes on, and others may take longer.
    txn.execute_unprepared("SELECT pg_sleep(0.1)").await?;
    txn.commit().await?;
    Ok(database.close().await?)
}

/// As the version before has left it, but that its images were updated by a clock that was ahead.
#[tokio::test]
async fn after_an_upgrade_everything_is_found_and_the_next_change_is_the_last()
-> Result<(), Box<dyn std::error::Error>> {
    const AHEAD: i64 = i64::MAX / 2;
    let directory = tempfile::tempdir()?;
    let store = Store::open(directory.path(), None, policy()).await?;
    let known = fill(&store, &mut Rng::with_seed(9), 60).await?;
    let later = format!("UPDATE images SET updated_at = updated_at + {AHEAD}");
    for statement in [
        later.as_str(),
        "ALTER TABLE catalogue DROP COLUMN changed_at",
        "DROP TABLE image_places",
        "DROP TABLE image_index",
        "DELETE FROM seaql_migrations WHERE version IN ('m0010_change_times', 'm0011_finding')",
        "PRAGMA user_version = 0",
    ] {
        store.writer.execute_unprepared(statement).await?;
    }
    store.close().await?;

    let store = Store::open(directory.path(), None, policy()).await?;
    let query = Query::default();
    let list = async || store.list(&Sight::Everything, &query, None, 100, View::Basic, false).await;
    let listed = list().await?.images.into_iter().map(|found| found.image.id).collect::<Vec<_>>();
    assert_eq!(listed, expected(&known, &Sight::Everything, &query));

    let oldest = *listed.last().ok_or("images")?;
    let txn = store.write().await?;
    let logged = changes::log(&txn, oldest, "ann", &BTreeSet::new(), Timestamp::now()).await?;
    assert!(logged.at.micros() > AHEAD, "{logged:?}");
    let row =
        image::ActiveModel { id: Set(oldest.0), updated_at: Set(logged.at.micros()), ..Default::default() };
    image::Entity::update(row).exec(&txn).await?;
    store.commit(txn, &Committed { changed: [oldest].into(), ..Committed::default() }).await?;
    assert_eq!(list().await?.images.first().map(|found| found.image.id), Some(oldest));
    store.close().await?;
    Ok(())
}

fn expected(known: &[Known], sight: &Sight, query: &Query) -> Vec<ImageId> {
    let mut matching: Vec<&Image> = known
        .iter()
        .filter(|known| match sight {
            Sight::Everything => true,
            Sight::Of(subject) => {
                *subject == known.image.creator || known.granted_to.contains(&subject.as_str())
            }
        })
        .filter(|known| query.search.as_ref().is_none_or(|term| known.text.contains(term.as_str())))
        .map(|known| &known.image)
        .filter(|image| query.admits(image))
        .collect();
    matching.sort_by(|a, b| {
        let by_key = query.order.keys().iter().map(|(key, direction)| {
            let ordering = key.of(a).cmp(&key.of(b));
            if *direction == Direction::Descending { ordering.reverse() } else { ordering }
        });
        by_key.fold(Ordering::Equal, Ordering::then).then(a.id.0.cmp(&b.id.0))
    });
    matching.into_iter().map(|image| image.id).collect()
}

fn query(random: &mut Rng) -> Result<Query, String> {
    const NAMES: [&str; 8] =
        ["name", "creator", "status", "image_name", "enabled", "pulled", "create_time", "update_time"];
    let mut names = NAMES;
    random.shuffle(&mut names);
    let keys: Vec<String> = names[..random.usize(0..4)]
        .iter()
        .map(|name| format!("{name}{}", if random.bool() { " desc" } else { "" }))
        .collect();
    let mut maybe = |one_in: u8| random.u8(0..one_in) == 0;
    let (search, template, enabled, pulled, creator, statuses) =
        (maybe(3), maybe(4), maybe(4), maybe(4), maybe(5), maybe(4));
    Ok(Query {
        search: if search { Term::parse(TERMS[random.usize(0..TERMS.len())])? } else { None },
        template: template.then(|| random.u8(0..4) == 0),
        statuses: if statuses {
            BTreeSet::from([Status::BuildFinished, Status::Error])
        } else {
            BTreeSet::new()
        },
        enabled: enabled.then(|| random.bool()),
        pulled: pulled.then(|| random.bool()),
        creator: creator.then(|| CREATORS[random.usize(0..3)].to_owned()),
        order: Order::parse(&keys.join(", "))?,
    })
}
