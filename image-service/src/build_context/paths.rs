//! The paths of an archive's entries, none of which may leave the archive, and the targets of its links.

use super::{Refused, refused};

/// Maximum length of a path, in bytes.
const MAX_PATH: usize = 4_096;
const MAX_NAMES: usize = 128;

/// Returns a path within the archive without its `.` names, or `None` for the root.
pub(super) fn inner_path(bytes: &[u8]) -> Result<Option<String>, Refused> {
    let shown = String::from_utf8_lossy(bytes);
    let fail = |rule| Err(Refused::new(&shown, rule));
    let Ok(path) = std::str::from_utf8(bytes) else {
        return fail("must be UTF-8");
    };
    if path.is_empty() {
        return refused("has an entry without a path");
    }
    if path.len() > MAX_PATH {
        return fail("must have at most 4,096 bytes");
    }
    if path.starts_with('/') {
        return fail("must be relative");
    }
    if path.contains('\0') {
        return fail("must not contain NUL");
    }
    let mut names = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => return fail("must have no `..` in it"),
            name => names.push(name),
        }
    }
    if names.len() > MAX_NAMES {
        return fail("must have at most 128 names");
    }
    Ok((!names.is_empty()).then(|| names.join("/")))
}

/// Checks the target of a symbolic link at `path`.
pub(super) fn check_target(path: &str, target: &[u8]) -> Result<(), Refused> {
    let Ok(target) = std::str::from_utf8(target) else {
        return Err(Refused::new(path, "must link to UTF-8"));
    };
    if target.is_empty() || target.len() > MAX_PATH || target.contains('\0') {
        return Err(Refused::new(path, "must link to a path of 1 to 4,096 bytes without NUL"));
    }
    Ok(())
}
