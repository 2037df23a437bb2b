//! Tests that the queue's statements use indexes without finished builds.

use std::{collections::BTreeSet, error::Error, sync::Arc, time::Duration};

use sea_orm::Values;
use uuid::Uuid;

use super::*;
use crate::{
    access::{Pools, Principal, Role},
    build::{BuildId, State},
    dispatch::{Connected, DispatchStore as _, Event, Hello, PROTOCOL_VERSION},
    error::Violations,
    image::{
        Capability, ConfigurationDraft, Dockerfile, EngineContents, ImageDraft, ImageId, NewImage,
        RepositoryPrefixes, Source,
    },
    request::Request,
    store::{Store, pool::record_statements, values::Stored as _},
    turns::Turn,
};

type Outcome = Result<(), Box<dyn Error>>;

fn request(subject: &str) -> Request {
    let never = Timestamp::from_micros(i64::MAX);
    let caller = Principal::new(subject.to_owned(), vec![Role::Builder, Role::Admin], never);
    Request::plain(caller)
}

fn image(name: &str) -> Result<NewImage, Box<dyn Error>> {
    let dockerfile = Dockerfile { text: "FROM scratch".to_owned(), ..Dockerfile::default() };
    let draft = ImageDraft {
        name: name.to_owned(),
        configuration: Some(ConfigurationDraft::from_source(Source::Dockerfile(dockerfile))),
        description: String::new(),
        repository: String::new(),
        tag: String::new(),
        template: false,
        enabled: None,
    };
    let prefixes = RepositoryPrefixes::parse(&["trailer.invalid/".to_owned()])?;
    draft
        .check(&prefixes.namespace("alice", false), Violations::default())
        .map_err(|error| format!("{error:?}").into())
}

fn hello(slots: i32) -> Hello {
    Hello {
        name: "w1".to_owned(),
        instance: "a process".to_owned(),
        labels: Default::default(),
        slots,
        engine_version: String::new(),
        capabilities: BTreeSet::from([Capability::Dockerfile]),
        pools: Pools::default(),
        holds: Vec::new(),
        protocol_version: PROTOCOL_VERSION,
        unsupported_reason: String::new(),
        withheld: Vec::new(),
        engine_warning: String::new(),
    }
}

async fn open(directory: &tempfile::TempDir, max_pending: Option<u64>) -> Result<Store, Box<dyn Error>> {
    let policy = Policy { retry_backoff: Duration::ZERO, max_pending, ..Policy::OF_TESTS };
    Ok(Store::open(directory.path(), None, policy).await?)
}

/// Queues the first build of a new image, and returns both with the build's round.
async fn queue(store: &Store, subject: &str) -> Result<(ImageId, BuildId, i64), Box<dyn Error>> {
    let image = image("An image")?;
    let ((image, build), _) =
        store.transact(&request(subject), async |write| write.create(&image).await).await?;
    let build = build.ok_or("its first build")?.build;
    Ok((image.image.id, build.id, build.round))
}

async fn claim(store: &Store, slots: i32) -> Result<Vec<BuildId>, Box<dyn Error>> {
    let session = Uuid::new_v4();
    store.open_session(&hello(slots), session).await?;
    let worker = Connected { name: "w1".to_owned(), session };
    let (decisions, _) = store.claim(&[worker]).await?;
    Ok(decisions.into_iter().filter_map(|decision| decision.build.map(|build| build.id)).collect())
}

#[test]
fn the_conditions_name_the_states() {
    let codes = |holds: fn(State) -> bool| {
        use State::{Cancelled, Claimed, Failed, Publishing, Queued, Running, Succeeded};
        let states = [Queued, Claimed, Running, Publishing, Succeeded, Failed, Cancelled];
        states.into_iter().filter(|state| holds(*state)).map(|state| state.to_simple()).collect::<Vec<_>>()
    };
    assert_eq!(codes(|state| state == State::Queued), [1]);
    assert_eq!(codes(State::is_held), [2, 3, 4]);
    assert_eq!(codes(|state| !state.is_final()), [1, 2, 3, 4]);
}

#[tokio::test]
async fn a_waiting_head_holds_up_nothing_behind_it() -> Outcome {
    const WAITING: usize = 20;
    let directory = tempfile::tempdir()?;
    let store = open(&directory, None).await?;
    // Online on another replica, as far as this one knows.
    store.open_session(&Hello { name: "w2".to_owned(), ..hello(1) }, Uuid::new_v4()).await?;
    let mut waiting = Vec::new();
    for _ in 0..WAITING {
        waiting.push(queue(&store, "alice").await?.1);
    }
    let prefer = "UPDATE builds SET preferred_worker = 'w2', requirements_key = 'of w2'";
    store.execute(prefer).await?;
    let behind = queue(&store, "alice").await?.1;
    assert_eq!(claim(&store, 1).await?, [behind], "of another group");
    assert!(claim(&store, 2).await?.is_empty(), "all others wait for the worker that has their cache");
    let last = waiting.pop().ok_or("the last one")?;
    let txn = store.write(Turn::Background).await?;
    txn.defer(
        build::Entity::update_many()
            .col_expr(build::Column::QueuedAt, Expr::cust("queued_at - 5000000"))
            .filter(build::Column::Id.eq(last)),
    );
    txn.commit().await?;
    assert_eq!(claim(&store, 2).await?, [last], "of the same group, and has waited for long enough");
    Ok(store.close().await?)
}

