//! A generated Debian workspace that is built, pushed, pulled by another worker and run.

use std::{
    env,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bollard::{
    API_DEFAULT_VERSION, Docker,
    auth::DockerCredentials,
    models::ContainerCreateBody,
    query_parameters::{
        CreateContainerOptions, LogsOptionsBuilder, PushImageOptions, RemoveContainerOptionsBuilder,
        RemoveImageOptionsBuilder, StartContainerOptions, StopContainerOptionsBuilder,
        TagImageOptionsBuilder, WaitContainerOptions,
    },
};
use futures_util::StreamExt as _;
use proto::images::{
    BuildState, GenerateSource, Image, ImageConfig, ImageFile, PullSource, WorkspaceService,
    image_config::Source,
};

use crate::{
    base_image,
    client::{repository_of, repository_under},
    dockerd::{self, starts_containers},
    engine_fixture,
    eventually::{eventually, eventually_within},
    process::{Program, bound_to_test},
    registry::{DockerConfig, PASSWORD, Registry, USER},
    stack::{Service, Worker},
};

/// Time limit of the package managers.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
/// Script that the workspace runs: prints everything that was configured, then sleeps.
const LOOK: &str = r#"
id -un; echo "$GREETING"; cat "$HOME/started" "$HOME/quoted"; file -b /srv/www/index.html
python3 - <<'END'
import six, time, urllib.request
def get(port):
    for _ in range(100):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode().strip()
        except OSError:
            time.sleep(0.1)
print(six.__name__, get(8080), get(9090), flush=True)
END
cat /tmp/note
echo ready
exec sleep infinity
"#;

/// Starts a separate engine for the second worker.
///
/// The engine uses this host's network, because it pulls from a registry of this host. It is given the bridge
/// of the existing engine, which it would remove otherwise.
async fn start_engine(directory: &Path) -> anyhow::Result<(Program, Docker, String)> {
    let path = |part: &str| directory.join(part).display().to_string();
    let mut command = ["unshare", "--mount"].map(str::to_owned).to_vec();
    command.extend(bound_to_test());
    command.extend(dockerd::command());
    let fixed = ["--log-level=warn", "--iptables=false", "--ip6tables=false", "--ip-masq=false"];
    command.extend(fixed.map(str::to_owned));
    let bridge = env::var("TRAILER_TEST_ENGINE_BRIDGE").unwrap_or_else(|_| "docker0".to_owned());
    command.push(format!("--bridge={bridge}"));
    for (flag, part) in [("data-root", "data"), ("exec-root", "exec"), ("pidfile", "pid")] {
        command.push(format!("--{flag}={}", path(part)));
    }
    let socket = path("docker.sock");
    command.push(format!("--host=unix://{socket}"));
    let mut dockerd = Program::start(directory, "dockerd", command)?;
    let docker = eventually("dockerd answers", async || {
        dockerd.require_life().context("the tests need root and a dockerd: run them by tests/run")?;
        if !Path::new(&socket).exists() {
            return Ok(None);
        }
        let docker = Docker::connect_with_unix(&socket, 60, API_DEFAULT_VERSION)?;
        let is_answered = docker.ping().await.is_ok();
        Ok(is_answered.then_some(docker))
    })
    .await
    .with_context(|| dockerd.output())?;
    Ok((dockerd, docker, format!("unix://{socket}")))
}

/// Moves a local image from the engine to the registry.
async fn move_to_registry(docker: &Docker, local: &str, repository: &str) -> anyhow::Result<()> {
    let options = TagImageOptionsBuilder::new().repo(repository).tag("12").build();
    docker.tag_image(local, Some(options)).await?;
    let options = PushImageOptions { tag: Some("12".to_owned()), ..PushImageOptions::default() };
    let credentials = DockerCredentials {
        username: Some(USER.to_owned()),
        password: Some(PASSWORD.to_owned()),
        ..DockerCredentials::default()
    };
    let mut pushing = docker.push_image(repository, Some(options), Some(credentials));
    while let Some(progress) = pushing.next().await {
        progress?;
    }
    drop(pushing);
    for name in [local, &format!("{repository}:12")] {
        docker.remove_image(name, Some(RemoveImageOptionsBuilder::new().force(true).build()), None).await?;
    }
    Ok(())
}

/// Value of a service's environment variable that a shell would interpret.
const NOTE: &str = r#"it's "$HOME" $(id) `id` \ \n # <<EOF é"#;

/// Imports the Debian archive made by `tests/run` into the engine.
pub(crate) async fn import_debian(docker: &Docker, reference: &str) -> anyhow::Result<()> {
    let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debian/base.tar");
    let archive = tokio::fs::read(archive).await.context("the tests need a Debian: run them by tests/run")?;
    base_image::import_archive(docker, reference, archive, "").await
}

fn workspace(base_image: &str) -> ImageConfig {
    let service = |name: &str, command: &str, port: i32| WorkspaceService {
        name: name.to_owned(),
        packages: vec!["busybox".to_owned()],
        command: command.to_owned(),
        ports: vec![port],
        environment: [("PORT".to_owned(), port.to_string()), ("NOTE".to_owned(), NOTE.to_owned())].into(),
    };
    let source = GenerateSource {
        base_image: base_image.to_owned(),
        apt_packages: vec!["file".to_owned(), "procps".to_owned()],
        python_packages: vec!["six".to_owned()],
        environment: [("GREETING".to_owned(), "it's \"$HOME\"".to_owned())].into(),
        user: "dev".to_owned(),
        start_commands: vec![
            "echo 'it has started' > \"$HOME/started\"".to_owned(),
            r#"printf '%s\n' 'a start'\''s "$HOME" $(id) \ `id`' > "$HOME/quoted""#.to_owned(),
        ],
        files: vec![ImageFile {
            path: "/srv/www/index.html".to_owned(),
            content: "hello\n".as_bytes().to_vec().into(),
            executable: false,
        }],
    };
    ImageConfig {
        source: Some(Source::Generate(source)),
        services: vec![
            service(
                "web",
                "printenv NOTE > /tmp/note; cd /srv/www && exec python3 -m http.server \"$PORT\"",
                8080,
            ),
            service("static", "busybox httpd -f -p \"$PORT\" -h /srv/www", 9090),
        ],
        push: true,
        ..ImageConfig::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generated_workspace_is_built_pushed_pulled_and_run() -> anyhow::Result<()> {
    let (docker, docker_host) = engine_fixture::connect().await?;
    let run = uuid::Uuid::new_v4().simple().to_string();
    let registry = Registry::start().await?;
    let local = format!("trailer-test/debian-{run}:12");
    import_debian(&docker, &local).await?;
    let debian = format!("{}/debian", registry.addr);
    move_to_registry(&docker, &local, &debian).await?;
    let base = format!("{debian}:12");
    let service = Service::start_with(&["--repository-prefix", &format!("{}/team/", registry.addr)]).await?;
    let config = DockerConfig::with(PASSWORD, &[registry.addr])?;
    let flags = ["--docker-config", config.path()?];
    let alice = service.builder("alice");

    let builder = Worker::start_at(&service, service.addr, "builder", &docker_host, &flags)?;
    let mut wanted = Image {
        name: "Workspace".to_owned(),
        repository: repository_under(format!("{}/team", registry.addr), "alice", "workspace"),
        config: Some(workspace(&base)),
        ..Image::default()
    };
    let (created, build) = alice.create(wanted.clone()).await?;
    let built = eventually_within(PATIENCE, "the build ends", async || {
        let build = alice.get_build(&build.id).await?;
        Ok(matches!(build.state(), BuildState::Succeeded | BuildState::Failed).then_some(build))
    })
    .await?;
    assert_eq!(built.state(), BuildState::Succeeded, "{:?}", built.error);
    let pushed = alice.get(&created.id).await?.artifact.context("an artifact")?;
    builder.stop().await?;
    let reference = created.reference.clone();
    let options = || RemoveImageOptionsBuilder::new().force(true).build();
    docker.remove_image(&reference, Some(options()), None).await?;

    let directory = tempfile::Builder::new().prefix("trailer-engine.").tempdir_in("/tmp")?;
    let (_dockerd, other_docker, other_host) = start_engine(directory.path()).await?;
    let _other = Worker::start_at(&service, service.addr, "other", &other_host, &flags)?;
    let source = Source::Pull(PullSource { reference: reference.clone() });
    wanted.config = Some(ImageConfig { source: Some(source), ..ImageConfig::default() });
    wanted.repository.clear();
    let (pulled, build) = alice.create(wanted).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    let artifact = alice.get(&pulled.id).await?.artifact.context("an artifact")?;
    assert_eq!((&artifact.repo_digest, &artifact.image_id), (&pushed.repo_digest, &pushed.image_id));
    // Docker 26 does not report the digest of pulled images where containerd stores them.
    assert!(["", &pushed.config_digest].contains(&artifact.config_digest.as_str()), "{pushed:?}");
    assert_eq!(artifact.worker, "other");
    if !starts_containers() {
        return Ok(());
    }

    let body = ContainerCreateBody {
        image: Some(format!("{}@{}", repository_of(&created), artifact.repo_digest)),
        cmd: Some(["sh", "-c", LOOK].map(str::to_owned).into()),
        // The services are called from inside the container.
        network_disabled: Some(true),
        ..ContainerCreateBody::default()
    };
    let docker = other_docker;
    let container = docker.create_container(None::<CreateContainerOptions>, body).await?.id;
    docker.start_container(&container, None::<StartContainerOptions>).await?;
    let printed =
        tokio::time::timeout(Duration::from_secs(60), output_until_ready(&docker, &container)).await??;
    let quoted = r#"a start's "$HOME" $(id) \ `id`"#;
    for expected in ["dev", "it's \"$HOME\"", "it has started", quoted, "ASCII text", "six hello hello", NOTE]
    {
        assert!(printed.iter().any(|line| line == expected), "{expected}: {printed:#?}");
    }
    let begun = Instant::now();
    let stop = StopContainerOptionsBuilder::new().t(10).build();
    docker.stop_container(&container, Some(stop)).await?;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let mut waiting = docker.wait_container(&container, None::<WaitContainerOptions>);
    let status = match waiting.next().await {
        Some(Err(bollard::errors::Error::DockerContainerWaitError { code, .. })) => code,
        Some(ended) => ended?.status_code,
        None => anyhow::bail!("it has no status"),
    };
    assert_eq!(status, 128 + 15, "it has ended by SIGTERM");
    drop(waiting);
    let remove = RemoveContainerOptionsBuilder::new().force(true).build();
    docker.remove_container(&container, Some(remove)).await?;
    Ok(())
}

/// Returns the lines that a container prints until it is ready.
async fn output_until_ready(docker: &Docker, container: &str) -> anyhow::Result<Vec<String>> {
    let options = LogsOptionsBuilder::new().stdout(true).stderr(true).follow(true).build();
    let mut logs = docker.logs(container, Some(options));
    let mut text = String::new();
    while let Some(part) = logs.next().await {
        text.push_str(&part?.to_string());
        if text.lines().any(|line| line == "ready") {
            break;
        }
    }
    Ok(text.lines().map(str::to_owned).collect())
}
