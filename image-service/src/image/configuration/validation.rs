//! The checks that turn a draft into a configuration. All violations are found together.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Configuration, ConfigurationDraft, Dockerfile, File, Generate, Service, Source,
    rules::{self, Rule},
    secret,
};
use crate::error::Violations;

const MAX_BYTES: usize = 256 * 1024;
const MAX_SERVICES: usize = 64;
const MAX_LABELS: usize = 64;
const MAX_LABEL_BYTES: usize = 4 * 1024;
const MAX_PORTS: usize = 64;
const TIMEOUT_MS: std::ops::RangeInclusive<i64> = 1_000..=24 * 3_600 * 1_000;
const DEFAULT_BASE: &str = "ubuntu:24.04";

impl Configuration {
    /// Checks every rule, and records each violation with its path under `field`.
    pub(crate) fn parse(mut draft: ConfigurationDraft, field: &str, violations: &mut Violations) -> Self {
        if let Source::Generate(generate) = &mut draft.source
            && generate.base_image.is_empty()
        {
            DEFAULT_BASE.clone_into(&mut generate.base_image);
        }
        if let Source::Dockerfile(dockerfile) = &mut draft.source
            && dockerfile.text.trim().is_empty()
        {
            dockerfile.text.clear();
        }
        let mut check = Check { violations };
        if draft.lacks_source {
            check.violations.add(field, "must have a source: `dockerfile`, `generate` or `pull`");
        } else {
            check.source(field, &draft);
        }
        check.services(&format!("{field}.services"), &draft.services);
        secret::check(field, &draft.source, &draft.secrets, &draft.ssh_agents, check.violations);
        check.rule(&format!("{field}.worker"), &draft.worker, rules::label);
        check.labels(&format!("{field}.worker_labels"), &draft.worker_labels);
        if draft.build_timeout_ms.is_some_and(|ms| !TIMEOUT_MS.contains(&ms)) {
            check.violations.add(format!("{field}.build_timeout"), "must be from 1 s to 24 h");
        }
        let bytes = draft.bytes();
        if bytes > MAX_BYTES {
            check.violations.add(field, format!("must have at most {MAX_BYTES} bytes in all, has {bytes}"));
        }
        Self(draft)
    }
}

impl ConfigurationDraft {
    /// Returns the size of all texts and files, in bytes.
    fn bytes(&self) -> usize {
        // The encoding adds a length and a tag to each.
        const OVERHEAD: usize = 4;
        let ports = self.services.iter().map(|service| service.ports.len()).sum::<usize>() * OVERHEAD;
        let texts = self.texts().iter().map(|text| text.len() + OVERHEAD).sum::<usize>() + ports;
        let files = match &self.source {
            Source::Dockerfile(Dockerfile { files, .. }) | Source::Generate(Generate { files, .. }) => {
                files.as_slice()
            }
            Source::Pull(_) => &[],
        };
        // Binary contents are not among the texts.
        let binary = |file: &&File| file.text().is_none();
        texts + files.iter().filter(binary).map(|file| file.content.len()).sum::<usize>()
    }
}

/// A check in progress, with the violations found so far.
struct Check<'a> {
    violations: &'a mut Violations,
}

