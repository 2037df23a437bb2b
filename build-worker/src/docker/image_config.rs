//! Configurations of images, which not every engine reports.
//!
//! BuildKit's gateway resolves a configuration as a build would get it: a Solve without a frontend opens the
//! gateway, and its calls name the Solve.

use std::time::Duration;

use bollard::moby::buildkit::v1::SolveRequest;
use ring::digest::{SHA256, digest};
use serde::Deserialize;
use tonic::{Request, client::Grpc};
use tonic_prost::ProstCodec;

use super::{DockerEngine, control::Control, solve::error_of};
use crate::engine::{Configuration, EngineError};

/// A request for the configuration of an image, for the engine's own platform.
#[derive(Clone, PartialEq, prost::Message)]
struct ResolveImageConfigRequest {
    #[prost(string, tag = "1")]
    reference: String,
    #[prost(string, tag = "3")]
    resolve_mode: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ResolveImageConfigResponse {
    #[prost(bytes = "vec", tag = "2")]
    config: Vec<u8>,
}

/// The part of a configuration that lists the layers.
#[derive(Deserialize)]
struct ConfigFile {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Option<Vec<String>>,
}

impl DockerEngine {
    /// Maximum duration of a lookup.
    const PATIENCE: Duration = Duration::from_secs(60);

    pub(super) async fn resolve_configuration(&self, image: &str) -> Result<Configuration, EngineError> {
        let connections = self.connections.separate();
        let _close = connections.closed().clone().drop_guard();
        let name = uuid::Uuid::new_v4().simple().to_string();
        let control = Control::open(&connections, &name, None).await?;
        let opening = SolveRequest {
            r#ref: name.clone(),
            session: control.session.clone(),
            internal: true,
            ..SolveRequest::default()
        };
        let mut client = control.client.clone();
        let late = || EngineError::Broken(format!("it does not report the configuration of {image}"));
        tokio::select! {
            resolved = resolve(&control, &name, image) => resolved,
            () = tokio::time::sleep(Self::PATIENCE) => Err(late()),
            // It lasts until the call is dropped, unless it fails.
            opened = client.solve(opening) => Err(match opened {
                Err(status) => error_of(&status),
                Ok(_) => EngineError::Broken("it ended a gateway without a request".to_owned()),
            }),
        }
    }
}

/// Resolves the configuration of an image that the engine has, through the gateway of this Solve.
async fn resolve(control: &Control, name: &str, image: &str) -> Result<Configuration, EngineError> {
    const METHOD: &str = "/moby.buildkit.v1.frontend.LLBBridge/ResolveImageConfig";
    const SOLVE: &str = "buildkit-controlapi-buildid";
    let broken = |error: &dyn std::error::Error| EngineError::Broken(error.to_string());
    let mut request = Request::new(ResolveImageConfigRequest {
        reference: image.to_owned(),
        resolve_mode: "local".to_owned(),
    });
    request.metadata_mut().insert(SOLVE, name.parse().map_err(|error| broken(&error))?);
    let mut gateway = Grpc::new(control.channel.clone());
    gateway.ready().await.map_err(|error| broken(&error))?;
    let codec = ProstCodec::<ResolveImageConfigRequest, ResolveImageConfigResponse>::default();
    let answer = gateway.unary(request, http::uri::PathAndQuery::from_static(METHOD), codec).await;
    let config = answer.map_err(|status| error_of(&status))?.into_inner().config;
    let ConfigFile { rootfs } = serde_json::from_slice(&config).map_err(|error| broken(&error))?;
    let digest = format!("sha256:{}", hex::encode(digest(&SHA256, &config)));
    Ok(Configuration { digest, layers: rootfs.diff_ids.unwrap_or_default() })
}
