//! What the documents of the Terraform and OpenTofu ecosystem mean: pure functions on bytes.

pub mod address;
pub mod cli_config;
pub mod dirhash;
pub mod lock;
mod openpgp;
pub mod own;
pub mod registry;
pub mod route;
pub mod signature;
pub mod sums;
pub mod versions;
