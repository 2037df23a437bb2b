//! The development key pair: tokens without an identity provider, minted and trusted by the owner of the data
//! directory.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header};
use ring::{
    rand::SystemRandom,
    signature::{Ed25519KeyPair, KeyPair},
};
use serde::Serialize;

use super::signatures;
use crate::{
    access::{Groups, Pools, Role, is_subject},
    timestamp::Timestamp,
};

/// The key pair that signs tokens.
pub struct TokenKeys {
    signing: EncodingKey,
    verifying: DecodingKey,
}

/// Reason why a token cannot be minted.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// Invalid subject.
    #[error("the subject must have 1 to 255 bytes and no control or format characters")]
    Subject,
    /// Invalid groups.
    #[error("groups must be at most 1000, each of 1 to 255 bytes without control or format characters")]
    Groups,
    /// Invalid pools.
    #[error("pools must be at most 64, each of 1 to 63 bytes without white space and control characters")]
    Pools,
    /// Failure to sign the token.
    #[error("cannot sign the token")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

#[derive(Debug, Serialize)]
struct Claims<'a> {
    sub: &'a str,
    iat: i64,
    exp: i64,
    roles: &'a [Role],
    groups: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    pools: Option<&'a [String]>,
}

impl TokenKeys {
    const FILE: &str = "token-signing-key.der";

    /// Opens the key pair of a data directory. Creates both if they are missing, with access for the owner
    /// only.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory or the file cannot be created or read, or if the file holds no
    /// Ed25519 key.
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        make_data_dir(data_dir)?;
        let path = data_dir.join(Self::FILE);
        let pkcs8 = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                create(&path)?;
                fs::read(&path)?
            }
            read => read?,
        };
        let pair = Ed25519KeyPair::from_pkcs8(&pkcs8).map_err(|rejected| {
            let message = format!("{} is no Ed25519 key in PKCS #8: {rejected}", path.display());
            io::Error::new(io::ErrorKind::InvalidData, message)
        })?;
        signatures::install();
        Ok(Self {
            signing: EncodingKey::from_ed_der(&pkcs8),
            verifying: DecodingKey::from_ed_der(pair.public_key().as_ref()),
        })
    }

    /// Signs a token for a subject, valid for `ttl` from now. Without any pools, it has the pool `default`.
    ///
    /// # Errors
    ///
    /// Returns [`MintError::Subject`], [`MintError::Groups`] or [`MintError::Pools`] if the subject, the groups or
    /// the pools are invalid, and [`MintError::Sign`] if the token cannot be signed.
    pub fn mint(
        &self,
        subject: &str,
        roles: &[Role],
        groups: &[String],
        pools: &[String],
        ttl: Duration,
    ) -> Result<String, MintError> {
        if !is_subject(subject) {
            return Err(MintError::Subject);
        }
        if groups.len() > Groups::MAX || groups.iter().any(|group| !is_subject(group)) {
            return Err(MintError::Groups);
        }
        if Pools::parse(&pools.into()).is_none() {
            return Err(MintError::Pools);
        }
        let now = Timestamp::now();
        let seconds = |at: Timestamp| at.micros().div_euclid(1_000_000);
        // Tokens have whole seconds, and this one has to be valid for no less than `ttl`.
        let exp = seconds(now.after(ttl)).saturating_add(1);
        let claims = Claims {
            sub: subject,
            iat: seconds(now),
            exp,
            roles,
            groups,
            pools: (!pools.is_empty()).then_some(pools),
        };
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &self.signing)?)
    }

    /// Returns the key that verifies the tokens.
    pub(super) fn verifying(&self) -> &DecodingKey {
        &self.verifying
    }
}

/// Creates the data directory if it is missing, with access for the owner only.
///
/// # Errors
///
/// Returns the error of the file system if the directory cannot be created.
pub(crate) fn make_data_dir(data_dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir)
}

/// Creates a key pair. If another process does so at the same moment, the key pair of that process is kept.
fn create(path: &Path) -> io::Result<()> {
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
        .map_err(|_| io::Error::other("the system has no randomness"))?;
    let draft = path.with_extension(format!("{}.draft", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(pkcs8.as_ref())?;
    file.sync_all()?;
    let linked = fs::hard_link(&draft, path);
    fs::remove_file(&draft)?;
    match linked {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    }
}

impl std::fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenKeys").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_must_be_printable() {
        let dir = tempfile::tempdir().expect("a directory");
        let keys = TokenKeys::open(dir.path()).expect("keys");
        for subject in ["", " ", "a\nb", &"a".repeat(256)] {
            let minted = keys.mint(subject, &[], &[], &[], Duration::from_secs(3600));
            assert!(matches!(minted, Err(MintError::Subject)), "{subject:?}");
        }
    }
}
