//! Connections that rest between requests: hyper's room for a request (two buffers of 8 KiB and more) is
//! there while one is served, and given back when its answer is out.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes};
use hyper::body::{Body as _, Incoming};
use hyper::header::CONNECTION;
use hyper::{Request, Response, Version};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::io::Stream;
use super::respond::Body;

/// What is known of the requests that one of hyper's connections has served.
#[derive(Default)]
pub struct Turn {
    /// Whether there was any
    asked: AtomicBool,
    /// Those without an answer yet
    pending: AtomicUsize,
    /// Whether one of them is none after which everything is as before
    odd: AtomicBool,
}

impl Turn {
    /// A request came.
    pub fn begin(&self, request: &Request<Incoming>) {
        self.asked.store(true, Ordering::SeqCst);
        self.pending.fetch_add(1, Ordering::SeqCst);
        let plain = request.version() == Version::HTTP_11
            && request.body().is_end_stream()
            && !request.headers().contains_key(CONNECTION);
        if !plain {
            self.odd.store(true, Ordering::SeqCst);
        }
    }

    /// Its answer is there; whoever counts running answers counts it by now.
    pub fn answer(&self, response: &Response<Body>) {
        if response.headers().contains_key(CONNECTION) {
            self.odd.store(true, Ordering::SeqCst);
        }
        self.pending.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether all that was asked for is answered, and the connection goes on as if it were new.
    pub fn is_over(&self, running: &AtomicUsize, flushed: &Flushed) -> bool {
        self.asked.load(Ordering::SeqCst)
            && !self.odd.load(Ordering::SeqCst)
            && self.pending.load(Ordering::SeqCst) == 0
            && running.load(Ordering::SeqCst) == 0
            && flushed.is_all()
    }
}

/// Whether all that was written is flushed.
#[derive(Clone)]
pub struct Flushed(Arc<AtomicBool>);

impl Flushed {
    pub fn is_all(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A stream with bytes put back in front, which knows whether it is flushed.
pub struct Resting<S> {
    early: Bytes,
    inner: Box<S>,
    flushed: Flushed,
}

impl<S: Stream> Resting<S> {
    /// `early` was read from `inner`, and comes again.
    pub fn new(early: Bytes, inner: Box<S>) -> Self {
        Self {
            early,
            inner,
            flushed: Flushed(Arc::new(AtomicBool::new(true))),
        }
    }

    pub fn flushed(&self) -> Flushed {
        self.flushed.clone()
    }

    /// What was not read yet, and the stream.
    pub fn into_parts(self) -> (Bytes, Box<S>) {
        (self.early, self.inner)
    }

    fn written<T>(&self, result: T) -> T {
        self.flushed.0.store(false, Ordering::SeqCst);
        result
    }
}

impl<S: Stream> AsyncRead for Resting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let len = self.early.len().min(buf.remaining());
        buf.put_slice(&self.early[..len]);
        self.early.advance(len);
        if self.early.is_empty() && buf.remaining() > 0 {
            // What else is there comes along. That the stream has ended is told with the next read.
            let _ = Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: Stream> AsyncWrite for Resting<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.written(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        if let Poll::Ready(Ok(())) = &result {
            self.flushed.0.store(true, Ordering::SeqCst);
        }
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.written(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.written(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn what_was_read_comes_again_and_what_is_left_of_it_is_given_back() {
        let (mut far, near) = tokio::io::duplex(64);
        far.write_all(b"def").await.unwrap();
        let mut resting = Resting::new(Bytes::from_static(b"abc"), Box::new(near));
        let mut two = [0; 2];
        resting.read_exact(&mut two).await.unwrap();
        let (left, near) = resting.into_parts();
        assert_eq!((&two, &left[..]), (b"ab", &b"c"[..]));
        let mut resting = Resting::new(left, near);
        let mut buffer = [0; 64];
        assert_eq!(resting.read(&mut buffer).await.unwrap(), 4);
        assert_eq!(&buffer[..4], b"cdef");
        drop(far);
        assert_eq!(resting.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn it_is_flushed_when_all_that_was_written_is() {
        let (_far, near) = tokio::io::duplex(64);
        let mut resting = Resting::new(Bytes::new(), Box::new(near));
        let (turn, running, flushed) = (Turn::default(), AtomicUsize::new(0), resting.flushed());
        assert!(!turn.is_over(&running, &flushed), "nothing was asked for");
        turn.asked.store(true, Ordering::SeqCst);
        resting.write_all(b"x").await.unwrap();
        assert!(!turn.is_over(&running, &flushed));
        resting.flush().await.unwrap();
        assert!(turn.is_over(&running, &flushed));
        running.store(1, Ordering::SeqCst);
        assert!(!turn.is_over(&running, &flushed));
    }
}
