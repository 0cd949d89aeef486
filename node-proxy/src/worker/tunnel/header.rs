//! The header that opens a native tunnel connection, right after the TLS handshake: PROXY protocol version 2
//! (haproxy/doc/proxy-protocol.txt §2.2) with the application's addresses, and type-length-values for what the
//! receiving node needs to know. The application's own bytes follow.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use mesh_api::model::AppProtocol;

/// ALPN protocol of native tunnels.
pub const ALPN: &[u8] = b"sockmesh/1";

/// Longest header that is accepted, bytes, with its 16 fixed ones.
pub const MAX_LEN: usize = 1024;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const VERSION_2_PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
const FIXED: usize = 16;

/// Custom range of the specification (0xE0–0xEF, §2.2.8).
const TLV_PROTOCOL: u8 = 0xE0;
const TLV_SERVICE: u8 = 0xE1;
const TLV_REPORT: u8 = 0xE2;

/// What a tunnel connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelHeader {
    /// The application's socket at the source.
    pub source: SocketAddr,
    /// Address and port of the destination pod.
    pub destination: SocketAddr,
    /// What the bytes are.
    pub protocol: AppProtocol,
    /// `namespace/name` of the service that the application asked for; a label only, it grants nothing.
    pub service: Option<String>,
    /// The receiver is to say what came of its connect to the application ([`super::answer`]) before the application's
    /// own bytes. Only who asks for it gets it.
    pub report: bool,
}

/// Why bytes are not a header that this mesh sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The signature is not that of PROXY protocol v2.
    #[error("not a PROXY protocol v2 header")]
    Signature,
    /// Not version 2 with command PROXY.
    #[error("unknown version or command")]
    Version,
    /// Not TCP over IPv4 or IPv6.
    #[error("unknown address family")]
    Family,
    /// A length points past the end.
    #[error("a length in the header is wrong")]
    Length,
    /// Larger than [`MAX_LEN`].
    #[error("header is larger than {MAX_LEN} bytes")]
    TooLong,
    /// The protocol value is missing or unknown: a newer peer; refused rather than guessed.
    #[error("missing or unknown protocol value")]
    Protocol,
    /// The request for a report bears a value, which this version knows none of.
    #[error("malformed request for a report of the connect")]
    Report,
    /// The service name is not UTF-8 or not `namespace/name`.
    #[error("malformed service name")]
    Service,
}

fn protocol_code(protocol: AppProtocol) -> u8 {
    match protocol {
        AppProtocol::Detect => 0,
        AppProtocol::Tcp => 1,
        AppProtocol::Tls => 2,
        AppProtocol::Http1 => 3,
        AppProtocol::Http2 => 4,
        AppProtocol::Grpc => 5,
    }
}

fn protocol_of(code: u8) -> Option<AppProtocol> {
    Some(match code {
        0 => AppProtocol::Detect,
        1 => AppProtocol::Tcp,
        2 => AppProtocol::Tls,
        3 => AppProtocol::Http1,
        4 => AppProtocol::Http2,
        5 => AppProtocol::Grpc,
        _ => return None,
    })
}

impl TunnelHeader {
    /// Appends the header to `out`.
    ///
    /// Addresses of different families are written as IPv6 with the IPv4 one mapped (RFC 4291 §2.5.5.2).
    pub fn encode(&self, out: &mut bytes::BytesMut) {
        out.extend_from_slice(&SIGNATURE);
        let service = self.service.as_deref().unwrap_or_default().as_bytes();
        let report: &[u8] = if self.report { &[TLV_REPORT, 0, 0] } else { &[] };
        let tlvs = 3 + 1 + report.len() + if service.is_empty() { 0 } else { 3 + service.len() };
        let put_len = |out: &mut bytes::BytesMut, n: usize| {
            let n = u16::try_from(n).expect("names are at most 253 bytes, so lengths fit");
            out.extend_from_slice(&n.to_be_bytes());
        };
        if let (IpAddr::V4(src), IpAddr::V4(dst)) = (self.source.ip(), self.destination.ip()) {
            out.extend_from_slice(&[VERSION_2_PROXY, TCP4]);
            put_len(out, 12 + tlvs);
            out.extend_from_slice(&src.octets());
            out.extend_from_slice(&dst.octets());
        } else {
            out.extend_from_slice(&[VERSION_2_PROXY, TCP6]);
            put_len(out, 36 + tlvs);
            out.extend_from_slice(&as_v6(self.source.ip()).octets());
            out.extend_from_slice(&as_v6(self.destination.ip()).octets());
        }
        out.extend_from_slice(&self.source.port().to_be_bytes());
        out.extend_from_slice(&self.destination.port().to_be_bytes());
        out.extend_from_slice(&[TLV_PROTOCOL, 0, 1, protocol_code(self.protocol)]);
        out.extend_from_slice(report);
        if !service.is_empty() {
            out.extend_from_slice(&[TLV_SERVICE]);
            put_len(out, service.len());
            out.extend_from_slice(service);
        }
    }

