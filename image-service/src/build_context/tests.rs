use std::io::Write as _;

use flate2::{Compression, write::GzEncoder};
use tar::{Builder, EntryType, Header};

use super::*;

const LIMIT: u64 = 1024 * 1024;

/// The kind, path, link target and content of an entry.
type Entry<'a> = (EntryType, &'a str, &'a str, &'a [u8]);

/// Builds an archive of these entries.
fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, path, target, content) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        // Written directly, because the setters of the library reject hostile paths.
        let name = &mut header.as_old_mut().name;
        name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).expect("appended");
    }
    builder.into_inner().expect("ended")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).expect("compressed");
    encoder.finish().expect("compressed")
}

/// Inspects an archive in pieces of this size.
fn inspect_by(bytes: &[u8], piece: usize) -> Result<Inspected, String> {
    let mut inspection = Inspection::new(LIMIT);
    for piece in bytes.chunks(piece) {
        inspection.take(piece).map_err(|refused| refused.to_string())?;
    }
    inspection.finish().map_err(|refused| refused.to_string())
}

fn inspect(bytes: &[u8]) -> Result<Inspected, String> {
    let found = inspect_by(bytes, 1000);
    assert_eq!(found, inspect_by(bytes, 7), "the pieces make no difference");
    found
}

#[test]
fn a_good_archive_is_accepted_and_described() {
    use EntryType::{Continuous, Directory, Fifo, Link, Regular, Symlink};
    let bytes = archive(&[
        (EntryType::new(b'V'), "backup of Monday", "", b""),
        (Directory, "./", "", b""),
        (Regular, "./Dockerfile", "", b"FROM scratch\n"),
        (Directory, "a/b", "", b""),
        (Regular, "a/b/c", "", &[7; 700]),
        (Symlink, "a/b/up", "../../Dockerfile", b""),
        (Symlink, "here", "a/b", b""),
        (Symlink, "nowhere", "a/missing", b""),
        (Symlink, "python", "/usr/bin/python3", b""),
        (Symlink, "shared", "../shared", b""),
        (Symlink, "around", "a/../Dockerfile", b""),
        (Link, "hard", "./a/b/c", b""),
        (Link, "python3", "python", b""),
        (Fifo, "pipe", "", b""),
        (Continuous, "d..e/..f", "", b"x"),
        (Regular, "Dockerfile", "", b"FROM other\n"),
    ]);
    let plain = inspect(&bytes).expect("taken");
    assert_eq!(plain.size_bytes as usize, bytes.len());
    assert!(ContextDigest::parse(plain.digest.as_str()).is_ok());
    let packed = inspect(&gzip(&bytes)).expect("taken");
    assert_ne!(packed.digest, plain.digest);
}

#[test]
fn a_gzip_may_have_several_members_and_zeros_after_them() {
    let bytes = archive(&[(EntryType::Regular, "Dockerfile", "", &[7; 9_000])]);
    let (first, second) = bytes.split_at(700);
    let members = [gzip(first), gzip(second)].concat();
    for padding in [0, 1, 512, 10_000] {
        let padded = [members.as_slice(), &vec![0; padding]].concat();
        assert!(inspect(&padded).is_ok(), "{padding}");
    }
    for rest in [&b"garbage"[..], b"\0\0x", &members[..20]] {
        let refused = inspect(&[members.as_slice(), rest].concat()).expect_err("it is refused");
        assert!(refused.contains("gzip") || refused.contains("after its end"), "{refused}");
    }
    assert!(inspect(&members[..members.len() - 4]).is_err());
}

#[test]
fn a_directory_of_version_7_is_one() {
    let mut bytes = archive(&[(EntryType::Regular, "a/", "", b""), (EntryType::Regular, "a/b", "", b"x")]);
    assert!(inspect(&bytes).expect_err("it is refused").contains("must not end in `/`"));
    bytes[156] = 0;
    let sum: u32 = bytes[..512]
        .iter()
        .enumerate()
        .map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) })
        .sum();
    bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let paths = inspect(&bytes).expect("taken").paths;
    assert_eq!([paths.may_have_dockerfile("a"), paths.may_have_dockerfile("a/b")], [false, true]);
}

