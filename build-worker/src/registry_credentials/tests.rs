//! Lookups in configuration files and among stub helpers, with what the docker command would send.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::*;

/// A configuration directory, which is also the directory of the helpers.
struct Directory(TempDir);

impl Directory {
    fn new(content: &str) -> Self {
        let this = Self(tempfile::tempdir().expect("a directory"));
        this.write(content);
        this
    }

    fn write(&self, content: &str) {
        fs::write(self.0.path().join("config.json"), content).expect("a file");
    }

    fn config(&self) -> DockerConfig {
        let mut config = DockerConfig::new(self.0.path().to_owned());
        config.helpers.path = Some(format!("{}:/usr/bin:/bin", self.0.path().display()).into());
        config
    }

    /// Adds a helper. Another process writes it, because no process may have a program open for writing that
    /// is run.
    fn helper(&self, name: &str, script: &str) {
        let mut install = Command::new("install")
            .args(["-m", "755", "/dev/stdin"])
            .arg(self.0.path().join(format!("docker-credential-{name}")))
            .stdin(Stdio::piped())
            .spawn()
            .expect("install");
        let mut stdin = install.stdin.take().expect("a pipe");
        stdin.write_all(format!("#!/bin/sh\n{script}\n").as_bytes()).expect("it reads");
        drop(stdin);
        assert!(install.wait().expect("it ends").success());
    }
}

