//! SSH agents that builds use by name.

use std::process::{Command, Stdio};

use proto::images::{BuildErrorKind, BuildState, SshAgent};
use serde_json::json;

use super::{Secrets, refused, run};
use crate::{
    answers::lines,
    client::image,
    debian_workspace::{PATIENCE, import_debian},
    engine_fixture::Real,
    eventually::eventually_within,
    process::{Program, bound_to_test},
};

/// An SSH agent with a key, and its socket in a directory of secrets.
fn start_agent(secrets: &Secrets, name: &str) -> anyhow::Result<Program> {
    let socket = secrets.0.path().join(name).display().to_string();
    let mut command = bound_to_test().to_vec();
    command.extend(["ssh-agent", "-D", "-a", &socket].map(str::to_owned));
    Program::start(secrets.0.path(), "ssh-agent", command)
}

fn add_key(secrets: &Secrets, name: &str, comment: &str) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let key = directory.path().join("key");
    let make = ["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"];
    anyhow::ensure!(Command::new("ssh-keygen").args(make).arg(&key).status()?.success());
    let mut add = Command::new("ssh-add");
    add.arg("-q").arg(&key).env("SSH_AUTH_SOCK", secrets.0.path().join(name)).stderr(Stdio::null());
    anyhow::ensure!(add.status()?.success());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_signs_with_an_agent_that_it_cannot_change() -> anyhow::Result<()> {
    let secrets = Secrets::new(&[("deploy", "", json!({ "creators": ["alice"] }))])?;
    let agent = start_agent(&secrets, "deploy")?;
    let socket = secrets.0.path().join("deploy");
    eventually_within(PATIENCE, "the agent listens", async || Ok(socket.exists().then_some(()))).await?;
    let comment = format!("key-{}", uuid::Uuid::new_v4().simple());
    add_key(&secrets, "deploy", &comment)?;
    let real = Real::start_with(&[
        "--secrets-dir",
        secrets.path()?,
        "--allow-local",
        "trailer-test/*",
        "--allow-add",
        "127.0.0.1",
    ])
    .await?;
    let alice = real.alice();
    let debian = format!("trailer-test/debian-{}:12", real.run);
    import_debian(&real.docker, &debian).await?;
    // Requests for the keys (11), to remove them all (19), and for the keys again.
    let ask = "perl -MIO::Socket::UNIX -e '$s = IO::Socket::UNIX->new(Peer => $ENV{SSH_AUTH_SOCK}) or die; \
        for (11, 19, 11) { syswrite($s, pack(\"NC\", 1, $_)); sysread($s, $n, 4); sysread($s, $b, unpack(\"N\", $n)); \
        printf(\"%d %s\\n\", ord($b), $b =~ /(key-[0-9a-f]+)/) }'";
    let with_agent = |name: &str, instructions: &str, agents: &[&str]| {
        let dockerfile = format!("FROM {debian}\nENV RUN={}\n{instructions}", real.run);
        let mut wanted = image(&format!("{name} {}", real.run), &dockerfile);
        let config = wanted.config.as_mut().expect("a configuration");
        config.ssh_agents =
            agents.iter().map(|id| SshAgent { id: (*id).to_owned(), name: "deploy".to_owned() }).collect();
        wanted
    };
    let mounted = format!("RUN --mount=type=ssh {ask}");
    let (created, built, history) = run(&alice, with_agent("Agent", &mounted, &["default"])).await?;
    assert_eq!(built.state(), BuildState::Succeeded, "{:?} {history:?}", built.error);
    let listed = format!("12 {comment}");
    assert_eq!(lines(&history), [&listed, "5 ", &listed]);
    let mut list = Command::new("ssh-add");
    let listed = list.arg("-l").env("SSH_AUTH_SOCK", &socket).output()?;
    assert!(String::from_utf8(listed.stdout)?.contains(&comment), "the agent has lost its key");

    // Another id, a step that does not ask for it, and a build without it.
    let named = "RUN --mount=type=ssh,id=other,required=true [ -S \"$SSH_AUTH_SOCK\" ]";
    let (by_id, built, _) = run(&alice, with_agent("By id", named, &["other"])).await?;
    assert_eq!(built.state(), BuildState::Succeeded, "{:?}", built.error);
    let without = "RUN [ -z \"$SSH_AUTH_SOCK\" ]";
    let (unasked, built, _) = run(&alice, with_agent("Unasked", without, &["default"])).await?;
    assert_eq!(built.state(), BuildState::Succeeded, "{:?}", built.error);
    for (name, instructions, agents) in [
        ("None", &*format!("RUN --mount=type=ssh,required=true {ask}"), &[][..]),
        ("Unknown", named, &["default"]),
    ] {
        let (_, built, _) = run(&alice, with_agent(name, instructions, agents)).await?;
        assert_eq!(built.error.clone().unwrap_or_default().kind(), BuildErrorKind::User, "{built:?}");
    }
    // ADD does not use it.
    let add = "ADD git@127.0.0.1:private.git /private";
    let (_, built, _) = run(&alice, with_agent("Add", add, &["default"])).await?;
    assert!(built.error.clone().unwrap_or_default().message.contains("--allow-add"), "{built:?}");
    let bob = real.service.builder("bob");
    refused(&bob, with_agent("Bob", &mounted, &["default"]), "this build may use").await?;
    drop(agent);
    real.clean(&[&created.reference, &by_id.reference, &unasked.reference, &debian]).await
}

