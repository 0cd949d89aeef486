//! Exchanges that go wrong, and what each side is told.

use std::time::Duration;

use super::super::super::{HttpLimits, LocalReply};
use super::super::ConnectionEnd;
use super::pipe::Pipe;
use super::world::{World, settle, with_limits, world};
use crate::worker::reason::Reason;

const GET: &str = "GET / HTTP/1.1\r\nHost: web\r\n\r\n";
const POST: &str = "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\n\r\nhello";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

fn reset(mut stream: Pipe) {
    crate::worker::io::Transport::abort(&mut stream);
}

fn reply(status: &str, reason: &str, close: bool, message: &str) -> String {
    let close = if close { "connection: close\r\n" } else { "" };
    let length = message.len() + 1;
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {length}\r\n\
         x-sockmesh-reason: {reason}\r\n{close}\r\n{message}\n"
    )
}

#[test]
fn a_denied_request_is_answered_and_the_connection_stays() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.script.denied.set(Some(("/no", false)));
        w.client.send("GET /no HTTP/1.1\r\nHost: web\r\n\r\n").await;
        w.client.expect(reply("403 Forbidden", "DENY", false, "no")).await;
        w.client.send("POST /no HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\n\r\nhello").await;
        w.client.expect(reply("403 Forbidden", "DENY", false, "no")).await;
        w.client.send(GET).await;
        server.expect(GET).await;
    });
}

#[test]
fn a_denied_head_request_gets_no_body() {
    world(|mut w| async move {
        w.script.denied.set(Some(("/no", false)));
        w.client.send("HEAD /no HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await;
        let got = w.client.rest().await;
        assert!(got.ends_with("connection: close\r\n\r\n"), "{got:?}");
    });
}

#[test]
fn a_request_denied_before_its_body_came_ends_the_connection() {
    world(|mut w| async move {
        w.script.denied.set(Some(("/no", false)));
        w.client.send("POST /no HTTP/1.1\r\nHost: web\r\nContent-Length: 100\r\n\r\nhello").await;
        w.client.expect(reply("403 Forbidden", "DENY", true, "no")).await;
        w.client.send(GET).await;
        w.client.end().await;
        assert_eq!(w.ended().await, ConnectionEnd::Closed);
        assert_eq!(w.events(), ["begin POST /no web", "refused /no"], "the body was not taken for a request");
    });
}

#[test]
fn a_reply_that_resets_resets() {
    world(|mut w| async move {
        w.script.denied.set(Some(("/no", true)));
        w.client.send("GET /no HTTP/1.1\r\nHost: web\r\n\r\n").await;
        w.client.expect_reset().await;
        assert_eq!(w.ended().await, ConnectionEnd::Aborted);
    });
}

#[test]
fn a_request_that_the_gate_refuses_is_told_the_rule_and_nothing_else_is_served() {
    world(|mut w| async move {
        w.client.send(["GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", GET].concat()).await;
        w.client.expect(reply("400 Bad Request", "DPE", true, "NORM-8: more than one Host")).await;
        w.client.end().await;
        assert_eq!(w.client.rest().await, "");
        assert_eq!(w.ended().await, ConnectionEnd::Refused);
        assert_eq!(w.events(), ["refused -"]);
    });
}

#[test]
fn a_bad_chunk_that_came_with_the_head_never_reaches_a_server() {
    world(|mut w| async move {
        w.client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n").await;
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
        assert_eq!(w.events(), ["refused -"]);
    });
}

#[test]
fn a_bad_chunk_later_is_told_and_the_server_sees_a_reset() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n";
        w.client.send(head).await;
        server.expect(head).await;
        w.client.send("zz\r\n").await;
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
        server.expect_reset().await;
        assert_eq!(w.script.flags(), "DPE");
    });
}

#[test]
fn a_head_that_does_not_come_in_time_is_answered_408() {
    world(|mut w| async move {
        w.client.send("GET / HTTP/1.1\r\n").await;
        let begun = tokio::time::Instant::now();
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{head}");
        assert_eq!(begun.elapsed(), HttpLimits::default().header_timeout);
        assert_eq!(w.script.flags(), "RHT");
    });
}

