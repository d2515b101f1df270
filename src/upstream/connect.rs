//! A connection for the pool: dialled, and for `https` with the handshake done.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::BufReader;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::dial::{Dialer, Dialled};
use super::{Locals, authority, shown};
use crate::error::{Error, Kind};

const TLS_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of TLS records received at once
const RECEIVED: usize = 256 << 10;

/// Dials and, for `https`, shakes hands.
#[derive(Clone)]
pub struct Connector {
    pub dialer: Arc<Dialer>,
    pub tls: TlsConnector,
    pub locals: Arc<Locals>,
}

impl Connector {
    async fn connect(self, uri: Uri) -> Result<Io, Error> {
        let bad = || Error::new(Kind::BadRequest, format!("{}: not a host", shown(&uri)));
        let https = uri.scheme_str() == Some("https");
        let asked = authority(&uri).ok_or_else(bad)?;
        if let Some(local) = self.locals.get(&asked).filter(|_| https) {
            return Ok(Io(TokioIo::new(Box::new(local.open()))));
        }
        // Plain HTTP is what is passed on for clients, as tunnels are.
        let stream = match https {
            true => self.dialer.dial_origin(&asked).await?,
            false => self.dialer.dial(&asked).await?,
        };
        if !https {
            return Ok(Io(TokioIo::new(stream)));
        }
        let way = self.dialer.by_way_of(&asked);
        let name = ServerName::try_from(asked.host.as_str().to_owned()).map_err(|_| bad())?;
        // rustls asks for a record at a time or less; the kernel is asked for several.
        let stream = BufReader::with_capacity(RECEIVED, stream);
        let tls = timeout(TLS_TIMEOUT, self.tls.connect(name, stream))
            .await
            .map_err(|_| {
                Error::new(
                    Kind::Timeout,
                    format!("{asked}: the TLS handshake{way} took over {} s; try again later", TLS_TIMEOUT.as_secs()),
                )
            })?
            .map_err(|e| {
                Error::new(
                    Kind::Tls,
                    format!("{asked}: the TLS handshake{way} failed: {e}; if upstream's CA is your own, name it with --upstream-ca"),
                )
            })?;
        Ok(Io(TokioIo::new(Box::new(tls))))
    }
}

impl tower_service::Service<Uri> for Connector {
    type Response = Io;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Io, Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect(uri))
    }
}

/// A connection of the pool.
pub struct Io(TokioIo<Dialled>);

impl Connection for Io {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for Io {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
