//! Tests of the writer over numbers in memory.

use std::{
    convert::Infallible,
    error::Error as StdError,
    sync::{Mutex, MutexGuard},
};

use futures_util::poll;
use tokio::task::{JoinSet, yield_now};

use super::*;
use crate::{access::Principal, timestamp::Timestamp};

type Tested = Result<(), Box<dyn StdError>>;

const LIMIT: Duration = Duration::from_secs(60);

/// A set of numbers that is written in transactions.
#[derive(Debug, Default)]
struct Numbers(Arc<Mutex<Transaction>>);

#[derive(Debug, Default)]
struct Transaction {
    committed: Vec<i64>,
    written: Vec<i64>,
    /// Numbers that were written before the savepoint.
    saved: Vec<i64>,
    commits: usize,
}

impl Numbers {
    fn transaction(&self) -> MutexGuard<'_, Transaction> {
        self.0.lock().expect("nobody panics with it")
    }
}

impl Connection for Numbers {
    type Error = NeverError;

    async fn open(_: &str) -> Result<Self, NeverError> {
        Ok(Self::default())
    }

    async fn execute(&self, step: Step) -> Result<(), NeverError> {
        // A database takes a moment, in which other writes arrive.
        yield_now().await;
        let mut txn = self.transaction();
        match step {
            Step::Begin | Step::Rollback => txn.written = txn.committed.clone(),
            Step::Save | Step::SaveAgain => txn.saved = txn.written.clone(),
            Step::Undo => txn.written = txn.saved.clone(),
            Step::Commit => {
                txn.committed = txn.written.clone();
                txn.commits += 1;
            }
        }
        Ok(())
    }

    async fn latest(&self) -> Result<Revision, NeverError> {
        Ok(Revision::NONE)
    }

    async fn close(self: Arc<Self>) {}

    fn is_lost(_: &NeverError) -> bool {
        false
    }
}

/// An error that cannot occur.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
struct NeverError(Infallible);

impl From<NeverError> for Error {
    fn from(error: NeverError) -> Self {
        match error.0 {}
    }
}

fn start() -> (Writer<Numbers>, Numbers) {
    let numbers = Numbers::default();
    let connection = Numbers(Arc::clone(&numbers.0));
    (Writer::start("", connection, Revision::NONE), numbers)
}

fn caller(subject: &str) -> Principal {
    Principal::new(subject.to_owned(), Vec::new(), Timestamp::from_micros(0))
}

fn insert(guard: &TransactionGuard<Numbers>, n: i64) {
    guard.connection().transaction().written.push(n);
}

/// Waits until `count` writes wait.
async fn until_waiting(writer: &Writer<Numbers>, count: usize) {
    let waiting = async {
        while writer.waiting() != count {
            yield_now().await;
        }
    };
    timeout(LIMIT, waiting).await.expect("they wait");
}

#[tokio::test]
async fn writes_that_wait_share_commits_and_end_independently() -> Tested {
    for seed in 0..50 {
        let (writer, numbers) = start();
        let first = writer.begin(Turn::Background).await?;
        let mut random = fastrand::Rng::with_seed(seed);
        let mut writes = JoinSet::new();
        let mut expected = Vec::new();
        for (waiting, n) in (1..=50).enumerate() {
            let (writer_of_one, action) = (writer.clone(), random.u8(0..4));
            writes.spawn(async move {
                let guard = writer_of_one.begin(Turn::Caller(&caller(&n.to_string()))).await?;
                insert(&guard, n);
                match action {
                    0 => guard.rollback().await,
                    1 => {
                        drop(guard);
                        Ok(())
                    }
                    _ => guard.commit(None).await,
                }
            });
            expected.extend((action > 1).then_some(n));
            until_waiting(&writer, waiting + 1).await;
        }
        first.rollback().await?;
        writes.join_all().await.into_iter().collect::<Result<Vec<()>, _>>()?;
        let done = numbers.transaction();
        assert_eq!(done.committed, expected, "seed {seed}");
        assert!(done.commits <= expected.len() / 2, "seed {seed}: {} commits", done.commits);
    }
    Ok(())
}

