//! Dockerfiles and `.dockerignore` files of archives, and links to them.

use std::io::Cursor;

use tar::EntryType;

use super::*;
use crate::context_archive::{
    Compression, open,
    tests::{TestEntry, tar_of},
};

const FILE: EntryType = EntryType::Regular;
const LINK: EntryType = EntryType::Symlink;

/// Returns the Dockerfile at a path of a tar, and the `.dockerignore` file that counts for it.
fn found(entries: &[TestEntry<'_>], path: &str) -> (Option<String>, String) {
    let tar = tar_of(entries);
    let files = build_files(|| open(Cursor::new(&tar), Compression::None), path).expect("a tar");
    (files.dockerfile.map(|content| String::from_utf8_lossy(&content).into_owned()), files.ignore)
}

#[test]
fn the_ignore_file_of_a_dockerfile_counts_more() {
    let entries = [
        (FILE, "docker/Dev.dockerignore", "own", 0),
        (FILE, ".dockerignore", "common", 0),
        (FILE, "./docker/Dev", "FROM a", 0),
    ];
    assert_eq!(found(&entries, "docker/Dev"), (Some("FROM a".to_owned()), "own".to_owned()));
    assert_eq!(found(&entries, "Dockerfile"), (None, "common".to_owned()));
    let lower = (FILE, "dockerfile", "FROM a", 0);
    let [of_lower, of_upper] = ["dockerfile", "Dockerfile"].map(|name| format!("{name}.dockerignore"));
    let common = (FILE, ".dockerignore", "common", 0);
    let with = |other: &str| found(&[lower, common, (FILE, other, "own", 0)], "Dockerfile").1;
    assert_eq!([with(&of_lower), with(&of_upper)], ["own", "common"]);
}

#[test]
fn an_ignore_file_may_be_a_link_within_the_context() {
    for (target, expected) in [
        (".gitignore", "git"),
        ("./a/../.gitignore", "git"),
        ("/.gitignore", "git"),
        ("../../.gitignore", "git"),
        ("second", "git"),
        (".dockerignore", ""),
        ("nothing", ""),
    ] {
        let entries = [
            (LINK, ".dockerignore", target, 0),
            (LINK, "second", ".gitignore", 0),
            (FILE, ".gitignore", "git", 0),
        ];
        assert_eq!(found(&entries, "Dockerfile").1, expected, "{target}");
    }
}

#[test]
fn a_dockerfile_is_found_as_docker_finds_it() {
    for (entries, path, expected) in [
        (&[(LINK, "Dockerfile", "docker/Dev", 0), (FILE, "docker/Dev", "dev", 0)][..], "Dockerfile", "dev"),
        (&[(LINK, "docker", "real", 0), (FILE, "real/Dev", "dev", 0)], "docker/Dev", "dev"),
        (&[(FILE, "a", "a", 0), (EntryType::Link, "Dockerfile", "a", 0)], "Dockerfile", "a"),
        (&[(FILE, "dockerfile", "lower", 0)], "Dockerfile", "lower"),
        (&[(FILE, "dockerfile", "lower", 0), (FILE, "Dockerfile", "upper", 0)], "Dockerfile", "upper"),
        (&[(FILE, "dir/dockerfile", "lower", 0)], "dir/Dockerfile", "lower"),
        (&[(FILE, "Dockerfile", "first", 0), (FILE, "./Dockerfile", "last", 0)], "Dockerfile", "last"),
        (
            &[(LINK, "Dockerfile", "a", 0), (FILE, "a", "a", 0), (FILE, "Dockerfile", "b", 0)],
            "Dockerfile",
            "b",
        ),
    ] {
        assert_eq!(found(entries, path).0.as_deref(), Some(expected), "{entries:?}");
    }
    for (entries, path) in [
        (&[(FILE, "dev", "lower", 0)][..], "Dev"),
        (&[(LINK, "Dockerfile", "/etc/passwd", 0)], "Dockerfile"),
        (&[(LINK, "a", "b", 0), (LINK, "b", "a", 0)], "a/Dockerfile"),
        (&[(EntryType::Directory, "Dockerfile", "", 0)], "Dockerfile"),
    ] {
        assert_eq!(found(entries, path).0, None, "{entries:?}");
    }
}

#[test]
fn a_file_that_decides_has_a_bound() {
    let large = "#".repeat((4 << 20) + 1);
    for name in ["Dockerfile", ".dockerignore"] {
        for (content, is_refused) in [(&large[1..], false), (&large, true)] {
            let tar = tar_of(&[(FILE, name, content, 0)]);
            let files = build_files(|| open(Cursor::new(&tar), Compression::None), "Dockerfile");
            assert_eq!(matches!(files, Err(ArchiveError::Refused(_))), is_refused, "{name}");
        }
    }
}

#[test]
fn a_dockerfile_is_text() {
    for (content, is_text) in [
        (&b"FROM a"[..], true),
        (b"\xef\xbb\xbfFROM a", true),
        (b"# caf\xe9\nFROM a", true),
        (b"", true),
        (b"\x1f\x8b\x08", false),
        (b"\xff\xfeF\0", false),
        (b"\xfe\xff\0F", false),
        (b"\x28\xb5\x2f\xfd", false),
    ] {
        assert_eq!(dockerfile_text(content).is_ok(), is_text, "{content:?}");
    }
}