/// Returns credentials, or the lack of them, in one line.
fn shown(found: Result<Option<Credentials>, CredentialsError>) -> String {
    match found {
        Ok(None) => "none".to_owned(),
        Ok(Some(Credentials::Password { user, password })) => format!("{user}:{password}"),
        Ok(Some(Credentials::IdentityToken { token, user, password })) if user.is_empty() => {
            format!("identity {token}{password}")
        }
        Ok(Some(Credentials::IdentityToken { token, user, password })) => {
            format!("identity {token}, {user}:{password}")
        }
        Ok(Some(Credentials::RegistryToken(token))) => format!("registry {token}"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn entries_are_found_as_docker_finds_them() {
    // `plain:secret` in base64.
    const AUTH: &str = r#"{"auth": "cGxhaW46c2VjcmV0"}"#;
    let auths = |key: &str, entry: &str| format!(r#"{{"auths": {{"{key}": {entry}}}}}"#);
    for (config, reference, sent) in [
        ("{}".to_owned(), "r.example/x", "none"),
        (r#"{"auths": null, "credsStore": null, "credHelpers": null}"#.to_owned(), "r.example/x", "none"),
        (auths("r.example", AUTH), "r.example/x:1", "plain:secret"),
        (auths("r.example", AUTH), "r.example:5000/x:1", "none"),
        (auths("r.example", AUTH), "r2.example/x", "none"),
        (auths("r.example", AUTH), "x", "none"),
        (auths("r.example:5000", AUTH), "r.example:5000/x@sha256:0", "plain:secret"),
        (auths("https://r.example", AUTH), "r.example/x", "plain:secret"),
        (auths("http://r.example", AUTH), "r.example/x", "plain:secret"),
        (auths("https://r.example/", AUTH), "r.example/x", "plain:secret"),
        (auths("https://r.example/v2/", AUTH), "r.example/x", "plain:secret"),
        (auths("https://r.example/v2", AUTH), "r.example/x", "plain:secret"),
        (auths("r.example/v1/", AUTH), "r.example/x", "plain:secret"),
        (auths("https://index.docker.io/v1/", AUTH), "ubuntu:24.04", "plain:secret"),
        (auths("https://index.docker.io/v1/", AUTH), "docker.io/acme/private:1", "plain:secret"),
        (auths("https://index.docker.io/v1/", AUTH), "r.example/x", "none"),
        // Forms of an entry.
        (auths("r.example", "{}"), "r.example/x", "none"),
        (auths("r.example", "null"), "r.example/x", "none"),
        (auths("r.example", r#"{"auth": null, "email": "a@b"}"#), "r.example/x", "none"),
        (auths("r.example", r#"{"username": "u", "password": "p"}"#), "r.example/x", "u:p"),
        (
            auths("r.example", r#"{"auth": "cGxhaW46c2VjcmV0", "username": "u", "password": "p"}"#),
            "r.example/x",
            "plain:secret",
        ),
        (auths("r.example", r#"{"auth": "cGxhaW46YTpiAA=="}"#), "r.example/x", "plain:a:b"),
        (auths("r.example", r#"{"auth": "YTpi", "identitytoken": "t"}"#), "r.example/x", "identity t, a:b"),
        (auths("r.example", r#"{"auth": "YTpi", "registrytoken": "t"}"#), "r.example/x", "registry t"),
    ] {
        let directory = Directory::new(&config);
        assert_eq!(
            shown(directory.config().credentials(reference, "alice").await),
            sent,
            "{config} {reference}"
        );
    }
    let two = r#"{"auths": {"https://r.example/v1/": {"auth": "YTpi"}, "r.example": {"auth": "Yzpk"}}}"#;
    assert_eq!(shown(Directory::new(two).config().credentials("r.example/x", "alice").await), "c:d");
}

#[tokio::test]
async fn an_entry_with_a_path_is_for_the_repositories_below_it() {
    let config = r#"{"auths": {
        "r.example": {"auth": "YWxsOjE="}, "r.example/team": {"auth": "dGVhbToy"},
        "https://r.example/team/a/": {"auth": "YTpi"}, "r.example/team/none": {},
        "p.example/team": {"auth": "dGVhbToy"}, "docker.io/acme": {"auth": "YTpi"}
    }, "credHelpers": {"r.example": "there-is-none"}}"#;
    let directory = Directory::new(config);
    for (reference, expected) in [
        ("r.example/team", "team:2"),
        ("r.example/team/x:1", "team:2"),
        ("r.example/team/none", "team:2"),
        ("r.example/team/a", "a:b"),
        ("r.example/team/a/b/c@sha256:0", "a:b"),
        ("r.example/team/ab", "team:2"),
        ("p.example/team/x", "team:2"),
        ("p.example/teamwork", "none"),
        ("p.example/other/team", "none"),
        ("acme/x:1", "a:b"),
        ("ubuntu", "none"),
    ] {
        assert_eq!(shown(directory.config().credentials(reference, "alice").await), expected, "{reference}");
    }
    // What the file has for the whole registry counts only where its helper fails.
    assert_eq!(shown(directory.config().credentials("r.example/x", "alice").await), "all:1");
}

#[tokio::test]
async fn credentials_may_be_for_some_creators_only() {
    let config = r#"{"auths": {
        "r.example": {"auth": "YWxsOjE="}, "https://r.example/team/": {"auth": "dGVhbToy"}, "o.example": {"auth": "YTpi"}
    }, "credHelpers": {"h.example": "there-is-none"}, "trailer": {
        "r.example/team": {"creators": ["alice", "bob"]}, "https://o.example": {"creators": []},
        "h.example": {"creators": ["alice"]}
    }}"#;
    let directory = Directory::new(config);
    for (creator, reference, expected) in [
        ("alice", "r.example/team/x", "team:2"),
        ("bob", "r.example/team/x", "team:2"),
        ("carol", "r.example/team/x", "all:1"),
        ("", "r.example/team/x", "all:1"),
        ("carol", "r.example/x", "all:1"),
        ("alice", "o.example/x", "none"),
        ("bob", "h.example/x", "none"),
    ] {
        let found = directory.config().credentials(reference, creator).await;
        assert_eq!(shown(found), expected, "{creator} {reference}");
    }
    assert!(shown(directory.config().credentials("h.example/x", "alice").await).contains("there-is-none"));
    for trailer in [
        r#"{"r.example/teem": {"creators": ["alice"]}}"#,
        r#"{"other.example": {"creators": ["alice"]}}"#,
        r#"{"r.example": {"creator": ["alice"]}}"#,
        r#"{"r.example": {"creators": ["alice"], "pools": ["a"]}}"#,
        r#"{"r.example": null}"#,
    ] {
        directory
            .write(&format!(r#"{{"auths": {{"r.example": {{"auth": "YTpi"}}}}, "trailer": {trailer}}}"#));
        let found = shown(directory.config().credentials("r.example/x", "alice").await);
        assert!(found.contains("config.json: "), "{found}");
    }
}

#[tokio::test]
async fn helpers_are_asked_as_docker_asks_them() {
    let directory = Directory::new("{}");
    directory.helper(
        "store",
        r#"read -r server; [ "$1" = get ] || exit 3
case $server in
    https://index.docker.io/v1/) echo '{"ServerURL": "x", "Username": "hub", "Secret": "1"}';;
    r.example) echo '{"Username": "plain", "Secret": "secret"}';;
    t.example) echo '{"Username": "<token>", "Secret": "t"}';;
    none.example) echo '{}';;
    talks.example) echo 'the secret is sesame';;
    fails.example) echo 'the secret is sesame'; exit 2;;
    *) echo 'credentials not found in native keychain'; exit 1;;
esac"#,
    );
    directory.helper("deaf", r#"echo '{"Username": "deaf", "Secret": "1"}'"#);
    let store = r#"{"credsStore": "store"}"#;
    // As `docker login` leaves it on a host with a store.
    let listed = r#"{"auths": {"r.example": {}, "https://index.docker.io/v1/": {}}, "credsStore": "store"}"#;
    let beside = r#"{"auths": {"other.example": {"auth": "YTpi"}}, "credsStore": "store"}"#;
    let own = r#"{"auths": {"file.example": {"auth": "YTpi"}}, "credsStore": "missing",
        "credHelpers": {"r.example": "store", "d.example": "deaf", "file.example": "", "https://index.docker.io/v1/": "store"}}"#;
    let failed = "docker-credential-store has failed: exit status: 2";
    for (config, reference, sent) in [
        (store, "r.example/x", "plain:secret"),
        (store, "ubuntu", "hub:1"),
        (store, "t.example/x", "identity t"),
        (store, "none.example/x", "none"),
        (store, "unknown.example/x", "none"),
        (store, "fails.example/x", &format!("the credentials for fails.example: {failed}")),
        (
            store,
            "talks.example/x",
            "the credentials for talks.example: docker-credential-store has not responded with credentials",
        ),
        (listed, "r.example/x", "plain:secret"),
        (listed, "ubuntu", "hub:1"),
        // Docker asks the store, whatever the file holds.
        (beside, "other.example/x", "none"),
        (own, "r.example/x", "plain:secret"),
        (own, "d.example/x", "deaf:1"),
        (own, "file.example/x", "a:b"),
        (own, "ubuntu", "hub:1"),
    ] {
        directory.write(config);
        assert_eq!(
            shown(directory.config().credentials(reference, "alice").await),
            sent,
            "{config} {reference}"
        );
    }
    let found = shown(directory.config().credentials("unknown.example/x", "alice").await);
    let expected = "the credentials for unknown.example: docker-credential-missing cannot be run: ";
    assert!(found.starts_with(expected), "{found}");
}

#[tokio::test]
async fn a_helper_that_hangs_ends_with_its_children() {
    let directory = Directory::new(r#"{"credHelpers": {"r.example": "hangs", "o.example": "hangs"}}"#);
    directory.helper("hangs", r#"sleep 600 & echo $! > "$0.part"; mv "$0.part" "$0.$(cat)"; wait"#);
    let child = async |server: &str| {
        let file = directory.0.path().join(format!("docker-credential-hangs.{server}"));
        let started = async {
            loop {
                match fs::read_to_string(&file) {
                    Ok(id) => break id.trim().to_owned(),
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), started).await.expect("the helper starts")
    };
    let ended = async |process: String| {
        let limit = Instant::now() + Duration::from_secs(60);
        // A killed process stays until its parent takes notice of it.
        while fs::read_to_string(Path::new("/proc").join(&process).join("stat"))
            .is_ok_and(|stat| !stat.contains(") Z "))
        {
            assert!(Instant::now() < limit, "{process} still runs");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    // At the limit.
    let mut config = directory.config();
    config.helpers.limit = Duration::from_secs(1);
    let (found, process) = tokio::join!(config.credentials("r.example/x", "alice"), child("r.example"));
    assert_eq!(
        shown(found),
        "the credentials for r.example: docker-credential-hangs has not responded within 1s"
    );
    ended(process).await;
    // When nobody waits any more.
    let config = directory.config();
    let process = tokio::select! {
        found = config.credentials("o.example/x", "alice") => panic!("{}", shown(found)),
        process = child("o.example") => process,
    };
    ended(process).await;
    // Others do not wait for it.
    assert_eq!(shown(config.credentials("unused.example/x", "alice").await), "none");
}

#[tokio::test]
async fn a_broken_file_is_an_error_without_its_content() {
    let directory = Directory::new("");
    let config = directory.config();
    for (content, reason) in [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("\u{feff}{\"auths\": {}}", "it is not JSON: see line 1, column 1"),
        ("{\"auths\": {},}", "it is not JSON: see line 1, column 14"),
        ("{\"auths\": {}", "it is not JSON: see line 1, column 12"),
        ("{\"auths\": \"sesame\"}", "it is not a Docker configuration"),
    ] {
        directory.write(content);
        let expected = format!("the credentials for r.example: config.json: {reason}");
        assert_eq!(shown(config.credentials("r.example/x", "alice").await), expected);
        assert!(config.proxy_arguments("unix:///x").is_empty());
        // One change of the file, one line in the log.
        let logged = *config.logged.lock().expect("nothing panicked");
        assert!(logged.is_some());
        assert_eq!(shown(config.credentials("r.example/x", "alice").await), expected);
        assert_eq!(*config.logged.lock().expect("nothing panicked"), logged);
    }
    for auth in ["sesame", "c2VzYW1l", "OnNlc2FtZQ=="] {
        directory.write(&format!(r#"{{"auths": {{"r.example": {{"auth": "{auth}"}}}}}}"#));
        let expected = "the credentials for r.example: `auth` is not a user and a password in base64";
        assert_eq!(shown(config.credentials("r.example/x", "alice").await), expected);
        assert_eq!(shown(config.credentials("other.example/x", "alice").await), "none");
    }
    assert_eq!(*config.logged.lock().expect("nothing panicked"), None);
    fs::remove_file(directory.0.path().join("config.json")).expect("a file");
    assert_eq!(shown(config.credentials("r.example/x", "alice").await), "none");
    directory.write(&" ".repeat(2 * 1024 * 1024));
    assert!(
        shown(config.credentials("r.example/x", "alice").await).contains("it is larger than 1048576 bytes")
    );
}

#[test]
fn credentials_are_not_shown() {
    let shown = format!(
        "{:?}",
        Credentials::IdentityToken {
            token: "sesame".to_owned(),
            user: String::new(),
            password: String::new(),
        }
    );
    assert!(!shown.contains("sesame"));
}

#[test]
fn proxies_become_build_arguments() {
    let directory = Directory::new(
        r#"{"proxies": {"default": {"httpProxy": "http://p:1", "noProxy": "a,b"},
                        "tcp://e:2375": {"allProxy": "socks5://p:2", "ftpProxy": null}}}"#,
    );
    let arguments = |engine: &str| {
        let mut arguments: Vec<String> = directory
            .config()
            .proxy_arguments(engine)
            .into_iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        arguments.sort();
        arguments
    };
    assert_eq!(
        arguments("unix:///x"),
        ["HTTP_PROXY=http://p:1", "NO_PROXY=a,b", "http_proxy=http://p:1", "no_proxy=a,b"]
    );
    assert_eq!(arguments("tcp://e:2375"), ["ALL_PROXY=socks5://p:2", "all_proxy=socks5://p:2"]);
}
