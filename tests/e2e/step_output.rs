//! Output of steps that is not made of whole lines.

use proto::images::{
    BuildErrorKind, BuildState,
    LineStart::{Continuation, NewLine, Replacement},
    build_event::Event,
};

use crate::{
    answers::{assert_gapless, joined_lines, lines, pieces},
    client::image,
    fake_engine::{FakeEngine, Gate, Script},
    stack::{Service, Worker},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_seen_while_its_step_waits() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    let prompt = "Geographic area: ";
    engine.script(
        Script::new()
            .step("[1/1] RUN ask")
            .log("Configuring tzdata\nGeo")
            .log("graphic area: ")
            .pause(&gate)
            .log("6")
            .log("\nCity: \n")
            .succeed(),
    );
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Ask", "FROM scratch\nRUN ask")).await?;
    let printed = i64::try_from("Configuring tzdata".len() + prompt.len())?;
    let waiting = alice.until(&build.id, |build| build.log_bytes == printed).await?;
    assert_eq!(waiting.state(), BuildState::Running);
    gate.open();
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    let expected =
        [(NewLine, "Configuring tzdata"), (NewLine, prompt), (Continuation, "6"), (NewLine, "City: ")];
    assert_eq!(pieces(&events), expected);
    assert_eq!(joined_lines(&events), ["Configuring tzdata", "Geographic area: 6", "City: "]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_by_carriage_returns_is_seen_at_a_limited_rate() -> anyhow::Result<()> {
    const STATES: usize = 5_000;
    let engine = FakeEngine::start().await?;
    let gates = [Gate::new(), Gate::new()];
    engine.script(
        Script::new()
            .step("[1/1] RUN fetch")
            .log("\r10 %\r20 %")
            .pause(&gates[0])
            .log("\r30 %\r40 %\r")
            .pause(&gates[1])
            .logs(STATES, |i| format!("\rpart {i}"))
            .log("\rdone\r\nnext\n")
            .succeed(),
    );
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Fetch", "FROM scratch\nRUN fetch")).await?;
    alice.until(&build.id, |build| build.log_bytes == 4).await?;
    gates[0].open();
    alice.until(&build.id, |build| build.log_bytes == 8).await?;
    gates[1].open();
    alice.finished(&build.id).await?;
    let events = alice.history(&build.id, 0).await?;
    let pieces = pieces(&events);
    assert_eq!(pieces[..2], [(NewLine, "20 %"), (Replacement, "40 %")]);
    assert_eq!(pieces[pieces.len() - 2..], [(Replacement, "done"), (NewLine, "next")]);
    assert!(pieces.len() < STATES / 10, "{} states", pieces.len());
    assert_eq!(joined_lines(&events), ["done", "next"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_names_the_running_step_with_its_last_lines() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    engine.script(
        Script::new()
            .step("[1/2] FROM scratch")
            .step("[2/2] RUN wait")
            .log("waiting for the mirror\n")
            .log_error("a prompt: ")
            .hang(),
    );
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let mut wanted = image("Wait", "FROM scratch\nRUN wait");
    if let Some(config) = &mut wanted.config {
        config.build_timeout = Some(prost_types::Duration { seconds: 2, nanos: 0 });
    }
    let (created, build) = alice.create(wanted).await?;
    let error = alice.finished(&build.id).await?.error.expect("a failed build says why");
    assert_eq!((error.kind(), error.step.as_str()), (BuildErrorKind::Timeout, "[2/2] RUN wait"));
    assert_eq!(error.last_lines, ["waiting for the mirror", "a prompt: "]);
    let message = alice.get(&created.id).await?.status_message;
    assert!(message.contains("[2/2] RUN wait") && message.contains("2s"), "{message}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clip_of_the_engine_is_distinguished_from_output_that_looks_like_one() -> anyhow::Result<()> {
    let clip = "[output clipped, log limit 64KiB reached]";
    let engine = FakeEngine::start().await?;
    let filler = format!("{}\n", "y".repeat(1_023)).repeat(64);
    engine.on(
        "RUN show",
        Script::new().step("[1/1] RUN show").log(&format!("log:\n{clip}\n")).log("after\n").succeed(),
    );
    engine.on(
        "RUN talk",
        Script::new()
            .step("[1/1] RUN talk")
            .log(&filler)
            .log(&format!("\n{clip}\n"))
            .log("after\n")
            .succeed(),
    );
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");

    let (_, build) = alice.create(image("Show", "FROM scratch\nRUN show")).await?;
    assert!(!alice.finished(&build.id).await?.log_truncated);
    assert_eq!(lines(&alice.history(&build.id, 0).await?), ["log:", clip, "after"]);

    let (_, build) = alice.create(image("Talk", "FROM scratch\nRUN talk")).await?;
    assert!(alice.finished(&build.id).await?.log_truncated);
    let events = alice.history(&build.id, 0).await?;
    let is_gap = |event: &Option<Event>| matches!(event, Some(Event::LogGap(gap)) if gap.message == clip);
    assert!(events.iter().any(|event| is_gap(&event.event)));
    let lines = lines(&events);
    assert_eq!((lines.len(), lines[64]), (65, "after"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_line_is_cut_between_its_letters() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let line = format!("x{}", "ä€😀".repeat(10_000));
    engine.script(
        Script::new().step("[1/1] RUN print").log(&line[..3]).log(&line[3..]).log("\nend\n").succeed(),
    );
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Print", "FROM scratch\nRUN print")).await?;
    alice.finished(&build.id).await?;
    let events = alice.history(&build.id, 0).await?;
    assert!(lines(&events).iter().all(|piece| piece.len() <= 16 * 1024));
    assert_eq!(joined_lines(&events), [line.as_str(), "end"]);
    Ok(())
}
