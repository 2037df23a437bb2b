//! Deployment files that match the programs and the operator's manual: every flag and variable in the
//! manifests and images exists, the images run, and what is said to be private is.

use std::{
    collections::BTreeSet,
    env, fs,
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::CommandFactory as _;

use crate::{base_image, engine_fixture, process::program, stack::LIMIT};

/// Returns the flags and the environment variables of a program and its subcommands.
fn known(command: &clap::Command) -> BTreeSet<String> {
    let of_this = command.get_arguments().flat_map(|argument| {
        let flag = argument.get_long().map(|long| format!("--{long}"));
        let variable = argument.get_env().map(|variable| variable.to_string_lossy().into_owned());
        flag.into_iter().chain(variable)
    });
    of_this.chain(command.get_subcommands().flat_map(known)).collect()
}

/// Returns the flags and the `TRAILER_` variables in a text.
fn named(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    text.lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .flat_map(|line| line.split(|c| !is_part(c)))
        .filter(|word| {
            let is_flag = word
                .strip_prefix("--")
                .is_some_and(|name| name.starts_with(|c: char| c.is_ascii_lowercase()));
            is_flag || word.starts_with("TRAILER_")
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_flag_and_variable_that_is_deployed_exists() -> anyhow::Result<()> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let service = known(&image_service::Cli::command());
    let worker = known(&build_worker::Cli::command());
    let mut seen = 0;
    for (file, known) in [
        ("kubernetes/image-service.yaml", &service),
        ("kubernetes/build-worker.yaml", &worker),
        ("images/image-service.Dockerfile", &service),
        ("images/build-worker.Dockerfile", &worker),
        ("compose/compose.yaml", &service.union(&worker).cloned().collect()),
    ] {
        let text = fs::read_to_string(deploy.join(file)).with_context(|| file.to_owned())?;
        // The engine beside a worker has flags of its own, and so do Docker's health checks.
        let ours = text.split("initContainers:").next().unwrap_or_default();
        let ours: String = ours
            .lines()
            .filter(|line| !line.starts_with("HEALTHCHECK") && !line.starts_with("COPY"))
            .collect::<Vec<_>>()
            .join("\n");
        let of_compose = [
            "TRAILER_COMPOSE_STATE",
            "TRAILER_PORT",
            "TRAILER_REGISTRY_PORT",
            "TRAILER_DOCKER_SOCKET",
            "TRAILER_DOCKER_GROUP",
        ];
        for name in named(&ours) {
            seen += 1;
            assert!(known.contains(&name) || of_compose.contains(&name.as_str()), "{file}: {name}");
        }
    }
    assert!(seen > 30, "{seen}: what is deployed is not found");
    Ok(())
}

#[test]
fn a_deployed_catalogue_says_whose_tokens_it_takes() -> anyhow::Result<()> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/image-service.yaml");
    let manifest = fs::read_to_string(manifest)?;
    // The service does not start without them.
    for required in ["--jwks=", "TRAILER_ISSUER", "TRAILER_AUDIENCE"] {
        assert!(manifest.contains(required), "{required}");
    }
    Ok(())
}

#[test]
fn workers_on_kubernetes_do_not_wait_for_the_catalogue() -> anyhow::Result<()> {
    let kubernetes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes");
    let worker = fs::read_to_string(kubernetes.join("build-worker.yaml"))?;
    let (_, server) = worker.split_once("--server=https://").context("no --server")?;
    let (name, _) = server.split_once('.').context("no name of a service")?;
    let service = fs::read_to_string(kubernetes.join("image-service.yaml"))?;
    let is_it =
        |object: &&str| object.contains("kind: Service\n") && object.contains(&format!("  name: {name}\n"));
    let object = service.split("---\n").find(is_it).with_context(|| format!("no Service {name}"))?;
    assert!(object.contains("\n  publishNotReadyAddresses: true\n"), "{object}");
    Ok(())
}

/// Reads a file of the repository.
fn read(file: &str) -> anyhow::Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    fs::read_to_string(&path).with_context(|| file.to_owned())
}

/// Returns the objects of a manifest that contain all of these lines, whatever their indentation.
fn objects<'a>(manifest: &'a str, lines: &[&str]) -> Vec<&'a str> {
    let has = |object: &str, line: &str| object.lines().any(|of_object| of_object.trim() == line);
    manifest.split("\n---\n").filter(|object| lines.iter().all(|line| has(object, line))).collect()
}

