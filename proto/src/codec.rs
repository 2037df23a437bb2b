//! Messages of a server, with parts that it has encoded once for many responses.
//!
//! On the wire they are the messages of the `.proto` files.

use std::marker::PhantomData;

use prost::Message;
use tonic::{codec::BufferSettings, codegen::Bytes};
use tonic_prost::{ProstDecoder, ProstEncoder};

use crate::images::{Bookmark, ImageRemoved, Synced};

/// [`images::WatchImagesResponse`](crate::images::WatchImagesResponse), with its images encoded.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WatchImagesResponse {
    /// Revision to resume from, as in the original message.
    #[prost(string, tag = "1")]
    pub resume_revision: String,
    /// Event, as in the original message.
    #[prost(oneof = "Event", tags = "2, 3, 4, 5, 6")]
    pub event: Option<Event>,
}

/// [`images::GetImageResponse`](crate::images::GetImageResponse), with its image encoded.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GetImageResponse {
    /// Encoded [`Image`](crate::images::Image).
    #[prost(bytes = "bytes", tag = "1")]
    pub image: Bytes,
}

/// [`images::ListImagesResponse`](crate::images::ListImagesResponse), with its images encoded.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ListImagesResponse {
    /// Encoded [`Image`](crate::images::Image)s.
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub images: Vec<Bytes>,
    /// Token of the next page, as in the original message.
    #[prost(string, tag = "2")]
    pub next_page_token: String,
    /// Total number of images, as in the original message.
    #[prost(int64, optional, tag = "3")]
    pub total_size: Option<i64>,
    /// Revision to watch from, as in the original message.
    #[prost(string, tag = "4")]
    pub resume_revision: String,
}

/// [`Event`](crate::images::watch_images_response::Event) of a watch, with its images encoded.
#[derive(Clone, PartialEq, prost::Oneof)]
#[expect(missing_docs, reason = "as in the message that this one is sent as")]
pub enum Event {
    #[prost(bytes = "bytes", tag = "2")]
    Image(Bytes),
    #[prost(message, tag = "3")]
    Synced(Synced),
    #[prost(bytes = "bytes", tag = "4")]
    Changed(Bytes),
    #[prost(message, tag = "5")]
    Removed(ImageRemoved),
    #[prost(message, tag = "6")]
    Bookmark(Bookmark),
}

/// The codec of a server.
///
/// A watch keeps its buffer for writing, which is small because there are many watches.
#[derive(Debug)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Codec<T, U> {
    /// Initial size of the buffer, in bytes.
    const ROOM: usize = 1024;
    /// Size of the encoded messages at which they are sent, in bytes.
    const SENT_AT_ONCE: usize = 15 * 1024;

    fn settings() -> BufferSettings {
        BufferSettings::new(Self::ROOM, Self::SENT_AT_ONCE)
    }
}

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(Self::settings())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(Self::settings())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::{self, watch_images_response};

    #[test]
    fn is_the_same_on_the_wire() {
        let image = images::Image { id: "an id".to_owned(), revision: 7, ..Default::default() };
        let encoded = || Bytes::from(image.encode_to_vec());
        let boxed = || Box::new(image.clone());
        let removed = || ImageRemoved { id: "an id".to_owned() };
        use watch_images_response::Event as Plain;
        let events = [
            (Event::Image(encoded()), Plain::Image(boxed())),
            (Event::Synced(Synced {}), Plain::Synced(Synced {})),
            (Event::Changed(encoded()), Plain::Changed(boxed())),
            (Event::Removed(removed()), Plain::Removed(removed())),
            (Event::Bookmark(Bookmark {}), Plain::Bookmark(Bookmark {})),
        ];
        for (event, plain) in events {
            let resume_revision = "a revision".to_owned();
            let sent = WatchImagesResponse { resume_revision: resume_revision.clone(), event: Some(event) };
            let meant = images::WatchImagesResponse { resume_revision, event: Some(plain) };
            assert_eq!(sent.encode_to_vec(), meant.encode_to_vec());
        }
        let sent = GetImageResponse { image: encoded() };
        let meant = images::GetImageResponse { image: Some(image.clone()) };
        assert_eq!(sent.encode_to_vec(), meant.encode_to_vec());
        let (next_page_token, total_size) = ("a token".to_owned(), Some(2));
        let sent = ListImagesResponse {
            images: vec![encoded(), encoded()],
            next_page_token: next_page_token.clone(),
            total_size,
            resume_revision: "a revision".to_owned(),
        };
        let images = vec![image.clone(), image.clone()];
        let meant = images::ListImagesResponse {
            images,
            next_page_token,
            total_size,
            resume_revision: "a revision".to_owned(),
        };
        assert_eq!(sent.encode_to_vec(), meant.encode_to_vec());
    }
}