#[test]
fn no_connection_is_answered_with_the_reply_that_came_with_it() {
    world(|mut w| async move {
        w.no_upstream(LocalReply::unavailable(Reason::NoHealthyUpstream, "web has no ready endpoint"));
        w.client.send(GET).await;
        w.client.expect(reply("503 Service Unavailable", "UH", false, "web has no ready endpoint")).await;
        let mut server = w.upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
    });
}

#[test]
fn an_idle_connection_that_its_server_closed_is_told_from_a_failure() {
    world(|mut w| async move {
        drop(w.reused_upstream());
        let mut second = w.upstream();
        w.script.retries.set(1);
        w.client.send(POST).await;
        second.expect(POST).await;
        second.send(OK).await;
        w.client.expect(OK).await;
        assert_eq!(w.events()[1], "Reset { reused: true, request_sent: false } replay=true");
    });
}

#[test]
fn a_reused_connection_that_closes_on_a_request_is_told_from_a_failure() {
    world(|mut w| async move {
        let mut first = w.reused_upstream();
        let mut second = w.upstream_with_preface("PREFACE");
        w.script.retries.set(1);
        w.client.send(POST).await;
        first.expect(POST).await;
        drop(first);
        second.expect("PREFACE").await;
        second.expect(POST).await;
        second.send(OK).await;
        w.client.expect(OK).await;
        assert_eq!(w.events()[1], "Reset { reused: true, request_sent: true } replay=true");
    });
}

#[test]
fn a_tunnel_that_the_far_side_did_not_look_at_is_told_from_a_reset() {
    world(|mut w| async move {
        let (mut first, mut second) = (w.upstream(), w.upstream());
        w.script.retries.set(1);
        w.client.send(POST).await;
        first.expect(POST).await;
        first.refuse();
        second.expect(POST).await;
        second.send(OK).await;
        w.client.expect(OK).await;
        assert_eq!(w.events()[1], "Refused replay=true");
    });
}

#[test]
fn a_retry_sends_what_was_held_and_then_the_rest() {
    world(|mut w| async move {
        let (mut first, mut second) = (w.upstream(), w.upstream());
        w.script.retries.set(1);
        let start = "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
        w.client.send(start).await;
        first.expect(start).await;
        w.client.send("5\r\nworld\r\n").await;
        first.expect("5\r\nworld\r\n").await;
        reset(first);
        second.expect([start, "5\r\nworld\r\n"].concat()).await;
        w.client.send("0\r\n\r\n").await;
        second.expect("0\r\n\r\n").await;
        second.send(OK).await;
        w.client.expect(OK).await;
        assert_eq!(w.events()[1], "Reset { reused: false, request_sent: true } replay=true");
        settle().await;
        assert_eq!(w.script.last_outcome().request_bytes, (start.len() + 10 + 5) as u64);
    });
}

#[test]
fn a_body_beyond_the_replay_cap_cannot_be_sent_again() {
    let limits = HttpLimits { replay_cap: 8, ..HttpLimits::default() };
    with_limits(limits, |mut w| async move {
        let mut server = w.upstream();
        w.script.retries.set(1);
        w.client.send("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 20\r\n\r\n0123").await;
        server.head().await;
        server.expect("0123").await;
        w.client.send("456789").await;
        server.expect("456789").await;
        reset(server);
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
        assert_eq!(w.events()[1], "Reset { reused: false, request_sent: true } replay=false");
    });
}

#[test]
fn a_503_is_tried_again_and_its_connection_kept() {
    world(|mut w| async move {
        let (mut first, mut second) = (w.upstream(), w.upstream());
        w.script.retries.set(1);
        w.client.send(POST).await;
        first.expect(POST).await;
        first.send("HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy").await;
        second.expect(POST).await;
        second.send(OK).await;
        w.client.expect(OK).await;
        settle().await;
        assert_eq!(w.script.idle_connections(), 2);
    });
}

