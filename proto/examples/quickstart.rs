//! Client of the quickstart: registers or rebuilds the image of a name, and shows the build live.
//!
//! `WatchBuild` reports everything: the image's statuses, and the build's states, steps and lines, each
//! exactly once. When the service drains or is unavailable for a while, the watch resumes where it was.

use std::{env, fs, io::IsTerminal as _, process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use clap::Parser;
use proto::images::build_event::Event as Happened;
use proto::images::{self as api, Image, ImageStatus, LineStart, StepState, image_config::Source};
use proto::images::{build_service_client as builds, image_service_client as images};
use proto::watch::BuildWatch;
use tonic::service::{Interceptor, interceptor::InterceptedService};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, metadata::AsciiMetadataValue};

const PLAIN: &str = "0";
const RED: &str = "31";
const GREEN: &str = "32";
const BLUE: &str = "34";

/// Registers an image, builds it and shows the build.
#[derive(Debug, Parser)]
struct Arguments {
    /// Address of image-service.
    #[arg(long, default_value = "http://127.0.0.1:50051")]
    server: String,
    /// File with the bearer token.
    #[arg(long, value_parser = Bearer::read)]
    token_file: Bearer,
    /// Name of the image.
    #[arg(long)]
    name: String,
    /// File with the Dockerfile of the image.
    #[arg(long, value_parser = |path: &str| fs::read_to_string(path))]
    dockerfile: String,
    /// File of the build context: CONTEXT_PATH=LOCAL_PATH, with `:x` appended if it is executable.
    #[arg(long = "file", value_parser = context_file)]
    files: Vec<api::ContextFile>,
    /// Maximum time to wait for the end of the build, in seconds.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
}

/// An interceptor that adds the token to every call.
#[derive(Debug, Clone)]
struct Bearer(AsciiMetadataValue);

#[derive(Debug, Clone)]
struct Client {
    images: images::ImageServiceClient<InterceptedService<Channel, Bearer>>,
    builds: builds::BuildServiceClient<InterceptedService<Channel, Bearer>>,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let limit = Duration::from_secs(arguments.timeout);
    let endpoint = Endpoint::from_shared(arguments.server.clone())?;
    let channel = endpoint.connect().await.context("cannot reach the server")?;
    let bearer = arguments.token_file.clone();
    let client = Client {
        images: images::ImageServiceClient::with_interceptor(channel.clone(), bearer.clone()),
        builds: builds::BuildServiceClient::with_interceptor(channel, bearer),
    };
    let image = client.queue_build(arguments).await?;
    let build_id = image.latest_build_id.clone();
    let ended = tokio::time::timeout(limit, client.watch_build(&build_id)).await;
    let request = api::GetBuildRequest { id: build_id };
    let response = client.builds.clone().get_build(request).await?;
    let build = response.into_inner().build.context("the server answered no build")?;
    let Ok(ended) = ended else {
        let (state, reason) = (build.state(), build.pending_reason());
        bail!("the build has not ended within {limit:?}: {state:?}, pending reason {reason:?}");
    };
    if ended? == ImageStatus::BuildFinished {
        println!("reference={}", image.reference);
        return Ok(ExitCode::SUCCESS);
    }
    let error = build.error.unwrap_or_default();
    show(RED, "error", &format!("{} {}", error.step, error.message));
    for line in &error.last_lines {
        show(RED, "error", &format!("| {line}"));
    }
    Ok(ExitCode::FAILURE)
}

impl Client {
    /// Creates or updates the image, queues its build, and returns the image with the build to follow.
    async fn queue_build(&self, arguments: Arguments) -> anyhow::Result<Image> {
        let mut images = self.images.clone();
        let Arguments { name, dockerfile: text, files, .. } = arguments;
        let source = Source::Dockerfile(api::DockerfileSource { text, files, ..Default::default() });
        let config = Some(api::ImageConfig { source: Some(source), ..Default::default() });
        let image = if let Some(Image { id, .. }) = self.find(&name).await? {
            show(PLAIN, "client", &format!("UpdateImage {name} ({id})"));
            let image = Some(Image { id: id.clone(), config, ..Default::default() });
            images.update_image(api::UpdateImageRequest { image, ..Default::default() }).await?;
            show(PLAIN, "client", &format!("BuildImage {name} ({id})"));
            match images.build_image(api::BuildImageRequest { id: id.clone(), ..Default::default() }).await {
                // A build is in progress: follow that one.
                Err(status) if status.code() == Code::FailedPrecondition => {
                    images.get_image(api::GetImageRequest { id }).await?.into_inner().image
                }
                response => response?.into_inner().image,
            }
        } else {
            show(PLAIN, "client", &format!("CreateImage {name}"));
            let image = Some(Image { name, config, ..Default::default() });
            images
                .create_image(api::CreateImageRequest { image, ..Default::default() })
                .await?
                .into_inner()
                .image
        };
        image.context("the server answered no image")
    }

