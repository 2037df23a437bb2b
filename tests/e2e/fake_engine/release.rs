//! The release that the engine reports, and the API versions that follow from it.

use std::fmt;
use std::str::FromStr;

use anyhow::Context as _;
use serde_json::{Value, json};

/// The oldest API version that the engine accepts.
const OLDEST: ApiVersion = ApiVersion { major: 1, minor: 24 };

/// The first API version with gRPC on the engine's socket itself.
const DIRECT_GRPC: ApiVersion = ApiVersion { major: 1, minor: 53 };

/// A version of the engine and the newest version of its API.
#[derive(Debug)]
pub(super) struct Release {
    version: String,
    api: ApiVersion,
}

/// A version of the engine's API, like `1.45`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ApiVersion {
    major: u32,
    minor: u32,
}

impl Release {
    pub(super) fn new(version: &str, api: &str) -> anyhow::Result<Release> {
        let api = api.parse().context("an API version like 1.45")?;
        Ok(Release { version: version.to_owned(), api })
    }

    /// Returns the version of the engine, like `26.1.5`.
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// Returns the newest API version as text.
    pub(super) fn api(&self) -> String {
        self.api.to_string()
    }

    /// Returns whether the socket itself accepts gRPC. In that case `POST /grpc` is unknown.
    pub(super) fn takes_grpc_on_its_socket(&self) -> bool {
        self.api >= DIRECT_GRPC
    }

    /// Checks the API version at the start of a request's path.
    ///
    /// # Errors
    ///
    /// Returns the engine's message if the version is newer or older than the engine supports.
    pub(super) fn check(&self, requested: &str) -> Result<(), String> {
        let Ok(version) = requested.parse::<ApiVersion>() else {
            return Err(format!("invalid API version {requested}"));
        };
        if version > self.api {
            let newest = self.api;
            return Err(format!(
                "client version {version} is too new. Maximum supported API version is {newest}"
            ));
        }
        if version < OLDEST {
            return Err(format!(
                "client version {version} is too old. Minimum supported API version is {OLDEST}, please upgrade your client to a newer version"
            ));
        }
        Ok(())
    }

    /// Returns the answer to `GET /version`.
    pub(super) fn describe(&self) -> Value {
        let (version, api, oldest) = (self.version(), self.api(), OLDEST.to_string());
        let engine = json!({
            "Name": "Engine",
            "Version": version,
            "Details": { "ApiVersion": api, "MinAPIVersion": oldest, "Experimental": "false" },
        });
        json!({
            "Platform": { "Name": "" },
            "Components": [engine],
            "Version": version,
            "ApiVersion": api,
            "MinAPIVersion": oldest,
            "GitCommit": "411e817",
            "GoVersion": "go1.21.11",
            "Os": "linux",
            "Arch": "amd64",
            "KernelVersion": "6.1.0",
            "BuildTime": "2026-07-18T19:10:46.000000000+00:00",
        })
    }
}

impl FromStr for ApiVersion {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<ApiVersion> {
        let (major, minor) = text.split_once('.').context("a dot")?;
        Ok(ApiVersion { major: major.parse()?, minor: minor.parse()? })
    }
}

impl fmt::Display for ApiVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
