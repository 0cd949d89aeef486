//! HTTP/1.0 and HTTP/1.1: a codec for a proxy.
//!
//! It reads heads strictly, asks the [`Exchange`](super::Exchange) where they go, and passes on what it read: heads with
//! the edits that a hop must make, bodies byte for byte. Chunked bodies are checked, never re-chunked, so what the proxy
//! framed is what the next parser frames.
//!
//! | module | job |
//! |---|---|
//! | `syntax` | which bytes may stand where |
//! | `head` | heads and trailer sections into offsets |
//! | `gate` | what is refused and what is stripped: the rules, by number |
//! | `framing` | where a body ends |
//! | `render` | heads for the next hop, replies of the mesh itself |
//! | `serve` | the life of a client's connection |
//! | `exchange` | one request: attempts, timeouts, how it ends |
//! | `upload`, `download` | the two directions of an exchange |
//! | `buffers` | memory that goes from one connection to the next |
//! | `upgrade` | raw bytes after a switch of protocols |
//! | `sniff` | is this HTTP/1 at all |
//!
//! Buffers are bounded by [`HttpLimits`](super::HttpLimits): a few read buffers in each direction, the replay buffer, and
//! a head. Nothing is read from one side while what was read before waits to be written to the other. A connection between
//! requests holds no buffer.

/// [`crate::worker::reason::HEADER`] as a field name.
const MESH_REASON: &[u8] = crate::worker::reason::HEADER.as_bytes();

mod buffers;
mod download;
mod exchange;
mod framing;
mod gate;
mod head;
mod render;
mod serve;
mod sniff;
mod syntax;
mod upgrade;
mod upload;
mod wire;

#[cfg(test)]
mod tests;

pub use serve::{ConnectionEnd, serve};
pub use sniff::looks_like_request;
