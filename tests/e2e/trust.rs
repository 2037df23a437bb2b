//! Isolation of builds from each other, on the real Docker Engine that `tests/run` provides.

use proto::images::{BuildState, Image};

use crate::{
    answers::lines,
    client::{Client, image},
    engine_fixture::Real,
};

/// The output of one build: the lines that its steps have printed, and the number of cached steps.
#[derive(Debug)]
struct Built {
    id: String,
    reference: String,
    lines: Vec<String>,
    cached: i32,
}

/// Builds an image successfully.
async fn build(client: &Client, wanted: Image) -> anyhow::Result<Built> {
    let (created, build) = client.create(wanted).await?;
    let built = client.finished(&build.id).await?;
    anyhow::ensure!(built.state() == BuildState::Succeeded, "{built:?}");
    let history = client.history(&build.id, 0).await?;
    Ok(Built {
        id: created.id,
        reference: format!("{}:{}", created.repository, created.tag),
        lines: lines(&history).into_iter().map(str::to_owned).collect(),
        cached: built.steps.unwrap_or_default().cached,
    })
}

/// Builds an image again and returns the lines that its steps have printed.
async fn rebuild(client: &Client, id: &str) -> anyhow::Result<Vec<String>> {
    let build = client.build(id).await?;
    let built = client.finished(&build.id).await?;
    anyhow::ensure!(built.state() == BuildState::Succeeded, "{built:?}");
    Ok(lines(&client.history(&build.id, 0).await?).into_iter().map(str::to_owned).collect())
}

const PRINT_RANDOM: &str = "RUN echo ran $(/bin/busybox od -An -tx1 -N8 /dev/urandom)";

#[tokio::test(flavor = "multi_thread")]
async fn results_of_steps_stay_with_who_ran_them() -> anyhow::Result<()> {
    let real = Real::start_with(&["--slots", "4"]).await?;
    let (alice, bob) = (real.alice(), real.service.builder("bob"));
    let admin = real.service.client(&real.service.token("root", &[image_service::Role::Admin]));
    let wanted = |name: &str| image(&format!("{name} {}", real.run), &real.dockerfile(PRINT_RANDOM));

    // At once, and one after the other.
    let (first, second) = tokio::try_join!(build(&alice, wanted("Mine")), build(&bob, wanted("Mine")))?;
    let third = build(&bob, wanted("Mine again")).await?;
    let own = build(&alice, wanted("Mine again")).await?;
    assert_eq!((first.lines.len(), second.lines.len()), (1, 1), "{first:?}, {second:?}");
    assert_ne!(first.lines, second.lines, "bob was told what a step of alice printed");
    // What comes from the cache prints nothing.
    for cached in [&third, &own] {
        assert_eq!((cached.lines.as_slice(), cached.cached > 0), (&[][..], true), "{cached:?}");
    }
    // Whoever builds an image of another one's brings a domain of its own.
    let foreign = rebuild(&admin, &first.id).await?;
    assert_eq!(foreign.len(), 1, "{foreign:?}");
    assert_ne!(foreign, first.lines);
    real.clean(&[&first.reference, &second.reference, &third.reference, &own.reference]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_mounts_stay_with_who_filled_them() -> anyhow::Result<()> {
    let real = Real::start_with(&["--slots", "4"]).await?;
    let (alice, bob) = (real.alice(), real.service.builder("bob"));
    let mut references = Vec::new();
    for (kind, options) in [
        ("plain", "target=/cache"),
        ("locked", "target=/cache,sharing=locked"),
        ("named", "target=/cache,id=packages"),
        ("private", "target=/cache,id=private,sharing=private"),
    ] {
        let mount = |name: &str, command: &str| {
            let step = format!("RUN --mount=type=cache,{options} {command}");
            image(&format!("{kind} {name} {}", real.run), &real.dockerfile(&step))
        };
        let run = &real.run;
        let write = |who: &str| format!("echo of {who} > /cache/{kind}-{run}-{who}");
        let list = format!("cd /cache && for file in {kind}-{run}-*; do echo $file; done");
        let [of_alice, of_bob] = ["alice", "bob"].map(|who| format!("{kind}-{run}-{who}"));
        let built = tokio::try_join!(
            build(&alice, mount("write", &write("alice"))),
            build(&bob, mount("write", &write("bob"))),
        )?;
        let seen_by_alice = build(&alice, mount("read", &list)).await?;
        let seen_by_bob = build(&bob, mount("read", &list)).await?;
        if kind != "private" {
            assert_eq!(seen_by_alice.lines, [of_alice], "{kind}");
            assert_eq!(seen_by_bob.lines, [of_bob], "{kind}");
        } else {
            assert!(!seen_by_alice.lines.contains(&of_bob), "{seen_by_alice:?}");
            assert!(!seen_by_bob.lines.contains(&of_alice), "{seen_by_bob:?}");
        }
        references.extend([built.0, built.1, seen_by_alice, seen_by_bob].map(|built| built.reference));
    }
    let references: Vec<&str> = references.iter().map(String::as_str).collect();
    real.clean(&references).await
}
