//! The seventh schema: what workers have made, and what of that is named, so that the rest can be collected.

use sea_orm_migration::{
    prelude::*,
    schema::{string, string_null},
};

pub(super) struct Collecting;

impl MigrationName for Collecting {
    fn name(&self) -> &'static str {
        "m0007_collecting"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Collecting {
    /// Whole or not at all, on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let made = Table::create()
            .table("made_images")
            .col(string("worker"))
            .col(string("engine_id"))
            .primary_key(Index::create().col("worker").col("engine_id"))
            .take();
        manager.create_table(made).await?;
        // Artifacts and bases of before are not known here: what was made before is not collected, either.
        for (table, column, index) in [
            ("images", "artifact_image", "images_by_artifact"),
            ("configurations", "base", "configurations_by_base"),
        ] {
            let add = Table::alter().table(table).add_column(string_null(column)).take();
            manager.alter_table(add).await?;
            manager.create_index(Index::create().table(table).name(index).col(column).take()).await?;
        }
        Ok(())
    }
}
