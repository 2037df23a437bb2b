//! The build context: a tar archive of the Dockerfile and the files beside it, made in memory. It is small, for the
//! service bounds it.

use std::io;

use bytes::Bytes;
use proto::dispatch::DockerBuild;

/// Packs a build's Dockerfile and files. Equal builds give equal bytes, so that the engine's cache knows them again.
pub(crate) fn pack(build: &DockerBuild) -> io::Result<Bytes> {
    let mut archive = tar::Builder::new(Vec::new());
    append(&mut archive, "Dockerfile", build.dockerfile.as_bytes(), 0o644)?;
    for file in &build.files {
        let mode = if file.executable { 0o755 } else { 0o644 };
        append(&mut archive, &file.path, &file.content, mode)?;
    }
    Ok(archive.into_inner()?.into())
}

fn append(archive: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8], mode: u32) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    header.set_mtime(0);
    archive.append_data(&mut header, path, content)
}
