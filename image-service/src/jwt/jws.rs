//! JSON Web Signatures in compact form: a header, claims and a signature.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// A token whose signature is not verified yet.
#[derive(Debug)]
pub(super) struct Jws<'a> {
    pub(super) header: Header,
    /// Header and claims, as they were signed.
    message: &'a str,
    claims: &'a str,
    signature: &'a str,
}

/// The members of a header that count.
#[derive(Debug, Deserialize)]
pub(super) struct Header {
    pub(super) alg: String,
    pub(super) kid: Option<String>,
    /// Names of extensions that have to be understood.
    pub(super) crit: Option<Value>,
}

impl<'a> Jws<'a> {
    /// Parses a token; returns `None` if it is none.
    pub(super) fn parse(token: &'a str) -> Option<Self> {
        let (message, signature) = token.rsplit_once('.')?;
        let (header, claims) = message.split_once('.').filter(|(_, claims)| !claims.contains('.'))?;
        Some(Self { header: decode(header)?, message, claims, signature })
    }

    /// Reports whether a key has made the signature by this algorithm.
    pub(super) fn is_signed_by(&self, key: &DecodingKey, algorithm: Algorithm) -> bool {
        let verified = jsonwebtoken::crypto::verify(self.signature, self.message.as_bytes(), key, algorithm);
        verified.is_ok_and(|is_signed| is_signed)
    }

    /// Returns the claims, or `None` if they are no object.
    pub(super) fn claims(&self) -> Option<Map<String, Value>> {
        decode(self.claims)
    }
}

fn decode<T: DeserializeOwned>(part: &str) -> Option<T> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}
