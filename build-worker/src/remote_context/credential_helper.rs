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

use url::Url;

use crate::secrets::Netrc;

/// The credentials of one fetch; dropping it takes them from `git`.
#[derive(Debug)]
pub(super) struct CredentialHelper(Vec<(Vec<String>, File)>);

impl CredentialHelper {
    /// Creates the files for a fetch that begins with the URL `first`.
    ///
    /// # Errors
    ///
    /// Returns an error if the system refuses them.
    pub(super) fn new(credentials: &Netrc, first: &Url) -> io::Result<Self> {
        let schemes = if first.scheme() == "https" { &["https"][..] } else { &["http", "https"] };
        let mut files = Vec::new();
        for (machine, login, password) in credentials.entries() {
            let mut file = File::from(memfd_create("credentials", MemfdFlags::CLOEXEC)?);
            write!(file, "username={login}\npassword={password}\n")?;
            // An entry without a port is for that of the configured URL, too.
            let own_port = first.port().filter(|_| first.host_str() == Some(machine));
            let with_port = own_port.map(|port| format!("{machine}:{port}"));
            let machines = [Some(machine.to_owned()), with_port].into_iter().flatten();
            let urls = machines
                .flat_map(|machine| schemes.iter().map(move |scheme| format!("{scheme}://{machine}")));
            files.push((urls.collect(), file));
        }
        Ok(Self(files))
    }

    /// Returns the part of the configuration that names the helpers.
    pub(super) fn configuration(&self) -> String {
        let process = std::process::id();
        let mut configuration = String::new();
        for (urls, file) in &self.0 {
            let descriptor = file.as_raw_fd();
            for url in urls {
                // Writing to a String cannot fail.
                let _ = write!(
                    configuration,
                    "[credential \"{url}\"]\n\
                     \thelper = \"!f() {{ test \\\"$1\\\" = get && cat /proc/{process}/fd/{descriptor}; }}; f\"\n"
                );
            }
        }
        configuration
    }
}
