//! What the calls mean: decides on the leader, writes transactions, drives agents; holds no state that a new leader could miss.

mod agent;
mod api;
mod appliances;
mod backup;
mod call;
pub mod certificates;
mod clock;
mod controller;
pub mod coverage;
mod dispatch;
mod events;
mod failure;
mod first_boot;
mod handlers;
mod implicit;
mod in_hand;
mod interfaces;
mod lifecycle;
mod membership;
mod notices;
mod operations;
pub mod password;
mod placement;
mod reconcile;
mod repeats;
mod schedules;
mod sessions;
mod storage;
mod tasks;
#[cfg(test)]
mod tests;

pub use agent::{Agent, AgentError, Agents, Performed};
pub use call::{Caller, Event, EventBatch, Refusal, Reply, Request, Transport};
pub use clock::{Clock, SystemClock, WrongClock};
pub use controller::{Controller, ControllerConfig};
pub use first_boot::{Guest, InitialMember};
pub use handlers::{
    ByteStream, CONSOLE, Credentials, Declined, HANDLERS, Handler, Inquiry, Knock, Opened, Tunnel, Verb,
};
pub use membership::{
    Abroad, Alone, AskError, ExchangeError, Home, Newcomer, Peers, Seat, Standing, Surroundings, Trust, VoterPolicy,
    enrol_witness, told_to_have,
};
pub use repeats::OWN_KEY;
