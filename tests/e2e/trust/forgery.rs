//! Images that the owner of a registry puts together from those of others.

use anyhow::Context as _;
use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};

use crate::registry::Registry;

/// An image of a registry that somebody has put together from the parts of others.
pub(super) struct Forgery<'a> {
    pub(super) registry: &'a Registry,
    pub(super) repository: String,
}

impl Forgery<'_> {
    /// Takes all parts of an image from another repository of the registry and returns its manifest, as an
    /// index would list it.
    pub(super) async fn take(&self, repository: &str, digest: &str) -> anyhow::Result<(Value, Bytes)> {
        const INDEX: &str = "application/vnd.oci.image.index.v1+json";
        let get = async |digest: &str| {
            let path = format!("{repository}/manifests/{digest}");
            self.registry.call(Method::GET, &path, "", Bytes::new()).await
        };
        let mut digest = digest.to_owned();
        let mut found = get(&digest).await?;
        if found.content_type == INDEX {
            let index: Value = serde_json::from_slice(&found.body)?;
            digest = index["manifests"][0]["digest"].as_str().context("a digest")?.to_owned();
            found = get(&digest).await?;
        }
        let manifest: Value = serde_json::from_slice(&found.body)?;
        let layers = manifest["layers"].as_array().context("layers")?;
        for part in layers.iter().chain([&manifest["config"]]) {
            let part = part["digest"].as_str().context("a digest")?;
            let path = format!("{}/blobs/uploads/?mount={part}&from={repository}", self.repository);
            self.registry.call(Method::POST, &path, "", Bytes::new()).await?;
        }
        self.put(&digest, &found.content_type, found.body.clone()).await?;
        let size = found.body.len();
        Ok((json!({ "mediaType": found.content_type, "digest": digest, "size": size }), found.body))
    }

    pub(super) async fn put(&self, version: &str, content_type: &str, manifest: Bytes) -> anyhow::Result<()> {
        let path = format!("{}/manifests/{version}", self.repository);
        self.registry.call(Method::PUT, &path, content_type, manifest).await?;
        Ok(())
    }

    /// Puts an index of manifests, each with its platform.
    pub(super) async fn put_index(&self, tag: &str, manifests: &[(&Value, &str)]) -> anyhow::Result<()> {
        let mut listed = Vec::new();
        for (manifest, architecture) in manifests {
            let mut manifest = (*manifest).clone();
            manifest["platform"] = json!({ "os": "linux", "architecture": architecture });
            listed.push(manifest);
        }
        let content_type = "application/vnd.oci.image.index.v1+json";
        let index = json!({ "schemaVersion": 2, "mediaType": content_type, "manifests": listed });
        self.put(tag, content_type, index.to_string().into()).await
    }
}
