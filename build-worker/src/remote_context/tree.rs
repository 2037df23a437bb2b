//! Packing of a directory into a tar.
//!
//! Equal directories give equal bytes, so that they hit the engine's cache: entries are sorted, and have no
//! times and no owners. Symbolic links are packed and never followed.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::checkout::Checkout;
use crate::{context::LargeContext, context_writer};

/// Packs a directory of a checkout into a context.
///
/// # Errors
///
/// Returns an error if the directory cannot be read, or the context cannot be written.
pub(super) async fn pack(
    checkout: Arc<Checkout>,
    directory: PathBuf,
    context: LargeContext,
) -> io::Result<LargeContext> {
    context_writer::fill(context, move |output| {
        let written = write(&directory, output);
        drop(checkout);
        written
    })
    .await
}

/// Writes a tar of a directory.
fn write(directory: &Path, output: impl Write) -> io::Result<()> {
    let mut archive = tar::Builder::new(output);
    // Paths that are still to be packed, the next one last.
    let mut left = sorted(directory)?;
    while let Some(path) = left.pop() {
        let name = path.strip_prefix(directory).map_err(io::Error::other)?;
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.is_dir() {
            archive.append_data(&mut header(tar::EntryType::Directory, 0o755, 0), name, io::empty())?;
            left.extend(sorted(&path)?);
        } else if metadata.is_symlink() {
            let target = fs::read_link(&path)?;
            archive.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), name, target)?;
        } else if metadata.is_file() {
            let mode = if metadata.permissions().mode() & 0o100 == 0 { 0o644 } else { 0o755 };
            let mut header = header(tar::EntryType::Regular, mode, metadata.len());
            archive.append_data(&mut header, name, File::open(&path)?)?;
        }
    }
    archive.into_inner()?.flush()
}

/// Returns the paths of a directory's entries, the first name last.
fn sorted(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort_by(|one, other| other.cmp(one));
    Ok(paths)
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn packed(directory: &Path) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        write(directory, &mut bytes)?;
        Ok(bytes)
    }

    fn fill(directory: &Path, names: &[&str]) -> io::Result<()> {
        for name in names {
            let path = directory.join(name);
            fs::create_dir_all(path.parent().unwrap_or(directory))?;
            fs::write(&path, name)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        }
        fs::set_permissions(directory.join("b/run"), fs::Permissions::from_mode(0o700))?;
        symlink("/etc", directory.join("link"))
    }

    #[test]
    fn equal_directories_give_equal_bytes() -> io::Result<()> {
        let (one, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let long = "x/".repeat(100) + "file";
        fill(one.path(), &["a", "b/run", "b/text", &long])?;
        fill(other.path(), &[&long, "b/text", "b/run", "a"])?;
        let bytes = packed(one.path())?;
        assert_eq!(bytes, packed(other.path())?);

        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut found = Vec::new();
        for entry in archive.entries()? {
            let entry = entry?;
            let header = entry.header();
            assert_eq!((header.mtime()?, header.uid()?, header.gid()?), (0, 0, 0));
            let target = entry.link_name()?.map(|target| target.display().to_string()).unwrap_or_default();
            found.push((entry.path()?.display().to_string(), header.mode()?, target));
        }
        found.retain(|(path, ..)| !path.starts_with('x'));
        let expected = [
            ("a", 0o644, ""),
            ("b", 0o755, ""),
            ("b/run", 0o755, ""),
            ("b/text", 0o644, ""),
            ("link", 0o777, "/etc"),
        ];
        let expected = expected.map(|(path, mode, target)| (path.to_owned(), mode, target.to_owned()));
        assert_eq!(found, expected);
        Ok(())
    }
}
