//! The main flows against the real Docker Engine that `tests/run` provides.

use std::{collections::HashMap, fs, time::Duration};

use anyhow::Context as _;
use proto::images::{BuildErrorKind, BuildState, ImageStatus, build_event::Event};

use crate::{
    answers::{assert_gapless, joined_lines, lines},
    base_image,
    client::{image, repository_of},
    dockerd::starts_containers,
    engine_fixture::{Real, connect},
    eventually::eventually_true,
    stack::Worker,
};

/// Returns the number of processes on this host that have exactly this argument.
fn processes_with(argument: &str) -> anyhow::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        // A process may end meanwhile.
        let Ok(command) = fs::read(entry?.path().join("cmdline")) else { continue };
        count += usize::from(command.split(|&byte| byte == 0).any(|part| part == argument.as_bytes()));
    }
    Ok(count)
}

fn unique_seconds(run: &str, salt: u32) -> anyhow::Result<String> {
    let digits = u32::from_str_radix(&run[..6], 16)?;
    Ok(format!("300.{digits:08}{salt}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_built_image_runs() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let alice = real.alice();
    let mut wanted = image(
        &format!("Real {}", real.run),
        &real.dockerfile("COPY greeting /greeting\nRUN echo building $RUN; /bin/busybox cat /greeting\nCMD [\"/bin/busybox\", \"cat\", \"/greeting\"]"),
    );
    if let Some(proto::images::image_config::Source::Dockerfile(source)) =
        wanted.config.as_mut().and_then(|config| config.source.as_mut())
    {
        source.files.push(proto::images::ContextFile {
            path: "greeting".to_owned(),
            content: "grüß dich\n".as_bytes().to_vec().into(),
            executable: false,
        });
    }
    let (created, build) = alice.create(wanted).await?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");
    let reference = created.reference.clone();
    let artifact = alice.get(&created.id).await?.artifact.context("an artifact")?;
    assert_eq!(real.image_id(&reference).await?, artifact.image_id);
    assert!(artifact.size_bytes > 1_000_000);
    let of_attempt = format!("trailer.invalid/attempt/{}", build.id);
    assert_eq!(real.tags_with(&of_attempt).await?, [""; 0], "the attempt's own tag is gone");
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events), [format!("building {}", real.run).as_str(), "grüß dich"]);
    if starts_containers() {
        assert_eq!(real.run_image(&reference).await?, "grüß dich\n");
    }

    // The second build comes from the cache and yields the same image.
    let again = alice.build(&created.id).await?;
    let again = alice.finished(&again.id).await?;
    assert_eq!(again.state(), BuildState::Succeeded);
    assert!(again.steps.context("steps")?.cached >= 2, "{again:?}");
    assert_eq!(real.image_id(&reference).await?, artifact.image_id);
    real.clean(&[&reference]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_step_is_named() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let alice = real.alice();
    let text = real.dockerfile(
        "RUN echo fine\nRUN echo out; /bin/busybox sleep 0.3; echo err >&2; exit 7\nRUN echo never",
    );
    let (created, build) = alice.create(image("Failing", &text)).await?;
    let failed = alice.finished(&build.id).await?;
    assert_eq!((failed.state(), failed.attempt), (BuildState::Failed, 1));
    let error = failed.error.context("an error")?;
    assert_eq!(error.kind(), BuildErrorKind::User);
    assert!(
        error.step.contains("RUN echo out; /bin/busybox sleep 0.3; echo err >&2; exit 7"),
        "{}",
        error.step
    );
    assert!(error.message.contains("exit code: 7"), "{}", error.message);
    assert_eq!(error.last_lines, ["out", "err"]);
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::Error);
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events), ["fine", "out", "err"]);
    for after in 0..events.len() {
        assert_eq!(alice.history(&build.id, i64::try_from(after)?).await?, events[after..]);
    }

    for (text, part) in
        [(real.dockerfile("COPY missing /"), "missing"), ("FROM scratch\nNONSENSE".to_owned(), "NONSENSE")]
    {
        let (_, build) = alice.create(image("Refused", &text)).await?;
        let failed = alice.finished(&build.id).await?;
        let error = failed.error.clone().context("an error")?;
        assert_eq!((failed.state(), error.kind()), (BuildState::Failed, BuildErrorKind::User), "{error:?}");
        assert!(error.message.contains(part), "{} does not name {part}", error.message);
    }
    real.clean(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_leaves_no_process_and_the_previous_image() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let alice = real.alice();
    let seconds = unique_seconds(&real.run, 1)?;
    let text = real.dockerfile("RUN /bin/busybox echo once");
    let (created, first) = alice.create(image(&format!("Sleepy {}", real.run), &text)).await?;
    assert_eq!(alice.finished(&first.id).await?.state(), BuildState::Succeeded);
    let reference = created.reference.clone();
    let previous = real.image_id(&reference).await?;

    let sleeping = real.dockerfile(&format!("RUN /bin/busybox sleep {seconds}"));
    let (other, build) = alice.create(image("Cancelled", &sleeping)).await?;
    eventually_true("the step runs", async || Ok(processes_with(&seconds)? > 0)).await?;
    alice.cancel(&other.id).await?;
    let cancelled = alice.finished(&build.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
    assert_eq!(processes_with(&seconds)?, 0);
    assert_eq!(alice.get(&other.id).await?.status(), ImageStatus::BuildCancelled);
    assert_eq!(real.image_id(&reference).await?, previous);
    assert_eq!(real.tags_with(&build.id).await?, [""; 0]);
    assert_eq!(real.tags_with(repository_of(&other)).await?, [""; 0]);
    real.clean(&[&reference]).await
}

/// Cancels at many moments, because an engine may lose a cancel while it starts a step.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_at_any_moment_stops_the_build() -> anyhow::Result<()> {
    const MOMENTS: u32 = 16;
    let real = Real::start().await?;
    let alice = real.alice();
    for moment in 0..MOMENTS {
        let seconds = unique_seconds(&real.run, moment)?;
        let text = real.dockerfile(&format!("RUN /bin/busybox sleep {seconds}"));
        let (shown, build) = alice.create(image(&format!("Moment {moment}"), &text)).await?;
        alice.until(&build.id, |build| build.state() == BuildState::Running).await?;
        tokio::time::sleep(Duration::from_millis(8) * moment).await;
        alice.cancel(&shown.id).await?;
        let cancelled = alice.finished(&build.id).await?;
        assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true), "{moment}");
        assert_eq!(processes_with(&seconds)?, 0, "{moment}");
    }
    real.clean(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_does_not_disturb_an_identical_build() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let alice = real.alice();
    let marker = format!("done-{}", &real.run[..8]);
    let text = real.dockerfile(&format!("RUN echo begun; /bin/busybox sleep 10; echo {marker}"));
    let (first, first_build) = alice.create(image(&format!("Same {}", real.run), &text)).await?;
    let (second, second_build) = alice.create(image(&format!("Same {}", real.run), &text)).await?;
    for build in [&first_build, &second_build] {
        alice.until(&build.id, |build| build.log_bytes > 0).await?;
    }
    alice.cancel(&first.id).await?;
    assert_eq!(alice.finished(&first_build.id).await?.state(), BuildState::Cancelled);
    let finished = alice.finished(&second_build.id).await?;
    assert_eq!((finished.state(), finished.attempt), (BuildState::Succeeded, 1));
    let events = alice.history(&second_build.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events), ["begun", marker.as_str()]);
    let reference = second.reference.clone();
    let label = real.docker.inspect_image(&reference).await?.config.and_then(|config| config.labels);
    let expected = HashMap::from([
        ("trailer.image-id".to_owned(), second.id.clone()),
        ("trailer.worker".to_owned(), real.worker()),
        ("trailer.reference".to_owned(), reference.clone()),
    ]);
    let mut label = label.context("labels")?;
    assert!(label.remove("trailer.catalogue").is_some_and(|catalogue| !catalogue.is_empty()));
    assert_eq!(label, expected);
    real.clean(&[&reference]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_have_the_order_of_the_dockerfile() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let alice = real.alice();
    let (base, run) = (real.base(), &real.run);
    let text = format!(
        "FROM {base} AS late\nRUN echo {run} late1\nRUN echo {run} late2\nFROM {base} AS Early\nRUN echo {run} early1\n\
         FROM {base} AS unused\nRUN exit 9\nFROM {base}\nCOPY --from=early /bin/sh /early\nCOPY --from=late /bin/sh /late\n\
         RUN echo {run} last"
    );
    let (created, build) = alice.create(image(&format!("Stages {run}"), &text)).await?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");
    let mut steps: Vec<(i32, String)> = alice
        .history(&build.id, 0)
        .await?
        .into_iter()
        .filter_map(|event| match event.event {
            Some(Event::StepChange(step)) => Some((step.step, step.name)),
            _ => None,
        })
        .filter(|(_, name)| name.contains("] RUN ") || name.contains("] COPY "))
        .collect();
    steps.sort();
    steps.dedup();
    let last_words: Vec<&str> = steps.iter().filter_map(|(_, name)| name.split_whitespace().last()).collect();
    assert_eq!(last_words, ["late1", "late2", "early1", "/early", "/late", "last"], "{steps:?}");
    real.clean(&[&created.reference]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_output_is_reported_or_its_gap_is() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let alice = real.alice();
    const LINES: usize = 200_000;
    // 20 MB, as fast as the step can print.
    let filler = "y".repeat(100);
    let text = real
        .dockerfile(&format!("RUN /bin/busybox seq 1 {LINES} | /bin/busybox sed s/^/{filler}/; echo end"));
    let (created, build) = alice.create(image(&format!("Burst {}", real.run), &text)).await?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt), (BuildState::Succeeded, 1), "{finished:?}");
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    // Unless configured to keep everything, an engine clips the output of a step, even within a line.
    let printed = joined_lines(&events);
    let whole =
        printed.iter().zip(1..).take_while(|(line, number)| **line == format!("{filler}{number}")).count();
    assert!(whole == LINES || finished.log_truncated, "{whole} lines, and then {:?}", printed.get(whole));
    assert!(printed.len() == LINES + 1 || finished.log_truncated, "{} lines and no gap", printed.len());
    assert!(whole > 1_000, "{whole} lines");
    real.clean(&[&created.reference]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_removes_what_attempts_of_its_name_have_left() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let (_, docker_host) = connect().await?;
    let name = format!("killed-{}", real.run);
    let stranger = format!("stranger-{}", real.run);
    let tags = [1, 2, 3].map(|number| format!("trailer.invalid/attempt/{}:{number}", real.run));
    let strangers = tags[2].clone();
    for (worker, tag) in [&name, &name, &stranger].into_iter().zip(tags) {
        base_image::import_with(&real.docker, &tag, &tag, &format!("LABEL trailer.worker={worker}")).await?;
    }
    let named = format!("trailer-test/named-{}:latest", real.run);
    base_image::import_with(&real.docker, &named, &named, &format!("LABEL trailer.worker={name}")).await?;
    let worker = Worker::start(&real.service, &name, &docker_host)?;
    // The worker takes builds only afterwards.
    let mut wanted = image("After", &real.dockerfile("RUN echo after"));
    if let Some(config) = &mut wanted.config {
        config.worker.clone_from(&name);
    }
    let (created, build) = real.alice().create(wanted).await?;
    assert_eq!(real.alice().finished(&build.id).await?.state(), BuildState::Succeeded);
    assert_eq!(
        real.tags_with(&format!("trailer.invalid/attempt/{}", real.run)).await?,
        std::slice::from_ref(&strangers)
    );
    assert_eq!(real.tags_with(&named).await?, std::slice::from_ref(&named));
    worker.stop().await?;
    let reference = created.reference.clone();
    real.clean(&[&reference, &named, &strangers]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_over_its_time_leaves_nothing_running() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let alice = real.alice();
    let seconds = unique_seconds(&real.run, 7)?;
    let mut wanted = image("Slow", &real.dockerfile(&format!("RUN /bin/busybox sleep {seconds}")));
    if let Some(config) = &mut wanted.config {
        config.build_timeout = Some(prost_types::Duration { seconds: 10, nanos: 0 });
    }
    let (created, build) = alice.create(wanted).await?;
    eventually_true("the step runs", async || Ok(processes_with(&seconds)? > 0)).await?;
    let failed = alice.finished(&build.id).await?;
    let error = failed.error.clone().context("an error")?;
    assert_eq!(
        (failed.state(), error.kind(), failed.attempt),
        (BuildState::Failed, BuildErrorKind::Timeout, 1),
        "{failed:?}"
    );
    assert!(error.message.contains("10s"), "{error:?}");
    assert_eq!(processes_with(&seconds)?, 0);
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::Error);
    assert_eq!(real.tags_with(&build.id).await?, [""; 0]);
    real.clean(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_seen_as_a_step_prints_it() -> anyhow::Result<()> {
    const LETTERS: usize = 20_000;
    let real = Real::start().await?;
    let alice = real.alice();
    let printed = [
        format!("x{}", "ä".repeat(LETTERS)),
        "[output clipped, log limit 1MiB reached]".to_owned(),
        "100 %".to_owned(),
        "Geographic area: ".to_owned(),
    ];
    let seconds = unique_seconds(&real.run, 8)?;
    let step = format!(
        "RUN /bin/busybox awk 'BEGIN {{ printf \"x\"; for (i = 0; i < {LETTERS}; i++) printf \"\\303\\244\"; print \"\" }}'; \
         echo '{}'; printf '50 %%\\r{}%\\n{}'; /bin/busybox sleep {seconds}",
        printed[1], printed[2], printed[3]
    );
    let mut wanted = image(&format!("Prompt {}", real.run), &real.dockerfile(&step));
    if let Some(config) = &mut wanted.config {
        config.build_timeout = Some(prost_types::Duration { seconds: 15, nanos: 0 });
    }
    let (_, build) = alice.create(wanted).await?;
    let bytes = i64::try_from(printed.iter().map(String::len).sum::<usize>())?;
    let running = alice.until(&build.id, |build| build.log_bytes >= bytes).await?;
    assert_eq!(running.state(), BuildState::Running);
    let failed = alice.finished(&build.id).await?;
    let error = failed.error.clone().context("an error")?;
    assert_eq!(error.kind(), BuildErrorKind::Timeout, "{failed:?}");
    assert!(error.step.contains(&seconds), "{:?}", error.step);
    assert_eq!(error.last_lines.last(), printed.last());
    assert!(!failed.log_truncated, "nothing is missing");
    assert_eq!(joined_lines(&alice.history(&build.id, 0).await?), printed);
    assert_eq!(processes_with(&seconds)?, 0);
    real.clean(&[]).await
}
