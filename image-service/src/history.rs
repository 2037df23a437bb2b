//! Watching one build: its history from the store, by cursor, for as long as it grows.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    access::{Principal, Sight},
    build::{Build, BuildId, Excerpt, Happening, Record},
    error::{Error, Resource},
    feed::deadline,
    index::Index,
    signals::Signals,
    store::Store,
};

/// Where watches of builds begin.
#[derive(Clone, Debug)]
pub(crate) struct Histories {
    store: Store,
    index: Index,
    signals: Arc<Signals>,
    shutdown: CancellationToken,
}

/// A caller's place in the history of a build.
#[derive(Debug)]
pub(crate) struct BuildWatch {
    histories: Histories,
    /// Marked when the history grows; taken only when the watch ends.
    grew: Option<watch::Receiver<()>>,
    sight: Sight,
    expiry: Instant,
    build: Build,
    /// Every record up to this one has been delivered or is in `pending`.
    after: i64,
    pending: VecDeque<Record>,
}

impl Histories {
    pub(crate) fn new(
        store: Store,
        index: Index,
        signals: Arc<Signals>,
        shutdown: CancellationToken,
    ) -> Self {
        Self { store, index, signals, shutdown }
    }

    /// Begins a watch of a build after the record numbered `after`.
    pub(crate) async fn watch(
        &self,
        caller: &Principal,
        id: BuildId,
        after: i64,
    ) -> Result<BuildWatch, Error> {
        let sight = caller.sight();
        // Look before subscribing, so that nobody can subscribe to what does not exist.
        let build = self.store.build(id).await?.build;
        self.index.visible(&sight, build.image, Resource::Build).await?;
        if after > build.last_sequence {
            return Err(Error::SequenceUnavailable { asked: after, last: build.last_sequence });
        }
        Ok(BuildWatch {
            histories: self.clone(),
            grew: Some(self.signals.subscribe_history(id)),
            sight,
            expiry: deadline(caller),
            build,
            after,
            pending: VecDeque::new(),
        })
    }
}

impl BuildWatch {
    /// How long a lost hint can delay a record.
    const POLL: Duration = Duration::from_secs(1);
    /// A message holds at least one record, and no more once its texts exceed this.
    const MESSAGE_BYTES: usize = 512 * 1024;

    /// Waits for the next records; `None` when the build is final and everything has been delivered. After an error the
    /// watch is over.
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
            let Excerpt { build, records } = self.histories.store.excerpt(self.build.id, self.after).await?;
            self.histories.index.visible(&self.sight, build.image, Resource::Build).await?;
            let is_over = build.state.is_final() && records.is_empty();
            self.build = build;
            if let Some(last) = records.last() {
                self.after = last.sequence;
                self.pending = records.into();
            } else if is_over {
                return Ok(None);
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
        let mut bytes = 0;
        let mut records = Vec::new();
        while let Some(record) = self.pending.front() {
            bytes += text_bytes(&record.happening);
            if !records.is_empty() && bytes > Self::MESSAGE_BYTES {
                break;
            }
            records.extend(self.pending.pop_front());
        }
        records
    }

    /// What the build does; a state alone does not say which status its image has.
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

fn text_bytes(happening: &Happening) -> usize {
    const FIXED: usize = 32;
    FIXED
        + match happening {
            Happening::State { message, .. } | Happening::Gap { message, .. } => message.len(),
            Happening::Step { name, error, .. } => name.len() + error.len(),
            Happening::Line { text, .. } => text.len(),
        }
}
