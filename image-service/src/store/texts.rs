//! The texts that images are found by, and how Postgres finds them: by pg_trgm, and terms of one or two characters, which have
//! no trigram, by an index of its own. SQLite has an [`index`](super::index) of everything.

use std::collections::HashMap;

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DbBackend, DbErr, EntityTrait, NotSet, QueryFilter, QueryResult,
    QuerySelect, QueryTrait, RuntimeErr, Set,
    sea_query::{Expr, OnConflict, SelectStatement},
};
use uuid::Uuid;

use super::{
    entity::{image, image_text},
    writing::Writing,
};
use crate::{
    image::{Configuration, ImageId, search_text},
    search::Term,
};

/// Writes what an image is found by, from its record and configuration.
pub(super) fn write(txn: &Writing, row: &image::Model, configuration: &Configuration) {
    let text = search_text(&row.name, &row.description, configuration).as_str().to_owned();
    let row = image_text::ActiveModel { row: NotSet, image: Set(row.id), text: Set(text) };
    let instead =
        OnConflict::column(image_text::Column::Image).update_column(image_text::Column::Text).to_owned();
    txn.later(image_text::Entity::insert(row).on_conflict(instead));
}

/// What each of these images can be found by.
pub(super) async fn all(
    db: &impl ConnectionTrait,
    images: &[ImageId],
) -> Result<HashMap<ImageId, String>, DbErr> {
    let found = image_text::Entity::find()
        .filter(image_text::Column::Image.is_in(images.iter().map(|id| id.0)))
        .all(db)
        .await?;
    Ok(found.into_iter().map(|row| (ImageId(row.image), row.text)).collect())
}

pub(super) fn purge(txn: &Writing, image: Uuid) {
    txn.later(image_text::Entity::delete_many().filter(image_text::Column::Image.eq(image)));
}

/// Whether an image's text holds the term: it is read for each image in question.
pub(super) fn holds(backend: DbBackend, term: &Term) -> Condition {
    let condition = Condition::all();
    if !term.is_possible() {
        return condition.add(Expr::cust("1 = 0"));
    }
    let sql = if backend == DbBackend::Postgres {
        "EXISTS (SELECT 1 FROM image_texts t WHERE t.image = images.id AND strpos(t.text, $1) > 0)"
    } else {
        "EXISTS (SELECT 1 FROM image_texts t WHERE t.image = images.id AND instr(t.text, ?) > 0)"
    };
    condition.add(Expr::cust_with_values(sql, [term.as_str()]))
}

/// The images whose text holds the term, found by Postgres' indexes.
pub(super) fn holding_by_index(term: &Term) -> SelectStatement {
    let holds = match short(term) {
        Some(short) => Expr::cust_with_values("short_terms(text) @> array_append(NULL, $1)", [short]),
        None => Expr::cust_with_values("text LIKE $1", [pattern(term)]),
    };
    let found = image_text::Entity::find().filter(holds).select_only().column(image_text::Column::Image);
    found.into_query()
}

/// Whether Postgres has no trigram of a term.
pub(super) fn is_short(term: &Term) -> bool {
    short(term).is_some()
}

/// A term of one or two characters, as the function `short_terms` of the schema has it.
fn short(term: &Term) -> Option<i64> {
    let mut characters = term.as_str().chars().map(|character| i64::from(u32::from(character)));
    match (characters.next(), characters.next(), characters.next()) {
        (Some(only), None, _) => Some(only),
        (Some(first), Some(second), None) => Some(first << 21 | second),
        _ => None,
    }
}

/// The first of these images, unless to find them takes too long: each trigram of a term may be in many texts, and the term in none.
/// To be called in a transaction on Postgres.
pub(super) async fn found_in_time(
    db: &impl ConnectionTrait,
    mut found: SelectStatement,
    limit: u64,
) -> Result<Option<Vec<Uuid>>, DbErr> {
    /// Milliseconds.
    const IN_TIME: &str = "SAVEPOINT finding; SET LOCAL statement_timeout = 30";
    const QUERY_CANCELED: &str = "57014";
    db.execute_unprepared(IN_TIME).await?;
    let rows = db.query_all_raw(DbBackend::Postgres.build(found.limit(limit))).await;
    let rows = match rows {
        Err(DbErr::Query(RuntimeErr::SqlxError(error)))
            if error.as_database_error().and_then(|error| error.code()).as_deref()
                == Some(QUERY_CANCELED) =>
        {
            None
        }
        rows => Some(rows?),
    };
    // And with it to the time that statements have otherwise.
    db.execute_unprepared("ROLLBACK TO SAVEPOINT finding; RELEASE SAVEPOINT finding").await?;
    let ids = |rows: Vec<QueryResult>| rows.iter().map(|row| row.try_get_by_index(0)).collect();
    rows.map(ids).transpose()
}

/// The term as `LIKE` takes it, every character for itself.
fn pattern(term: &Term) -> String {
    let escaped = term.as_str().replace('\\', r"\\").replace('%', r"\%").replace('_', r"\_");
    format!("%{escaped}%")
}
