//! Tests of the fake engine's promises, through a client that drives it as a worker does.

mod client;

use bollard::moby::buildkit::v1::{InfoRequest, ListWorkersRequest, PruneRequest, StatusRequest};
use prost::Message as _;
use tonic::{Code, Status};

use super::{Ended, FakeEngine, Gate, Script};
use client::{Client, LIMIT, output, request, rest, vertex};

const RUN: &str = "[2/2] RUN make";
const DOCKERFILE: &str = "FROM scratch\nRUN make\n";

fn two_steps() -> Script {
    Script::new().step("[1/2] FROM scratch").cached().step(RUN)
}

#[tokio::test]
async fn a_build_reports_its_progress_and_leaves_an_image() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    engine.on("RUN make", two_steps().log("made\n").image_size(7));
    let mut client = Client::connect(&engine).await?;
    client.open_session("a", &[("Dockerfile", DOCKERFILE), ("etc/motd", "hello")]).await?;
    // Status may come before Solve.
    let following = client::follow(client.control.clone(), "a");
    let solved = client.control.solve(request("a")).await?.into_inner().exporter_response;

    let progress = following.ended().await?;
    assert_eq!(output(&progress), "made\n");
    let names = ["[internal] load remote build context", "copy /context /", RUN, "exporting to image"];
    for name in names {
        let ended = vertex(&progress, name).is_some_and(|vertex| vertex.completed.is_some());
        assert!(ended, "{name} of {progress:#?}");
    }
    let tags = engine.tags();
    let id = tags.get("selftest/a:latest");
    assert_eq!(solved.get("containerimage.digest"), id);
    assert_eq!(solved.get("containerimage.config.digest"), id);
    assert_eq!(solved["image.name"], "docker.io/selftest/a:latest");

    let build = &engine.builds()[0];
    assert_eq!((build.session.as_str(), build.build_id.as_str()), ("a", "a"));
    assert_eq!(build.tag.as_deref(), Some("selftest/a"));
    assert_eq!((build.dockerfile.as_str(), &build.files["etc/motd"][..]), (DOCKERFILE, &b"hello"[..]));
    assert_eq!((build.labels["owner"].as_str(), build.attributes["target"].as_str()), ("alice", "tools"));
    assert_eq!((build.exporter["name"].as_str(), build.ended), ("selftest/a", Ended::Succeeded));

    // A session does not end with its build.
    engine.wait_for(|state| state.sessions == 1, LIMIT).await?;
    client.close_sessions();
    engine.wait_for(|state| state.sessions == 0, LIMIT).await
}

#[tokio::test]
async fn a_late_reader_sees_the_beginning_and_none_is_waited_for() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.on("late", two_steps().pause(&gate).logs(10_000, |i| format!("{i}\n")));
    let mut client = Client::connect(&engine).await?;
    let dockerfile = "FROM scratch\n# late";
    let control = client.control.clone();
    let (solved, progress) = tokio::join!(client.build("a", dockerfile), async {
        gate.reached().await;
        let following = client::follow(control, "a");
        gate.open();
        following.ended().await
    });
    solved??;
    let progress = progress?;
    assert!(vertex(&progress, "copy /context /").is_some());
    assert_eq!(output(&progress).lines().count(), 10_000);

    client.build("unread", dockerfile).await??;
    assert_eq!(engine.builds()[1].ended, Ended::Succeeded);
    Ok(())
}

#[tokio::test]
async fn a_failing_step_has_a_typed_exit_code() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    engine.script(two_steps().fail("exit code: 2"));
    let mut client = Client::connect(&engine).await?;
    let following = client::follow(client.control.clone(), "a");
    let failed = client.build("a", DOCKERFILE).await?.expect_err("the step fails");
    let message = r#"process "/bin/sh -c make" did not complete successfully: exit code: 2"#;
    assert_eq!((failed.code(), failed.message()), (Code::Unknown, message));

    let details = tonic_types::pb::Status::decode(failed.details())?.details;
    let detail = |name: &str| {
        let found =
            details.iter().find(|detail| detail.type_url == format!("github.com/moby/buildkit/{name}+json"));
        found.map(|detail| serde_json::from_slice::<serde_json::Value>(&detail.value)).transpose()
    };
    let progress = following.ended().await?;
    let step = vertex(&progress, RUN).expect("the step was announced");
    assert_eq!(step.error, message);
    assert_eq!(detail("gatewayapi.ExitMessage")?, Some(serde_json::json!({ "Code": 2 })));
    assert_eq!(detail("errdefs.Vertex")?, Some(serde_json::json!({ "digest": step.digest })));
    let source = detail("errdefs.Source")?.expect("a place in the Dockerfile");
    assert_eq!(source["ranges"][0]["start"]["line"], 2);
    assert_eq!((engine.builds()[0].ended, engine.tags().len()), (Ended::Failed, 0));
    Ok(())
}

