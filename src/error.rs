//! What can go wrong behind a client's request, and how a client is told.

use std::fmt;
use std::sync::Arc;

use hyper::StatusCode;

/// A failure to answer, with words for the user: what happened, to what, and what to do.
#[derive(Clone, Debug)]
pub struct Error {
    kind: Kind,
    message: Arc<str>,
}

/// The causes that callers tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The client's request is malformed.
    BadRequest,
    /// The request names another host than the connection it came on.
    Misdirected,
    /// Policy forbids it.
    Denied,
    /// A rule of the operator's forbids that version or provider.
    Policy,
    /// Of all that a list names, nothing is left by the operator's rules.
    Withheld,
    /// The proxy's user did not say who they are, or wrongly.
    Unauthenticated,
    /// Whoever asks for a page did not say who they are, or wrongly.
    Unauthorized,
    /// Too many wrong passwords.
    TooManyGuesses,
    /// The address that a name resolved to must not be connected to.
    ProhibitedAddress,
    /// larder does not hold it.
    NotFound,
    /// `--offline`, and it is not held.
    Offline,
    /// A bound on connections or work was reached.
    Busy,
    /// The name did not resolve.
    Dns,
    /// Nobody answered at the address.
    ConnectFailed,
    /// The connection, or the answer's head, took too long.
    Timeout,
    /// The parent proxy wants other credentials, or does not lead there.
    ParentRefused,
    /// The TLS handshake with upstream failed.
    Tls,
    /// The answer ended early, or was no HTTP.
    Incomplete,
    /// The answer is no document of the expected kind.
    Nonsense,
    /// Sources contradict each other about a digest, or bytes contradict the sources.
    Contradiction,
    /// A rule wants a valid signature, and there is none.
    Unsigned,
    /// The fetch would have come back to larder.
    Loop,
    /// A fault of larder or of its disk.
    Internal,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into().into(),
        }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether another try may well succeed.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.kind,
            Kind::Dns | Kind::ConnectFailed | Kind::Timeout | Kind::Tls | Kind::Incomplete
        )
    }
}

impl Kind {
    /// The status that a client sees.
    pub fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            Self::Denied | Self::Policy | Self::ProhibitedAddress => StatusCode::FORBIDDEN,
            // Clients take 403 for missing credentials, and 404 for a wrong name, and say so.
            Self::Withheld => StatusCode::UNAVAILABLE_FOR_LEGAL_REASONS,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Unauthenticated => StatusCode::PROXY_AUTHENTICATION_REQUIRED,
            Self::TooManyGuesses => StatusCode::TOO_MANY_REQUESTS,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::Offline | Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Dns
            | Self::ConnectFailed
            | Self::ParentRefused
            | Self::Tls
            | Self::Incomplete
            | Self::Nonsense
            | Self::Contradiction
            | Self::Unsigned
            | Self::Loop => StatusCode::BAD_GATEWAY,
        }
    }

    /// The error type of RFC 9209 section 2.3 that says it best.
    pub fn token(self) -> &'static str {
        match self {
            Self::BadRequest | Self::Misdirected | Self::NotFound => "http_request_error",
            Self::Denied
            | Self::Policy
            | Self::Withheld
            | Self::Unauthenticated
            | Self::Unauthorized
            | Self::TooManyGuesses => "http_request_denied",
            Self::ProhibitedAddress => "destination_ip_prohibited",
            Self::Offline => "destination_unavailable",
            Self::Busy => "connection_limit_reached",
            Self::Dns => "dns_error",
            Self::ConnectFailed => "connection_refused",
            Self::ParentRefused => "proxy_configuration_error",
            Self::Timeout => "connection_timeout",
            Self::Tls => "tls_protocol_error",
            Self::Incomplete => "http_response_incomplete",
            Self::Nonsense | Self::Contradiction | Self::Unsigned => "http_protocol_error",
            Self::Loop => "proxy_loop_detected",
            Self::Internal => "proxy_internal_error",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// A command that cannot go on: the words for stderr and the exit code.
#[derive(Debug)]
pub struct Exit {
    pub code: u8,
    pub message: String,
}

impl Exit {
    /// The thing asked for failed or was found bad.
    pub fn failed(message: impl Into<String>) -> Self {
        Self {
            code: 1,
            message: message.into(),
        }
    }

    /// Wrong usage or configuration.
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            code: 2,
            message: message.into(),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Exit {}
