//! Hostile values in configurations: the generated Dockerfile says what was meant and nothing else, as
//! third-party parsers of Dockerfiles and shells read it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use parse_dockerfile::{Command, Instruction, Source as CopySource};
use proto::images::{
    ContextFile, GenerateSource, ImageConfig, ImageFile, RenderDockerfileRequest, RenderDockerfileResponse,
    WorkspaceService, image_config::Source, render_dockerfile_request::Subject,
};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::stack::Service;

const PIECES: [&str; 34] = [
    "'",
    "\"",
    "\\",
    "\\\\",
    "`",
    "$(id)",
    "${HOME}",
    "$HOME",
    "$",
    "<<EOF",
    "\nEOF\n",
    "\n",
    "\r\n",
    "\0",
    "# escape=`",
    "#syntax=x/y",
    "\nRUN id\n",
    "\\\n",
    " ",
    "\t",
    "a",
    "word",
    "=",
    "é",
    "🦀",
    "\u{2028}",
    "\u{85}",
    ";",
    "&&",
    "|",
    "[\"a\", \"b\"]",
    "--mount=type=secret",
    "*",
    "~",
];

struct Random(fastrand::Rng);

impl Random {
    fn hostile(&mut self) -> String {
        (0..self.0.usize(0..6)).map(|_| PIECES[self.0.usize(0..PIECES.len())]).collect()
    }

    /// Returns `good` or, now and then, a hostile text.
    fn or_hostile(&mut self, good: &str) -> String {
        if self.0.u8(0..12) == 0 { self.hostile() } else { good.to_owned() }
    }

    /// Returns a hostile text, mostly of one line.
    fn line(&mut self) -> String {
        let text = self.hostile();
        if self.0.u8(0..12) == 0 { text } else { text.replace(['\n', '\r', '\0'], "") }
    }

    fn variables(&mut self) -> BTreeMap<String, String> {
        (0..self.0.usize(0..3)).map(|i| (self.or_hostile(&format!("NAME_{i}")), self.line())).collect()
    }

    fn config(&mut self) -> ImageConfig {
        let files = (0..self.0.usize(0..3)).map(|i| {
            let name = self.line().replace(['/', '\t', '\u{85}'], "");
            ImageFile {
                path: format!("/{i}/x{name}"),
                content: self.hostile().into_bytes().into(),
                executable: self.0.bool(),
            }
        });
        let files = files.collect();
        let generate = GenerateSource {
            base_image: self.or_hostile("debian:12"),
            apt_packages: (0..self.0.usize(0..3)).map(|i| self.or_hostile(&format!("package-{i}"))).collect(),
            python_packages: (0..self.0.usize(0..3))
                .map(|i| self.or_hostile(&format!("python{i}>=1,<2")))
                .collect(),
            environment: self.variables(),
            user: if self.0.bool() { self.or_hostile("dev") } else { String::new() },
            start_commands: (0..self.0.usize(0..3)).map(|_| format!("x{}", self.line())).collect(),
            files,
        };
        let services = (0..self.0.usize(0..3)).map(|i| WorkspaceService {
            name: self.or_hostile(&format!("service-{i}")),
            packages: vec![self.or_hostile("nginx")],
            command: format!("x{}", self.line()),
            ports: vec![i32::from(self.0.u16(1..=65_535))],
            environment: self.variables(),
        });
        let services = services.collect();
        ImageConfig { source: Some(Source::Generate(generate)), services, ..ImageConfig::default() }
    }
}

/// Returns the inside of a quoted value as the engine reads it.
fn unquoted(text: &str) -> anyhow::Result<String> {
    let inside = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).context("it is quoted")?;
    let mut value = String::new();
    let mut characters = inside.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => match characters.next().context("nothing is escaped")? {
                escaped @ ('\\' | '"' | '$') => value.push(escaped),
                other => anyhow::bail!("{other:?} needs no escape"),
            },
            '"' | '$' => anyhow::bail!("{character:?} is not escaped in {text}"),
            character => value.push(character),
        }
    }
    Ok(value)
}