#[tokio::test]
async fn an_error_is_answered_as_it_was_scripted() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let recorded = Status::with_details(Code::Unavailable, "away", b"typed"[..].into());
    engine.on("recorded", two_steps().fail_with(recorded));
    engine.on("internal", two_steps().internal_error());
    engine.on("plain", two_steps().fail("no space left on device"));
    let mut client = Client::connect(&engine).await?;
    let failed = client.build("recorded", "# recorded").await?.expect_err("it fails");
    assert_eq!(
        (failed.code(), failed.message(), failed.details()),
        (Code::Unavailable, "away", &b"typed"[..])
    );
    let failed = client.build("internal", "# internal").await?.expect_err("it fails");
    assert_eq!(failed.code(), Code::Internal);
    let failed = client.build("plain", "# plain").await?.expect_err("it fails");
    assert_eq!((failed.code(), failed.message()), (Code::Unknown, "no space left on device"));

    let mut without = request("recorded");
    "elsewhere/Dockerfile".clone_into(without.frontend_attrs.entry("filename".to_owned()).or_default());
    let failed = client.control.solve(without).await.expect_err("there is no such Dockerfile");
    assert!(failed.message().starts_with("failed to read dockerfile"), "{failed}");
    assert!(engine.builds().iter().all(|build| build.ended == Ended::Failed));
    Ok(())
}

#[tokio::test]
async fn a_dropped_solve_cancels_and_the_progress_ends() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(two_steps().log("zzz\n").pause(&gate));
    let mut client = Client::connect(&engine).await?;
    client.open_session("a", &[("Dockerfile", DOCKERFILE)]).await?;
    let following = client::follow(client.control.clone(), "a");
    tokio::select! {
        solved = client.control.solve(request("a")) => anyhow::bail!("{solved:?}"),
        () = gate.reached() => {}
    }

    let progress = following.ended().await?;
    let error = vertex(&progress, RUN).map(|step| step.error.as_str()).unwrap_or_default();
    assert!(error.ends_with("context canceled"), "{error}");
    let build = &engine.builds()[0];
    assert_eq!((build.ended, build.cancel_was_asked()), (Ended::Cancelled, true));
    assert_eq!((engine.running(), engine.tags().len()), (0, 0));
    Ok(())
}

#[tokio::test]
async fn a_cancel_can_be_ignored_until_the_connection_closes() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let (begun, goes_on) = (Gate::new(), Gate::new());
    engine.script(two_steps().pause(&begun).pause(&goes_on).log("still here\n").hang().ignore_cancel());
    let mut client = Client::connect(&engine).await?;
    client.open_session("a", &[("Dockerfile", DOCKERFILE)]).await?;
    let mut stream = client.control.status(StatusRequest { r#ref: "a".to_owned() }).await?.into_inner();
    begun.open();
    tokio::select! {
        solved = client.control.solve(request("a")) => anyhow::bail!("{solved:?}"),
        () = goes_on.reached() => {}
    }
    engine.wait_for(|state| state.builds[0].cancel_was_asked(), LIMIT).await?;
    goes_on.open();
    let goes_on = async {
        while let Some(message) = stream.message().await? {
            if !message.logs.is_empty() {
                return anyhow::Ok(output(&[message]));
            }
        }
        anyhow::bail!("the stream has ended")
    };
    assert_eq!(tokio::time::timeout(LIMIT, goes_on).await??, "still here\n");
    assert_eq!(engine.running(), 1);

    drop((client, stream));
    engine.wait_for(|state| state.builds[0].ended == Ended::Dropped, LIMIT).await?;
    engine.wait_for(|state| state.sessions == 0, LIMIT).await
}

#[tokio::test]
async fn a_connection_that_closes_drops_its_build() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.on("closes", two_steps().pause(&gate));
    engine.on("cuts", two_steps().log("begun\n").drop_connection());
    let mut client = Client::connect(&engine).await?;
    client.open_session("a", &[("Dockerfile", "# closes")]).await?;
    let mut control = client.control.clone();
    let mut solve = std::pin::pin!(control.solve(request("a")));
    tokio::select! {
        solved = &mut solve => anyhow::bail!("{solved:?}"),
        () = gate.reached() => {}
    }
    drop(client);
    engine.wait_for(|state| state.builds[0].ended == Ended::Dropped, LIMIT).await?;
    assert!(!engine.builds()[0].cancel_was_asked());
    solve.await.expect_err("the connection is closed");

    let mut client = Client::connect(&engine).await?;
    client.build("b", "# cuts").await?.expect_err("the connection is cut");
    assert_eq!(engine.builds()[1].ended, Ended::Dropped);
    Ok(())
}

