//! Health check of a program, for containers.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Args;
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::tls;

/// The options of a health check.
#[derive(Clone, Debug, Args)]
pub struct HealthCheck {
    /// URL of the program; https if it encrypts.
    #[arg(long, env = "TRAILER_HEALTH_URL", value_name = "URL")]
    pub url: String,

    /// PEM file with the certificate authorities to trust for an https URL; the system's if absent.
    #[arg(long, env = "TRAILER_HEALTH_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// PEM file with the certificate to present if the program asks for one.
    #[arg(long, env = "TRAILER_HEALTH_CERT", requires = "key", value_name = "FILE")]
    pub cert: Option<PathBuf>,

    /// PEM file with the private key of --cert.
    #[arg(long, env = "TRAILER_HEALTH_KEY", requires = "cert", value_name = "FILE")]
    pub key: Option<PathBuf>,
}

impl HealthCheck {
    const PATIENCE: Duration = Duration::from_secs(3);

    /// Checks that the program is serving.
    ///
    /// # Errors
    ///
    /// Returns an error if a file cannot be used, the program cannot be reached, or it is not serving.
    pub async fn run(&self) -> anyhow::Result<()> {
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