/// Unescapes a word as the engine does: a backslash makes the next character literal.
fn unescaped(word: &str) -> String {
    let mut characters = word.chars();
    let mut value = String::new();
    while let Some(character) = characters.next() {
        value.extend(if character == '\\' { characters.next() } else { Some(character) });
    }
    value
}

/// Returns an instruction in words, as the parsers read it.
#[expect(clippy::wildcard_enum_match_arm, reason = "whatever else there is nobody wants")]
fn words_of(instruction: &Instruction<'_>, text: &str) -> anyhow::Result<Vec<String>> {
    let line_of = |keyword: &str, words: Vec<String>| [vec![keyword.to_owned()], words].concat();
    let command = |command: &Command<'_>| -> anyhow::Result<Vec<String>> {
        Ok(match command {
            Command::Exec(words) => words.value.iter().map(|word| word.value.clone().into_owned()).collect(),
            Command::Shell(line) => {
                shlex::split(&line.value.replace("\\\n", " ")).context("words of a shell")?
            }
            other => anyhow::bail!("an unknown form of a command: {other:?}"),
        })
    };
    Ok(match instruction {
        Instruction::From(from) if from.options.is_empty() && from.as_.is_none() => {
            line_of("FROM", vec![from.image.value.clone().into_owned()])
        }
        Instruction::User(user) => line_of("USER", vec![user.arguments.value.clone().into_owned()]),
        Instruction::Run(run) if run.options.is_empty() && run.here_docs.is_empty() => {
            line_of("RUN", command(&run.arguments)?)
        }
        Instruction::Env(env) => {
            let line = &text[env.arguments.span.clone()];
            let (name, value) = line.split_once('=').context("a name and a value")?;
            if name == "PATH" {
                line_of("ENV", vec![line.to_owned()])
            } else {
                line_of("ENV", vec![name.to_owned(), unquoted(value)?])
            }
        }
        Instruction::Expose(expose) => {
            line_of("EXPOSE", expose.arguments.iter().map(|port| port.value.clone().into_owned()).collect())
        }
        Instruction::Copy(copy) if copy.options.is_empty() => {
            let [CopySource::Path(source)] = copy.src.as_slice() else {
                anyhow::bail!("one source: {copy:?}")
            };
            line_of("COPY", vec![source.value.clone().into_owned(), unescaped(&copy.dest.value)])
        }
        Instruction::Entrypoint(entry_point) => line_of("ENTRYPOINT", command(&entry_point.arguments)?),
        Instruction::Cmd(cmd) => line_of("CMD", command(&cmd.arguments)?),
        other => anyhow::bail!("nobody wants {other:?}"),
    })
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

