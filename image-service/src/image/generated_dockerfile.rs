//! The Dockerfile of a configuration and the files that its COPY instructions refer to, hand-written or
//! generated.
//!
//! Equal configurations give equal bytes. What changes rarely comes first, so that the engine's cache is
//! effective. Every value is quoted or has a form that needs no quoting, so that it cannot become an
//! instruction or a command of its own.

use std::{collections::BTreeSet, fmt::Write};

use super::configuration::{
    Configuration, Dockerfile, File, Generate, GeneratedStep, Secret, Service, Source,
};
use crate::error::Refusal;

mod entry_point;

/// A Dockerfile and the files beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) text: String,
    pub(crate) files: Vec<File>,
}

/// Directory of the image's files in the context, where each has a number for its name.
const FILES: &str = "trailer/files";
/// Path of the entry point in the context.
const ENTRY_POINT: &str = "trailer/entrypoint";
/// Path of the entry point in the image.
const ENTRY_POINT_IN_IMAGE: &str = "/usr/local/bin/trailer-entrypoint";
const PYTHON: &str = "/opt/venv";

impl Configuration {
    /// Returns the Dockerfile and its files for display.
    ///
    /// # Errors
    ///
    /// Returns [`Refusal::PulledNotWritten`] for a pulled image, and [`Refusal::DockerfileInContext`] if only
    /// the engine sees the Dockerfile.
    pub(crate) fn rendered(&self) -> Result<Written, Refusal> {
        let written = self.written().ok_or(Refusal::PulledNotWritten)?;
        // Only the engine sees it, in an archive or at a URL.
        if written.text.trim().is_empty() { Err(Refusal::DockerfileInContext) } else { Ok(written) }
    }

    /// Returns the Dockerfile and its files, or `None` for a pulled image.
    ///
    /// The text is empty if the Dockerfile is in the context.
    pub(crate) fn written(&self) -> Option<Written> {
        match &self.source {
            Source::Dockerfile(Dockerfile { text, files, .. }) => {
                Some(Written { text: text.clone(), files: files.clone() })
            }
            Source::Generate(generate) => Some(render(generate, &self.services, &self.secrets)),
            Source::Pull(_) => None,
        }
    }
}

fn render(generate: &Generate, services: &[Service], secrets: &[Secret]) -> Written {
    let Generate { base_image, apt_packages, python_packages, environment, user, start_commands, files } =
        generate;
    let has_entry_point = !services.is_empty() || !start_commands.is_empty();
    let mut lines = vec![format!("FROM {base_image}")];
    if !user.is_empty() {
        // The base image may run as a user that cannot install anything.
        lines.push("USER root".to_owned());
    }
    let mut packages: BTreeSet<&str> = apt_packages.iter().map(String::as_str).collect();
    packages.extend(services.iter().flat_map(|service| service.packages.iter().map(String::as_str)));
    if has_entry_point {
        packages.insert("tini");
    }
    if !python_packages.is_empty() {
        packages.extend(["ca-certificates", "python3", "python3-venv"]);
    }
    if !packages.is_empty() {
        let run = run(secrets, GeneratedStep::AptPackages);
        lines.push(format!(
            "{run} apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends{} \\\n && rm -rf /var/lib/apt/lists/*",
            words(packages)
        ));
    }
    if !python_packages.is_empty() {
        let wanted: BTreeSet<&str> = python_packages.iter().map(String::as_str).collect();
        let run = run(secrets, GeneratedStep::PythonPackages);
        lines.push(format!(
            "{run} python3 -m venv {PYTHON} && {PYTHON}/bin/pip install --no-cache-dir{}",
            words(wanted)
        ));
        lines.push(format!("ENV PATH=\"{PYTHON}/bin:$PATH\""));
    }
    if !user.is_empty() {
        let user = quoted(user);
        lines.push(format!(
            "RUN id -u {user} >/dev/null 2>&1 || useradd --create-home --shell \"$(command -v bash || echo /bin/sh)\" {user}"
        ));
    }
    lines.extend(environment.iter().map(|(name, value)| format!("ENV {name}=\"{}\"", escaped(value))));
    let ports: BTreeSet<i32> = services.iter().flat_map(|service| service.ports.iter().copied()).collect();
    if !ports.is_empty() {
        let ports: Vec<String> = ports.iter().map(i32::to_string).collect();
        lines.push(format!("EXPOSE {}", ports.join(" ")));
    }
    let mut context = Vec::new();
    let mut by_path: Vec<&File> = files.iter().collect();
    by_path.sort_by(|a, b| a.path.cmp(&b.path));
    for (number, file) in by_path.into_iter().enumerate() {
        let path = format!("{FILES}/{number}");
        lines.push(copy(&path, &file.path));
        context.push(File { path, ..file.clone() });
    }
    if has_entry_point {
        lines.push(copy(ENTRY_POINT, ENTRY_POINT_IN_IMAGE));
        let content = entry_point::script(start_commands, services).into_bytes();
        context.push(File { path: ENTRY_POINT.to_owned(), content, executable: true });
    }
    if !user.is_empty() {
        lines.push(format!("USER {user}"));
    }
    if has_entry_point {
        lines.push(format!("ENTRYPOINT [\"/usr/bin/tini\", \"-g\", \"--\", \"{ENTRY_POINT_IN_IMAGE}\"]"));
        lines.push("CMD [\"sleep\", \"infinity\"]".to_owned());
    }
    let mut text = String::new();
    for line in lines {
        text.push_str(&line);
        text.push('\n');
    }
    Written { text, files: context }
}

