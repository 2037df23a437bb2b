//! The body of a response, which belongs to a call and ends with it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use service_runtime::listener::OpenConnection;
use tokio::time::{Instant, Sleep};
use tonic::{Code, Status, body::Body};

use super::{call_layer::Call, status};

/// The body of a response, with its call and deadline.
///
/// It is given to the transport in small parts, after each of which the connection is flushed: the transport keeps
/// what it has, whether or not the client reads, and the call counts for as long as it has the rest.
pub(super) struct CallBody {
    body: Body,
    call: Call,
    late: Option<Pin<Box<Sleep>>>,
    /// Rest of the current message.
    rest: Bytes,
    connection: Option<Arc<OpenConnection>>,
    /// Number of flushes of the connection when the last part was given away.
    flushes: u64,
    /// Number of bytes given away since.
    unflushed: usize,
}

impl CallBody {
    /// Maximum size of a part, in bytes.
    const PART: usize = 32 * 1024;
    /// Size of a response that counts as large, in bytes.
    const LARGE: usize = 256 * 1024;

    pub(super) fn new(
        body: Body,
        call: Call,
        deadline: Option<Instant>,
        connection: Option<Arc<OpenConnection>>,
    ) -> Self {
        let late = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
        Self { body, call, late, rest: Bytes::new(), connection, flushes: 0, unflushed: 0 }
    }

    /// Waits until the system has taken what was given away, if that is much.
    fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.unflushed >= Self::PART
            && let Some(connection) = &self.connection
        {
            ready!(connection.flushes().poll_after(self.flushes, cx));
            self.unflushed = 0;
        }
        Poll::Ready(())
    }

    /// Ends the body with a status.
    fn refuse(&mut self, status: &Status) -> Option<Result<Frame<Bytes>, Status>> {
        self.call.end(Some(status.code()));
        self.body = Body::empty();
        self.rest.clear();
        let mut trailers = HeaderMap::new();
        Some(match status.add_header(&mut trailers) {
            Ok(()) => Ok(Frame::trailers(trailers)),
            Err(status) => Err(status),
        })
    }

    /// Returns the first part of a message, and keeps the rest.
    fn part(&mut self, mut message: Bytes) -> Frame<Bytes> {
        let part = message.split_to(message.len().min(Self::PART));
        self.rest = message;
        if let Some(connection) = &self.connection {
            let flushes = connection.flushes().count();
            if flushes != self.flushes {
                (self.flushes, self.unflushed) = (flushes, 0);
            }
            self.unflushed += part.len();
        }
        Frame::data(part)
    }

    /// Counts a large message of a unary call.
    fn count(&self, message: &Bytes) -> Result<(), Status> {
        match &self.call.slot {
            Some(slot) if message.len() >= Self::LARGE => Ok(slot.send(message.len() as u64)?),
            Some(_) | None => Ok(()),
        }
    }
}

impl http_body::Body for CallBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let is_late = |late: &mut Pin<Box<Sleep>>| late.as_mut().poll(cx).is_ready();
        // Checked first: otherwise a body that always has more data would never time out.
        if this.call.code.is_none() && this.late.as_mut().is_some_and(is_late) {
            this.late = None;
            return Poll::Ready(this.refuse(&status::too_late()));
        }
        ready!(this.poll_flushed(cx));
        if !this.rest.is_empty() {
            let rest = std::mem::take(&mut this.rest);
            return Poll::Ready(Some(Ok(this.part(rest))));
        }
        let polled = this.call.span.in_scope(|| Pin::new(&mut this.body).poll_frame(cx));
        let frame = match polled {
            Poll::Ready(Some(Ok(frame))) => frame,
            Poll::Ready(Some(Err(error))) => {
                this.call.end(Some(error.code()));
                return Poll::Ready(Some(Err(error)));
            }
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Pending => return Poll::Pending,
        };
        if let Some(code) = frame.trailers_ref().and_then(|trailers| trailers.get("grpc-status")) {
            this.call.end(Some(Code::from_bytes(code.as_bytes())));
        }
        Poll::Ready(match frame.into_data() {
            Ok(message) => match this.count(&message) {
                Ok(()) => Some(Ok(this.part(message))),
                Err(refusal) => this.refuse(&refusal),
            },
            Err(trailers) => Some(Ok(trailers)),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (body, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        if let Some(upper) = body.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(body.lower() + rest);
        hint
    }
}