/// Returns the instructions that the Dockerfile of a configuration must have, in words.
fn meant(generate: &GenerateSource, services: &[WorkspaceService]) -> Vec<Vec<String>> {
    let has_entry_point = !services.is_empty() || !generate.start_commands.is_empty();
    let base = if generate.base_image.is_empty() { "ubuntu:24.04" } else { &generate.base_image };
    let mut all = vec![vec!["FROM".to_owned(), base.to_owned()]];
    let user = &generate.user;
    if !user.is_empty() {
        all.push(words("USER root"));
    }
    let mut packages: BTreeSet<String> = generate.apt_packages.iter().cloned().collect();
    packages.extend(services.iter().flat_map(|service| service.packages.clone()));
    packages.extend(has_entry_point.then(|| "tini".to_owned()));
    if !generate.python_packages.is_empty() {
        packages.extend(words("ca-certificates python3 python3-venv"));
    }
    if !packages.is_empty() {
        let install =
            "RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends";
        all.push(
            [words(install), packages.into_iter().collect(), words("&& rm -rf /var/lib/apt/lists/*")]
                .concat(),
        );
    }
    if !generate.python_packages.is_empty() {
        let wanted: BTreeSet<String> = generate.python_packages.iter().cloned().collect();
        let install = "RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir";
        all.push([words(install), wanted.into_iter().collect()].concat());
        all.push(words("ENV PATH=\"/opt/venv/bin:$PATH\""));
    }
    if !user.is_empty() {
        let shell = "$(command -v bash || echo /bin/sh)";
        let words = format!("RUN id -u {user} >/dev/null 2>&1 || useradd --create-home --shell");
        all.push([self::words(&words), vec![shell.to_owned(), user.clone()]].concat());
    }
    for (name, value) in &generate.environment {
        all.push(vec!["ENV".to_owned(), name.clone(), value.clone()]);
    }
    let ports: BTreeSet<i32> = services.iter().flat_map(|service| service.ports.clone()).collect();
    if !ports.is_empty() {
        all.push([words("EXPOSE"), ports.iter().map(i32::to_string).collect()].concat());
    }
    let mut paths: Vec<&str> = generate.files.iter().map(|file| file.path.as_str()).collect();
    paths.sort_unstable();
    for (number, path) in paths.into_iter().enumerate() {
        all.push(vec!["COPY".to_owned(), format!("trailer/files/{number}"), path.to_owned()]);
    }
    if has_entry_point {
        all.push(words("COPY trailer/entrypoint /usr/local/bin/trailer-entrypoint"));
    }
    if !user.is_empty() {
        all.push(vec!["USER".to_owned(), user.clone()]);
    }
    if has_entry_point {
        all.push(words("ENTRYPOINT /usr/bin/tini -g -- /usr/local/bin/trailer-entrypoint"));
        all.push(words("CMD sleep infinity"));
    }
    all
}

/// Returns the lines that the script of an image must have, in words.
fn meant_to_run(generate: &GenerateSource, services: &[WorkspaceService]) -> Vec<Vec<String>> {
    let reported = |prefix: Vec<String>, what: String, suffix: &[&str]| {
        let report = vec!["echo".to_owned(), format!("trailer: {what} has ended with status $?")];
        [prefix, report, suffix.iter().map(|word| (*word).to_owned()).collect()].concat()
    };
    let run = |command: &str| vec!["sh".to_owned(), "-c".to_owned(), command.to_owned()];
    let mut all = Vec::new();
    for (number, command) in (1..).zip(&generate.start_commands) {
        let run = [run(command), vec!["||".to_owned()]].concat();
        all.push(reported(run, format!("start-up command {number}"), &[">&2"]));
    }
    for service in services {
        all.push(words("("));
        for (name, value) in &service.environment {
            all.push(vec!["export".to_owned(), format!("{name}={value}")]);
        }
        all.push(run(&service.command));
        all.push(reported(Vec::new(), format!("the service {}", service.name), &[">&2"]));
        all.push(words(") &"));
    }
    all.push(words("exec $@"));
    all
}

fn check(config: &ImageConfig, rendered: &RenderDockerfileResponse) -> anyhow::Result<()> {
    let Some(Source::Generate(generate)) = &config.source else { anyhow::bail!("it is generated") };
    let text = &rendered.dockerfile;
    let parsed = parse_dockerfile::parse(text).map_err(|error| anyhow::anyhow!("{error}"))?;
    let directives = &parsed.parser_directives;
    anyhow::ensure!(
        directives.syntax.is_none() && directives.escape.is_none(),
        "a directive: {directives:?}"
    );
    let found = parsed.instructions.iter().map(|instruction| words_of(instruction, text));
    assert_eq!(found.collect::<anyhow::Result<Vec<_>>>()?, meant(generate, &config.services));
    let mut files: Vec<&ImageFile> = generate.files.iter().collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let (scripts, others): (Vec<&ContextFile>, Vec<&ContextFile>) =
        rendered.files.iter().partition(|file| file.path == "trailer/entrypoint");
    let found = others.iter().map(|file| (&file.content, file.executable));
    assert!(found.eq(files.iter().map(|file| (&file.content, file.executable))), "{:?}", rendered.files);
    for script in scripts {
        let script = std::str::from_utf8(&script.content)?;
        let lines = script.lines().filter(|line| !line.starts_with('#'));
        let run = lines.map(|line| shlex::split(line).with_context(|| format!("words of a shell: {line}")));
        assert_eq!(run.collect::<anyhow::Result<Vec<_>>>()?, meant_to_run(generate, &config.services));
    }
    Ok(())
}