#[test]
fn a_pod_sees_the_token_of_its_own_worker_only() -> anyhow::Result<()> {
    let manifest = read("deploy/kubernetes/build-worker.yaml")?;
    let [pod] = objects(&manifest, &["kind: StatefulSet"])[..] else { anyhow::bail!("one StatefulSet") };
    let (worker, rest) = pod.split_once("initContainers:").context("the engine")?;
    let (engine, volumes) = rest.split_once("\n      volumes:\n").context("volumes")?;
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (worker, engine, volumes) = (words(worker), words(engine), words(volumes));

    let mount = "- name: tokens mountPath: /etc/trailer/token subPathExpr: $(TRAILER_NAME) readOnly: true";
    let name = "- name: TRAILER_NAME valueFrom: fieldRef: fieldPath: metadata.name";
    let file = "- name: TRAILER_TOKEN_FILE value: /etc/trailer/token";
    for expected in [mount, name, file] {
        assert!(worker.contains(expected), "{expected}: {worker}");
    }
    assert_eq!(worker.matches("name: tokens").count(), 1, "{worker}");
    assert!(volumes.contains("- name: tokens secret: secretName: build-worker-tokens"), "{volumes}");
    assert_eq!(words(pod).matches("build-worker-tokens").count(), 1, "{pod}");
    // Not the engine, which runs the steps.
    for secret in ["token", "name: tls", "docker-config"] {
        assert!(!engine.contains(secret), "{secret}: {engine}");
    }
    Ok(())
}

/// Returns whether a network, as `address/length`, contains an address.
fn contains(network: &str, address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    };
    let (base, length) = network.split_once('/').expect("a network");
    let (base, size) = bits(base.parse().expect("an address"));
    let (address, size_of_address) = bits(address);
    let length: u32 = length.parse().expect("a length");
    size == size_of_address && (length == 0 || (base ^ address) >> (128 - length) == 0)
}

/// Returns the networks in a text.
fn networks(text: &str) -> BTreeSet<&str> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let words = code.flat_map(|line| line.split([' ', '(', ')', '"']));
    let is_network = |word: &&str| {
        word.split_once('/').is_some_and(|(address, length)| {
            address.parse::<IpAddr>().is_ok() && length.parse::<u8>().is_ok()
        })
    };
    words.filter(is_network).collect()
}

