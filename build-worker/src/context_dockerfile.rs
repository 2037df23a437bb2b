//! The Dockerfile in a context, as far as it can be read before the build.

use std::{
    io::{self, Read},
    path::{Component, Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::context::Context;

const GZIP: &[u8] = &[0x1f, 0x8b];
/// Maximum size of a Dockerfile that is read, in bytes.
const MAX_BYTES: u64 = 1024 * 1024;

/// Returns the text of the Dockerfile at `path` in a context.
///
/// The text is empty if there is no such file, or if only the engine can tell: it unpacks more formats than this, and reports
/// what it cannot unpack.
///
/// # Errors
///
/// Returns an error if the context cannot be read from the spool.
pub(crate) async fn dockerfile_of(context: &Context, path: &str) -> io::Result<String> {
    let archive = SyncIoBridge::new(StreamReader::new(context.bytes()));
    let path = plain(Path::new(path));
    tokio::task::spawn_blocking(move || read(archive, &path)).await.map_err(io::Error::other)?
}

fn read(mut context: impl Read, path: &Path) -> io::Result<String> {
    const BLOCK: u64 = 512;
    let mut begin = Vec::new();
    context.by_ref().take(BLOCK).read_to_end(&mut begin)?;
    let is_gzip = begin.starts_with(GZIP);
    // Every header of a tar has some.
    let is_binary = begin.contains(&0);
    let context = begin.as_slice().chain(context);
    let found = if is_gzip {
        entry(MultiGzDecoder::new(context), path)
    } else if is_binary {
        entry(context, path)
    } else {
        text(context)
    };
    found.or_else(|error| {
        tracing::debug!(%error, "the Dockerfile of a context cannot be read before the build");
        Ok(String::new())
    })
}

/// Returns the text of the first file at `path` in a tar.
fn entry(tar: impl Read, path: &Path) -> io::Result<String> {
    for entry in tar::Archive::new(tar).entries()? {
        let entry = entry?;
        if entry.header().entry_type().is_file() && plain(&entry.path()?) == path {
            return text(entry);
        }
    }
    Ok(String::new())
}

fn text(file: impl Read) -> io::Result<String> {
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// Returns a path without what leads nowhere, such as `./`.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|component| matches!(component, Component::Normal(_))).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn tar(files: &[(&str, &str)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, content) in files {
            crate::context::append(&mut tar, path, content.as_bytes(), 0o644).expect("a path");
        }
        tar.into_inner().expect("a tar")
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(bytes).expect("memory");
        gzip.finish().expect("memory")
    }

    #[tokio::test]
    async fn the_dockerfile_of_a_context_is_found() {
        let plain = tar(&[("a", "no"), ("./Dockerfile", "FROM a"), ("docker/Other", "FROM b")]);
        for (what, context, path, expected) in [
            ("tar", plain.clone(), "Dockerfile", "FROM a"),
            ("path", plain.clone(), "./docker/Other", "FROM b"),
            ("gzip", gzip(&plain), "Dockerfile", "FROM a"),
            ("none", plain.clone(), "Dockerfile.none", ""),
            (
                "text",
                b"# A Dockerfile from a URL\nFROM a".to_vec(),
                "Dockerfile",
                "# A Dockerfile from a URL\nFROM a",
            ),
            ("truncated", plain[..700].to_vec(), "Dockerfile", ""),
            ("other format", b"BZh9\x00\xff".to_vec(), "Dockerfile", ""),
            (
                "no text",
                tar(&[("Dockerfile", "x")]).into_iter().map(|b| if b == b'x' { 0xff } else { b }).collect(),
                "y",
                "",
            ),
            ("empty", Vec::new(), "Dockerfile", ""),
        ] {
            let found = dockerfile_of(&Context::Small(context.into()), path).await.expect("memory");
            assert_eq!(found, expected, "{what}");
        }
    }
}
