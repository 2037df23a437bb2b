//! Credential helpers: programs that keep credentials, by the protocol of `docker-credential-helpers`.

use std::{
    collections::HashMap,
    ffi::OsString,
    io,
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
};

use super::{Credentials, json};

/// The credential helpers on this host.
#[derive(Clone, Debug)]
pub(super) struct Helpers {
    /// `PATH` that they are looked for in; the worker's own if absent.
    pub(super) path: Option<OsString>,
    /// Maximum duration of a helper.
    ///
    /// Engines wait for credentials for 30 s at most.
    pub(super) limit: Duration,
    /// Recent answers by the names of helper and server: one pull looks the same credentials up more than once.
    answers: Arc<Answers>,
}

type Answers = Mutex<HashMap<(String, String), Answered>>;

/// An answer of a helper.
#[derive(Clone, Debug)]
struct Answered {
    at: Instant,
    found: Result<Option<Credentials>, Arc<HelperError>>,
}

fn lock(answers: &Answers) -> MutexGuard<'_, HashMap<(String, String), Answered>> {
    answers.lock().unwrap_or_else(PoisonError::into_inner)
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

/// The answer of a helper, whose members have names in lower case here.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Answer {
    username: String,
    secret: String,
}

impl Default for Helpers {
    fn default() -> Self {
        Self { path: None, limit: Duration::from_secs(15), answers: Arc::default() }
    }
}

impl Helpers {
    /// Time for which an answer is used again.
    const FRESH: Duration = Duration::from_secs(5);
    /// Maximum length of a helper's output, in bytes.
    const LONGEST_ANSWER: u64 = 1024 * 1024;
    /// Time in which the output of a helper that has ended is read.
    const AFTER_END: Duration = Duration::from_millis(200);
    /// Output of a helper that has no credentials for the server, which is no failure.
    const NOT_FOUND: &[u8] = b"credentials not found in native keychain";
    /// User by which a helper marks an identity token.
    const TOKEN: &str = "<token>";

    /// Returns the credentials that a helper has for a server, or `None` if it has none.
    ///
    /// # Errors
    ///
    /// Returns an error if the helper is missing, fails, or takes too long.
    pub(super) async fn get(
        &self,
        name: &str,
        server: &str,
    ) -> Result<Option<Credentials>, Arc<HelperError>> {
        let asked = (name.to_owned(), server.to_owned());
        let answered =
            lock(&self.answers).get(&asked).filter(|answer| answer.at.elapsed() < Self::FRESH).cloned();
        if let Some(answer) = answered {
            return answer.found;
        }
        let program = format!("docker-credential-{name}");
        let limit = self.limit;
        let found = match tokio::time::timeout(limit, self.run(&program, server)).await {
            Ok(answer) => answer.map_err(Arc::new),
            Err(_) => Err(Arc::new(HelperError::TimedOut { program, limit })),
        };
        let mut answers = lock(&self.answers);
        answers.retain(|_, answer| answer.at.elapsed() < Self::FRESH);
        answers.insert(asked, Answered { at: Instant::now(), found: found.clone() });
        found
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
        let mut status = None;
        if let Some(stdout) = running.0.stdout.take() {
            let mut stdout = stdout.take(Self::LONGEST_ANSWER);
            let reading = stdout.read_to_end(&mut answer);
            tokio::pin!(reading);
            tokio::select! {
                read = &mut reading => drop(read.map_err(failed)?),
                ended = running.0.wait() => {
                    status = Some(ended.map_err(failed)?);
                    // What it has started may keep its output open for ever.
                    if let Ok(read) = tokio::time::timeout(Self::AFTER_END, &mut reading).await {
                        read.map_err(failed)?;
                    }
                }
            }
        }
        let status = match status {
            Some(status) => status,
            None => running.0.wait().await.map_err(failed)?,
        };
        if !status.success() {
            return match answer.trim_ascii() == Self::NOT_FOUND {
                true => Ok(None),
                false => Err(HelperError::Failed { program: program.to_owned(), status }),
            };
        }
        let answer: Answer = json::first(&answer)
            .and_then(|answer| serde_json::from_value(json::in_lower_case(answer)))
            .map_err(|_| HelperError::Malformed { program: program.to_owned() })?;
        Ok(match answer {
            Answer { username, secret } if username.is_empty() && secret.is_empty() => None,
            Answer { username, secret } if username == Self::TOKEN => Some(Credentials::IdentityToken {
                token: secret,
                user: String::new(),
                password: String::new(),
            }),
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
