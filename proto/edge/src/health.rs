//! Asks a program of ours whether it serves: the health check of a container.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Args;
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::tls;

/// Whom to ask.
#[derive(Clone, Debug, Args)]
pub struct Question {
    /// The program's address, with https if it encrypts.
    #[arg(long, env = "TRAILER_HEALTH_URL", value_name = "URL")]
    pub url: String,

    /// The authorities that an https address is trusted by, a PEM file; those of the system when absent.
    #[arg(long, env = "TRAILER_HEALTH_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// The certificate to show, where one is asked for: a PEM file.
    #[arg(long, env = "TRAILER_HEALTH_CERT", requires = "key", value_name = "FILE")]
    pub cert: Option<PathBuf>,

    /// The private key of --cert, a PEM file.
    #[arg(long, env = "TRAILER_HEALTH_KEY", requires = "cert", value_name = "FILE")]
    pub key: Option<PathBuf>,
}

impl Question {
    const PATIENCE: Duration = Duration::from_secs(3);

    /// Fails, and says why, unless the program serves.
    pub async fn ask(&self) -> anyhow::Result<()> {
        let mut endpoint = Endpoint::from_shared(self.url.clone())
            .with_context(|| format!("--url {:?} is no URL", self.url))?
            .connect_timeout(Self::PATIENCE)
            .timeout(Self::PATIENCE);
        if endpoint.uri().scheme_str() == Some("https") {
            let identity = self.cert.as_deref().zip(self.key.as_deref());
            endpoint = endpoint.tls_config(tls::client(self.ca.as_deref(), identity)?)?;
        }
        let channel = endpoint.connect().await.with_context(|| format!("cannot connect to {}", self.url))?;
        let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await?.into_inner();
        let status = answer.status();
        anyhow::ensure!(status == ServingStatus::Serving, "{}", status.as_str_name());
        Ok(())
    }
}
