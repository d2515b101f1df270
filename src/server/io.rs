//! Streams with bytes put back in front, and with patience for a stalled reader that ends.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// A client that takes nothing for so long is gone.
const STALL: Duration = Duration::from_secs(300);

/// Any stream of bytes.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A stream whose beginning was looked at, and which knows whether it is flushed.
pub struct Peeked<S> {
    /// Read, and to be read again
    early: Bytes,
    inner: S,
    flushed: Flushed,
    /// What was read since it is recorded
    record: Option<Vec<u8>>,
}

/// Whether all that was written is flushed.
#[derive(Clone)]
pub struct Flushed(Arc<AtomicBool>);

impl Flushed {
    pub fn is_all(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl<S: Stream> Peeked<S> {
    /// `early` was read from `inner`, and comes again.
    pub fn back(early: Bytes, inner: S) -> Self {
        Self {
            early,
            inner,
            flushed: Flushed(Arc::new(AtomicBool::new(true))),
            record: None,
        }
    }

    /// Waits for the first byte; none where the stream ends instead.
    pub async fn new(mut inner: S) -> io::Result<Option<Self>> {
        let mut byte = [0];
        Ok(match inner.read(&mut byte).await? {
            0 => None,
            _ => Some(Self::back(Bytes::copy_from_slice(&byte), inner)),
        })
    }

    pub fn flushed(&self) -> Flushed {
        self.flushed.clone()
    }

    /// What is still to be read again, and the stream.
    pub fn into_parts(self) -> (Bytes, S) {
        (self.early, self.inner)
    }

    /// Remembers what is read from here on.
    pub fn record(&mut self) {
        self.record = Some(Vec::new());
    }

    /// What was read since it is recorded; nothing more is remembered.
    pub fn recorded(&mut self) -> Vec<u8> {
        self.record.take().unwrap_or_default()
    }

    /// Whether a TLS handshake record begins (RFC 8446 section 5.1).
    pub fn is_tls(&self) -> bool {
        self.early.first() == Some(&22)
    }
}

impl<S: Stream> AsyncRead for Peeked<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let len = self.early.len().min(buf.remaining());
        buf.put_slice(&self.early.split_to(len));
        let mut result = Poll::Ready(Ok(()));
        if self.early.is_empty() && buf.remaining() > 0 {
            result = Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        // What else is there comes with what was looked at: a reader that got that alone would make
        // room for a second time. That the stream has ended is told with the next read.
        if len > 0 {
            result = Poll::Ready(Ok(()));
        }
        if let Some(record) = &mut self.record {
            record.extend_from_slice(&buf.filled()[before..]);
        }
        result
    }
}

impl<S: Stream> AsyncWrite for Peeked<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.flushed.0.store(false, Ordering::SeqCst);
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        if let Poll::Ready(Ok(())) = &result {
            self.flushed.0.store(true, Ordering::SeqCst);
        }
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.flushed.0.store(false, Ordering::SeqCst);
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.flushed.0.store(false, Ordering::SeqCst);
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

/// A stream whose writes fail when the peer takes nothing for too long.
pub struct Patient<S> {
    inner: S,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S: Stream> Patient<S> {
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            stalled: None,
        }
    }

    fn judge<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stalled = None;
            return result;
        }
        let timer = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + STALL)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: Stream> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: Stream> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.judge(cx, result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        self.judge(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.judge(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn the_byte_that_was_looked_at_is_read_again() {
        let (mut far, near) = tokio::io::duplex(64);
        far.write_all(b"\x16abc").await.unwrap();
        drop(far);
        let mut peeked = Peeked::new(near).await.unwrap().unwrap();
        assert!(peeked.is_tls());
        peeked.record();
        let mut all = vec![0; 3];
        peeked.read_exact(&mut all).await.unwrap();
        assert_eq!(peeked.recorded(), b"\x16ab");
        peeked.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"\x16abc");
        assert_eq!(peeked.recorded(), b"");
    }

    #[tokio::test]
    async fn what_was_read_comes_again_and_what_is_left_of_it_is_given_back() {
        let (mut far, near) = tokio::io::duplex(64);
        far.write_all(b"def").await.unwrap();
        let mut peeked = Peeked::back(Bytes::from_static(b"abc"), near);
        let mut two = [0; 2];
        peeked.read_exact(&mut two).await.unwrap();
        let (left, near) = peeked.into_parts();
        assert_eq!((&two, &left[..]), (b"ab", &b"c"[..]));
        let mut peeked = Peeked::back(left, near);
        let mut buffer = [0; 64];
        assert_eq!(peeked.read(&mut buffer).await.unwrap(), 4);
        assert_eq!(&buffer[..4], b"cdef");
        drop(far);
        assert_eq!(peeked.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn it_is_flushed_when_all_that_was_written_is() {
        let (_far, near) = tokio::io::duplex(64);
        let mut peeked = Peeked::back(Bytes::new(), near);
        let flushed = peeked.flushed();
        assert!(flushed.is_all());
        peeked.write_all(b"x").await.unwrap();
        assert!(!flushed.is_all());
        peeked.flush().await.unwrap();
        assert!(flushed.is_all());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_is_given_up() {
        let (_far, near) = tokio::io::duplex(4);
        let mut patient = Patient::new(near);
        let error = patient.write_all(b"more than fits").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
