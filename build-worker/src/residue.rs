//! What a cancelled build may leave running on this host.
//!
//! BuildKit's steps are no Docker containers, so no list of the engine shows them. Every attempt's steps carry a marker in
//! their environment: an entry of `NO_PROXY` that names no host. BuildKit passes that variable into every step and leaves
//! it out of its cache keys, so the marker changes neither the image nor the cache.

use std::{fs, io};

/// The variable that carries the marker.
pub(crate) const VARIABLE: &str = "NO_PROXY";

/// The marker of an attempt: a name below `.invalid`, which no host can have.
pub(crate) fn marker(build_id: &str, attempt: i32) -> String {
    format!("{build_id}.{attempt}.attempt.trailer.invalid")
}

/// Whether a process on this host carries the marker. Processes that may not be looked into count as others.
pub(crate) fn is_left(marker: &str) -> io::Result<bool> {
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let is_process = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        if !is_process {
            continue;
        }
        // The process may have ended since the directory was read.
        let Ok(environment) = fs::read(entry.path().join("environ")) else {
            continue;
        };
        let mut variables = environment.split(|&byte| byte == 0);
        if variables.any(|variable| carries(variable, marker.as_bytes())) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn carries(variable: &[u8], marker: &[u8]) -> bool {
    variable.starts_with(VARIABLE.as_bytes()) && variable.windows(marker.len()).any(|window| window == marker)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_that_carries_the_marker_is_found() {
        let marker = marker("0198f0c4-7a2e-7b6e-9d55-9f1c2b3a4d5e", 7);
        assert!(!is_left(&marker).expect("/proc can be read"));
        let mut child = Command::new("sleep")
            .arg("60")
            .env(VARIABLE, &marker)
            .spawn()
            .expect("sleep runs");
        let found = is_left(&marker);
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
        assert!(found.expect("/proc can be read"));
        assert!(!is_left(&marker).expect("/proc can be read"));
    }
}