#[test]
fn a_503_with_its_body_to_come_is_tried_again_and_its_connection_reset() {
    world(|mut w| async move {
        let (mut first, mut second) = (w.upstream(), w.upstream());
        w.script.retries.set(1);
        w.client.send(GET).await;
        first.expect(GET).await;
        first.send("HTTP/1.1 503 Busy\r\nContent-Length: 4000\r\n\r\nbusy").await;
        second.expect(GET).await;
        first.expect_reset().await;
    });
}

/// Sends a GET and has the server answer with `answer`.
async fn answered(w: &mut World, answer: &str) -> Pipe {
    let mut server = w.upstream();
    w.client.send(GET).await;
    server.expect(GET).await;
    server.send(answer).await;
    settle().await;
    server
}

#[test]
fn a_server_that_dies_within_its_answer_resets_the_client() {
    for (answer, dies_by_reset, flag) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhal", false, "UC"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhal", true, "UR"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhal", false, "UC"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", false, "UC"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", false, "UC"),
        ("HTTP/1.1 200 OK\r\n\r\nhal", true, "UR"),
    ] {
        world(|mut w| async move {
            let server = answered(&mut w, answer).await;
            if dies_by_reset {
                reset(server)
            } else {
                drop(server)
            }
            w.client.expect_reset().await;
            assert_eq!(w.ended().await, ConnectionEnd::Aborted);
            assert_eq!(w.script.flags(), flag, "{answer:?}");
            assert_eq!(w.script.last_outcome().status, 200);
        });
    }
}

#[test]
fn an_answer_whose_framing_breaks_resets_both_sides() {
    for breaks in ["5\r\nhello!\r\n", "zz\r\n"] {
        world(|mut w| async move {
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n";
            let mut server = answered(&mut w, head).await;
            server.send(breaks).await;
            w.client.expect_reset().await;
            server.expect_reset().await;
            assert_eq!(w.script.flags(), "UPE");
        });
    }
}

#[test]
fn an_invalid_answer_is_a_502_and_its_connection_is_reset() {
    let storm = "HTTP/1.1 102 Processing\r\n\r\n".repeat(33);
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: y\r\n folded\r\n\r\n",
        "hello",
        &storm,
    ] {
        let answer = answer.to_owned();
        world(|mut w| async move {
            let mut server = answered(&mut w, &answer).await;
            let mut head = w.client.head().await;
            while head.starts_with("HTTP/1.1 102 ") {
                head = w.client.head().await;
            }
            assert!(head.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{head}");
            assert!(head.contains("x-sockmesh-reason: UPE\r\n"), "{head}");
            server.expect_reset().await;
            assert_eq!(w.script.idle_connections(), 0);
        });
    }
}

#[test]
fn an_answer_that_was_there_before_the_request_is_not_taken_for_its_own() {
    world(|mut w| async move {
        let _stale = w.upstream_with_bytes_read(true, OK);
        let mut second = w.upstream();
        w.script.retries.set(1);
        w.client.send(GET).await;
        second.expect(GET).await;
        assert_eq!(w.events()[1], "Reset { reused: true, request_sent: false } replay=true");
    });
    world(|mut w| async move {
        let _hasty = w.upstream_with_bytes_read(false, OK);
        w.client.send(GET).await;
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 502 "), "{head}");
    });
}

#[test]
fn a_server_that_ends_within_its_head_is_a_failure_even_when_reused() {
    world(|mut w| async move {
        let mut server = w.reused_upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
        server.send("HTTP/1.1 200 OK\r\n").await;
        settle().await;
        drop(server);
        w.client.head().await;
        assert_eq!(w.events()[1], "Reset { reused: false, request_sent: true } replay=true");
    });
}

#[test]
fn a_client_that_resets_while_it_waits_cancels_its_request() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
        settle().await;
        let World { client, script, .. } = w;
        reset(client);
        server.expect_reset().await;
        settle().await;
        assert_eq!(script.flags(), "DC");
        assert_eq!(script.last_outcome().status, 0);
    });
}

