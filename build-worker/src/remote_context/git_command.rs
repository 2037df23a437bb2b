//! The `git` program: how it is run, and what its errors mean.
//!
//! It sees neither the worker's environment nor any configuration but the one written here, which sends every
//! connection through the proxy of the fetch, allows no transports but HTTP and HTTPS, and runs no hooks or
//! filters.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt, copy, sink},
    process::Command,
};
use url::Url;

use super::RemoteError;
use crate::fault::Fault;

/// A repository: its Git directory and its tree.
#[derive(Debug)]
pub(super) struct Git {
    /// Home directory, with the configuration.
    pub(super) home: PathBuf,
    pub(super) directory: PathBuf,
    pub(super) tree: PathBuf,
}

/// A failure of a command.
#[derive(Debug)]
pub(super) enum GitError {
    /// An error that Git reports.
    Failed(String),
    /// An output that is too large.
    TooLong,
    /// A program that cannot be run or was killed.
    Broken(io::Error),
}

/// A process group that is killed when dropped.
struct ProcessGroup(Option<Pid>);

impl Git {
    /// Maximum size of the output, in bytes.
    const MAX_OUTPUT: u64 = 64 * 1024 * 1024;
    /// Maximum size of the errors that are kept, in bytes.
    const MAX_ERRORS: u64 = 8 * 1024;

    /// Reports whether the program is there.
    pub(super) async fn is_installed() -> bool {
        let mut command = Command::new("git");
        command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.kill_on_drop(true).status().await.is_ok_and(|status| status.success())
    }

    /// Creates a home directory with the configuration of all commands, which ends with that of `credentials`.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot be written.
    pub(super) async fn configure(home: &Path, proxy: &str, credentials: &str) -> io::Result<()> {
        let configuration = format!(
            "[http]\n\tproxy = {proxy}\n\
             [protocol]\n\tallow = never\n\
             [protocol \"http\"]\n\tallow = always\n\
             [protocol \"https\"]\n\tallow = always\n\
             [core]\n\thooksPath = /dev/null\n\tsymlinks = true\n\
             [credential]\n\thelper =\n\
             [gc]\n\tauto = 0\n\
             [maintenance]\n\tauto = false\n\
             [pack]\n\tthreads = 1\n\
             {credentials}"
        );
        tokio::fs::create_dir(home).await?;
        tokio::fs::write(home.join(".gitconfig"), configuration).await
    }

    /// Creates the Git directory.
    ///
    /// # Errors
    ///
    /// Returns [`GitError`] if Git fails.
    pub(super) async fn init(&self) -> Result<(), GitError> {
        let mut command = self.command();
        command.args(["init", "--quiet", "--bare", "--template="]).arg(&self.directory);
        run(command).await.map(|_| ())
    }

    /// Fetches revisions from a repository.
    ///
    /// # Errors
    ///
    /// Returns [`GitError`] if Git fails.
    pub(super) async fn fetch(
        &self,
        url: &Url,
        options: &[&str],
        revisions: &[&str],
    ) -> Result<(), GitError> {
        let fetch = ["fetch", "--quiet", "--no-tags", "--no-recurse-submodules"];
        let arguments = [&fetch, options, &["--", url.as_str()], revisions].concat();
        self.run(&arguments).await.map(|_| ())
    }

    /// Runs a command on the repository and returns its output.
    ///
    /// # Errors
    ///
    /// Returns [`GitError`] if Git fails or prints too much.
    pub(super) async fn run(&self, arguments: &[&str]) -> Result<Vec<u8>, GitError> {
        let mut command = self.command();
        command.env("GIT_DIR", &self.directory).env("GIT_WORK_TREE", &self.tree).args(arguments);
        run(command).await
    }

    fn command(&self) -> Command {
        let mut command = Command::new("git");
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", &self.home)
            .env("LC_ALL", "C")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_ATTR_NOSYSTEM", "1")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_ALLOW_PROTOCOL", "http:https")
            .current_dir(&self.home);
        command
    }
}

