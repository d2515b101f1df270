//! larder from the outside: the real binary, real sockets, an upstream that can go wrong in every
//! way. One binary for all of it, since linking is what costs.

#![allow(clippy::unwrap_used)]

mod access;
mod archive;
mod ca;
mod certified;
mod common;
mod faults;
mod hardening;
mod limits;
mod logs;
mod metadata;
mod offline;
mod proxy;
mod range;
mod reach;
mod run;
mod secrets;
mod signature;
mod smuggling;
mod store;
mod terraform;
mod trouble;
