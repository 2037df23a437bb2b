//! Protocol of Trailer Images: the generated code of the `.proto` files beside this crate.
//!
//! The `.proto` files are the reference: every RPC and field is documented there, with the errors it returns.
#![allow(unused_qualifications, clippy::large_enum_variant, reason = "generated code")]

pub mod codec;
pub mod watch;

/// The public API, package `trailer.images.v1`.
pub mod images {
    tonic::include_proto!("trailer.images.v1");
}

/// The protocol between image-service and build-worker, package `trailer.dispatch.v1`.
pub mod dispatch {
    tonic::include_proto!("trailer.dispatch.v1");
}

/// Encoded `FileDescriptorSet` of all packages, with imports and comments, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor_set.bin"));
