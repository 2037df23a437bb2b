//! Web server on loopback with files, redirects and Git repositories.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex},
};

use anyhow::Context as _;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{io::AsyncWriteExt as _, net::TcpListener, process::Command, sync::watch, task::JoinSet};
use tokio_util::task::AbortOnDropHandle;

/// A running server.
#[derive(Debug)]
pub(crate) struct WebServer {
    addr: SocketAddr,
    shared: Arc<Shared>,
    _serving: AbortOnDropHandle<()>,
}

/// The answer to requests for a path.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    File(Vec<u8>),
    Redirect(String),
    Status(StatusCode),
    /// No answer, for as long as the server runs.
    Silence,
}

#[derive(Debug)]
struct Shared {
    /// Directory of the Git repositories, which are served at all paths without another answer.
    repositories: PathBuf,
    answers: Mutex<HashMap<String, Answer>>,
    /// User and password, joined by a colon, without which nothing is answered.
    credentials: Mutex<Option<String>>,
    /// Paths of all requests.
    requests: watch::Sender<Vec<String>>,
}

impl WebServer {
    /// Starts a server of the Git repositories in a directory.
    pub(crate) async fn start(repositories: &Path) -> anyhow::Result<Self> {
        Self::start_at(Ipv4Addr::LOCALHOST, repositories).await
    }

    /// Starts a server on an address of loopback.
    pub(crate) async fn start_at(address: Ipv4Addr, repositories: &Path) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((address, 0)).await?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            repositories: repositories.to_owned(),
            answers: Mutex::default(),
            credentials: Mutex::default(),
            requests: watch::Sender::default(),
        });
        let serving = AbortOnDropHandle::new(tokio::spawn(serve(listener, Arc::clone(&shared))));
        Ok(Self { addr, shared, _serving: serving })
    }

    /// Gives this answer to requests for a path from now on.
    pub(crate) fn answer(&self, path: &str, answer: Answer) {
        let mut answers = self.shared.answers.lock().expect("no code panics while it holds the answers");
        answers.insert(path.to_owned(), answer);
    }

    /// Requires a user and a password, joined by a colon, from now on.
    pub(crate) fn require(&self, credentials: &str) {
        let mut required = self.shared.credentials.lock().expect("no code panics while it holds them");
        *required = Some(credentials.to_owned());
    }

    /// Returns the URL of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    pub(crate) fn port(&self) -> u16 {
        self.addr.port()
    }

    /// Returns the paths of all requests so far.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.shared.requests.borrow().clone()
    }

    /// Waits for a request for a path.
    pub(crate) async fn requested(&self, path: &str) -> anyhow::Result<()> {
        let mut requests = self.shared.requests.subscribe();
        let seen = requests.wait_for(|requests| requests.iter().any(|requested| requested == path));
        tokio::time::timeout(crate::stack::LIMIT, seen).await.context(path.to_owned())??;
        Ok(())
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((connection, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            let service = service_fn(|request| handle(request, &shared));
            // A client may break a connection off.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(connection), service).await;
        });
    }
}

async fn handle(request: Request<Incoming>, shared: &Shared) -> io::Result<Response<Full<Bytes>>> {
    let path = request.uri().path().to_owned();
    shared.requests.send_modify(|requests| requests.push(path.clone()));
    let required = shared.credentials.lock().expect("no code panics while it holds them").clone();
    if let Some(required) = required {
        let given = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
        if given != Some(format!("Basic {}", BASE64_STANDARD.encode(required)).as_bytes()) {
            let refusal = Response::builder().status(StatusCode::UNAUTHORIZED);
            let refusal = refusal.header(header::WWW_AUTHENTICATE, "Basic realm=\"tests\"");
            return refusal.body(Full::default()).map_err(io::Error::other);
        }
    }
    let answer = {
        let answers = shared.answers.lock().expect("no code panics while it holds the answers");
        answers.get(&path).cloned()
    };
    let response = Response::builder();
    match answer {
        Some(Answer::File(content)) => response.body(content.into()),
        Some(Answer::Redirect(target)) => {
            response.status(StatusCode::FOUND).header(header::LOCATION, target).body(Full::default())
        }
        Some(Answer::Status(status)) => response.status(status).body(Full::default()),
        Some(Answer::Silence) => std::future::pending().await,
        None => return git(request, &shared.repositories).await,
    }
    .map_err(io::Error::other)
}

