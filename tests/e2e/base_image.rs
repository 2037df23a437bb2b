//! A base image with a shell, made from the host's busybox so that nothing is pulled.

use std::fs;

use anyhow::Context as _;
use bollard::{Docker, query_parameters::CreateImageOptionsBuilder};
use futures_util::StreamExt as _;

/// Imports the image into an engine as `reference`, a name with a tag.
pub(crate) async fn import(docker: &Docker, reference: &str) -> anyhow::Result<()> {
    import_with(docker, reference, "", "").await
}

/// Imports the image with `text` in its layer and a Dockerfile instruction applied.
///
/// Either is left out if it is empty.
pub(crate) async fn import_with(
    docker: &Docker,
    reference: &str,
    text: &str,
    change: &str,
) -> anyhow::Result<()> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find_map(|path| fs::read(path).ok())
        .context("the tests need a static busybox: run them by tests/run")?;
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(busybox.len() as u64);
    header.set_mode(0o755);
    archive.append_data(&mut header, "bin/busybox", busybox.as_slice())?;
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    archive.append_link(&mut link, "bin/sh", "busybox")?;
    if !text.is_empty() {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, "etc/text", text.as_bytes())?;
    }
    import_archive(docker, reference, archive.into_inner()?, change).await
}

/// Imports an archive of files as an image and applies a Dockerfile instruction unless it is empty.
pub(crate) async fn import_archive(
    docker: &Docker,
    reference: &str,
    archive: Vec<u8>,
    change: &str,
) -> anyhow::Result<()> {
    let (name, tag) = reference.rsplit_once(':').context("a tag")?;
    let options = CreateImageOptionsBuilder::new().from_src("-").repo(name).tag(tag);
    let options = if change.is_empty() { options } else { options.changes(vec![change.to_owned()]) };
    let options = options.build();
    let mut importing = docker.create_image(Some(options), Some(bollard::body_full(archive.into())), None);
    while let Some(progress) = importing.next().await {
        progress?;
    }
    Ok(())
}
