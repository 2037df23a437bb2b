//! A certificate authority for tests.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// An authority and the directory of the files that it has issued.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    directory: TempDir,
}

/// A certificate and its key, as files.
#[derive(Clone, Debug)]
pub(crate) struct Issued {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

impl Authority {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key)?;
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("ca.pem"), certificate.pem())?;
        Ok(Self { issuer: Issuer::new(params, key), directory })
    }

    /// Returns the path of the authority's own certificate.
    pub(crate) fn file(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// Issues a certificate for this host.
    pub(crate) fn issue(&self) -> anyhow::Result<Issued> {
        let name = uuid::Uuid::new_v4().simple().to_string();
        let path = |kind: &str| self.directory.path().join(format!("{name}.{kind}.pem"));
        let issued = Issued { cert: path("cert"), key: path("key") };
        self.issue_into(&issued)?;
        Ok(issued)
    }

    /// Replaces issued files by a new certificate and key.
    pub(crate) fn issue_into(&self, files: &Issued) -> anyhow::Result<()> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        std::fs::write(&files.key, key.serialize_pem())?;
        std::fs::write(&files.cert, certificate.pem())?;
        Ok(())
    }
}

/// Returns a path as the value of a flag.
pub(crate) fn flag(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
