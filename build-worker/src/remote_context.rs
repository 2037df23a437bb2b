//! Remote contexts: a Git repository with its submodules, or a file of a web server, fetched by the worker.
//!
//! The engine would reach whatever its host reaches, and knows a checkout by its commit alone, whoever may
//! read it. So the worker checks every connection (see [`crate::egress`]), keeps nothing between two fetches,
//! and uploads the result.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::time::timeout;

use self::{checkout::Checkout, git_command::Git, location::Location};
use crate::{
    context::LargeContext,
    egress::{Egress, EgressRules, Obstacle},
    secrets::Netrc,
    spool::Spool,
};

mod checkout;
mod commit;
mod credential_helper;
mod download;
mod git;
mod git_command;
mod location;
mod tree;

/// The source of remote contexts.
#[derive(Debug)]
pub(crate) struct RemoteContexts {
    /// Directory for checkouts.
    directory: PathBuf,
    rules: Arc<EgressRules>,
    has_git: bool,
}

/// The reason why a remote context is not available.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoteError {
    /// A URL that may not be fetched, or that names nothing.
    #[error("{0}")]
    Refused(String),
    /// A server that cannot be reached or is too busy.
    #[error("{0}")]
    Unreachable(String),
    /// A failure of this host.
    #[error("cannot fetch the context")]
    Local(#[from] io::Error),
}

impl RemoteContexts {
    /// Maximum duration of a fetch.
    const LIMIT: Duration = Duration::from_secs(60 * 60);

    /// Creates a source that keeps its checkouts in `directory`, after it has removed those of killed
    /// workers.
    pub(crate) async fn open(directory: PathBuf, rules: EgressRules) -> Self {
        let has_git = Git::is_installed().await;
        if !has_git {
            tracing::warn!("git cannot be run; no builds with a remote context are taken");
        }
        if let Err(error) = remove_abandoned(directory.clone()).await {
            tracing::warn!(%error, "cannot remove the checkouts of an earlier worker");
        }
        Self { directory, rules: Arc::new(rules), has_git }
    }

    /// Creates a source without remote contexts.
    #[cfg(feature = "simulation")]
    pub(crate) fn none() -> Self {
        Self { directory: PathBuf::new(), rules: Arc::default(), has_git: false }
    }

    /// Reports whether remote contexts can be fetched.
    pub(crate) fn are_available(&self) -> bool {
        self.has_git
    }

    /// Fetches the context that a URL names; each server gets the credentials of its host.
    ///
    /// Dropping the future ends the fetch.
    ///
    /// # Errors
    ///
    /// Returns [`RemoteError`] if the URL is invalid, or the context cannot be fetched or written to the
    /// spool.
    pub(crate) async fn fetch(
        &self,
        url: &str,
        credentials: &Netrc,
        spool: &dyn Spool,
    ) -> Result<LargeContext, RemoteError> {
        let location = Location::parse(url)?;
        let fetching = Box::pin(self.fetch_from(location, credentials, spool));
        let late = |_| Err(RemoteError::Unreachable(format!("{url}: did not arrive within an hour")));
        timeout(Self::LIMIT, fetching).await.unwrap_or_else(late)
    }

    async fn fetch_from(
        &self,
        location: Location,
        credentials: &Netrc,
        spool: &dyn Spool,
    ) -> Result<LargeContext, RemoteError> {
        let egress = Arc::new(Egress::new(Arc::clone(&self.rules)));
        let context = LargeContext::new(spool.create().await?);
        match location {
            Location::File(url) => download::download(&url, credentials, &egress, context).await,
            Location::Repository(repository) => {
                let checkout = Arc::new(create_checkout(&self.directory).await?);
                let directory = git::check_out(&repository, credentials, &checkout, &egress).await?;
                Ok(tree::pack(checkout, directory, context).await?)
            }
        }
    }
}

async fn remove_abandoned(directory: PathBuf) -> io::Result<()> {
    let removal = tokio::task::spawn_blocking(move || Checkout::remove_abandoned(&directory));
    removal.await.map_err(io::Error::other)?
}

async fn create_checkout(parent: &Path) -> io::Result<Checkout> {
    let parent = parent.to_owned();
    tokio::task::spawn_blocking(move || Checkout::create(&parent)).await.map_err(io::Error::other)?
}

impl From<Obstacle> for RemoteError {
    fn from(obstacle: Obstacle) -> Self {
        let message = obstacle.to_string();
        if obstacle.is_users() { Self::Refused(message) } else { Self::Unreachable(message) }
    }
}
