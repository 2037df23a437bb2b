//! Dockerfiles, as far as they show before a build what it will do.

use std::collections::{BTreeSet, HashMap};

use parse_dockerfile::{Flag, Instruction, Stage};

/// Returns the names of a Dockerfile's stages in order, as BuildKit shows them.
///
/// Returns no names for text that BuildKit would reject.
pub(crate) fn stages(dockerfile: &str) -> Vec<String> {
    let Ok(dockerfile) = parse_dockerfile::parse(dockerfile) else { return Vec::new() };
    let count = dockerfile.stages().len();
    let name = |(number, stage): (usize, Stage<'_, '_>)| match &stage.from.as_ {
        Some((_, name)) => name.value.to_lowercase(),
        // BuildKit does not name the only stage of a Dockerfile.
        None if count == 1 => String::new(),
        None => format!("stage-{number}"),
    };
    dockerfile.stages().enumerate().map(name).collect()
}

/// Returns the frontend that a Dockerfile names by its directive `syntax`, in its words.
///
/// The rest of the file need not be a Dockerfile then.
pub(crate) fn frontend(dockerfile: &str) -> Option<&str> {
    let text = dockerfile.trim_start_matches('\u{feff}');
    let is_shebang = text.starts_with("#!");
    for line in text.lines().skip(usize::from(is_shebang)) {
        let (name, value) = line.trim_start().strip_prefix('#')?.split_once('=')?;
        if !name.trim().bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return None;
        }
        if name.trim().eq_ignore_ascii_case("syntax") {
            // Arguments of the frontend may follow.
            return value.split_whitespace().next();
        }
    }
    None
}

/// Returns the references to images that a Dockerfile names for a stage, in its words; for the last one if
/// `target` is empty.
///
/// References that depend on more than ARG defaults and build arguments are left out.
pub(crate) fn image_references(
    dockerfile: &str,
    build_args: &HashMap<String, String>,
    target: &str,
) -> BTreeSet<String> {
    let Ok(dockerfile) = parse_dockerfile::parse(dockerfile) else { return BTreeSet::new() };
    let mut variables = HashMap::new();
    for argument in dockerfile.global_args() {
        for (name, default) in declarations(&argument.arguments.value) {
            let default = default.map(|default| expand(default, &variables)).unwrap_or_default();
            let value = build_args.get(name).cloned().or(default);
            variables.extend(value.map(|value| (name.to_owned(), value)));
        }
    }
    let mut stages: Vec<Uses> = Vec::new();
    for stage in dockerfile.stages() {
        let from = expand(&stage.from.image.value, &variables);
        let copied =
            stage.instructions.iter().flat_map(sources).filter_map(|source| expand(source, &variables));
        let name = stage.from.as_.as_ref().map(|(_, name)| name.value.to_lowercase());
        let mut uses = Uses { name, ..Uses::default() };
        for source in from.into_iter().chain(copied).filter(|name| !name.is_empty() && name != "scratch") {
            match position(&stages, &source) {
                Some(stage) => drop(uses.stages.insert(stage)),
                None => drop(uses.images.insert(source)),
            }
        }
        stages.push(uses);
    }
    let last = stages.len().saturating_sub(1);
    let mut needed = BTreeSet::from([position(&stages, target).unwrap_or(last)]);
    let mut images = BTreeSet::new();
    for (number, uses) in stages.into_iter().enumerate().rev() {
        if needed.contains(&number) {
            needed.extend(uses.stages);
            images.extend(uses.images);
        }
    }
    images
}

