//! Invalid input, which is refused with the field and the rule, and breaks nothing.

use std::collections::BTreeSet;

use image_service::Role;
use proto::images::{self as api, ImageView};
use tonic::{Code, Request, Status, codec::CompressionEncoding};

use crate::{
    answers::{fields, reason},
    client::{Client, image, repository},
    raw,
    stack::Service,
};

fn invalid(answer: Result<impl std::fmt::Debug, Status>) -> Vec<String> {
    let status = answer.expect_err("it is refused");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::InvalidArgument, "INVALID_FIELDS"),
        "{status:?}"
    );
    let found = fields(&status);
    for field in &found {
        assert!(status.message().contains(field.as_str()), "{} does not name {field}", status.message());
    }
    found
}

fn with_file(path: &str, bytes: usize) -> api::Image {
    let mut image = image("A", "FROM scratch");
    if let Some(api::image_config::Source::Dockerfile(source)) =
        image.config.as_mut().and_then(|config| config.source.as_mut())
    {
        source.files.push(api::ContextFile {
            path: path.to_owned(),
            content: vec![7; bytes].into(),
            executable: false,
        });
    }
    image
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_images_are_refused_by_field() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let good = || image("A", "FROM scratch");
    for (bad, field) in [
        (api::Image { name: " ".to_owned(), ..good() }, "image.name"),
        (api::Image { name: "x".repeat(121), ..good() }, "image.name"),
        (api::Image { name: "a\u{1b}[31m".to_owned(), ..good() }, "image.name"),
        (api::Image { description: "x".repeat(4097), ..good() }, "image.description"),
        (api::Image { repository: "a b".to_owned(), ..good() }, "image.repository"),
        (api::Image { repository: "ubuntu".to_owned(), ..good() }, "image.repository"),
        (api::Image { repository: format!("{}:b", repository("alice", "a")), ..good() }, "image.repository"),
        (api::Image { repository: repository("alice", "../ubuntu"), ..good() }, "image.repository"),
        (api::Image { tag: "-".to_owned(), ..good() }, "image.tag"),
        (api::Image { config: None, ..good() }, "image.config"),
        (api::Image { config: Some(api::ImageConfig::default()), ..good() }, "image.config"),
        (image("A", ""), "image.config.dockerfile.text"),
        (image("A", "FROM scratch\0"), "image.config.dockerfile.text"),
        (image("A", &"#".repeat(256 * 1024 + 1)), "image.config"),
        (with_file("big", 256 * 1024), "image.config"),
        (with_file("../up", 1), "image.config.dockerfile.files[0].path"),
        (with_file("/abs", 1), "image.config.dockerfile.files[0].path"),
        (with_file("Dockerfile", 1), "image.config.dockerfile.files[0].path"),
        (with_file("a\nb", 1), "image.config.dockerfile.files[0].path"),
    ] {
        assert_eq!(invalid(alice.create(bad).await), [field]);
    }
    assert_eq!(
        invalid(alice.create(api::Image { tag: "-".to_owned(), ..api::Image::default() }).await),
        ["image.name", "image.tag", "image.config"]
    );
    assert_eq!(
        invalid(alice.images.clone().create_image(api::CreateImageRequest::default()).await),
        ["image"]
    );
    assert_eq!(alice.list().await?, [], "nothing was created");

    let admin = service.client(&service.token("root", &[Role::Admin]));
    let anywhere = api::Image { repository: "localhost:5000/base".to_owned(), ..good() };
    assert_eq!(admin.create(anywhere).await?.0.reference, "localhost:5000/base:latest");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_field() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let Client { mut images, mut builds, mut workers, .. } = service.builder("alice");
    let id = || uuid::Uuid::now_v7().to_string();
    for bad in [
        "",
        "x",
        "0198f0c47a2e7b6e9d559f1c2b3a4d5e",
        "{0198f0c4-7a2e-7b6e-9d55-9f1c2b3a4d5e}",
        "%s",
        "' or 1=1",
    ] {
        let bad = || bad.to_owned();
        assert_eq!(invalid(images.get_image(api::GetImageRequest { id: bad() }).await), ["id"]);
        assert_eq!(
            invalid(images.delete_image(api::DeleteImageRequest { id: bad(), ..Default::default() }).await),
            ["id"]
        );
        assert_eq!(
            invalid(images.build_image(api::BuildImageRequest { id: bad(), ..Default::default() }).await),
            ["id"]
        );
        let request = api::CancelBuildRequest { id: bad(), build_id: String::new(), ..Default::default() };
        assert_eq!(invalid(images.cancel_build(request).await), ["id"]);
        assert_eq!(invalid(builds.get_build(api::GetBuildRequest { id: bad() }).await), ["id"]);
        let request = api::WatchBuildRequest { id: bad(), after_sequence: 0 };
        assert_eq!(invalid(builds.watch_build(request).await.map(|_| ())), ["id"]);
        let request = api::ListBuildsRequest { image_id: bad(), ..Default::default() };
        assert_eq!(invalid(builds.list_builds(request).await), ["image_id"]);
    }
    let request = api::CancelBuildRequest { id: id(), build_id: "x".to_owned(), ..Default::default() };
    assert_eq!(invalid(images.cancel_build(request).await), ["build_id"]);
    let request = api::WatchBuildRequest { id: id(), after_sequence: -1 };
    assert_eq!(invalid(builds.watch_build(request).await.map(|_| ())), ["after_sequence"]);
    let request = api::ListImagesRequest { page_size: -1, ..Default::default() };
    assert_eq!(invalid(images.list_images(request).await), ["page_size"]);
    let request = api::ListImagesRequest { view: 77, ..Default::default() };
    assert_eq!(invalid(images.list_images(request).await), ["view"]);
    let request = api::WatchImagesRequest { view: -1, ..Default::default() };
    assert_eq!(invalid(images.watch_images(request).await.map(|_| ())), ["view"]);
    for token in ["x", "1:2.3", "9999:0198f0c4-7a2e-7b6e-9d55-9f1c2b3a4d5e.0000000000000000"] {
        let request = api::ListImagesRequest { page_token: token.to_owned(), ..Default::default() };
        assert_eq!(invalid(images.list_images(request).await), ["page_token"]);
    }
    let request = api::ListWorkersRequest { page_size: i32::MIN, ..Default::default() };
    assert_eq!(invalid(workers.list_workers(request).await), ["page_size"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_hold_every_image_once_and_belong_to_their_caller() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let mut created = BTreeSet::new();
    for i in 0..7 {
        created.insert(alice.create(image(&format!("A{i}"), "FROM scratch")).await?.0.id);
        bob.create(image(&format!("B{i}"), "FROM scratch")).await?;
    }
    let mut request =
        api::ListImagesRequest { page_size: 3, view: ImageView::Full.into(), ..Default::default() };
    let mut listed = Vec::new();
    loop {
        let page = alice.images.clone().list_images(request.clone()).await?.into_inner();
        listed.extend(page.images);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
        assert_eq!(invalid(bob.images.clone().list_images(request.clone()).await), ["page_token"]);
        let other = api::ListImagesRequest { view: ImageView::Basic.into(), ..request.clone() };
        assert_eq!(invalid(alice.images.clone().list_images(other).await), ["page_token"]);
    }
    assert!(listed.is_sorted_by(
        |a, b| a.update_time.map(|t| (t.seconds, t.nanos)) >= b.update_time.map(|t| (t.seconds, t.nanos))
    ));
    assert!(listed.iter().all(|image| image.config.is_some()));
    assert_eq!(listed.len(), 7);
    assert_eq!(listed.into_iter().map(|image| image.id).collect::<BTreeSet<_>>(), created);
    assert!(alice.list().await?.iter().all(|image| image.config.is_none()));
    Ok(())
}

/// Paths of the methods that are called with random bytes.
const METHODS: [&str; 23] = [
    "/trailer.images.v1.ImageService/CreateImage",
    "/trailer.images.v1.ImageService/GetImage",
    "/trailer.images.v1.ImageService/ListImages",
    "/trailer.images.v1.ImageService/DeleteImage",
    "/trailer.images.v1.ImageService/BuildImage",
    "/trailer.images.v1.ImageService/CancelBuild",
    "/trailer.images.v1.ImageService/WatchImages",
    "/trailer.images.v1.ImageService/UpdateImage",
    "/trailer.images.v1.ImageService/EnableImage",
    "/trailer.images.v1.ImageService/DisableImage",
    "/trailer.images.v1.ImageService/CloneImage",
    "/trailer.images.v1.ImageService/BatchImages",
    "/trailer.images.v1.ImageService/ResolveImage",
    "/trailer.images.v1.ImageService/SnapshotWorkspace",
    "/trailer.images.v1.AccessService/WhoAmI",
    "/trailer.images.v1.AccessService/ListGrants",
    "/trailer.images.v1.AccessService/GrantAccess",
    "/trailer.images.v1.AccessService/RevokeAccess",
    "/trailer.images.v1.BuildService/GetBuild",
    "/trailer.images.v1.BuildService/ListBuilds",
    "/trailer.images.v1.BuildService/WatchBuild",
    "/trailer.images.v1.ContextService/UploadContext",
    "/trailer.images.v1.WorkerService/ListWorkers",
];

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_grpc_is_an_unsupported_media_type() -> anyhow::Result<()> {
    let service = Service::start().await?;
    for (content_type, expected) in [
        (Some("application/grpc"), 200),
        (Some("application/grpc+proto"), 200),
        (Some("application/grpc; charset=utf-8"), 200),
        (Some("application/grpcx"), 415),
        (Some("application/json"), 415),
        (Some("text/html"), 415),
        (None, 415),
    ] {
        for method in ["/grpc.health.v1.Health/Check", METHODS[0], "/"] {
            let status = raw::http_status(service.addr, method, content_type).await?;
            assert_eq!(status.as_u16(), expected, "{method} with {content_type:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn random_bytes_are_the_callers_fault() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let token = service.token("alice", &[Role::Builder, Role::Service]);
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut byte = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random.to_le_bytes()[3]
    };
    for round in 0..60 {
        for method in METHODS {
            let length = usize::from(byte()) % 64;
            let bytes: Vec<u8> = (0..length).map(|_| byte()).collect();
            // Now and then send a broken frame instead of a broken message, or no frame at all.
            let frame = match round % 6 {
                0 => bytes,
                1 => Vec::new(),
                _ => [&[0, 0, 0, 0, u8::try_from(length)?], bytes.as_slice()].concat(),
            };
            let (code, reason) = raw::call(&service, method, &token, frame).await?;
            let expected = [Code::Ok, Code::InvalidArgument, Code::NotFound, Code::OutOfRange];
            assert!(expected.contains(&code), "{method}: {code:?} {reason}");
        }
    }
    let oversized = [&[0][..], &(1024 * 1024 + 1_u32).to_be_bytes(), &vec![0; 1024 * 1024 + 1]].concat();
    let (code, reason) = raw::call(&service, METHODS[0], &token, oversized).await?;
    assert_eq!((code, reason.as_str()), (Code::InvalidArgument, "MALFORMED_REQUEST"));
    let (code, _) =
        raw::call(&service, "/trailer.images.v1.ImageService/Nothing", &token, vec![0; 5]).await?;
    assert_eq!(code, Code::Unimplemented);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_may_be_compressed_and_have_the_same_limit() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let mut alice = service.builder("alice");
    alice.images = alice.images.send_compressed(CompressionEncoding::Gzip);
    let mut draft = image("Compressed", "FROM scratch");
    draft.description = "x".repeat(4_000);
    alice.create(draft.clone()).await?;
    // A few KiB that would be 16 MiB.
    draft.description = "x".repeat(16 << 20);
    let refused = alice.create(draft.clone()).await.expect_err("too large");
    assert_eq!((refused.code(), reason(&refused)), (Code::InvalidArgument, "MALFORMED_REQUEST".to_owned()));
    let mut other = Request::new(api::ListImagesRequest::default());
    other.metadata_mut().insert("grpc-encoding", "br".parse()?);
    let refused = service.builder("alice").images.list_images(other).await.expect_err("not taken");
    assert_eq!((refused.code(), reason(&refused)), (Code::Unimplemented, "UNIMPLEMENTED".to_owned()));
    assert!(refused.message().contains("gzip"), "{refused:?}");
    Ok(())
}
