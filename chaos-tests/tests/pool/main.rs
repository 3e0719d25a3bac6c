//! The pool's promises, on real processes: each test has a lab of its own and is named after what it proves.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may take a failure for what it is")]

mod backup;
mod certificates;
mod continuity;
mod events;
mod lab;
mod lifecycle;
mod mastership;
mod membership;
mod network;
mod stock;
mod storage;
mod support;
mod vms;
mod voters;
mod wire;
