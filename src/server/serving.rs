//! HTTP/1.1 on a connection: until it ends, or (on intercepted ones) a turn at a time.
//!
//! Between turns a connection rests: hyper's room for a request, two buffers of 8 KiB and more, is made
//! with the first byte of one and given back when its answer is out.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio::time::timeout;

use super::access::Standing;
use super::connection::{LAST_WORDS, Peer, Role, Served};
use super::io::{Flushed, Peeked, Stream};
use super::respond::Body;
use super::{origin, proxy};
use crate::config::Limits;

/// An idle connection is told of draining for so long, then dropped.
const FAREWELL: Duration = Duration::from_millis(200);

/// HTTP/1.1 over TLS until the peer or draining ends it. What a request needs is made when one comes,
/// and for an intercepted host given back when it is answered.
pub fn serve_when_asked(peer: Peer, stream: Box<impl Stream>, role: Role) -> Served {
    Box::pin(async move {
        let served = Arc::new(AtomicU64::new(0));
        let (mut stream, mut early) = (stream, Bytes::new());
        loop {
            if early.is_empty() {
                early = match first_byte(&peer, &mut stream).await {
                    Some(first) => Bytes::copy_from_slice(&[first]),
                    None => return,
                };
            }
            let turn = Peeked::back(early, stream);
            if !matches!(role, Role::Origin(_)) {
                return serve(peer, turn, role).await;
            }
            let limits = &peer.entrance.server.config.limits;
            let (whose, as_what, served) = (peer.clone(), role.clone(), served.clone());
            let most = limits.requests_per_connection;
            let asked = move |request| {
                let last = served.fetch_add(1, Ordering::Relaxed) + 1 >= most;
                answer(whose.clone(), as_what.clone(), request, last)
            };
            let draining = peer.entrance.server.shared.draining.subscribe();
            let turn = serve_turn(turn, limits, &peer.running, draining, asked);
            let Some(rest) = Box::pin(turn).await else {
                return;
            };
            (early, stream) = rest;
        }
    })
}

/// HTTP/1.1 until the peer or draining ends it.
pub fn serve(peer: Peer, stream: impl Stream, role: Role) -> Served {
    let mut draining = peer.entrance.server.shared.draining.subscribe();
    let running = peer.running.clone();
    let mut limits = peer.entrance.server.config.limits.clone();
    if matches!(role, Role::Stranger) {
        limits.idle = LAST_WORDS;
    }
    let served = Arc::new(AtomicU64::new(0));
    let service = service_fn(move |request: Request<Incoming>| {
        let last = served.fetch_add(1, Ordering::Relaxed) + 1 >= limits.requests_per_connection;
        answer(peer.clone(), role.clone(), request, last)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle)
        .max_buf_size(limits.header_bytes)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = Box::pin(connection);
    Box::pin(async move {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            _ = draining.wait_for(|on| *on) => connection.as_mut().graceful_shutdown(),
        }
        if running.load(Ordering::SeqCst) == 0 {
            let _ = timeout(FAREWELL, connection).await;
        } else {
            let _ = connection.await;
        }
    })
}

/// Waits for what a request begins with; none where the connection is over.
async fn first_byte(peer: &Peer, stream: &mut Box<impl Stream>) -> Option<u8> {
    let mut draining = peer.entrance.server.shared.draining.subscribe();
    let patience = peer.entrance.server.config.limits.idle;
    let mut first = [0];
    let read = tokio::select! {
        read = timeout(patience, stream.read(&mut first)) => read,
        _ = draining.wait_for(|on| *on) => Ok(Ok(0)),
    };
    match read {
        Ok(Ok(1)) => return Some(first[0]),
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "connection ended"),
        Err(_) => tracing::debug!(peer = %peer.addr, "nothing was asked for; closed"),
    }
    let _ = timeout(FAREWELL, stream.shutdown()).await;
    None
}

/// Serves what is asked for, until everything is answered: then what was read beyond it, and the stream.
/// None where the connection has ended.
async fn serve_turn<S: Stream>(
    stream: Peeked<Box<S>>,
    limits: &Limits,
    running: &AtomicUsize,
    mut draining: watch::Receiver<bool>,
    answer: impl Fn(Request<Incoming>) -> Answering,
) -> Option<(Bytes, Box<S>)> {
    let (turn, flushed) = (Arc::new(Turn::default()), stream.flushed());
    let service = service_fn({
        let turn = turn.clone();
        move |request: Request<Incoming>| {
            turn.begin(&request);
            let (answering, turn) = (answer(request), turn.clone());
            Box::pin(async move {
                let response = answering.await?;
                turn.answer(&response);
                Ok::<_, Infallible>(response)
            })
        }
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle)
        .max_buf_size(limits.header_bytes)
        .serve_connection(TokioIo::new(stream), service);
    // As a future, hyper flushes and shuts down what has ended before it says so.
    let until_over = poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
        Poll::Pending if turn.is_over(running, &flushed) => Poll::Ready(Ok(true)),
        polled => polled.map_ok(|()| false),
    });
    let mut ended = tokio::select! {
        ended = until_over => Some(ended),
        _ = draining.wait_for(|on| *on) => None,
    };
    if ended.is_none() {
        Pin::new(&mut connection).graceful_shutdown();
        let idle = running.load(Ordering::SeqCst) == 0 && flushed.is_all();
        let end = async { (&mut connection).await.map(|()| false) };
        ended = match idle {
            true => timeout(FAREWELL, end).await.ok(),
            false => Some(end.await),
        };
    }
    match ended? {
        Ok(true) => {
            let parts = connection.into_parts();
            let (mut early, stream) = parts.io.into_inner().into_parts();
            if !parts.read_buf.is_empty() {
                early = [parts.read_buf, early].concat().into();
            }
            return Some((early, stream));
        }
        Ok(false) => {}
        Err(error) => tracing::debug!(%error, "connection ended"),
    }
    None
}

