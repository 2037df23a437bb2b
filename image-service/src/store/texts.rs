//! The texts that images are found by, and how Postgres finds them: by pg_trgm, and terms that have no trigram there, short ones
//! or of signs, by every two characters of theirs. SQLite has an [`index`](super::index) of everything.

use std::{collections::HashMap, time::Duration};

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DbBackend, DbErr, EntityTrait, NotSet, QueryFilter, QueryResult,
    QuerySelect, QueryTrait, Set,
    sea_query::{Expr, OnConflict, SelectStatement},
};
use uuid::Uuid;

use super::{
    entity::{image, image_text},
    error_code,
    writing::Writing,
};
use crate::{
    image::{Configuration, ImageId, search_text},
    search::Term,
};

/// How long a statement may take that looks up a term.
pub(super) const IN_TIME: Duration = Duration::from_millis(30);

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
    let mut found = image_text::Entity::find().select_only().column(image_text::Column::Image);
    if has_trigrams(term) {
        found = found.filter(Expr::cust_with_values("text LIKE $1", [pattern(term)]));
    } else {
        for short in short_terms(term) {
            found =
                found.filter(Expr::cust_with_values("short_terms(text) @> array_append(NULL, $1)", [short]));
        }
        found = found.filter(Expr::cust_with_values("strpos(text, $1) > 0", [term.as_str()]));
    }
    found.into_query()
}

/// The same of those whose texts are in one of these eras, numbers with commas between them.
pub(super) fn holding_in_eras(term: &Term, eras: &str) -> SelectStatement {
    let in_one = "array_append(NULL::integer[], era) && string_to_array($1, ',')::integer[]";
    let mut found = holding_by_index(term);
    found.and_where(Expr::cust_with_values(in_one, [eras]));
    found
}

/// Whether Postgres has a trigram of a term, whatever letters its locale knows: it makes none across others than letters and digits.
pub(super) fn has_trigrams(term: &Term) -> bool {
    term.as_str().as_bytes().windows(3).any(|three| three.iter().all(u8::is_ascii_alphanumeric))
}

/// Some of what the function `short_terms` of the schema has of every text that holds the term.
fn short_terms(term: &Term) -> Vec<i64> {
    /// Each is a list to be read.
    const MOST: usize = 6;
    let characters: Vec<i64> = term.as_str().chars().map(|character| u32::from(character).into()).collect();
    if characters.len() == 1 {
        return characters;
    }
    let step = characters.len().div_ceil(MOST);
    characters.windows(2).step_by(step).map(|pair| pair[0] << 21 | pair[1]).collect()
}

/// What is looked up, unless that takes too long: each trigram of a term may be in many texts, and the term in none. To be called
/// in a transaction on Postgres.
pub(super) async fn in_time<T>(
    db: &impl ConnectionTrait,
    looked_up: impl Future<Output = Result<T, DbErr>>,
) -> Result<Option<T>, DbErr> {
    const QUERY_CANCELED: &str = "57014";
    let limit = IN_TIME.as_millis();
    db.execute_unprepared(&format!("SAVEPOINT finding; SET LOCAL statement_timeout = {limit}")).await?;
    let found = match looked_up.await {
        Err(error) if error_code(&error).as_deref() == Some(QUERY_CANCELED) => None,
        found => Some(found?),
    };
    // And with it to the time that statements have otherwise.
    db.execute_unprepared("ROLLBACK TO SAVEPOINT finding; RELEASE SAVEPOINT finding").await?;
    Ok(found)
}

/// The first of these images, unless to find them takes too long.
pub(super) async fn found_in_time(
    db: &impl ConnectionTrait,
    mut found: SelectStatement,
    limit: u64,
) -> Result<Option<Vec<Uuid>>, DbErr> {
    let rows = in_time(db, db.query_all_raw(DbBackend::Postgres.build(found.limit(limit)))).await?;
    let ids = |rows: Vec<QueryResult>| rows.iter().map(|row| row.try_get_by_index(0)).collect();
    rows.map(ids).transpose()
}

/// The term as `LIKE` takes it, every character for itself.
fn pattern(term: &Term) -> String {
    let escaped = term.as_str().replace('\\', r"\\").replace('%', r"\%").replace('_', r"\_");
    format!("%{escaped}%")
}