/// Reports whether a Dockerfile may name another platform than the engine's own.
///
/// It compares words, for the engine unquotes flags, joins lines, and understands more than the parser here.
pub(crate) fn may_name_platform(dockerfile: &str, build_args: &HashMap<String, String>) -> bool {
    const FLAG: &str = "--platform";
    /// Variables that are the engine's own platform, unless the Dockerfile or its build sets them.
    const OWN: [&str; 2] = ["BUILDPLATFORM", "TARGETPLATFORM"];
    let is_code = |line: &&str| !line.trim_start().starts_with('#');
    let code: Vec<&str> = dockerfile.lines().filter(is_code).collect();
    let is_joint = |c: char| c.is_whitespace() || ['"', '\'', '\\', '`'].contains(&c);
    let joined: String = code.iter().flat_map(|line| line.chars()).filter(|c| !is_joint(*c)).collect();
    let is_set = |name: &&str| build_args.contains_key(*name) || joined.contains(&format!("{name}="));
    if OWN.iter().any(is_set) {
        return joined.contains(FLAG);
    }
    let own = OWN.map(|name| [format!("{FLAG}=${name}"), format!("{FLAG}=${{{name}}}")]);
    let words = code.iter().flat_map(|line| line.split_whitespace());
    let own_flags = words.filter(|word| own.iter().flatten().any(|own| own == word)).count();
    joined.matches(FLAG).count() != own_flags
}

/// A stage by what it uses: images, and earlier stages by their numbers.
#[derive(Default)]
struct Uses {
    name: Option<String>,
    stages: BTreeSet<usize>,
    images: BTreeSet<String>,
}

/// Returns the number of a stage, given by its name or its number.
fn position(stages: &[Uses], stage: &str) -> Option<usize> {
    let name = stage.to_lowercase();
    stages.iter().rposition(|uses| uses.name.as_ref() == Some(&name)).or_else(|| stage.parse().ok())
}

/// Returns the declarations of an ARG instruction, each with its default.
fn declarations(arguments: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    arguments.split_whitespace().map(|declaration| match declaration.split_once('=') {
        Some((name, default)) => (name, Some(default.trim_matches(['"', '\'']))),
        None => (declaration, None),
    })
}

/// Returns the images or stages that an instruction copies from or mounts.
fn sources<'a>(instruction: &'a Instruction<'_>) -> Vec<&'a str> {
    fn value<'a>(flag: &'a Flag<'_>, name: &str) -> Option<&'a str> {
        flag.value.as_ref().filter(|_| flag.name.value == name).map(|value| &*value.value)
    }
    if let Instruction::Copy(copy) = instruction {
        return copy.options.iter().filter_map(|flag| value(flag, "from")).collect();
    }
    let Instruction::Run(run) = instruction else { return Vec::new() };
    let mounts = run.options.iter().filter_map(|flag| value(flag, "mount"));
    mounts.flat_map(|mount| mount.split(',')).filter_map(|option| option.strip_prefix("from=")).collect()
}

