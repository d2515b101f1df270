//! What is bounded, and by how much where the config file does not say.

use std::time::Duration;

/// Bounds on what clients and upstreams can make larder hold. Bytes and seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Client connections at once; further ones wait to be accepted
    pub connections: usize,
    /// Of them, from one address (an IPv6 /64 counts as one); further ones are closed
    pub connections_per_address: usize,
    /// Requests on one connection; then it is closed
    pub requests_per_connection: u64,
    /// Of a request's head
    pub header_bytes: usize,
    /// Of a document that is held; a larger one is passed through, unkept
    pub metadata_bytes: usize,
    /// Of an archive that is kept; a larger one is passed through, verified, unkept
    pub archive_bytes: u64,
    /// Archives fetched at once for the store; further ones are passed through, verified, unkept
    pub fills: usize,
    /// For the first byte of a connection and for a TLS handshake
    pub handshake: Duration,
    /// For a request's head, and between requests
    pub idle: Duration,
    /// Tunnels at once; further ones are refused
    pub tunnels: usize,
    /// Without a byte in either direction of a tunnel
    pub tunnel_idle: Duration,
    /// Of a tunnel in all
    pub tunnel_lifetime: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8192,
            connections_per_address: 2048,
            requests_per_connection: 10_000,
            header_bytes: 64 << 10,
            metadata_bytes: 16 << 20,
            archive_bytes: 4 << 30,
            fills: 128,
            handshake: Duration::from_secs(30),
            idle: Duration::from_secs(30),
            tunnels: 1024,
            tunnel_idle: Duration::from_secs(600),
            tunnel_lifetime: Duration::from_secs(24 * 3600),
        }
    }
}
