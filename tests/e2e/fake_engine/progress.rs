//! Progress of one build, on its way from the script to Status streams.

use std::collections::VecDeque;
use std::fmt;

use bollard::moby::buildkit::v1::StatusResponse;
use futures_util::stream::{self, Stream};
use tokio::sync::watch;
use tonic::Status;

/// Maximum number of messages that wait for a reader.
///
/// It is small, so that a script cannot run far ahead of its client.
const AHEAD: usize = 16;

/// Maximum number of messages kept for the first reader. Later ones are dropped.
const BACKLOG: usize = 256;

/// A bounded queue of progress messages. Clones are the same queue.
///
/// A script waits while the queue is full and has a reader. Without a reader, the oldest messages
/// are kept and later ones dropped. Several readers share the messages.
#[derive(Clone)]
pub(super) struct Progress {
    queue: watch::Sender<Queue>,
}

#[derive(Default)]
struct Queue {
    messages: VecDeque<StatusResponse>,
    readers: usize,
    ended: bool,
}

impl Progress {
    pub(super) fn new() -> Progress {
        Progress { queue: watch::Sender::new(Queue::default()) }
    }

    /// Adds a message, waiting for room if there is a reader.
    pub(super) async fn publish(&self, message: StatusResponse) {
        self.wait_for(|queue| queue.readers == 0 || queue.messages.len() < AHEAD).await;
        self.queue.send_modify(|queue| {
            if queue.readers > 0 || queue.messages.len() < BACKLOG {
                queue.messages.push_back(message);
            }
        });
    }

    /// Waits until the readers have taken every message, or there is no reader.
    pub(super) async fn drained(&self) {
        self.wait_for(|queue| queue.readers == 0 || queue.messages.is_empty()).await;
    }

    /// Marks the queue as complete.
    pub(super) fn end(&self) {
        self.queue.send_modify(|queue| queue.ended = true);
    }

    /// Returns whether the queue is complete.
    pub(super) fn has_ended(&self) -> bool {
        self.queue.borrow().ended
    }

    /// Returns a reader, which is counted until it is dropped.
    pub(super) fn reader(&self) -> Reader {
        self.queue.send_modify(|queue| queue.readers += 1);
        Reader(self.clone())
    }

    async fn wait_for(&self, condition: impl FnMut(&Queue) -> bool) {
        let mut changes = self.queue.subscribe();
        let held = changes.wait_for(condition).await;
        held.expect("the queue outlives the wait, for it holds the sender");
    }
}

impl fmt::Debug for Progress {
    /// Omits the messages, so that a failed wait stays readable.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queue = self.queue.borrow();
        write!(f, "{} messages, {} readers, ended={}", queue.messages.len(), queue.readers, queue.ended)
    }
}

/// A reader of the queue.
pub(super) struct Reader(Progress);

impl Reader {
    /// Returns the messages as a stream that ends with the build.
    pub(super) fn into_stream(self) -> impl Stream<Item = Result<StatusResponse, Status>> + Send + 'static {
        stream::unfold(self, |reader| async {
            let message = reader.next().await?;
            Some((Ok(message), reader))
        })
    }

    async fn next(&self) -> Option<StatusResponse> {
        loop {
            self.0.wait_for(|queue| queue.ended || !queue.messages.is_empty()).await;
            let (mut message, mut ended) = (None, false);
            self.0.queue.send_modify(|queue| {
                message = queue.messages.pop_front();
                ended = queue.ended;
            });
            if message.is_some() || ended {
                return message;
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.queue.send_modify(|queue| queue.readers -= 1);
    }
}
