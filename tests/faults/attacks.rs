//! Attacks by one caller, or by a stranger: others are served meanwhile, and the memory stays within the limit of the
//! Kubernetes manifest.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use futures_util::{StreamExt as _, stream};
use proto::images::{
    self as api, UploadContextRequest, UploadContextStart, WatchImagesRequest, upload_context_request::Part,
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, sync::Mutex};
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    authority::{Authority, flag},
    client::{Client, channel, client_on, image},
    stack::{Service, directory},
};

/// Memory limit of `deploy/kubernetes/image-service.yaml`.
const MEMORY: u64 = 2 << 30;
/// Maximum time of others' calls, on a machine that other tests use, too.
const SOON: Duration = Duration::from_secs(3);

/// Turn of the tests with thousands of connections, of which this process may have 20,000.
static CONNECTIONS: Mutex<()> = Mutex::const_new(());

/// Calls of others, which are made again and again until this ends.
struct Others {
    end: Arc<AtomicBool>,
    task: AbortOnDropHandle<anyhow::Result<Vec<Duration>>>,
}

impl Others {
    /// Starts to make calls: each time a health check on a new connection, a list and a write.
    fn start(service: &Service) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let (addr, token, ends) = (service.addr, service.token_of("bob"), Arc::clone(&end));
        let task = async move {
            let mut took = Vec::new();
            while !ends.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let calls = async {
                    let channel = channel(addr);
                    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await?;
                    let bob = client_on(channel, &token);
                    bob.list().await?;
                    let request = api::CreateImageRequest {
                        image: Some(image("Bob's", "FROM scratch")),
                        ..Default::default()
                    };
                    bob.images.clone().create_image(request).await?;
                    anyhow::Ok(())
                };
                calls.await.with_context(|| format!("after {} times", took.len()))?;
                took.push(begun.elapsed());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok(took)
        };
        Self { end, task: AbortOnDropHandle::new(tokio::spawn(task)) }
    }

    /// Checks how long the calls took.
    async fn were_served(self, service: &Service, attack: &str) -> anyhow::Result<()> {
        self.end.store(true, Ordering::Relaxed);
        let took = tokio::time::timeout(SOON * 4, self.task).await??;
        let took = took.with_context(|| attack.to_owned())?;
        let slowest = took.iter().max().context("no calls were made")?;
        let memory = service.program.peak_memory()?;
        println!(
            "{attack}: {} times three calls, the slowest {slowest:?}; memory {} MiB",
            took.len(),
            memory >> 20
        );
        anyhow::ensure!(*slowest < SOON, "{attack}: others waited for {slowest:?}");
        anyhow::ensure!(memory < MEMORY, "{attack}: {memory} bytes of memory");
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_caller_makes_nobody_else_wait() -> anyhow::Result<()> {
    const WHILE: Duration = Duration::from_secs(4);
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let mallory = service.builder("mallory");
    let mut targets = Vec::new();
    for number in 0..20 {
        let mut draft = image(&format!("Image {number}"), "FROM scratch");
        draft.description = "common words ".repeat(200);
        targets.push(mallory.create(draft).await?.0.id);
    }

    // Large templates, and their remembered responses.
    let others = Others::start(&service);
    let mut template = image("Template", &format!("FROM scratch\n{}", "# a large template\n".repeat(9_000)));
    template.template = true;
    let creating = stream::iter(0..300).map(|_| {
        let request = api::CreateImageRequest {
            image: Some(template.clone()),
            request_id: uuid::Uuid::new_v4().to_string(),
            ..Default::default()
        };
        let images = mallory.images.clone();
        async move { images.clone().create_image(request).await.map(drop) }
    });
    let mut creating = std::pin::pin!(creating.buffer_unordered(50));
    let mut created = 0;
    while let Some(answer) = creating.next().await {
        // Most are too many a second.
        created += usize::from(answer.is_ok());
    }
    anyhow::ensure!(created > 100, "{created} templates");
    others.were_served(&service, "templates").await?;

    let attacks: [(&str, usize, Attack); 4] = [
        ("watches", 300, watching),
        ("previews of 1,000 rows", 700, previewing),
        ("searches", 40, searching),
        ("stalled uploads", 8, uploading),
    ];
    for (attack, count, call) in attacks {
        let others = Others::start(&service);
        let calls: Vec<_> = (0..count).map(|_| call(mallory.clone(), targets.clone())).collect();
        tokio::time::sleep(WHILE).await;
        others.were_served(&service, attack).await?;
        drop(calls);
    }
    Ok(())
}

/// Makes one kind of call again and again, with the ids of images that the caller has.
type Attack = fn(Client, Vec<String>) -> AbortOnDropHandle<()>;

fn previewing(mallory: Client, targets: Vec<String>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let target = |id: &String| api::BatchTarget { id: id.clone(), ..Default::default() };
        let request = api::BatchImagesRequest {
            action: api::BatchAction::Disable.into(),
            targets: targets.iter().cycle().take(1_000).map(target).collect(),
            validate_only: true,
            ..Default::default()
        };
        loop {
            // Most are too many at once.
            let _ = mallory.images.clone().batch_images(request.clone()).await;
        }
    }))
}

