//! Tests of the HTTP/1 codec: tables for the gate, and whole exchanges over streams in memory.

mod exchanges;
mod failures;
mod gate_requests;
mod gate_responses;
mod pipe;
mod properties;
mod upgrades;
mod verdict;
mod world;
