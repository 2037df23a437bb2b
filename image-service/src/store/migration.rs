//! The schema, with one file per change.
//!
//! From 0.1.0 on, a change first expands the schema in a version alongside which the previous one still runs,
//! and a later version contracts it.

use sea_orm_migration::prelude::*;

mod m0001_initial;

#[derive(Debug)]
pub(crate) struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(m0001_initial::Initial)]
    }
}
