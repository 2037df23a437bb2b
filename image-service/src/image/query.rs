//! Queries for images: the filters, the order, and the position to continue from.

use std::{cmp::Ordering, collections::BTreeSet};

use serde::{Deserialize, Serialize};

use super::{Image, ImageId, Status};
use crate::search::{Term, compare_folded, fold};

/// The filters and the order of a list of images. By default all images, latest update first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Query {
    pub(crate) search: Option<Term>,
    /// Templates, or images that are not templates; both if `None`.
    pub(crate) template: Option<bool>,
    /// Statuses to include; any if empty.
    pub(crate) statuses: BTreeSet<Status>,
    pub(crate) enabled: Option<bool>,
    pub(crate) pulled: Option<bool>,
    pub(crate) creator: Option<String>,
    pub(crate) order: Order,
}

/// The keys to sort by, the most significant first; ties are broken by ascending id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order(Vec<(Key, Direction)>);

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    Name,
    Creator,
    Status,
    /// `repository:tag`.
    ImageName,
    Enabled,
    Pulled,
    CreateTime,
    UpdateTime,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Ascending,
    Descending,
}

/// A position in an order, right after the image with these keys and this id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    pub(crate) keys: Vec<KeyValue>,
    pub(crate) id: ImageId,
}

/// The value of a sort key for an image.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum KeyValue {
    Number(i64),
    Text(String),
}

impl Query {
    /// Reports whether the filters match an image, regardless of the search term.
    pub(crate) fn admits(&self, image: &Image) -> bool {
        self.template.is_none_or(|template| template == image.template)
            && (self.statuses.is_empty()
                || image.status.is_some_and(|status| self.statuses.contains(&status)))
            && self.enabled.is_none_or(|enabled| enabled == image.enabled)
            && self.pulled.is_none_or(|pulled| pulled == image.pulled)
            && self.creator.as_ref().is_none_or(|creator| *creator == image.creator)
    }
}

impl Order {
    /// Parses an order such as `name, update_time desc`; an empty text gives the default order.
    ///
    /// # Errors
    ///
    /// Returns the violated rule if a key or a direction is unknown or a key is repeated.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let mut keys: Vec<(Key, Direction)> = Vec::new();
        for part in text.split(',') {
            let mut words = part.split_whitespace();
            let name = words.next().unwrap_or_default();
            let key = Key::parse(name).ok_or_else(|| {
                format!(
                    "cannot order by {name:?}: must be fields separated by commas, of {}",
                    Key::NAMES.join(", ")
                )
            })?;
            let direction = match (words.next(), words.next()) {
                (None | Some("asc"), None) => Direction::Ascending,
                (Some("desc"), None) => Direction::Descending,
                _ => return Err(format!("after {name} there may only be `asc` or `desc`")),
            };
            if keys.iter().any(|(other, _)| *other == key) {
                return Err(format!("must not name {name} twice"));
            }
            keys.push((key, direction));
        }
        Ok(Self(keys))
    }

    /// Returns the position right after an image.
    pub(crate) fn position_of(&self, image: &Image) -> Position {
        Position { keys: self.0.iter().map(|(key, _)| key.value_in(image)).collect(), id: image.id }
    }

    /// Compares two images by this order.
    pub(crate) fn compare(&self, a: &Image, b: &Image) -> Ordering {
        let mut by_keys = self.0.iter().map(|(key, direction)| direction.apply(key.compare(a, b)));
        by_keys.find(|ordering| ordering.is_ne()).unwrap_or_else(|| a.id.cmp(&b.id))
    }

    /// Compares an image with the image right before a position. The position has to [fit](Self::fits) the
    /// order.
    pub(crate) fn compare_to_position(&self, image: &Image, position: &Position) -> Ordering {
        let by_keys = self.0.iter().zip(&position.keys);
        let mut by_keys =
            by_keys.map(|((key, direction), value)| direction.apply(key.value_in(image).cmp(value)));
        by_keys.find(|ordering| ordering.is_ne()).unwrap_or_else(|| image.id.cmp(&position.id))
    }

    /// Returns the keys, the most significant first.
    pub(crate) fn keys(&self) -> &[(Key, Direction)] {
        &self.0
    }

    /// Reports whether this is the default order, latest update first.
    pub(crate) fn is_latest_first(&self) -> bool {
        self.0 == [(Key::UpdateTime, Direction::Descending)]
    }

    /// Reports whether the values of a position have the types of the keys of this order.
    pub(crate) fn fits(&self, position: &Position) -> bool {
        self.0.len() == position.keys.len()
            && self.0.iter().zip(&position.keys).all(|((key, _), value)| match value {
                KeyValue::Text(_) => key.is_text(),
                KeyValue::Number(_) => !key.is_text(),
            })
    }
}