    /// Reads a header from the start of `input`: the header and its length in bytes, or `None` when more bytes are
    /// needed. Unknown type-length-values are skipped, as the specification asks.
    ///
    /// # Errors
    /// [`HeaderError`] as soon as the bytes can't become a header.
    pub fn decode(input: &[u8]) -> Result<Option<(Self, usize)>, HeaderError> {
        let known = input.len().min(SIGNATURE.len());
        if input[..known] != SIGNATURE[..known] {
            return Err(HeaderError::Signature);
        }
        let Some(fixed) = input.get(..FIXED) else { return Ok(None) };
        if fixed[12] != VERSION_2_PROXY {
            return Err(HeaderError::Version);
        }
        let len = FIXED + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
        if len > MAX_LEN {
            return Err(HeaderError::TooLong);
        }
        let Some(body) = input.get(FIXED..len) else { return Ok(None) };
        let port = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
        let (source, destination, tlvs) = match fixed[13] {
            TCP4 => {
                let body4: &[u8; 12] = body.first_chunk().ok_or(HeaderError::Length)?;
                let ip = |at: usize| Ipv4Addr::new(body4[at], body4[at + 1], body4[at + 2], body4[at + 3]);
                (SocketAddr::new(ip(0).into(), port(8)), SocketAddr::new(ip(4).into(), port(10)), &body[12..])
            }
            TCP6 => {
                let body6: &[u8; 36] = body.first_chunk().ok_or(HeaderError::Length)?;
                let ip = |at: usize| {
                    let mut octets = [0; 16];
                    octets.copy_from_slice(&body6[at..at + 16]);
                    Ipv6Addr::from(octets).to_canonical()
                };
                (SocketAddr::new(ip(0), port(32)), SocketAddr::new(ip(16), port(34)), &body[36..])
            }
            _ => return Err(HeaderError::Family),
        };
        let (protocol, service, report) = Self::decode_tlvs(tlvs)?;
        Ok(Some((Self { source, destination, protocol, service, report }, len)))
    }

    fn decode_tlvs(mut tlvs: &[u8]) -> Result<(AppProtocol, Option<String>, bool), HeaderError> {
        let mut protocol = None;
        let mut service = None;
        let mut report = false;
        while let Some((&[kind, hi, lo], rest)) = tlvs.split_first_chunk() {
            let len = usize::from(u16::from_be_bytes([hi, lo]));
            let value = rest.get(..len).ok_or(HeaderError::Length)?;
            tlvs = &rest[len..];
            match (kind, value) {
                (TLV_PROTOCOL, &[code]) => {
                    protocol = Some(protocol_of(code).ok_or(HeaderError::Protocol)?);
                }
                (TLV_PROTOCOL, _) => return Err(HeaderError::Protocol),
                (TLV_SERVICE, name) => {
                    let name = std::str::from_utf8(name).map_err(|_| HeaderError::Service)?;
                    if name.bytes().filter(|b| *b == b'/').count() != 1 {
                        return Err(HeaderError::Service);
                    }
                    service = Some(name.to_owned());
                }
                (TLV_REPORT, []) => report = true,
                (TLV_REPORT, _) => return Err(HeaderError::Report),
                _ => {}
            }
        }
        if !tlvs.is_empty() {
            return Err(HeaderError::Length);
        }
        Ok((protocol.ok_or(HeaderError::Protocol)?, service, report))
    }
}

fn as_v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use proptest::prelude::*;

    fn header(source: &str, destination: &str, service: Option<&str>) -> TunnelHeader {
        TunnelHeader {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            protocol: AppProtocol::Http1,
            service: service.map(str::to_owned),
            report: service.is_some(),
        }
    }

    #[test]
    fn what_is_encoded_is_decoded_in_both_families_and_mixed() {
        for h in [
            header("10.1.0.2:40000", "10.2.0.3:8080", Some("shop/web")),
            header("[fd00::2]:40000", "[fd00:1::3]:8080", None),
            header("10.1.0.2:40000", "[fd00:1::3]:8080", Some("shop/web")),
        ] {
            let mut out = BytesMut::new();
            h.encode(&mut out);
            let len = out.len();
            out.extend_from_slice(b"GET /");
            assert_eq!(TunnelHeader::decode(&out), Ok(Some((h, len))));
        }
    }

    #[test]
    fn a_header_in_pieces_asks_for_more_until_it_is_whole() {
        let mut out = BytesMut::new();
        header("10.1.0.2:40000", "10.2.0.3:8080", Some("shop/web")).encode(&mut out);
        for n in 0..out.len() {
            assert_eq!(TunnelHeader::decode(&out[..n]), Ok(None), "after {n} bytes");
        }
    }

    #[test]
    fn malformed_headers_are_refused_by_name() {
        let mut good = BytesMut::new();
        header("10.1.0.2:40000", "10.2.0.3:8080", Some("shop/web")).encode(&mut good);
        let change = |at: usize, to: u8| {
            let mut bad = good.to_vec();
            bad[at] = to;
            TunnelHeader::decode(&bad).unwrap_err()
        };
        assert_eq!(change(0, b'G'), HeaderError::Signature);
        assert_eq!(change(12, 0x20), HeaderError::Version, "command LOCAL");
        assert_eq!(change(13, 0x12), HeaderError::Family, "UDP");
        assert_eq!(change(14, 0xff), HeaderError::TooLong);
        assert_eq!(change(15, 4), HeaderError::Length, "shorter than its addresses");
        assert_eq!(change(FIXED + 12 + 3, 9), HeaderError::Protocol, "unknown protocol");
        assert_eq!(change(FIXED + 12 + 2, 2), HeaderError::Protocol, "protocol of two bytes");
        assert_eq!(change(FIXED + 12 + 4 + 2, 1), HeaderError::Report, "a request for a report with a value");
        assert_eq!(change(FIXED + 12 + 7 + 2, 200), HeaderError::Length, "value past the end");
        assert_eq!(change(FIXED + 12 + 7 + 3, b'/'), HeaderError::Service, "two slashes");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), real in any::<bool>()) {
            if real && bytes.len() >= 14 {
                bytes[..12].copy_from_slice(&SIGNATURE);
                bytes[12] = VERSION_2_PROXY;
                bytes[13] = if bytes[13] & 1 == 0 { TCP4 } else { TCP6 };
                if bytes.len() >= 16 {
                    bytes[14] = 0;
                }
            }
            let _ = TunnelHeader::decode(&bytes);
        }
    }
}
