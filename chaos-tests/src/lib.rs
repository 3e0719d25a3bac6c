//! What tests and benchmarks on real processes are made of: a XenAPI client of our own, labs that always end, the stock
//! clients of others, the load that benchmarks put on a pool and on the peer it is measured against, and the judgement of
//! what clients saw.

pub mod bench;
pub mod client;
pub mod history;
pub mod lab;
pub mod namespace;
pub mod relay;
pub mod stock;
