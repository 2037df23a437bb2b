//! Polling, for conditions that no event reports.

use std::time::Duration;

use anyhow::Context as _;

use crate::stack::LIMIT;

const PAUSE: Duration = Duration::from_millis(10);

/// Repeats an attempt until it returns a value, for at most [`LIMIT`]. An error of an attempt ends this at once.
pub(crate) async fn eventually<T>(
    what: &str,
    attempt: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    eventually_within(LIMIT, what, attempt).await
}

/// Repeats an attempt until it returns a value, for at most `limit`. An error of an attempt ends this at once.
pub(crate) async fn eventually_within<T>(
    limit: Duration,
    what: &str,
    mut attempt: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    tokio::time::timeout(limit, async {
        loop {
            if let Some(found) = attempt().await? {
                return Ok(found);
            }
            tokio::time::sleep(PAUSE).await;
        }
    })
    .await
    .with_context(|| format!("{what}: not within {limit:?}"))?
}

/// Waits until a condition holds. An error of the condition ends this at once.
pub(crate) async fn eventually_true(
    what: &str,
    mut condition: impl AsyncFnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    eventually(what, async || Ok(condition().await?.then_some(()))).await
}