impl Direction {
    fn apply(self, ordering: Ordering) -> Ordering {
        match self {
            Self::Ascending => ordering,
            Self::Descending => ordering.reverse(),
        }
    }
}

impl Default for Order {
    fn default() -> Self {
        Self(vec![(Key::UpdateTime, Direction::Descending)])
    }
}

impl Key {
    const NAMES: [&str; 8] =
        ["name", "creator", "status", "image_name", "enabled", "pulled", "create_time", "update_time"];

    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "name" => Self::Name,
            "creator" => Self::Creator,
            "status" => Self::Status,
            "image_name" => Self::ImageName,
            "enabled" => Self::Enabled,
            "pulled" => Self::Pulled,
            "create_time" => Self::CreateTime,
            "update_time" => Self::UpdateTime,
            _ => return None,
        })
    }

    fn is_text(self) -> bool {
        match self {
            Self::Name | Self::Creator | Self::ImageName => true,
            Self::Status | Self::Enabled | Self::Pulled | Self::CreateTime | Self::UpdateTime => false,
        }
    }

    fn compare(self, a: &Image, b: &Image) -> Ordering {
        match self {
            Self::Name => compare_folded(&a.name, &b.name),
            Self::Creator => a.creator.cmp(&b.creator),
            Self::ImageName => a.current_reference().compare_shown(b.current_reference()),
            Self::Status => a.status.map_or(0, Status::rank).cmp(&b.status.map_or(0, Status::rank)),
            Self::Enabled => a.enabled.cmp(&b.enabled),
            Self::Pulled => a.pulled.cmp(&b.pulled),
            Self::CreateTime => a.created_at.cmp(&b.created_at),
            Self::UpdateTime => a.updated_at.cmp(&b.updated_at),
        }
    }

    /// Returns the value of the key for an image.
    fn value_in(self, image: &Image) -> KeyValue {
        match self {
            Self::Name => KeyValue::Text(fold(&image.name)),
            Self::Creator => KeyValue::Text(image.creator.clone()),
            Self::ImageName => KeyValue::Text(image.current_reference().to_string()),
            Self::Status => KeyValue::Number(image.status.map_or(0, Status::rank)),
            Self::Enabled => KeyValue::Number(i64::from(image.enabled)),
            Self::Pulled => KeyValue::Number(i64::from(image.pulled)),
            Self::CreateTime => KeyValue::Number(image.created_at.micros()),
            Self::UpdateTime => KeyValue::Number(image.updated_at.micros()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_read_or_refused() {
        use Direction::{Ascending, Descending};
        let order = |text| Order::parse(text).map(|order| order.0);
        assert_eq!(order(""), Ok(vec![(Key::UpdateTime, Descending)]));
        assert_eq!(
            order(" status desc,name , create_time asc"),
            Ok(vec![(Key::Status, Descending), (Key::Name, Ascending), (Key::CreateTime, Ascending)])
        );
        for bad in
            ["id", "name,", ",", "name;", "name up", "name desc desc", "name, name desc", "Name", "revision"]
        {
            assert!(order(bad).is_err(), "{bad}");
        }
        for name in Key::NAMES {
            assert!(Key::parse(name).is_some(), "{name}");
        }
    }
}
