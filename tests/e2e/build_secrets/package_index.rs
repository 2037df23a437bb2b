//! Generated images that install from a private package index.

use std::{fs, process::Command};

use proto::images::{
    BuildSecret, BuildState, GenerateSource, GeneratedStep, Image, ImageConfig, StepState,
    build_event::Event, image_config::Source,
};
use serde_json::json;

use super::{Secrets, contains, exported, run};
use crate::{
    answers::lines,
    contexts::{self, tar_of},
    debian_workspace::import_debian,
    engine_fixture::Real,
};

/// Returns the archive of a base image with a package index that requires a password.
///
/// Steps reach no other container and not this host, so the index runs within the step, as soon as that runs Python.
fn index_archive(base: &str, password: &str) -> anyhow::Result<Vec<u8>> {
    const WHEEL: &str = "import sys, zipfile\nz = zipfile.ZipFile(sys.argv[1], 'w')\n\
        i = 'trailer_private-1.0.dist-info/'\n\
        z.writestr('trailer_private.py', 'VALUE = 4711\\n')\n\
        z.writestr(i + 'METADATA', 'Metadata-Version: 2.1\\nName: trailer-private\\nVersion: 1.0\\n')\n\
        z.writestr(i + 'WHEEL', 'Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n\
        z.writestr(i + 'RECORD', '')\nz.close()";
    const PYTHON: &str = "#!/bin/sh\n\
        /index/busybox httpd -p 127.0.0.1:8000 -h /index/www -r private -c /index/httpd.conf\n\
        exec /usr/bin/python3 \"$@\"\n";
    // Once, rather than in each image that is generated.
    const INSTALL: &str =
        "apt-get update -qq && apt-get install -qq -y --no-install-recommends python3-pip >/dev/null";
    let directory = tempfile::tempdir()?;
    let name = "trailer_private-1.0-py3-none-any.whl";
    let wheel = directory.path().join(name);
    anyhow::ensure!(Command::new("python3").args(["-c", WHEEL]).arg(&wheel).status()?.success());
    let dockerfile = format!(
        "FROM {base}\nRUN {INSTALL}\nCOPY . /index/\nRUN install /index/python3 /usr/local/bin/python3 && chmod +x /index/busybox"
    );
    tar_of(&[
        ("Dockerfile", dockerfile.as_bytes()),
        ("www/simple/trailer-private/index.html", format!("<a href=\"{name}\">{name}</a>").as_bytes()),
        (&format!("www/simple/trailer-private/{name}"), &fs::read(&wheel)?),
        ("httpd.conf", format!("/:robot:{password}\n").as_bytes()),
        ("python3", PYTHON.as_bytes()),
        ("busybox", &fs::read("/bin/busybox")?),
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generated_image_installs_from_a_private_index() -> anyhow::Result<()> {
    const PASSWORD: &str = "index-sesame-4711";
    let url = format!("http://robot:{PASSWORD}@127.0.0.1:8000/simple");
    let conf = format!("[global]\nindex-url = {url}\n");
    let secrets = Secrets::new(&[("pip-conf", &conf, json!({})), ("index-url", &url, json!({}))])?;
    let real =
        Real::start_with(&["--secrets-dir", secrets.path()?, "--allow-local", "trailer-test/*"]).await?;
    let alice = real.alice();
    let debian = format!("trailer-test/debian-{}:12", real.run);
    import_debian(&real.docker, &debian).await?;
    let archive = alice.upload("", &index_archive(&debian, PASSWORD)?).await?.digest;
    let base = contexts::image_of(&format!("Index {}", real.run), contexts::named(&archive, ""));
    let (base, built, _) = run(&alice, base).await?;
    assert_eq!(built.state(), BuildState::Succeeded, "{:?}", built.error);
    let wanted = |name: &str, exposed: BuildSecret| {
        let source = GenerateSource {
            base_image: base.reference.clone(),
            python_packages: vec!["trailer-private".to_owned()],
            ..GenerateSource::default()
        };
        let steps = vec![GeneratedStep::PythonPackages.into()];
        Image {
            name: format!("{name} {}", real.run),
            config: Some(ImageConfig {
                source: Some(Source::Generate(source)),
                secrets: vec![BuildSecret { id: "index".to_owned(), steps, ..exposed }],
                ..ImageConfig::default()
            }),
            ..Image::default()
        }
    };
    let by_file = BuildSecret {
        name: "pip-conf".to_owned(),
        file: "/etc/pip.conf".to_owned(),
        ..BuildSecret::default()
    };
    let by_variable = BuildSecret {
        name: "index-url".to_owned(),
        environment: "PIP_INDEX_URL".to_owned(),
        ..BuildSecret::default()
    };
    let mut made = Vec::new();
    for wanted in [wanted("By file", by_file), wanted("By variable", by_variable)] {
        let (created, built, history) = run(&alice, wanted).await?;
        assert_eq!(built.state(), BuildState::Succeeded, "{:?} {:?}", built.error, lines(&history));
        let ran = history.iter().any(|event| match &event.event {
            Some(Event::StepChange(step)) => step.name.contains("pip") && step.state() == StepState::Done,
            _ => false,
        });
        assert!(ran, "{history:?}");
        let records = format!("{history:?}{:?}", real.docker.image_history(&created.reference).await?);
        assert!(!records.contains(PASSWORD), "{records}");
        let image = exported(&real.docker, &created.reference).await?;
        assert!(contains(&image, "VALUE = 4711"), "the package is installed");
        // The index itself has the password, but no URL with it.
        assert!(!contains(&image, &format!("robot:{PASSWORD}@")), "the URL is in the image");
        made.push(created.reference);
    }
    made.extend([base.reference, debian]);
    let made: Vec<&str> = made.iter().map(String::as_str).collect();
    real.clean(&made).await
}
