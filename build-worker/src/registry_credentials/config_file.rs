//! Docker's `config.json`: which entry or helper has the credentials for a repository.

use std::collections::BTreeMap;

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Deserialize;
use serde_json::Value;

use super::{Credentials, json};
use crate::reference;

/// The members of `config.json` that a worker uses, by their names in lower case. As in Docker, each may be `null`.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct ConfigFile {
    auths: Option<BTreeMap<String, Option<Entry>>>,
    #[serde(rename = "credsstore")]
    creds_store: Option<String>,
    #[serde(rename = "credhelpers")]
    cred_helpers: Option<BTreeMap<String, Option<String>>>,
    /// Restrictions of the credentials with these keys.
    trailer: Option<BTreeMap<String, Restriction>>,
    /// Proxies by the address of an engine, or `default`.
    proxies: Option<BTreeMap<String, Option<Proxies>>>,
}

/// The place of the credentials for a repository.
#[derive(PartialEq, Eq)]
pub(super) enum Origin {
    /// There are none.
    Nothing,
    /// The file itself holds them.
    Entry(Credentials),
    /// A credential helper has them, by the name of the server. If it fails, those in the file count, as in Docker.
    Helper { name: String, server: String, in_file: Option<Credentials> },
}

/// The credentials in the file for a registry, or for a path of it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    /// User and password, joined by a colon, in base64.
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// The creators of images who may use some credentials. What is misspelt here must not lift a restriction.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Restriction {
    creators: Vec<String>,
}

/// The proxies for builds.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Proxies {
    http_proxy: Option<String>,
    https_proxy: Option<String>,
    no_proxy: Option<String>,
    ftp_proxy: Option<String>,
    all_proxy: Option<String>,
}

/// The repositories that an entry or a helper is for.
#[derive(PartialEq, Eq)]
struct Scope<'a> {
    host: &'a str,
    /// Path above the repositories; empty if it is for the whole registry.
    path: &'a str,
}

impl ConfigFile {
    /// Parses the content of the file.
    ///
    /// # Errors
    ///
    /// Returns the reason, which quotes nothing of the content.
    pub(super) fn parse(content: &[u8]) -> Result<Self, String> {
        if content.trim_ascii().is_empty() {
            return Err("it is empty".to_owned());
        }
        let value = json::first(content).map_err(|error| {
            format!("it is not JSON: see line {}, column {}", error.line(), error.column())
        })?;
        let mut value = json::in_lower_case(value);
        let auths = value.get_mut("auths").and_then(Value::as_object_mut).into_iter().flatten();
        for entry in auths.map(|(_, entry)| entry) {
            *entry = json::in_lower_case(entry.take());
        }
        // The error would quote the content.
        let config: Self =
            serde_json::from_value(value).map_err(|_| "it is not a Docker configuration".to_owned())?;
        match config.trailer.iter().flatten().find(|(key, _)| !config.has_credentials(&Scope::parse(key))) {
            Some((key, _)) => {
                Err(format!("`trailer` names {key:?}, for which it has neither entry nor helper"))
            }
            None => Ok(config),
        }
    }

    /// Reports whether an entry or a helper is for exactly this scope.
    fn has_credentials(&self, scope: &Scope<'_>) -> bool {
        let has_helper = || scope.path.is_empty() && self.helper(scope.host).is_some();
        self.auths.iter().flatten().any(|(key, _)| Scope::parse(key) == *scope) || has_helper()
    }

    /// Reports whether an entry or a helper is for this repository.
    pub(super) fn covers(&self, host: &str, path: &str) -> bool {
        self.auths.iter().flatten().any(|(key, _)| Scope::parse(key).covers(host, path))
            || self.helper(host).is_some()
    }

    /// Reports whether builds of a creator's images may use the credentials for a scope.
    fn allows(&self, scope: &Scope<'_>, creator: &str) -> bool {
        let restrictions = self.trailer.iter().flatten().filter(|(key, _)| Scope::parse(key) == *scope);
        // An older service does not name the creator.
        restrictions
            .into_iter()
            .all(|(_, only)| !creator.is_empty() && only.creators.iter().any(|c| c == creator))
    }

