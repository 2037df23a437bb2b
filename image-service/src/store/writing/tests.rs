use std::error::Error as _;

use sea_orm::{ConnectionTrait, DbBackend, DbErr, Statement, Value};
use tempfile::TempDir;

use super::Writing;
use crate::{
    change::Revision,
    error::Error,
    store::{connecting, connection::Connection},
    turns::Turn,
    writer::Writer,
};

async fn table() -> (TempDir, Writer<Connection>) {
    let directory = tempfile::tempdir().expect("a directory");
    let url = format!("sqlite://{}?mode=rwc", directory.path().join("writing.sqlite").display());
    let connection = connecting::connect(&url, 1).await.expect("a database");
    connection
        .execute_unprepared("CREATE TABLE numbers (n INTEGER PRIMARY KEY, of TEXT)")
        .await
        .expect("a table");
    let connection = Connection::of(connection).await.expect("a connection");
    let writer = Writer::start(&url, connection, Revision::NONE);
    (directory, writer)
}

fn statement(sql: &str, values: impl IntoIterator<Item = Value>) -> Statement {
    Statement::from_sql_and_values(DbBackend::Sqlite, sql, values)
}

fn insert(txn: &Writing, n: i64) {
    txn.later_raw(statement("INSERT INTO numbers VALUES (?, ?)", [n.into(), format!("of {n}").into()]));
}

async fn begin(writer: &Writer<Connection>) -> Writing {
    Writing::new(writer.begin(Turn::Background).await.expect("begun"))
}

/// How many numbers there are that are less than one.
async fn below(db: &impl ConnectionTrait, limit: i64) -> Result<i64, DbErr> {
    let asked = statement("SELECT COUNT(*) FROM numbers WHERE n < ? AND of = 'of ' || n", [limit.into()]);
    let found = db.query_one_raw(asked).await?;
    found.map_or(Ok(-1), |row| row.try_get_by_index(0))
}

#[tokio::test]
async fn what_is_written_later_is_there_when_something_is_asked() {
    let (_directory, writer) = table().await;
    let txn = begin(&writer).await;
    let count = 3 * i64::try_from(Writing::TOGETHER).expect("few") + 1;
    for n in 0..count {
        insert(&txn, n);
        // As many statements wait as are sent together, fewer, and more.
        if n % 7 == 0 {
            assert_eq!(below(&txn, i64::MAX).await, Ok(n + 1));
        }
    }
    assert_eq!(below(&txn, count - 2).await, Ok(count - 2));
    insert(&txn, count);
    let changed = txn.execute_raw(statement("UPDATE numbers SET of = of WHERE n >= ?", [count.into()])).await;
    assert_eq!(changed.expect("changed").rows_affected(), 1, "of this statement alone");
    txn.later_raw(statement("DELETE FROM numbers WHERE n = ?", [0.into()]));
    let numbered = statement("SELECT COUNT(*) FROM numbers WHERE n <> $1", [1.into()]);
    let found = txn.query_one_raw(numbered).await.expect("asked").expect("a row");
    assert_eq!(found.try_get_by_index::<i64>(0), Ok(count - 1));
    insert(&txn, 0);
    txn.commit().await.expect("committed");
    assert_eq!(below(&begin(&writer).await, i64::MAX).await, Ok(count + 1));
}

#[tokio::test]
async fn what_is_rolled_back_or_cannot_be_written_leaves_nothing() {
    let (_directory, writer) = table().await;
    let txn = begin(&writer).await;
    insert(&txn, 1);
    txn.rollback().await.expect("rolled back");
    for is_asked in [true, false] {
        let txn = begin(&writer).await;
        insert(&txn, 1);
        insert(&txn, 1);
        insert(&txn, 2);
        let failed: Result<(), Error> =
            if is_asked { below(&txn, 9).await.map(drop).map_err(Error::from) } else { txn.commit().await };
        let failed = failed.expect_err("the same twice");
        let source = failed.source().map(ToString::to_string).unwrap_or_default();
        assert!(source.contains("UNIQUE"), "{failed}: {source}");
    }
    assert_eq!(below(&begin(&writer).await, i64::MAX).await, Ok(0));
}