#[test]
fn policies_keep_builds_from_private_addresses() -> anyhow::Result<()> {
    let policies = read("deploy/kubernetes/network-policies.yaml")?;
    let of_worker = ["kind: NetworkPolicy", "app.kubernetes.io/name: build-worker", "policyTypes: [Egress]"];
    let found = objects(&policies, &of_worker);
    let [policy, of_operator] = found[..] else { anyhow::bail!("two policies: {found:#?}") };
    assert!(of_operator.ends_with("\n  egress: []\n"), "{of_operator}");
    let everybody = objects(&policies, &["podSelector: {}", "policyTypes: [Ingress, Egress]"]);
    assert_eq!(everybody.len(), 1, "what no policy allows is denied");
    assert!(!everybody[0].contains("gress:"), "{everybody:?}");

    let cidrs: Vec<_> = policy.lines().filter_map(|line| line.trim().strip_prefix("cidr: ")).collect();
    assert_eq!(cidrs, ["0.0.0.0/0", "::/0"]);
    let mut closed = networks(policy);
    closed.retain(|network| !cidrs.contains(network));
    assert_eq!(closed, networks(&read("deploy/egress-rules")?), "the rules for other hosts");
    for (address, is_open) in [
        ("1.1.1.1", true),
        ("100.63.255.255", true),
        ("172.32.0.1", true),
        ("2606:4700:4700::1111", true),
        // Metadata of clouds.
        ("169.254.169.254", false),
        ("100.100.100.200", false),
        ("192.0.0.192", false),
        ("fd00:ec2::254", false),
        ("64:ff9b::a9fe:a9fe", false),
        // Private networks, and those of clusters.
        ("10.96.0.1", false),
        ("100.64.0.1", false),
        ("172.16.0.1", false),
        ("172.31.255.255", false),
        ("192.168.255.255", false),
        ("fc00::1", false),
        // The host.
        ("0.0.0.0", false),
        ("127.0.0.53", false),
        ("::1", false),
        ("fe80::1", false),
    ] {
        let parsed: IpAddr = address.parse()?;
        let is_closed = closed.iter().any(|network| contains(network, parsed));
        assert_eq!(!is_closed, is_open, "{address}");
    }
    Ok(())
}

#[test]
fn postgres_shares_a_network_with_image_service_only() -> anyhow::Result<()> {
    let compose = read("deploy/compose/compose.yaml")?;
    let (_, services) = compose.split_once("\nservices:\n").context("services")?;
    let (services, rest) = services.split_once("\nsecrets:\n").context("secrets")?;
    let mut joined = BTreeSet::new();
    for service in services.split("\n\n") {
        let (name, _) = service.trim().split_once(':').context("a name")?;
        let inherited =
            if service.contains("<<: *image-service") { "[default, database]" } else { "[default]" };
        let networks = service.lines().find_map(|line| line.trim().strip_prefix("networks: "));
        joined.insert((name, networks.unwrap_or(inherited)));
    }
    let expected = [
        ("build-worker", "[default]"),
        ("image-service", "[default, database]"),
        ("image-service-2", "[default, database]"),
        ("postgres", "[database]"),
        ("registry", "[default]"),
    ];
    assert_eq!(joined.into_iter().collect::<Vec<_>>(), expected);
    assert!(rest.contains("\n  database: {internal: true}\n"), "{rest}");
    Ok(())
}

/// Returns the files below a folder.
fn files_below(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else {
            files.push(path);
        }
    }
    Ok(files)
}

#[test]
fn urls_of_postgres_verify_the_server() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let documents = ["README.md", "image-service/README.md", "build-worker/README.md", "tests/README.md"];
    let mut seen = 0;
    for file in files_below(&root.join("deploy"))?.into_iter().chain(documents.map(|file| root.join(file))) {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        for after in text.split("postgres://").skip(1) {
            let url = after.split([' ', '`', '\'', '"', '\n']).next().unwrap_or_default();
            let Some((_, server)) = url.split_once('@') else { continue };
            seen += 1;
            // On its own network.
            let is_compose = file.ends_with("deploy/compose/up") && server.starts_with("postgres/");
            let is_local = is_compose || server.starts_with("localhost") || server.starts_with("127.0.0.1");
            let verifies = server.contains("sslmode=verify-full") && server.contains("sslrootcert=");
            assert!(is_local || verifies, "{}: {url}", file.display());
        }
        assert!(!text.contains("sslmode=") || text.contains("sslmode=verify-full"), "{}", file.display());
    }
    assert!(seen >= 4, "{seen}: URLs are not found");
    Ok(())
}

/// Removes an image of the engine when dropped.
struct Imported(String);

impl Drop for Imported {
    fn drop(&mut self) {
        let _ = docker(&["rmi", "--force", &self.0]);
    }
}