#[test]
fn a_client_that_resets_while_a_connection_is_made_cancels_its_request() {
    world(|mut w| async move {
        w.client.send(GET).await;
        settle().await;
        let World { client, script, .. } = w;
        reset(client);
        settle().await;
        assert_eq!(script.flags(), "DC");
    });
}

#[test]
fn a_client_that_goes_within_its_request_cancels_it() {
    for by_reset in [false, true] {
        world(|mut w| async move {
            let mut server = w.upstream();
            w.client.send("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 100\r\n\r\nhello").await;
            server.head().await;
            if by_reset {
                reset(w.client)
            } else {
                w.client.end().await
            }
            server.expect_reset().await;
            settle().await;
            assert_eq!(w.script.flags(), "DC");
        });
    }
}

#[test]
fn a_client_that_goes_within_its_answer_cancels_it() {
    world(|mut w| async move {
        let mut server = answered(&mut w, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhal").await;
        let World { client, script, .. } = w;
        reset(client);
        server.expect_reset().await;
        settle().await;
        assert_eq!(script.flags(), "DC");
        assert_eq!(script.last_outcome().status, 200);
    });
}

#[test]
fn a_server_that_does_not_answer_is_given_up_after_the_per_try_timeout() {
    world(|mut w| async move {
        let (mut first, mut second) = (w.upstream(), w.upstream());
        w.script.per_try.set(Some(Duration::from_secs(2)));
        w.script.retries.set(1);
        let begun = tokio::time::Instant::now();
        w.client.send(GET).await;
        second.expect(GET).await;
        assert_eq!(begun.elapsed().as_secs(), 2);
        first.expect_reset().await;
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 504 "), "{head}");
        assert_eq!(begun.elapsed().as_secs(), 4);
        assert_eq!(w.script.flags(), "UT");
    });
}

#[test]
fn the_per_try_timeout_begins_with_the_end_of_the_request() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.script.per_try.set(Some(Duration::from_secs(2)));
        let (start, end) = POST.split_at(POST.len() - 2);
        w.client.send(start).await;
        server.expect(start).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        w.client.send(end).await;
        server.expect(end).await;
        server.send(OK).await;
        w.client.expect(OK).await;
    });
}

#[test]
fn an_exchange_that_passes_its_deadline_is_a_504_before_the_answer_and_a_reset_within_it() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.script.timeout.set(Some(Duration::from_secs(5)));
        let begun = tokio::time::Instant::now();
        w.client.send(GET).await;
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 504 Gateway Timeout\r\n"), "{head}");
        assert_eq!((begun.elapsed().as_secs(), w.script.flags().as_str()), (5, "DT"));
        server.expect_reset().await;
    });
    world(|mut w| async move {
        w.script.timeout.set(Some(Duration::from_secs(5)));
        let mut server = answered(&mut w, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhal").await;
        w.client.expect_reset().await;
        server.expect_reset().await;
        assert_eq!(w.script.flags(), "DT");
    });
    world(|mut w| async move {
        w.script.timeout.set(Some(Duration::from_secs(5)));
        w.client.send(GET).await;
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 504 Gateway Timeout\r\n"), "no connection came: {head}");
    });
}

#[test]
fn a_stream_on_which_nothing_moves_is_given_up() {
    let idle = HttpLimits::default().stream_idle.expect("there is one").as_secs();
    world(|mut w| async move {
        let mut server = answered(&mut w, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhal").await;
        let begun = tokio::time::Instant::now();
        tokio::time::sleep(Duration::from_secs(idle - 1)).await;
        server.send("l").await;
        w.client.expect_reset().await;
        assert_eq!(begun.elapsed().as_secs(), idle - 1 + idle);
        assert_eq!(w.script.flags(), "SI");
    });
    world(|mut w| async move {
        let _server = w.upstream();
        w.client.send("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 100\r\n\r\nhello").await;
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 408 "), "{head}");
    });
    world(|mut w| async move {
        let _server = w.upstream();
        w.client.send(GET).await;
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 504 "), "{head}");
        assert_eq!(w.script.flags(), "SI");
    });
}