    /// Returns the place of the credentials that a creator may use for the repository of a reference.
    ///
    /// The longest path counts. An entry for the whole registry counts only if no helper is responsible, as
    /// in Docker.
    ///
    /// # Errors
    ///
    /// Returns the reason if the entry cannot be understood.
    pub(super) fn origin(&self, reference: &str, creator: &str) -> Result<Origin, String> {
        let (host, path) = reference::host_and_path(reference);
        let server = reference::server(host);
        let mut entries: Vec<(Scope<'_>, &str, &Entry)> = self
            .auths
            .iter()
            .flatten()
            .filter_map(|(key, entry)| Some((Scope::parse(key), key.as_str(), entry.as_ref()?)))
            .filter(|(scope, _, entry)| scope.covers(host, &path) && !entry.is_empty())
            .filter(|(scope, _, _)| self.allows(scope, creator))
            .collect();
        // Of several spellings of one scope, Docker's own counts.
        entries.sort_by_key(|(scope, key, _)| {
            (std::cmp::Reverse(scope.path.len()), *key != server, key.contains("://"))
        });
        let entry = entries.first().map(|(scope, _, entry)| (scope, entry));
        let helper = self.helper(host).filter(|_| self.allows(&Scope { host, path: "" }, creator));
        match (entry, helper) {
            // Docker keeps no such tokens in helpers.
            (Some((scope, entry)), Some(_)) if !scope.path.is_empty() || is_set(&entry.registrytoken) => {
                entry.credentials().map(Origin::Entry)
            }
            (entry, Some(name)) => {
                let in_file = entry.and_then(|(_, entry)| entry.credentials().ok());
                Ok(Origin::Helper { name: name.to_owned(), server: server.to_owned(), in_file })
            }
            (Some((_, entry)), None) => entry.credentials().map(Origin::Entry),
            (None, None) => Ok(Origin::Nothing),
        }
    }

    /// Returns the name of the helper for a registry: its own one, or else the one for all registries.
    ///
    /// An empty name makes the file responsible.
    fn helper(&self, host: &str) -> Option<&str> {
        let server = reference::server(host);
        let helpers = self.cred_helpers.iter().flatten();
        let own = helpers.filter(|(key, _)| Scope::parse(key) == Scope { host, path: "" });
        let own = own.min_by_key(|(key, _)| *key != server);
        let name = match own {
            Some((_, name)) => name.as_deref(),
            None => self.creds_store.as_deref(),
        };
        name.filter(|name| !name.is_empty())
    }

    /// Returns the proxies of builds on an engine, by the names of their build arguments in lower case.
    pub(super) fn proxies(self, engine: &str) -> Vec<(&'static str, String)> {
        let mut proxies = self.proxies.unwrap_or_default();
        let Some(proxies) = proxies.remove(engine).or_else(|| proxies.remove("default")).flatten() else {
            return Vec::new();
        };
        [
            ("http_proxy", proxies.http_proxy),
            ("https_proxy", proxies.https_proxy),
            ("no_proxy", proxies.no_proxy),
            ("ftp_proxy", proxies.ftp_proxy),
            ("all_proxy", proxies.all_proxy),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
    }
}

impl Entry {
    /// Reports whether the entry holds nothing, as those of registries whose credentials are in a helper.
    fn is_empty(&self) -> bool {
        let Self { auth, username, password, identitytoken, registrytoken } = self;
        ![auth, username, password, identitytoken, registrytoken].into_iter().any(is_set)
    }

    /// Returns the credentials that an engine uses of the entry.
    ///
    /// # Errors
    ///
    /// Returns the reason if `auth` is not a user and a password in base64.
    fn credentials(&self) -> Result<Credentials, String> {
        if let Some(token) = self.registrytoken.as_ref().filter(|token| !token.is_empty()) {
            return Ok(Credentials::RegistryToken(token.clone()));
        }
        let [user, password] = [&self.username, &self.password].map(|text| text.clone().unwrap_or_default());
        let (user, password) = match self.auth.as_ref().filter(|auth| !auth.is_empty()) {
            Some(auth) => {
                let malformed = || "`auth` is not a user and a password in base64".to_owned();
                decode(auth).ok_or_else(malformed)?
            }
            None => (user, password),
        };
        Ok(match self.identitytoken.clone().filter(|token| !token.is_empty()) {
            Some(token) => Credentials::IdentityToken { token, user, password },
            None => Credentials::Password { user, password },
        })
    }
}

impl<'a> Scope<'a> {
    /// Parses a key, such as `registry.example`, `https://registry.example/v2/` or `registry.example/team`.
    ///
    /// The paths `v1` and `v2` are those of the registry's API, and stand for the whole registry.
    fn parse(key: &'a str) -> Self {
        let (_, location) = key.split_once("://").unwrap_or(("", key));
        let (host, path) = location.split_once('/').unwrap_or((location, ""));
        let path = path.trim_matches('/');
        let path = if matches!(path, "v1" | "v2") { "" } else { path };
        Self { host: reference::canonical_host(host), path }
    }

    fn covers(&self, host: &str, path: &str) -> bool {
        let is_below = |below: &str| below.is_empty() || below.starts_with('/');
        self.host == host && (self.path.is_empty() || path.strip_prefix(self.path).is_some_and(is_below))
    }
}

fn is_set(text: &Option<String>) -> bool {
    text.as_ref().is_some_and(|text| !text.is_empty())
}

/// Decodes a user and a password; padding may be missing, and zeros follow a password of old versions of
/// Docker.
fn decode(auth: &str) -> Option<(String, String)> {
    const BASE64: GeneralPurpose = GeneralPurpose::new(
        &STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    // Some tools break long lines.
    let auth: String = auth.split_ascii_whitespace().collect();
    let decoded = String::from_utf8(BASE64.decode(auth).ok()?).ok()?;
    let (user, password) = decoded.split_once(':').filter(|(user, _)| !user.is_empty())?;
    Some((user.to_owned(), password.trim_matches('\0').to_owned()))
}