/// What is known of the requests that one of hyper's connections has served.
#[derive(Default)]
struct Turn {
    /// Whether there was any
    asked: AtomicBool,
    /// Those without an answer yet
    pending: AtomicUsize,
    /// Whether one of them is none after which everything is as before
    odd: AtomicBool,
}

impl Turn {
    /// A request came.
    fn begin(&self, request: &Request<Incoming>) {
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
    fn answer(&self, response: &Response<Body>) {
        if response.headers().contains_key(CONNECTION) {
            self.odd.store(true, Ordering::SeqCst);
        }
        self.pending.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether all that was asked for is answered, and the connection goes on as if it were new.
    fn is_over(&self, running: &AtomicUsize, flushed: &Flushed) -> bool {
        self.asked.load(Ordering::SeqCst)
            && !self.odd.load(Ordering::SeqCst)
            && self.pending.load(Ordering::SeqCst) == 0
            && running.load(Ordering::SeqCst) == 0
            && flushed.is_all()
    }
}

/// An answer on its way. Boxed: hyper has room for it as long as the connection lasts, idle or not.
type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

fn answer(mut peer: Peer, role: Role, request: Request<Incoming>, last: bool) -> Answering {
    // By the rules of now: a connection may be older than they are.
    peer.entrance.server = peer.entrance.server.latest();
    peer.standing = peer.entrance.server.access.standing(peer.addr.ip());
    Box::pin(async move {
        let mut response = dispatch(peer, role, request).await;
        if last {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        Ok(response)
    })
}

async fn dispatch(peer: Peer, role: Role, request: Request<Incoming>) -> Response<Body> {
    let limit = peer.entrance.server.config.limits.header_bytes;
    if let Some(refused) = proxy::too_large(&peer, &request, limit) {
        return refused;
    }
    match role {
        _ if peer.standing == Standing::Stranger => proxy::turn_away(&peer, &request),
        // Since it began, users have come to be asked for.
        Role::Origin(_) if !peer.identified && !peer.entrance.server.access.is_open() => {
            proxy::ask_anew(&peer, &request)
        }
        Role::Front => proxy::answer(peer, request, true).await,
        Role::Pages => proxy::answer(peer, request, false).await,
        Role::Origin(authority) => origin::answer(peer, authority, request).await,
        Role::Stranger => proxy::turn_away(&peer, &request),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;
    use crate::server::respond::full;

    /// What is left of a turn, and what the client got of an answer of 100,000 bytes, when the kernel
    /// takes 100 at a time.
    async fn slowly(head: &'static str) -> (Option<(Bytes, Box<DuplexStream>)>, Vec<u8>) {
        let (mut client, server) = tokio::io::duplex(100);
        let (running, limits) = (AtomicUsize::new(0), Limits::default());
        let (_draining, drained) = watch::channel(false);
        let stream = Peeked::back(Bytes::new(), Box::new(server));
        let turn = serve_turn(stream, &limits, &running, drained, |_| {
            Box::pin(async { Ok(Response::new(full(vec![b'~'; 100_000]))) })
        });
        let reading = timeout(Duration::from_secs(10), async {
            client.write_all(head.as_bytes()).await.unwrap();
            let mut said = Vec::new();
            while said.iter().filter(|byte| **byte == b'~').count() < 100_000 {
                if client.read_buf(&mut said).await.unwrap() == 0 {
                    break;
                }
            }
            said
        });
        let (rest, said) = tokio::join!(turn, reading);
        (rest, said.expect("an answer to its end"))
    }

    #[tokio::test]
    async fn an_answer_is_out_before_its_turn_is_over() {
        for (more, goes_on) in [
            ("", true),
            ("Connection: close\r\n", false),
            // A body that never comes: hyper has nothing left to read when it has the end to send.
            ("Content-Length: 1000\r\n", false),
            ("Content-Length: 1000\r\nConnection: close\r\n", false),
        ] {
            let head = format!("GET / HTTP/1.1\r\nHost: example\r\n{more}\r\n");
            let (rest, said) = slowly(head.leak()).await;
            assert!(said.starts_with(b"HTTP/1.1 200 OK\r\n"), "{more:?}");
            let got = said.iter().filter(|byte| **byte == b'~').count();
            assert_eq!((got, rest.is_some()), (100_000, goes_on), "{more:?}");
        }
    }
}