/// Puts variables into a text; returns `None` if one is unknown or the text is more than that.
fn expand(text: &str, variables: &HashMap<String, String>) -> Option<String> {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        if let Some(braced) = after.strip_prefix('{') {
            let (inner, behind) = braced.split_once('}')?;
            let (name, default) = inner.split_once(":-").unwrap_or((inner, ""));
            let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
            let value = variables.get(name).map(String::as_str).filter(|value| !value.is_empty());
            let value = value.or_else(|| (!default.is_empty()).then_some(default))?;
            expanded.push_str(Some(value).filter(|_| is_name && !default.contains('$'))?);
            rest = behind;
        } else {
            let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
            let (name, behind) = after.split_at(end);
            expanded.push_str(variables.get(name)?);
            rest = behind;
        }
    }
    expanded.push_str(rest);
    Some(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_is_seen_however_it_is_written() {
        let args = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), "x".to_owned())).collect();
        for (dockerfile, build_args, expected) in [
            ("FROM a", &[][..], false),
            ("FROM --platform=$BUILDPLATFORM a", &[], false),
            ("FROM --platform=${TARGETPLATFORM} a\nRUN x --platform=$TARGETPLATFORM", &[], false),
            ("FROM --platform=$BUILDPLATFORM a", &["BUILDPLATFORM"], true),
            ("ARG BUILDPLATFORM=linux/arm64\nFROM --platform=$BUILDPLATFORM a", &[], true),
            ("FROM --platform=$BUILDPLATFORM a\nFROM --platform=linux/arm64 a", &[], true),
            ("FROM --platform=linux/arm64 a", &[], true),
            ("FROM --platform= a", &[], true),
            ("FROM --platform=", &[], true),
            ("FROM --platform=$BUILDPLATFORM$A a", &[], true),
            ("FROM --plat\\  \n# a comment\n\nform=x a", &[], true),
            ("# --platform=x\nFROM a", &[], false),
            ("FROM --pl\"atf\"orm=x a", &[], true),
            ("FROM --plat\\\nform=x a", &[], true),
            ("FROM --plat\\\r\nform=x a", &[], true),
            ("# escape=`\nFROM --plat`\nform=x a", &[], true),
        ] {
            assert_eq!(may_name_platform(dockerfile, &args(build_args)), expected, "{dockerfile}");
        }
    }

    fn references(dockerfile: &str, build_args: &[(&str, &str)]) -> Vec<String> {
        let build_args = build_args.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        image_references(dockerfile, &build_args.collect(), "").into_iter().collect()
    }

    #[test]
    fn only_what_the_built_stage_needs_is_named() {
        const DOCKERFILE: &str = "FROM a AS tools\nFROM b AS test\nCOPY --from=tools / /\nFROM c AS last\nCOPY --from=1 / /\n\
                                  FROM d AS other";
        for (target, expected) in [
            ("", &["d"][..]),
            ("Test", &["a", "b"]),
            ("last", &["a", "b", "c"]),
            ("0", &["a"]),
            ("none", &["d"]),
        ] {
            let references = image_references(DOCKERFILE, &HashMap::new(), target);
            assert_eq!(references.iter().collect::<Vec<_>>(), expected, "{target}");
        }
    }

    #[test]
    fn a_dockerfile_names_the_images_that_it_starts_and_copies_from() {
        for (dockerfile, expected) in [
            ("FROM scratch", &[][..]),
            (
                "FROM alpine:3.20 AS base\nFROM Base\nCOPY --from=base / /\nCOPY --from=0 / /",
                &["alpine:3.20"],
            ),
            (
                "FROM a\nCOPY --from=b:1 --chmod=755 /x /y\nRUN --mount=type=bind,from=c,target=/c true",
                &["a", "b:1", "c"],
            ),
            ("FROM --platform=linux/amd64 a@sha256:00 AS x", &["a@sha256:00"]),
            // A stage is a stage only from its own line on.
            ("FROM x AS y\nCOPY --from=z / /\nFROM y AS z", &["x", "z"]),
            ("FROM a\nRUN --mount=type=cache,target=/c true", &["a"]),
            ("no Dockerfile", &[]),
        ] {
            assert_eq!(references(dockerfile, &[]), expected, "{dockerfile}");
        }
    }

    #[test]
    fn a_directive_names_the_frontend() {
        for (dockerfile, expected) in [
            ("# syntax=docker/dockerfile:1\nFROM a", Some("docker/dockerfile:1")),
            ("\u{feff}#syntax = a/b@sha256:0 --flag\nno Dockerfile", Some("a/b@sha256:0")),
            ("#!/usr/bin/env docker\n# Syntax=a", Some("a")),
            ("# escape=`\n# syntax=a\nFROM b", Some("a")),
            ("# about\n# syntax=a\nFROM b", None),
            ("\n# syntax=a", None),
            ("FROM a\n# syntax=a", None),
            ("# syntax=\nFROM a", None),
            ("# no directive = a\n# syntax=a", None),
            ("", None),
        ] {
            assert_eq!(frontend(dockerfile), expected, "{dockerfile}");
        }
    }

    #[test]
    fn arguments_are_put_in() {
        const ARGS: &str = "ARG TAG=1\nARG IMAGE=\"a:${TAG}\" OTHER\n";
        for (from, build_args, expected) in [
            ("$IMAGE", &[][..], &["a:1"][..]),
            ("${IMAGE}", &[("TAG", "2")], &["a:2"]),
            ("b:$TAG", &[("TAG", "2")], &["b:2"]),
            ("${OTHER:-c}", &[], &["c"]),
            ("${OTHER:-c}", &[("OTHER", "d")], &["d"]),
            ("$OTHER", &[], &[]),
            ("${IMAGE:+e}", &[], &[]),
            ("${IMAGE#a}", &[], &[]),
            // What no line declares is unknown, whoever gives it a value.
            ("$UNDECLARED", &[("UNDECLARED", "x")], &[]),
        ] {
            assert_eq!(references(&format!("{ARGS}FROM {from}"), build_args), expected, "{from}");
        }
    }
}
