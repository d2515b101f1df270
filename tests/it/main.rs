//! larder from the outside: the real binary, real sockets, an upstream that can go wrong in every
//! way. One binary for all of it, since linking is what costs.

#![allow(clippy::unwrap_used)]

mod archive;
mod ca;
mod common;
mod cooldown;
mod hardening;
mod lists;
mod logs;
mod metadata;
mod offline;
mod policy;
mod proxy;
mod range;
mod republished;
mod run;
mod shown;
mod signature;
mod store;
mod terraform;
mod trouble;
mod trust;