/// The same rules apply to build steps, which are on the same bridge.
#[tokio::test(flavor = "multi_thread")]
async fn containers_of_the_scripts_engine_do_not_reach_its_host() -> anyhow::Result<()> {
    if env::var_os("TRAILER_TEST_ENGINE_BRIDGE").is_none() {
        return Ok(()); // The rules of another engine's host are its operator's.
    }
    let (engine, _) = engine_fixture::connect().await?;
    let base = Imported(format!("trailer-test/egress-{}:latest", uuid::Uuid::new_v4().simple()));
    base_image::import(&engine, &base.0).await?;
    let gateway =
        docker(&["network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}"])?;
    // The address by which this host would reach the internet, if it has one; nothing is sent.
    let way_out = UdpSocket::bind("0.0.0.0:0")?;
    let way_out = way_out.connect("203.0.113.1:9").and_then(|()| way_out.local_addr());
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    for address in [gateway.parse()?].into_iter().chain(way_out.ok().map(|local| local.ip())) {
        TcpStream::connect((address, port)).with_context(|| format!("{address} listens"))?;
        let command = format!("/bin/busybox nc -w 5 {address} {port} </dev/null");
        let refused = docker(&["run", "--rm", &base.0, "/bin/sh", "-c", &command]);
        let refused = refused.expect_err("the container reaches its host").to_string();
        // The kernel limits how often it says why.
        let is_refused = ["can't connect", "timed out"].iter().any(|words| refused.contains(words));
        assert!(is_refused, "{refused}");
    }
    Ok(())
}

/// Runs a command that must succeed, and returns its output.
fn output_of(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    anyhow::ensure!(
        output.status.success(),
        "{command:?}: {stdout}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(stdout)
}

fn docker(arguments: &[&str]) -> anyhow::Result<String> {
    output_of(Command::new("docker").args(arguments))
}

/// A container that is removed when dropped.
struct Container(String);

impl Drop for Container {
    fn drop(&mut self) {
        let _ = docker(&["rm", "--force", "--volumes", &self.0]);
    }
}

#[test]
fn the_images_run_as_nobody_in_particular_and_say_how_they_are() -> anyhow::Result<()> {
    let programs = Path::new(&program("image-service")?).parent().context("a directory")?.to_owned();
    let profile = if programs.ends_with("release") { "release" } else { "dev" };
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/images/build");
    output_of(
        Command::new(build).args(["--profile", profile, "--tag", "test"]).env("TRAILER_TEST_BUILT", "yes"),
    )?;
    for image in ["trailer-images/image-service:test", "trailer-images/build-worker:test"] {
        assert_eq!(docker(&["inspect", "--format", "{{.Config.User}}", image])?, "65532:65532");
        let megabytes = docker(&["inspect", "--format", "{{.Size}}", image])?.parse::<u64>()? >> 20;
        assert!(megabytes < 100, "{image}: {megabytes} MiB");
        let refused = docker(&["run", "--rm", image]).expect_err("it listens beyond loopback").to_string();
        assert!(refused.contains("--allow-plaintext") || refused.contains("--token-file"), "{refused}");
    }
    let run = ["run", "--detach", "--read-only", "--cap-drop", "ALL", "trailer-images/image-service:test"];
    let container = Container(docker(&[run.as_slice(), &["serve", "--allow-plaintext"]].concat())?);
    let health = || docker(&["inspect", "--format", "{{.State.Health.Status}}", &container.0]);
    let begun = Instant::now();
    while health()? != "healthy" {
        let log = docker(&["logs", &container.0])?;
        anyhow::ensure!(begun.elapsed() < LIMIT * 2, "it does not become healthy: {log}");
        std::thread::sleep(Duration::from_millis(100));
    }
    let pid = docker(&["inspect", "--format", "{{.State.Pid}}", &container.0])?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    assert!(status.contains("Uid:\t65532\t65532\t65532\t65532"), "{status}");
    docker(&["exec", &container.0, "/usr/local/bin/image-service", "token", "--subject", "alice"])?;
    Ok(())
}
