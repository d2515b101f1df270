//! larder: a caching, verifying forward proxy for Terraform and OpenTofu.
//!
//! The rooms, from the top row down; imports go down only. See ARCHITECTURE.md.

pub mod cli;
pub mod server;

pub mod registry;

pub mod cache;

pub mod ca;
pub mod store;
pub mod terraform;
pub mod upstream;

pub mod config;
pub mod digest;
pub mod error;
pub mod instance;
pub mod stamp;
pub mod sync;
pub mod telemetry;
