//! The build-worker program.

use std::process::ExitCode;

use anyhow::Context;
use build_worker::{Cli, Command, Config, PROGRAM};
use service_runtime::{health::HealthCheck, telemetry::Telemetry};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    let done = match Cli::parse_command() {
        Command::Work(config) => work(*config),
        Command::Health(check) => health(&check),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{PROGRAM}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn work(config: Config) -> anyhow::Result<()> {
    let telemetry = Telemetry::start(PROGRAM, "info", &config.telemetry)?;
    build_worker::forbid_core_dumps();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let bound = build_worker::bind(config)?;
    tracing::info!(address = %bound.local_addr()?, "build-worker listens");
    let shutdown = CancellationToken::new();
    let mut working = tokio::spawn(bound.run(shutdown.clone()));
    let ended = tokio::select! {
        ended = &mut working => ended,
        signal = async { tokio::select! { _ = terminate.recv() => "SIGTERM", _ = interrupt.recv() => "SIGINT" } } => {
            tracing::info!("{signal}: draining");
            shutdown.cancel();
            working.await
        }
    };
    telemetry.end().await;
    Ok(ended.context("the worker panicked")??)
}

#[tokio::main(flavor = "current_thread")]
async fn health(check: &HealthCheck) -> anyhow::Result<()> {
    check.run().await
}
