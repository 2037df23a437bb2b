//! Bearer tokens: JSON Web Tokens, signed and verified with the key pair that is kept in the data directory.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, errors::ErrorKind};
use ring::{
    rand::SystemRandom,
    signature::{Ed25519KeyPair, KeyPair},
};
use serde::{Deserialize, Serialize};

use crate::{
    access::{Principal, Role},
    timestamp::Timestamp,
};

mod ed25519;

/// The key pair that tokens are signed with.
pub struct TokenKeys {
    signing: EncodingKey,
    verifying: DecodingKey,
    validation: Validation,
}

/// Why a token is not accepted.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("the token is not valid")]
    Invalid,
    #[error("the token expired")]
    Expired,
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    sub: String,
    iat: i64,
    exp: i64,
    #[serde(default)]
    roles: Vec<Role>,
}

impl TokenKeys {
    const FILE: &str = "token-signing-key.der";
    /// As long as a subject may be: it becomes a creator, and the name of a worker.
    const MAX_SUBJECT: usize = 255;

    /// Opens the key pair of a data directory; makes both, for the owner's eyes only, where they are missing.
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir)?;
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
        ed25519::install();
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.leeway = 0;
        validation.set_required_spec_claims(&["exp", "sub"]);
        validation.validate_aud = false;
        Ok(Self {
            signing: EncodingKey::from_ed_der(&pkcs8),
            verifying: DecodingKey::from_ed_der(pair.public_key().as_ref()),
            validation,
        })
    }

    /// Signs a token for a subject, valid for `ttl` from now.
    pub fn mint(&self, subject: &str, roles: &[Role], ttl: Duration) -> Result<String, MintError> {
        check_subject(subject)?;
        let now = Timestamp::now();
        let seconds = |at: Timestamp| at.micros().div_euclid(1_000_000);
        let claims = Claims {
            sub: subject.to_owned(),
            iat: seconds(now),
            exp: seconds(now.after(ttl)),
            roles: roles.to_vec(),
        };
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &self.signing)?)
    }

    /// Accepts a token that was signed with this key pair and has not expired.
    pub(crate) fn verify(&self, token: &str) -> Result<Principal, TokenError> {
        let claims: Claims = jsonwebtoken::decode(token, &self.verifying, &self.validation)
            .map_err(|error| {
                if *error.kind() == ErrorKind::ExpiredSignature {
                    TokenError::Expired
                } else {
                    TokenError::Invalid
                }
            })?
            .claims;
        check_subject(&claims.sub).map_err(|_| TokenError::Invalid)?;
        let expires_at = Timestamp::from_micros(claims.exp.saturating_mul(1_000_000));
        Ok(Principal::new(claims.sub, claims.roles, expires_at))
    }
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

fn check_subject(subject: &str) -> Result<(), MintError> {
    let fits = !subject.trim().is_empty()
        && subject.len() <= TokenKeys::MAX_SUBJECT
        && !subject.chars().any(char::is_control);
    if fits { Ok(()) } else { Err(MintError::Subject) }
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

    fn keys() -> (tempfile::TempDir, TokenKeys) {
        let dir = tempfile::tempdir().expect("a directory");
        let keys = TokenKeys::open(dir.path()).expect("keys");
        (dir, keys)
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_minted_token_names_its_subject_and_roles() {
        let (dir, keys) = keys();
        let token = keys.mint("alice", &[Role::Builder], HOUR).expect("a token");
        let again = TokenKeys::open(dir.path()).expect("the same keys");
        let principal = again.verify(&token).expect("accepted");
        assert_eq!(principal.subject(), "alice");
        assert!(principal.has(Role::Builder) && !principal.is_admin());
    }

    #[test]
    fn foreign_forged_and_expired_tokens_are_refused() {
        let (_dir, keys) = keys();
        let (_other_dir, other) = self::keys();
        let token = keys.mint("alice", &[Role::Admin], HOUR).expect("a token");
        assert_eq!(other.verify(&token), Err(TokenError::Invalid));
        let (body, signature) = token.rsplit_once('.').expect("three parts");
        for forged in
            ["", "a.b.c", body, &format!("{body}."), &format!("{body}.AAAA"), &format!("{signature}.{body}")]
        {
            assert_eq!(keys.verify(forged), Err(TokenError::Invalid), "{forged}");
        }
        // {"alg":"none"}
        let claims = token.split('.').nth(1).expect("claims");
        assert_eq!(keys.verify(&format!("eyJhbGciOiJub25lIn0.{claims}.")), Err(TokenError::Invalid));
        let expired = keys.mint("alice", &[], Duration::ZERO).expect("a token");
        // A token is valid until the end of its last second.
        let begun = std::time::Instant::now();
        while keys.verify(&expired) != Err(TokenError::Expired) {
            assert!(begun.elapsed() < Duration::from_secs(10), "the token does not expire");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_subject_must_be_printable() {
        let (_dir, keys) = keys();
        for subject in ["", " ", "a\nb", &"a".repeat(256)] {
            assert!(matches!(keys.mint(subject, &[], HOUR), Err(MintError::Subject)), "{subject:?}");
        }
    }
}