#[tokio::test]
async fn a_thousand_writes_of_one_caller_delay_another_by_one_turn() -> Tested {
    let (writer, numbers) = start();
    let first = writer.begin(Turn::Background).await?;
    let mut writes = JoinSet::new();
    let (greedy, modest, dispatch) = (1, 2, 3);
    let mut spawn = |who: i64| {
        let writer = writer.clone();
        writes.spawn(async move {
            let caller = caller(&who.to_string());
            let turn = if who == dispatch { Turn::Dispatch } else { Turn::Caller(&caller) };
            let guard = writer.begin(turn).await?;
            insert(&guard, who);
            guard.commit(None).await
        });
    };
    for _ in 0..1_000 {
        spawn(greedy);
    }
    until_waiting(&writer, 100).await;
    for (who, waiting) in [(modest, 101), (dispatch, 102)] {
        spawn(who);
        until_waiting(&writer, waiting).await;
    }
    first.commit(None).await?;
    let (mut done, mut refused) = (0, 0);
    for result in writes.join_all().await {
        match result {
            Ok(()) => done += 1,
            Err(Error::TooManyWrites { limit: 100 }) => refused += 1,
            Err(error) => return Err(error.into()),
        }
    }
    assert_eq!((done, refused), (102, 900));
    assert_eq!(numbers.transaction().committed[..4], [dispatch, greedy, modest, greedy]);
    Ok(())
}

#[tokio::test]
async fn a_caller_that_leaves_while_waiting_keeps_no_turn() -> Tested {
    let (writer, _) = start();
    let first = writer.begin(Turn::Background).await?;
    for _ in 0..150 {
        let caller = caller("impatient");
        let mut waits = Box::pin(writer.begin(Turn::Caller(&caller)));
        assert!(poll!(&mut waits).is_pending());
    }
    let stays = tokio::spawn({
        let writer = writer.clone();
        async move { writer.begin(Turn::Caller(&caller("impatient"))).await?.commit(None).await }
    });
    first.commit(None).await?;
    Ok(stays.await??)
}

#[tokio::test]
async fn a_commit_goes_on_after_its_call_was_cancelled_and_its_revision_is_published() -> Tested {
    let (writer, numbers) = start();
    let mut committed = writer.committed();
    assert_eq!(*committed.borrow(), CommittedRevision::Known(Revision::NONE));
    let revision = Revision { number: 7, nonce: 8 };
    let guard = writer.begin(Turn::Background).await?;
    insert(&guard, 1);
    let mut commit = Box::pin(guard.commit(Some(revision)));
    assert!(poll!(&mut commit).is_pending());
    drop(commit);
    timeout(LIMIT, committed.wait_for(|committed| *committed == CommittedRevision::Known(revision)))
        .await??;
    assert_eq!(numbers.transaction().committed, [1]);
    Ok(())
}

#[tokio::test]
async fn closing_waits_for_what_is_under_way_and_refuses_what_waits() -> Tested {
    let (writer, numbers) = start();
    let first = writer.begin(Turn::Background).await?;
    insert(&first, 1);
    let waits = tokio::spawn({
        let writer = writer.clone();
        async move { writer.begin(Turn::Dispatch).await?.commit(None).await }
    });
    until_waiting(&writer, 1).await;
    let mut closing = Box::pin(writer.close());
    assert!(poll!(&mut closing).is_pending());
    first.commit(None).await?;
    closing.await;
    assert_eq!(numbers.transaction().committed, [1]);
    let refused = writer.begin(Turn::Dispatch).await;
    assert!(matches!(refused, Err(Error::Busy)), "{refused:?}");
    // It may have had its turn in the same transaction.
    let waited = waits.await?;
    assert!(matches!(waited, Ok(()) | Err(Error::Busy)), "{waited:?}");
    Ok(())
}

#[test]
fn writes_fail_when_the_task_has_gone() -> Tested {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    let of_the_task = runtime()?;
    let (writer, _) = of_the_task.block_on(async { start() });
    // Like a panic, this ends the task in the middle of its work.
    drop(of_the_task);
    runtime()?.block_on(async {
        let refused = timeout(LIMIT, writer.begin(Turn::Dispatch)).await?;
        assert!(matches!(refused, Err(Error::Busy)), "{refused:?}");
        assert_eq!(*writer.committed().borrow(), CommittedRevision::Unknown);
        Ok(timeout(LIMIT, writer.ended()).await?)
    })
}
