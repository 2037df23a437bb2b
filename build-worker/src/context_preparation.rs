//! Preparation of a context for the engine: what the build needs to know of it, and what the engine gets.

use std::{
    io::{self, Cursor, Read},
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use proto::dispatch::DockerBuild;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::{
    build_files::{BuildFiles, build_files, content, dockerfile_text},
    context::{Context, LargeContext, dockerfile_path},
    context_archive::{ArchiveError, Compression, open, write},
    context_writer,
    dockerignore::DockerIgnore,
    engine::Dockerfile,
    spool::Spool,
};

/// A context as the engine gets it.
#[derive(Debug)]
pub(crate) struct PreparedContext {
    pub(crate) context: Context,
    pub(crate) dockerfile: Dockerfile,
    /// Text of the Dockerfile; empty if only the engine can read it.
    pub(crate) text: String,
}

/// The findings of the first reading of a context.
struct Findings {
    /// Compression of the tar; `None` if the context is none.
    compression: Option<Compression>,
    files: BuildFiles,
}

/// Prepares the context of a build.
///
/// A Dockerfile that is given as text replaces the context's own. A context that is no tar stays as it is,
/// because the engine recognises and unpacks more formats.
///
/// # Errors
///
/// Returns [`ArchiveError::Refused`] if the context has no Dockerfile, or its `.dockerignore` file violates a rule, and
/// [`ArchiveError::Io`] if it cannot be read from or written to the spool.
pub(crate) async fn prepare(
    context: Context,
    build: &DockerBuild,
    spool: &dyn Spool,
) -> Result<PreparedContext, ArchiveError> {
    let path = dockerfile_path(build);
    let Findings { compression, files } = match &context {
        Context::Small(bytes) => Findings {
            compression: Some(Compression::None),
            files: build_files(|| open(Cursor::new(bytes.clone()), Compression::None), &path)?,
        },
        Context::Large(large) => {
            let (large, path) = (Arc::clone(large), path.clone());
            let found = tokio::task::spawn_blocking(move || {
                find(|| reader(&Context::Large(Arc::clone(&large))), &path)
            });
            found.await.map_err(io::Error::other)??
        }
    };
    let BuildFiles { path: found, dockerfile, ignore, hard_links } = files;
    let given = Some(build.dockerfile.clone()).filter(|text| !text.is_empty());
    let content = given.clone().map(String::into_bytes).or(dockerfile);
    let text = dockerfile_text(content.as_deref().unwrap_or_default())?;
    let Some(compression) = compression else {
        return Ok(PreparedContext { context, dockerfile: Dockerfile::InContext(path), text });
    };
    let Some(content) = content else {
        return Err(ArchiveError::Refused(format!("the context has no file {path}")));
    };
    let dockerfile = Dockerfile::beside(&found.to_string_lossy(), content.into());
    let ignore = DockerIgnore::parse(&ignore).map_err(ArchiveError::Refused)?;
    let context = match &context {
        Context::Small(bytes) => {
            let mut packed = Vec::new();
            let given = given.as_deref().map(|text| (&*path, text));
            let mut tar = open(Cursor::new(bytes.clone()), compression);
            write(&mut tar, &ignore, &hard_links, given, &mut packed)?;
            Context::Small(Bytes::from(packed))
        }
        Context::Large(_) => {
            let reader = reader(&context);
            let empty = LargeContext::new(spool.create().await?);
            let filled = context_writer::fill(empty, move |out| {
                let given = given.as_deref().map(|text| (&*path, text));
                write(&mut open(reader, compression), &ignore, &hard_links, given, out)
            });
            Context::Large(Arc::new(filled.await?))
        }
    };
    Ok(PreparedContext { context, dockerfile, text })
}

fn reader(context: &Context) -> impl Read + Send + use<> {
    SyncIoBridge::new(StreamReader::new(context.bytes()))
}

/// Reads a context, which `reopen` opens from its beginning.
fn find<R: Read + 'static>(reopen: impl Fn() -> R, path: &str) -> Result<Findings, ArchiveError> {
    let mut begin = Vec::new();
    reopen().take(Compression::PREFIX as u64).read_to_end(&mut begin)?;
    let compression = Compression::of_tar(&begin);
    let files = match compression {
        Some(compression) => build_files(|| open(reopen(), compression), path)?,
        None if is_packed(&begin) => BuildFiles::default(),
        None if begin.contains(&0) => {
            let rule = "the context is neither a Dockerfile nor a tar, plain or in gzip, bzip2, xz or zstd";
            return Err(ArchiveError::Refused(rule.to_owned()));
        }
        None => {
            let dockerfile = Some(content(Path::new("the Dockerfile"), reopen())?);
            BuildFiles { dockerfile, ..BuildFiles::default() }
        }
    };
    Ok(Findings { compression, files })
}

