//! Credentials for `git`, which asks a helper for them when a server requires them.
//!
//! Each host has a file in memory, which the helper prints; neither a disk, nor an argument, nor an
//! environment has the value.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, Write as _},
    os::fd::AsRawFd,
};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::secrets::Netrc;

/// The credentials of one fetch; dropping it takes them from `git`.
#[derive(Debug)]
pub(super) struct CredentialHelper(Vec<(String, File)>);

impl CredentialHelper {
    /// Creates the files.
    ///
    /// # Errors
    ///
    /// Returns an error if the system refuses them.
    pub(super) fn new(credentials: &Netrc) -> io::Result<Self> {
        let mut files = Vec::new();
        for (machine, login, password) in credentials.entries() {
            let mut file = File::from(memfd_create("credentials", MemfdFlags::CLOEXEC)?);
            write!(file, "username={login}\npassword={password}\n")?;
            files.push((machine.to_owned(), file));
        }
        Ok(Self(files))
    }

    /// Returns the part of the configuration that names the helpers.
    pub(super) fn configuration(&self) -> String {
        let process = std::process::id();
        let mut configuration = String::new();
        for (machine, file) in &self.0 {
            let descriptor = file.as_raw_fd();
            for scheme in ["http", "https"] {
                // Writing to a String cannot fail.
                let _ = write!(
                    configuration,
                    "[credential \"{scheme}://{machine}\"]\n\
                     \thelper = \"!f() {{ test \\\"$1\\\" = get && cat /proc/{process}/fd/{descriptor}; }}; f\"\n"
                );
            }
        }
        configuration
    }
}
