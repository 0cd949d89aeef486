//! HBONE: a TCP connection of an application as one HTTP/2 CONNECT stream inside mutual TLS, as Istio's ztunnel speaks it.
//!
//! A CONNECT names the destination (`:authority ip:port`), the answer 200 says that the application's connection was
//! made, and then DATA frames are its bytes. END_STREAM is the end of one direction; RST_STREAM is a reset. One HTTP/2
//! connection carries one (source identity, destination identity) pair only, since h2's limits end connections, not
//! streams.
//!
//! The sizes are ztunnel's: with less it would stall, with more it would not be used.

pub mod client;
mod keepalive;
pub mod server;
mod stream;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;

use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue};

pub use self::stream::HboneStream;

/// Flow-control window of a stream, bytes.
const STREAM_WINDOW: u32 = 4 << 20;
/// Flow-control window of a connection, bytes.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Largest frame accepted, bytes.
const MAX_FRAME_SIZE: u32 = 1 << 20;
/// Bytes queued for writing on one stream: enough to keep the connection busy, and all that a peer which does not read
/// can pin.
const SEND_BUFFER: usize = 128 << 10;

const FORWARDED: HeaderName = http::header::FORWARDED;
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// What a CONNECT asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    /// Destination, with its port: an address, or the name of a service.
    pub authority: Authority,
    /// The client's own address, from `forwarded: for="ip:port"`. Display data: the peer's certificate says who asks.
    pub forwarded_for: Option<SocketAddr>,
    /// Telemetry attributes of the source (W3C baggage).
    pub baggage: Option<HeaderValue>,
    /// Trace context (W3C).
    pub traceparent: Option<HeaderValue>,
}

impl ConnectRequest {
    /// A request for `destination` without attributes.
    #[must_use]
    pub fn to(destination: SocketAddr) -> Self {
        let authority = destination.to_string();
        Self {
            authority: authority.parse().expect("a socket address is an authority (RFC 3986 §3.2)"),
            forwarded_for: None,
            baggage: None,
            traceparent: None,
        }
    }

    /// The destination, if it is an address and not a name.
    #[must_use]
    pub fn destination(&self) -> Option<SocketAddr> {
        self.authority.as_str().parse().ok()
    }

    fn write(self, headers: &mut HeaderMap) {
        if let Some(address) = self.forwarded_for
            && let Ok(value) = HeaderValue::from_str(&format!("for=\"{address}\""))
        {
            headers.insert(FORWARDED, value);
        }
        if let Some(baggage) = self.baggage {
            headers.insert(BAGGAGE, baggage);
        }
        if let Some(traceparent) = self.traceparent {
            headers.insert(TRACEPARENT, traceparent);
        }
    }

    fn read(authority: Authority, headers: &mut HeaderMap) -> Self {
        Self {
            authority,
            forwarded_for: headers.get(FORWARDED).and_then(forwarded_for),
            baggage: headers.remove(BAGGAGE),
            traceparent: headers.remove(TRACEPARENT),
        }
    }
}

/// The address in `for="ip:port"` (RFC 7239 §4, §6), of the first element.
fn forwarded_for(value: &HeaderValue) -> Option<SocketAddr> {
    let element = value.to_str().ok()?.split(',').next()?;
    element.split(';').find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        if !name.eq_ignore_ascii_case("for") {
            return None;
        }
        value.trim_matches('"').parse().ok()
    })
}
