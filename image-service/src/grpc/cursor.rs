//! Page tokens and resume revisions, bound to the query and the caller that they were issued for.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    digest::{SHA256, digest},
    error::Unspecified,
    rand::{SecureRandom, SystemRandom},
};
use uuid::Uuid;

use crate::{access::Principal, error::Error, image::View};

/// The context of a position: the catalogue, the query, and the caller with its visibility.
#[derive(Clone, Debug)]
pub(super) struct Binding {
    digest: String,
    catalogue_id: Uuid,
}

impl Binding {
    pub(super) fn new(catalogue_id: Uuid, query: &str, view: View, caller: &Principal) -> Self {
        let bound = format!("{catalogue_id}/{query}/{view:?}/{:?}", caller.visibility());
        let digest = digest(&SHA256, bound.as_bytes());
        Self { digest: hex::encode(&digest.as_ref()[..8]), catalogue_id }
    }

    /// Issues a token for a position, which the caller can read.
    pub(super) fn seal(&self, position: &str) -> String {
        [position, ".", &self.digest].concat()
    }

    /// Returns the position in a token; `None` if it was issued for another query or caller.
    pub(super) fn open<'a>(&self, sealed: &'a str) -> Option<&'a str> {
        let (position, digest) = sealed.rsplit_once('.')?;
        (digest == self.digest).then_some(position)
    }

    /// Issues a token for a position, which the caller can neither read nor forge.
    ///
    /// The position may be that of an image which the caller cannot see.
    pub(super) fn conceal(&self, position: &[u8]) -> Result<String, Error> {
        self.encrypt(position).map_err(|error| Error::Internal(error.to_string().into()))
    }

    fn encrypt(&self, position: &[u8]) -> Result<String, Unspecified> {
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce)?;
        let mut sealed = position.to_vec();
        let bound = Aad::from(self.digest.as_bytes());
        self.key()?.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), bound, &mut sealed)?;
        Ok(BASE64_URL_SAFE_NO_PAD.encode([nonce.as_slice(), &sealed].concat()))
    }

    /// Returns the position in a concealed token; `None` if it was issued for another query or caller.
    pub(super) fn reveal(&self, concealed: &str) -> Option<Vec<u8>> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(concealed).ok()?;
        let (nonce, sealed) = bytes.split_first_chunk()?;
        let mut position = sealed.to_vec();
        let (nonce, bound) = (Nonce::assume_unique_for_key(*nonce), Aad::from(self.digest.as_bytes()));
        let length = self.key().ok()?.open_in_place(nonce, bound, &mut position).ok()?.len();
        position.truncate(length);
        Some(position)
    }

    /// Derives the key, which is the same for all replicas.
    ///
    /// It is secret because the id of the catalogue is random and no caller learns it.
    fn key(&self) -> Result<LessSafeKey, Unspecified> {
        let key = digest(&SHA256, &[b"places of ".as_slice(), self.catalogue_id.as_bytes()].concat());
        Ok(LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key.as_ref())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{access::Role, timestamp::Timestamp};

    #[test]
    fn a_concealed_place_says_nothing_and_is_bound() -> Result<(), Error> {
        let caller =
            |subject: &str| Principal::new(subject.to_owned(), vec![Role::Builder], Timestamp::now());
        let catalogue_id = Uuid::new_v4();
        let binding =
            |catalogue_id, query, subject| Binding::new(catalogue_id, query, View::Basic, &caller(subject));
        let own = binding(catalogue_id, "all", "alice");
        let concealed = own.conceal(b"Private tools")?;
        assert_eq!(own.reveal(&concealed).as_deref(), Some(b"Private tools".as_slice()));
        assert_ne!(own.conceal(b"Private tools")?, concealed);
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(&concealed).unwrap_or_default();
        assert!(!bytes.windows(7).any(|part| part == b"Private"));
        for other in [
            binding(catalogue_id, "all", "bob"),
            binding(catalogue_id, "few", "alice"),
            binding(Uuid::new_v4(), "all", "alice"),
        ] {
            assert_eq!(other.reveal(&concealed), None);
        }
        for forged in
            ["", "x", &concealed[1..], &format!("{concealed}AAAA"), &format!("A{}", &concealed[1..])]
        {
            assert!(forged == concealed || own.reveal(forged).is_none(), "{forged}");
        }
        Ok(())
    }
}
