use super::*;
use crate::image::configuration::Pull;

fn violations(draft: ConfigurationDraft) -> Vec<String> {
    let mut violations = Violations::default();
    Configuration::parse(draft, "config", &mut violations);
    violations.iter().map(|v| v.field.clone()).collect()
}

fn dockerfile(text: &str, paths: &[&str]) -> ConfigurationDraft {
    let file = |path: &&str| File { path: (*path).to_owned(), content: Vec::new(), executable: false };
    let files = paths.iter().map(file).collect();
    let source = Dockerfile { text: text.to_owned(), files, ..Dockerfile::default() };
    ConfigurationDraft::from_source(Source::Dockerfile(source))
}

#[test]
fn a_good_configuration_violates_nothing() {
    assert_eq!(violations(dockerfile("FROM scratch", &["a", "b/c", "b/d.txt", "..e/f"])), [""; 0]);
    assert_eq!(violations(ConfigurationDraft::from_source(Source::Generate(Generate::default()))), [""; 0]);
    let pull = Pull { reference: "nginx".to_owned() };
    assert_eq!(violations(ConfigurationDraft::from_source(Source::Pull(pull))), [""; 0]);
}

#[test]
fn all_violations_are_found_together() {
    let found = violations(dockerfile("", &["", "/etc/passwd", "Dockerfile", "x", "x", "x/y"]));
    assert_eq!(found.len(), 6, "{found:#?}");
    let bad = |text: &str| vec![text.to_owned()];
    let pair = |name: &str, value: &str| [(name.to_owned(), value.to_owned())].into();
    let generate = Generate {
        base_image: "not an image".to_owned(),
        apt_packages: bad("-y"),
        python_packages: bad("-r x"),
        environment: pair("1", "two\nlines"),
        user: "no user".to_owned(),
        start_commands: bad("two\nlines"),
        files: vec![File { path: "relative".to_owned(), content: Vec::new(), executable: false }],
    };
    let service = Service {
        name: "X".to_owned(),
        packages: bad("X"),
        command: String::new(),
        ports: vec![0, 80, 80],
        environment: pair("A", "\0"),
    };
    let draft = ConfigurationDraft {
        services: vec![service],
        worker: "\n".to_owned(),
        worker_labels: pair("", "x"),
        build_timeout_ms: Some(-1),
        ..ConfigurationDraft::from_source(Source::Generate(generate))
    };
    assert_eq!(
        violations(draft),
        [
            "config.generate.base_image",
            "config.generate.apt_packages[0]",
            "config.generate.python_packages[0]",
            "config.generate.environment[\"1\"]",
            "config.generate.environment[\"1\"]",
            "config.generate.user",
            "config.generate.start_commands[0]",
            "config.generate.files[0].path",
            "config.services[0].name",
            "config.services[0].packages[0]",
            "config.services[0].command",
            "config.services[0].environment[\"A\"]",
            "config.services[0].ports[0]",
            "config.services[0].ports[2]",
            "config.worker",
            "config.worker_labels[\"\"]",
            "config.build_timeout",
        ]
    );
}

#[test]
fn a_build_has_one_context_and_one_dockerfile() {
    let digest = format!("sha256:{}", "0a".repeat(32));
    let found = |text: &str, files: &[&str], archive: &str, remote: &str, path: &str| {
        let mut draft = dockerfile(text, files);
        if let Source::Dockerfile(dockerfile) = &mut draft.source {
            archive.clone_into(&mut dockerfile.archive);
            remote.clone_into(&mut dockerfile.remote);
            path.clone_into(&mut dockerfile.dockerfile_path);
        }
        violations(draft).into_iter().map(|field| field.replace("config.dockerfile.", "")).collect::<Vec<_>>()
    };
    let (text, remote) = ("FROM scratch", "https://git.example/x.git#main:docker");
    for good in [
        found(text, &[], &digest, "", ""),
        found("", &[], &digest, "", ""),
        found("", &[], &digest, "", "docker/Dockerfile.dev"),
        found("", &[], "", remote, ""),
        found("", &[], "", remote, "a/Dockerfile"),
    ] {
        assert_eq!(good, [""; 0]);
    }
    assert_eq!(found(text, &["a"], &digest, "", ""), ["files"]);
    assert_eq!(found("", &[], &digest, remote, ""), ["remote"]);
    assert_eq!(found("", &["a"], "", remote, ""), ["files"]);
    assert_eq!(found(text, &[], "", remote, ""), ["text"]);
    assert_eq!(found("", &[], "", "", ""), ["text"]);
    assert_eq!(found(text, &[], &digest, "", "Dockerfile"), ["dockerfile_path"]);
    assert_eq!(found(text, &[], "", "", "Dockerfile"), ["dockerfile_path"]);
    assert_eq!(found("", &[], &digest, "", "../Dockerfile"), ["dockerfile_path"]);
    assert_eq!(found("", &[], "sha256:1", "", ""), ["archive"]);
    assert_eq!(found("", &[], "", "ftp://x/y", ""), ["remote"]);
}

#[test]
fn a_blank_dockerfile_is_none() {
    let archive = format!("sha256:{}", "0a".repeat(32));
    let blank = Dockerfile { text: " \n\t".to_owned(), archive, ..Dockerfile::default() };
    let draft = ConfigurationDraft::from_source(Source::Dockerfile(blank.clone()));
    let parsed = Configuration::parse(draft, "config", &mut Violations::default());
    let none = Dockerfile { text: String::new(), ..blank };
    assert_eq!(parsed.source, Source::Dockerfile(none));
    assert_eq!(violations(dockerfile(" \n\t", &[])), ["config.dockerfile.text"]);
}

#[test]
fn the_size_is_bounded() {
    assert_eq!(violations(dockerfile(&"#".repeat(256 * 1024 - 4), &[])), [""; 0]);
    assert_eq!(violations(dockerfile(&"#".repeat(256 * 1024 - 4), &["a"])), ["config"]);
}
