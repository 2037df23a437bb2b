//! TLS by rustls: the files, and the configurations that servers and clients make from them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// The files of a server, all PEM. They are read again when they change.
#[derive(Clone, Debug, Default, Args)]
pub struct ServerFiles {
    /// PEM file with the certificate to encrypt with, followed by its chain. TLS files are read again when
    /// they change.
    #[arg(long, env = "TRAILER_TLS_CERT", requires = "tls_key", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// PEM file with the private key of --tls-cert.
    #[arg(long, env = "TRAILER_TLS_KEY", requires = "tls_cert", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// PEM file with certificate authorities; accept only clients with a certificate from one of them.
    #[arg(long, env = "TRAILER_CLIENT_CA", requires = "tls_cert", value_name = "FILE")]
    pub client_ca: Option<PathBuf>,
}

/// The TLS configuration of a server, kept up to date with its files.
#[derive(Debug)]
pub struct ServerTls {
    files: ServerFiles,
    read: Vec<Vec<u8>>,
    config: Arc<RwLock<Arc<ServerConfig>>>,
}

/// The current configuration of a [`ServerTls`].
#[derive(Clone, Debug)]
pub struct Current(Arc<RwLock<Arc<ServerConfig>>>);

impl Current {
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ServerTls {
    /// Interval between checks whether the files have changed.
    const REFRESH: Duration = Duration::from_secs(5);

    /// Reads the files; returns `None` if the flags name none.
    ///
    /// # Errors
    ///
    /// Returns an error that names the file that cannot be read or used.
    pub fn open(files: &ServerFiles) -> anyhow::Result<Option<Self>> {
        let Some(read) = contents(files)? else {
            return Ok(None);
        };
        let config = Arc::new(RwLock::new(Arc::new(server_config(files)?)));
        Ok(Some(Self { files: files.clone(), read, config }))
    }

    /// Returns the configuration for new connections, which follows the files.
    pub fn current(&self) -> Current {
        Current(Arc::clone(&self.config))
    }

    /// Reads changed files again, until `shutdown`.
    ///
    /// While the files do not match each other, the previous configuration stays in use.
    pub async fn keep_fresh(mut self, shutdown: CancellationToken) {
        while shutdown.run_until_cancelled(tokio::time::sleep(Self::REFRESH)).await.is_some() {
            if let Err(error) = self.refresh() {
                tracing::warn!("TLS continues with the previous files: {error:#}");
            }
        }
    }

    fn refresh(&mut self) -> anyhow::Result<()> {
        let found = contents(&self.files)?.unwrap_or_default();
        if found != self.read {
            let config = Arc::new(server_config(&self.files)?);
            *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
            self.read = found;
            tracing::info!("TLS uses the changed files");
        }
        Ok(())
    }
}

fn contents(files: &ServerFiles) -> anyhow::Result<Option<Vec<Vec<u8>>>> {
    let (Some(cert), Some(key)) = (&files.tls_cert, &files.tls_key) else {
        return Ok(None);
    };
    [Some(cert), Some(key), files.client_ca.as_ref()]
        .into_iter()
        .flatten()
        .map(|file| read(file))
        .collect::<Result<_, _>>()
        .map(Some)
}

fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

fn server_config(files: &ServerFiles) -> anyhow::Result<ServerConfig> {
    let (cert, key) = (files.tls_cert.as_deref(), files.tls_key.as_deref());
    let (cert, key) = (cert.context("a certificate")?, key.context("a key")?);
    let provider = Arc::new(ring::default_provider());
    let config =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let config = match &files.client_ca {
        None => config.with_no_client_auth(),
        Some(authorities) => config.with_client_cert_verifier(
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots(authorities)?), provider)
                .build()
                .with_context(|| format!("{} cannot be trusted", authorities.display()))?,
        ),
    };
    let private =
        PrivateKeyDer::from_pem_file(key).with_context(|| format!("{} holds no key", key.display()))?;
    let mut config = config
        .with_single_cert(certificates(cert)?, private)
        .with_context(|| format!("{} and {} do not fit", cert.display(), key.display()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn certificates(file: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let read = read.with_context(|| format!("{} holds no certificates", file.display()))?;
    anyhow::ensure!(!read.is_empty(), "{} holds no certificate", file.display());
    Ok(read)
}

fn roots(file: &Path) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        roots
            .add(certificate)
            .with_context(|| format!("{} holds an unusable certificate", file.display()))?;
    }
    Ok(roots)
}

/// Returns the TLS configuration of a client; `identity` is the certificate to present and its key.
///
/// Without `authorities` the client trusts those of the system.
///
/// # Errors
///
/// Returns an error that names the file that cannot be read or holds no certificate.
pub fn client(
    authorities: Option<&Path>,
    identity: Option<(&Path, &Path)>,
) -> anyhow::Result<ClientTlsConfig> {
    let mut config = ClientTlsConfig::new();
    config = match authorities {
        Some(file) => {
            // tonic would accept a file without certificates, and trust none.
            certificates(file)?;
            config.ca_certificate(Certificate::from_pem(read(file)?))
        }
        None => config.with_native_roots(),
    };
    if let Some((cert, key)) = identity {
        certificates(cert)?;
        config = config.identity(Identity::from_pem(read(cert)?, read(key)?));
    }
    Ok(config)
}

/// Installs the cryptography provider of the process, for libraries that ask for it.
///
/// # Errors
///
/// Returns an error if another provider is installed at the same time.
pub fn install_provider() -> io::Result<()> {
    if CryptoProvider::get_default().is_none() {
        ring::default_provider()
            .install_default()
            .map_err(|_| io::Error::other("another provider of cryptography is installed"))?;
    }
    Ok(())
}
