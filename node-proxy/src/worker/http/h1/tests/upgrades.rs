//! Switches of protocols.

use super::super::ConnectionEnd;
use super::pipe::Pipe;
use super::world::{World, settle, world};
use crate::worker::io::Transport;

const ASK: &str = "GET /chat HTTP/1.1\r\nHost: web\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n";
const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n";

/// A client and a server that have switched; the client sent `hello` with its request.
async fn switched(w: &mut World) -> Pipe {
    let mut server = w.upstream();
    w.client.send([ASK, "Connection: Upgrade\r\n\r\nhello"].concat()).await;
    server.expect([ASK, "connection: upgrade\r\n\r\n"].concat()).await;
    settle().await;
    assert_eq!(server.waiting(), 0, "nothing goes to the server before it agreed");
    server.send([SWITCH, "Connection: upgrade\r\n\r\nwelcome"].concat()).await;
    w.client.expect([SWITCH, "connection: upgrade\r\n\r\nwelcome"].concat()).await;
    server.expect("hello").await;
    server
}

#[test]
fn bytes_pass_both_ways_after_the_server_agreed_and_ends_pass_one_by_one() {
    world(|mut w| async move {
        let mut server = switched(&mut w).await;
        w.client.send("ping").await;
        server.expect("ping").await;
        w.client.end().await;
        assert_eq!(server.rest().await, "");
        server.send("late").await;
        server.end().await;
        assert_eq!(w.client.rest().await, "late");
        assert_eq!(w.ended().await, ConnectionEnd::Upgraded);
        assert_eq!(w.events().last().map(String::as_str), Some("finish 101 -"));
        let head = ASK.len() + "Connection: Upgrade\r\n\r\n".len();
        assert_eq!(w.script.last_outcome().request_bytes, (head + "helloping".len()) as u64);
        assert_eq!(w.script.idle_connections(), 0);
    });
}

#[test]
fn a_reset_of_either_side_reaches_the_other() {
    world(|mut w| async move {
        let mut server = switched(&mut w).await;
        server.abort();
        drop(server);
        w.client.expect_reset().await;
        assert_eq!(w.script.flags(), "UR");
    });
    world(|mut w| async move {
        let mut server = switched(&mut w).await;
        let World { mut client, script, .. } = w;
        client.abort();
        drop(client);
        server.expect_reset().await;
        settle().await;
        assert_eq!(script.flags(), "DC");
    });
}

#[test]
fn a_switched_connection_may_be_quiet_for_a_day() {
    world(|mut w| async move {
        let mut server = switched(&mut w).await;
        tokio::time::advance(std::time::Duration::from_secs(80_000)).await;
        server.send("still there").await;
        w.client.expect("still there").await;
    });
}

#[test]
fn a_switched_connection_that_is_no_longer_allowed_is_reset_on_both_sides() {
    world(|mut w| async move {
        let mut server = switched(&mut w).await;
        w.script.revoked.notify_one();
        w.client.expect_reset().await;
        server.expect_reset().await;
        settle().await;
        assert_eq!(w.script.flags(), "PLAIN");
    });
}

#[test]
fn another_answer_is_no_upgrade() {
    world(|mut w| async move {
        let mut server = w.upstream();
        w.client
            .send([ASK, "Connection: Upgrade\r\n\r\nGET /evil HTTP/1.1\r\nHost: web\r\n\r\n"].concat())
            .await;
        server.expect([ASK, "connection: upgrade\r\n\r\n"].concat()).await;
        server.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        w.client.expect("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nconnection: close\r\n\r\nok").await;
        w.client.end().await;
        assert_eq!(w.ended().await, ConnectionEnd::Closed);
        assert_eq!(w.events().iter().filter(|e| e.starts_with("begin")).count(), 1);
        assert_eq!(server.waiting(), 0);
    });
}

#[test]
fn a_request_with_a_body_may_ask_for_an_upgrade() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let ask = "POST /attach HTTP/1.1\r\nHost: web\r\nUpgrade: tcp\r\nContent-Length: 3\r\n";
        w.client.send([ask, "Connection: upgrade\r\n\r\nabcraw"].concat()).await;
        server.expect([ask, "connection: upgrade\r\n\r\nabc"].concat()).await;
        settle().await;
        assert_eq!(server.waiting(), 0);
        server.send("HTTP/1.1 101 Switching\r\nUpgrade: tcp\r\n\r\n").await;
        server.expect("raw").await;
    });
}

#[test]
fn a_server_may_not_switch_before_it_has_the_request() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let ask = "POST / HTTP/1.1\r\nHost: web\r\nUpgrade: tcp\r\nContent-Length: 300\r\n";
        w.client.send([ask, "Connection: upgrade\r\n\r\nabc"].concat()).await;
        server.head().await;
        server.send("HTTP/1.1 101 Switching\r\nUpgrade: tcp\r\n\r\n").await;
        let head = w.client.head().await;
        assert!(head.starts_with("HTTP/1.1 502 "), "{head}");
        server.expect_reset().await;
    });
}

#[test]
fn an_h2c_upgrade_is_an_ordinary_request() {
    world(|mut w| async move {
        let mut server = w.upstream();
        let fields = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n";
        w.client.send(format!("GET / HTTP/1.1\r\nHost: web\r\n{fields}\r\n")).await;
        server.expect("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        server.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        w.client.expect("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        settle().await;
        assert_eq!(w.script.idle_connections(), 1);
    });
}
