//! Streams with a byte put back in front, and with patience for a stalled reader that ends.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// A client that takes nothing for so long is gone.
const STALL: Duration = Duration::from_secs(300);

/// Any stream of bytes.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A stream whose first byte was looked at.
pub struct Peeked<S> {
    first: Option<u8>,
    inner: S,
    /// What was read since it is recorded
    record: Option<Vec<u8>>,
}

impl<S: Stream> Peeked<S> {
    /// Waits for the first byte; none where the stream ends instead.
    pub async fn new(mut inner: S) -> io::Result<Option<Self>> {
        let mut byte = [0];
        Ok(match inner.read(&mut byte).await? {
            0 => None,
            _ => Some(Self {
                first: Some(byte[0]),
                inner,
                record: None,
            }),
        })
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
        self.first == Some(22)
    }
}

impl<S: Stream> AsyncRead for Peeked<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let first = self.first.take_if(|_| buf.remaining() > 0);
        if let Some(first) = first {
            buf.put_slice(&[first]);
        }
        let mut result = Poll::Ready(Ok(()));
        if buf.remaining() > 0 || first.is_none() {
            result = Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        // What else is there comes with the first byte: a reader that got one alone would make room
        // for a second time. That the stream has ended is told with the next read.
        if first.is_some() {
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
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
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

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_is_given_up() {
        let (_far, near) = tokio::io::duplex(4);
        let mut patient = Patient::new(near);
        let error = patient.write_all(b"more than fits").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
