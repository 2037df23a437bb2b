//! A full disk: nothing is added, everything else goes on, and nothing is lost.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::Context as _;
use proto::images::{self as api, BuildState};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    answers::{lines, refused},
    client::{channel, image},
    docker_engine::Engine,
    eventually::eventually_true,
    stack::{LIMIT, Service, Worker, counted, counting, directory, ended, watch},
};

const MIB: usize = 1024 * 1024;
const UPLOADS: &str = "trailer.images.v1.ContextService";

/// A small disk, which is unmounted when it is dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf, size: &str) -> anyhow::Result<Self> {
        fs::create_dir(&at)?;
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"], &at)?;
        Ok(Self(at))
    }

    fn resize(&self, size: &str) -> anyhow::Result<()> {
        run("mount", &["-o", &format!("remount,size={size}")], &self.0)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The service still has files open there.
        let _ = run("umount", &["--lazy"], &self.0);
    }
}

fn run(program: &str, arguments: &[&str], path: &PathBuf) -> anyhow::Result<()> {
    let ended = Command::new(program).args(arguments).arg(path).status()?;
    anyhow::ensure!(ended.success(), "{program} {arguments:?} {}: {ended}", path.display());
    Ok(())
}

async fn health(service: &Service, name: &str) -> anyhow::Result<ServingStatus> {
    let request = HealthCheckRequest { service: name.to_owned() };
    Ok(HealthClient::new(channel(service.addr)).check(request).await?.into_inner().status())
}

fn storage_full() -> (Code, String) {
    (Code::Unavailable, "STORAGE_FULL".to_owned())
}

/// Returns a tar of incompressible bytes.
fn archive(seed: u64) -> anyhow::Result<Vec<u8>> {
    let mut noise = vec![0; 4 * MIB];
    fastrand::Rng::with_seed(seed).fill(&mut noise);
    let mut header = tar::Header::new_gnu();
    header.set_size(noise.len() as u64);
    header.set_mode(0o644);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, "file", noise.as_slice())?;
    Ok(archive.into_inner()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_what_would_add_to_it_and_nothing_else() -> anyhow::Result<()> {
    const COUNT: u32 = 200;
    let directory = directory()?;
    let disk = Disk::mount(directory.path().join("data"), "96m")?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let engine = Engine::start(directory.path(), "e1").await?;
    let spool = directory.path().join("spool").display().to_string();
    let further = ["--spool-dir", &spool];
    let _worker = Worker::start_with(directory.path(), &service, service.addr, "w1", &engine, 2, &further)?;
    let (created, build) = alice.create(image("Running", &counting(COUNT, "0.1"))).await?;
    let watching = watch(&alice, &build.id);
    alice.until(&build.id, |build| build.log_bytes > 0).await?;

    let mut uploads = 0;
    let full = loop {
        anyhow::ensure!(uploads < 30, "96 MiB hold no {uploads} archives of 4 MiB");
        match alice.upload("", &archive(uploads)?).await {
            Ok(_) => uploads += 1,
            Err(status) => break refused::<()>(Err(status)),
        }
    };
    assert_eq!(full, storage_full(), "after {uploads} uploads");
    assert_eq!(refused(alice.create(image("One more", "FROM scratch")).await), storage_full());
    eventually_true("health tells it", async || {
        Ok(health(&service, UPLOADS).await? == ServingStatus::NotServing)
    })
    .await?;
    assert_eq!(health(&service, "").await?, ServingStatus::Serving);
    // Reads go on, and what adds nothing, and the build.
    assert_eq!(alice.list().await?.len(), 1);
    let disable = api::DisableImageRequest { id: created.id.clone(), ..Default::default() };
    alice.images.clone().disable_image(disable).await?;
    let before = alice.get_build(&build.id).await?.log_bytes;
    alice.until(&build.id, |build| build.log_bytes > before).await?;

    // Others use the rest of the disk, too.
    let filler = directory.path().join("data/filler");
    let filled = fs::write(&filler, vec![7; 96 * MIB]);
    assert!(filled.is_err_and(|error| error.kind() == std::io::ErrorKind::StorageFull));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(alice.list().await?.len(), 1);
    fs::remove_file(&filler)?;
    let events = ended(watching, LIMIT).await?;
    assert_eq!(lines(&events), counted(COUNT), "no line is lost");
    let finished = alice.get_build(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));

    disk.resize("256m")?;
    eventually_true("there is room again", async || {
        Ok(alice.create(image("One more", "FROM scratch")).await.is_ok())
    })
    .await?;
    eventually_true("health tells that, too", async || {
        Ok(health(&service, UPLOADS).await? == ServingStatus::Serving)
    })
    .await?;
    let log = fs::read_to_string(directory.path().join("image-service.log")).context("the log")?;
    assert_eq!(log.matches("(STORAGE_FULL)").count(), 1, "{log}");
    Ok(())
}
