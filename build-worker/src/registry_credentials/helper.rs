//! Credential helpers: programs that keep credentials, by the protocol of `docker-credential-helpers`.

use std::{ffi::OsString, io, process::Stdio, time::Duration};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
};

use super::Credentials;

/// The credential helpers on this host.
#[derive(Clone, Debug)]
pub(super) struct Helpers {
    /// `PATH` that they are looked for in; the worker's own if absent.
    pub(super) path: Option<OsString>,
    /// Maximum duration of a helper.
    ///
    /// Engines wait for credentials for 30 s at most.
    pub(super) limit: Duration,
}

/// A failure of a helper. Its output is left out, because it may contain the secret.
#[derive(Debug, thiserror::Error)]
pub(super) enum HelperError {
    #[error("{program} cannot be run: {error}")]
    Start { program: String, error: io::Error },
    #[error("{program}: {error}")]
    Io { program: String, error: io::Error },
    #[error("{program} has not responded within {limit:?}")]
    TimedOut { program: String, limit: Duration },
    #[error("{program} has failed: {status}")]
    Failed { program: String, status: std::process::ExitStatus },
    #[error("{program} has not responded with credentials")]
    Malformed { program: String },
}

/// A helper that runs; dropping it kills its process group.
struct Running(Child);

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

impl Default for Helpers {
    fn default() -> Self {
        Self { path: None, limit: Duration::from_secs(15) }
    }
}

impl Helpers {
    /// Maximum length of a helper's output, in bytes.
    const LONGEST_ANSWER: u64 = 1024 * 1024;
    /// Output of a helper that has no credentials for the server, which is no failure.
    const NOT_FOUND: &[u8] = b"credentials not found in native keychain";
    /// User by which a helper marks an identity token.
    const TOKEN: &str = "<token>";

    /// Returns the credentials that a helper has for a server, or `None` if it has none.
    ///
    /// # Errors
    ///
    /// Returns an error if the helper is missing, fails, or takes too long.
    pub(super) async fn get(&self, name: &str, server: &str) -> Result<Option<Credentials>, HelperError> {
        let program = format!("docker-credential-{name}");
        let limit = self.limit;
        match tokio::time::timeout(limit, self.run(&program, server)).await {
            Ok(answer) => answer,
            Err(_) => Err(HelperError::TimedOut { program, limit }),
        }
    }

    async fn run(&self, program: &str, server: &str) -> Result<Option<Credentials>, HelperError> {
        let mut command = Command::new(program);
        command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // A group of its own, so that its children end with it.
        command.process_group(0).kill_on_drop(true);
        if let Some(path) = &self.path {
            command.env("PATH", path);
        }
        let child = command.spawn();
        let child = child.map_err(|error| HelperError::Start { program: program.to_owned(), error })?;
        let failed = |error| HelperError::Io { program: program.to_owned(), error };
        let mut running = Running(child);
        if let Some(mut stdin) = running.0.stdin.take() {
            match stdin.write_all(server.as_bytes()).await {
                // It need not read what it is asked for.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(failed(error)),
                Ok(()) | Err(_) => {}
            }
        }
        let mut answer = Vec::new();
        if let Some(stdout) = running.0.stdout.take() {
            stdout.take(Self::LONGEST_ANSWER).read_to_end(&mut answer).await.map_err(failed)?;
        }
        let status = running.0.wait().await.map_err(failed)?;
        if !status.success() {
            return match answer.trim_ascii() == Self::NOT_FOUND {
                true => Ok(None),
                false => Err(HelperError::Failed { program: program.to_owned(), status }),
            };
        }
        let answer: Answer = serde_json::from_slice(&answer)
            .map_err(|_| HelperError::Malformed { program: program.to_owned() })?;
        Ok(match answer {
            Answer { username, secret } if username.is_empty() && secret.is_empty() => None,
            Answer { username, secret } if username == Self::TOKEN => {
                Some(Credentials::IdentityToken(secret))
            }
            Answer { username, secret } => Some(Credentials::Password { user: username, password: secret }),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The group keeps its ID until the helper has been waited for, after which there is nothing left to
        // end.
        let group = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(Err(error)) = group.map(|group| kill_process_group(group, Signal::KILL)) {
            tracing::debug!(%error, "a credential helper cannot be ended");
        }
    }
}
