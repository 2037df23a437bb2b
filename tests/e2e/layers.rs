//! Dependency rules of the architecture, checked against the source.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

const NOUNS: [&str; 12] = [
    "access",
    "build",
    "build_context",
    "change",
    "dispatch",
    "error",
    "hint",
    "image",
    "request",
    "search",
    "timestamp",
    "turns",
];
const OPERATIONS: [&str; 10] = [
    "background",
    "build_watch",
    "catalog",
    "context_transfer",
    "feed",
    "preview",
    "queue",
    "signals",
    "worker_registry",
    "worker_session",
];
/// Modules outside the layers: the command line, the data directory's lock, tokens and the root.
const ROOT: [&str; 6] = ["config", "data_dir", "jwt", "lib", "main", "simulation"];

/// Returns the sources of a package by path below `src`, without comments and unit tests.
fn sources(package: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(package).join("src");
    let mut files = BTreeMap::new();
    let mut folders: Vec<PathBuf> = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().is_some_and(|name| name != "tests.rs") {
                let name = path.strip_prefix(&root)?.to_str().context("a path in UTF-8")?.to_owned();
                files.insert(name, code(&fs::read_to_string(&path)?));
            }
        }
    }
    Ok(files)
}

fn code(text: &str) -> String {
    let shipped = text.split("#[cfg(test)]").next().unwrap_or(text);
    shipped.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Reports whether code names a crate, as `name::…`.
fn names(code: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
    code.match_indices(&format!("{name}::"))
        .any(|(at, _)| !code[..at].chars().next_back().is_some_and(is_word))
}

/// Returns the modules of its own crate that code names, as `crate::name` or in `crate::{…}`.
fn modules(code: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for (at, path) in code.match_indices("crate::") {
        let rest = &code[at + path.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.extend(word(rest));
            continue;
        };
        let mut depth = 0;
        let mut item = 0;
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' | ',' if depth == 0 => {
                    found.extend(word(&group[item..at]));
                    item = at + 1;
                }
                '}' => depth -= 1,
                _ => {}
            }
            if c == '}' && depth == 0 && item == at + 1 {
                break;
            }
        }
    }
    found
}

fn word(text: &str) -> Option<&str> {
    text.trim_start().split(|c: char| !c.is_alphanumeric() && c != '_').next().filter(|word| !word.is_empty())
}

fn module(file: &str) -> &str {
    file.split(['/', '.']).next().unwrap_or(file)
}

#[test]
fn image_service_depends_downwards_only() -> anyhow::Result<()> {
    const FRAMEWORKS: [&str; 9] =
        ["tonic", "proto", "prost", "sea_orm", "tokio", "tokio_util", "clap", "http", "tower"];
    for (file, code) in sources("image-service")? {
        let module = module(&file);
        let (crates, upwards): (&[&str], Vec<&str>) = if NOUNS.contains(&module) {
            (&FRAMEWORKS, ["grpc", "index", "store"].into_iter().chain(OPERATIONS).collect())
        } else if OPERATIONS.contains(&module) {
            (&["tonic", "proto", "prost", "sea_orm", "clap", "http", "tower"], vec!["grpc"])
        } else if ["fair_semaphore", "writer"].contains(&module) {
            let upwards = ["grpc", "index", "store"].into_iter().chain(OPERATIONS).collect();
            (&["tonic", "proto", "prost", "sea_orm", "clap", "http", "tower"], upwards)
        } else if module == "index" {
            (
                &["tonic", "proto", "prost", "sea_orm", "clap", "http", "tower"],
                ["grpc"]
                    .into_iter()
                    .chain(OPERATIONS.into_iter().filter(|name| *name != "signals"))
                    .collect(),
            )
        } else if module == "grpc" {
            (&["sea_orm", "clap"], vec!["store"])
        } else if module == "store" {
            (&["tonic", "proto", "prost", "clap"], ["grpc", "index"].into_iter().chain(OPERATIONS).collect())
        } else {
            assert!(ROOT.contains(&module), "{file} belongs to no layer");
            (&["sea_orm"], Vec::new())
        };
        for name in crates.iter().chain(&["build_worker"]) {
            assert!(!names(&code, name), "image-service/src/{file} must not name the crate {name}");
        }
        for name in upwards {
            assert!(
                !modules(&code).contains(name),
                "image-service/src/{file} must not name the module {name}"
            );
        }
    }
    Ok(())
}

