//! Exchanges that go well.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::super::super::{HeaderEdits, HttpLimits};
use super::super::ConnectionEnd;
use super::world::{CAPACITY, settle, with_limits, world};

const GET: &str = "GET /a?b HTTP/1.1\r\nHost: web\r\nAccept: */*\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const CHUNKED: &str = "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n";

#[test]
fn a_request_and_its_answer_pass_as_they_came() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
        server.send(OK).await;
        w.client.expect(OK).await;
        settle().await;
        assert_eq!(w.events(), ["begin GET /a?b web", "response 200", "release", "finish 200 -"]);
        let outcome = w.script.last_outcome();
        assert_eq!((outcome.request_bytes, outcome.response_bytes), (GET.len() as u64, OK.len() as u64));
    });
}

#[test]
fn a_connection_serves_many_requests_over_one_upstream_connection() {
    world(|mut w| async move {
        let mut server = w.upstream();
        for _ in 0..5 {
            w.client.send(GET).await;
            server.expect(GET).await;
            server.send(OK).await;
            w.client.expect(OK).await;
        }
        settle().await;
        assert_eq!(w.script.idle_connections(), 1);
        w.client.end().await;
        assert_eq!(w.ended().await, ConnectionEnd::ClientClosed);
    });
}

#[test]
fn head_and_small_body_go_out_in_one_write_each_way() {
    world(|mut w| async move {
        let mut server = w.upstream_with_preface("PREFACE");
        let post = "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\nabc";
        w.client.send(post).await;
        server.expect("PREFACE").await;
        server.expect(post).await;
        assert_eq!(server.writes_seen(), 1);
        server.send(OK).await;
        w.client.expect(OK).await;
        assert_eq!(w.client.writes_seen(), 1);
    });
}

#[test]
fn a_large_body_that_has_come_is_passed_on_in_few_large_writes() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let body = vec![b'x'; 12 * HttpLimits::default().read_buffer];
        let put = format!("PUT / HTTP/1.1\r\nHost: web\r\nContent-Length: {}\r\n\r\n", body.len());
        w.client.send([put.as_bytes(), &body].concat()).await;
        server.expect(&put).await;
        server.expect(&body).await;
        assert!(server.writes_seen() <= 6, "{} writes for 12 read buffers", server.writes_seen());
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        server.send([head.as_bytes(), &body].concat()).await;
        w.client.expect(&head).await;
        w.client.expect(&body).await;
        assert!(w.client.writes_seen() <= 6, "{} writes for 12 read buffers", w.client.writes_seen());
    });
}

#[test]
fn pipelined_requests_are_served_one_after_another() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send([GET, CHUNKED, "1\r\nx\r\n0\r\n\r\n", GET].concat()).await;
        server.expect(GET).await;
        settle().await;
        assert_eq!(server.waiting(), 0, "the second waits for the first's answer");
        server.send(OK).await;
        server.expect([CHUNKED, "1\r\nx\r\n0\r\n\r\n"].concat()).await;
        server.send(OK).await;
        server.expect(GET).await;
        server.send(OK).await;
        w.client.expect([OK, OK, OK].concat()).await;
    });
}

#[test]
fn pipelined_bytes_are_read_only_up_to_a_buffer() {
    world(|w| async move {
        let mut server = w.upstream();
        let (mut read, mut write) = tokio::io::split(w.client);
        let flood = GET.repeat(40_000);
        let writing = tokio::task::spawn_local(async move { write.write_all(flood.as_bytes()).await });
        server.expect(GET).await;
        settle().await;
        assert!(!writing.is_finished(), "more was read than a buffer and a socket hold");
        server.send(OK).await;
        let mut got = [0; OK.len()];
        tokio::io::AsyncReadExt::read_exact(&mut read, &mut got).await.unwrap();
        writing.abort();
    });
}

#[test]
fn chunked_bodies_and_trailers_pass_both_ways_as_they_are_framed() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let body = "5;a=b\r\nhello\r\n006\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n";
        w.client.send(CHUNKED).await;
        server.expect(CHUNKED).await;
        for byte in body.as_bytes() {
            w.client.send([*byte]).await;
            settle().await;
        }
        server.expect(body).await;
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n";
        server.send(answer).await;
        w.client.expect(answer).await;
        for piece in ["3\r", "\nab", "c\r\n0\r\n", "Content-Length: 5\r\nX: y", "\r\n\r\n"] {
            server.send(piece).await;
            settle().await;
        }
        w.client.expect("3\r\nabc\r\n0\r\nX: y\r\n\r\n").await;
        settle().await;
        assert_eq!(w.script.idle_connections(), 1);
    });
}