/// Serves Git's smart protocol by its CGI program.
async fn git(request: Request<Incoming>, repositories: &Path) -> io::Result<Response<Full<Bytes>>> {
    let header = |name: &str| {
        request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
    };
    let mut command = Command::new("git");
    command
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", repositories)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("REQUEST_METHOD", request.method().as_str())
        .env("PATH_INFO", request.uri().path())
        .env("QUERY_STRING", request.uri().query().unwrap_or_default())
        .env("CONTENT_TYPE", header("content-type"))
        .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
        .env("GIT_PROTOCOL", header("git-protocol"));
    let body = request.into_body().collect().await.map_err(io::Error::other)?.to_bytes();
    command
        .env("CONTENT_LENGTH", body.len().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn()?;
    let mut stdin = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let writing = async move {
        // The program need not read everything.
        let _ = stdin.write_all(&body).await;
    };
    let (output, ()) = tokio::join!(child.wait_with_output(), writing);
    let output = output?.stdout;
    let end = output.windows(4).position(|window| window == b"\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
    let mut response = Response::builder();
    for line in String::from_utf8_lossy(&output[..end]).lines() {
        let (name, value) = line.split_once(": ").unwrap_or((line, ""));
        response = match name {
            "Status" => response.status(value.split(' ').next().unwrap_or_default()),
            name => response.header(name, value),
        };
    }
    response.body(Bytes::copy_from_slice(&output[end + 4..]).into()).map_err(io::Error::other)
}

/// Runs `git` in a directory and returns its output.
pub(crate) fn run_git(directory: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let identity =
        ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "init.defaultBranch=main"];
    let output =
        std::process::Command::new("git").args(identity).args(arguments).current_dir(directory).output()?;
    anyhow::ensure!(output.status.success(), "git {arguments:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

/// Makes a repository with these files on the branch `main`, and returns the ID of its commit.
pub(crate) fn make_repository(directory: &Path, files: &[(&str, &str)]) -> anyhow::Result<String> {
    std::fs::create_dir_all(directory)?;
    run_git(directory, &["init", "--quiet"])?;
    commit(directory, files)
}

/// Commits files to a repository, and returns the ID of the commit.
pub(crate) fn commit(repository: &Path, files: &[(&str, &str)]) -> anyhow::Result<String> {
    for (path, content) in files {
        let path = repository.join(path);
        std::fs::create_dir_all(path.parent().context("a directory")?)?;
        std::fs::write(path, content)?;
    }
    run_git(repository, &["add", "."])?;
    run_git(repository, &["commit", "--quiet", "--allow-empty", "-m", "A context"])?;
    run_git(repository, &["rev-parse", "HEAD"])
}

/// Commits a submodule at a path, which need not exist.
pub(crate) fn commit_submodule(
    repository: &Path,
    path: &str,
    url: &str,
    submodule: &str,
) -> anyhow::Result<String> {
    let modules = format!("[submodule \"{path}\"]\n\tpath = {path}\n\turl = {url}\n");
    std::fs::write(repository.join(".gitmodules"), modules)?;
    run_git(repository, &["update-index", "--add", "--cacheinfo", &format!("160000,{submodule},{path}")])?;
    run_git(repository, &["add", ".gitmodules"])?;
    run_git(repository, &["commit", "--quiet", "-m", "A submodule"])?;
    run_git(repository, &["rev-parse", "HEAD"])
}
