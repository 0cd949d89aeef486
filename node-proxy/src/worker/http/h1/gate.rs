//! What this proxy refuses to pass on, and what it strips.
//!
//! The gate's promise: whatever passes is one message to every parser behind it, with the same bytes. It repairs
//! nothing. A message that two parsers could frame or route in two ways is refused by a named rule; so is one whose
//! syntax is not valid. All else passes as it came, because applications must not notice the mesh:
//! - paths keep their `%2f`, `//`, `..` and `;` (what they mean is for policy and the application to say), and
//! - `_` in field names passes, unless the node is told to refuse both ([`super::super::readings`]);
//! - a request target in absolute form stays so, if its authority is the one in `Host`.
//!
//! Responses are held to the same framing rules, but harmless habits of servers pass: white space around the value of
//! `Content-Length`, `Chunked` in another case, no space before an empty reason.

use super::super::readings::{self, Reading};
use super::framing::Body;
use super::head::{Caps, Field, Head, Kind, Span};
use super::syntax::{is_token, split_authority, trim};

/// Connection options that a `Connection` field may name, at most; more is nobody's honest use.
const MAX_CONNECTION_OPTIONS: usize = 16;

macro_rules! refusals {
    ($($variant:ident = $status:literal, $text:literal;)*) => {
        /// Why a message is refused: the rule that it broke.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub(super) enum Refusal {
            $(#[doc = $text] $variant,)*
        }

        impl Refusal {
            /// The status for a request that is refused so.
            pub(super) fn status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// The rule with its number, for a person.
            pub(super) fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

refusals! {
    LengthAndCoding = 400, "H1-1: both Content-Length and Transfer-Encoding";
    LengthRepeated = 400, "H1-2: more than one Content-Length";
    LengthValue = 400, "H1-2: Content-Length is not a plain decimal number";
    CodingRepeated = 400, "H1-3: more than one Transfer-Encoding";
    CodingValue = 400, "H1-3: Transfer-Encoding is not exactly 'chunked'";
    CodingInHttp10 = 400, "H1-3: Transfer-Encoding in an HTTP/1.0 message";
    SpaceBeforeColon = 400, "H1-4: white space before the colon of a header field";
    LeadingSpace = 400, "H1-4: white space before the first header field";
    ObsFold = 400, "H1-4: a header field is folded over several lines";
    BareCr = 400, "H1-4: a carriage return that ends no line";
    BareLf = 400, "H1-4: a line ends without a carriage return";
    Nul = 400, "H1-4: a NUL byte in the head";
    ControlByte = 400, "H1-4: a control character in the head";
    FieldName = 400, "H1-4: a header field's name is not a token";
    ChunkSize = 400, "H1-5: a chunk size is not a plain hexadecimal number of at most 15 digits";
    ChunkExtension = 400, "H1-5: a chunk extension is too long or has a byte that is not allowed there";
    ChunkEnd = 400, "H1-5: a chunk's data does not end where its size says";
    UpgradeUnasked = 400, "H1-10: a switch of protocols that was not asked for";
    NotHttp = 400, "H1-10: the answer is not HTTP/1";
    StatusLine = 400, "H1-10: the status line is not valid";
    Connect = 501, "H1-12: CONNECT is not offered";
    TooManyFields = 431, "H1-15: too many header fields";
    HeadTooLarge = 431, "H1-15: the head is too large";
    Fragment = 400, "NORM-5: a fragment in the request target";
    TargetForm = 400, "NORM-6: the request target is neither a path nor an http URI, nor '*' of OPTIONS";
    HostMissing = 400, "NORM-8: no Host";
    HostRepeated = 400, "NORM-8: more than one Host";
    HostValue = 400, "NORM-8: Host is not a host with an optional port";
    HostMismatch = 400, "NORM-8: Host is not the authority of the request target";
    MethodCase = 400, "NORM-9: a lower-case letter in the method";
    ConnectionOption = 400, "HDR-3: Connection has an option that is not a token, or too many of them";
    ConnectionProtected = 400, "HDR-3: Connection names a field that must reach the other end";
    RequestLine = 400, "the request line is not 'method target version'";
    TargetByte = 400, "the request target has a byte that is not allowed there";
    Version = 505, "the version is neither HTTP/1.1 nor HTTP/1.0";
    Expectation = 417, "Expect is not exactly '100-continue'";
    Truncated = 400, "the request ends before it is complete";
}

/// What the gate found out about a request that passed.
#[derive(Debug)]
pub(super) struct RequestPlan {
    /// HTTP/1.1 rather than HTTP/1.0.
    pub v11: bool,
    pub is_head: bool,
    /// The client allows another request on its connection (never for HTTP/1.0, H1-16).
    pub keep_alive: bool,
    /// The client may wait for a 100 before it sends the body.
    pub expects_continue: bool,
    /// Asks for a protocol other than HTTP.
    pub upgrade: bool,
    /// `TE: trailers` is passed on.
    pub te_trailers: bool,
    /// `Host`, or the authority of an absolute target.
    pub authority: Span,
    pub path: Path,
    pub body: Body,
}

/// Path and query of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    At(Span),
    /// `/`, for an absolute target without path.
    Root,
}

/// What the gate found out about a response that passed.
#[derive(Debug)]
pub(super) struct ResponsePlan {
    pub status: u16,
    /// The server allows another request on its connection.
    pub keep_alive: bool,
    /// The status is 101, and was asked for.
    pub upgrade: bool,
    pub grpc_status: Option<u8>,
    pub body: Body,
}

/// The checks on a complete request head; marks the fields that stay on this hop.
///
/// # Errors
/// The rule that the request breaks.
pub(super) fn check_request(buf: &[u8], head: &mut Head, caps: Caps) -> Result<RequestPlan, Refusal> {
    let method = head.method.of(buf);
    if method == b"CONNECT" {
        return Err(Refusal::Connect);
    }
    let (authority, path) = target_and_host(buf, head, method)?;
    let body = match framing(buf, head, Side::Request)? {
        Framing::None => Body::Done,
        Framing::Length(n) => Body::length(n),
        Framing::Chunked => Body::chunked(caps),
    };
    let expects_continue = expectation(buf, head)?;
    let hop = hop_by_hop(buf, head)?;
    let upgrade = head.v11 && hop.upgrade && upgrade_is_foreign(buf, head);
    let mut te_trailers = false;
    for field in &mut head.fields {
        match field.kind {
            Kind::Upgrade => field.drop = !upgrade,
            Kind::Te => {
                field.drop = !field.value.of(buf).eq_ignore_ascii_case(b"trailers");
                te_trailers |= !field.drop;
            }
            _ => {}
        }
    }
    Ok(RequestPlan {
        v11: head.v11,
        is_head: method == b"HEAD",
        keep_alive: head.v11 && !hop.close,
        expects_continue: expects_continue && head.v11 && !body.is_done(),
        upgrade,
        te_trailers,
        authority,
        path,
        body,
    })
}

/// The checks of a node that refuses what applications read in different ways.
///
/// # Errors
/// How the request can be read.
pub(super) fn check_readings(buf: &[u8], head: &Head, plan: &RequestPlan) -> Result<(), Reading> {
    if let Path::At(span) = plan.path {
        readings::check_path(span.of(buf))?;
    }
    head.fields.iter().try_for_each(|field| readings::check_name(field.name.of(buf)))
}

/// The checks on a complete response head; marks the fields that stay on this hop.
///
/// `is_head` and `upgrade` are those of the request.
///
/// # Errors
/// The rule that the response breaks.
pub(super) fn check_response(
    buf: &[u8],
    head: &mut Head,
    is_head: bool,
    upgrade: bool,
    caps: Caps,
) -> Result<ResponsePlan, Refusal> {
    let status = head.status;
    let framing = framing(buf, head, Side::Response)?;
    let hop = hop_by_hop(buf, head)?;
    let switches = status == 101;
    if switches && !(upgrade && head.v11 && head.fields.iter().any(|f| f.kind == Kind::Upgrade)) {
        return Err(Refusal::UpgradeUnasked);
    }
    let never_has_content = status < 200 || status == 204;
    for field in &mut head.fields {
        match field.kind {
            Kind::Upgrade => field.drop = !(switches || status == 426),
            // RFC 9110 §8.6, RFC 9112 §6.1: not in these; a client that believed it would wait for a body.
            Kind::ContentLength | Kind::TransferEncoding if never_has_content => field.drop = true,
            _ => {}
        }
    }
    let body = match framing {
        _ if never_has_content || status == 304 || is_head => Body::Done,
        Framing::None => Body::UntilClose,
        Framing::Length(n) => Body::length(n),
        Framing::Chunked => Body::chunked(caps),
    };
    let grpc_status = head.values(buf, Kind::GrpcStatus).next();
    let grpc_status = grpc_status.and_then(|v| std::str::from_utf8(v).ok()?.parse().ok());
    Ok(ResponsePlan {
        status,
        keep_alive: head.v11 && !hop.close && !matches!(body, Body::UntilClose) && !switches,
        upgrade: switches,
        grpc_status,
        body,
    })
}

/// Fields that decide framing, routing, identity or what the content is: they may not come after it (RFC 9110 §6.5.1).
pub(super) fn forbidden_in_trailers(name: &[u8]) -> bool {
    const NAMES: &[&[u8]] = &[
        b"authorization",
        b"cache-control",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"expect",
        b"forwarded",
        b"host",
        b"keep-alive",
        b"max-forwards",
        b"proxy-authorization",
        b"proxy-connection",
        b"range",
        b"set-cookie",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
    ];
    NAMES.iter().any(|n| name.eq_ignore_ascii_case(n)) || has_mesh_prefix(name)
}

/// Where the request goes: `Host` and the target must say the same (NORM-5..8).
fn target_and_host(buf: &[u8], head: &Head, method: &[u8]) -> Result<(Span, Path), Refusal> {
    let host = only(head, Kind::Host, Refusal::HostRepeated)?;
    if host.is_none() && head.v11 {
        return Err(Refusal::HostMissing);
    }
    if let Some(host) = host {
        let value = host.value.of(buf);
        // An empty Host is what a client sends whose target has no authority (RFC 9112 §3.2).
        if !value.is_empty() && (split_authority(value).is_none() || !host.plain(buf)) {
            return Err(Refusal::HostValue);
        }
    }
    let host_span = host.map(|h| h.value).unwrap_or_default();
    let target = head.target.of(buf);
    if target[0] == b'/' || (target == b"*" && method == b"OPTIONS") {
        return Ok((host_span, Path::At(head.target)));
    }
    let (default_port, rest) = match target {
        t if starts_with_ignoring_case(t, b"http://") => (80, &t[7..]),
        t if starts_with_ignoring_case(t, b"https://") => (443, &t[8..]),
        _ => return Err(Refusal::TargetForm),
    };
    let authority_len = memchr::memchr2(b'/', b'?', rest).unwrap_or(rest.len());
    let named = split_authority(&rest[..authority_len]).ok_or(Refusal::TargetForm)?;
    if let Some(host) = host {
        let (name, port) = split_authority(host.value.of(buf)).ok_or(Refusal::HostMismatch)?;
        let same_port = port.unwrap_or(default_port) == named.1.unwrap_or(default_port);
        if !same_port || !name.eq_ignore_ascii_case(named.0) {
            return Err(Refusal::HostMismatch);
        }
    }
    let authority_start = head.target.end() - rest.len();
    let path_start = authority_start + authority_len;
    let path = match rest.get(authority_len) {
        None => Path::Root,
        Some(b'/') => Path::At(Span::new(path_start, head.target.end())),
        // `http://host?query`: an origin may read its path as `/` or as empty.
        Some(_) => return Err(Refusal::TargetForm),
    };
    Ok((Span::new(authority_start, path_start), path))
}

enum Framing {
    None,
    Length(u64),
    Chunked,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Request,
    Response,
}

/// How the body is framed, if there is exactly one way to read it (H1-1..3, H1-16).
fn framing(buf: &[u8], head: &Head, side: Side) -> Result<Framing, Refusal> {
    let coding = head.fields.iter().find(|f| f.kind == Kind::TransferEncoding);
    let length = head.fields.iter().find(|f| f.kind == Kind::ContentLength);
    match (coding, length) {
        (None, None) => Ok(Framing::None),
        (Some(_), Some(_)) => Err(Refusal::LengthAndCoding),
        (Some(coding), None) => {
            only(head, Kind::TransferEncoding, Refusal::CodingRepeated)?;
            if !head.v11 {
                return Err(Refusal::CodingInHttp10);
            }
            let value = coding.value.of(buf);
            let exact = match side {
                Side::Request => value == b"chunked" && coding.plain(buf),
                Side::Response => value.eq_ignore_ascii_case(b"chunked"),
            };
            if exact { Ok(Framing::Chunked) } else { Err(Refusal::CodingValue) }
        }
        (None, Some(length)) => {
            only(head, Kind::ContentLength, Refusal::LengthRepeated)?;
            let value = length.value.of(buf);
            // 19 digits always fit in 64 bits, signed or not, but for the last few values: parse() sees to those.
            let digits = (1..=19).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
            if !digits || (side == Side::Request && !length.plain(buf)) {
                return Err(Refusal::LengthValue);
            }
            let parsed = std::str::from_utf8(value).ok().and_then(|v| v.parse::<i64>().ok());
            parsed.and_then(|n| u64::try_from(n).ok()).map(Framing::Length).ok_or(Refusal::LengthValue)
        }
    }
}

fn expectation(buf: &[u8], head: &Head) -> Result<bool, Refusal> {
    let Some(field) = only(head, Kind::Expect, Refusal::Expectation)? else {
        return Ok(false);
    };
    if field.value.of(buf).eq_ignore_ascii_case(b"100-continue") {
        Ok(true)
    } else {
        Err(Refusal::Expectation)
    }
}

/// What `Connection` says.
#[derive(Default)]
struct Hop {
    close: bool,
    upgrade: bool,
}

/// Reads `Connection` and marks what it names and what RFC 9110 §7.6.1 lists.
fn hop_by_hop(buf: &[u8], head: &mut Head) -> Result<Hop, Refusal> {
    let mut hop = Hop::default();
    for field in &mut head.fields {
        field.drop = matches!(
            field.kind,
            Kind::Connection | Kind::KeepAlive | Kind::ProxyConnection | Kind::Http2Settings
        );
    }
    let mut options = 0;
    for i in 0..head.fields.len() {
        if head.fields[i].kind != Kind::Connection {
            continue;
        }
        for option in head.fields[i].value.of(buf).split(|b| *b == b',').map(trim) {
            if option.is_empty() {
                continue;
            }
            options += 1;
            if options > MAX_CONNECTION_OPTIONS || !is_token(option) {
                return Err(Refusal::ConnectionOption);
            }
            if option.eq_ignore_ascii_case(b"close") {
                hop.close = true;
            } else if option.eq_ignore_ascii_case(b"upgrade") {
                hop.upgrade = true;
            } else if is_protected(option) {
                return Err(Refusal::ConnectionProtected);
            } else if !option.eq_ignore_ascii_case(b"keep-alive") && !option.eq_ignore_ascii_case(b"te") {
                for field in &mut head.fields {
                    field.drop |= field.name.of(buf).eq_ignore_ascii_case(option);
                }
            }
        }
    }
    Ok(hop)
}

/// Whether the other end must see a field of this name, so that `Connection` may not have it dropped (HDR-3).
fn is_protected(name: &[u8]) -> bool {
    const NAMES: &[&[u8]] = &[
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"cookie",
        b"forwarded",
        b"host",
        b"set-cookie",
        b"traceparent",
        b"transfer-encoding",
        b"x-request-id",
    ];
    NAMES.iter().any(|n| name.eq_ignore_ascii_case(n)) || has_mesh_prefix(name)
}

/// Names in which the mesh tells the application about the caller.
fn has_mesh_prefix(name: &[u8]) -> bool {
    starts_with_ignoring_case(name, b"x-forwarded-") || starts_with_ignoring_case(name, b"x-sockmesh-")
}

/// Whether `Upgrade` names anything but HTTP/2, which this proxy speaks by prior knowledge only (H2-14).
fn upgrade_is_foreign(buf: &[u8], head: &Head) -> bool {
    let mut protocols =
        head.values(buf, Kind::Upgrade).flat_map(|v| v.split(|b| *b == b',')).map(trim).peekable();
    protocols.peek().is_some_and(|first| !first.is_empty())
        && !protocols.any(|p| starts_with_ignoring_case(p, b"h2"))
}

/// The one field of `kind`.
fn only(head: &Head, kind: Kind, repeated: Refusal) -> Result<Option<&Field>, Refusal> {
    let mut fields = head.fields.iter().filter(|f| f.kind == kind);
    match (fields.next(), fields.next()) {
        (_, Some(_)) => Err(repeated),
        (first, None) => Ok(first),
    }
}

fn starts_with_ignoring_case(bytes: &[u8], prefix: &[u8]) -> bool {
    bytes.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}
