//! Configurations of images in registries, as a build would get them.
//!
//! BuildKit's gateway resolves them: a Solve without a frontend opens it, and its calls name the Solve. An
//! index has an image for each platform, and the engine chooses among them in the same way as for a build.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bollard::moby::buildkit::v1::SolveRequest;
use ring::digest::{SHA256, digest};
use tonic::{Request, client::Grpc};
use tonic_prost::ProstCodec;

use super::{DockerEngine, control::Control, credentials::SessionCredentials, solve::error_of};
use crate::{
    engine::{EngineError, Platforms},
    reference,
};

/// Digests of configurations by the digest of an image or an index, which determines them.
#[derive(Debug, Default)]
pub(super) struct KnownConfigs(Mutex<HashMap<(String, Platforms), Vec<String>>>);

/// A request for the configuration of an image.
#[derive(Clone, PartialEq, prost::Message)]
struct ResolveImageConfigRequest {
    #[prost(string, tag = "1")]
    reference: String,
    /// The engine's own if `None`.
    #[prost(message, optional, tag = "2")]
    platform: Option<Platform>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, prost::Message)]
struct Platform {
    #[prost(string, tag = "1")]
    architecture: String,
    #[prost(string, tag = "2")]
    os: String,
    #[prost(string, tag = "3")]
    variant: String,
    #[prost(string, tag = "4")]
    os_version: String,
    #[prost(string, repeated, tag = "5")]
    os_features: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ResolveImageConfigResponse {
    #[prost(bytes = "vec", tag = "2")]
    config: Vec<u8>,
}

impl KnownConfigs {
    /// Maximum number of images and indexes; one more, and all are forgotten.
    const MAX: usize = 1000;

    fn get(&self, image: &(String, Platforms)) -> Option<Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(image).cloned()
    }

    fn insert(&self, image: (String, Platforms), configs: Vec<String>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= Self::MAX {
            known.clear();
        }
        known.insert(image, configs);
    }
}

impl DockerEngine {
    /// Maximum number of platforms of an index.
    const MAX_PLATFORMS: usize = 64;
    /// Maximum duration of a lookup, for all platforms of an index.
    const PATIENCE: Duration = Duration::from_secs(300);

    pub(super) async fn resolve_configs(
        &self,
        pinned: &str,
        platforms: Platforms,
        creator: &str,
    ) -> Result<Vec<String>, EngineError> {
        let key = (reference::parts(pinned).1.to_owned(), platforms);
        if let Some(known) = self.known_configs.get(&key) {
            return Ok(known);
        }
        let mut wanted = vec![None];
        if platforms == Platforms::All {
            wanted.extend(self.platforms(pinned, creator).await?.into_iter().map(Some));
        }
        let connections = self.connections.separate();
        let _close = connections.closed().clone().drop_guard();
        let credentials =
            SessionCredentials::of_images(self.docker_config.clone(), creator, [pinned.to_owned()]);
        let name = uuid::Uuid::new_v4().simple().to_string();
        let control = Control::open(&connections, &name, credentials, None).await?;
        let opening = SolveRequest {
            r#ref: name.clone(),
            session: control.session.clone(),
            internal: true,
            ..SolveRequest::default()
        };
        let mut client = control.client.clone();
        let late = || EngineError::Unreachable(format!("{pinned}: the registry does not respond"));
        let resolved = tokio::select! {
            resolved = resolve(&control, &name, pinned, wanted) => resolved,
            () = tokio::time::sleep(Self::PATIENCE) => Err(late()),
            // It lasts until the call is dropped, unless it fails.
            opened = client.solve(opening) => Err(match opened {
                Err(status) => error_of(&status),
                Ok(_) => EngineError::Broken("it ended a gateway without a request".to_owned()),
            }),
        };
        let configs = resolved.map_err(|error| control.credentials.explain(error))?;
        self.known_configs.insert(key, configs.clone());
        Ok(configs)
    }

    /// Returns the platforms that a registry has an image for.
    async fn platforms(&self, pinned: &str, creator: &str) -> Result<BTreeSet<Platform>, EngineError> {
        let inspected = self.inspect_in_registry(pinned, creator).await?;
        let platforms: BTreeSet<Platform> = inspected
            .platforms
            .into_iter()
            .map(|platform| Platform {
                architecture: platform.architecture.unwrap_or_default(),
                os: platform.os.unwrap_or_default(),
                variant: platform.variant.unwrap_or_default(),
                os_version: platform.os_version.unwrap_or_default(),
                os_features: platform.os_features.unwrap_or_default(),
            })
            .collect();
        if platforms.len() > Self::MAX_PLATFORMS {
            let rule = format!("{pinned}: has more than {} platforms", Self::MAX_PLATFORMS);
            return Err(EngineError::Refused(rule));
        }
        Ok(platforms)
    }
}

/// Resolves the configurations that an image has for some platforms through the gateway of this Solve.
async fn resolve(
    control: &Control,
    name: &str,
    pinned: &str,
    platforms: Vec<Option<Platform>>,
) -> Result<Vec<String>, EngineError> {
    const METHOD: &str = "/moby.buildkit.v1.frontend.LLBBridge/ResolveImageConfig";
    const SOLVE: &str = "buildkit-controlapi-buildid";
    let broken = |error: &dyn std::error::Error| EngineError::Broken(error.to_string());
    let mut configs = Vec::with_capacity(platforms.len());
    for platform in platforms {
        let mut request = Request::new(ResolveImageConfigRequest { reference: pinned.to_owned(), platform });
        request.metadata_mut().insert(SOLVE, name.parse().map_err(|error| broken(&error))?);
        let mut gateway = Grpc::new(control.channel.clone());
        gateway.ready().await.map_err(|error| broken(&error))?;
        let codec = ProstCodec::<ResolveImageConfigRequest, ResolveImageConfigResponse>::default();
        let answer = gateway.unary(request, http::uri::PathAndQuery::from_static(METHOD), codec).await;
        let config = answer.map_err(|status| error_of(&status))?.into_inner().config;
        configs.push(format!("sha256:{}", hex::encode(digest(&SHA256, &config))));
    }
    configs.sort();
    configs.dedup();
    Ok(configs)
}
