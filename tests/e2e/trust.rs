//! Isolation of builds from each other, on the real Docker Engine that `tests/run` provides.

use image_service::Role;
use proto::images::{
    BuildErrorKind, BuildState, GenerateSource, Image, Permission, PullSource, image_config::Source,
};

use crate::{
    answers::lines_of_steps,
    base_image,
    client::{Client, image, of_source},
    contexts::{self, tar_of},
    engine_fixture::Real,
    registry::Registry,
};

mod forgery;
mod registry_images;

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
        reference: created.reference.clone(),
        lines: lines_of_steps(&history).into_iter().map(str::to_owned).collect(),
        cached: built.steps.unwrap_or_default().cached,
    })
}

/// Builds an image again and returns the lines that its steps have printed.
async fn rebuild(client: &Client, id: &str) -> anyhow::Result<Vec<String>> {
    let build = client.build(id).await?;
    let built = client.finished(&build.id).await?;
    anyhow::ensure!(built.state() == BuildState::Succeeded, "{built:?}");
    Ok(lines_of_steps(&client.history(&build.id, 0).await?).into_iter().map(str::to_owned).collect())
}

const PRINT_RANDOM: &str = "RUN echo ran $(/bin/busybox od -An -tx1 -N8 /dev/urandom)";

#[tokio::test(flavor = "multi_thread")]
async fn results_of_steps_stay_with_who_ran_them() -> anyhow::Result<()> {
    let real = Real::start_with(&["--slots", "4"]).await?;
    let (alice, bob) = (real.alice(), real.service.builder("bob"));
    let admin = real.service.client(&real.service.token("root", &[Role::Admin]));
    let wanted = |name: &str| image(&format!("{name} {}", real.run), &real.dockerfile(PRINT_RANDOM));

    // At once, and one after the other.
    let (first, second) = tokio::try_join!(build(&alice, wanted("Mine")), build(&bob, wanted("Mine")))?;
    let third = build(&bob, wanted("Mine again")).await?;
    let own = build(&alice, wanted("Mine again")).await?;
    assert_eq!((first.lines.len(), second.lines.len()), (1, 1), "{first:?}, {second:?}");
    assert_ne!(first.lines, second.lines, "bob was shown what a step of alice printed");
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

/// Builds a Dockerfile and returns the message of its failure; empty if it succeeds.
async fn failure(client: &Client, wanted: Image) -> anyhow::Result<String> {
    let (_, build) = client.create(wanted).await?;
    let built = client.finished(&build.id).await?;
    Ok(match built.error {
        Some(error) => {
            assert_eq!((error.kind(), built.attempt), (BuildErrorKind::User, 1), "{error:?}");
            error.message
        }
        None => String::new(),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invisible_image_cannot_be_built_from() -> anyhow::Result<()> {
    let real = Real::start_with(&["--slots", "4"]).await?;
    let (alice, bob) = (real.alice(), real.service.builder("bob"));
    let run = &real.run;
    let secret =
        build(&alice, image(&format!("Secret {run}"), &real.dockerfile("RUN echo treasure > /secret")))
            .await?;
    let (reference, id) = (secret.reference.as_str(), secret.id.as_str());
    let (repository, _) = reference.rsplit_once(':').expect("a tag");
    let artifact = alice.get(id).await?.artifact.expect("an artifact");
    let names = real.tags_with(&artifact.build_id).await?;
    let artifact_name =
        names.iter().find(|name| name.starts_with("trailer.invalid/artifact/")).expect("a name");
    let print = "RUN [\"/bin/busybox\", \"cat\", \"/secret\"]";
    let base = real.base();
    let ways = [
        format!("FROM {reference}\n{print}"),
        format!("FROM {repository}\n{print}"),
        format!("FROM {reference} AS it\nFROM it\n{print}"),
        format!("ARG BASE={reference}\nFROM $BASE\n{print}"),
        format!("FROM {base}\nCOPY --from={reference} /secret /secret\n{print}"),
        format!("FROM {base}\nRUN --mount=type=bind,from={reference},target=/it /bin/busybox cat /it/secret"),
        format!("FROM {artifact_name}\n{print}"),
        format!("FROM {repository}@{}\n{print}", artifact.image_id),
        format!("FROM {}\n{print}", reference.replace("trailer.invalid/", "trailer.invalid:443/")),
    ];
    for (number, dockerfile) in ways.iter().enumerate() {
        let hidden = failure(&bob, image(&format!("Way {number} {run}"), dockerfile)).await?;
        assert!(hidden.contains("not found"), "{dockerfile}: {hidden}");
        assert!(!hidden.contains("treasure"), "{dockerfile}: {hidden}");
    }
    // The engine takes no id for a name.
    let engine_id = artifact.image_id.trim_start_matches("sha256:");
    let refused = failure(&bob, image(&format!("Id {run}"), &format!("FROM {engine_id}\n{print}"))).await?;
    assert!(!refused.is_empty());
    // A trap of one's own is sprung by a build of one's own.
    let trap = format!("FROM {base}\nONBUILD COPY --from={reference} /secret /secret");
    let trap = build(&bob, image(&format!("Trap {run}"), &trap)).await?;
    let caught = image(&format!("Caught {run}"), &format!("FROM {}\n{print}", trap.reference));
    // Older engines copy from no image at all by a trigger.
    let hidden = failure(&bob, caught).await?;
    assert!(!hidden.is_empty() && !hidden.contains("treasure"), "{hidden}");
    // So are a base image of a generated Dockerfile, a Dockerfile in an archive, and a pull.
    let archive = tar_of(&[("Dockerfile", ways[0].as_bytes())])?;
    let archive = bob.upload("", &archive).await?.digest;
    let generate = GenerateSource { base_image: reference.to_owned(), ..GenerateSource::default() };
    for wanted in [
        of_source(&format!("Generated {run}"), Source::Generate(generate)),
        of_source(&format!("Pulled {run}"), Source::Pull(PullSource { reference: reference.to_owned() })),
        contexts::image_of(&format!("Archived {run}"), contexts::named(&archive, "")),
    ] {
        let name = wanted.name.clone();
        let hidden = failure(&bob, wanted).await?;
        assert!(hidden.contains("not found"), "{name}: {hidden}");
    }
    // What does not exist is refused in the same words.
    let none = format!("{repository}-none:latest");
    let missing = failure(&bob, image(&format!("None {run}"), &format!("FROM {none}\n{print}"))).await?;
    let hidden = failure(&bob, image(&format!("Hidden {run}"), &ways[0])).await?;
    assert_eq!(missing.replace(&none, reference), hidden);

    // With permission to view, the catalogue's names work, and the engine's own do not.
    alice.grant(id, "bob", &[Permission::View]).await?;
    let mut references = vec![secret.reference.clone()];
    for (number, dockerfile) in ways[..6].iter().enumerate() {
        let mut wanted = image(&format!("Seen {number} {run}"), dockerfile);
        // Equal steps would come from the cache, and print nothing.
        wanted.config.as_mut().expect("an image has a configuration").no_cache = true;
        let seen = build(&bob, wanted).await?;
        assert_eq!(seen.lines, ["treasure"], "{dockerfile}");
        references.push(seen.reference);
    }
    alice.revoke(id, "bob").await?;
    let hidden = failure(&bob, image(&format!("Revoked {run}"), &ways[0])).await?;
    assert!(hidden.contains("not found"), "{hidden}");
    let references: Vec<&str> = references.iter().map(String::as_str).collect();
    real.clean(&references).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frontend_is_run_if_allowed_and_without_the_hosts_network() -> anyhow::Result<()> {
    // It ends with 40 and the number of its network interfaces, the loopback included.
    const COUNT: &str =
        "ENTRYPOINT [\"/bin/busybox\", \"sh\", \"-c\", \"exit $((40 + $(grep -c : /proc/net/dev)))\"]";
    let real = Real::start_with(&[
        "--allow-frontend",
        "trailer.invalid/alice-*/allowed-*",
        "--engine-has-fix",
        "CVE-2026-33747",
    ])
    .await?;
    let (alice, run) = (real.alice(), &real.run);
    let allowed = build(&alice, image(&format!("Allowed {run}"), &real.dockerfile(COUNT))).await?;
    let other = build(&alice, image(&format!("Other {run}"), &real.dockerfile(COUNT))).await?;
    let with = |frontend: &str| format!("# syntax={frontend}\n# whatever it reads\nFROM scratch\nENV A=b");
    let run_it = |client: Client, name: &str, frontend: &str| {
        let wanted = image(&format!("{name} {run}"), &with(frontend));
        async move { failure(&client, wanted).await }
    };
    let ran = run_it(alice.clone(), "Runs", &allowed.reference).await?;
    let (_, interfaces) = ran.rsplit_once("exit code: 4").unwrap_or_default();
    let interfaces: usize = interfaces.parse().unwrap_or_default();
    assert!((1..=2).contains(&interfaces), "{ran}");
    let refused = run_it(alice.clone(), "Refused", &other.reference).await?;
    assert!(refused.contains("--allow-frontend"), "{refused}");
    let hidden = run_it(real.service.builder("bob"), "Hidden", &allowed.reference).await?;
    assert!(hidden.contains("not found"), "{hidden}");
    // Nothing is fetched for the one that the engine has built in.
    let official = build(&alice, image(&format!("Official {run}"), &with("docker/dockerfile:1"))).await?;
    // Nor does a frontend come by other ways.
    let mut argument = image(&format!("Argument {run}"), &real.dockerfile("ENV A=b"));
    let config = argument.config.as_mut().expect("an image has a configuration");
    let Some(Source::Dockerfile(dockerfile)) = &mut config.source else {
        anyhow::bail!("no Dockerfile");
    };
    dockerfile.build_args.insert("BUILDKIT_SYNTAX".to_owned(), other.reference.clone());
    assert!(alice.create(argument).await.is_err());
    real.clean(&[&allowed.reference, &other.reference, &official.reference]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn images_loaded_by_hand_and_urls_are_no_sources() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let bob = real.service.builder("bob");
    // Of a registry that has no such image, and whose password the worker does not know.
    let registry = Registry::start().await?;
    let loaded = format!("{}/private-{}:1", registry.addr, real.run);
    base_image::import(&real.docker, &loaded).await?;
    let hidden =
        failure(&bob, image(&format!("Loaded {}", real.run), &format!("FROM {loaded}\nENV A=b"))).await?;
    assert!(hidden.contains(&loaded), "{hidden}");
    for (number, dockerfile) in [
        format!("FROM {}\nADD http://127.0.0.1:1/file /", real.base()),
        format!("FROM {}\nADD https://github.com/moby/moby.git#master /", real.base()),
    ]
    .iter()
    .enumerate()
    {
        let refused = failure(&bob, image(&format!("Add {number} {}", real.run), dockerfile)).await?;
        assert!(refused.contains("--allow-add"), "{dockerfile}: {refused}");
    }
    real.clean(&[&loaded]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hidden_image_elsewhere_is_refused_in_the_words_of_its_neighbours() -> anyhow::Result<()> {
    let real = Real::start_with(&["--allow-source", "registry.example/*"]).await?;
    let (bob, run) = (real.service.builder("bob"), &real.run);
    let admin = real.service.client(&real.service.token("root", &[Role::Admin]));
    let at = |name: &str| format!("hidden.example/{run}/{name}");
    let hidden = Image { repository: at("one"), ..image(&format!("Hidden {run}"), "FROM scratch\nENV A=1") };
    build(&admin, hidden).await?;
    let mut refusals = Vec::new();
    for name in ["one", "two"] {
        let from = image(&format!("From {name} {run}"), &format!("FROM {}", at(name)));
        refusals.push(failure(&bob, from).await?.replace(&at(name), "it"));
    }
    assert!(refusals[0].contains("--allow-source"), "{refusals:?}");
    assert_eq!(refusals[0], refusals[1]);
    Ok(())
}
