//! Tests of writes that share a transaction of a database.

use std::{error::Error as StdError, time::Duration};

use futures_util::poll;
use sea_orm::{ConnectionTrait, DbBackend, Statement};
use tokio::{task::yield_now, time::timeout};

use crate::{
    access::Principal,
    change::{CommittedRevision, Revision},
    dispatch::Policy,
    error::Error,
    store::{Store, WriteTransaction, pool},
    timestamp::Timestamp,
    turns::Turn,
};

type Tested = Result<(), Box<dyn StdError>>;

const LIMIT: Duration = Duration::from_secs(60);

/// Runs a test on an empty store on SQLite, and on one on Postgres if a server is configured.
async fn on_each_database(test: impl AsyncFn(Store) -> Tested) -> Tested {
    let directory = tempfile::tempdir()?;
    let run = async |url: Option<&str>| {
        let store = Store::open(directory.path(), url, Policy::OF_TESTS).await?;
        store.execute("CREATE TABLE numbers (n BIGINT PRIMARY KEY)").await?;
        timeout(LIMIT, test(store.clone())).await??;
        Tested::Ok(timeout(LIMIT, store.close()).await??)
    };
    run(None).await?;
    let Ok(server) = std::env::var("TRAILER_TEST_POSTGRES_URL") else {
        return Ok(());
    };
    let (path, parameters) = server.split_once('?').unwrap_or((server.as_str(), ""));
    let (host, _) = path.rsplit_once('/').ok_or("a database in the URL")?;
    let name = format!("writer_{}", fastrand::u64(..));
    let on_server = pool::connect(&server, 1).await?;
    on_server.execute_unprepared(&format!("CREATE DATABASE {name}")).await?;
    let tested = run(Some(&format!("{host}/{name}?{parameters}"))).await;
    on_server.execute_unprepared(&format!("DROP DATABASE {name} WITH (FORCE)")).await?;
    on_server.close().await?;
    tested
}

fn caller(subject: &str) -> Principal {
    Principal::new(subject.to_owned(), Vec::new(), Timestamp::from_micros(0))
}

async fn insert(txn: &WriteTransaction, n: i64) -> Result<(), Error> {
    txn.execute_unprepared(&format!("INSERT INTO numbers VALUES ({n})")).await?;
    Ok(())
}

/// Returns the committed numbers.
async fn numbers(store: &Store) -> Result<Vec<i64>, Error> {
    let select = Statement::from_string(store.backend(), "SELECT n FROM numbers ORDER BY n");
    let rows = store.reader.query_all_raw(select).await?;
    Ok(rows.iter().map(|row| row.try_get_by_index(0)).collect::<Result<_, _>>()?)
}

async fn until_waiting(store: &Store, count: usize) {
    let waiting = async {
        while store.writer.waiting() != count {
            yield_now().await;
        }
    };
    timeout(LIMIT, waiting).await.expect("they wait");
}

/// The outcome of a write.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum WriteOutcome {
    Committed,
    RolledBack,
    Dropped,
    /// Cancellation of its call in the middle of a statement.
    Cancelled,
    Failed,
    /// Failure of a deferred statement, before the next query or before the commit.
    FailedLate {
        has_query: bool,
    },
    /// Commit after a failed statement.
    Reckless,
    /// Commit that violates a deferred constraint.
    Inconsistent,
}

impl WriteOutcome {
    async fn run(self, store: &Store, n: i64) -> Result<(), Error> {
        let caller = caller(&format!("{n}"));
        let txn = store.write(Turn::Caller(&caller)).await?;
        insert(&txn, n).await?;
        match self {
            Self::Committed => txn.commit().await,
            Self::RolledBack => txn.rollback().await,
            Self::Dropped => Ok(()),
            Self::Cancelled => {
                let mut statement = Box::pin(insert(&txn, -n));
                let _ = poll!(&mut statement);
                Ok(())
            }
            Self::Failed => insert(&txn, n).await,
            Self::FailedLate { has_query } => {
                let sql = format!("INSERT INTO numbers VALUES ({n})");
                txn.defer_raw(Statement::from_string(store.backend(), sql));
                let select = Statement::from_string(store.backend(), "SELECT n FROM numbers");
                if has_query { Ok(txn.query_all_raw(select).await.map(drop)?) } else { txn.commit().await }
            }
            Self::Inconsistent => {
                txn.execute_unprepared("INSERT INTO numbered VALUES (-1)").await?;
                txn.reach(Revision { number: 1, nonce: 1 });
                txn.commit().await
            }
            Self::Reckless => {
                assert!(insert(&txn, n).await.is_err());
                txn.commit().await
            }
        }
    }
}

