use std::os::unix::net::UnixListener;

use super::*;

fn order(secrets: &[(&str, &str)], agents: &[(&str, &str)], credentials: &str) -> DockerBuild {
    let named = |list: &[(&str, &str)]| {
        let named =
            |(id, name): &(&str, &str)| NamedSecret { id: (*id).to_owned(), name: (*name).to_owned() };
        list.iter().map(named).collect()
    };
    DockerBuild {
        secrets: named(secrets),
        ssh_agents: named(agents),
        remote_credentials: credentials.to_owned(),
        ..DockerBuild::default()
    }
}

#[tokio::test]
async fn a_build_gets_what_is_there_for_it_now() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let write = |name: &str, content: &[u8]| std::fs::write(directory.path().join(name), content);
    write(
        "trailer.json",
        br#"{"secrets": {"token": {"creators": ["alice"]}, "empty": {}, "large": {}, "directory": {}, "none": {},
            "agent": {}, "netrc": {}, "trailer.json": {}}}"#,
    )?;
    write("token", b"first")?;
    write("hidden", b"of nobody")?;
    write("empty", b"")?;
    write("large", &vec![b'x'; 65_537])?;
    write("netrc", b"machine a login b password c")?;
    std::fs::create_dir(directory.path().join("directory"))?;
    let _listener = UnixListener::bind(directory.path().join("agent"))?;
    let store = SecretStore::new(Some(directory.path().to_owned()));
    store.check().map_err(anyhow::Error::msg)?;
    let of = |subject: &str| Assignment {
        creator: subject.to_owned(),
        requested_by: subject.to_owned(),
        pools: vec!["default".to_owned()],
        ..Assignment::default()
    };

    let wanted = order(&[("id", "token")], &[("default", "agent")], "netrc");
    let secrets = store.resolve(&of("alice"), &wanted).await?;
    assert_eq!(secrets.values["id"].as_bytes(), b"first");
    assert_eq!(secrets.ssh_agents["default"], directory.path().join("agent"));
    assert_eq!(secrets.remote_credentials.entries().next(), Some(("a", "b", "c")));
    assert_eq!(secrets.scrubber.text("the first".to_owned()), "the [secret token]");
    write("token", b"second")?;
    assert_eq!(store.resolve(&of("alice"), &wanted).await?.values["id"].as_bytes(), b"second");

    for (subject, wanted, rule) in [
        ("bob", order(&[("id", "token")], &[], ""), "this build may use"),
        ("alice", order(&[("id", "hidden")], &[], ""), "this build may use"),
        ("alice", order(&[("id", "none")], &[], ""), "this build may use"),
        ("alice", order(&[("id", "directory")], &[], ""), "this build may use"),
        ("alice", order(&[("id", "agent")], &[], ""), "this build may use"),
        ("alice", order(&[("id", "trailer.json")], &[], ""), "this build may use"),
        ("alice", order(&[("id", "empty")], &[], ""), "is empty"),
        ("alice", order(&[("id", "large")], &[], ""), "65,536"),
        ("alice", order(&[], &[("id", "token")], ""), "this build may use"),
        ("alice", order(&[], &[("id", "none")], ""), "this build may use"),
        ("alice", order(&[], &[], "token"), "netrc"),
        ("alice", order(&[], &[], "hidden"), "this build may use"),
    ] {
        let error = store.resolve(&of(subject), &wanted).await.expect_err("it may not be used").to_string();
        assert!(error.contains(rule), "{wanted:?}: {error}");
    }
    let without = SecretStore::default().resolve(&of("alice"), &wanted).await;
    assert!(matches!(without, Err(SecretError::Refused { .. })), "{without:?}");
    write("trailer.json", b"{")?;
    assert!(store.check().is_err());
    let broken = store.resolve(&of("alice"), &wanted).await;
    assert!(matches!(broken, Err(SecretError::Unreadable)), "{broken:?}");
    Ok(())
}
