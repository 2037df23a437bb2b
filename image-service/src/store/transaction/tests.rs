//! Tests of statements that are sent together.

use std::error::Error;

use sea_orm::{ConnectionTrait, DbBackend, DbErr, Statement, Value};

use super::WriteTransaction;
use crate::{dispatch::Policy, store::Store, turns::Turn};

fn statement(sql: &str, values: impl IntoIterator<Item = Value>) -> Statement {
    Statement::from_sql_and_values(DbBackend::Sqlite, sql, values)
}

fn insert(txn: &WriteTransaction, n: i64) {
    txn.defer_raw(statement("INSERT INTO numbers VALUES (?, ?)", [n.into(), format!("of {n}").into()]));
}

/// Counts the numbers below a limit.
async fn below(db: &impl ConnectionTrait, limit: i64) -> Result<i64, DbErr> {
    let query = statement("SELECT COUNT(*) FROM numbers WHERE n < ? AND of = 'of ' || n", [limit.into()]);
    let found = db.query_one_raw(query).await?;
    found.map_or(Ok(-1), |row| row.try_get_by_index(0))
}

#[tokio::test]
async fn deferred_writes_are_visible_to_later_queries() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let store = Store::open(directory.path(), None, Policy::OF_TESTS).await?;
    store.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY, of TEXT)").await?;
    let txn = store.write(Turn::Background).await?;
    let count = 3 * i64::try_from(WriteTransaction::TOGETHER).expect("few") + 1;
    for n in 0..count {
        insert(&txn, n);
        // Several deferred statements, or a single one, precede the query.
        if n % 7 == 0 {
            assert_eq!(below(&txn, i64::MAX).await, Ok(n + 1));
        }
    }
    assert_eq!(below(&txn, count - 2).await, Ok(count - 2));
    insert(&txn, count);
    let changed = txn.execute_raw(statement("UPDATE numbers SET of = of WHERE n >= ?", [count.into()])).await;
    assert_eq!(changed.expect("changed").rows_affected(), 1, "of this statement alone");
    txn.defer_raw(statement("DELETE FROM numbers WHERE n = ?", [0.into()]));
    let numbered = statement("SELECT COUNT(*) FROM numbers WHERE n <> $1", [1.into()]);
    let found = txn.query_one_raw(numbered).await.expect("a query").expect("a row");
    assert_eq!(found.try_get_by_index::<i64>(0), Ok(count - 1));
    insert(&txn, 0);
    txn.commit().await.expect("committed");
    assert_eq!(below(&store.reader, i64::MAX).await, Ok(count + 1));
    Ok(store.close().await?)
}
