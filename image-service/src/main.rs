//! The image-service program: `serve`, `token` and `health`.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use image_service::{Cli, Command, Config, PROGRAM, TokenArgs, TokenKeys};
use service_runtime::{health::HealthCheck, telemetry::Telemetry};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The global allocator. Calls make many small allocations beside the millions that the index keeps, which
/// slow down the allocator of the C library.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Serve(config) => serve(config),
        Command::Token(args) => token(&args),
        Command::Health(check) => health(&check),
    };
    let failed = |error| eprintln!("{PROGRAM}: {error:#}");
    done.map_err(failed).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}

#[tokio::main]
async fn serve(config: Config) -> anyhow::Result<()> {
    let telemetry = Telemetry::start(PROGRAM, "info,sea_orm_migration=warn", &config.telemetry)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let bound = image_service::bind(config).await?;
    tracing::info!(address = %bound.local_addr()?, "image-service listens");
    let shutdown = CancellationToken::new();
    let mut serving = tokio::spawn(bound.run(shutdown.clone()));
    let ended = tokio::select! {
        ended = &mut serving => ended,
        signal = async { tokio::select! { _ = terminate.recv() => "SIGTERM", _ = interrupt.recv() => "SIGINT" } } => {
            tracing::info!("{signal}: draining");
            shutdown.cancel();
            serving.await
        }
    };
    telemetry.end().await;
    Ok(ended.context("the service panicked")??)
}

fn token(args: &TokenArgs) -> anyhow::Result<()> {
    let keys = TokenKeys::open(&args.data_dir).context("cannot open the key pair")?;
    println!("{}", keys.mint(&args.subject, &args.roles, &args.groups, &args.pools, args.ttl)?);
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn health(check: &HealthCheck) -> anyhow::Result<()> {
    check.run().await
}
