//! The table of responses.

use super::super::gate::Refusal;
use super::verdict::{Message, RESPONSE, Verdict, assert_same_in_pieces, verdict};

const TO_HEAD: Message = Message::Response { is_head: true, upgrade: false };
const TO_UPGRADE: Message = Message::Response { is_head: false, upgrade: true };

fn refused() -> Vec<(Refusal, Message, &'static [u8])> {
    use Refusal::*;
    vec![
        (
            LengthAndCoding,
            RESPONSE,
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        (
            LengthAndCoding,
            RESPONSE,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        ),
        (
            LengthAndCoding,
            TO_HEAD,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        ),
        (LengthRepeated, RESPONSE, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na"),
        (LengthRepeated, RESPONSE, b"HTTP/1.1 304 NM\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
        (LengthValue, RESPONSE, b"HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\na"),
        (LengthValue, RESPONSE, b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"),
        (LengthValue, RESPONSE, b"HTTP/1.1 200 OK\r\nContent-Length: 0x1\r\n\r\n"),
        (
            CodingRepeated,
            RESPONSE,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        (CodingValue, RESPONSE, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        (CodingValue, RESPONSE, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n"),
        (CodingInHttp10, RESPONSE, b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (ObsFold, RESPONSE, b"HTTP/1.1 200 OK\r\nX: y\r\n z\r\n\r\n"),
        (LeadingSpace, RESPONSE, b"HTTP/1.1 200 OK\r\n X: y\r\n\r\n"),
        (SpaceBeforeColon, RESPONSE, b"HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\na"),
        (BareLf, RESPONSE, b"HTTP/1.1 200 OK\nContent-Length: 1\n\na"),
        (BareCr, RESPONSE, b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n"),
        (BareCr, RESPONSE, b"HTTP/1.1 200 O\rK\r\n\r\n"),
        (Nul, RESPONSE, b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n"),
        (FieldName, RESPONSE, b"HTTP/1.1 200 OK\r\nX\r\n\r\n"),
        (ChunkSize, RESPONSE, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        (ChunkEnd, RESPONSE, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n"),
        (
            UpgradeUnasked,
            RESPONSE,
            b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        ),
        (UpgradeUnasked, TO_UPGRADE, b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\n\r\n"),
        (UpgradeUnasked, TO_UPGRADE, b"HTTP/1.0 101 Switching\r\nUpgrade: websocket\r\n\r\n"),
        (NotHttp, RESPONSE, b"<html>hello</html>"),
        (NotHttp, RESPONSE, b"HTTP/0.9 200 OK\r\n\r\n"),
        (NotHttp, RESPONSE, b"HTTP/2.0 200 OK\r\n\r\n"),
        (NotHttp, RESPONSE, b"HTTP/1.2 200 OK\r\n\r\n"),
        (NotHttp, RESPONSE, b"\r\nHTTP/1.1 200 OK\r\n\r\n"),
        (NotHttp, RESPONSE, b"http/1.1 200 OK\r\n\r\n"),
        (StatusLine, RESPONSE, b"HTTP/1.1 20 OK\r\n\r\n"),
        (StatusLine, RESPONSE, b"HTTP/1.1 2000 OK\r\n\r\n"),
        (StatusLine, RESPONSE, b"HTTP/1.1 099 OK\r\n\r\n"),
        (StatusLine, RESPONSE, b"HTTP/1.1  200 OK\r\n\r\n"),
        (StatusLine, RESPONSE, b"HTTP/1.1 +20 OK\r\n\r\n"),
        (StatusLine, RESPONSE, b"HTTP/1.1\r\n\r\n"),
        (
            ConnectionProtected,
            RESPONSE,
            b"HTTP/1.1 200 OK\r\nConnection: set-cookie\r\nContent-Length: 0\r\n\r\n",
        ),
        (
            ConnectionProtected,
            RESPONSE,
            b"HTTP/1.1 200 OK\r\nConnection: content-length\r\nContent-Length: 0\r\n\r\n",
        ),
    ]
}

/// A response, what the client gets, and what is left of the bytes.
type Passed = (Message, &'static [u8], &'static [u8], &'static [u8]);

fn passed() -> Vec<Passed> {
    vec![
        (RESPONSE, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b""),
        (RESPONSE, b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", b""),
        (RESPONSE, b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", b""),
        (RESPONSE, b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", b""),
        (RESPONSE, b"HTTP/1.1 200 OK\r\nContent-Length:  1 \r\n\r\na", b"HTTP/1.1 200 OK\r\nContent-Length:  1 \r\n\r\na", b""),
        (
            RESPONSE,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
            b"",
        ),
        (
            RESPONSE,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nSet-Cookie: a\r\nX: y\r\n\r\nextra",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n\r\n",
            b"extra",
        ),
        (TO_HEAD, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b""),
        (TO_HEAD, b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b""),
        (
            TO_HEAD,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"",
        ),
        (RESPONSE, b"HTTP/1.1 304 NM\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 304 NM\r\nContent-Length: 5\r\n\r\n", b""),
        (RESPONSE, b"HTTP/1.1 204 NC\r\n\r\n", b"HTTP/1.1 204 NC\r\n\r\n", b""),
        (RESPONSE, b"HTTP/1.1 204 NC\r\nContent-Length: 5\r\n\r\nabcde", b"HTTP/1.1 204 NC\r\n\r\n", b"abcde"),
        (RESPONSE, b"HTTP/1.1 204 NC\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 204 NC\r\n\r\n", b""),
        (RESPONSE, b"HTTP/1.1 103 EH\r\nLink: a\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 103 EH\r\nLink: a\r\n\r\n", b""),
        (
            RESPONSE,
            b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nKeep-Alive: timeout=5\r\nX-Hop: 1\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            b"",
        ),
        (
            TO_UPGRADE,
            b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nframes",
            b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nconnection: upgrade\r\n\r\n",
            b"frames",
        ),
        (
            RESPONSE,
            b"HTTP/1.1 426 UR\r\nUpgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 426 UR\r\nUpgrade: websocket\r\nContent-Length: 0\r\nconnection: upgrade\r\n\r\n",
            b"",
        ),
        (
            RESPONSE,
            b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            b"",
        ),
    ]
}

#[test]
fn ambiguous_and_invalid_responses_are_refused_by_the_rule_that_they_break() {
    for (refusal, message, raw) in refused() {
        let got = verdict(message, [raw]);
        assert_eq!(got, Verdict::Refused(refusal), "{:?}", String::from_utf8_lossy(raw));
    }
}

#[test]
fn other_responses_pass_with_the_version_and_connection_of_this_hop() {
    for (message, raw, forwarded, rest) in passed() {
        let got = verdict(message, [raw]);
        let expected = Verdict::Passed { forwarded: forwarded.to_vec(), rest: rest.to_vec() };
        assert_eq!(got, expected, "{:?}", String::from_utf8_lossy(raw));
    }
}

#[test]
fn a_response_without_length_goes_on_until_the_connection_closes() {
    for raw in [&b"HTTP/1.0 200 OK\r\n\r\nabc"[..], b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc"] {
        assert_eq!(verdict(RESPONSE, [raw]), Verdict::Incomplete);
    }
}

#[test]
fn the_verdict_does_not_depend_on_how_the_bytes_arrive() {
    for (_, message, raw) in refused() {
        assert_same_in_pieces(message, raw);
    }
    for (message, raw, ..) in passed() {
        assert_same_in_pieces(message, raw);
    }
}
