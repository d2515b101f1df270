//! What several files check, and a server that needs no upstream.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use super::{Got, Larder, PATIENCE, Setup};

/// Returns what it said.
#[track_caller]
pub fn assert_refuses_to_start(mut command: Command, code: i32, words: &[&str]) -> String {
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let started = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if started.elapsed() > PATIENCE => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{command:?} starts");
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let mut said = String::new();
    child.stderr.unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(status.code(), Some(code), "{words:?}: {said}");
    for word in words {
        assert!(said.contains(word), "no {word:?} in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// A refusal of CONNECT says in its reason phrase what its JSON says: Go shows nothing else.
#[track_caller]
pub fn assert_words(refusal: &Got, status: u16) {
    let words = refusal.assert_refused(status);
    assert_eq!(refusal.reason, words);
}

pub async fn assert_alive(larder: &Larder) {
    assert_eq!(larder.client().page("/healthz").await.status, 200);
}

/// A TCP server that says everything back.
pub struct Echo {
    pub port: u16,
    connections: Arc<AtomicUsize>,
}

impl Echo {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let (mut read, mut write) = tcp.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        Self { port, connections }
    }

    /// A larder that finds the echo under a name, on every port.
    pub fn setup(&self) -> Setup {
        let target = format!("echo.example::127.0.0.1:{}", self.port);
        Setup::without_upstream().args(["--connect-to", &target])
    }

    pub fn name(&self, port: u16) -> String {
        format!("echo.example:{port}")
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}
