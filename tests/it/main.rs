//! larder from the outside: the real binary, real sockets, an upstream that can go wrong in every
//! way. One binary for all of it, since linking is what costs.

#![allow(clippy::unwrap_used)]

mod access;
mod archive;
mod by_name;
mod ca;
mod certificate;
mod certified;
mod clients;
mod common;
mod cooldown;
mod doctor;
mod faults;
mod gates;
mod hardening;
mod limits;
mod lists;
mod logs;
mod metadata;
mod mirror;
mod offline;
mod older;
mod parents;
mod policy;
mod private;
mod proxy;
mod range;
mod reach;
mod redirect;
mod reload;
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
mod trust_store;
