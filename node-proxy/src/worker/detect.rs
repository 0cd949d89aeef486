//! What an undeclared port speaks, found out from the first bytes.
//!
//! Detection never delays a server that speaks first: the caller dials the endpoint at once and stops asking as soon as
//! the server says something. A client that speaks first is looked at incrementally, across segments, and only as far as
//! the shortest prefix that decides; the bytes are kept and go on as they came.

use mesh_api::model::AppProtocol;

use super::http::{Sniff, h1, h2};

/// TLS record of type handshake (RFC 8446 §5.1) with a legacy record version 3.x, holding a ClientHello (§4).
const TLS_HANDSHAKE: u8 = 0x16;
const TLS_MAJOR: u8 = 3;
const CLIENT_HELLO: u8 = 1;

/// The protocol that `first` begins, or `None` when more bytes could change the answer.
pub fn protocol(first: &[u8]) -> Option<AppProtocol> {
    match h2::looks_like_preface(first) {
        Sniff::Yes => return Some(AppProtocol::Http2),
        Sniff::NeedMore => return None,
        Sniff::No => {}
    }
    match h1::looks_like_request(first) {
        Sniff::Yes => return Some(AppProtocol::Http1),
        Sniff::NeedMore => return None,
        Sniff::No => {}
    }
    match tls_client_hello(first) {
        Sniff::Yes => Some(AppProtocol::Tls),
        Sniff::NeedMore => None,
        Sniff::No => Some(AppProtocol::Tcp),
    }
}

fn tls_client_hello(first: &[u8]) -> Sniff {
    for (at, expected) in [(0, TLS_HANDSHAKE), (1, TLS_MAJOR), (5, CLIENT_HELLO)] {
        match first.get(at) {
            None => return Sniff::NeedMore,
            Some(byte) if *byte != expected => return Sniff::No,
            Some(_) => {}
        }
    }
    Sniff::Yes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_protocol_is_known_by_its_first_bytes() {
        assert_eq!(protocol(b"GET /index.html HTTP/1.1\r\n"), Some(AppProtocol::Http1));
        assert_eq!(protocol(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Some(AppProtocol::Http2));
        assert_eq!(protocol(&[0x16, 3, 1, 2, 0, 1, 0]), Some(AppProtocol::Tls));
        assert_eq!(protocol(&[0x16, 3, 1, 2, 0, 2, 0]), Some(AppProtocol::Tcp), "a ServerHello");
        assert_eq!(protocol(b"*1\r\n$4\r\nPING\r\n"), Some(AppProtocol::Tcp), "Redis");
        assert_eq!(
            protocol(&[0, 0, 0, 8, 4, 210, 22, 47]),
            Some(AppProtocol::Tcp),
            "a PostgreSQL SSLRequest"
        );
        assert_eq!(protocol(b"SSH-2.0-OpenSSH_9.2\r\n"), Some(AppProtocol::Tcp));
    }

    #[test]
    fn every_prefix_of_a_preface_or_head_is_undecided_or_right() {
        for (whole, answer) in [
            (&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], AppProtocol::Http2),
            (b"DELETE /a HTTP/1.1\r\n", AppProtocol::Http1),
            (b"PROPFIND / HTTP/1.1\r\n", AppProtocol::Http1),
        ] {
            for n in 0..=whole.len() {
                let got = protocol(&whole[..n]);
                assert!(got.is_none() || got == Some(answer), "{n} bytes of {answer:?} gave {got:?}");
            }
        }
    }
}
