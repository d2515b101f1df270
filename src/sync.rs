//! Locks and threads whose holder may have panicked.

use std::future::Future;
use std::panic::resume_unwind;
use std::sync::{Mutex, MutexGuard};

use tokio::task::{JoinError, spawn_blocking};

/// Also where somebody panicked meanwhile: for what is changed in steps that do not panic.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Does `work` on a thread that may wait, begun when this is polled; a panic goes on here.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    joined(spawn_blocking(work)).await
}

/// What a task came to that nobody aborts; a panic goes on here.
pub async fn joined<T>(task: impl Future<Output = Result<T, JoinError>>) -> T {
    match task.await {
        Ok(result) => result,
        Err(e) => resume_unwind(e.into_panic()),
    }
}
