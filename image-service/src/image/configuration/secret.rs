//! Secrets and SSH agents of workers, which a configuration knows by name only.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{
    Source,
    rules::{self, Rule},
};
use crate::error::Violations;

/// A secret that steps of a build may read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Secret {
    /// Name in the configuration.
    pub(crate) id: String,
    /// Name at the worker.
    pub(crate) name: String,
    /// Steps of a generated Dockerfile that read it; `None` for one that does not exist.
    pub(crate) steps: Vec<Option<GeneratedStep>>,
    /// Path at which these steps find it; empty if they see it in their environment.
    pub(crate) file: String,
    /// Variable by which these steps see it; empty if they find it in a file.
    pub(crate) environment: String,
}

/// A step of a generated Dockerfile.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum GeneratedStep {
    AptPackages,
    PythonPackages,
}

/// An SSH agent that steps of a build may use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SshAgent {
    /// Name in the configuration.
    pub(crate) id: String,
    /// Name at the worker.
    pub(crate) name: String,
}

const MAX_SECRETS: usize = 16;
const MAX_AGENTS: usize = 4;
/// Maximum length of the id of a secret.
const MAX_ID: usize = 64;

impl Secret {
    /// Returns the field by which a step could not see both secrets.
    fn conflict_with(&self, other: &Self) -> Option<&'static str> {
        let is_below =
            |path: &str, above: &str| path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'));
        let (file, of_other) = (&*self.file, &*other.file);
        if !file.is_empty() && (file == of_other || is_below(file, of_other) || is_below(of_other, file)) {
            return Some("file");
        }
        (!self.environment.is_empty() && self.environment == other.environment).then_some("environment")
    }

    pub(super) fn texts(&self) -> [&str; 4] {
        [&self.id, &self.name, &self.file, &self.environment]
    }
}

impl SshAgent {
    pub(super) fn texts(&self) -> [&str; 2] {
        [&self.id, &self.name]
    }
}

/// Checks the secrets and SSH agents of a configuration, and records each violation with its path under
/// `field`.
pub(super) fn check(
    field: &str,
    source: &Source,
    secrets: &[Secret],
    agents: &[SshAgent],
    violations: &mut Violations,
) {
    check_all(
        &format!("{field}.secrets"),
        MAX_SECRETS,
        secrets.iter().map(|s| (&*s.id, &*s.name)),
        violations,
    );
    let agents_field = format!("{field}.ssh_agents");
    check_all(&agents_field, MAX_AGENTS, agents.iter().map(|a| (&*a.id, &*a.name)), violations);
    match source {
        Source::Dockerfile(_) => {}
        Source::Generate(_) if agents.is_empty() => {}
        Source::Generate(_) => violations.add(agents_field, "must only be given with `dockerfile`"),
        Source::Pull(_) => {
            for (name, is_given) in [("secrets", !secrets.is_empty()), ("ssh_agents", !agents.is_empty())] {
                if is_given {
                    let rule = "must not be set with `pull`: nothing is built";
                    violations.add(format!("{field}.{name}"), rule);
                }
            }
        }
    }
    for (i, secret) in secrets.iter().enumerate() {
        let others =
            secrets[..i].iter().filter(|other| other.steps.iter().any(|step| secret.steps.contains(step)));
        if let Some(exposure) = others.filter_map(|other| secret.conflict_with(other)).next() {
            let rule = "must not be that of another secret of the same step, nor lie below it or above it";
            violations.add(format!("{field}.secrets[{i}].{exposure}"), rule);
        }
        let field = format!("{field}.secrets[{i}]");
        let mut refuse = |name: &str, rule: &'static str| violations.add(format!("{field}.{name}"), rule);
        if let Err(rule) = id_rule(&secret.id) {
            refuse("id", rule);
        }
        match source {
            Source::Pull(_) => {}
            Source::Dockerfile(_) => {
                let given = [
                    ("steps", !secret.steps.is_empty()),
                    ("file", !secret.file.is_empty()),
                    ("environment", !secret.environment.is_empty()),
                ];
                for (name, _) in given.into_iter().filter(|(_, is_given)| *is_given) {
                    refuse(name, "must not be given with `dockerfile`, which mounts the secret itself");
                }
            }
            Source::Generate(_) => {
                let distinct: BTreeSet<_> = secret.steps.iter().collect();
                if secret.steps.is_empty()
                    || secret.steps.contains(&None)
                    || distinct.len() < secret.steps.len()
                {
                    refuse("steps", "must name steps of a generated Dockerfile, each once");
                }
                let exposures: [(&str, &str, Rule); 2] =
                    [("file", &secret.file, file_rule), ("environment", &secret.environment, variable_rule)];
                let given: Vec<_> = exposures.iter().filter(|(_, text, _)| !text.is_empty()).collect();
                match given[..] {
                    [(name, text, rule)] => {
                        if let Err(rule) = rule(text) {
                            refuse(name, rule);
                        }
                    }
                    [] => refuse("file", "must be given unless `environment` is"),
                    _ => refuse("environment", "must not be given with `file`"),
                }
            }
        }
    }
}

/// Checks the ids and names of one list.
fn check_all<'a>(
    field: &str,
    max: usize,
    named: impl ExactSizeIterator<Item = (&'a str, &'a str)>,
    violations: &mut Violations,
) {
    if named.len() > max {
        violations.add(field, format!("must be at most {max}"));
    }
    let mut ids = BTreeSet::new();
    for (i, (id, name)) in named.enumerate() {
        if id.len() > MAX_ID || name_rule(id).is_err() {
            let rule =
                "must be letters, digits, `_`, `.` and `-`, beginning with a letter or digit: at most 64";
            violations.add(format!("{field}[{i}].id"), rule);
        } else if !ids.insert(id) {
            violations.add(format!("{field}[{i}].id"), "must be unique in the list");
        }
        if let Err(rule) = name_rule(name) {
            violations.add(format!("{field}[{i}].name"), rule);
        }
    }
}

