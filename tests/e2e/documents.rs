//! Documents that match the code: their tables of flags equal the programs' flags, and their links resolve.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::CommandFactory as _;

const DOCUMENTS: [&str; 10] = [
    "README.md",
    "proto/README.md",
    "image-service/README.md",
    "build-worker/README.md",
    "deploy/README.md",
    "tests/README.md",
    "tests/benches/README.md",
    ".github/CONTRIBUTING.md",
    ".github/SECURITY.md",
    ".github/CHANGELOG.md",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(document: &str) -> anyhow::Result<String> {
    fs::read_to_string(root().join(document)).with_context(|| document.to_owned())
}

/// Returns the flags in the first table below a heading, each with the text of its default.
fn documented(text: &str, heading: &str) -> BTreeMap<String, String> {
    let below = text.lines().skip_while(|line| *line != heading).skip(1);
    let table = below.skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let mut flags = BTreeMap::new();
    for row in table {
        let mut cells = row.split('|').skip(1).map(str::trim);
        let (Some(names), Some(default)) = (cells.next(), cells.next()) else { continue };
        for name in names.split('`').filter(|name| name.starts_with("--")) {
            flags.insert(name.to_owned(), default.to_owned());
        }
    }
    flags
}

/// Returns the flags of a command, each with its default as documents write it.
fn flags(command: &clap::Command) -> BTreeMap<String, String> {
    let flag = |argument: &clap::Arg| Some((format!("--{}", argument.get_long()?), default(argument)));
    command.get_arguments().filter_map(flag).collect()
}

fn default(argument: &clap::Arg) -> String {
    let values: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    match values.join(",").as_str() {
        _ if !argument.get_action().takes_values() => "off".to_owned(),
        _ if argument.is_required_set() => "required".to_owned(),
        "" => "none".to_owned(),
        value => format!("`{value}`"),
    }
}

/// Checks that the variable of each flag is `prefix` followed by the flag in capitals.
fn check_variables(command: &clap::Command, prefix: &str, without: &[&str]) {
    for argument in command.get_arguments() {
        let Some(long) = argument.get_long() else { continue };
        let variable = argument.get_env().map(|variable| variable.to_string_lossy().into_owned());
        let expected = format!("{prefix}{}", long.to_uppercase().replace('-', "_"));
        let expected = (!without.contains(&long)).then_some(expected);
        assert_eq!(variable, expected, "--{long} of {}", command.get_name());
    }
}

#[test]
fn the_tables_of_flags_are_those_of_the_programs() -> anyhow::Result<()> {
    let service = image_service::Cli::command();
    let worker = build_worker::Cli::command();
    let take = build_worker::Config::command();
    let subcommand = |command: &clap::Command, name: &str| {
        command.find_subcommand(name).cloned().with_context(|| format!("no command {name}"))
    };
    let (serve, token) = (subcommand(&service, "serve")?, subcommand(&service, "token")?);
    let (health, health_of_worker) = (subcommand(&service, "health")?, subcommand(&worker, "health")?);
    for (document, heading, command) in [
        ("image-service/README.md", "### Flags of serve", &serve),
        ("image-service/README.md", "### Flags of token", &token),
        ("image-service/README.md", "### Flags of health", &health),
        ("image-service/README.md", "### Flags of health", &health_of_worker),
        ("build-worker/README.md", "## Flags", &take),
    ] {
        assert_eq!(documented(&read(document)?, heading), flags(command), "{document}, {heading}");
    }
    check_variables(&serve, "TRAILER_", &[]);
    check_variables(&take, "TRAILER_", &[]);
    check_variables(&token, "TRAILER_", &["subject", "role", "group", "pool", "ttl"]);
    check_variables(&health, "TRAILER_HEALTH_", &[]);
    check_variables(&health_of_worker, "TRAILER_HEALTH_", &[]);
    Ok(())
}

/// Returns the lines of a document outside blocks of code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut in_block = false;
    text.lines().filter(move |line| {
        let is_fence = line.starts_with("```");
        in_block ^= is_fence;
        !in_block && !is_fence
    })
}

/// Returns the anchors of a document's headings.
fn anchors(text: &str) -> Vec<String> {
    let headings = prose(text).filter(|line| line.starts_with('#'));
    headings
        .map(|heading| {
            let heading = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(*c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect::<String>()
        })
        .collect()
}

#[test]
fn links_lead_somewhere() -> anyhow::Result<()> {
    let mut seen = 0;
    for document in DOCUMENTS {
        let text = read(document)?;
        let folder = Path::new(document).parent().context("a folder")?;
        for link in prose(&text).flat_map(|line| line.split("](").skip(1)) {
            let target = link.split(')').next().unwrap_or_default();
            if target.starts_with("https://") {
                continue;
            }
            seen += 1;
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = if file.is_empty() { root().join(document) } else { root().join(folder).join(file) };
            assert!(path.exists(), "{document} links to {target}");
            if !anchor.is_empty() {
                let anchors = anchors(&fs::read_to_string(&path)?);
                assert!(anchors.iter().any(|known| known == anchor), "{document} links to {target}");
            }
        }
    }
    assert!(seen > 50, "{seen}: links are not found");
    Ok(())
}

#[test]
fn the_readme_is_short() -> anyhow::Result<()> {
    let lines = read("README.md")?.lines().count();
    assert!(lines <= 250, "README.md has {lines} lines");
    Ok(())
}
