//! What must hold whatever bytes come: called by the programs of `fuzz/` with inputs that they make up, and by the tests
//! here with those that are known to lead deep, and with what was found once.
//!
//! Every function takes any input, reads it as steps of a play, and panics where something does not hold. The play knows
//! what may come out: not only that nothing stops.

mod frames;
mod input;
mod packets;
mod peers;
mod seeds;
#[cfg(test)]
mod tests;
mod world;

pub use frames::{cut, join};
pub use seeds::{cuts, datagrams as datagram_seeds, joins};
pub use world::datagrams;