#[test]
fn only_the_docker_module_of_build_worker_knows_bollard() -> anyhow::Result<()> {
    for (file, code) in sources("build-worker")? {
        let is_docker = module(&file) == "docker";
        assert!(is_docker || !names(&code, "bollard"), "build-worker/src/{file} must not name bollard");
        assert!(!names(&code, "image_service"), "the services do not depend on each other: {file}");
        assert!(!is_pure(&file) || !names(&code, "tokio"), "build-worker/src/{file} must not name tokio");
    }
    for file in PURE {
        assert!(
            sources("build-worker")?.keys().any(|path| module(path) == file),
            "there is no module {file}"
        );
    }
    Ok(())
}

/// Modules of build-worker without input and output.
const PURE: [&str; 9] = [
    "artifact_name",
    "context",
    "dockerfile",
    "fault",
    "output",
    "reference",
    "source_rules",
    "steps",
    "trust_domain",
];

fn is_pure(file: &str) -> bool {
    PURE.contains(&module(file))
}

#[test]
fn the_codemaps_have_every_module() -> anyhow::Result<()> {
    for package in ["image-service", "build-worker"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(package).join("README.md");
        let readme = fs::read_to_string(path)?;
        let (_, codemap) = readme.split_once("## Codemap").context("a codemap")?;
        let missing: Vec<String> = sources(package)?
            .into_keys()
            .filter_map(|file| file.strip_suffix(".rs").map(str::to_owned))
            .filter(|module| !module.starts_with("store/migration/"))
            .filter(|module| !codemap.contains(&format!("`{module}`")))
            .collect();
        assert!(missing.is_empty(), "{package}/README.md does not have {missing:?}");
    }
    Ok(())
}

#[test]
fn the_documents_name_real_functions() -> anyhow::Result<()> {
    /// Documents that follow a call through the code, with the minimum number of functions in each.
    const DOCUMENTS: [(&str, usize); 2] = [("image-service/README.md", 60), ("build-worker/README.md", 20)];
    let code: Vec<(String, String)> = ["image-service", "build-worker"]
        .iter()
        .map(|package| sources(package))
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .flatten()
        .collect();
    for (document, fewest) in DOCUMENTS {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(document))?;
        let mut count = 0;
        let quoted = text.split('`').skip(1).step_by(2);
        for (name, function) in quoted.filter_map(|quoted| quoted.split_once("::")) {
            if !function.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
                continue;
            }
            assert!(
                code.iter().any(|(file, code)| defines(file, code, name, function)),
                "{document} names {name}::{function}, which is not there"
            );
            count += 1;
        }
        assert!(count >= fewest, "only {count} functions were found in {document}");
    }
    Ok(())
}

/// Reports whether a file defines a function of a type or of a module.
fn defines(file: &str, code: &str, name: &str, function: &str) -> bool {
    let is_type = name.starts_with(char::is_uppercase);
    let is_of_it = if is_type {
        names_word(code, &format!(" {name}"))
    } else {
        file.split(['/', '.']).any(|part| part == name)
    };
    is_of_it && names_word(code, &format!("fn {function}"))
}

fn names_word(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        code[at + word.len()..].chars().next().is_none_or(|c| !c.is_alphanumeric() && c != '_')
    })
}

#[test]
fn names_in_code_are_found() {
    assert!(names("use tonic::Status;", "tonic") && names("fn a() -> tonic::Status", "tonic"));
    assert!(!names("use tonic_types::X", "tonic") && !names("self.tonic::<A>()", "tonic"));
    let code = "use crate::{\n    a::{b, c::D},\n    e,\n    f::G,\n};\nuse h::i; crate::j::k(l::m)";
    assert_eq!(modules(code).into_iter().collect::<Vec<_>>(), ["a", "e", "f", "j"]);
}
