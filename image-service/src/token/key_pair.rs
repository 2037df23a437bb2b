//! The development key pair: tokens without an identity provider, minted and trusted by whoever owns the data directory.

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
    access::{Role, is_subject},
    timestamp::Timestamp,
};

/// The key pair that tokens are signed with.
pub struct TokenKeys {
    signing: EncodingKey,
    verifying: DecodingKey,
}

/// Why a token cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// The subject does not fit.
    #[error("the subject must have 1 to 255 bytes and no control characters")]
    Subject,
    /// The signature could not be made.
    #[error("cannot sign the token")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

#[derive(Debug, Serialize)]
struct Claims<'a> {
    sub: &'a str,
    iat: i64,
    exp: i64,
    roles: &'a [Role],
}

impl TokenKeys {
    const FILE: &str = "token-signing-key.der";

    /// Opens the key pair of a data directory; makes both, for the owner's eyes only, where they are missing.
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

    /// Signs a token for a subject, valid for `ttl` from now.
    pub fn mint(&self, subject: &str, roles: &[Role], ttl: Duration) -> Result<String, MintError> {
        if !is_subject(subject) {
            return Err(MintError::Subject);
        }
        let now = Timestamp::now();
        let seconds = |at: Timestamp| at.micros().div_euclid(1_000_000);
        // A token names whole seconds, and this one shall be valid for no less than was asked for.
        let exp = seconds(now.after(ttl)).saturating_add(1);
        let claims = Claims { sub: subject, iat: seconds(now), exp, roles };
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &self.signing)?)
    }

    /// What its tokens are verified with.
    pub(super) fn verifying(&self) -> &DecodingKey {
        &self.verifying
    }
}

/// Makes the data directory, for the owner's eyes only, where it is missing.
pub(crate) fn make_data_dir(data_dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir)
}

/// Makes a key pair, unless another process does so at the same moment: then that one's is kept.
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
            let minted = keys.mint(subject, &[], Duration::from_secs(3600));
            assert!(matches!(minted, Err(MintError::Subject)), "{subject:?}");
        }
    }
}