/// Checks that the engine takes the id of a secret for nothing else: by these names it looks for credentials.
fn id_rule(id: &str) -> Result<(), &'static str> {
    let lower = id.to_ascii_lowercase();
    if lower.starts_with("git_auth_") || lower.starts_with("http_auth_") {
        Err("must not begin with `GIT_AUTH_` or `HTTP_AUTH_`, which are the engine's")
    } else {
        Ok(())
    }
}

/// Checks the name of a secret at a worker, which is the name of a file there.
pub(super) fn name_rule(name: &str) -> Result<(), &'static str> {
    let fits = name.len() <= 253
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if fits {
        Ok(())
    } else {
        Err("must be letters, digits, `_`, `.` and `-`, beginning with a letter or digit: at most 253")
    }
}

/// Checks the name of a variable that is a secret.
fn variable_rule(name: &str) -> Result<(), &'static str> {
    if name == "PATH" {
        Err("must not be `PATH`, by which the step finds its programs")
    } else {
        rules::variable(name)
    }
}

/// Checks the path of a secret, which stands unquoted among the options of a mount.
fn file_rule(path: &str) -> Result<(), &'static str> {
    let fits = path.chars().all(|c| c.is_ascii_alphanumeric() || "_.-+@/".contains(c));
    if fits {
        rules::image_path(path)
    } else {
        Err("must be letters, digits, `_`, `.`, `-`, `+`, `@` and `/`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::configuration::{Dockerfile, Generate, Pull};

    fn found(source: &Source, secrets: &[Secret], agents: &[SshAgent]) -> Vec<String> {
        let mut violations = Violations::default();
        check("c", source, secrets, agents, &mut violations);
        violations.iter().map(|violation| violation.field.clone()).collect()
    }

    fn secret(id: &str, steps: &[Option<GeneratedStep>], file: &str, environment: &str) -> Secret {
        Secret {
            id: id.to_owned(),
            name: "a".to_owned(),
            steps: steps.to_vec(),
            file: file.to_owned(),
            environment: environment.to_owned(),
        }
    }

    #[test]
    fn a_secret_is_mounted_by_the_dockerfile_or_by_the_service() {
        const APT: Option<GeneratedStep> = Some(GeneratedStep::AptPackages);
        let dockerfile = Source::Dockerfile(Dockerfile::default());
        let generate = Source::Generate(Generate::default());
        let pull = Source::Pull(Pull { reference: String::new() });
        for (source, secret, expected) in [
            (&dockerfile, secret("a", &[], "", ""), &[][..]),
            (&dockerfile, secret("a", &[APT], "/f", "E"), &["steps", "file", "environment"]),
            (&dockerfile, secret("", &[], "", ""), &["id"]),
            (&dockerfile, secret("git_Auth_TOKEN", &[], "", ""), &["id"]),
            (&dockerfile, secret("HTTP_AUTH_HEADER_x", &[], "", ""), &["id"]),
            (&dockerfile, secret(&"a".repeat(65), &[], "", ""), &["id"]),
            (&generate, secret("a", &[APT], "/f", ""), &[]),
            (&generate, secret("a", &[APT], "", "E"), &[]),
            (&generate, secret("a", &[APT], "/f", "E"), &["environment"]),
            (&generate, secret("a", &[], "", ""), &["steps", "file"]),
            (&generate, secret("a", &[None], "f", ""), &["steps", "file"]),
            (&generate, secret("a", &[APT, APT], "", "1"), &["steps", "environment"]),
        ] {
            let expected: Vec<String> = expected.iter().map(|name| format!("c.secrets[0].{name}")).collect();
            assert_eq!(found(source, std::slice::from_ref(&secret), &[]), expected, "{secret:?}");
        }
        for (first, second, expected) in [
            (secret("a", &[APT], "/f", ""), secret("b", &[APT], "/f", ""), &["c.secrets[1].file"][..]),
            (secret("a", &[APT], "/f", ""), secret("b", &[APT], "/f/g", ""), &["c.secrets[1].file"]),
            (secret("a", &[APT], "/f", ""), secret("b", &[APT], "/fg", ""), &[]),
            (secret("a", &[APT], "", "E"), secret("b", &[APT], "", "E"), &["c.secrets[1].environment"]),
            (secret("a", &[APT], "", "PATH"), secret("b", &[APT], "", "E"), &["c.secrets[0].environment"]),
        ] {
            assert_eq!(found(&generate, &[first, second], &[]), expected);
        }
        assert_eq!(found(&pull, &[secret("a", &[], "", "")], &[]), ["c.secrets"]);
        let agent = SshAgent { id: "default".to_owned(), name: "a".to_owned() };
        assert_eq!(found(&dockerfile, &[], std::slice::from_ref(&agent)), [""; 0]);
        assert_eq!(found(&generate, &[], std::slice::from_ref(&agent)), ["c.ssh_agents"]);
        assert_eq!(found(&dockerfile, &[], &[agent.clone(), agent]), ["c.ssh_agents[1].id"]);
        let many = vec![secret("a", &[], "", ""); 17];
        assert_eq!(found(&dockerfile, &many, &[])[..2], ["c.secrets", "c.secrets[1].id"]);
    }
}
