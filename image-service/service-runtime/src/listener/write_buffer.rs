//! Coalescing of a connection's writes.

use std::{
    io::{self, IoSlice},
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream that writes the frames of many HTTP/2 streams at once if they are ready together.
///
/// The task of a connection runs as soon as one stream has a frame, before the others have theirs: a change
/// that is sent to a hundred watches would cause a hundred writes. Therefore a flush first lets all runnable
/// tasks proceed, and what they have to send goes with it. HTTP/2 passes every frame of more than 256 bytes
/// by itself to a connection with vectored writes; this one reports no vectored writes, so that frames of up
/// to a kilobyte are copied together.
#[derive(Debug)]
pub(super) struct WriteBuffer<T> {
    inner: T,
    /// Bytes that go with the next write.
    held: Vec<u8>,
    /// Set if the task runs once more, and writes what is held then at the latest.
    is_due: bool,
}

impl<T> WriteBuffer<T> {
    /// Maximum number of held bytes.
    const MOST_HELD: usize = 32 * 1024;

    pub(super) fn new(inner: T) -> Self {
        Self { inner, held: Vec::new(), is_due: false }
    }

    /// Reports whether nothing is held.
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

impl<T: AsyncWrite + Unpin> WriteBuffer<T> {
    /// Writes what is held with as much of `more` as goes along; returns the length of that part.
    fn poll_write_held(&mut self, cx: &mut Context<'_>, more: &[u8]) -> Poll<io::Result<usize>> {
        while !self.held.is_empty() {
            let pieces = [IoSlice::new(&self.held), IoSlice::new(more)];
            let written = ready!(Pin::new(&mut self.inner).poll_write_vectored(cx, &pieces))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let held = self.held.len().min(written);
            self.held.drain(..held);
            if self.held.is_empty() {
                // There may be many connections with little to send most of the time, so the memory is freed.
                self.held = Vec::new();
                self.is_due = false;
                return Poll::Ready(Ok(written - held));
            }
        }
        Poll::Ready(Ok(0))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for WriteBuffer<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for WriteBuffer<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        if self.held.len() + buffer.len() <= Self::MOST_HELD {
            self.held.extend_from_slice(buffer);
            return Poll::Ready(Ok(buffer.len()));
        }
        match ready!(self.poll_write_held(cx, buffer))? {
            0 => Pin::new(&mut self.inner).poll_write(cx, buffer),
            written => Poll::Ready(Ok(written)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.held.is_empty() && !mem::replace(&mut self.is_due, true) {
            // Returns ready all the same, because HTTP/2 gives no more frames to a connection whose flush is
            // pending.
            cx.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_write_held(cx, &[]))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_held(cx, &[]))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::RefCell,
        rc::Rc,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Wake,
    };

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// A writer that keeps what is written; it is ready every other time, for a limited number of bytes.
    #[derive(Clone, Debug)]
    struct Slow {
        writes: Rc<RefCell<Vec<Vec<u8>>>>,
        most: usize,
        is_ready: bool,
    }

    impl AsyncWrite for Slow {
        fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(cx, &[IoSlice::new(buffer)])
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffers: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.is_ready = !self.is_ready;
            if !self.is_ready {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let all = buffers.iter().flat_map(|buffer| buffer.iter().copied());
            let all: Vec<u8> = all.take(self.most).collect();
            let written = all.len();
            self.writes.borrow_mut().push(all);
            Poll::Ready(Ok(written))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn slow(most: usize) -> Slow {
        Slow { writes: Rc::default(), most, is_ready: false }
    }

    /// Flushes like a connection, whose task runs once more when it is woken.
    async fn flush(connection: &mut WriteBuffer<Slow>) -> io::Result<()> {
        connection.flush().await?;
        connection.flush().await
    }

    #[tokio::test]
    async fn events_that_are_ready_together_are_one_write() -> io::Result<()> {
        let inner = slow(usize::MAX);
        let mut connection = WriteBuffer::new(inner.clone());
        let mut sent = Vec::new();
        // A small frame, and one in two pieces.
        for (piece, length) in [(1, 450), (2, 1_033), (3, 9_000)] {
            connection.write_all(&vec![piece; length]).await?;
            sent.extend(vec![piece; length]);
        }
        connection.flush().await?;
        assert!(inner.writes.borrow().is_empty(), "others may have more");
        connection.write_all(&[4; 450]).await?;
        sent.extend([4; 450]);
        connection.flush().await?;
        assert_eq!(*inner.writes.borrow(), [sent]);
        Ok(())
    }

    #[test]
    fn a_flush_that_waits_for_others_runs_again() {
        struct WakeCounter(AtomicUsize);
        impl Wake for WakeCounter {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let counter = Arc::new(WakeCounter(0.into()));
        let waker = Arc::clone(&counter).into();
        let mut cx = Context::from_waker(&waker);
        let times = || counter.0.load(Ordering::Relaxed);
        let inner = slow(usize::MAX);
        let mut connection = WriteBuffer::new(Slow { is_ready: true, ..inner.clone() });
        let mut connection = Pin::new(&mut connection);
        let flushed = connection.as_mut().poll_flush(&mut cx);
        assert!(matches!(flushed, Poll::Ready(Ok(()))) && times() == 0, "there is nothing to write");
        assert!(matches!(connection.as_mut().poll_write(&mut cx, b"frame"), Poll::Ready(Ok(5))));
        assert!(matches!(connection.as_mut().poll_flush(&mut cx), Poll::Ready(Ok(()))));
        assert_eq!(times(), 1);
        // The system accepts nothing yet, and wakes the task when it does.
        assert!(connection.as_mut().poll_flush(&mut cx).is_pending());
        assert_eq!(times(), 2);
        while connection.as_mut().poll_flush(&mut cx).is_pending() {}
        assert_eq!(inner.writes.borrow().concat(), b"frame");
    }

    #[tokio::test]
    async fn events_arrive_in_order_whatever_is_taken_at_once() -> io::Result<()> {
        for most in [7, 100, 1_033, 1_034, 5_000] {
            let inner = slow(most);
            let mut connection = WriteBuffer::new(inner.clone());
            let mut sent = Vec::new();
            for (number, length) in (0_u8..).zip([9, 1_033, 4_000, 1, 1, 30_000, 32_768, 32_769, 12]) {
                let piece = vec![number; length];
                connection.write_all(&piece).await?;
                sent.extend(piece);
                if number % 3 == 2 {
                    flush(&mut connection).await?;
                    assert_eq!(inner.writes.borrow().concat(), sent);
                }
            }
            connection.write_all(&[99; 5]).await?;
            sent.extend([99; 5]);
            connection.shutdown().await?;
            assert_eq!(inner.writes.borrow().concat(), sent);
        }
        Ok(())
    }
}
