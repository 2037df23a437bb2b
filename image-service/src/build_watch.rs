//! Watches of builds, which read the history from the store by cursor for as long as it grows.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    access::{Principal, Visibility},
    build::{Build, BuildId, Excerpt, Record},
    error::{Error, Resource},
    fair_semaphore::FairSemaphore,
    feed::deadline,
    index::Index,
    signals::Signals,
    store::Store,
};

/// A factory of build watches.
#[derive(Clone, Debug)]
pub(crate) struct Histories {
    store: Store,
    index: Index,
    signals: Arc<Signals>,
    /// Turns at the database, so that the watches of one caller leave it to others.
    reads: FairSemaphore,
    shutdown: CancellationToken,
}

/// A caller's cursor in the history of a build.
#[derive(Debug)]
pub(crate) struct BuildWatch {
    histories: Histories,
    /// Notified when the history grows; taken only when the watch ends.
    grew: Option<watch::Receiver<()>>,
    caller: Principal,
    visibility: Visibility,
    expiry: Instant,
    build: Build,
    /// Sequence number up to which all records were delivered or are in `pending`.
    after: i64,
    pending: VecDeque<Record>,
    /// Time of the last message.
    last_sent: Instant,
}

impl Histories {
    /// Maximum number of concurrent reads: half of the connections to the database.
    const READS: usize = Store::READERS as usize / 2;

    pub(crate) fn new(
        store: Store,
        index: Index,
        signals: Arc<Signals>,
        shutdown: CancellationToken,
    ) -> Self {
        Self { store, index, signals, reads: FairSemaphore::new(Self::READS), shutdown }
    }

    /// Begins a watch of a build after the record numbered `after`.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Index::visible`], [`Error::NotFound`] if the build does not exist, and
    /// [`Error::SequenceUnavailable`] if it has no record `after` yet.
    pub(crate) async fn watch(
        &self,
        caller: &Principal,
        id: BuildId,
        after: i64,
    ) -> Result<BuildWatch, Error> {
        let visibility = caller.visibility();
        // Look first, so that a build that does not exist gets no subscribers.
        let build = self.store.build(id).await?.build;
        self.index.visible(&visibility, build.image, Resource::Build(build.id)).await?;
        if after > build.last_sequence {
            return Err(Error::SequenceUnavailable { requested: after, last: build.last_sequence });
        }
        Ok(BuildWatch {
            histories: self.clone(),
            grew: Some(self.signals.subscribe_history(id)),
            caller: caller.clone(),
            visibility,
            expiry: deadline(caller),
            build,
            after,
            pending: VecDeque::new(),
            last_sent: Instant::now(),
        })
    }
}

impl BuildWatch {
    /// Longest delay of a record whose hint was lost.
    const POLL: Duration = Duration::from_secs(1);
    /// Maximum time without a message, after which one without records is sent.
    const HEARTBEAT: Duration = Duration::from_secs(10);
    /// Maximum size of the texts of a message, in bytes, unless it holds a single record.
    const MESSAGE_BYTES: usize = 512 * 1024;

    /// Waits for the next records; `None` once the build is final and all were delivered.
    ///
    /// There are no records in a heartbeat, which comes when nothing has happened for a while.
    ///
    /// # Errors
    ///
    /// Ends the watch. Returns [`Error::TokenExpired`] at the expiry of the token, [`Error::Draining`] at
    /// shutdown, and [`Error::NotFound`] once the caller can no longer see the build or its image.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<Record>>, Error> {
        loop {
            if self.expiry <= Instant::now() {
                return Err(Error::TokenExpired);
            }
            if self.histories.shutdown.is_cancelled() {
                return Err(Error::Draining);
            }
            if !self.pending.is_empty() {
                return Ok(Some(self.take_message()));
            }
            let Excerpt { build, records } = {
                let _turn = self.histories.reads.acquire(&self.caller).await?;
                self.histories.store.excerpt(self.build.id, self.after).await?
            };
            self.histories.index.visible(&self.visibility, build.image, Resource::Build(build.id)).await?;
            let is_over = build.state.is_final() && records.is_empty();
            self.build = build;
            if let Some(last) = records.last() {
                self.after = last.sequence;
                self.pending = records.into();
            } else if is_over {
                return Ok(None);
            } else if self.last_sent.elapsed() >= Self::HEARTBEAT {
                return Ok(Some(self.take_message()));
            } else {
                self.wait().await;
            }
        }
    }

    async fn wait(&mut self) {
        let Some(grew) = &mut self.grew else {
            return;
        };
        tokio::select! {
            () = self.histories.shutdown.cancelled() => {}
            () = tokio::time::sleep_until(self.expiry) => {}
            () = tokio::time::sleep(Self::POLL) => {}
            _ = grew.changed() => {}
        }
    }

    fn take_message(&mut self) -> Vec<Record> {
        self.last_sent = Instant::now();
        let mut bytes = 0;
        let mut records = Vec::new();
        while let Some(record) = self.pending.front() {
            bytes += record.event.text_bytes();
            if !records.is_empty() && bytes > Self::MESSAGE_BYTES {
                break;
            }
            records.extend(self.pending.pop_front());
        }
        records
    }

    /// Returns the build as of the latest read. A record's state alone does not determine the status of the
    /// image.
    pub(crate) fn build(&self) -> &Build {
        &self.build
    }
}

impl Drop for BuildWatch {
    fn drop(&mut self) {
        if let Some(grew) = self.grew.take() {
            self.histories.signals.unsubscribe_history(self.build.id, grew);
        }
    }
}