/// Returns the fields of a configuration whose texts may be invalid.
fn suspects(config: &ImageConfig) -> BTreeSet<String> {
    let is_line = |text: &str| !text.contains(['\n', '\r', '\0']);
    let Some(Source::Generate(generate)) = &config.source else { return BTreeSet::new() };
    let mut suspects = BTreeSet::new();
    let mut suspect = |field: String, is_good: bool| {
        if !is_good {
            suspects.insert(field);
        }
    };
    suspect(
        "config.generate.base_image".to_owned(),
        ["", "debian:12"].contains(&generate.base_image.as_str()),
    );
    suspect("config.generate.user".to_owned(), ["", "dev"].contains(&generate.user.as_str()));
    for (i, package) in generate.apt_packages.iter().enumerate() {
        suspect(format!("config.generate.apt_packages[{i}]"), package.starts_with("package-"));
    }
    for (i, package) in generate.python_packages.iter().enumerate() {
        suspect(format!("config.generate.python_packages[{i}]"), package.starts_with("python"));
    }
    for (name, value) in &generate.environment {
        suspect(
            format!("config.generate.environment[{name:?}]"),
            name.starts_with("NAME_") && is_line(value),
        );
    }
    for (i, command) in generate.start_commands.iter().enumerate() {
        suspect(format!("config.generate.start_commands[{i}]"), is_line(command));
    }
    for (i, file) in generate.files.iter().enumerate() {
        suspect(format!("config.generate.files[{i}].path"), is_line(&file.path));
    }
    for (i, service) in config.services.iter().enumerate() {
        let field = format!("config.services[{i}]");
        suspect(format!("{field}.name"), service.name.starts_with("service-"));
        suspect(format!("{field}.packages[0]"), service.packages == ["nginx"]);
        suspect(format!("{field}.command"), is_line(&service.command));
        for (name, value) in &service.environment {
            suspect(format!("{field}.environment[{name:?}]"), name.starts_with("NAME_") && is_line(value));
        }
    }
    suspects
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_is_refused_or_says_what_was_meant() -> anyhow::Result<()> {
    let seed = std::env::var("TRAILER_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mut random = Random(fastrand::Rng::with_seed(seed));
    let (mut refused, mut accepted) = (0, 0);
    for _ in 0..1_500 {
        let config = random.config();
        let request = RenderDockerfileRequest { subject: Some(Subject::Config(config.clone())) };
        let suspects = suspects(&config);
        match alice.images.clone().render_dockerfile(request).await {
            Ok(rendered) => {
                accepted += 1;
                check(&config, &rendered.into_inner())
                    .with_context(|| format!("seed {seed}: {config:#?}"))?;
            }
            Err(status) => {
                refused += 1;
                assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
                let violations = status.get_details_bad_request().context("fields")?.field_violations;
                assert!(!violations.is_empty());
                for violation in violations {
                    assert!(suspects.contains(&violation.field), "seed {seed}: {violation:?} of {config:#?}");
                    assert!(violation.description.starts_with("must"), "{violation:?}");
                }
            }
        }
    }
    assert!(accepted > 300 && refused > 300, "{accepted} and {refused}");
    Ok(())
}
