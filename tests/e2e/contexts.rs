//! Build contexts that are uploaded as archives, and what the real engine makes of contexts.

use std::{io::Write as _, time::Duration};

use anyhow::Context as _;
use flate2::{Compression, write::GzEncoder};
use futures_util::{StreamExt as _, stream};
use proto::images::{
    self as api, BuildState, DockerfileSource, Image, RenderDockerfileRequest, image_config::Source,
    render_dockerfile_request::Subject, upload_context_request::Part,
};
use ring::digest::{SHA256, digest};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    answers::{fields, lines, refused},
    client::{Client, of_source, repository},
    engine_fixture::Real,
    eventually::eventually_true,
    stack::{LIMIT, Service},
    web_server::{Answer, WebServer, make_repository, run_git},
};

pub(crate) fn digest_of(bytes: &[u8]) -> String {
    let digits: String = digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}

/// Returns a tar of files.
pub(crate) fn tar_of(files: &[(&str, &[u8])]) -> anyhow::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, *content)?;
    }
    Ok(archive.into_inner()?)
}

fn gzip(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// Returns incompressible bytes.
fn noise(length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

pub(crate) fn image_of(name: &str, source: DockerfileSource) -> Image {
    of_source(name, Source::Dockerfile(source))
}

pub(crate) fn named(archive: &str, text: &str) -> DockerfileSource {
    DockerfileSource { text: text.to_owned(), archive: archive.to_owned(), ..DockerfileSource::default() }
}

/// Checks that an image may name the archive.
async fn is_kept(client: &Client, archive: &str) -> Result<(), tonic::Status> {
    let image = Some(image_of("asked", named(archive, "")));
    let request = api::CreateImageRequest { image, validate_only: true, ..Default::default() };
    client.images.clone().create_image(request).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_is_kept_once_and_named_by_its_digest() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let archive = tar_of(&[("Dockerfile", b"FROM scratch\n"), ("noise", &noise(1_500_000))])?;
    let expected = digest_of(&archive);
    let unknown = is_kept(&alice, &expected).await.expect_err("nobody has uploaded it");
    assert_eq!(
        (unknown.code(), fields(&unknown)),
        (Code::InvalidArgument, vec!["image.config.dockerfile.archive".to_owned()])
    );

    let taken = alice.upload("", &archive).await?;
    assert_eq!((taken.digest.as_str(), taken.size_bytes), (expected.as_str(), i64::try_from(archive.len())?));
    assert!(taken.expire_time.is_some());
    is_kept(&bob, &expected).await?;
    assert_eq!(bob.upload(&expected, &archive).await?.digest, expected);
    // The content of a known archive need not be sent.
    assert_eq!(bob.upload(&expected, b"").await?.digest, expected);

    let (image, _) = alice.create(image_of("Named", named(&expected, ""))).await?;
    let clone = api::CloneImageRequest { id: image.id.clone() };
    let clone = alice.images.clone().clone_image(clone).await?.into_inner().create_image_request;
    alice.create(clone.and_then(|request| request.image).context("an image")?).await?;
    let search = api::ListImagesRequest { search: expected[10..30].to_owned(), ..Default::default() };
    assert_eq!(alice.images.clone().list_images(search).await?.into_inner().images.len(), 2);
    let render = RenderDockerfileRequest { subject: Some(Subject::Id(image.id)) };
    let rendered = refused(alice.images.clone().render_dockerfile(render).await);
    assert_eq!(rendered, (Code::FailedPrecondition, "NO_DOCKERFILE".to_owned()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_archive_is_refused_with_the_violated_rule() -> anyhow::Result<()> {
    let service = Service::start_with(&["--context-limit", "1000000"]).await?;
    let alice = service.builder("alice");
    let good = tar_of(&[("Dockerfile", b"FROM scratch\n")])?;
    let mut leaving = good.clone();
    leaving[..10].copy_from_slice(b"../outside");
    let sum: u32 = leaving[..512]
        .iter()
        .enumerate()
        .map(|(i, byte)| if (148..156).contains(&i) { 32 } else { u32::from(*byte) })
        .sum();
    leaving[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let bomb = gzip(&tar_of(&[("zeros", &vec![0; 5_000_000])])?)?;
    assert!(bomb.len() < 100_000);
    for (digest, archive, field, rule) in [
        ("", leaving, "chunk", "`..`"),
        ("", bomb, "chunk", "1000000 bytes"),
        ("", noise(2_000_000), "chunk", "must be a tar"),
        ("", good[..good.len() - 600].to_vec(), "chunk", "must be whole"),
        ("", Vec::new(), "chunk", "must not be empty"),
        (&digest_of(b"other"), good.clone(), "start.digest", "must be the digest of what is sent"),
        ("sha256:zz", good.clone(), "start.digest", "64 lower-case hexadecimal digits"),
    ] {
        let status = alice.upload(digest, &archive).await.expect_err(rule);
        assert_eq!(
            (status.code(), fields(&status)),
            (Code::InvalidArgument, vec![field.to_owned()]),
            "{status:?}"
        );
        assert!(status.message().contains(rule), "{} instead of {rule}", status.message());
        let is_kept = is_kept(&alice, &digest_of(&archive)).await;
        assert!(is_kept.is_err(), "{rule}");
    }
    let start = || Part::Start(api::UploadContextStart::default());
    let chunk = |bytes: &'static [u8]| Part::Chunk(bytes.into());
    for (parts, field) in [
        (vec![], "start"),
        (vec![chunk(b"x")], "start"),
        (vec![start(), start()], "start"),
        (vec![start(), chunk(b"")], "chunk"),
    ] {
        let status = alice.upload_parts(parts).await.expect_err(field);
        assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec![field.to_owned()]));
    }
    let nobody = service.client(&service.token("carol", &[])).upload("", &good).await;
    assert_eq!(refused(nobody), (Code::PermissionDenied, "ROLE_MISSING".to_owned()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_without_its_dockerfile_is_refused_at_once() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let archive =
        tar_of(&[("docker/Dev", b"FROM scratch\n"), ("dockerfile", b"FROM scratch\n"), ("b", b"b")])?;
    let digest = alice.upload("", &archive).await?.digest;
    let other = alice.upload("", &tar_of(&[("b", b"b")])?).await?.digest;
    for (digest, text, path, is_valid) in [
        (&digest, "", "", true),
        (&digest, "", "docker/Dev", true),
        (&digest, "", "docker/Dockerfile", false),
        (&digest, "", "docker", false),
        (&other, "", "", false),
        (&other, "FROM scratch", "", true),
    ] {
        let source = DockerfileSource { dockerfile_path: path.to_owned(), ..named(digest, text) };
        let request = api::CreateImageRequest {
            image: Some(image_of("A", source)),
            validate_only: true,
            ..Default::default()
        };
        match alice.images.clone().create_image(request).await {
            Ok(_) => assert!(is_valid, "{path:?}"),
            Err(status) => {
                assert!(!is_valid, "{path:?}: {status:?}");
                assert_eq!(fields(&status), ["image.config.dockerfile.dockerfile_path"]);
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_caller_does_not_hold_all_uploads() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mut held = Vec::new();
    let mut uploads = JoinSet::new();
    for _ in 0..6 {
        let (parts, stream) = tokio::sync::mpsc::channel(1);
        let start = api::UploadContextRequest { part: Some(Part::Start(api::UploadContextStart::default())) };
        parts.send(start).await?;
        held.push(parts);
        let mut contexts = alice.contexts.clone();
        // An upload that is refused ends; any other waits for its next part.
        uploads.spawn(async move { contexts.upload_context(ReceiverStream::new(stream)).await });
    }
    for _ in 0..2 {
        let ended = tokio::time::timeout(LIMIT, uploads.join_next()).await?.context("an upload")??;
        assert_eq!(refused(ended), (Code::ResourceExhausted, "TOO_MANY_UPLOADS".to_owned()));
    }
    let archive = tar_of(&[("Dockerfile", b"FROM scratch\n")])?;
    service.builder("bob").upload("", &archive).await?;
    assert_eq!(uploads.len(), 4);
    drop(uploads);
    eventually_true("the place is free again", async || Ok(alice.upload("", &archive).await.is_ok())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_trickles_ends() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let start = Part::Start(api::UploadContextStart::default());
    let bytes = std::iter::repeat_with(|| Part::Chunk(vec![0].into()));
    let parts =
        std::iter::once(start).chain(bytes).map(|part| api::UploadContextRequest { part: Some(part) });
    let trickle = stream::iter(parts).then(async |part| {
        tokio::time::sleep(Duration::from_millis(100)).await;
        part
    });
    let mut contexts = alice.contexts.clone();
    let answer = tokio::time::timeout(LIMIT, contexts.upload_context(trickle)).await?;
    assert_eq!(refused(answer), (Code::Aborted, "UPLOAD_STALLED".to_owned()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_is_forgotten_when_nothing_names_it() -> anyhow::Result<()> {
    let service = Service::start_with(&["--retain-contexts", "3s"]).await?;
    let alice = service.builder("alice");
    let upload = async |text: &str| {
        alice.upload("", &tar_of(&[("Dockerfile", text.as_bytes())])?).await.map_err(anyhow::Error::from)
    };
    let named_once = upload("FROM b").await?.digest;
    let (image, _) = alice.create(image_of("Once", named(&named_once, ""))).await?;
    let built = upload("FROM c").await?.digest;
    // The first build waits for a worker and names the archive that it was queued with.
    let (queued, build) = alice.create(image_of("Queued", named(&built, ""))).await?;
    let other =
        image_of("Queued", DockerfileSource { text: "FROM d".to_owned(), ..DockerfileSource::default() });
    let update = api::UpdateImageRequest {
        image: Some(Image { id: queued.id.clone(), ..other }),
        update_mask: Some(prost_types::FieldMask { paths: vec!["config".to_owned()] }),
        ..Default::default()
    };
    alice.images.clone().update_image(update).await?;
    let unnamed = upload("FROM a").await?.digest;
    let gone = async |digest: &str| {
        // The check does not count as a use.
        eventually_true(&format!("{digest} is gone"), async || Ok(is_kept(&alice, digest).await.is_err()))
            .await
    };
    gone(&unnamed).await?;
    is_kept(&alice, &named_once).await?;
    is_kept(&alice, &built).await?;
    alice.delete(&image.id).await?;
    gone(&named_once).await?;
    is_kept(&alice, &built).await?;
    alice.cancel(&queued.id).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Cancelled);
    gone(&built).await
}

/// Builds an image successfully and returns the printed lines.
async fn build(real: &Real, name: &str, source: DockerfileSource) -> anyhow::Result<Vec<String>> {
    let alice = real.alice();
    let (_, build) = alice.create(image_of(&format!("{name}-{}", real.run), source)).await?;
    let build = alice.finished(&build.id).await?;
    anyhow::ensure!(build.state() == BuildState::Succeeded, "{name}: {build:?}");
    let history = alice.history(&build.id, 0).await?;
    Ok(lines(&history).into_iter().map(str::to_owned).collect())
}

fn references(real: &Real, names: &[&str]) -> Vec<String> {
    names.iter().map(|name| repository("alice", &format!("{name}-{}:latest", real.run))).collect()
}

const PRINT: &str =
    "COPY large text /\nRUN [\"/bin/sh\", \"-c\", \"busybox wc -c < /large; busybox cat /text\"]\n";

#[tokio::test(flavor = "multi_thread")]
async fn the_real_engine_builds_with_an_archive() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let print = |variant: &str| real.dockerfile(&format!("ENV VARIANT={variant}\n{PRINT}"));
    let names = ["plain", "packed", "plain-text", "packed-text"];
    for name in names {
        let (inner, text) = match name.split_once('-') {
            Some(_) => ("FROM nothing-here\n".to_owned(), print(name)),
            None => (print(name), String::new()),
        };
        let path = if text.is_empty() { "dir/Other" } else { "" };
        let tar = tar_of(&[
            ("dir/Other", inner.as_bytes()),
            ("Dockerfile", b"FROM nothing-here\n"),
            ("large", &noise(3_000_000)),
            ("text", b"of the archive"),
        ])?;
        let archive = if name.starts_with("packed") { gzip(&tar)? } else { tar };
        let digest = real.alice().upload("", &archive).await?.digest;
        let source = DockerfileSource { dockerfile_path: path.to_owned(), ..named(&digest, &text) };
        let printed = build(&real, name, source).await?;
        for expected in ["3000000", "of the archive"] {
            assert!(printed.iter().any(|line| line == expected), "{name}: {printed:?}");
        }
    }
    let references = references(&real, &names);
    real.clean(&references.iter().map(String::as_str).collect::<Vec<_>>()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dockerfile_that_an_engine_cannot_quote_is_the_users_fault() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let alice = real.alice();
    for (name, dockerfile) in [
        ("instruction", &b"FROM scratch\n\xc9tiquette x\n"[..]),
        ("binary", b"\x7fELF\x02\x01\x01\xff\xfe\n"),
    ] {
        let digest = alice.upload("", &tar_of(&[("Dockerfile", dockerfile)])?).await?.digest;
        let (_, build) = alice.create(image_of(&format!("{name}-{}", real.run), named(&digest, ""))).await?;
        let build = alice.finished(&build.id).await?;
        let error = build.error.clone().context("an error")?;
        assert_eq!((build.attempt, error.kind()), (1, api::BuildErrorKind::User), "{name}: {build:?}");
        assert!(error.message.contains("UTF-8"), "{name}: {}", error.message);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_engine_builds_with_a_remote_context() -> anyhow::Result<()> {
    let real = Real::start_with(&["--allow-remote", "127.0.0.1"]).await?;
    let directory = tempfile::tempdir()?;
    let server = WebServer::start(directory.path()).await?;
    let repository = directory.path().join("sources.git");
    let dockerfile = real.dockerfile("COPY text /\nRUN [\"/bin/sh\", \"-c\", \"busybox cat /text\"]\n");
    make_repository(&repository, &[("docker/Dockerfile.dev", &dockerfile), ("text", "of the branch\n")])?;
    run_git(&repository, &["branch", "next"])?;
    let tar = tar_of(&[("Dockerfile", dockerfile.as_bytes()), ("text", b"of the URL\n")])?;
    server.answer("/context.tar.gz", Answer::File(gzip(&tar)?));
    // Equal steps would come from the cache, and print nothing.
    let plain = tar_of(&[("Dockerfile", dockerfile.as_bytes()), ("text", b"of the plain tar\n")])?;
    server.answer("/context.tar", Answer::File(plain));
    let alone = real.dockerfile("RUN [\"/bin/sh\", \"-c\", \"busybox echo of nothing else\"]\n");
    server.answer("/Dockerfile", Answer::File(alone.into_bytes()));

    let remote = |path: &str, dockerfile_path: &str| DockerfileSource {
        remote: server.url(path),
        dockerfile_path: dockerfile_path.to_owned(),
        ..DockerfileSource::default()
    };
    for (name, source, expected) in [
        ("git", remote("/sources.git#next", "docker/Dockerfile.dev"), "of the branch"),
        ("gzip", remote("/context.tar.gz", ""), "of the URL"),
        ("tar", remote("/context.tar", ""), "of the plain tar"),
        ("alone", remote("/Dockerfile", ""), "of nothing else"),
    ] {
        let printed = build(&real, name, source).await?;
        assert!(printed.iter().any(|line| line == expected), "{name}: {printed:?}");
    }
    // The second build of a commit finds the steps of the first one.
    let again = remote("/sources.git#next", "docker/Dockerfile.dev");
    let printed = build(&real, "again", again).await?;
    assert!(printed.iter().all(|line| line != "of the branch"), "{printed:?}");
    let references = references(&real, &["git", "gzip", "tar", "alone", "again"]);
    real.clean(&references.iter().map(String::as_str).collect::<Vec<_>>()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_archives_of_an_uploader_have_a_quota() -> anyhow::Result<()> {
    let flags = ["--max-context-bytes", "3000000", "--retain-contexts", "1s"];
    let service = Service::start_with(&flags).await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let (mut first, mut second) = (noise(2_000_000), noise(2_000_000));
    (first[0], second[0]) = (1, 2);
    let (first, second) = (tar_of(&[("file", &first)])?, tar_of(&[("file", &second)])?);
    let kept = alice.upload("", &first).await?;
    let (image, _) = alice.create(image_of("Kept", named(&kept.digest, "FROM scratch"))).await?;
    let refused = alice.upload("", &second).await.expect_err("over the quota");
    let info = refused.get_details_error_info().context("an ErrorInfo")?;
    assert_eq!((refused.code(), info.reason.as_str()), (Code::ResourceExhausted, "CREATOR_QUOTA_EXCEEDED"));
    assert_eq!(info.metadata["quota"], "context_bytes");
    // What is there already takes no more of it, nor does another caller's archive.
    alice.upload(&kept.digest, &first).await?;
    let of_bob = bob.upload("", &second).await?;
    alice.upload(&of_bob.digest, &second).await?;
    // Room is made by archives that no image refers to, once they have expired.
    alice.delete(&image.id).await?;
    let third = tar_of(&[("other", &noise(2_000_000))])?;
    eventually_true("there is room again", async || Ok(alice.upload("", &third).await.is_ok())).await
}