#[test]
fn paths_that_leave_the_context_are_refused() {
    use EntryType::{Block, Char, Directory, Fifo, GNUSparse, Link, Regular, Symlink};
    let file = |path: &'static str| vec![(Regular, path, "", &b"x"[..])];
    let link = |path: &'static str, target: &'static str| vec![(Symlink, path, target, &b""[..])];
    let cases: Vec<(Vec<Entry<'_>>, &str)> = vec![
        (file("../x"), "must have no `..` in it"),
        (file("a/../../x"), "must have no `..` in it"),
        (file("/etc/passwd"), "must be relative"),
        (link("a/b", ""), "must link to a path"),
        (vec![(Symlink, "a", "b", b""), (Regular, "a/x", "", b"x")], "must not lie below a link"),
        (vec![(Regular, "a", "", b""), (Regular, "a/x", "", b"x")], "must not lie below a file"),
        (vec![(Regular, "a/x", "", b""), (Symlink, "a", "b", b"")], "in the place of a directory"),
        (vec![(Directory, "a", "", b""), (Link, "x", "a", b"")], "must link to a file that came before"),
        (
            vec![(Symlink, "a", "b", b""), (Link, "x", "a", b""), (Regular, "x/c", "", b"")],
            "must not lie below a link",
        ),
        (vec![(Link, "x", "../../etc/passwd", b"")], "must have no `..` in it"),
        (vec![(Link, "x", "y", b"")], "must link to a file that came before"),
        (vec![(Symlink, "./", "b", b"")], "must not replace its root"),
        (vec![(Char, "null", "", b"")], "must be a file, a directory, a link or a pipe"),
        (vec![(Block, "sda", "", b"")], "must be a file, a directory, a link or a pipe"),
        (vec![(Fifo, "pipe", "", b""), (Regular, "pipe/a", "", b"")], "must not lie below a file"),
        (vec![(GNUSparse, "sparse", "", b"")], "must be a file, a directory, a link or a pipe"),
        (vec![(Directory, "d", "", b"content")], "must have no content"),
        (vec![(Regular, "", "", b"")], "has an entry without a path"),
        (vec![(Regular, "d/", "", b"a header that others read")], "must not end in `/`"),
    ];
    for (entries, rule) in cases {
        let error = inspect(&archive(&entries)).expect_err(rule);
        assert!(error.contains(rule), "{error} instead of {rule}");
        let error = inspect(&gzip(&archive(&entries))).expect_err(rule);
        assert!(error.contains(rule), "{error} instead of {rule}, compressed");
    }
}

#[test]
fn extended_headers_are_held_to_the_same_rules() {
    use EntryType::{GNULongLink, GNULongName, Link, Regular, XGlobalHeader, XHeader};
    let long = "d/".repeat(90) + "f";
    let good = archive(&[
        (XGlobalHeader, "pax_global_header", "", b"30 comment=0123456789abcdef01\n"),
        (GNULongName, "././@LongLink", "", long.as_bytes()),
        (Regular, "d/d", "", b"x"),
        (XHeader, "x", "", b"15 path=a/b/cc\n"),
        (Regular, "short", "", b"x"),
    ]);
    assert!(inspect(&good).is_ok(), "{:?}", inspect(&good));
    for (entries, rule) in [
        (vec![(GNULongName, "l", "", &b"../x"[..]), (Regular, "x", "", b"")], "must have no `..` in it"),
        (vec![(GNULongLink, "l", "", b"/etc"), (Link, "x", "y", b"")], "must be relative"),
        (vec![(XHeader, "x", "", b"13 path=/abs\n"), (Regular, "x", "", b"")], "must be relative"),
        (vec![(XHeader, "x", "", b"16 linkpath=/et\n"), (Link, "x", "y", b"")], "must be relative"),
        (vec![(XHeader, "x", "", b"10 size=1\n"), (Regular, "x", "", b"")], "no sizes in extended headers"),
        (vec![(XGlobalHeader, "x", "", b"13 path=/abs\n")], "no paths in global ones"),
        (vec![(XHeader, "x", "", b"22 GNU.sparse.major=1\n"), (Regular, "x", "", b"")], "no sparse files"),
        (vec![(XHeader, "x", "", b"99 nonsense\n"), (Regular, "x", "", b"")], "damaged"),
    ] {
        let error = inspect(&archive(&entries)).expect_err(rule);
        assert!(error.contains(rule), "{error} instead of {rule}");
    }
    let twice = |first: EntryType, second: EntryType, pax: &'static [u8]| {
        inspect(&archive(&[(first, "l", "", b"good"), (second, "x", "", pax), (Regular, "x", "", b"")]))
    };
    let error = twice(GNULongName, XHeader, b"13 path=good\n").expect_err("twice");
    assert!(error.contains("twice"), "{error}");
    let error = twice(GNULongLink, XHeader, b"17 linkpath=good\n").expect_err("twice");
    assert!(error.contains("twice"), "{error}");
    for pending in [(GNULongName, &b"other"[..]), (XHeader, b"14 path=other\n"), (XHeader, b"")] {
        let entries = [(Regular, "Dockerfile", "", &b"FROM x"[..]), (pending.0, "x", "", pending.1)];
        let error = inspect(&archive(&entries)).expect_err("nothing follows");
        assert!(error.contains("no entry follows"), "{error}");
    }
    let mut endless = Header::new_gnu();
    endless.set_entry_type(GNULongName);
    endless.set_size(u64::MAX / 2);
    endless.set_cksum();
    let error = inspect(endless.as_bytes()).expect_err("too long");
    assert!(error.contains("extended header of over 64 KiB"), "{error}");
}

