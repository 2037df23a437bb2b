//! Page tokens and resume revisions: places in an answer, bound to the query and the caller that they were given to.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    digest::{SHA256, digest},
    error::Unspecified,
    rand::{SecureRandom, SystemRandom},
};
use uuid::Uuid;

use crate::{access::Principal, error::Error, image::View};

/// What a place is bound to: the history of the database, the query, and the caller with its sight.
#[derive(Clone, Debug)]
pub(super) struct Binding {
    digest: String,
    history: Uuid,
}

impl Binding {
    pub(super) fn new(history: Uuid, query: &str, view: View, caller: &Principal) -> Self {
        let bound = format!("{history}/{query}/{view:?}/{:?}", caller.sight());
        let digest = digest(&SHA256, bound.as_bytes());
        let digest = digest.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { digest, history }
    }

    /// Gives a place to the caller.
    pub(super) fn seal(&self, place: &str) -> String {
        [place, ".", &self.digest].concat()
    }

    /// Takes a place back; `None` when it is not one of this query and caller.
    pub(super) fn open<'a>(&self, sealed: &'a str) -> Option<&'a str> {
        let (place, digest) = sealed.rsplit_once('.')?;
        (digest == self.digest).then_some(place)
    }

    /// Gives a place to the caller that it can neither read nor make: the place may be that of an image out of its sight.
    pub(super) fn conceal(&self, place: &[u8]) -> Result<String, Error> {
        self.encrypt(place).map_err(|error| Error::Internal(error.to_string().into()))
    }

    fn encrypt(&self, place: &[u8]) -> Result<String, Unspecified> {
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce)?;
        let mut sealed = place.to_vec();
        let bound = Aad::from(self.digest.as_bytes());
        self.key()?.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), bound, &mut sealed)?;
        Ok(BASE64_URL_SAFE_NO_PAD.encode([nonce.as_slice(), &sealed].concat()))
    }

    /// Takes a concealed place back; `None` when it is not one of this query and caller.
    pub(super) fn reveal(&self, concealed: &str) -> Option<Vec<u8>> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(concealed).ok()?;
        let (nonce, sealed) = bytes.split_first_chunk()?;
        let mut place = sealed.to_vec();
        let (nonce, bound) = (Nonce::assume_unique_for_key(*nonce), Aad::from(self.digest.as_bytes()));
        let length = self.key().ok()?.open_in_place(nonce, bound, &mut place).ok()?.len();
        place.truncate(length);
        Some(place)
    }

    /// The same for all replicas: the history is random, and no caller is told of it.
    fn key(&self) -> Result<LessSafeKey, Unspecified> {
        let key = digest(&SHA256, &[b"places of ".as_slice(), self.history.as_bytes()].concat());
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
        let history = Uuid::new_v4();
        let binding = |history, query, subject| Binding::new(history, query, View::Basic, &caller(subject));
        let own = binding(history, "all", "alice");
        let concealed = own.conceal(b"Private tools")?;
        assert_eq!(own.reveal(&concealed).as_deref(), Some(b"Private tools".as_slice()));
        assert_ne!(own.conceal(b"Private tools")?, concealed);
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(&concealed).unwrap_or_default();
        assert!(!bytes.windows(7).any(|part| part == b"Private"));
        for other in [
            binding(history, "all", "bob"),
            binding(history, "few", "alice"),
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
