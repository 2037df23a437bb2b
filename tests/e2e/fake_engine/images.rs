//! Image table of the fake engine: images by id, and tags that name them.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// One image.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// `sha256:` and 64 hexadecimal digits.
    pub(crate) id: String,
    /// Size in bytes.
    pub(crate) size: u64,
    pub(crate) labels: BTreeMap<String, String>,
    /// Time at which the image was built.
    pub(crate) created: SystemTime,
}

impl Image {
    /// Returns whether the image has this label, written as `name` or `name=value`.
    fn has(&self, label: &str) -> bool {
        match label.split_once('=') {
            Some((name, value)) => self.labels.get(name).is_some_and(|own| own == value),
            None => self.labels.contains_key(label),
        }
    }
}

/// The reason why an image could not be removed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Refused {
    Unknown,
    InUse,
}

/// The images and their tags.
#[derive(Debug, Default)]
pub(crate) struct Images {
    by_id: BTreeMap<String, Image>,
    tags: BTreeMap<String, String>,
}

impl Images {
    /// Returns every tag and the id of the image that it names.
    pub(crate) fn tags(&self) -> &BTreeMap<String, String> {
        &self.tags
    }

    /// Returns the image behind a tag (`:latest` if it has none), a full id, or the start of an id.
    pub(crate) fn find(&self, name: &str) -> Option<&Image> {
        if let Some(id) = self.tags.get(&with_tag(name)) {
            return self.by_id.get(id);
        }
        let id = format!("sha256:{}", name.trim_start_matches("sha256:"));
        let mut candidates = self.by_id.range(id.clone()..);
        let (_, image) = candidates.next()?;
        let long_enough = id.len() >= "sha256:".len() + 4;
        (long_enough && image.id.starts_with(&id)).then_some(image)
    }

    pub(super) fn insert(&mut self, image: Image) {
        self.by_id.insert(image.id.clone(), image);
    }

    /// Gives the image `id` the tag `name`, and takes it from the image that had it before.
    pub(super) fn tag(&mut self, id: &str, name: &str) {
        self.tags.insert(with_tag(name), id.to_owned());
    }

    /// Removes a tag, its image too if it was the last tag, or an image by its id with its tag.
    ///
    /// Returns the engine's answer: the list of what was untagged and deleted.
    pub(super) fn remove(&mut self, name: &str, force: bool) -> Result<Value, Refused> {
        let id = self.find(name).ok_or(Refused::Unknown)?.id.clone();
        let tag = with_tag(name);

        let gone: Vec<String> = if self.tags.contains_key(&tag) { vec![tag] } else { self.tags_of(&id) };
        if gone.len() > 1 && !force {
            return Err(Refused::InUse);
        }

        let mut answer = Vec::new();
        for tag in gone {
            self.tags.remove(&tag);
            answer.push(json!({ "Untagged": tag }));
        }
        if self.tags_of(&id).is_empty() {
            self.by_id.remove(&id);
            answer.push(json!({ "Deleted": id }));
        }
        Ok(Value::Array(answer))
    }

    /// Returns the answer to `GET /images/json`.
    ///
    /// It lists the images that have all of `labels`, each given as `name` or `name=value`, and a
    /// tag that matches one of `patterns`, if there are any.
    pub(super) fn list(&self, labels: &[String], patterns: &[String]) -> Value {
        let mut tags_of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tag, id) in &self.tags {
            if patterns.is_empty() || patterns.iter().any(|pattern| matches_reference(pattern, tag)) {
                tags_of.entry(id).or_default().push(tag);
            }
        }
        self.by_id
            .values()
            .filter(|image| labels.iter().all(|label| image.has(label)))
            .filter_map(|image| {
                let tags = tags_of.remove(image.id.as_str()).unwrap_or_default();
                (patterns.is_empty() || !tags.is_empty()).then_some((image, tags))
            })
            .map(|(image, tags)| {
                json!({
                    "Containers": -1,
                    "Created": seconds(image.created),
                    "Id": image.id,
                    "Labels": image.labels,
                    "ParentId": "",
                    "RepoDigests": [],
                    "RepoTags": tags,
                    "SharedSize": -1,
                    "Size": image.size,
                })
            })
            .collect()
    }

    /// Returns the number of images.
    pub(super) fn count(&self) -> usize {
        self.by_id.len()
    }

    /// Returns the answer to `GET /images/{name}/json`.
    pub(super) fn inspect(&self, name: &str) -> Option<Value> {
        let image = self.find(name)?;
        Some(json!({
            "Id": image.id,
            "RepoTags": self.tags_of(&image.id),
            "RepoDigests": [],
            "Parent": "",
            "Comment": "buildkit.dockerfile.v0",
            "Created": rfc3339(image.created),
            "DockerVersion": "",
            "Author": "",
            "Config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "WorkingDir": "/",
                "Labels": image.labels,
            },
            "Architecture": "amd64",
            "Os": "linux",
            "Size": image.size,
            "GraphDriver": { "Data": {}, "Name": "overlay2" },
            "RootFS": { "Type": "layers", "Layers": [image.id] },
            "Metadata": { "LastTagTime": rfc3339(image.created) },
        }))
    }

    fn tags_of(&self, id: &str) -> Vec<String> {
        self.tags.iter().filter(|(_, tagged)| *tagged == id).map(|(tag, _)| tag.clone()).collect()
    }
}

/// Returns the name as the engine shows it.
///
/// It has the tag `:latest` if it had none, and no default registry. A colon before the last slash
/// is that of a port.
pub(super) fn with_tag(name: &str) -> String {
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    let name = name.strip_prefix("library/").unwrap_or(name);
    let last = name.rsplit('/').next().unwrap_or(name);
    if last.contains(':') { name.to_owned() } else { format!("{name}:latest") }
}

/// Returns the name with its registry and its tag, as `BuildKit` writes it.
pub(super) fn full(name: &str) -> String {
    let name = with_tag(name);
    match name.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => name,
        Some(_) => format!("docker.io/{name}"),
        None => format!("docker.io/library/{name}"),
    }
}

/// Returns whether the pattern of a `reference` filter matches a tag or its name alone.
fn matches_reference(pattern: &str, tag: &str) -> bool {
    let name = tag.rsplit_once(':').map_or(tag, |(name, _)| name);
    matches(pattern.as_bytes(), tag.as_bytes()) || matches(pattern.as_bytes(), name.as_bytes())
}

/// Returns whether the text matches a pattern in which `*` matches anything but a slash.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', pattern)), None) => matches(pattern, text),
        (Some((b'*', after)), Some((first, rest))) => {
            matches(after, text) || (*first != b'/' && matches(pattern, rest))
        }
        (Some((wanted, pattern)), Some((first, rest))) => wanted == first && matches(pattern, rest),
        (None, Some(_)) | (Some(_), None) => false,
    }
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Returns the time as `2026-11-23T08:31:47Z`.
///
/// Years are counted from March, so that the leap day is the last day of a year.
fn rfc3339(at: SystemTime) -> String {
    let seconds = seconds(at);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);

    let days = seconds / 86_400 + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}