#[tokio::test]
async fn steps_can_be_announced_backwards() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    engine.script(two_steps().announce_backwards());
    let mut client = Client::connect(&engine).await?;
    let following = client::follow(client.control.clone(), "a");
    client.build("a", DOCKERFILE).await??;
    let progress = following.ended().await?;
    let announced = progress.iter().find(|message| message.vertexes.len() > 1).expect("one message");
    let [last, first] = &announced.vertexes[..] else { anyhow::bail!("{announced:?}") };
    assert_eq!((last.name.as_str(), &last.inputs[..]), (RUN, &[first.digest.clone()][..]));
    Ok(())
}

#[tokio::test]
async fn an_engine_of_api_1_53_takes_grpc_on_its_socket() -> anyhow::Result<()> {
    let engine = FakeEngine::start_as("29.2.0", "1.53").await?;
    let mut client = Client::connect_directly(&engine).await?;
    client.control.info(InfoRequest {}).await?;
    client.build("a", DOCKERFILE).await??;
    assert!(rest(&engine, "GET /v1.53/images/selftest/a/json").await?.starts_with("HTTP/1.1 200"));
    assert_eq!(engine.unexpected(), [""; 0]);
    Client::connect(&engine).await.err().expect("there is no POST /grpc");
    assert_eq!(engine.unexpected(), ["POST /grpc"]);

    let engine = FakeEngine::start().await?;
    let mut client = Client::connect(&engine).await?;
    assert_eq!(client.control.info(InfoRequest {}).await.expect_err("not yet").code(), Code::Unimplemented);
    let workers = client.control.list_workers(ListWorkersRequest::default()).await?.into_inner();
    assert_eq!(workers.record.len(), 1);
    client.control.prune(PruneRequest::default()).await.expect_err("not known");
    assert_eq!(engine.unexpected(), ["Control.Prune"]);
    Ok(())
}

#[tokio::test]
async fn rest_answers_follow_the_version() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let mut client = Client::connect(&engine).await?;
    client.build("a", DOCKERFILE).await??;
    let listed = |name: &str| format!(r#"GET /v1.45/images/json?filters={{"reference":["{name}"]}}"#);
    for (request, expected) in [
        ("GET /version", r#""ApiVersion":"1.45""#),
        ("GET /v1.45/info", r#""CgroupDriver":"cgroupfs""#),
        ("GET /v1.99/info", "client version 1.99 is too new. Maximum supported API version is 1.45"),
        (&listed("selftest/*"), "selftest/a:latest"),
        (&listed("selftest/a:latest"), "selftest/a:latest"),
        (&listed("selftest/b"), "\r\n\r\n[]"),
        ("GET /v1.45/images/b/json", "No such image: b:latest"),
        ("POST /v1.45/build", "page not found"),
        ("POST /v1.45/session", "page not found"),
    ] {
        let answer = rest(&engine, request).await?;
        assert!(answer.contains(expected), "{request}: {answer}");
    }
    assert_eq!(engine.unexpected(), ["POST /build", "POST /session"]);
    Ok(())
}