/// Runs a command in a process group of its own, which is killed if the future is dropped.
async fn run(mut command: Command) -> Result<Vec<u8>, GitError> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.kill_on_drop(true).spawn().map_err(GitError::Broken)?;
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    let mut group = ProcessGroup(pid);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let output = async {
        let bytes = read(stdout, Git::MAX_OUTPUT + 1).await.map_err(GitError::Broken)?;
        let is_whole = u64::try_from(bytes.len()).is_ok_and(|length| length <= Git::MAX_OUTPUT);
        if is_whole { Ok(bytes) } else { Err(GitError::TooLong) }
    };
    let errors = async {
        let Some(mut stderr) = stderr else { return Ok(Vec::new()) };
        let kept = read(Some(&mut stderr), Git::MAX_ERRORS).await.map_err(GitError::Broken)?;
        copy(&mut stderr, &mut sink()).await.map_err(GitError::Broken)?;
        Ok(kept)
    };
    let (output, errors) = tokio::try_join!(output, errors)?;
    let status = child.wait().await.map_err(GitError::Broken)?;
    // Its ID may belong to another process from now on.
    group.0 = None;
    match status.code() {
        Some(0) => Ok(output),
        Some(_) => Err(GitError::Failed(lines(&errors))),
        None => Err(GitError::Broken(io::Error::other(format!("git ended with {status}")))),
    }
}

async fn read(stream: Option<impl AsyncRead + Unpin>, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(most).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

/// Returns the lines of a text as one.
fn lines(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("; ")
}

impl GitError {
    /// Converts the error of a command that depends on a repository.
    pub(super) fn into_remote(self, what: &str) -> RemoteError {
        match self {
            Self::Failed(message) => {
                let text = format!("{what}: {message}");
                match Fault::of_message(&message) {
                    Some(Fault::Remote) => RemoteError::Unreachable(text),
                    Some(Fault::Engine) => RemoteError::Local(io::Error::other(text)),
                    Some(Fault::User) | None => RemoteError::Refused(text),
                }
            }
            Self::TooLong | Self::Broken(_) => self.into_local(what),
        }
    }

    /// Converts the error of a command that fails only for reasons of this host.
    pub(super) fn into_local(self, what: &str) -> RemoteError {
        let text = match self {
            Self::Failed(message) => message,
            Self::Broken(error) => error.to_string(),
            Self::TooLong => return RemoteError::Refused(format!("{what}: it has too many files")),
        };
        RemoteError::Local(io::Error::other(format!("{what}: {text}")))
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if let Some(group) = self.0
            && let Err(error) = kill_process_group(group, Signal::KILL)
        {
            tracing::warn!(%error, "cannot kill git");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_git_show_whose_fault_it_is() {
        const USER: &str = "refused";
        const REMOTE: &str = "unreachable";
        for (message, expected) in [
            ("fatal: couldn't find remote ref nope", USER),
            ("fatal: repository 'https://git.example/x.git/' not found", USER),
            ("fatal: could not read Username for 'https://git.example': terminal prompts disabled", USER),
            (
                "fatal: unable to access 'https://x/': server certificate verification failed. CAfile: none CRLfile: none",
                USER,
            ),
            ("fatal: unable to access 'http://x/': The requested URL returned error: 403", USER),
            ("error: invalid path '.git/config'", USER),
            ("fatal: unable to access 'http://x/': The requested URL returned error: 503", REMOTE),
            ("fatal: unable to access 'http://x/': The requested URL returned error: 429", REMOTE),
            ("fatal: unable to access 'http://x/': Empty reply from server", REMOTE),
            ("error: RPC failed; curl 56 Recv failure: Connection reset by peer; fatal: early EOF", REMOTE),
            ("fatal: the remote end hung up unexpectedly", REMOTE),
            ("fatal: write error: No space left on device", "local"),
        ] {
            let found = match GitError::Failed(message.to_owned()).into_remote("x") {
                RemoteError::Refused(_) => USER,
                RemoteError::Unreachable(_) => REMOTE,
                RemoteError::Local(_) => "local",
            };
            assert_eq!(found, expected, "{message}");
        }
    }
}
