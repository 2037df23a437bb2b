//! The sixth schema: build contexts that are uploaded as archives, and which configurations name them.

use sea_orm_migration::{
    prelude::*,
    schema::{big_integer, boolean, string_null, uuid},
};

pub(super) struct Archives;

impl MigrationName for Archives {
    fn name(&self) -> &'static str {
        "m0006_archives"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Archives {
    /// Whole or not at all, on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let contexts = Table::create()
            .table("contexts")
            .col(uuid("upload").primary_key())
            .col(string_null("digest").unique_key())
            .col(big_integer("size_bytes"))
            .col(boolean("gzip"))
            .col(big_integer("tar_end"))
            .col(big_integer("used_at"))
            .take();
        manager.create_table(contexts).await?;
        let chunks = Table::create()
            .table("context_chunks")
            .col(uuid("upload"))
            .col(big_integer("number"))
            .col(ColumnDef::new("bytes").blob().not_null())
            .primary_key(Index::create().col("upload").col("number"))
            .take();
        manager.create_table(chunks).await?;
        let archive = Table::alter().table("configurations").add_column(string_null("archive")).take();
        manager.alter_table(archive).await?;
        for (table, name, column) in [
            ("contexts", "contexts_by_use", "used_at"),
            ("configurations", "configurations_by_archive", "archive"),
        ] {
            manager.create_index(Index::create().table(table).name(name).col(column).take()).await?;
        }
        Ok(())
    }
}
