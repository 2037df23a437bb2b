//! A JSON Web Key Set: the public keys that tokens may be signed with.
//!
//! Every key has one algorithm, which its type determines; a token only says which key it means. Keys for
//! other purposes or of unknown types are left out, because other services may need them.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

/// The keys of a set that can verify tokens.
#[derive(Clone, Debug, Default)]
pub(super) struct KeySet(Vec<Key>);

/// A public key with its algorithm.
#[derive(Clone, Debug)]
pub(super) struct Key {
    id: Option<String>,
    algorithm: Algorithm,
    verifying: DecodingKey,
}

#[derive(Debug, Deserialize)]
struct Document {
    keys: Vec<Value>,
}

#[derive(Debug, Deserialize)]
struct Jwk {
    kty: String,
    #[serde(rename = "use")]
    intended_use: Option<String>,
    key_ops: Option<Vec<String>>,
    alg: Option<String>,
    kid: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl KeySet {
    /// Returns the algorithm that tokens may be signed with and name so; `Ed25519` is the new name of EdDSA with that curve.
    pub(super) fn algorithm(name: &str) -> Option<Algorithm> {
        match name {
            "EdDSA" | "Ed25519" => Some(Algorithm::EdDSA),
            "ES256" => Some(Algorithm::ES256),
            "RS256" => Some(Algorithm::RS256),
            _ => None,
        }
    }

    /// Parses a document, skipping the keys that cannot be used. Fails only if the document is no JWKS at
    /// all.
    pub(super) fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let document: Document = serde_json::from_slice(json)?;
        let mut keys = Vec::new();
        for (position, value) in document.keys.into_iter().enumerate() {
            match serde_json::from_value::<Jwk>(value).map_err(|_| "its members are malformed").and_then(key)
            {
                Ok(key) => keys.push(key),
                Err(reason) => tracing::info!(position, reason, "a key of the JWKS is skipped"),
            }
        }
        Ok(Self(keys))
    }

    /// Returns a set of one key without an id.
    pub(super) fn single(algorithm: Algorithm, verifying: DecodingKey) -> Self {
        Self(vec![Key { id: None, algorithm, verifying }])
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Reports whether a key has this id.
    pub(super) fn knows(&self, id: &str) -> bool {
        self.0.iter().any(|key| key.id.as_deref() == Some(id))
    }

    /// Returns the keys that a token with this header may have been signed with.
    ///
    /// These are the keys with its id or, if it has none, all keys of its algorithm.
    pub(super) fn candidates(
        &self,
        id: Option<&str>,
        algorithm: Algorithm,
    ) -> impl Iterator<Item = &DecodingKey> {
        self.0
            .iter()
            .filter(move |key| key.algorithm == algorithm && (id.is_none() || key.id.as_deref() == id))
            .map(|key| &key.verifying)
    }
}

/// Converts a JWK to a key, or returns the reason why it cannot be used.
fn key(jwk: Jwk) -> Result<Key, &'static str> {
    if jwk.intended_use.as_ref().is_some_and(|intended| intended != "sig")
        || jwk.key_ops.as_ref().is_some_and(|operations| !operations.iter().any(|name| name == "verify"))
    {
        return Err("it is not for signatures");
    }
    let (algorithm, verifying) = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
        ("OKP", Some("Ed25519")) => (Algorithm::EdDSA, ed25519(&jwk)),
        ("EC", Some("P-256")) => (Algorithm::ES256, p256(&jwk)),
        ("RSA", _) => (Algorithm::RS256, rsa(&jwk)),
        _ => return Err("its kind is not known"),
    };
    if jwk.alg.as_ref().is_some_and(|alg| KeySet::algorithm(alg) != Some(algorithm)) {
        return Err("it is for another algorithm");
    }
    let verifying = verifying.ok_or("its numbers are malformed, or too small")?;
    Ok(Key { id: jwk.kid, algorithm, verifying })
}

fn ed25519(jwk: &Jwk) -> Option<DecodingKey> {
    let point: [u8; 32] = coordinate(jwk.x.as_ref())?;
    Some(DecodingKey::from_ed_der(&point))
}

fn p256(jwk: &Jwk) -> Option<DecodingKey> {
    let (x, y): ([u8; 32], [u8; 32]) = (coordinate(jwk.x.as_ref())?, coordinate(jwk.y.as_ref())?);
    // Uncompressed SEC 1, which is what *ring* reads.
    Some(DecodingKey::from_ec_der(&[&[0x04], &x[..], &y[..]].concat()))
}

fn rsa(jwk: &Jwk) -> Option<DecodingKey> {
    /// Accepted size of the modulus in bytes: 2,048 to 8,192 bits, as in *ring*.
    const MODULUS: std::ops::RangeInclusive<usize> = 256..=1_024;

    let (n, e) = (number(jwk.n.as_ref())?, number(jwk.e.as_ref())?);
    MODULUS.contains(&n.len()).then(|| DecodingKey::from_rsa_raw_components(&n, &e))
}

fn coordinate(text: Option<&String>) -> Option<[u8; 32]> {
    bytes(text)?.try_into().ok()
}

/// Decodes a big-endian number. Some issuers put a zero before it, for the sign, which *ring* does not read.
fn number(text: Option<&String>) -> Option<Vec<u8>> {
    let bytes = bytes(text)?;
    let first = bytes.iter().position(|byte| *byte != 0)?;
    Some(bytes[first..].to_vec())
}

fn bytes(text: Option<&String>) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text?.trim_end_matches('=')).ok()
}

#[cfg(test)]
mod tests;
