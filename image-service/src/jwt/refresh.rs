//! The refresh of a JWKS while the service runs.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::{
    Trust, Verifier,
    jwks::KeySet,
    source::{JwksError, JwksSource},
};

/// Interval between reads of a file. Contents are compared, not times, so that a change within a tick of the
/// clock counts too.
const FILE_POLL: Duration = Duration::from_secs(2);
/// Minimum interval between fetches for unknown keys, so that tokens with such keys cannot flood the identity
/// provider.
const FETCH_PAUSE: Duration = Duration::from_secs(10);
/// Maximum time for fetching at the start, when the provider may be starting too.
const FIRST_FETCH: Duration = Duration::from_secs(10);
/// Interval at which a lasting failure is logged again.
const REMINDER: Duration = Duration::from_secs(300);

/// A JWKS that is read periodically.
#[derive(Debug)]
pub(super) struct Refresh {
    source: JwksSource,
    interval: Duration,
}

/// The last failure that was logged.
struct Failure {
    message: String,
    at: Instant,
}

impl Refresh {
    /// Creates the refresh of a source. A URL is fetched at every interval; a file is read more often.
    pub(super) fn new(source: JwksSource, interval: Duration) -> Self {
        let interval = match source {
            JwksSource::File(_) => FILE_POLL,
            JwksSource::Url(_) => interval,
        };
        Self { source, interval }
    }

    /// Loads the keys for the first time.
    pub(super) async fn first(&self) -> Result<Trust, JwksError> {
        let trust = match &self.source {
            JwksSource::File(_) => self.load().await?,
            JwksSource::Url(_) => self.fetch_first().await?,
        };
        if self.source.is_exposed() {
            tracing::warn!(jwks = %self.source, "the JWKS is fetched over an unencrypted connection: anyone who can alter it can mint tokens");
        }
        tracing::info!(jwks = %self.source, keys = trust.keys.len(), "tokens are verified with the keys of the JWKS");
        Ok(trust)
    }

    async fn fetch_first(&self) -> Result<Trust, JwksError> {
        let mut last = JwksError::Late;
        let attempts = async {
            let mut pause = Duration::from_millis(250);
            loop {
                match self.load().await {
                    Ok(trust) => return trust,
                    Err(error) => {
                        tracing::warn!(jwks = %self.source, error = &error as &dyn std::error::Error, "the JWKS cannot be loaded yet");
                        last = error;
                    }
                }
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(2));
            }
        };
        let loaded = tokio::time::timeout(FIRST_FETCH, attempts).await;
        loaded.map_err(|_| last)
    }

    /// Loads the keys. At least one is required, because otherwise no caller could be authenticated.
    async fn load(&self) -> Result<Trust, JwksError> {
        let trust = read(self.source.read().await?)?;
        if trust.keys.is_empty() { Err(JwksError::NoKey) } else { Ok(trust) }
    }

    /// Replaces the keys of the verifier whenever they change. Never returns; the future may be dropped at
    /// any time.
    pub(super) async fn run(&self, verifier: &Verifier) {
        let mut next_fetch = Instant::now();
        let mut failure = None;
        loop {
            let requested = async {
                verifier.unknown_key.notified().await;
                sleep_until(next_fetch).await;
            };
            tokio::select! {
                () = sleep(self.interval) => {}
                () = requested, if matches!(self.source, JwksSource::Url(_)) => {}
            }
            next_fetch = Instant::now() + FETCH_PAUSE;
            match self.source.read().await {
                Ok(document) if document == verifier.trust().document => self.recovered(&mut failure),
                Ok(document) => match read(document) {
                    Ok(trust) => {
                        self.recovered(&mut failure);
                        self.announce(&trust);
                        verifier.replace(trust);
                    }
                    Err(error) => self.failed(&error, &mut failure),
                },
                Err(error) => self.failed(&error, &mut failure),
            }
        }
    }

    fn announce(&self, trust: &Trust) {
        if trust.keys.is_empty() {
            // An issuer that withdraws all keys means it: keeping the old ones would trust what the issuer
            // distrusts.
            tracing::warn!(jwks = %self.source, "the JWKS has no usable key any more: no token is accepted");
        } else {
            tracing::info!(jwks = %self.source, keys = trust.keys.len(), "the keys of the JWKS have changed");
        }
    }

    fn recovered(&self, failure: &mut Option<Failure>) {
        if failure.take().is_some() {
            tracing::info!(jwks = %self.source, "the JWKS is available again");
        }
    }

    /// Logs a failure, but not at every read, because a file is read every other second.
    fn failed(&self, error: &JwksError, failure: &mut Option<Failure>) {
        let message = error.to_string();
        if failure.as_ref().is_some_and(|last| last.message == message && last.at.elapsed() < REMINDER) {
            return;
        }
        tracing::warn!(jwks = %self.source, error = error as &dyn std::error::Error, "the JWKS cannot be refreshed: the last keys stay");
        *failure = Some(Failure { message, at: Instant::now() });
    }
}

fn read(document: Vec<u8>) -> Result<Trust, JwksError> {
    let keys = KeySet::parse(&document).map_err(JwksError::Malformed)?;
    Ok(Trust { keys, document, ..Trust::default() })
}