#[test]
fn a_truncated_archive_is_refused() {
    let bytes = archive(&[(EntryType::Regular, "a", "", &[1; 600]), (EntryType::Regular, "b", "", b"x")]);
    for end in [1, 511, 512, 1000, 512 + 1024, bytes.len() - 1024, bytes.len() - 512] {
        let error = inspect(&bytes[..end]).expect_err("cut off");
        assert!(error.contains("must be whole") || error.contains("must be a tar"), "{end}: {error}");
        let mut packed = gzip(&bytes);
        packed.truncate(packed.len().min(end * packed.len() / bytes.len()));
        assert!(inspect(&packed).is_err(), "{end}");
    }
    assert!(inspect(b"").expect_err("nothing").contains("must not be empty"));
    // What `tar` makes of an empty list.
    assert!(inspect(&[0; 10240]).expect_err("no entries").contains("must have at least one file"));
    assert!(inspect(b"PK\x03\x04 is a zip, and no tar").expect_err("a zip").contains("must be a tar"));
    assert!(
        inspect(&[bytes.clone(), b"more".to_vec()].concat()).expect_err("more").contains("after its end")
    );
    assert!(inspect(&[bytes.clone(), bytes.clone()].concat()).expect_err("twice").contains("after its end"));
    assert!(inspect(&[bytes.clone(), vec![0; 8192]].concat()).is_ok(), "tapes are filled up");
    let mut damaged = bytes.clone();
    damaged[0] ^= 1;
    assert!(inspect(&damaged).expect_err("damaged").contains("must be a tar"));
    let mut trailing = gzip(&bytes);
    trailing.extend(b"more");
    assert!(inspect(&trailing).is_err(), "a gzip that goes on as something else");
}

#[test]
fn archives_that_tools_read_differently_are_refused() {
    for name in ["BZh9", "P*M\u{18}", "_*M\u{18}x"] {
        let hidden = archive(&[(EntryType::Regular, name, "", b"x")]);
        assert!(inspect(&hidden).expect_err("compressed for some").contains("must be a tar"));
    }
    let with = |range: std::ops::Range<usize>, bytes: &[u8]| {
        let mut archive = archive(&[(EntryType::Regular, "a", "", b"x")]);
        archive[range].copy_from_slice(bytes);
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(&archive[..512]);
        header.set_cksum();
        archive[..512].copy_from_slice(header.as_bytes());
        inspect(&archive)
    };
    assert!(with(257..265, b"ustar\x0000").is_ok());
    assert!(with(257..265, &[0; 8]).is_ok());
    assert!(with(257..265, b"ustar\x0007").expect_err("a version").contains("POSIX, GNU"));
    assert!(with(257..265, b"whatever").expect_err("a magic").contains("POSIX, GNU"));
    let deep = "d/".repeat(150) + "f";
    let deep =
        archive(&[(EntryType::GNULongName, "l", "", deep.as_bytes()), (EntryType::Regular, "x", "", b"")]);
    assert!(inspect(&deep).expect_err("deep").contains("at most 128 names"));
}

#[test]
fn a_bomb_is_noticed_before_it_is_unpacked() {
    let bomb = archive(&[(EntryType::Regular, "zeros", "", &vec![0; 2 * LIMIT as usize])]);
    let packed = gzip(&bomb);
    assert!(packed.len() < 16 * 1024, "{}", packed.len());
    assert!(inspect(&packed).expect_err("a bomb").contains("must have at most 1048576 bytes"));
    assert!(inspect(&bomb).expect_err("large").contains("must have at most 1048576 bytes"));
    // A header that claims a size beyond any limit.
    let mut header = Header::new_gnu();
    header.as_old_mut().name[0] = b'a';
    header.set_size(u64::MAX / 2);
    header.set_cksum();
    assert!(inspect(header.as_bytes()).expect_err("cut off").contains("must be whole"));
}
