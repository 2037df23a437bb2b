//! JSON as Go reads it: the names of members have no case, and what follows a value is left alone.

use serde::de::Error as _;
use serde_json::{Deserializer, Error, Value};

/// Parses the first value of a text.
///
/// # Errors
///
/// Returns an error if the text does not begin with a value.
pub(super) fn first(text: &[u8]) -> Result<Value, Error> {
    Deserializer::from_slice(text)
        .into_iter()
        .next()
        .unwrap_or_else(|| Err(Error::custom("there is no value")))
}

/// Returns an object with the names of its members in lower case, and any other value as it is.
pub(super) fn in_lower_case(value: Value) -> Value {
    let Value::Object(members) = value else { return value };
    members.into_iter().map(|(name, value)| (name.to_lowercase(), value)).collect()
}
