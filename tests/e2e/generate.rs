//! Images whose Dockerfile the service generates.

use std::collections::BTreeMap;

use anyhow::Context as _;
use bollard::{
    models::ContainerCreateBody,
    query_parameters::{
        CreateContainerOptions, DownloadFromContainerOptionsBuilder, RemoveContainerOptionsBuilder,
    },
};
use futures_util::StreamExt as _;
use proto::images::{
    BuildState, GenerateSource, Image, ImageConfig, ImageFile, PullSource, RenderDockerfileRequest,
    RenderDockerfileResponse, WorkspaceService, image_config::Source, render_dockerfile_request::Subject,
};
use tonic::{Code, Status};

use crate::{
    answers::{fields, refused},
    client::{Client, image},
    engine_fixture::Real,
    fake_engine::FakeEngine,
    stack::{Service, Worker},
};

fn config(source: Source) -> ImageConfig {
    ImageConfig { source: Some(source), ..ImageConfig::default() }
}

fn generate(base_image: &str) -> GenerateSource {
    GenerateSource { base_image: base_image.to_owned(), ..GenerateSource::default() }
}

async fn render(client: &Client, subject: Subject) -> Result<RenderDockerfileResponse, Status> {
    let request = RenderDockerfileRequest { subject: Some(subject) };
    Ok(client.images.clone().render_dockerfile(request).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rendered_dockerfile_is_the_one_that_is_built() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let source = GenerateSource {
        apt_packages: vec!["git".to_owned()],
        environment: [("A".to_owned(), "b c".to_owned())].into(),
        start_commands: vec!["echo up".to_owned()],
        ..generate("debian:12")
    };
    let mut wanted = config(Source::Generate(source));
    wanted.services.push(WorkspaceService {
        name: "web".to_owned(),
        packages: vec!["nginx".to_owned()],
        command: "nginx -g 'daemon off;'".to_owned(),
        ports: vec![80],
        ..WorkspaceService::default()
    });
    let before = render(&alice, Subject::Config(wanted.clone())).await?;
    assert!(before.dockerfile.starts_with("FROM debian:12\nRUN apt-get update && "), "{}", before.dockerfile);
    for package in ["git", "nginx", "tini"] {
        assert!(before.dockerfile.contains(&format!("    '{package}' \\\n")), "{}", before.dockerfile);
    }
    assert!(before.dockerfile.contains("\nENV A=\"b c\"\n"), "{}", before.dockerfile);
    assert!(before.dockerfile.contains("\nEXPOSE 80\n"), "{}", before.dockerfile);
    let files: Vec<&str> = before.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(files, ["trailer/entrypoint"]);

    let created = Image { name: "Web".to_owned(), config: Some(wanted), ..Image::default() };
    let (created, build) = alice.create(created).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    assert_eq!(render(&alice, Subject::Id(created.id.clone())).await?, before);
    let built = engine.builds().pop().context("a build")?;
    assert_eq!(built.dockerfile, before.dockerfile);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_a_dockerfile_is_not_rendered() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let by_hand = image("By hand", "FROM scratch").config.context("a configuration")?;
    assert_eq!(render(&alice, Subject::Config(by_hand)).await?.dockerfile, "FROM scratch");
    let pull = config(Source::Pull(PullSource { reference: "nginx".to_owned() }));
    let answer = render(&alice, Subject::Config(pull.clone())).await;
    assert_eq!(refused(answer), (Code::FailedPrecondition, "NO_DOCKERFILE".to_owned()));
    let created = Image { name: "Pulled".to_owned(), config: Some(pull), ..Image::default() };
    let (created, _) = alice.create(created).await?;
    let answer = render(&alice, Subject::Id(created.id)).await;
    assert_eq!(refused(answer), (Code::FailedPrecondition, "NO_DOCKERFILE".to_owned()));
    let wrong = config(Source::Generate(generate("not an image")));
    let error = render(&alice, Subject::Config(wrong)).await.expect_err("no reference");
    assert_eq!(fields(&error), ["config.generate.base_image"]);
    let nothing = alice.images.clone().render_dockerfile(RenderDockerfileRequest { subject: None }).await;
    assert_eq!(fields(&nothing.expect_err("no subject")), ["subject"]);
    Ok(())
}

/// Texts that a parser could take for quotes, instructions, comments or variables, or cut short.
const HOSTILE: [&str; 22] = [
    "",
    " ",
    "  both ends  ",
    "\ttab\t",
    "it's",
    "'",
    "''\\''",
    "\"",
    "\"quoted\"",
    "\\",
    "ends with \\",
    "\\\\",
    "\\n\\t\\\"",
    "$HOME",
    "${HOME:-x}",
    "$(id)",
    "`id`",
    "# escape=`",
    "<<EOF",
    "a=b c=d",
    "größe 例 🦀 \u{2028} \u{85}",
    "&& rm -rf / || ; | > < * ? [a] {b,c} ~ !",
];

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_sees_hostile_values_unchanged() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let (docker, alice) = (&real.docker, real.alice());
    let numbered = || (0..).zip(HOSTILE);
    let environment: BTreeMap<String, String> =
        numbered().map(|(i, value)| (format!("HOSTILE_{i}"), value.to_owned())).collect();
    // File names have no control characters or slashes and are not empty.
    let named = |value: &str| !value.is_empty() && !value.contains(['/', '\t', '\u{85}']);
    let files: BTreeMap<String, (Vec<u8>, bool)> = numbered()
        .filter(|(_, value)| named(value))
        .map(|(i, value)| (format!("/hostile/{value}"), (value.as_bytes().to_vec(), i % 2 == 0)))
        .collect();
    let source = GenerateSource {
        environment: environment.clone().into_iter().collect(),
        files: files
            .iter()
            .map(|(path, (content, executable))| ImageFile {
                path: path.clone(),
                content: content.clone().into(),
                executable: *executable,
            })
            .collect(),
        ..generate(&real.base())
    };
    let wanted = Image {
        name: format!("Hostile {}", real.run),
        config: Some(config(Source::Generate(source))),
        ..Image::default()
    };
    let (created, build) = alice.create(wanted).await?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");

    let reference = created.reference.clone();
    let seen = docker.inspect_image(&reference).await?.config.and_then(|config| config.env);
    let seen: BTreeMap<String, String> = seen
        .context("an environment")?
        .iter()
        .filter_map(|pair| pair.split_once('='))
        .filter(|(name, _)| name.starts_with("HOSTILE_"))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    assert_eq!(seen, environment);

    let body = ContainerCreateBody {
        image: Some(reference.clone()),
        cmd: Some(vec!["/bin/sh".to_owned()]),
        ..ContainerCreateBody::default()
    };
    let container = docker.create_container(None::<CreateContainerOptions>, body).await?.id;
    let options = DownloadFromContainerOptionsBuilder::new().path("/hostile").build();
    let mut archive = Vec::new();
    let mut download = docker.download_from_container(&container, Some(options));
    while let Some(part) = download.next().await {
        archive.extend_from_slice(&part?);
    }
    drop(download);
    let mut found = BTreeMap::new();
    for entry in tar::Archive::new(archive.as_slice()).entries()? {
        let mut entry = entry?;
        if entry.header().entry_type().is_file() {
            let path = format!("/{}", entry.path()?.to_str().context("a path in UTF-8")?);
            let mode = entry.header().mode()?;
            assert!(mode & 0o777 == 0o644 || mode & 0o777 == 0o755, "{path}: {mode:o}");
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut content)?;
            found.insert(path, (content, mode & 0o111 != 0));
        }
    }
    assert_eq!(found, files);
    let options = RemoveContainerOptionsBuilder::new().force(true).build();
    docker.remove_container(&container, Some(options)).await?;
    real.clean(&[&reference]).await
}
