//! Which bytes may stand where in a message head.

/// May stand in a token: a field name, a method, a connection option (RFC 9110 §5.6.2).
const TOKEN: u8 = 1;
/// May stand in a field value or reason phrase: HTAB, SP, VCHAR, obs-text (RFC 9110 §5.5).
const VALUE: u8 = 2;
/// May stand in a request target.
const TARGET: u8 = 4;
/// May stand in the host part of an authority that is not an IP literal (RFC 3986 §3.2.2).
const HOST: u8 = 8;

const CLASSES: [u8; 256] = classes();

const fn classes() -> [u8; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let byte = i as u8;
        let mut class = 0;
        if byte.is_ascii_alphanumeric() || in_set(byte, b"!#$%&'*+-.^_`|~") {
            class |= TOKEN;
        }
        if byte == b'\t' || (byte >= 0x20 && byte != 0x7f) {
            class |= VALUE;
        }
        if byte > 0x20 && byte != 0x7f && byte != b'#' {
            class |= TARGET;
        }
        // No comma: a joined pair of Host fields would pass for one name.
        if byte.is_ascii_alphanumeric() || in_set(byte, b"-._~%!$&'()*+;=") {
            class |= HOST;
        }
        table[i] = class;
        i += 1;
    }
    table
}

const fn in_set(byte: u8, set: &[u8]) -> bool {
    let mut i = 0;
    while i < set.len() {
        if set[i] == byte {
            return true;
        }
        i += 1;
    }
    false
}

fn has(byte: u8, class: u8) -> bool {
    CLASSES[usize::from(byte)] & class != 0
}

/// Whether `byte` may stand in a token.
pub(super) fn is_token_byte(byte: u8) -> bool {
    has(byte, TOKEN)
}

/// Whether `bytes` is a token.
pub(super) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|b| has(*b, TOKEN))
}

/// The first byte that may not stand in a field value.
pub(super) fn bad_value_byte(bytes: &[u8]) -> Option<u8> {
    bytes.iter().copied().find(|b| !has(*b, VALUE))
}

/// The first byte that may not stand in a request target.
///
/// Bytes above 0x7f pass here because clients send paths in raw UTF-8; the gate proves that they are UTF-8.
pub(super) fn bad_target_byte(bytes: &[u8]) -> Option<u8> {
    bytes.iter().copied().find(|b| !has(*b, TARGET))
}

/// Cuts HTAB and SP from both ends (OWS, RFC 9110 §5.6.3).
pub(super) fn trim(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = bytes {
        bytes = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

/// Splits `host[:port]`; `None` if it is not one (RFC 3986 §3.2, without userinfo, RFC 9110 §4.2.4).
pub(super) fn split_authority(bytes: &[u8]) -> Option<(&[u8], Option<u16>)> {
    let (host, rest) = if bytes.first() == Some(&b'[') {
        let end = memchr::memchr(b']', bytes)?;
        let inside = std::str::from_utf8(&bytes[1..end]).ok()?;
        inside.parse::<std::net::Ipv6Addr>().ok()?;
        bytes.split_at(end + 1)
    } else {
        let end = memchr::memchr(b':', bytes).unwrap_or(bytes.len());
        let (host, rest) = bytes.split_at(end);
        if host.is_empty() || !host.iter().all(|b| has(*b, HOST)) {
            return None;
        }
        (host, rest)
    };
    match rest {
        [] => Some((host, None)),
        [b':', port @ ..] => {
            let digits = (1..=5).contains(&port.len()) && port.iter().all(u8::is_ascii_digit);
            let port = digits.then(|| std::str::from_utf8(port).ok()?.parse().ok()).flatten()?;
            Some((host, Some(port)))
        }
        _ => None,
    }
}
