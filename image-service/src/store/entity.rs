//! The tables, as sea-orm sees them. Times are microseconds since the epoch; kinds and states are small numbers that
//! the rows beside this file give and read; texts named `json` are serialised nouns.
#![expect(unreachable_pub, reason = "sea-orm's derives want public items")]

/// One row: what holds for the whole catalogue.
pub(crate) mod catalogue {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
    #[sea_orm(table_name = "catalogue")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: i32,
        /// Names this history of revisions: a restored backup goes on as another one.
        pub history: Uuid,
        /// The revision of the latest change.
        pub revision: i64,
        /// Changes up to this revision are no longer in the change log.
        pub compacted_revision: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(crate) mod image {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
    #[sea_orm(table_name = "images")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub name: String,
        pub description: String,
        pub creator: String,
        pub status: i32,
        pub status_message: String,
        pub repository: String,
        pub tag: String,
        pub configuration_revision: i64,
        pub artifact_json: Option<String>,
        pub created_at: i64,
        pub updated_at: i64,
        pub revision: i64,
        pub latest_build: Uuid,
        /// A tombstone: invisible, and gone once the latest build is final.
        pub deleted: bool,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(crate) mod configuration {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
    #[sea_orm(table_name = "configurations")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub image: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub revision: i64,
        pub json: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(crate) mod build {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
    #[sea_orm(table_name = "builds")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub image: Uuid,
        pub number: i64,
        pub kind: i32,
        pub state: i32,
        pub attempt: i32,
        pub failures: i32,
        pub requested_by: String,
        pub queued_at: i64,
        pub started_at: Option<i64>,
        pub finished_at: Option<i64>,
        pub worker: Option<String>,
        pub lease_expires_at: Option<i64>,
        pub cancel_requested_at: Option<i64>,
        pub stop_confirmed: bool,
        pub report_sequence: i64,
        pub last_sequence: i64,
        pub steps_total: i32,
        pub steps_done: i32,
        pub steps_cached: i32,
        pub error_json: Option<String>,
        pub log_bytes: i64,
        pub log_truncated: bool,
        pub configuration_revision: i64,
        pub repository: String,
        pub tag: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Chunks of the builds' histories: what one transaction appended.
pub(crate) mod build_record {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
    #[sea_orm(table_name = "build_records")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub build: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub first_sequence: i64,
        pub last_sequence: i64,
        pub json: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The change log: one row a change of an image, in the order of commits.
pub(crate) mod change {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
    #[sea_orm(table_name = "changes")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub revision: i64,
        pub image: Uuid,
        /// Who could see the image before and after, beside admins.
        pub creator: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(crate) mod worker {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
    #[sea_orm(table_name = "workers")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub name: String,
        pub labels_json: String,
        pub slots: i32,
        pub engine_version: String,
        /// The worker's process.
        pub instance: String,
        /// The connection that speaks for the worker; none when it said goodbye.
        pub session: Option<Uuid>,
        pub connected_at: i64,
        pub heard_at: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}