/// Returns the begin of a step's instruction, up to its command, which mounts the secrets of the step.
fn run(secrets: &[Secret], step: GeneratedStep) -> String {
    let mut run = "RUN".to_owned();
    let mut exports = String::new();
    for Secret { id, file, environment, .. } in
        secrets.iter().filter(|secret| secret.steps.contains(&Some(step)))
    {
        // Writing to a String cannot fail.
        let _ = write!(run, " --mount=type=secret,id={id},required=true");
        if environment.is_empty() {
            let _ = write!(run, ",target={file}");
        } else {
            let _ = write!(exports, " export {environment}=\"$(cat /run/secrets/{id})\" &&");
        }
    }
    run + &exports
}

/// Quotes words for a shell, each on its own line because the engine rejects lines of over 64 KiB.
fn words<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    texts.into_iter().fold(String::new(), |mut all, text| {
        // Writing to a String cannot fail.
        let _ = write!(all, " \\\n    {}", quoted(text));
        all
    })
}

/// Quotes a text as one word of a POSIX shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// Escapes a text for use within double quotes in an instruction.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '\\' | '"' | '$') {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

/// Returns the instruction that copies one file.
///
/// The engine expands variables and quotes in both paths, even in the JSON form; `source` has none.
fn copy(source: &str, target: &str) -> String {
    let mut word = String::with_capacity(target.len());
    for character in target.chars() {
        if matches!(character, '\\' | '"' | '\'' | '$') {
            word.push('\\');
        }
        word.push(character);
    }
    // Paths have no control characters, so JSON needs no other escapes.
    let word = word.replace('\\', "\\\\").replace('"', "\\\"");
    format!("COPY [\"{source}\", \"{word}\"]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::configuration::ConfigurationDraft;

    fn file(path: &str) -> File {
        File { path: path.to_owned(), content: b"x".to_vec(), executable: path.ends_with(".sh") }
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn full() -> (Generate, Vec<Service>) {
        let generate = Generate {
            base_image: "debian:12".to_owned(),
            apt_packages: strings(&["vim", "git"]),
            python_packages: strings(&["uvicorn[standard]>=0.30,<1"]),
            environment: [("GREETING".to_owned(), "say \"$HOME\" \\ and 'go'".to_owned())].into(),
            user: "dev".to_owned(),
            start_commands: strings(&["echo 'it is up'"]),
            files: vec![file("/usr/bin/x.sh"), file("/etc/$a 'b' \\c\"")],
        };
        let service = |name: &str, port| Service {
            name: name.to_owned(),
            packages: strings(&["git", "nginx"]),
            command: format!("{name} --port \"$PORT\""),
            ports: vec![port, 80],
            environment: [("PORT".to_owned(), format!("{port}'s"))].into(),
        };
        (generate, vec![service("web", 8080), service("api", 9090)])
    }

    #[test]
    fn everything_has_its_place() {
        let (generate, services) = full();
        let Written { text, files } = render(&generate, &services, &[]);
        let expected = r#"FROM debian:12
USER root
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    'ca-certificates' \
    'git' \
    'nginx' \
    'python3' \
    'python3-venv' \
    'tini' \
    'vim' \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir \
    'uvicorn[standard]>=0.30,<1'
ENV PATH="/opt/venv/bin:$PATH"
RUN id -u 'dev' >/dev/null 2>&1 || useradd --create-home --shell "$(command -v bash || echo /bin/sh)" 'dev'
ENV GREETING="say \"\$HOME\" \\ and 'go'"
EXPOSE 80 8080 9090
COPY ["trailer/files/0", "/etc/\\$a \\'b\\' \\\\c\\\""]
COPY ["trailer/files/1", "/usr/bin/x.sh"]
COPY ["trailer/entrypoint", "/usr/local/bin/trailer-entrypoint"]
USER dev
ENTRYPOINT ["/usr/bin/tini", "-g", "--", "/usr/local/bin/trailer-entrypoint"]
CMD ["sleep", "infinity"]
"#;
        assert_eq!(text, expected);
        let context: Vec<(&str, bool)> =
            files.iter().map(|file| (file.path.as_str(), file.executable)).collect();
        let expected = [("trailer/files/0", false), ("trailer/files/1", true), ("trailer/entrypoint", true)];
        assert_eq!(context, expected);
        let script = String::from_utf8_lossy(&files[2].content).into_owned();
        let expected = r#"#!/bin/sh
# Runs the start-up commands one after the other, starts the services, and becomes the given command.
sh -c 'echo '\''it is up'\''' || echo "trailer: start-up command 1 has ended with status $?" >&2
(
  export PORT='8080'\''s'
  sh -c 'web --port "$PORT"'
  echo "trailer: the service web has ended with status $?" >&2
) &
(
  export PORT='9090'\''s'
  sh -c 'api --port "$PORT"'
  echo "trailer: the service api has ended with status $?" >&2
) &
exec "$@"
"#;
        assert_eq!(script, expected);
    }

    #[test]
    fn order_counts_only_where_it_has_a_meaning() {
        let (mut generate, services) = full();
        let before = render(&generate, &services, &[]);
        generate.apt_packages.reverse();
        generate.files.reverse();
        assert_eq!(render(&generate, &services, &[]), before);
        generate.start_commands.push("echo second".to_owned());
        assert_ne!(render(&generate, &services, &[]), before);
    }

    #[test]
    fn secrets_are_mounted_by_the_steps_that_read_them() {
        let secret = |id: &str, steps: &[GeneratedStep], file: &str, environment: &str| Secret {
            id: id.to_owned(),
            name: "n".to_owned(),
            steps: steps.iter().copied().map(Some).collect(),
            file: file.to_owned(),
            environment: environment.to_owned(),
        };
        let (apt, python) = (GeneratedStep::AptPackages, GeneratedStep::PythonPackages);
        let secrets = [
            secret("auth", &[apt], "/etc/apt/auth.conf.d/x.conf", ""),
            secret("index", &[apt, python], "", "PIP_INDEX_URL"),
            secret("conf", &[python], "/etc/pip.conf", ""),
        ];
        let generate = Generate {
            base_image: "debian:12".to_owned(),
            python_packages: strings(&["x"]),
            ..Generate::default()
        };
        let Written { text, .. } = render(&generate, &[], &secrets);
        let runs: Vec<&str> = text.lines().filter(|line| line.starts_with("RUN")).collect();
        assert_eq!(
            runs,
            [
                "RUN --mount=type=secret,id=auth,required=true,target=/etc/apt/auth.conf.d/x.conf --mount=type=secret,id=index,required=true \
                 export PIP_INDEX_URL=\"$(cat /run/secrets/index)\" && apt-get update && DEBIAN_FRONTEND=noninteractive \
                 apt-get install -y --no-install-recommends \\",
                "RUN --mount=type=secret,id=index,required=true --mount=type=secret,id=conf,required=true,target=/etc/pip.conf \
                 export PIP_INDEX_URL=\"$(cat /run/secrets/index)\" && python3 -m venv /opt/venv && \
                 /opt/venv/bin/pip install --no-cache-dir \\",
            ]
        );
    }

    #[test]
    fn absent_options_add_no_instructions() {
        let generate = Generate { base_image: "alpine".to_owned(), ..Generate::default() };
        let written = render(&generate, &[], &[]);
        assert_eq!((written.text.as_str(), written.files.len()), ("FROM alpine\n", 0));
    }

    #[test]
    fn a_given_dockerfile_is_not_changed() {
        let source =
            Dockerfile { text: "FROM x".to_owned(), files: vec![file("a")], ..Dockerfile::default() };
        let mut violations = crate::error::Violations::default();
        let draft = ConfigurationDraft::from_source(Source::Dockerfile(source));
        let written = Configuration::parse(draft, "config", &mut violations).written();
        assert_eq!(written, Some(Written { text: "FROM x".to_owned(), files: vec![file("a")] }));
    }
}
