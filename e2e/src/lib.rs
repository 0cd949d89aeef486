//! Scenarios on a whole mesh, with real programs.
//!
//! [`runner`] runs them one after the other and counts; a [`stage`] is the mesh that a scenario plays on, and ends it
//! with the gates of `gates`: what the mesh counted and logged is what the scenario announced, and it did go through
//! the mesh.
//! [`load`] follows a load while something happens;
//! [`talk`] runs the small TCP programs of `programs/talk.py`, [`datagrams`] the UDP and ICMP of `programs/datagrams.py`.

pub mod datagrams;
mod gates;
pub mod load;
pub mod runner;
pub mod stage;
pub mod talk;

pub use runner::{Outcome, Scenario};
pub use stage::{Stage, addresses};