#[tokio::test]
async fn a_build_that_comes_back_is_first_again() -> Outcome {
    let directory = tempfile::tempdir()?;
    let store = open(&directory, None).await?;
    let first = queue(&store, "alice").await?.1;
    assert_eq!(claim(&store, 1).await?, [first]);
    let mut others = Vec::new();
    for _ in 0..4 {
        others.push(queue(&store, "alice").await?.1);
    }
    assert_eq!(claim(&store, 4).await?, others[..3]);
    let back = Arc::new(Event::Abandoned { attempt: 1 });
    store.decide(&[(first, back)]).await?;
    assert_eq!(claim(&store, 4).await?, [first]);
    assert_eq!(claim(&store, 5).await?, others[3..]);
    let kept = turn::Entity::find().all(&store.reader).await?;
    assert_eq!(
        kept,
        [turn::Model { round: 4, requester: "alice".to_owned() }],
        "no other turn matters any more"
    );
    Ok(store.close().await?)
}

/// Splits statements that were sent together.
fn split(statement: Statement) -> Vec<Statement> {
    let mut values = statement.values.map(|values| values.0).unwrap_or_default().into_iter();
    let is_numbered = statement.sql.contains('$');
    let one = |sql: &str| {
        let count = if is_numbered { usize::MAX } else { sql.matches('?').count() };
        let values = Values(values.by_ref().take(count).collect());
        Statement { sql: sql.to_owned(), values: Some(values), db_backend: DbBackend::Sqlite }
    };
    statement.sql.split("; ").map(one).collect()
}

/// Returns the steps of SQLite's query plans that search or scan builds.
async fn searches(store: &Store, statements: Vec<Statement>) -> Result<BTreeSet<String>, Box<dyn Error>> {
    let mut searches = BTreeSet::new();
    for mut statement in statements.into_iter().flat_map(split) {
        if !statement.sql.contains("builds") {
            continue;
        }
        statement.sql.insert_str(0, "EXPLAIN QUERY PLAN ");
        for row in store.reader.query_all_raw(statement).await? {
            let step: String = row.try_get("", "detail")?;
            let of_builds = ["SEARCH builds ", "SCAN builds", "SEARCH first ", "SCAN first"];
            searches.extend(of_builds.iter().any(|begin| step.starts_with(begin)).then_some(step));
        }
    }
    Ok(searches)
}

#[tokio::test]
async fn the_queue_never_looks_at_what_is_finished() -> Outcome {
    let directory = tempfile::tempdir()?;
    let statements = record_statements(directory.path());
    let store = open(&directory, Some(100)).await?;
    let (image, _, _) = queue(&store, "alice").await?;
    queue(&store, "bob").await?;
    let session = Uuid::new_v4();
    assert_eq!(claim(&store, 1).await?.len(), 1);
    store.open_session(&hello(3), session).await?;
    store.heartbeat("w1", session, false).await?;
    store.held_by("w1").await?;
    store.overdue().await?;
    store.waiting_too_long().await?;
    store.renew_leases().await?;
    store.queue_load().await?;
    first_of_groups(&store.reader, &RunningBuilds::default(), 1, store.now(&store.reader).await?).await?;
    store.workers(None, 10).await?;
    store.transact(&request("alice"), async |write| write.cancel(image, None, None).await).await?;
    store.unused("w1", EngineContents::default()).await?;
    let statements = std::mem::take(&mut *statements.lock().map_err(|_| "poisoned")?);
    let searches = searches(&store, statements).await?;
    let is_of_the_queue = |search: &&String| {
        ["INDEX builds_queued_", "INDEX builds_held_", "INDEX builds_active_"]
            .iter()
            .any(|name| search.contains(name))
            || search.ends_with("(id=?)")
    };
    let others: Vec<_> = searches.iter().filter(|search| !is_of_the_queue(search)).collect();
    assert!(others.is_empty(), "{others:#?} of {searches:#?}");
    for index in ["by_requirements", "by_turn", "by_time", "of_requester"] {
        assert!(searches.iter().any(|search| search.contains(index)), "{index} of {searches:#?}");
    }
    Ok(store.close().await?)
}
