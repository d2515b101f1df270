//! A stream whose reads are as large as the reader's room: rustls gives out a record (16 KiB) at a time,
//! and each read of hyper's becomes a frame that passes from task to task.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub struct Gathered<S> {
    inner: S,
    /// What went wrong behind bytes that were read
    failed: Option<io::Error>,
}

impl<S> Gathered<S> {
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            failed: None,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        let before = buf.filled().len();
        while buf.remaining() > 0 {
            let at = buf.filled().len();
            let read = Pin::new(&mut self.inner).poll_read(cx, buf);
            let some = buf.filled().len() > before;
            match read {
                Poll::Pending if some => break,
                Poll::Ready(Err(error)) if some => {
                    self.failed = Some(error);
                    break;
                }
                Poll::Ready(Ok(())) if buf.filled().len() > at => {}
                // The end, a failure or nothing yet, with nothing before it; or the end behind bytes,
                // which comes again.
                other => return other,
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
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

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::VecDeque;

    use tokio::io::AsyncReadExt as _;

    use super::*;

    /// Reads that come one by one; in the end nothing.
    struct Script(VecDeque<Poll<io::Result<&'static [u8]>>>);

    impl AsyncRead for Script {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            match self.0.pop_front() {
                None => Poll::Ready(Ok(())),
                Some(Poll::Pending) => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                Some(Poll::Ready(Ok(bytes))) => {
                    let (now, later) = bytes.split_at(bytes.len().min(buf.remaining()));
                    buf.put_slice(now);
                    if !later.is_empty() {
                        self.0.push_front(Poll::Ready(Ok(later)));
                    }
                    Poll::Ready(Ok(()))
                }
                Some(Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
            }
        }
    }

    #[tokio::test]
    async fn a_read_takes_what_is_there_and_tells_afterwards_how_it_ended() {
        let some = |bytes: &'static [u8]| Poll::Ready(Ok(bytes));
        let reset = || Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        for failed in [false, true] {
            let mut script = vec![some(b"abc"), some(b"defgh"), Poll::Pending, some(b"i")];
            script.extend(failed.then(reset));
            let mut stream = Gathered::new(Script(script.into()));
            let mut room = [0; 6];
            let mut said = Vec::new();
            let end = loop {
                match stream.read(&mut room).await {
                    Ok(0) => break None,
                    Ok(n) => said.push(room[..n].to_vec()),
                    Err(error) => break Some(error.kind()),
                }
            };
            assert_eq!(said, [&b"abcdef"[..], b"gh", b"i"]);
            assert_eq!(end, failed.then_some(io::ErrorKind::ConnectionReset));
        }
    }
}
