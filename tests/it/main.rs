//! larder from the outside: the real binary, real sockets, an upstream that can go wrong in every
//! way. One binary for all of it, since linking is what costs.

#![allow(clippy::unwrap_used)]

mod access;
mod archive;
mod ca;
mod certified;
mod common;
mod cooldown;
mod faults;
mod gates;
mod hardening;
mod limits;
mod lists;
mod logs;
mod metadata;
mod offline;
mod parents;
mod policy;
mod proxy;
mod range;
mod reach;
mod republished;
mod run;
mod secrets;
mod shown;
mod signature;
mod smuggling;
mod store;
mod terraform;
mod trouble;
mod trust;
