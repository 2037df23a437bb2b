//! The environment of a worker: its engine, the service, and its tasks, which simulations replace.

use std::{fmt::Debug, sync::Arc};

use futures_util::future::BoxFuture;

use crate::{
    engine::Engine, outbox::Settings, remote_context::RemoteContexts, service_client::ServiceClient,
};

/// The environment of a worker.
#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) engine: Arc<dyn Engine>,
    /// Set if the engine's processes are on this host.
    pub(crate) is_local: bool,
    pub(crate) outbox: Settings,
    pub(crate) remotes: RemoteContexts,
    pub(crate) service: Arc<dyn ServiceClient>,
    pub(crate) spawn: Arc<dyn Spawn>,
}

/// A spawner of the worker's tasks.
pub(crate) trait Spawn: Debug + Send + Sync {
    /// Runs a task to its end.
    fn spawn(&self, task: BoxFuture<'static, ()>);
}

/// A spawner on the worker's own Tokio runtime.
#[derive(Debug)]
pub(crate) struct TokioSpawn;

impl Spawn for TokioSpawn {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        tokio::spawn(task);
    }
}