/// Reports whether a file is compressed in a way that the engine can unpack.
fn is_packed(prefix: &[u8]) -> bool {
    const BZIP2: &[u8] = b"BZh";
    const XZ: &[u8] = b"\xfd7zXZ\0";
    const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
    [BZIP2, XZ, ZSTD].iter().any(|magic| prefix.starts_with(magic))
}

#[cfg(test)]
mod tests {
    use proto::dispatch::ContextFile;

    use super::*;
    use crate::{context::pack, context_archive::append, spool::DiskSpool};

    fn file(path: &str, content: &str) -> ContextFile {
        ContextFile { path: path.to_owned(), content: content.as_bytes().to_vec().into(), executable: false }
    }

    async fn listed(prepared: &PreparedContext) -> Vec<String> {
        use futures_util::TryStreamExt;
        let chunks: Vec<Bytes> = prepared.context.bytes().try_collect().await.expect("memory or a file");
        let mut tar = open(Cursor::new(chunks.concat()), Compression::None);
        let paths = tar.entries().expect("a tar").map(|entry| {
            let entry = entry.expect("an entry");
            entry.path().expect("a path").display().to_string()
        });
        paths.collect()
    }

    #[tokio::test]
    async fn single_files_are_packed_with_the_dockerfile() {
        let directory = tempfile::tempdir().expect("a directory");
        let spool = DiskSpool::open(directory.path().to_owned()).expect("a spool");
        let build = DockerBuild { dockerfile: "FROM a".to_owned(), ..DockerBuild::default() };
        let alone =
            prepare(Context::Small(pack(&build).expect("a tar")), &build, &spool).await.expect("valid");
        assert_eq!(
            (&*alone.text, listed(&alone).await, &alone.dockerfile),
            (
                "FROM a",
                vec!["./".to_owned(), "Dockerfile".to_owned()],
                &Dockerfile::beside("Dockerfile", "FROM a".into())
            )
        );
        let files = vec![file(".dockerignore", "*.key\n"), file("a.key", "k"), file("b", "b")];
        let build = DockerBuild { files, ..build };
        let some =
            prepare(Context::Small(pack(&build).expect("a tar")), &build, &spool).await.expect("valid");
        assert_eq!(listed(&some).await, ["./", ".dockerignore", "b", "Dockerfile"]);
        let build = DockerBuild { files: vec![file(".dockerignore", "[")], ..build };
        let refused = prepare(Context::Small(pack(&build).expect("a tar")), &build, &spool).await;
        assert!(matches!(refused, Err(ArchiveError::Refused(_))), "{refused:?}");
    }

    #[tokio::test]
    async fn a_spooled_context_is_read_whatever_it_is() {
        let directory = tempfile::tempdir().expect("a directory");
        let spool = DiskSpool::open(directory.path().to_owned()).expect("a spool");
        let mut tar = tar::Builder::new(Vec::new());
        for (path, content) in [("Dockerfile", "FROM a"), ("b", "b")] {
            append(&mut tar, path, content.as_bytes(), 0o644).expect("memory");
        }
        let tar = tar.into_inner().expect("memory");
        let build = DockerBuild::default();
        let in_context = || Dockerfile::InContext("Dockerfile".to_owned());
        for (bytes, text, dockerfile) in [
            (tar, "FROM a", Dockerfile::beside("Dockerfile", "FROM a".into())),
            (b"FROM b".to_vec(), "FROM b", in_context()),
            (b"BZh9\x00".to_vec(), "", in_context()),
        ] {
            let mut context = LargeContext::new(spool.create().await.expect("a file"));
            context.append(bytes.clone()).await.expect("a file");
            let prepared = prepare(Context::Large(Arc::new(context)), &build, &spool).await.expect("valid");
            assert_eq!((&*prepared.text, &prepared.dockerfile), (text, &dockerfile));
            if text == "FROM a" {
                assert_eq!(listed(&prepared).await, ["./", "Dockerfile", "b"]);
            }
        }
    }
}