/// Writes 0 while writes of 1 and up with these outcomes wait. Returns all results in this order.
async fn run_together(store: &Store, outcomes: &[WriteOutcome]) -> Result<Vec<Result<(), Error>>, Error> {
    let first = store.write(Turn::Background).await?;
    let mut writes = Vec::new();
    for (number, outcome) in outcomes.iter().copied().enumerate() {
        let (store, n) = (store.clone(), i64::try_from(number).unwrap_or(0) + 1);
        let waiting = store.clone();
        writes.push(tokio::spawn(async move { outcome.run(&store, n).await }));
        until_waiting(&waiting, number + 1).await;
    }
    insert(&first, 0).await?;
    let mut results = vec![first.commit().await];
    for write in writes {
        results.push(write.await.map_err(|error| Error::Internal(error.into()))?);
    }
    Ok(results)
}

#[tokio::test]
async fn a_rolled_back_write_leaves_no_trace_and_its_neighbours_stay() -> Tested {
    use WriteOutcome::{Cancelled, Committed, Dropped, Failed, FailedLate, Reckless, RolledBack};
    let late = |has_query| FailedLate { has_query };
    let failing = [Failed, Reckless, late(false), late(true)];
    on_each_database(async |store| {
        for seed in 0..20 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut outcomes: Vec<WriteOutcome> = (0..random.usize(1..20))
                .filter_map(|_| {
                    let others = [Committed, Committed, Committed, RolledBack, Dropped, Cancelled];
                    random.choice(others.into_iter().chain(failing).collect::<Vec<_>>())
                })
                .collect();
            let results = run_together(&store, &outcomes).await?;
            outcomes.insert(0, Committed);
            let mut expected = Vec::new();
            for ((n, outcome), result) in (0..).zip(&outcomes).zip(&results) {
                assert_eq!(result.is_err(), failing.contains(outcome), "{outcome:?}: {result:?}");
                expected.extend((*outcome == Committed).then_some(n));
            }
            assert_eq!(numbers(&store).await?, expected, "seed {seed}: {outcomes:?}");
            store.execute("DELETE FROM numbers").await?;
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn when_the_commit_fails_all_are_notified_and_the_next_write_finds_out_what_is_known() -> Tested {
    on_each_database(async |store| {
        let checked_by_commit =
            "CREATE TABLE numbered (n BIGINT REFERENCES numbers (n) DEFERRABLE INITIALLY DEFERRED)";
        store.execute(checked_by_commit).await?;
        // On a slow machine they may not be in one group at first.
        loop {
            let results = run_together(
                &store,
                &[WriteOutcome::Inconsistent, WriteOutcome::Committed, WriteOutcome::RolledBack],
            )
            .await?;
            let committed = numbers(&store).await?;
            let [first, Err(Error::Busy), other, reader] = results.as_slice() else { panic!("{results:?}") };
            assert_eq!(committed.contains(&0), first.is_ok(), "{results:?}");
            assert_eq!(committed.contains(&2), other.is_ok(), "{results:?}");
            assert!(!committed.contains(&1) && !committed.contains(&3), "{committed:?}");
            let is_unknown = *store.writer.committed().borrow() == CommittedRevision::Unknown;
            store.execute("DELETE FROM numbers").await?;
            assert_eq!(*store.writer.committed().borrow(), CommittedRevision::Known(Revision::NONE));
            if let (Err(Error::Busy), Err(Error::Busy)) = (other, reader) {
                assert!(is_unknown, "the COMMIT of all has failed");
                return Ok(());
            }
        }
    })
    .await
}

/// Returns the id of the server process that serves the connection.
async fn server_process(txn: &WriteTransaction) -> Result<i32, Box<dyn StdError>> {
    let select = Statement::from_string(DbBackend::Postgres, "SELECT pg_backend_pid()");
    Ok(txn.query_one_raw(select).await?.ok_or("a row")?.try_get_by_index(0)?)
}

/// Terminates a server process and waits until it is gone.
async fn terminate(store: &Store, process: i32) -> Tested {
    let query = |sql: String| store.reader.query_one_raw(Statement::from_string(DbBackend::Postgres, sql));
    query(format!("SELECT pg_terminate_backend({process})")).await?;
    while query(format!("SELECT 1 FROM pg_stat_activity WHERE pid = {process}")).await?.is_some() {
        yield_now().await;
    }
    Ok(())
}

#[tokio::test]
async fn after_its_connection_has_gone_the_next_group_begins_on_another() -> Tested {
    on_each_database(async |store| {
        if store.backend() != DbBackend::Postgres {
            return Ok(());
        }
        let txn = store.write(Turn::Background).await?;
        let process = server_process(&txn).await?;
        txn.commit().await?;
        terminate(&store, process).await?;
        // A connection that broke while idle is replaced without an error.
        let txn = store.write(Turn::Background).await?;
        insert(&txn, 1).await?;
        txn.commit().await?;
        let txn = store.write(Turn::Background).await?;
        insert(&txn, 2).await?;
        terminate(&store, server_process(&txn).await?).await?;
        let failed = txn.commit().await;
        assert!(matches!(failed, Err(Error::Busy)), "{failed:?}");
        store.execute("INSERT INTO numbers VALUES (3)").await?;
        assert_eq!(numbers(&store).await?, [1, 3]);
        Ok(())
    })
    .await
}
