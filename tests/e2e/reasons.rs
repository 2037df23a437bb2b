//! The table of error reasons in the manual, which must match the code.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::Context as _;

fn words(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_uppercase() && c != '_')
        .filter(|word| word.len() > 3)
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_manual_lists_every_reason_and_no_other() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let source = fs::read_to_string(root.join("image-service/src/grpc/status.rs"))?;
    let mut given: BTreeSet<String> = source.split('"').skip(1).step_by(2).flat_map(words).collect();
    // Types of the violations of `NOT_RESOLVABLE`.
    for violation in ["IS_TEMPLATE", "NOT_FINISHED", "ARTIFACT_MISSING", "DISABLED"] {
        assert!(given.remove(violation), "{violation}");
    }
    let manual = fs::read_to_string(root.join("proto/api/trailer/images/v1/image_service.proto"))?;
    let begin = manual.find("//   UNAUTHENTICATED").context("no table of reasons")?;
    let table = manual[begin..].split("//\n").next();
    let listed: BTreeSet<String> = table
        .unwrap_or_default()
        .lines()
        // The codes precede the reasons.
        .flat_map(|line| words(line.get(line.len().min(22)..).unwrap_or_default()))
        .collect();
    let listed: BTreeSet<String> =
        listed.into_iter().chain(["UNIMPLEMENTED".to_owned(), "INTERNAL".to_owned()]).collect();
    assert_eq!(given, listed);
    Ok(())
}