impl Check<'_> {
    fn rule(&mut self, field: &str, text: &str, rule: Rule) {
        if let Err(rule) = rule(text) {
            self.violations.add(field, rule);
        }
    }

    fn each(&mut self, field: &str, texts: &[String], rule: Rule) {
        for (i, text) in texts.iter().enumerate() {
            self.rule(&format!("{field}[{i}]"), text, rule);
        }
    }

    /// Checks the entries of a map. The path of an entry is `field["key"]`.
    fn entries(&mut self, field: &str, entries: &BTreeMap<String, String>, key: Rule, value: Rule) {
        for (name, text) in entries {
            let field = format!("{field}[{name:?}]");
            self.rule(&field, name, key);
            self.rule(&field, text, value);
        }
    }

    fn labels(&mut self, field: &str, labels: &BTreeMap<String, String>) {
        if labels.len() > MAX_LABELS {
            self.violations.add(field, format!("must be at most {MAX_LABELS}"));
        }
        let bytes: usize = labels.iter().map(|(name, value)| name.len() + value.len()).sum();
        if bytes > MAX_LABEL_BYTES {
            self.violations
                .add(field, format!("must have at most {MAX_LABEL_BYTES} bytes in all, has {bytes}"));
        }
        for (name, value) in labels {
            let fits = |text: &String| rules::label(text).is_ok();
            if name.is_empty() || !fits(name) || !fits(value) {
                let rule =
                    "must have a name, at most 255 bytes in name and value each, and no control characters";
                self.violations.add(format!("{field}[{name:?}]"), rule);
            }
        }
    }

    fn source(&mut self, field: &str, draft: &ConfigurationDraft) {
        match &draft.source {
            Source::Dockerfile(dockerfile) => {
                let Dockerfile { text, files, build_args, target, .. } = dockerfile;
                let field = format!("{field}.dockerfile");
                self.context(&field, dockerfile);
                self.rule(&format!("{field}.text"), text, rules::text);
                self.files(&format!("{field}.files"), files, rules::context_path);
                self.entries(&format!("{field}.build_args"), build_args, rules::build_argument, rules::text);
                if !target.is_empty() {
                    self.rule(&format!("{field}.target"), target, rules::stage);
                }
            }
            Source::Generate(Generate {
                base_image,
                apt_packages,
                python_packages,
                environment,
                user,
                start_commands,
                files,
            }) => {
                let field = format!("{field}.generate");
                self.rule(&format!("{field}.base_image"), base_image, rules::image);
                self.each(&format!("{field}.apt_packages"), apt_packages, rules::apt_package);
                self.each(&format!("{field}.python_packages"), python_packages, rules::python_package);
                self.entries(
                    &format!("{field}.environment"),
                    environment,
                    rules::variable,
                    rules::instruction_value,
                );
                if !user.is_empty() {
                    self.rule(&format!("{field}.user"), user, rules::user);
                }
                self.each(&format!("{field}.start_commands"), start_commands, rules::command);
                self.files(&format!("{field}.files"), files, rules::image_path);
            }
            Source::Pull(pull) => {
                self.rule(&format!("{field}.pull.reference"), &pull.reference, rules::image);
                for (name, is_set) in [
                    ("pull_base", draft.pull_base),
                    ("squash", draft.squash),
                    ("push", draft.push),
                    ("no_cache", draft.no_cache),
                ] {
                    if is_set {
                        self.violations
                            .add(format!("{field}.{name}"), "must not be set with `pull`: nothing is built");
                    }
                }
            }
        }
    }

    /// Checks that a Dockerfile has one context, and is in one place.
    fn context(&mut self, field: &str, dockerfile: &Dockerfile) {
        let Dockerfile { text, files, archive, remote, dockerfile_path, remote_credentials, .. } = dockerfile;
        let (has_archive, has_remote) = (!archive.is_empty(), !remote.is_empty());
        if has_archive {
            self.rule(&format!("{field}.archive"), archive, rules::digest);
        }
        if has_remote {
            self.rule(&format!("{field}.remote"), remote, rules::remote);
        }
        for (name, is_given) in
            [("files", has_archive && !files.is_empty()), ("remote", has_archive && has_remote)]
        {
            if is_given {
                self.violations.add(
                    format!("{field}.{name}"),
                    "must not be given with `archive`: a build has one context",
                );
            }
        }
        if has_remote && !files.is_empty() {
            self.violations
                .add(format!("{field}.files"), "must not be given with `remote`: a build has one context");
        }
        if !remote_credentials.is_empty() {
            let field = format!("{field}.remote_credentials");
            self.rule(&field, remote_credentials, secret::name_rule);
            if !has_remote {
                self.violations.add(field, "must only be given with `remote`");
            }
        }
        let has_text = !text.is_empty();
        if has_remote && has_text {
            let rule = "must not be given with `remote`: the Dockerfile is that of the context";
            self.violations.add(format!("{field}.text"), rule);
        }
        if !has_text && !has_archive && !has_remote {
            self.violations.add(format!("{field}.text"), "must not be empty");
        }
        if !dockerfile_path.is_empty() {
            self.rule(&format!("{field}.dockerfile_path"), dockerfile_path, rules::path);
            if has_text || !(has_archive || has_remote) {
                let rule = "must only be given with `archive` or `remote`, and without `text`";
                self.violations.add(format!("{field}.dockerfile_path"), rule);
            }
        }
    }

    fn services(&mut self, field: &str, services: &[Service]) {
        if services.len() > MAX_SERVICES {
            self.violations.add(field, format!("must be at most {MAX_SERVICES}"));
        }
        let mut names = BTreeSet::new();
        for (i, service) in services.iter().enumerate() {
            let field = format!("{field}[{i}]");
            self.rule(&format!("{field}.name"), &service.name, rules::service);
            if !names.insert(&service.name) {
                self.violations.add(format!("{field}.name"), "must be unique among the services");
            }
            self.each(&format!("{field}.packages"), &service.packages, rules::apt_package);
            self.rule(&format!("{field}.command"), &service.command, rules::command);
            self.entries(&format!("{field}.environment"), &service.environment, rules::variable, rules::line);
            if service.ports.len() > MAX_PORTS {
                self.violations.add(format!("{field}.ports"), format!("must be at most {MAX_PORTS}"));
            }
            let mut ports = BTreeSet::new();
            for (j, port) in service.ports.iter().enumerate() {
                if !(1..=65_535).contains(port) {
                    self.violations.add(format!("{field}.ports[{j}]"), "must be from 1 to 65535");
                } else if !ports.insert(port) {
                    self.violations.add(format!("{field}.ports[{j}]"), "must be unique among the ports");
                }
            }
        }
    }

    fn files(&mut self, field: &str, files: &[File], rule: Rule) {
        let mut paths = BTreeSet::new();
        for (i, file) in files.iter().enumerate() {
            let field = format!("{field}[{i}].path");
            if let Err(rule) = rule(&file.path) {
                self.violations.add(field, rule);
            } else if !paths.insert(file.path.as_str()) {
                self.violations.add(field, "must be unique among the files");
            }
        }
        for (i, file) in files.iter().enumerate() {
            let mut above = file.path.match_indices('/').map(|(end, _)| &file.path[..end]);
            if let Some(other) = above.find(|above| paths.contains(above)) {
                let rule = format!("must not lie below the file {other:?}");
                self.violations.add(format!("{field}[{i}].path"), rule);
            }
        }
    }
}

#[cfg(test)]
mod tests;
