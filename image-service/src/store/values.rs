//! Domain types as values of columns.

use sea_orm::{
    ColIdx, DbErr, QueryResult, TryFromU64, TryGetError, TryGetable, Value,
    sea_query::{ArrayType, ColumnType, Nullable, ValueType, ValueTypeErr},
};
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::{
    access::Grantee,
    build::{BuildId, Kind, State},
    build_context::ContextDigest,
    change::ChangeKind,
    image::{Etag, ImageId, Status},
    timestamp::Timestamp,
};

/// A domain type that a column stores as a simpler value.
pub(super) trait Stored: Sized {
    type Simple;

    fn to_simple(&self) -> Self::Simple;

    /// Converts a stored value back.
    ///
    /// # Errors
    ///
    /// Returns an error if this version does not write such a value.
    fn from_simple(simple: Self::Simple) -> Result<Self, DbErr>;
}

/// Implements sea-orm's column traits on top of `Stored`.
macro_rules! columns {
    ($($noun:ty $(where $value:ident: $($bound:path),+)?);* $(;)?) => {$(
        impl$(<$value: $($bound +)+>)? From<$noun> for Value {
            fn from(noun: $noun) -> Self {
                noun.to_simple().into()
            }
        }

        impl$(<$value: $($bound +)+>)? TryGetable for $noun {
            fn try_get_by<I: ColIdx>(row: &QueryResult, index: I) -> Result<Self, TryGetError> {
                let simple = <<Self as Stored>::Simple as TryGetable>::try_get_by(row, index)?;
                Ok(Self::from_simple(simple)?)
            }
        }

        impl$(<$value: $($bound +)+>)? ValueType for $noun {
            fn try_from(value: Value) -> Result<Self, ValueTypeErr> {
                let simple = <<Self as Stored>::Simple as ValueType>::try_from(value)?;
                Self::from_simple(simple).map_err(|_| ValueTypeErr)
            }

            fn type_name() -> String {
                stringify!($noun).to_owned()
            }

            fn array_type() -> ArrayType {
                <Self as Stored>::Simple::array_type()
            }

            fn column_type() -> ColumnType {
                <Self as Stored>::Simple::column_type()
            }
        }

        impl$(<$value: $($bound +)+>)? Nullable for $noun {
            fn null() -> Value {
                <Self as Stored>::Simple::null()
            }
        }

        impl$(<$value: $($bound +)+>)? TryFromU64 for $noun {
            fn try_from_u64(_: u64) -> Result<Self, DbErr> {
                Err(DbErr::ConvertFromU64(stringify!($noun)))
            }
        }
    )*};
}

/// Implements `Stored` by a pair of conversions.
macro_rules! simple {
    ($($noun:ident as $simple:ty: $to:expr, $from:expr;)*) => {
        $(impl Stored for $noun {
            type Simple = $simple;

            fn to_simple(&self) -> $simple {
                $to(self)
            }

            fn from_simple(simple: $simple) -> Result<Self, DbErr> {
                $from(simple).ok_or_else(|| unknown(stringify!($noun)))
            }
        })*

        columns! { $($noun);* }
    };
}

simple! {
    BuildId as Uuid: |id: &Self| id.0, |id| Some(Self(id));
    ImageId as Uuid: |id: &Self| id.0, |id| Some(Self(id));
    Timestamp as i64: |time: &Self| time.micros(), |micros| Some(Self::from_micros(micros));
    Etag as i64: |etag: &Self| etag.0, |revision| Some(Self(revision));
    Grantee as String: Self::to_string, |text: String| <Self as TryFrom<String>>::try_from(text).ok();
    ContextDigest as String: |digest: &Self| digest.as_str().to_owned(), |text: String| Self::parse(&text).ok();
}

/// Implements `Stored` for enumerations as small numbers, which appear literally in SQL.
macro_rules! codes {
    ($($noun:ident { $($variant:ident = $code:literal),* $(,)? })*) => {
        $(impl Stored for $noun {
            type Simple = i32;

            fn to_simple(&self) -> i32 {
                match self { $(Self::$variant => $code),* }
            }

            fn from_simple(code: i32) -> Result<Self, DbErr> {
                match code { $($code => Ok(Self::$variant),)* _ => Err(unknown(stringify!($noun))) }
            }
        })*

        columns! { $($noun);* }
    };
}

codes! {
    State { Queued = 1, Claimed = 2, Running = 3, Publishing = 4, Succeeded = 5, Failed = 6, Cancelled = 7 }
    Kind { Build = 1, Pull = 2, Snapshot = 3 }
    ChangeKind { Status = 1, Record = 2, Content = 3, Grants = 4, Deleted = 5 }
    Status { BuildPending = 1, Building = 2, BuildFinished = 3, BuildCancelled = 4, Snapshotting = 5, Error = 6 }
}

/// The status of an image as stored: 0 for a template, which has none.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct StatusCode(pub(super) Option<Status>);

impl Stored for StatusCode {
    type Simple = i32;

    fn to_simple(&self) -> i32 {
        self.0.map_or(0, |status| status.to_simple())
    }

    fn from_simple(code: i32) -> Result<Self, DbErr> {
        if code == 0 { Ok(Self(None)) } else { Ok(Self(Some(Status::from_simple(code)?))) }
    }
}

/// A domain type that a column stores as JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AsJson<T>(pub(super) T);

impl<T> AsJson<T> {
    pub(super) fn into_noun(self) -> T {
        self.0
    }
}

impl<T: Serialize + DeserializeOwned> Stored for AsJson<T> {
    type Simple = String;

    fn to_simple(&self) -> String {
        serde_json::to_string(&self.0).expect("the nouns that are stored have texts as keys")
    }

    fn from_simple(json: String) -> Result<Self, DbErr> {
        from_json(&json).map(Self)
    }
}

columns! { StatusCode; AsJson<T> where T: Serialize, DeserializeOwned }

pub(super) fn to_json<T: Serialize>(value: &T) -> Result<String, DbErr> {
    serde_json::to_string(value).map_err(|error| DbErr::Json(error.to_string()))
}

pub(super) fn from_json<T: DeserializeOwned>(json: &str) -> Result<T, DbErr> {
    serde_json::from_str(json).map_err(|error| DbErr::Json(error.to_string()))
}

fn unknown(noun: &str) -> DbErr {
    DbErr::Type(format!("a value that is no {noun}"))
}
