//! Remote contexts: what the worker fetches from repositories and web servers, and what it must not reach.

use std::{net::Ipv4Addr, os::unix::fs::symlink, path::Path};

use http::StatusCode;
use proto::images::{
    Build, BuildErrorKind, BuildState, DockerfileSource, Image, ImageConfig, PendingReason,
    image_config::Source,
};
use tempfile::TempDir;
use tonic::Code;

use crate::{
    answers::fields,
    client::Client,
    eventually::eventually_true,
    fake_engine::{FakeEngine, RecordedBuild},
    stack::{Service, Worker},
    web_server::{Answer, WebServer, commit, commit_submodule, make_repository, run_git},
};

const DOCKERFILE: &str = "FROM scratch\n";

/// A worker that fetches from a server on loopback.
struct Stack {
    engine: FakeEngine,
    service: Service,
    server: WebServer,
    directory: TempDir,
    _worker: Worker,
}

impl Stack {
    async fn start(flags: &[&str]) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let spool = directory.path().join("spool").display().to_string();
        std::fs::create_dir(directory.path().join("repositories"))?;
        let (engine, service) = (FakeEngine::start().await?, Service::start().await?);
        let flags = [flags, &["--spool-dir", &spool]].concat();
        let worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags)?;
        let server = WebServer::start(&directory.path().join("repositories")).await?;
        Ok(Self { engine, service, server, directory, _worker: worker })
    }

    /// Starts a worker that may fetch from 127.0.0.1.
    async fn allowed() -> anyhow::Result<Self> {
        Self::start(&["--allow-remote", "127.0.0.1/32"]).await
    }

    fn alice(&self) -> Client {
        self.service.builder("alice")
    }

    fn repository(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join("repositories").join(name)
    }

    async fn start_build(&self, url: &str) -> anyhow::Result<(Image, Build)> {
        Ok(self.alice().create(image(url)).await?)
    }

    async fn build(&self, url: &str) -> anyhow::Result<Build> {
        let (_, build) = self.start_build(url).await?;
        self.alice().finished(&build.id).await
    }

    /// Builds successfully and returns what the engine was given.
    async fn built(&self, url: &str) -> anyhow::Result<RecordedBuild> {
        let build = self.build(url).await?;
        anyhow::ensure!(build.state() == BuildState::Succeeded, "{url}: {build:?}");
        self.engine.builds().pop().ok_or_else(|| anyhow::anyhow!("{url}: the engine built nothing"))
    }

    /// Checks that a build fails at once, with an error of the user's that contains `reason`.
    async fn refuses(&self, url: &str, reason: &str) -> anyhow::Result<()> {
        let build = self.build(url).await?;
        let error = build.error.clone().unwrap_or_default();
        anyhow::ensure!(
            (build.state(), error.kind(), build.attempt) == (BuildState::Failed, BuildErrorKind::User, 1)
                && error.message.contains(reason),
            "{url}: {build:?}"
        );
        anyhow::ensure!(self.engine.builds().is_empty(), "{url}: the engine got it");
        Ok(())
    }

    /// Waits until nothing is left of any checkout.
    async fn is_clean(&self) -> anyhow::Result<()> {
        let spool = self.directory.path().join("spool");
        eventually_true("the spool is empty", async || Ok(std::fs::read_dir(&spool)?.next().is_none())).await
    }
}

fn image(url: &str) -> Image {
    let source = DockerfileSource { remote: url.to_owned(), ..DockerfileSource::default() };
    Image {
        name: url.to_owned(),
        config: Some(ImageConfig { source: Some(Source::Dockerfile(source)), ..ImageConfig::default() }),
        ..Image::default()
    }
}

fn names(build: &RecordedBuild) -> Vec<&str> {
    build.files.keys().map(String::as_str).collect()
}

