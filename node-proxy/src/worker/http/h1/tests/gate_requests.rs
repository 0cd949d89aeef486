//! The table of requests: what passes, what is refused, and by which rule.

use super::super::gate::Refusal;
use super::verdict::{CAPS, Message, Verdict, assert_same_in_pieces, verdict};

/// A GET with these field lines.
fn get(fields: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n").into_bytes()
}

/// A POST with these field lines and what follows them.
fn post(fields: &str, rest: &str) -> Vec<u8> {
    format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n{rest}").into_bytes()
}

/// A chunked POST with these bytes after the head.
fn chunked(rest: &str) -> Vec<u8> {
    post("Transfer-Encoding: chunked", rest)
}

fn raw(bytes: &[u8]) -> Vec<u8> {
    bytes.to_vec()
}

fn refused() -> Vec<(Refusal, Vec<Vec<u8>>)> {
    use Refusal::*;
    let many = |n: usize| (0..n).map(|i| format!("F{i}: v")).collect::<Vec<_>>().join("\r\n");
    vec![
        (
            LengthAndCoding,
            vec![
                post("Content-Length: 5\r\nTransfer-Encoding: chunked", "0\r\n\r\n"),
                post("Transfer-Encoding: chunked\r\nContent-Length: 5", "0\r\n\r\n"),
                post("transfer-encoding: chunked\r\nCONTENT-LENGTH: 0", "0\r\n\r\n"),
                post("Transfer-Encoding: identity\r\nContent-Length: 5", "abcde"),
                post("Content-Length: 5\r\nX: y\r\nTransfer-Encoding: xchunked", "abcde"),
                raw(
                    b"POST / HTTP/1.0\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\na",
                ),
            ],
        ),
        (
            LengthRepeated,
            vec![
                post("Content-Length: 5\r\nContent-Length: 5", "abcde"),
                post("Content-Length: 5\r\nContent-Length: 6", "abcdef"),
                post("Content-Length: 0\r\nX: y\r\ncontent-length: 5", "abcde"),
            ],
        ),
        (
            LengthValue,
            vec![
                post("Content-Length: 5, 5", "abcde"),
                post("Content-Length: 5,6", "abcde"),
                post("Content-Length: +5", "abcde"),
                post("Content-Length: -5", "abcde"),
                post("Content-Length: 0x5", "abcde"),
                post("Content-Length: 5 ", "abcde"),
                post("Content-Length: 5\t", "abcde"),
                post("Content-Length:  5", "abcde"),
                post("Content-Length:\t5", "abcde"),
                post("Content-Length:", ""),
                post("Content-Length: ", ""),
                post("Content-Length: 5.0", "abcde"),
                post("Content-Length: 5e0", "abcde"),
                post("Content-Length: 1_0", "abcdefghij"),
                post("Content-Length: \"5\"", "abcde"),
                post("Content-Length: 5;", "abcde"),
                post("Content-Length: \u{665}", "abcde"),
                post("Content-Length: 00000000000000000005", "abcde"),
                post("Content-Length: 18446744073709551616", ""),
                post("Content-Length: 18446744073709551615", ""),
                post("Content-Length: 9223372036854775808", ""),
            ],
        ),
        (
            CodingRepeated,
            vec![
                post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "0\r\n\r\n"),
                post("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "0\r\n\r\n"),
                post("Transfer-Encoding: gzip\r\ntransfer-encoding: chunked", "0\r\n\r\n"),
            ],
        ),
        (
            CodingValue,
            vec![
                post("Transfer-Encoding: Chunked", "0\r\n\r\n"),
                post("Transfer-Encoding: CHUNKED", "0\r\n\r\n"),
                post("Transfer-Encoding: xchunked", "0\r\n\r\n"),
                post("Transfer-Encoding: chunkedx", "0\r\n\r\n"),
                post("Transfer-Encoding: chunked, chunked", "0\r\n\r\n"),
                post("Transfer-Encoding: gzip, chunked", "0\r\n\r\n"),
                post("Transfer-Encoding: chunked, identity", "0\r\n\r\n"),
                post("Transfer-Encoding: chunked,", "0\r\n\r\n"),
                post("Transfer-Encoding: ,chunked", "0\r\n\r\n"),
                post("Transfer-Encoding: identity", ""),
                post("Transfer-Encoding: gzip", ""),
                post("Transfer-Encoding:", ""),
                post("Transfer-Encoding:\tchunked", "0\r\n\r\n"),
                post("Transfer-Encoding: chunked\t", "0\r\n\r\n"),
                post("Transfer-Encoding: chunked ", "0\r\n\r\n"),
                post("Transfer-Encoding:  chunked", "0\r\n\r\n"),
                post("Transfer-Encoding: \"chunked\"", "0\r\n\r\n"),
                post("Transfer-Encoding: chunked;q=1", "0\r\n\r\n"),
                post("Transfer-Encoding: chun\u{212a}ed", "0\r\n\r\n"),
            ],
        ),
        (CodingInHttp10, vec![raw(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")]),
        (
            SpaceBeforeColon,
            vec![
                post("Content-Length : 5", "abcde"),
                post("Transfer-Encoding\t: chunked", "0\r\n\r\n"),
                get("X : y"),
                raw(b"GET / HTTP/1.1\r\nHost : a\r\n\r\n"),
            ],
        ),
        (
            LeadingSpace,
            vec![
                raw(b"GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\n\tHost: a\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\n \r\nHost: a\r\n\r\n"),
            ],
        ),
        (
            ObsFold,
            vec![
                get("X: y\r\n z"),
                get("X: y\r\n\tz"),
                post("Transfer-Encoding:\r\n chunked", "0\r\n\r\n"),
                post("Content-Length: 5\r\n ", "abcde"),
            ],
        ),
        (
            BareCr,
            vec![
                get("X: a\rb"),
                get("X: y\rTransfer-Encoding: chunked"),
                get("X: y\r"),
                raw(b"GET / HTTP/1.1\rX\r\nHost: a\r\n\r\n"),
                raw(b"GET /\r HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\n\rHost: a\r\n\r\n"),
            ],
        ),
        (
            BareLf,
            vec![
                raw(b"GET / HTTP/1.1\nHost: a\n\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a\r\n\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a\r\nX: y\nTransfer-Encoding: chunked\r\n\r\n"),
                raw(b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
            ],
        ),
        (
            Nul,
            vec![
                get("X: a\0b"),
                get("X\0: a"),
                raw(b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET / HTTP/1.1\0\r\nHost: a\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n"),
                post("Transfer-Encoding: chunked\0", "0\r\n\r\n"),
            ],
        ),
        (
            ControlByte,
            vec![
                post("Transfer-Encoding: \x0bchunked", "0\r\n\r\n"),
                post("Transfer-Encoding: chunked\x0c", "0\r\n\r\n"),
                get("X: a\x1fb"),
                get("X: a\x7fb"),
                get("X\x0b: a"),
                raw(b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET\x0b/ HTTP/1.1\r\nHost: a\r\n\r\n"),
            ],
        ),
        (
            FieldName,
            vec![
                get(": v"),
                get("no colon"),
                get("X(y): v"),
                get("X\u{e9}: v"),
                get("X@y: v"),
                get("\"X\": v"),
                get("X"),
                get("X Y: v"),
                post("\u{a0}Transfer-Encoding: chunked", "0\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a\r\n\x80: v\r\n\r\n"),
            ],
        ),
        (
            ChunkSize,
            vec![
                chunked("0x5\r\nabcde\r\n0\r\n\r\n"),
                chunked("+5\r\nabcde\r\n0\r\n\r\n"),
                chunked("-5\r\nabcde\r\n0\r\n\r\n"),
                chunked("1_0\r\nabcde\r\n0\r\n\r\n"),
                chunked(" 5\r\nabcde\r\n0\r\n\r\n"),
                chunked("5 \r\nabcde\r\n0\r\n\r\n"),
                chunked("5\t\r\nabcde\r\n0\r\n\r\n"),
                chunked("\r\nabcde\r\n0\r\n\r\n"),
                chunked(";a\r\n0\r\n\r\n"),
                chunked("g\r\nabcde\r\n0\r\n\r\n"),
                chunked("5\nabcde\r\n0\r\n\r\n"),
                chunked("5\rabcde\r\n0\r\n\r\n"),
                chunked("5\r\rabcde\r\n0\r\n\r\n"),
                chunked("ffffffffffffffff\r\nabc"),
                chunked("10000000000000005\r\nabcde"),
                chunked("0000000000000005\r\nabcde\r\n0\r\n\r\n"),
                chunked("5\0\r\nabcde\r\n0\r\n\r\n"),
                chunked("5\r\nabcde\r\n-0\r\n\r\n"),
            ],
        ),
        (
            ChunkExtension,
            vec![
                chunked("5;a\nabcde\r\n0\r\n\r\n"),
                chunked("5;a=\"b\"\r\nabcde\r\n0\r\n\r\n"),
                chunked("5;a=\"\n\"\r\nabcde\r\n0\r\n\r\n"),
                chunked("5;\0\r\nabcde\r\n0\r\n\r\n"),
                chunked("5;a=\u{e9}\r\nabcde\r\n0\r\n\r\n"),
                chunked(&format!("5;{}\r\nabcde\r\n0\r\n\r\n", "a".repeat((16 << 10) + 1))),
                chunked(&format!("1;{}\r\nx\r\n", "a".repeat(1000)).repeat(20)),
            ],
        ),
        (
            ChunkEnd,
            vec![
                chunked("5\r\nabcdef\r\n0\r\n\r\n"),
                chunked("5\r\nabcde0\r\n\r\n"),
                chunked("5\r\nabcde\n0\r\n\r\n"),
                chunked("5\r\nabcde\r0\r\n\r\n"),
                chunked("3\r\nabc\0\r\n0\r\n\r\n"),
            ],
        ),
        (
            Connect,
            vec![
                raw(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n"),
                raw(b"CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"CONNECT a:443 HTTP/1.0\r\n\r\n"),
            ],
        ),
        (TooManyFields, vec![get(&many(100)), chunked(&format!("0\r\n{}\r\n\r\n", many(101)))]),
        (
            HeadTooLarge,
            vec![
                get(&format!("X: {}", "a".repeat(CAPS.bytes))),
                format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(CAPS.bytes)).into_bytes(),
                vec![b'A'; CAPS.bytes],
                chunked(&format!("0\r\nX: {}\r\n\r\n", "a".repeat(CAPS.bytes))),
            ],
        ),
        (
            Fragment,
            vec![
                raw(b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET /# HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET http://a/#b HTTP/1.1\r\nHost: a\r\n\r\n"),
            ],
        ),
        (
            TargetForm,
            vec![
                raw(b"GET a HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET * HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"OPTIONS *a HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET ?a HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n"),
                raw(b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET http:///b HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET http://a?b HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET http:/a HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET \\a HTTP/1.1\r\nHost: a\r\n\r\n"),
            ],
        ),
        (HostMissing, vec![raw(b"GET / HTTP/1.1\r\n\r\n"), raw(b"GET http://a/ HTTP/1.1\r\nX: y\r\n\r\n")]),
        (
            HostRepeated,
            vec![
                get("Host: a"),
                get("host: b"),
                raw(b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"),
                raw(b"GET http://a/ HTTP/1.1\r\nHost: a\r\nX: y\r\nHOST: b\r\n\r\n"),
            ],
        ),
        (
            HostValue,
            vec![
                raw(b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a,b\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a:x\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a:\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a:1:2\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: :80\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: [::g]\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: [::1]a\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a \r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost:\ta\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a?b\r\n\r\n"),
                raw(b"GET / HTTP/1.1\r\nHost: a\x80\r\n\r\n"),
            ],
        ),
        (
            HostMismatch,
            vec![
                raw(b"GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n"),
                raw(b"GET http://a/ HTTP/1.1\r\nHost: a:81\r\n\r\n"),
                raw(b"GET http://a:81/ HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET https://a/ HTTP/1.1\r\nHost: a:80\r\n\r\n"),
                raw(b"GET http://a/ HTTP/1.1\r\nHost:\r\n\r\n"),
                raw(b"GET http://a.b/ HTTP/1.1\r\nHost: a\r\n\r\n"),
            ],
        ),
        (
            MethodCase,
            vec![
                raw(b"get / HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"Get / HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"connect a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"),
            ],
        ),
        (
            ConnectionOption,
            vec![
                get("Connection: a b"),
                get("Connection: \"close\""),
                get("Connection: close;x"),
                get(&format!("Connection: {}", vec!["x"; 17].join(","))),
            ],
        ),
        (
            ConnectionProtected,
            vec![
                get("Connection: host"),
                get("Connection: close, Host"),
                post("Content-Length: 5\r\nConnection: content-length", "abcde"),
                post("Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked", "0\r\n\r\n"),
                get("Connection: authorization"),
                get("Connection: keep-alive, Cookie"),
                get("Connection: X-Forwarded-For"),
                get("Connection: x-forwarded-client-cert"),
                get("Connection: x-sockmesh-reason"),
                get("Connection: x-request-id"),
            ],
        ),
        (
            RequestLine,
            vec![
                raw(b"GET\r\n\r\n"),
                raw(b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET / HTTP/1.1 HTTP/1.0\r\nHost: a\r\n\r\n"),
                raw(b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n"),
                raw(b"GET /\r\n\r\n"),
                raw(b"GET  HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b" GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"G\xc3\x89T / HTTP/1.1\r\nHost: a\r\n\r\n"),
            ],
        ),
        (
            TargetByte,
            vec![
                raw(b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET /\xc0\xaf HTTP/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET /a\tb HTTP/1.1\r\nHost: a\r\n\r\n"),
            ],
        ),
        (
            Version,
            vec![
                raw(b"GET / HTTP/0.9\r\nHost: a\r\n\r\n"),
                raw(b"GET / HTTP/1.2\r\nHost: a\r\n\r\n"),
                raw(b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
                raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
                raw(b"GET / http/1.1\r\nHost: a\r\n\r\n"),
                raw(b"GET / HTTP/01.1\r\nHost: a\r\n\r\n"),
            ],
        ),
        (
            Expectation,
            vec![
                post("Expect: 200-ok\r\nContent-Length: 0", ""),
                post("Expect: 100-continue, x\r\nContent-Length: 0", ""),
                post("Expect: 100-continue\r\nExpect: 100-continue\r\nContent-Length: 0", ""),
            ],
        ),
    ]
}

/// Requests that pass as they are.
fn passed_unchanged() -> Vec<Vec<u8>> {
    vec![
        get("Accept: */*"),
        raw(b"GET /a%2fb%5c%2e%00//./../;x=y?q=%zz HTTP/1.1\r\nHost: a\r\n\r\n"),
        raw(b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n"),
        raw(b"GET /a?b|{c}\"<>^` HTTP/1.1\r\nHost: a\r\n\r\n"),
        raw(b"GET / HTTP/1.0\r\n\r\n"),
        raw(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n"),
        raw(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"),
        raw(b"M-SEARCH / HTTP/1.1\r\nHost: a\r\n\r\n"),
        raw(b"GET http://a/b?c HTTP/1.1\r\nHost: a\r\n\r\n"),
        raw(b"GET HTTP://A:80/ HTTP/1.1\r\nHost: a\r\n\r\n"),
        raw(b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n"),
        raw(b"GET https://a:443/ HTTP/1.1\r\nHost: a\r\n\r\n"),
        raw(b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
        raw(b"GET / HTTP/1.1\r\nHost:a\r\n\r\n"),
        raw(b"GET / HTTP/1.1\r\nHost: my_app.ns:8080\r\n\r\n"),
        raw(b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n"),
        raw(b"GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n"),
        get("my_header: v"),
        get("Empty:"),
        get("Spaces:  \t inner  value \t "),
        raw(b"GET / HTTP/1.1\r\nHost: a\r\nLatin: \xe9\xff\r\n\r\n"),
        get("Cookie: a=b; c=\"d\""),
        post("Content-Length: 0", ""),
        post("Content-Length: 5", "abcde"),
        post("content-length:5", "abcde"),
        post("Content-Length: 0005", "abcde"),
        raw(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"),
        raw(b"HEAD / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx"),
        raw(b"DELETE / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"),
        chunked("0\r\n\r\n"),
        chunked("000\r\n\r\n"),
        chunked("5\r\nabcde\r\n0\r\n\r\n"),
        chunked("A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n"),
        chunked("000000000000005\r\nabcde\r\n0\r\n\r\n"),
        chunked("5;a=b;c\r\nabcde\r\n0;x\r\n\r\n"),
        chunked("5;\r\nabcde\r\n0\r\n\r\n"),
        chunked("5\r\n\r\n0\r\n\r\n0\r\n\r\n"),
        chunked("0\r\nX-Checksum: 1\r\nGrpc-Status: 0\r\n\r\n"),
        post("Expect: 100-continue\r\nContent-Length: 1", "x"),
        raw(b"POST / HTTP/1.0\r\nContent-Length: 1\r\n\r\nx"),
        post("Trailer: X\r\nTransfer-Encoding: chunked", "0\r\nX: y\r\n\r\n"),
    ]
}

/// Requests and what is passed on of them.
fn passed_changed() -> Vec<(Vec<u8>, Vec<u8>)> {
    let plain = || raw(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    vec![
        (get("Connection: close"), plain()),
        (get("Connection: keep-alive\r\nKeep-Alive: timeout=5"), plain()),
        (get("Proxy-Connection: keep-alive"), plain()),
        (get("Connection: X-Hop, , close\r\nX-Hop: 1\r\nx-hop: 2"), plain()),
        (get("X-Hop: 1\r\nConnection: x-hop"), plain()),
        (get("TE: gzip"), plain()),
        (get("TE: trailers, gzip"), plain()),
        (get("TE: trailers"), get("TE: trailers\r\nconnection: te")),
        (get("Connection: TE\r\nTE: trailers"), get("TE: trailers\r\nconnection: te")),
        (get("Upgrade: websocket"), plain()),
        (
            get("Upgrade: websocket\r\nConnection: keep-alive, Upgrade"),
            get("Upgrade: websocket\r\nconnection: upgrade"),
        ),
        (get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk"), plain()),
        (get("Connection: upgrade\r\nUpgrade: websocket, H2C"), plain()),
        (get("HTTP2-Settings: AAMAAABk"), plain()),
        (
            raw(b"GET / HTTP/1.0\r\nConnection: upgrade, keep-alive\r\nUpgrade: websocket\r\n\r\n"),
            raw(b"GET / HTTP/1.0\r\n\r\n"),
        ),
        (raw(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"), plain()),
        (
            chunked(
                "0\r\nA: 1\r\nContent-Length: 5\r\ntransfer-encoding: chunked\r\nHost: b\r\nAuthorization: x\r\nB: 2\r\n\r\n",
            ),
            chunked("0\r\nA: 1\r\nB: 2\r\n\r\n"),
        ),
        (chunked("1\r\nx\r\n0\r\nHost: b\r\n\r\n"), chunked("1\r\nx\r\n0\r\n\r\n")),
        (chunked("0\r\nX-Forwarded-For: 1\r\nCookie: a\r\nX: y\r\n\r\n"), chunked("0\r\nX: y\r\n\r\n")),
    ]
}

#[test]
fn ambiguous_and_invalid_requests_are_refused_by_the_rule_that_they_break() {
    let table = refused();
    let rows: usize = table.iter().map(|(_, forms)| forms.len()).sum();
    assert!(rows >= 120, "{rows}");
    for (refusal, forms) in table {
        for raw in forms {
            let got = verdict(Message::Request, [&raw[..]]);
            let name = String::from_utf8_lossy(&raw[..raw.len().min(300)]).into_owned();
            assert_eq!(got, Verdict::Refused(refusal), "{name:?}");
        }
    }
}

#[test]
fn unambiguous_requests_pass_byte_for_byte() {
    for raw in passed_unchanged() {
        let got = verdict(Message::Request, [&raw[..]]);
        let name = String::from_utf8_lossy(&raw).into_owned();
        assert_eq!(got, Verdict::Passed { forwarded: raw, rest: Vec::new() }, "{name:?}");
    }
}

#[test]
fn only_what_stays_on_this_hop_is_taken_out() {
    for (raw, forwarded) in passed_changed() {
        let got = verdict(Message::Request, [&raw[..]]);
        let name = String::from_utf8_lossy(&raw).into_owned();
        assert_eq!(got, Verdict::Passed { forwarded, rest: Vec::new() }, "{name:?}");
    }
}

#[test]
fn bytes_behind_a_request_are_left_for_the_next() {
    let next = b"GET /next HTTP/1.1\r\n";
    for first in passed_unchanged() {
        let raw = [&first[..], next].concat();
        let got = verdict(Message::Request, [&raw[..]]);
        assert_eq!(got, Verdict::Passed { forwarded: first, rest: next.to_vec() });
    }
}

#[test]
fn the_verdict_does_not_depend_on_how_the_bytes_arrive() {
    let refused = refused().into_iter().flat_map(|(_, forms)| forms);
    let changed = passed_changed().into_iter().map(|(raw, _)| raw);
    // The large rows only differ in size; every boundary of them would take minutes.
    for raw in refused.chain(passed_unchanged()).chain(changed).filter(|raw| raw.len() < 4096) {
        assert_same_in_pieces(Message::Request, &raw);
    }
}

#[test]
fn what_was_passed_on_passes_again_unchanged() {
    let changed = passed_changed().into_iter().map(|(_, forwarded)| forwarded);
    for raw in passed_unchanged().into_iter().chain(changed) {
        let Verdict::Passed { forwarded, .. } = verdict(Message::Request, [&raw[..]]) else {
            panic!("{:?}", String::from_utf8_lossy(&raw));
        };
        // But for `connection`, which belongs to each hop and comes out in another place.
        let mut lines: Vec<_> = forwarded.split(|b| *b == b'\n').collect();
        let mut original: Vec<_> = raw.split(|b| *b == b'\n').collect();
        lines.sort_unstable();
        original.sort_unstable();
        assert_eq!(lines, original);
    }
}

#[test]
fn an_unfinished_request_is_not_yet_one() {
    for raw in [
        &b""[..],
        b"G",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n",
    ] {
        assert_eq!(verdict(Message::Request, [raw]), Verdict::Incomplete);
    }
}

#[test]
fn a_head_of_the_largest_size_passes() {
    let shell = get("X: ").len();
    let raw = get(&format!("X: {}", "a".repeat(CAPS.bytes - shell)));
    assert_eq!(raw.len(), CAPS.bytes);
    assert!(matches!(verdict(Message::Request, [&raw[..]]), Verdict::Passed { .. }));
}
