//! Blind tunnels: bytes to and fro, bounded in number, idleness and time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, timeout};

use crate::config::Limits;

const BUFFER: usize = 16 << 10;

/// Copies until both sides are done, or a bound is reached. Returns the bytes that went to the
/// client.
pub async fn run(client: impl Stream, server: impl Stream, limits: &Limits) -> u64 {
    let bytes = Arc::new(AtomicU64::new(0));
    let moved = Activity::new(limits.tunnel_idle);
    let (client_read, client_write) = tokio::io::split(client);
    let (server_read, server_write) = tokio::io::split(server);
    let up = pump(client_read, server_write, &moved, None);
    let down = pump(server_read, client_write, &moved, Some(&bytes));
    let both = async { tokio::try_join!(up, down) };
    match timeout(limits.tunnel_lifetime, both).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "tunnel ended"),
        Err(_) => tracing::info!("tunnel ended: it was open for as long as tunnels may be"),
    }
    bytes.load(Ordering::Relaxed)
}

pub trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// When a byte last moved, in whichever direction.
struct Activity {
    start: Instant,
    last: AtomicU64,
    idle: Duration,
}

impl Activity {
    fn new(idle: Duration) -> Self {
        Self {
            idle,
            start: Instant::now(),
            last: AtomicU64::new(0),
        }
    }

    fn note(&self) {
        let now = self.start.elapsed().as_millis() as u64;
        self.last.store(now, Ordering::Relaxed);
    }

    /// How long a wait may yet be.
    fn patience(&self) -> Duration {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        (last + self.idle).saturating_sub(self.start.elapsed())
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    moved: &Activity,
    count: Option<&AtomicU64>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = match timeout(moved.patience(), from.read(&mut buffer)).await {
            Ok(n) => n?,
            // The other direction may have moved meanwhile.
            Err(_) if !moved.patience().is_zero() => continue,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        };
        if n == 0 {
            return to.shutdown().await;
        }
        moved.note();
        let passed_on = async {
            to.write_all(&buffer[..n]).await?;
            // A client that reached the proxy over TLS has a buffer in between.
            to.flush().await
        };
        timeout(moved.idle, passed_on).await??;
        if let Some(count) = count {
            count.fetch_add(n as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_side_may_finish_first() {
        let (mut client, near) = tokio::io::duplex(64);
        let (far, mut server) = tokio::io::duplex(64);
        let tunnel = tokio::spawn(async move { run(near, far, &Limits::default()).await });
        client.write_all(b"ask").await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"ask");
        server.write_all(b"answer").await.unwrap();
        drop(server);
        got.clear();
        client.read_to_end(&mut got).await.unwrap();
        assert_eq!((&got[..], tunnel.await.unwrap()), (&b"answer"[..], 6));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_tunnel_ends_and_a_one_way_one_goes_on() {
        let (_client, near) = tokio::io::duplex(64);
        let (far, mut server) = tokio::io::duplex(64);
        let start = Instant::now();
        let tunnel = tokio::spawn(async move { run(near, far, &Limits::default()).await });
        let idle = Limits::default().tunnel_idle;
        tokio::time::sleep(idle / 2).await;
        server.write_all(b"x").await.unwrap();
        tunnel.await.unwrap();
        let lived = start.elapsed();
        assert!(lived >= idle * 3 / 2 && lived < idle * 2, "{lived:?}");
    }
}