    async fn find(&self, name: &str) -> anyhow::Result<Option<Image>> {
        let search = name.to_owned();
        let mut request = api::ListImagesRequest { search, ..Default::default() };
        loop {
            let response = self.images.clone().list_images(request.clone()).await?;
            let page = response.into_inner();
            let found = page.images.into_iter().find(|image| image.name == name);
            if found.is_some() || page.next_page_token.is_empty() {
                return Ok(found);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Shows every event of the build until its end, and returns the image's status at the end.
    async fn watch_build(&self, id: &str) -> anyhow::Result<ImageStatus> {
        let mut status = ImageStatus::Unspecified;
        let mut watch = BuildWatch::new(self.builds.clone(), id.to_owned());
        while let Some(event) = watch.next().await? {
            show_event(event, &mut status);
        }
        Ok(status)
    }
}

fn show_status(status: ImageStatus) {
    let colour = match status {
        ImageStatus::BuildFinished => GREEN,
        ImageStatus::Error | ImageStatus::BuildCancelled => RED,
        ImageStatus::BuildPending | ImageStatus::Building => BLUE,
        ImageStatus::Snapshotting | ImageStatus::Unspecified => PLAIN,
    };
    let word = status.as_str_name().trim_start_matches("IMAGE_STATUS_");
    show(colour, "image", word);
}

fn show_event(event: api::BuildEvent, status: &mut ImageStatus) {
    match event.event {
        Some(Happened::StateChange(change)) => {
            let word = change.state().as_str_name().trim_start_matches("BUILD_STATE_");
            show(PLAIN, "build", &format!("{word} {}", change.message));
            if change.image_status() != *status {
                *status = change.image_status();
                show_status(*status);
            }
        }
        Some(Happened::StepChange(step)) => match step.state() {
            StepState::Unspecified | StepState::Pending => {}
            StepState::Started => show(BLUE, "step", &step.name),
            StepState::Done => show(GREEN, "step", &format!("{}: done", step.name)),
            StepState::Cached => show(GREEN, "step", &format!("{}: cached", step.name)),
            StepState::Failed => show(RED, "step", &format!("{}: {}", step.name, step.error)),
        },
        Some(Happened::LogLine(line)) => {
            let mark = match line.start() {
                LineStart::Unspecified | LineStart::NewLine => '|',
                LineStart::Continuation => '+',
                LineStart::Replacement => '~',
            };
            show(PLAIN, "log", &format!("{mark} {}", line.text));
        }
        Some(Happened::LogGap(gap)) => show(RED, "log", &format!("| … {}", gap.message)),
        None => {}
    }
}

/// Prints a line, its first word in colour on a terminal, unless the environment says otherwise.
fn show(colour: &str, what: &str, text: &str) {
    let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    let coloured = !set("NO_COLOR") && (std::io::stdout().is_terminal() || set("CLICOLOR_FORCE"));
    let (begin, end) = if coloured { (format!("\x1b[{colour}m"), "\x1b[0m") } else { Default::default() };
    println!("{begin}{what:<6}{end} {}", text.trim_end());
}

fn context_file(argument: &str) -> anyhow::Result<api::ContextFile> {
    let (path, local) = argument.split_once('=').context("not CONTEXT_PATH=LOCAL_PATH")?;
    let (local, executable) = local.strip_suffix(":x").map_or((local, false), |local| (local, true));
    let (path, content) = (path.to_owned(), fs::read(local)?.into());
    Ok(api::ContextFile { path, content, executable })
}

impl Bearer {
    fn read(path: &str) -> anyhow::Result<Self> {
        Ok(Self(format!("Bearer {}", fs::read_to_string(path)?.trim()).parse()?))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}