fn tar_of(files: &[(&str, &str)]) -> anyhow::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, content.as_bytes())?;
    }
    Ok(archive.into_inner()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_is_fetched_at_the_revision_that_its_url_names() -> anyhow::Result<()> {
    let stack = Stack::allowed().await?;
    let sources = stack.repository("sources.git");
    let files = |text| [("Dockerfile", DOCKERFILE), ("docker/Dockerfile", DOCKERFILE), ("text", text)];
    let first = make_repository(&sources, &files("first"))?;
    run_git(&sources, &["tag", "-a", "-m", "A tag", "v1"])?;
    commit(&sources, &files("second"))?;
    run_git(&sources, &["checkout", "--quiet", "-b", "feature/next"])?;
    commit(&sources, &files("next"))?;
    run_git(&sources, &["checkout", "--quiet", "main"])?;

    for (suffix, text) in [
        ("", "second"),
        ("#main", "second"),
        ("#feature/next", "next"),
        ("#refs/heads/feature/next", "next"),
        ("#v1", "first"),
        (&format!("#{first}"), "first"),
        ("?ref=v1", "first"),
        ("?branch=feature/next", "next"),
        ("?tag=v1", "first"),
    ] {
        let built = stack.built(&stack.server.url(&format!("/sources.git{suffix}"))).await?;
        assert_eq!(names(&built), ["Dockerfile", "docker/Dockerfile", "text"], "{suffix}");
        assert_eq!(built.files["text"], text.as_bytes(), "{suffix}");
    }
    for suffix in ["#main:docker", "#:docker/", "?subdir=docker"] {
        let built = stack.built(&stack.server.url(&format!("/sources.git{suffix}"))).await?;
        assert_eq!(names(&built), ["Dockerfile"], "{suffix}");
    }
    stack.is_clean().await
}

#[tokio::test(flavor = "multi_thread")]
async fn submodules_are_part_of_a_context() -> anyhow::Result<()> {
    let stack = Stack::allowed().await?;
    let [outer, middle, inner] = ["outer.git", "middle.git", "inner.git"].map(|name| stack.repository(name));
    let id = make_repository(&inner, &[("text", "inner")])?;
    // The submodule is not at the latest commit.
    commit(&inner, &[("text", "later")])?;
    make_repository(&middle, &[("text", "middle")])?;
    let id = commit_submodule(&middle, "lib/inner", "../inner.git", &id)?;
    make_repository(&outer, &[("Dockerfile", DOCKERFILE)])?;
    commit_submodule(&outer, "middle", &stack.server.url("/middle.git"), &id)?;

    let built = stack.built(&stack.server.url("/outer.git")).await?;
    let expected =
        [".gitmodules", "Dockerfile", "middle/.gitmodules", "middle/lib/inner/text", "middle/text"];
    assert_eq!(names(&built), expected);
    assert_eq!(built.files["middle/lib/inner/text"], "inner");
    stack.is_clean().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_repository_does_not_have_is_the_users_error() -> anyhow::Result<()> {
    let stack = Stack::allowed().await?;
    let (sources, other) = (stack.repository("sources.git"), stack.repository("other.git"));
    make_repository(&sources, &[("Dockerfile", DOCKERFILE), ("docker/Dockerfile", DOCKERFILE)])?;
    symlink("/etc", sources.join("etc"))?;
    symlink("..", sources.join("docker/up"))?;
    symlink("docker", sources.join("inside"))?;
    commit(&sources, &[])?;
    let id_of_other = make_repository(&other, &[("Dockerfile", DOCKERFILE)])?;

    let no_directory = "has no directory";
    for (suffix, reason) in [
        ("#nothing", "couldn't find remote ref nothing"),
        ("?branch=nothing", "couldn't find remote ref refs/heads/nothing"),
        (&format!("#{}", "1".repeat(40)), "has no commit"),
        ("#main:nothing", no_directory),
        ("#main:Dockerfile", no_directory),
        ("#main:etc", no_directory),
        ("#main:docker/up", no_directory),
        ("#main:docker/up/docker", no_directory),
        ("#main:inside", no_directory),
        ("#main:../sources.git", "within the repository"),
        ("#--upload-pack=x", "must name a branch, tag or commit"),
        ("?token=x", "must have no parameters but"),
    ] {
        stack.refuses(&stack.server.url(&format!("/sources.git{suffix}")), reason).await?;
    }
    stack.refuses(&stack.server.url("/nothing.git"), "not found").await?;
    // A commit of one repository is not had from another.
    let stolen = stack.server.url(&format!("/sources.git#{id_of_other}"));
    stack.refuses(&stolen, "has no commit").await?;
    stack.built(&stack.server.url(&format!("/other.git#{id_of_other}"))).await?;
    let again = stack.build(&stolen).await?;
    assert_eq!(again.state(), BuildState::Failed);
    stack.is_clean().await
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_are_not_public_are_refused() -> anyhow::Result<()> {
    let stack = Stack::start(&[]).await?;
    make_repository(&stack.repository("sources.git"), &[("Dockerfile", DOCKERFILE)])?;
    stack.server.answer("/context.tar", Answer::File(tar_of(&[("Dockerfile", DOCKERFILE)])?));
    let port = stack.server.port();
    for host in ["127.0.0.1", "localhost", "127.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"] {
        for path in ["sources.git", "context.tar"] {
            stack.refuses(&format!("http://{host}:{port}/{path}"), "(--allow-remote)").await?;
        }
    }
    for host in ["169.254.169.254", "10.0.0.1", "192.168.0.1", "[fe80::1]", "[fd00:ec2::254]"] {
        for path in ["x.git", "latest/meta-data"] {
            stack.refuses(&format!("http://{host}/{path}"), "(--allow-remote)").await?;
        }
    }
    assert_eq!(stack.server.requests(), [""; 0]);
    stack.is_clean().await
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_and_submodules_are_refused_like_the_first_address() -> anyhow::Result<()> {
    let stack = Stack::allowed().await?;
    let hidden = WebServer::start_at(Ipv4Addr::new(127, 0, 0, 2), &stack.repository("")).await?;
    let id = make_repository(&stack.repository("hidden.git"), &[("Dockerfile", DOCKERFILE)])?;
    hidden.answer("/context.tar", Answer::File(tar_of(&[("Dockerfile", DOCKERFILE)])?));

    let server = &stack.server;
    server.answer("/moved.tar", Answer::Redirect(hidden.url("/context.tar")));
    let moved = format!("{}?service=git-upload-pack", hidden.url("/hidden.git/info/refs"));
    server.answer("/moved.git/info/refs", Answer::Redirect(moved));
    for (name, url) in [("absolute.git", hidden.url("/hidden.git")), ("via.git", server.url("/moved.git"))] {
        let repository = stack.repository(name);
        make_repository(&repository, &[("Dockerfile", DOCKERFILE)])?;
        commit_submodule(&repository, "lib", &url, &id)?;
    }
    for path in ["moved.tar", "moved.git", "absolute.git", "via.git"] {
        stack.refuses(&server.url(&format!("/{path}")), "127.0.0.2: resolves to an address").await?;
    }
    server.answer("/file", Answer::Redirect("file:///etc/passwd".to_owned()));
    stack.refuses(&server.url("/file"), "must be a URL that begins with").await?;
    server.answer("/circle", Answer::Redirect("circle".to_owned()));
    stack.refuses(&server.url("/circle"), "more than 10 redirects").await?;
    assert_eq!(hidden.requests(), [""; 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn other_transports_are_refused() -> anyhow::Result<()> {
    let stack = Stack::allowed().await?;
    for url in ["file:///etc", "ssh://git@127.0.0.1/x.git", "ext::sh -c id", "git://127.0.0.1/x.git"] {
        let refused = stack.alice().create(image(url)).await.expect_err(url);
        let field = "image.config.dockerfile.remote".to_owned();
        assert_eq!((refused.code(), fields(&refused)), (Code::InvalidArgument, vec![field]), "{url}");
    }
    let id = make_repository(&stack.repository("lib.git"), &[("text", "of the library")])?;
    let marker = stack.directory.path().join("marker");
    for (number, url) in [
        format!("file://{}", stack.repository("lib.git").display()),
        stack.repository("lib.git").display().to_string(),
        "ssh://git@127.0.0.1/x.git".to_owned(),
        "git@127.0.0.1:x.git".to_owned(),
        "git://127.0.0.1/x.git".to_owned(),
        format!("ext::touch {}", marker.display()),
        format!("--upload-pack=touch {}", marker.display()),
    ]
    .into_iter()
    .enumerate()
    {
        let repository = stack.repository(&format!("{number}.git"));
        make_repository(&repository, &[("Dockerfile", DOCKERFILE)])?;
        commit_submodule(&repository, "lib", &url, &id)?;
        stack.refuses(&stack.server.url(&format!("/{number}.git")), "submodule `lib`").await?;
    }
    assert!(!marker.exists());
    stack.is_clean().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_is_fetched_from_a_web_server() -> anyhow::Result<()> {
    let stack = Stack::start(&["--allow-remote", "localhost"]).await?;
    let server = &stack.server;
    let archive = tar_of(&[("Dockerfile", DOCKERFILE), ("text", "of the archive")])?;
    server.answer("/files/context.tar", Answer::File(archive));
    server.answer("/moved", Answer::Redirect("/files/up/../context.tar".to_owned()));
    let url = |path: &str| format!("http://localhost:{}{path}", server.port());
    for path in ["/files/context.tar", "/moved"] {
        assert_eq!(stack.built(&url(path)).await?.files["text"], "of the archive");
    }
    server.answer("/refused", Answer::Status(StatusCode::FORBIDDEN));
    let refused = stack.build(&url("/refused")).await?;
    let error = refused.error.unwrap_or_default();
    assert_eq!((error.kind(), refused.attempt), (BuildErrorKind::User, 1));
    assert!(error.message.contains("403"), "{error:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_or_busy_is_asked_again() -> anyhow::Result<()> {
    let stack = Stack::allowed().await?;
    let away = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    stack.server.answer("/busy", Answer::Status(StatusCode::SERVICE_UNAVAILABLE));
    stack.server.answer("/busy.git/info/refs", Answer::Status(StatusCode::SERVICE_UNAVAILABLE));
    let alice = stack.alice();
    for url in [
        stack.server.url("/busy"),
        stack.server.url("/busy.git"),
        format!("http://{away}/x.tar"),
        format!("http://{away}/x.git"),
    ] {
        let (_, build) = stack.start_build(&url).await?;
        let waiting = |build: &Build| build.pending_reason() == PendingReason::BackingOff;
        alice.until(&build.id, waiting).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_a_fetch_that_stalls() -> anyhow::Result<()> {
    let stack = Stack::allowed().await?;
    let alice = stack.alice();
    for (path, requested) in [("/silent", "/silent"), ("/silent.git", "/silent.git/info/refs")] {
        stack.server.answer(requested, Answer::Silence);
        let (image, build) = stack.start_build(&stack.server.url(path)).await?;
        stack.server.requested(requested).await?;
        alice.cancel(&image.id).await?;
        let cancelled = alice.finished(&build.id).await?;
        assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true), "{path}");
    }
    stack.is_clean().await?;
    eventually_true("git is gone", async || Ok(!runs_in(stack.directory.path())?)).await
}

/// Reports whether a process has a file below a directory as its argument or environment.
fn runs_in(directory: &Path) -> anyhow::Result<bool> {
    let needle = directory.display().to_string().into_bytes();
    for entry in std::fs::read_dir("/proc")? {
        let environment = std::fs::read(entry?.path().join("environ")).unwrap_or_default();
        if environment.windows(needle.len()).any(|window| window == needle) {
            return Ok(true);
        }
    }
    Ok(false)
}
