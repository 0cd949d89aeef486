//! Properties of the gate over generated messages.

use proptest::prelude::*;

use super::super::gate::Refusal;
use super::super::looks_like_request;
use super::verdict::{Message, RESPONSE, Verdict, verdict};
use crate::worker::http::Sniff;

/// Pieces that messages, valid or nearly so, are made of.
fn fragments() -> impl Strategy<Value = Vec<u8>> {
    let fragment = prop_oneof![
        8 => prop::sample::select(vec![
            &b"GET / HTTP/1.1\r\n"[..], b"POST /x HTTP/1.1\r\n", b"POST /x HTTP/1.0\r\n", b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"Host: a\r\n", b"Content-Length: 5\r\n",
            b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close, X\r\n", b"X: y\r\n",
            b"Trailer: X\r\n", b"\r\n", b"5\r\nabcde\r\n", b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\nHost: b\r\n\r\n",
            b"abcde", b"1;a=b\r\nx\r\n",
        ]).prop_map(<[u8]>::to_vec),
        1 => prop::sample::select(vec![&b"\r"[..], b"\n", b"\0", b" ", b"\t", b":", b";", b"\x0b", b"\xff"])
            .prop_map(<[u8]>::to_vec),
        1 => prop::collection::vec(any::<u8>(), 1..4),
    ];
    prop::collection::vec(fragment, 1..12).prop_map(|pieces| pieces.concat())
}

/// A request that is likely to pass.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let body = prop_oneof![
        Just("\r\n".to_owned()),
        "[a-z]{0,20}".prop_map(|b| format!("Content-Length: {}\r\n\r\n{b}", b.len())),
        prop::collection::vec("[a-z]{1,20}", 0..4).prop_map(|chunks| {
            let chunks: String = chunks.iter().map(|c| format!("{:x}\r\n{c}\r\n", c.len())).collect();
            format!("Transfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n")
        }),
    ];
    ("[A-Z]{1,8}", "/[a-z%./]{0,10}", "([A-Za-z_-]{1,10}: [ -~]{0,20}\r\n){0,4}", body).prop_map(
        |(method, path, fields, body)| {
            format!("{method} {path} HTTP/1.1\r\nHost: a\r\n{fields}{body}").into_bytes()
        },
    )
}

fn cut(raw: &[u8], cuts: &[prop::sample::Index]) -> Vec<Vec<u8>> {
    let mut at: Vec<_> = cuts.iter().map(|c| c.index(raw.len() + 1)).collect();
    at.sort_unstable();
    let starts = std::iter::once(0).chain(at.iter().copied());
    let ends = at.iter().copied().chain(std::iter::once(raw.len()));
    starts.zip(ends).map(|(start, end)| raw[start..end].to_vec()).collect()
}

proptest! {
    #[test]
    fn any_bytes_get_the_same_verdict_in_any_pieces(
        raw in fragments(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let pieces = cut(&raw, &cuts);
        for message in [Message::Request, RESPONSE] {
            let whole = verdict(message, [&raw[..]]);
            prop_assert_eq!(verdict(message, pieces.iter().map(Vec::as_slice)), whole);
        }
    }

    #[test]
    fn requests_in_order_pass_and_what_passed_passes_again(raw in request()) {
        match verdict(Message::Request, [&raw[..]]) {
            Verdict::Passed { forwarded, rest } => {
                prop_assert!(rest.is_empty());
                prop_assert_eq!(
                    verdict(Message::Request, [&forwarded[..]]),
                    Verdict::Passed { forwarded: forwarded.clone(), rest }
                );
            }
            // Names and methods are drawn at random: some draw one that means something.
            Verdict::Refused(refusal) => prop_assert!(
                matches!(refusal, Refusal::Connect | Refusal::Expectation | Refusal::HostRepeated),
                "{:?}", refusal
            ),
            Verdict::Incomplete => prop_assert!(false, "a complete request was not seen as one"),
        }
    }

    #[test]
    fn a_request_looks_like_one_at_every_length(raw in request()) {
        for n in 0..raw.len() {
            let seen = looks_like_request(&raw[..n]);
            if raw.starts_with(b"CONNECT ") {
                continue;
            }
            prop_assert_ne!(seen, Sniff::No);
        }
        prop_assert_eq!(looks_like_request(&raw), Sniff::Yes);
    }
}

#[test]
fn other_protocols_do_not_look_like_http() {
    for first in [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
        b"CONNECT a:443 HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00",
        b"SET key value\r\n",
        b"KEYS *\r\n",
        b"PING\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"get / HTTP/1.1\r\n",
        b"USER guest 0 * :Real\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"\0\0\0\x08\x04\xd2\x16\x2f",
        b" GET / HTTP/1.1\r\n",
        b"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        b"GET htp://a/",
    ] {
        assert_eq!(looks_like_request(first), Sniff::No, "{:?}", String::from_utf8_lossy(first));
    }
}

#[test]
fn a_few_bytes_may_still_become_a_request() {
    for first in [&b""[..], b"G", b"GET", b"GET ", b"GET http:/", b"OPTIONS ", b"PROPFIND"] {
        assert_eq!(looks_like_request(first), Sniff::NeedMore);
    }
    for first in [&b"GET /"[..], b"OPTIONS *", b"GET HTTPS://a", b"M-SEARCH /"] {
        assert_eq!(looks_like_request(first), Sniff::Yes);
    }
}