fn searching(mallory: Client, _: Vec<String>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let search = "nowhere common".to_owned();
            let _ = mallory
                .images
                .clone()
                .list_images(api::ListImagesRequest { search, ..Default::default() })
                .await;
        }
    }))
}

fn watching(mallory: Client, _: Vec<String>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let request = WatchImagesRequest { search: "common".to_owned(), ..Default::default() };
            // Those beyond the limits are refused.
            let Ok(watch) = mallory.images.clone().watch_images(request).await else { continue };
            let mut watch = watch.into_inner();
            while let Ok(Some(_)) = watch.message().await {}
        }
    }))
}

fn uploading(mallory: Client, _: Vec<String>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let start = UploadContextRequest { part: Some(Part::Start(UploadContextStart::default())) };
            let parts = stream::iter([start]).chain(stream::pending());
            let _ = mallory.contexts.clone().upload_context(parts).await;
        }
    }))
}

/// Opens connections that say nothing, or a first handshake only, and keeps them.
async fn idle(addr: SocketAddr, count: usize, first: &'static [u8]) -> anyhow::Result<Vec<TcpStream>> {
    let mut open = Vec::with_capacity(count);
    let mut opening = stream::iter(0..count)
        .map(|_| async move {
            let mut connection = TcpStream::connect(addr).await?;
            connection.write_all(first).await?;
            std::io::Result::Ok(connection)
        })
        .buffer_unordered(50);
    while let Some(connection) = opening.next().await {
        // The service may close one at once.
        open.extend(connection);
    }
    Ok(open)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_makes_nobody_wait() -> anyhow::Result<()> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let _turn = CONNECTIONS.lock().await;
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    for (attack, first) in [("10,100 silent connections", &[][..]), ("10,100 idle connections", PREFACE)] {
        let others = Others::start(&service);
        let open = idle(service.addr, 10_100, first).await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        others.were_served(&service, attack).await?;
        drop(open);
    }
    let log = std::fs::read_to_string(directory.path().join("image-service.log"))?;
    let warnings = log.lines().filter(|line| line.contains("WARN")).count();
    anyhow::ensure!((1..5).contains(&warnings), "{warnings} warnings: {log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_make_nobody_wait() -> anyhow::Result<()> {
    // The beginning of a ClientHello.
    const HELLO: &[u8] = &[0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00];
    let _turn = CONNECTIONS.lock().await;
    let directory = directory()?;
    let authority = Authority::new()?;
    let issued = authority.issue()?;
    let flags = ["--tls-cert", flag(&issued.cert), "--tls-key", flag(&issued.key)];
    let service = Service::start(directory.path(), &flags).await?;
    let ca = std::fs::read(authority.file())?;
    let connect = || async {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ca)).domain_name("localhost");
        let endpoint = Channel::from_shared(format!("https://{}", service.addr))?;
        anyhow::Ok(endpoint.tls_config(tls)?.connect().await?)
    };
    for (attack, first) in
        [("handshakes that stop", HELLO), ("handshakes that are none", b"GET / HTTP/1.0\r\n\r\n")]
    {
        let open = idle(service.addr, 10_100, first).await?;
        for _ in 0..10 {
            let begun = Instant::now();
            let channel = connect().await?;
            HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await?;
            client_on(channel, &service.token_of("bob")).list().await?;
            anyhow::ensure!(begun.elapsed() < SOON, "{attack}: others waited for {:?}", begun.elapsed());
        }
        let memory = service.program.peak_memory()?;
        println!("{attack}: memory {} MiB", memory >> 20);
        anyhow::ensure!(memory < MEMORY, "{attack}: {memory} bytes of memory");
        drop(open);
    }
    Ok(())
}