#[test]
fn forbidden_trailer_fields_of_a_request_do_not_reach_the_server() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send([CHUNKED, "0\r\nHost: evil\r\nX: y\r\n\r\n", GET].concat()).await;
        server.expect([CHUNKED, "0\r\nX: y\r\n\r\n"].concat()).await;
        server.send(OK).await;
        server.expect(GET).await;
    });
}

#[test]
fn answers_without_body_are_complete_with_their_head() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let head = "HEAD / HTTP/1.1\r\nHost: web\r\n\r\n";
        for (request, answer) in [
            (head, "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
            (head, "HTTP/1.1 200 OK\r\n\r\n"),
            (GET, "HTTP/1.1 204 No Content\r\n\r\n"),
            (GET, "HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n"),
        ] {
            w.client.send(request).await;
            server.expect(request).await;
            server.send(answer).await;
            w.client.expect(answer).await;
        }
        settle().await;
        assert_eq!(w.script.idle_connections(), 1);
    });
}

#[test]
fn the_mesh_strips_and_adds_the_fields_that_the_call_names() {
    world(|mut w| async move {
        let mut server = w.upstream();
        *w.script.edits.borrow_mut() = HeaderEdits {
            strip: &["x-forwarded-client-cert", "x-envoy"],
            add: vec![("x-request-id".parse().unwrap(), "1".parse().unwrap())],
        };
        w.client
            .send("GET / HTTP/1.1\r\nX-Envoy: 1\r\nHost: web\r\nX-Forwarded-Client-Cert: a\r\nA: b\r\n\r\n")
            .await;
        server.expect("GET / HTTP/1.1\r\nHost: web\r\nA: b\r\nx-request-id: 1\r\n\r\n").await;
    });
}

#[test]
fn a_client_that_waits_for_100_gets_it_and_its_connection_stays() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let head = "PUT / HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n";
        w.client.send(head).await;
        server.expect(head).await;
        server.send("HTTP/1.1 100 Continue\r\n\r\n").await;
        w.client.expect("HTTP/1.1 100 Continue\r\n\r\n").await;
        w.client.send("abc").await;
        server.expect("abc").await;
        server.send(OK).await;
        w.client.expect(OK).await;
        w.client.send(GET).await;
        server.expect(GET).await;
    });
}

#[test]
fn a_final_answer_instead_of_100_ends_both_connections() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let head = "PUT / HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n";
        w.client.send(head).await;
        server.expect(head).await;
        server.send("HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n").await;
        w.client.expect("HTTP/1.1 417 No\r\nContent-Length: 0\r\nconnection: close\r\n\r\n").await;
        // What it takes for its next request, others would take for the body.
        w.client.send(GET).await;
        w.client.end().await;
        assert_eq!(w.ended().await, ConnectionEnd::Closed);
        assert_eq!(w.script.idle_connections(), 0);
        server.expect_reset().await;
    });
}

#[test]
fn interim_answers_go_to_clients_that_know_them() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let hints = "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n";
        w.client.send(GET).await;
        server.expect(GET).await;
        server.send([hints, hints, OK].concat()).await;
        w.client.expect([hints, hints, OK].concat()).await;

        w.client.send("GET / HTTP/1.0\r\n\r\n").await;
        server.expect("GET / HTTP/1.0\r\n\r\n").await;
        server.send([hints, OK].concat()).await;
        w.client.expect("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nconnection: close\r\n\r\nok").await;
    });
}

#[test]
fn an_http_1_0_client_gets_its_answer_and_the_end() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").await;
        server.expect("GET / HTTP/1.0\r\n\r\n").await;
        server.send(OK).await;
        let got = w.client.rest().await;
        assert_eq!(got, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nconnection: close\r\n\r\nok");
        assert_eq!(w.ended().await, ConnectionEnd::Closed);
    });
}

#[test]
fn a_client_that_asks_for_close_gets_it() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send("GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await;
        server.expect("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        server.send(OK).await;
        let got = w.client.rest().await;
        assert_eq!(got, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nconnection: close\r\n\r\nok");
        settle().await;
        assert_eq!(w.script.idle_connections(), 1, "the close was between the client and the mesh");
    });
}

#[test]
fn a_server_that_closes_ends_its_own_connection_only() {
    world(|mut w| async move {
        let (mut first, mut second) = (w.upstream(), w.upstream());
        w.client.send(GET).await;
        first.expect(GET).await;
        first.send("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok").await;
        w.client.expect(OK).await;
        w.client.send(GET).await;
        second.expect(GET).await;
        assert_eq!(w.script.idle_connections(), 0);
    });
}

