//! larder: a caching, verifying forward proxy for Terraform and OpenTofu.
//!
//! The rooms, from the top row down; imports go down only. See ARCHITECTURE.md.

pub mod ca;
pub mod config;
pub mod digest;
pub mod error;
pub mod telemetry;
pub mod terraform;
pub mod upstream;
