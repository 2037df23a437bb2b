//! Rate limits, quotas and deadlines.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use futures_util::{StreamExt as _, stream};
use http::uri::PathAndQuery;
use proto::images as api;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt as _;

use crate::{
    answers::{reason, refused},
    client::{Client, channel, image},
    eventually::{eventually, eventually_true},
    fake_engine::FakeEngine,
    raw,
    stack::{LIMIT, Service, Worker},
};

async fn watch(client: &Client) -> Result<tonic::Streaming<api::WatchImagesResponse>, Status> {
    Ok(client.images.clone().watch_images(api::WatchImagesRequest::default()).await?.into_inner())
}

fn retry_after(status: &Status) -> Duration {
    status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_limited_caller_learns_when_to_retry() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-call-rate", "2"]).await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let answers = futures_util::future::join_all((0..20).map(|_| alice.list())).await;
    let refusal = answers.into_iter().find_map(Result::err).context("none of twenty calls is refused")?;
    assert_eq!((refusal.code(), reason(&refusal)), (Code::ResourceExhausted, "TOO_MANY_CALLS".to_owned()));
    let pause = retry_after(&refusal);
    assert!(pause > Duration::ZERO && pause <= Duration::from_secs(1), "{pause:?}");
    bob.list().await.context("nobody else is kept from calling")?;
    tokio::time::sleep(pause + Duration::from_millis(600)).await;
    alice.list().await.context("the hint is true")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_held_back_but_not_beyond_the_deadline() -> anyhow::Result<()> {
    const HOLD: Duration = Duration::from_secs(1);
    let service = Service::start_with(&["--max-call-rate", "1"]).await?;
    let list = async |subject: &str, deadline: Duration| {
        let mut request = Request::new(api::ListImagesRequest::default());
        request.set_timeout(deadline);
        service.builder(subject).images.list_images(request).await
    };
    let begun = Instant::now();
    one_of_two(async || list("alice", LIMIT).await).await?;
    assert!(begun.elapsed() >= HOLD, "refused after {:?}", begun.elapsed());
    // The refusal comes before the deadline, whose error would not give the reason; on a busy machine not
    // always in time.
    for attempt in 0.. {
        match one_of_two(async || list("bob", HOLD + HOLD / 2).await).await {
            Ok(_) => break,
            Err(error) => anyhow::ensure!(attempt < 10, "never in time: {error:?}"),
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_asks_for_more_counts_as_several() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-call-rate", "10"]).await?;
    let large = api::ListImagesRequest { page_size: 1_000, ..Default::default() };
    let bytes = api::CreateImageRequest {
        image: Some(image("A", &format!("FROM scratch\n# {}", "x".repeat(200 * 1024)))),
        ..Default::default()
    };
    let term = api::WatchImagesRequest { search: "a".to_owned(), ..Default::default() };
    let target = api::BatchTarget { id: uuid::Uuid::nil().to_string(), ..Default::default() };
    let preview = api::BatchImagesRequest {
        action: api::BatchAction::Enable.into(),
        targets: vec![target; 200],
        validate_only: true,
        ..Default::default()
    };
    // Each call takes all units of a second and leaves none for the other.
    let client = |subject| service.builder(subject).images;
    one_of_two(async || client("alice").list_images(large.clone()).await).await?;
    one_of_two(async || client("bob").create_image(bytes.clone()).await).await?;
    one_of_two(async || client("carol").watch_images(term.clone()).await).await?;
    one_of_two(async || client("dave").batch_images(preview.clone()).await).await?;
    // The cost of a call is known only after a unit was spent to read it, so there is a hint for that unit
    // and one for the rest.
    for _ in 0..2 {
        match client("dave").batch_images(preview.clone()).await {
            Ok(_) => return Ok(()),
            Err(refusal) => tokio::time::sleep(retry_after(&refusal)).await,
        }
    }
    client("dave").batch_images(preview).await.context("the hints are true")?;
    Ok(())
}

/// Makes two concurrent calls, of which one must be refused, and returns the refusal.
///
/// They are repeated if the machine was too busy to make both within a second.
async fn one_of_two<T>(call: impl AsyncFn() -> Result<T, Status>) -> anyhow::Result<Status> {
    let (refusal, answer) = eventually("one is refused", async || match tokio::join!(call(), call()) {
        (Err(refusal), answer) | (answer, Err(refusal)) => Ok(Some((refusal, answer))),
        (Ok(_), Ok(_)) => Ok(None),
    })
    .await?;
    answer.context("both are refused")?;
    anyhow::ensure!(
        (refusal.code(), reason(&refusal)) == (Code::ResourceExhausted, "TOO_MANY_CALLS".to_owned()),
        "{refusal:?}"
    );
    Ok(refusal)
}

/// A `GetImage` call in flight whose message has not been sent.
struct HalfSent {
    message: oneshot::Sender<api::GetImageRequest>,
    answer: AbortOnDropHandle<Result<(), Status>>,
}

impl HalfSent {
    fn begin(service: &Service, subject: &str) -> anyhow::Result<Self> {
        Self::begin_with(service, &service.token(subject, &[]))
    }

    fn begin_with(service: &Service, token: &str) -> anyhow::Result<Self> {
        let (message, receiver) = oneshot::channel();
        let mut request = Request::new(stream::once(receiver).filter_map(async |sent| sent.ok()));
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
        let mut client = tonic::client::Grpc::new(channel(service.addr));
        let path = PathAndQuery::from_static("/trailer.images.v1.ImageService/GetImage");
        let codec = ProstCodec::<api::GetImageRequest, api::GetImageResponse>::default();
        let calling = async move {
            client.ready().await.map_err(|error| Status::unknown(error.to_string()))?;
            client.client_streaming(request, path, codec).await.map(|_| ())
        };
        Ok(Self { message, answer: AbortOnDropHandle::new(tokio::spawn(calling)) })
    }

    async fn finish(self, id: &str) -> anyhow::Result<Result<(), Status>> {
        self.message.send(api::GetImageRequest { id: id.to_owned() }).ok().context("it has ended")?;
        Ok(tokio::time::timeout(LIMIT, self.answer).await??)
    }
}

/// Keeps two calls of a caller in flight and returns the refusal of a third.
async fn fill(
    service: &Service,
    caller: &Client,
    subject: &str,
    calls: &mut Vec<HalfSent>,
) -> anyhow::Result<Status> {
    eventually("calls under way count", async || {
        // A call that arrived during the list below may have been refused.
        calls.retain(|call| !call.answer.is_finished());
        while calls.len() < 2 {
            calls.push(HalfSent::begin(service, subject)?);
        }
        Ok(caller.list().await.err())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_looked_at_again_when_the_message_is_there() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (created, _) = service.builder("alice").create(image("Late", "FROM scratch")).await?;
    let token = service.token_for("alice", &[], Duration::from_secs(2));
    let call = HalfSent::begin_with(&service, &token)?;
    let other = service.client(&token);
    eventually_true("the token expires", async || Ok(other.list().await.is_err())).await?;
    let answer = call.finish(&created.id).await?;
    assert_eq!(refused(answer), (Code::Unauthenticated, "TOKEN_EXPIRED".to_owned()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_has_so_many_calls_under_way_and_no_more() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-calls", "2"]).await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    let _stream = watch(&alice).await?;
    let mut calls = Vec::new();
    let refusal = fill(&service, &alice, "alice", &mut calls).await?;
    let expected = (Code::ResourceExhausted, "TOO_MANY_CONCURRENT_CALLS".to_owned());
    assert_eq!((refusal.code(), reason(&refusal)), expected);
    assert!(retry_after(&refusal) > Duration::ZERO);
    bob.list().await.context("nobody else is kept from calling")?;
    watch(&alice).await.context("a stream is no such call")?;

    calls.pop().context("there are two")?.finish(&created.id).await??;
    // Sequential calls count as one, because a call stops counting when it is answered.
    for _ in 0..200 {
        alice.list().await.context("a call that has been answered still counts")?;
    }
    fill(&service, &alice, "alice", &mut calls).await?;
    // The caller disconnects.
    drop(calls);
    eventually_true("calls whose caller has gone do not count", async || Ok(alice.list().await.is_ok())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_has_so_many_watches_and_no_more() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-streams", "2"]).await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let first = watch(&alice).await?;
    let request = api::WatchBuildRequest { id: build.id, after_sequence: 0 };
    let _second = alice.builds.clone().watch_build(request).await?;
    let refusal = watch(&alice).await.expect_err("there are two");
    assert_eq!((refusal.code(), reason(&refusal)), (Code::ResourceExhausted, "TOO_MANY_STREAMS".to_owned()));
    assert!(retry_after(&refusal) > Duration::ZERO);
    watch(&bob).await.context("nobody else is kept from watching")?;
    drop(first);
    eventually_true("a watch that has ended does not count", async || Ok(watch(&alice).await.is_ok())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_has_so_many_builds_in_the_queue_and_no_more() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-pending-builds", "2"]).await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let (first, _) = alice.create(image("A", "FROM scratch")).await?;
    alice.create(image("B", "FROM scratch")).await?;
    let refusal = alice.create(image("C", "FROM scratch")).await.expect_err("there are two");
    let expected = (Code::ResourceExhausted, "TOO_MANY_PENDING_BUILDS".to_owned());
    assert_eq!((refusal.code(), reason(&refusal)), expected);
    assert!(retry_after(&refusal) > Duration::ZERO);
    assert_eq!(alice.list().await?.len(), 2, "what is refused is not half done");
    let template = api::Image { template: true, ..image("T", "FROM scratch") };
    let request = api::CreateImageRequest { image: Some(template), ..Default::default() };
    alice.images.clone().create_image(request).await.context("a template is not built")?;
    bob.create(image("D", "FROM scratch")).await.context("nobody else is kept from building")?;

    let cancel = api::CancelBuildRequest { id: first.id.clone(), ..Default::default() };
    alice.images.clone().cancel_build(cancel).await?;
    let (third, _) = alice.create(image("C", "FROM scratch")).await?;
    assert_eq!(refused(alice.build(&first.id).await), expected);
    let batch = api::BatchImagesRequest {
        action: api::BatchAction::Build.into(),
        targets: vec![api::BatchTarget { id: first.id, ..Default::default() }],
        ..Default::default()
    };
    let results = alice.images.clone().batch_images(batch.clone()).await?.into_inner().results;
    let Some(api::batch_result::Result::Error(error)) = results.into_iter().next().and_then(|row| row.result)
    else {
        anyhow::bail!("the row is not refused");
    };
    assert_eq!(error.code, i32::from(Code::ResourceExhausted));
    // What was refused can be built once there is room again.
    let cancel = api::CancelBuildRequest { id: third.id.clone(), ..Default::default() };
    alice.images.clone().cancel_build(cancel).await?;
    let (refused_before, mut client) = (batch.targets[0].id.clone(), alice.images.clone());
    let results = client.batch_images(batch).await?.into_inner().results;
    assert!(matches!(results[0].result, Some(api::batch_result::Result::Image(_))), "{results:?}");
    assert_eq!(alice.get(&refused_before).await?.status(), api::ImageStatus::BuildPending);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abandoned_request_is_not_answered() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (method, token) = ("/trailer.images.v1.ImageService/ListImages", service.token("alice", &[]));
    let empty = vec![0; 5];
    let late = raw::call_within(&service, method, &token, Some("1n"), empty.clone()).await?;
    assert_eq!(late, (Code::DeadlineExceeded, "DEADLINE_EXCEEDED".to_owned()));
    assert_eq!(raw::call_within(&service, method, &token, Some("20S"), empty).await?.0, Code::Ok);

    // A stream ends at its deadline and says why.
    let mut for_a_while = Request::new(api::WatchImagesRequest::default());
    for_a_while.set_timeout(Duration::from_secs(3));
    let mut stream = alice.images.clone().watch_images(for_a_while).await?.into_inner();
    let ended = async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => anyhow::bail!("it ended without saying why"),
                Err(status) => return Ok(status),
            }
        }
    };
    let status = tokio::time::timeout(LIMIT, ended).await??;
    assert_eq!((status.code(), reason(&status)), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED".to_owned()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_without_end_are_refused_and_harm_nobody() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mut request = Request::new(api::ListImagesRequest::default());
    for i in 0..10 {
        let key: tonic::metadata::AsciiMetadataKey = format!("x-{i}").parse()?;
        request.metadata_mut().insert(key, "x".repeat(4_000).parse()?);
    }
    let refused = alice.images.clone().list_images(request).await.expect_err("over the limit");
    assert_eq!((refused.code(), reason(&refused)), (Code::InvalidArgument, "HEADERS_TOO_LARGE".to_owned()));
    service.builder("bob").list().await.context("others are served")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_says_nothing_is_closed() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let mut silent = TcpStream::connect(service.addr).await?;
    let mut halting = TcpStream::connect(service.addr).await?;
    halting.write_all(b"PRI * HTTP").await?;
    for connection in [&mut silent, &mut halting] {
        let mut received = Vec::new();
        // The connection may be reset.
        let _ = tokio::time::timeout(LIMIT, connection.read_to_end(&mut received))
            .await
            .context("it stays open")?;
    }
    service.builder("alice").list().await.context("others are served")?;
    // A silent connection does not keep the service from stopping either.
    let _silent = TcpStream::connect(service.addr).await?;
    service.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_of_a_worker_blames_callers_for_what_is_no_message() -> anyhow::Result<()> {
    let (service, engine) = (Service::start().await?, FakeEngine::start().await?);
    let worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let check = "/grpc.health.v1.Health/Check";
    let no_message = vec![0, 0, 0, 0, 2, 0xff, 0xff];
    for addr in [worker.addr, service.addr] {
        let (code, _) = raw::call_at(addr, check, "", None, no_message.clone()).await?;
        assert_eq!(code, Code::InvalidArgument);
        let fine = raw::call_at(addr, check, "", None, vec![0; 5]).await?;
        assert_eq!(fine.0, Code::Ok);
        // Anyone may send such messages, so they are small.
        let announced = [&[0][..], &(4 * 1024 + 1_u32).to_be_bytes(), &vec![0; 4 * 1024 + 1]].concat();
        let (code, _) = raw::call_at(addr, check, "", None, announced).await?;
        assert_eq!(code, Code::InvalidArgument);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creator_has_so_many_images_and_no_more() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-images", "2"]).await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let first = alice.create_template("First").await?;
    alice.create_template("Second").await?;
    let exceeded = (Code::ResourceExhausted, "CREATOR_QUOTA_EXCEEDED".to_owned());
    assert_eq!(refused(alice.create_template("Third").await), exceeded);
    let previewed = api::CreateImageRequest {
        image: Some(image("Third", "FROM scratch")),
        validate_only: true,
        ..Default::default()
    };
    assert_eq!(refused(alice.images.clone().create_image(previewed).await), exceeded);
    bob.create_template("Of another").await?;
    alice.delete(&first.id).await?;
    alice.create_template("Third").await?;
    assert_eq!(refused(alice.create_template("Fourth").await), exceeded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalogue_has_room_for_what_can_be_loaded_again() -> anyhow::Result<()> {
    let room = (1024 * 1024).to_string();
    let flags = ["--index-memory", room.as_str()];
    let service = Service::start_with(&flags).await?;
    let alice = service.builder("alice");
    // Four of these images take less than 1 MiB, and five take more.
    let large = |name: &str| image(name, &format!("FROM scratch\n# {}", "x".repeat(220_000)));
    let (first, _) = alice.create(large("First")).await?;
    for name in ["Second", "Third", "Fourth"] {
        alice.create(large(name)).await?;
    }
    let full = (Code::ResourceExhausted, "CATALOGUE_FULL".to_owned());
    assert_eq!(refused(alice.create(large("Fifth")).await), full);
    alice.create(image("Small", "FROM scratch")).await?;
    alice.delete(&first.id).await?;
    alice.create(large("Fifth")).await?;
    assert_eq!(refused(alice.create(large("Sixth")).await), full);

    let database = service.end().await?;
    let service = Service::start_on(database, &flags).await?;
    let alice = service.builder("alice");
    let accepted = alice.list().await?;
    let names: BTreeSet<&str> = accepted.iter().map(|image| image.name.as_str()).collect();
    assert_eq!(names, ["Second", "Third", "Fourth", "Small", "Fifth"].into());
    assert_eq!(refused(alice.create(large("Sixth")).await), full);
    Ok(())
}
