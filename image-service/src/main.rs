//! The image-service program: `serve` and `token`.

use std::{io::IsTerminal, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use image_service::{Cli, Command, Config, LogFormat, TokenArgs, TokenKeys};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Serve(config) => serve(config),
        Command::Token(args) => token(&args),
    };
    let failed = |error| eprintln!("image-service: {error:#}");
    done.map_err(failed).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}

#[tokio::main]
async fn serve(config: Config) -> anyhow::Result<()> {
    log(config.log_format);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let bound = image_service::bind(config).await?;
    tracing::info!(address = %bound.local_addr()?, "image-service listens");
    let shutdown = CancellationToken::new();
    let mut serving = tokio::spawn(bound.run(shutdown.clone()));
    tokio::select! {
        ended = &mut serving => return Ok(ended.context("the service panicked")??),
        _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
    }
    shutdown.cancel();
    serving.await.context("the service panicked")??;
    Ok(())
}

fn token(args: &TokenArgs) -> anyhow::Result<()> {
    let keys = TokenKeys::open(&args.data_dir).context("cannot open the key pair")?;
    println!("{}", keys.mint(&args.subject, &args.roles, args.ttl)?);
    Ok(())
}

fn log(format: LogFormat) {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,sea_orm_migration=warn"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Human => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
