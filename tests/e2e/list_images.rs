//! Lists of images: matches, order and pages.

use image_service::Role;
use proto::images::{
    self as api, ContextFile, DockerfileSource, GenerateSource, ImageFile, ImageKind, ImageView, PullSource,
    WorkspaceService, image_config::Source,
};
use tonic::{Code, Status};

use crate::{
    answers::{fields, reason},
    client::{Client, image, of_source},
    stack::Service,
};

mod against_model;
mod model;
mod random;
mod world;

/// Returns the names of the images that a search finds.
async fn found(client: &Client, search: &str) -> Result<Vec<String>, Status> {
    let request = api::ListImagesRequest {
        search: search.to_owned(),
        order_by: "name".to_owned(),
        ..api::ListImagesRequest::default()
    };
    let response = client.images.clone().list_images(request).await?.into_inner();
    Ok(response.images.into_iter().map(|image| image.name).collect())
}

/// Returns the fields for which a list is refused.
async fn refused(client: &Client, request: api::ListImagesRequest) -> Vec<String> {
    let answer = client.images.clone().list_images(request).await;
    let status = answer.expect_err("it is refused");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "INVALID_FIELDS"));
    fields(&status)
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn pair(name: &str, value: &str) -> std::collections::BTreeMap<String, String> {
    [(name.to_owned(), value.to_owned())].into()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_character_stands_for_itself() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let text = r#"100%_"O'Neil"\"#;
    for name in [
        text,
        r#"100%x"O'Neil"\"#,
        r#"100%_"O'Neil"x"#,
        "100 O Neil",
        "a\u{fffd}b",
        "a\u{fffe}b",
        "a\u{ffff}b",
    ] {
        alice.create(image(name, "FROM scratch")).await?;
    }
    assert_eq!(found(&alice, text).await?, [text]);
    assert_eq!(found(&alice, r#"_"o'NEIL"\"#).await?, [text]);
    for (typed, count) in [
        ("%", 3),
        ("0%", 3),
        ("%_", 2),
        ("%_\"", 2),
        ("_", 2),
        ("\\", 2),
        ("'", 3),
        ("\"\\", 2),
        ("100*", 0),
        ("O NEAR Neil", 0),
    ] {
        assert_eq!(found(&alice, typed).await?.len(), count, "{typed}");
    }
    for name in ["a\u{fffd}b", "a\u{fffe}b", "a\u{ffff}b"] {
        assert_eq!(found(&alice, name).await?, [name]);
    }
    let described = api::Image { description: "a\u{1e}b".to_owned(), ..image("Control", "FROM scratch") };
    alice.create(described).await?;
    assert_eq!(found(&alice, "a\u{1e}b").await?, ["Control"]);
    assert_eq!(found(&alice, "\u{1e}").await?, ["Control"]);
    assert_eq!(found(&alice, "a\u{fffe}b").await?, ["a\u{fffe}b"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn case_does_not_matter_in_any_language() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    for name in ["STRASSE", "ça", "Σίσυφος", "ısı", "isi"] {
        alice.create(image(name, "FROM scratch")).await?;
    }
    for (typed, name) in [
        ("straße", "STRASSE"),
        ("STRAẞE", "STRASSE"),
        ("ÇA", "ça"),
        ("C\u{327}A", "ça"),
        ("ΣΊΣΥΦΟΣ", "Σίσυφος"),
        ("σίσυφοσ", "Σίσυφος"),
        ("ı", "ısı"),
        ("ısı", "ısı"),
        ("ISI", "isi"),
        ("I", "isi"),
    ] {
        assert_eq!(found(&alice, typed).await?, [name], "{typed}");
    }
    assert_eq!(found(&alice, "ca").await?, [""; 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_value_is_searched_alone_and_no_key_is() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let content =
        |path: &str| ContextFile { path: path.to_owned(), content: "in a context".into(), executable: true };
    let dockerfile = DockerfileSource {
        text: "FROM debian\nRUN make world".to_owned(),
        files: vec![content("src/main.c")],
        build_args: pair("ARGUMENT", "argued"),
        target: "builder".to_owned(),
        ..DockerfileSource::default()
    };
    let generate = GenerateSource {
        base_image: "fedora:41".to_owned(),
        apt_packages: words(&["libssl3", "nginx"]),
        python_packages: words(&["numpy"]),
        environment: pair("VARIABLE", "varied"),
        user: "somebody".to_owned(),
        start_commands: words(&["run --now"]),
        files: vec![ImageFile { path: "/etc/motd".to_owned(), content: "hello".into(), executable: true }],
    };
    let pull = PullSource { reference: "quay.io/prometheus/node".to_owned() };
    let mut built = of_source("Built", Source::Dockerfile(dockerfile));
    if let Some(config) = &mut built.config {
        config.services = vec![WorkspaceService {
            name: "code-server".to_owned(),
            packages: words(&["openssh-client"]),
            command: "serve --port".to_owned(),
            ports: vec![8080],
            environment: pair("SERVED", "service value"),
        }];
        config.worker = "host-7".to_owned();
        config.worker_labels = pair("zone", "west");
    }
    built.description = "all about it".to_owned();
    for image in [
        built,
        of_source("Made", Source::Generate(generate)),
        of_source("Pulled", Source::Pull(pull)),
        of_source("Plain", Source::Generate(GenerateSource::default())),
    ] {
        alice.create(image).await?;
    }
    for (name, values) in [
        (
            "Built",
            &[
                "all about it",
                "DEBIAN\nRUN",
                "src/main.c",
                "in a context",
                "ARGUMENT",
                "argued",
                "builder",
                "code-server",
                "openssh-client",
                "serve --port",
                "8080",
                "SERVED",
                "service value",
                "host-7",
                "zone",
                "west",
            ][..],
        ),
        (
            "Made",
            &[
                "fedora:41",
                "libssl3",
                "nginx",
                "numpy",
                "VARIABLE",
                "varied",
                "somebody",
                "run --now",
                "/etc/motd",
                "hello",
            ],
        ),
        ("Pulled", &["quay.io/prometheus/node"]),
        ("Plain", &["ubuntu:24.04"]),
    ] {
        for value in values {
            assert_eq!(found(&alice, value).await?, [name], "{value}");
            assert_eq!(found(&alice, &value.to_uppercase()).await?, [name], "{value}");
        }
    }
    for key in [
        "apt_packages",
        "base_image",
        "executable",
        "true",
        "false",
        "null",
        "{",
        "[",
        "]",
        "\":",
        ",",
        "source",
        "dockerfile",
        "generate",
        "worker_labels",
        "trailer/",
        "latest",
        "alice",
    ] {
        assert_eq!(found(&alice, key).await?, [""; 0], "{key}");
    }
    for across in [
        "libssl3nginx",
        "libssl3\nnginx",
        "libssl3 nginx",
        "3\u{1e}n",
        "VARIABLEvaried",
        "VARIABLE=varied",
        "/etc/motdhello",
    ] {
        assert_eq!(found(&alice, across).await?, [""; 0], "{across}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hit_says_where_it_is() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let described = |name: &str, description: &str, dockerfile: &str| api::Image {
        description: description.to_owned(),
        ..image(name, dockerfile)
    };
    for image in [
        described("Go", "for the team", "FROM golang"),
        described("The team", "", "FROM team"),
        described("All", "Team", "FROM team"),
    ] {
        alice.create(image).await?;
    }
    let request = api::ListImagesRequest {
        search: "TEAM".to_owned(),
        order_by: "name".to_owned(),
        ..Default::default()
    };
    let images = alice.images.clone().list_images(request).await?.into_inner().images;
    let hits = images.iter().map(|image| (image.name.as_str(), image.search_hits().collect::<Vec<_>>()));
    use api::SearchHit::{Config, Description, Name};
    assert_eq!(
        hits.collect::<Vec<_>>(),
        [("All", vec![Description, Config]), ("Go", vec![Description]), ("The team", vec![Name, Config])]
    );
    let all = alice.list().await?;
    assert!(all.iter().all(|image| image.search_hits.is_empty()), "{all:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_ordered_as_people_order_them() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    for name in ["banana", "Cherry", "apple", "Äpfel", "Apple pie", "äpfel 2"] {
        alice.create(image(name, "FROM scratch")).await?;
    }
    let mut request =
        api::ListImagesRequest { order_by: "name".to_owned(), page_size: 2, ..Default::default() };
    let mut names = Vec::new();
    loop {
        let page = alice.images.clone().list_images(request.clone()).await?.into_inner();
        names.extend(page.images.into_iter().map(|image| image.name));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(names, ["apple", "Apple pie", "banana", "Cherry", "Äpfel", "äpfel 2"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_no_text_is_not_searched() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    for content in [&b"needle\0"[..], b"needle\xff", b"\0", b""] {
        let file =
            ContextFile { path: "data".to_owned(), content: content.to_vec().into(), executable: false };
        let source = DockerfileSource {
            text: "FROM scratch".to_owned(),
            files: vec![file],
            ..DockerfileSource::default()
        };
        alice.create(of_source("Binary", Source::Dockerfile(source))).await?;
    }
    assert_eq!(found(&alice, "needle").await?, [""; 0]);
    assert_eq!(found(&alice, "data").await?.len(), 4);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_term_is_bounded_and_may_hold_anything() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, admin) = (service.builder("alice"), service.client(&service.token("root", &[Role::Admin])));
    let long = "ΐ".repeat(1_024);
    let described =
        api::Image { description: format!("{}\n", long.to_uppercase()), ..image("Short", "FROM scratch") };
    // In upper case, each character becomes three.
    assert_eq!(described.description.chars().count(), 3_073);
    let mut named = image("Long", &format!("FROM scratch\n# {long}"));
    named.description = "a".repeat(4_096);
    alice.create(named).await?;
    for client in [&alice, &admin] {
        for none in ["\0", "a\0b", "FROM\0", "\0\0\0\0"] {
            assert_eq!(found(client, none).await?, [""; 0], "{none:?}");
        }
        assert_eq!(found(client, &long).await?, ["Long"]);
        assert_eq!(found(client, &"A".repeat(1_024)).await?, ["Long"]);
        let request = |search: String| api::ListImagesRequest { search, ..Default::default() };
        assert_eq!(refused(client, request("a".repeat(1_025))).await, ["search"]);
        assert_eq!(refused(client, request("😀".repeat(1_025))).await, ["search"]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_belongs_to_its_query_and_caller() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    // The same subject with another role.
    let as_admin = service.client(&service.token("alice", &[Role::Admin]));
    for name in ["a1", "a2", "a3", "a4"] {
        alice.create(image(name, "FROM scratch")).await?;
    }
    let first = api::ListImagesRequest {
        page_size: 1,
        search: "a".to_owned(),
        order_by: "name".to_owned(),
        ..api::ListImagesRequest::default()
    };
    let page = alice.images.clone().list_images(first.clone()).await?.into_inner();
    let next = api::ListImagesRequest { page_token: page.next_page_token, ..first };
    for other in [
        api::ListImagesRequest { search: "A".to_owned(), ..next.clone() },
        api::ListImagesRequest { search: String::new(), ..next.clone() },
        api::ListImagesRequest { order_by: "name desc".to_owned(), ..next.clone() },
        api::ListImagesRequest { order_by: String::new(), ..next.clone() },
        api::ListImagesRequest { order_by: "image_name".to_owned(), ..next.clone() },
        api::ListImagesRequest { kind: ImageKind::Image.into(), ..next.clone() },
        api::ListImagesRequest { statuses: vec![1], ..next.clone() },
        api::ListImagesRequest { enabled: Some(true), ..next.clone() },
        api::ListImagesRequest { pulled: Some(false), ..next.clone() },
        api::ListImagesRequest { creator: "alice".to_owned(), ..next.clone() },
        api::ListImagesRequest { view: ImageView::Full.into(), ..next.clone() },
        api::ListImagesRequest { page_token: format!("{}x", next.page_token), ..next.clone() },
        api::ListImagesRequest { page_token: format!("x{}", next.page_token), ..next.clone() },
    ] {
        assert_eq!(refused(&alice, other.clone()).await, ["page_token"], "{other:?}");
    }
    for other in [&bob, &as_admin] {
        assert_eq!(refused(other, next.clone()).await, ["page_token"]);
    }
    for (page_size, include_total_size, names) in
        [(1, false, &["a2"][..]), (2, true, &["a2", "a3"]), (0, false, &["a2", "a3", "a4"])]
    {
        let request = api::ListImagesRequest { page_size, include_total_size, ..next.clone() };
        let page = alice.images.clone().list_images(request).await?.into_inner();
        assert_eq!(page.images.iter().map(|image| image.name.as_str()).collect::<Vec<_>>(), names);
        assert_eq!(page.total_size, include_total_size.then_some(4));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_wrong_with_a_query_is_reported_together() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let request = api::ListImagesRequest {
        page_size: -1,
        view: 7,
        search: "x".repeat(1_025),
        kind: 9,
        statuses: vec![1, 0, 77],
        creator: "\n".to_owned(),
        order_by: "name, size".to_owned(),
        ..api::ListImagesRequest::default()
    };
    let mut all = refused(&service.builder("alice"), request).await;
    all.sort();
    assert_eq!(
        all,
        ["creator", "kind", "order_by", "page_size", "search", "statuses[1]", "statuses[2]", "view"]
    );
    Ok(())
}
