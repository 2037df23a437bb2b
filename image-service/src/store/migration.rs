//! The schema, one file a change of it.
//!
//! From 0.1.0 on a change expands the schema first, in a version that the version before can run beside, and contracts it in a
//! later one.

use sea_orm_migration::prelude::*;

mod m0001_initial;

#[derive(Debug)]
pub(crate) struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(m0001_initial::Initial)]
    }
}
