//! Archives of tests, and what becomes of them.

use std::io::Cursor;

use super::*;
use crate::build_files::build_files;

/// An entry: its kind, path, target and owner.
pub(crate) type TestEntry<'a> = (EntryType, &'a str, &'a str, u64);

pub(crate) fn tar_of(entries: &[TestEntry<'_>]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (kind, path, target, owner) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o750);
        header.set_uid(*owner);
        header.set_gid(*owner);
        header.set_username("somebody").expect("a short name");
        if kind.is_symlink() || kind.is_hard_link() {
            header.set_size(0);
            tar.append_link(&mut header, path, target).expect("memory");
        } else {
            let content = if kind.is_dir() { "" } else { target };
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, path, content.as_bytes()).expect("memory");
        }
    }
    tar.into_inner().expect("memory")
}

fn written(tar: &[u8], ignore: &str) -> Result<Vec<String>, ArchiveError> {
    let ignore = DockerIgnore::parse(ignore).expect("patterns");
    let reopen = || open(Cursor::new(tar), Compression::None);
    let links = build_files(reopen, "Dockerfile")?.hard_links;
    let mut out = Vec::new();
    write(&mut reopen(), &ignore, &links, None, &mut out)?;
    let mut listed = Vec::new();
    for entry in open(Cursor::new(out), Compression::None).entries().expect("a tar") {
        let mut entry = entry.expect("an entry");
        assert_eq!((entry.header().uid().ok(), entry.header().gid().ok()), (Some(0), Some(0)));
        assert!(entry.header().username_bytes().unwrap_or_default().is_empty());
        let target = entry.link_name().expect("a target").map(|target| format!(" to {}", target.display()));
        let mut shown = format!("{}{}", entry.path().expect("a path").display(), target.unwrap_or_default());
        let mut content = String::new();
        entry.read_to_string(&mut content).expect("memory");
        if !content.is_empty() {
            shown = format!("{shown}: {content}");
        }
        listed.push(shown);
    }
    Ok(listed)
}

#[test]
fn an_archive_belongs_to_root_and_lacks_what_is_ignored() {
    let file = EntryType::Regular;
    let long = "x/".repeat(90) + "long";
    let tar = tar_of(&[
        (EntryType::Directory, "./", "", 1000),
        (file, "./Dockerfile", "FROM a", 1000),
        (EntryType::Directory, "secrets", "", 0),
        (file, "secrets/key", "k", 0),
        (file, "secrets/public", "p", 7),
        (file, &long, "l", 0),
        (EntryType::Symlink, "python", "/usr/bin/python3", 0),
        (EntryType::Symlink, "shared", "../shared", 0),
        (EntryType::Link, "again", "secrets/public", 0),
        (EntryType::Link, "same", "python", 0),
        (EntryType::Fifo, "pipe", "", 0),
        (EntryType::Block, "device", "", 0),
    ]);
    let all = [
        "./",
        "Dockerfile: FROM a",
        "secrets",
        "secrets/key: k",
        "secrets/public: p",
        "python to /usr/bin/python3",
        "shared to ../shared",
        "again to secrets/public",
        "same to python",
        "pipe",
    ];
    let mut written_all = written(&tar, "").expect("a tar");
    // The directories of the long path.
    assert_eq!(written_all.extract_if(.., |line| line.ends_with("x")).count(), 90);
    assert_eq!(written_all.extract_if(.., |line| *line == format!("{long}: l")).count(), 1);
    assert_eq!(written_all, all);
    let few = written(&tar, "*\n!secrets/public\n!again").expect("a tar");
    assert_eq!(few, ["./", "secrets", "secrets/public: p", "again to secrets/public"]);
    assert_eq!(written(&tar, "**\n").expect("a tar"), ["./"]);
    let moved = written(&tar, "secrets\nx\npython\nshared\npipe").expect("a tar");
    assert_eq!(moved, ["./", "Dockerfile: FROM a", "again: p", "same to /usr/bin/python3"]);
}

#[test]
fn a_directory_stays_when_its_files_are_ignored() {
    let file = EntryType::Regular;
    let tar = tar_of(&[(file, "logs/a/x.log", "x", 0), (file, "b", "b", 0)]);
    assert_eq!(written(&tar, "**/*.log").expect("a tar"), ["./", "logs", "logs/a", "b: b"]);
    assert_eq!(written(&tar, "logs/*").expect("a tar"), ["./", "logs", "b: b"]);
    assert_eq!(written(&tar, "logs").expect("a tar"), ["./", "b: b"]);
    assert_eq!(
        written(&tar, "logs\n!logs/a/x.log").expect("a tar"),
        ["./", "logs", "logs/a", "logs/a/x.log: x", "b: b"]
    );
}

#[test]
fn a_directory_of_version_7_is_one() {
    let mut header = Header::new_old();
    header.set_path("a/").expect("a short path");
    header.set_mode(0o700);
    header.set_size(0);
    header.as_mut_bytes()[156] = 0;
    header.set_cksum();
    let mut tar = header.as_bytes().to_vec();
    tar.extend([0; 1024]);
    let mut out = Vec::new();
    write(
        &mut open(Cursor::new(&tar), Compression::None),
        &DockerIgnore::default(),
        &BTreeMap::new(),
        None,
        &mut out,
    )
    .expect("a tar");
    let mut out = open(Cursor::new(out), Compression::None);
    let kinds: Vec<_> =
        out.entries().expect("a tar").map(|entry| kind_of(&entry.expect("an entry"))).collect();
    assert_eq!(kinds, [EntryType::Directory; 2]);
}

#[test]
fn a_tar_is_recognised() {
    let tar = tar_of(&[(EntryType::Regular, "a", "a", 0)]);
    assert_eq!(Compression::of_tar(&tar), Some(Compression::None));
    assert_eq!(Compression::of_tar(b"\x1f\x8b\x08"), Some(Compression::Gzip));
    for other in [&b"FROM scratch"[..], b"BZh9", &[0; 512], b""] {
        assert_eq!(Compression::of_tar(other), None);
    }
}