#[test]
fn a_body_that_ends_with_the_connection_reaches_any_client_whole() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
        server.send("HTTP/1.0 200 OK\r\nX: y\r\n\r\nhel").await;
        w.client.expect("HTTP/1.1 200 OK\r\nX: y\r\nconnection: close\r\n\r\nhel").await;
        server.send("lo").await;
        drop(server);
        assert_eq!(w.client.rest().await, "lo");
        assert_eq!(w.script.flags(), "-");
        assert_eq!(w.script.idle_connections(), 0);
    });
}

#[test]
fn bytes_after_an_answer_keep_the_server_out_of_the_pool() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
        server.send([OK, "HTTP/1.1 200 OK\r\n"].concat()).await;
        w.client.expect(OK).await;
        settle().await;
        assert_eq!(w.script.idle_connections(), 0);
        assert_eq!(server.rest().await, "");
    });
}

#[test]
fn both_directions_stream_at_once() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send(CHUNKED).await;
        server.expect(CHUNKED).await;
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        server.send(answer).await;
        w.client.expect(answer).await;
        for _ in 0..3 {
            w.client.send("4\r\nping\r\n").await;
            server.expect("4\r\nping\r\n").await;
            server.send("4\r\npong\r\n").await;
            w.client.expect("4\r\npong\r\n").await;
        }
        server.send("0\r\n\r\n").await;
        w.client.expect("0\r\n\r\n").await;
        w.client.send("0\r\n\r\n").await;
        server.expect("0\r\n\r\n").await;
        settle().await;
        assert_eq!(w.script.idle_connections(), 1, "both were complete in the end");
    });
}

#[test]
fn an_early_answer_of_a_server_that_closes_reaches_a_client_that_is_still_sending() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 1000000\r\n\r\nabc").await;
        server.head().await;
        server.send("HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").await;
        drop(server);
        w.client.expect("HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n").await;
        // It may go on for a while before it looks.
        w.client.send(vec![b'x'; 100_000]).await;
        assert_eq!(w.client.rest().await, "");
    });
}

#[test]
fn large_bodies_pass_unchanged_both_ways() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let body: Vec<u8> = (0..1_000_000u32).map(|i| b'a' + (i % 23) as u8).collect();
        let request = [
            format!("PUT / HTTP/1.1\r\nHost: web\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(),
            &body,
        ]
        .concat();
        let answer =
            [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), &body].concat();
        for _ in 0..2 {
            tokio::join!(w.client.send(&request), server.expect(&request));
            tokio::join!(server.send(&answer), w.client.expect(&answer));
        }
        settle().await;
        let outcome = w.script.last_outcome();
        assert_eq!(outcome.request_bytes, request.len() as u64);
        assert_eq!(outcome.response_bytes, answer.len() as u64);
    });
}

#[test]
fn a_slow_reader_holds_its_server_back() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
        server.send("HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n").await;
        let mut sent = 0;
        let writing = async {
            loop {
                server.send([0; 1000]).await;
                sent += 1000;
            }
        };
        tokio::select! { () = writing => {}, () = settle() => {}, }
        let held = sent - CAPACITY - w.client.waiting();
        assert!(held <= 5 * HttpLimits::default().read_buffer, "{held} bytes are in the proxy");
        assert_eq!(w.client.waiting(), CAPACITY, "the client's buffer is full");
    });
}

#[test]
fn a_slow_server_holds_its_client_back() {
    world(|mut w| async move {
        let _server = w.upstream();
        w.client.send("PUT / HTTP/1.1\r\nHost: web\r\nContent-Length: 100000000\r\n\r\n").await;
        let mut sent = 0;
        let writing = async {
            loop {
                w.client.send([0; 1000]).await;
                sent += 1000;
            }
        };
        tokio::select! { () = writing => {}, () = settle() => {}, }
        let limits = HttpLimits::default();
        let bound = 2 * CAPACITY + 5 * limits.read_buffer + limits.replay_cap;
        assert!(sent <= bound, "{sent} bytes were taken");
    });
}

#[test]
fn a_client_that_ended_its_direction_still_gets_its_answer() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send([GET, GET].concat()).await;
        w.client.end().await;
        for _ in 0..2 {
            server.expect(GET).await;
            settle().await;
            server.send(OK).await;
        }
        assert_eq!(w.client.rest().await, [OK, OK].concat());
        assert_eq!(w.ended().await, ConnectionEnd::ClientClosed);
        assert_eq!(w.script.flags(), "-");
    });
}

#[test]
fn a_connection_that_should_close_serves_the_request_under_way_and_says_so() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
        w.script.close();
        server.send(OK).await;
        let got = w.client.rest().await;
        assert_eq!(got, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nconnection: close\r\n\r\nok");
        assert_eq!(w.ended().await, ConnectionEnd::Closed);
    });
}