/// Steps that run an SSH server with a Git repository, and clone that with the agent.
const CLONE: &str = "set -e; mkdir -p -m 700 /run/sshd /root/.ssh; ssh-add -L > /root/.ssh/authorized_keys; \
    /usr/sbin/sshd -p 2222; export GIT_SSH_COMMAND='ssh -p 2222 -o StrictHostKeyChecking=no'; \
    git -c user.name=a -c user.email=a@b -c init.defaultBranch=main init -q /srv/r; cd /srv/r; echo private > file; git add .; \
    git -c user.name=a -c user.email=a@b commit -qm a; \
    git clone -q ssh://root@127.0.0.1/srv/r /clone; cat /clone/file";

#[tokio::test(flavor = "multi_thread")]
async fn a_private_repository_is_cloned_over_ssh() -> anyhow::Result<()> {
    let secrets = Secrets::new(&[("deploy", "", json!({}))])?;
    let agent = start_agent(&secrets, "deploy")?;
    let socket = secrets.0.path().join("deploy");
    eventually_within(PATIENCE, "the agent listens", async || Ok(socket.exists().then_some(()))).await?;
    add_key(&secrets, "deploy", "a key")?;
    let flags = ["--secrets-dir", secrets.path()?, "--allow-local", "trailer-test/*"];
    let real = Real::start_with(&flags).await?;
    let alice = real.alice();
    let debian = format!("trailer-test/debian-{}:12", real.run);
    import_debian(&real.docker, &debian).await?;
    let install = "RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends git openssh-server >/dev/null";
    let with = |name: &str, mount: &str, agents: &[SshAgent]| {
        let dockerfile = format!("FROM {debian}\nENV RUN={}\n{install}\nRUN {mount}{CLONE}", real.run);
        let mut wanted = image(&format!("{name} {}", real.run), &dockerfile);
        wanted.config.as_mut().expect("a configuration").ssh_agents = agents.to_vec();
        wanted
    };
    let deploy = SshAgent { id: "default".to_owned(), name: "deploy".to_owned() };
    let (cloned, built, history) =
        run(&alice, with("Clone", "--mount=type=ssh ", std::slice::from_ref(&deploy))).await?;
    assert_eq!(built.state(), BuildState::Succeeded, "{:?} {:?}", built.error, lines(&history));
    assert!(lines(&history).contains(&"private"), "{:?}", lines(&history));
    // Neither without the name, nor in a step that does not ask for it.
    for (name, mount, agents) in [("Nameless", "--mount=type=ssh ", &[][..]), ("Unasked", "", &[deploy])] {
        let (_, built, _) = run(&alice, with(name, mount, agents)).await?;
        assert_eq!(built.error.clone().unwrap_or_default().kind(), BuildErrorKind::User, "{name}: {built:?}");
    }
    drop(agent);
    real.clean(&[&cloned.reference, &debian]).await
}
