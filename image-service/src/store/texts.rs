//! What images are found by, and how a database finds it: SQLite by FTS5 trigrams, Postgres by pg_trgm. Terms of fewer than
//! three characters have no trigram: the texts themselves are read.

use std::collections::HashMap;

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, EntityTrait,
    IntoActiveModel, QueryFilter, QueryTrait, Statement, sea_query::Expr,
};
use uuid::Uuid;

use super::entity::{image, image_text};
use crate::{
    image::{Configuration, ImageId, search_text},
    search::Term,
};

/// Writes what an image is found by, from its record and configuration.
pub(super) async fn write(
    txn: &DatabaseTransaction,
    row: &image::Model,
    configuration: &Configuration,
) -> Result<(), DbErr> {
    let text = search_text(&row.name, &row.description, configuration).as_str().to_owned();
    let updated = image_text::Entity::update_many()
        .col_expr(image_text::Column::Text, Expr::value(text.clone()))
        .filter(image_text::Column::Image.eq(row.id))
        .exec(txn)
        .await?;
    if updated.rows_affected == 0 {
        let mut row = image_text::Model { row: 0, image: row.id, text }.into_active_model();
        row.row = sea_orm::NotSet;
        image_text::Entity::insert(row).exec_without_returning(txn).await?;
    }
    Ok(())
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

pub(super) async fn purge(txn: &DatabaseTransaction, image: Uuid) -> Result<(), DbErr> {
    image_text::Entity::delete_many().filter(image_text::Column::Image.eq(image)).exec(txn).await?;
    Ok(())
}

/// How many images the trigrams find for a term, up to `limit`; `None` when it has none that could be relied on.
pub(super) async fn count(db: &impl ConnectionTrait, term: &Term, limit: u64) -> Result<Option<u64>, DbErr> {
    if !has_trigrams(term) {
        return Ok(None);
    }
    let backend = db.get_database_backend();
    let sql = if backend == DbBackend::Postgres {
        "SELECT COUNT(*) FROM (SELECT 1 FROM image_texts WHERE text LIKE $1 LIMIT $2) AS found"
    } else {
        "SELECT COUNT(*) FROM (SELECT 1 FROM image_search WHERE image_search MATCH $1 LIMIT $2)"
    };
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let statement =
        Statement::from_sql_and_values(backend, sql, [pattern(backend, term).into(), limit.into()]);
    let row =
        db.query_one_raw(statement).await?.ok_or_else(|| DbErr::RecordNotFound("a count".to_owned()))?;
    Ok(Some(u64::try_from(row.try_get_by_index::<i64>(0)?).unwrap_or(0)))
}

/// The images whose text holds the term. With `by_index` all of them are found first, which is good when they are few; without
/// it the text of each image in question is read.
pub(super) fn holding(backend: DbBackend, term: &Term, by_index: bool) -> Condition {
    let condition = Condition::all();
    if !term.is_possible() {
        return condition.add(Expr::cust("1 = 0"));
    }
    let sql = match (backend, by_index && has_trigrams(term)) {
        (DbBackend::Postgres, true) => {
            let found = image_text::Entity::find()
                .filter(Expr::cust_with_values("text LIKE $1", [pattern(backend, term)]));
            return condition.add(image::Column::Id.in_subquery(ids(found)));
        }
        (_, true) => {
            "images.id IN (SELECT t.image FROM image_search s CROSS JOIN image_texts t ON t.row = s.rowid \
             WHERE s.image_search MATCH ?)"
        }
        (DbBackend::Postgres, false) => {
            "EXISTS (SELECT 1 FROM image_texts t WHERE t.image = images.id AND strpos(t.text, $1) > 0)"
        }
        (_, false) => {
            "EXISTS (SELECT 1 FROM image_texts t WHERE t.image = images.id AND instr(t.text, ?) > 0)"
        }
    };
    let value =
        if by_index && has_trigrams(term) { pattern(backend, term) } else { term.as_str().to_owned() };
    condition.add(Expr::cust_with_values(sql, [value]))
}

fn ids(found: sea_orm::Select<image_text::Entity>) -> sea_orm::sea_query::SelectStatement {
    use sea_orm::QuerySelect;
    found.select_only().column(image_text::Column::Image).into_query()
}

fn has_trigrams(term: &Term) -> bool {
    // FTS5 reads the last two as the first: its index does not tell them apart.
    let is_ambiguous = |c| matches!(c, '\u{fffd}'..='\u{ffff}');
    term.as_str().chars().nth(2).is_some() && !term.as_str().contains(is_ambiguous)
}

/// The term as the index takes it, every character for itself.
fn pattern(backend: DbBackend, term: &Term) -> String {
    let term = term.as_str();
    if backend == DbBackend::Postgres {
        let escaped = term.replace('\\', r"\\").replace('%', r"\%").replace('_', r"\_");
        format!("%{escaped}%")
    } else {
        format!("\"{}\"", term.replace('"', "\"\""))
    }
}
