//! Scenarios on a whole mesh, with real programs.
//!
//! [`runner`] runs them one after the other and counts; a [`stage`] is the mesh that a scenario plays on, and ends it
//! with two gates: no refusal that the scenario did not announce, and no error in the mesh's logs that it did not.
//! [`talk`] runs the small TCP programs of `programs/talk.py`.

pub mod runner;
pub mod stage;
pub mod talk;

pub use runner::{Outcome, Scenario};
pub use stage::{Stage, addresses};