#[test]
fn an_idle_connection_that_should_close_does_so_when_no_request_comes_any_more() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
        server.send(OK).await;
        w.client.expect(OK).await;
        settle().await;
        let begun = tokio::time::Instant::now();
        w.script.close();
        settle().await;
        assert_eq!(w.client.rest().await, "");
        assert_eq!(begun.elapsed().as_secs(), 5);
        assert_eq!(w.ended().await, ConnectionEnd::Drained);
    });
}

#[test]
fn a_request_on_its_way_to_an_idle_connection_that_should_close_is_answered() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
        server.send(OK).await;
        w.client.expect(OK).await;
        settle().await;
        w.script.close();
        settle().await;
        w.client.send(GET).await;
        server.expect(GET).await;
        server.send(OK).await;
        let got = w.client.rest().await;
        assert_eq!(got, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nconnection: close\r\n\r\nok");
        assert_eq!(w.ended().await, ConnectionEnd::Closed);
    });
}

#[test]
fn a_connection_without_requests_is_closed_after_its_idle_time() {
    let limits = HttpLimits { keepalive_idle: Duration::from_secs(60), ..HttpLimits::default() };
    with_limits(limits, |mut w| async move {
        let begun = tokio::time::Instant::now();
        assert_eq!(w.client.rest().await, "");
        assert_eq!(begun.elapsed().as_secs(), 60);
        assert_eq!(w.ended().await, ConnectionEnd::IdleTimeout);
    });
}

#[test]
fn a_timer_set_for_one_thing_does_not_cut_another_short() {
    let limits = HttpLimits {
        header_timeout: Duration::from_secs(10),
        keepalive_idle: Duration::from_secs(60),
        ..HttpLimits::default()
    };
    with_limits(limits, |mut w| async move {
        let mut server = w.upstream();
        let (start, end) = GET.split_at(5);
        for _ in 0..3 {
            w.client.send(start).await;
            settle().await;
            tokio::time::advance(Duration::from_secs(9)).await;
            w.client.send(end).await;
            server.expect(GET).await;
            settle().await;
            tokio::time::advance(Duration::from_secs(100)).await;
            server.send(OK).await;
            w.client.expect(OK).await;
            settle().await;
            tokio::time::advance(Duration::from_secs(59)).await;
        }
    });
}

#[test]
fn a_released_connection_holds_no_buffer_of_an_idle_client() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client.send(GET).await;
        server.expect(GET).await;
        server.send(OK).await;
        w.client.expect(OK).await;
        settle().await;
        assert_eq!(w.script.idle_capacity(), 0);
    });
}

#[test]
fn a_client_that_pipelined_behind_the_last_answer_still_gets_that_answer() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.script.closing.set(true);
        w.client.send([GET, GET].concat()).await;
        server.expect(GET).await;
        server.send(OK).await;
        settle().await;
        // A close with these unread would be a reset, which takes the answer away.
        w.client.send(GET).await;
        let got = w.client.rest().await;
        assert_eq!(got, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nconnection: close\r\n\r\nok");
        w.client.end().await;
        assert_eq!(w.ended().await, ConnectionEnd::Closed);
        assert_eq!(w.events().iter().filter(|e| e.starts_with("begin")).count(), 1);
    });
}

#[test]
fn a_connection_being_served_takes_less_than_a_page() {
    // Ten thousand idle connections are the design's measure: what each future holds counts.
    assert!(super::world::serving_bytes() < 4096, "{} bytes", super::world::serving_bytes());
}

#[test]
fn what_applications_read_in_different_ways_passes_unless_the_node_refuses_it() {
    const ODD: &str = "GET /a%2fb HTTP/1.1\r\nhost: web.test\r\n\r\n";
    const NAMED: &str = "GET /a HTTP/1.1\r\nhost: web.test\r\nx_a: 1\r\n\r\n";
    for odd in [ODD, NAMED] {
        world(move |mut w| async move {
            let mut server = w.upstream();
            w.client.send(odd).await;
            server.expect(odd).await;
        });
    }
    for (odd, rule) in [(ODD, "NORM-2"), (NAMED, "NORM-13")] {
        let limits = HttpLimits { refuse_ambiguous: true, ..HttpLimits::default() };
        with_limits(limits, move |mut w| async move {
            w.client.send(odd).await;
            let answer = w.client.rest().await;
            assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains(rule), "{answer}");
            assert_eq!(w.ended().await, ConnectionEnd::Refused);
        });
    }
}
