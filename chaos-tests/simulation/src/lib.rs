//! Whole pools on one thread, in a time that is made up: hosts crash between any two steps, disks forget, links are cut,
//! and what clients were promised must hold. A seed determines all of it; a second run of a seed is the same run.

mod agents;
mod apart;
mod calls;
mod chance;
mod clients;
mod disk;
mod kernel;
mod line;
mod network;
mod node;
mod process;
mod registers;
mod run;
mod trace;
mod trouble;
mod world;

pub use apart::run_apart;
pub use raft_store::Planted;
pub use run::Report;
pub use world::Plan;
