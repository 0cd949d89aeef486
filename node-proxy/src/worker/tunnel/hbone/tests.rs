//! Both sides against each other.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::client::{HboneConnection, HboneError, connect, connect_at};
use super::keepalive::Pace;
use super::server::{Incoming, TunnelEnd, serve, serve_at};
use super::*;
use crate::worker::io::Transport as _;
use crate::worker::reason::Reason;

fn on_worker(test: impl Future<Output = ()> + 'static) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(Default::default())
        .expect("a runtime can be built");
    runtime.block_on(async move {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test came to an end");
    });
}

/// A tunnel whose far side handles each CONNECT with `handle`, and the way to drain it.
async fn tunnel(
    handle: impl FnMut(Incoming) + 'static,
) -> (HboneConnection, watch::Sender<bool>, JoinHandle<TunnelEnd>) {
    let (near, far) = tokio::io::duplex(256 << 10);
    let drain = watch::Sender::new(false);
    let mut drained = drain.subscribe();
    let end = tokio::task::spawn_local(async move {
        serve(far, handle, async move {
            drained.wait_for(|drained| *drained).await.expect("the test holds the sender");
        })
        .await
    });
    (connect(near).await.expect("the tunnel can be set up"), drain, end)
}

fn destination() -> ConnectRequest {
    ConnectRequest::to("10.0.0.1:5432".parse().expect("an address"))
}

/// Accepts and hands the stream out.
fn collector() -> (impl FnMut(Incoming), Rc<RefCell<Vec<HboneStream>>>) {
    let streams = Rc::new(RefCell::new(Vec::new()));
    let accepted = Rc::clone(&streams);
    (move |incoming: Incoming| accepted.borrow_mut().push(incoming.accept().expect("it is there")), streams)
}

#[test]
fn a_stream_carries_bytes_both_ways_and_its_attributes() {
    on_worker(async {
        let seen = Rc::new(RefCell::new(None));
        let request = Rc::clone(&seen);
        let (connection, _drain, _end) = tunnel(move |incoming| {
            *request.borrow_mut() = Some(incoming.request.clone());
            tokio::task::spawn_local(async move {
                let mut stream = incoming.accept().unwrap();
                stream.write_all(b"server first").await.unwrap();
                let mut heard = Vec::new();
                stream.read_to_end(&mut heard).await.unwrap();
                stream.write_all(&heard).await.unwrap();
                stream.shutdown().await.unwrap();
            });
        })
        .await;
        let asked = ConnectRequest {
            forwarded_for: Some("[fd00::1]:40000".parse().unwrap()),
            baggage: Some("service.name=web".parse().unwrap()),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00".parse().unwrap()),
            ..destination()
        };
        let mut stream = connection.open(asked.clone()).await.unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"server first");
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"hello");
        let seen = seen.borrow().clone().unwrap();
        assert_eq!(seen, asked);
        assert_eq!(seen.destination(), Some("10.0.0.1:5432".parse().unwrap()));
    });
}

#[test]
fn either_side_may_end_its_direction_first() {
    on_worker(async {
        for near_first in [true, false] {
            let (handle, accepted) = collector();
            let (connection, _drain, _end) = tunnel(handle).await;
            let mut near = connection.open(destination()).await.unwrap();
            let mut far = accepted.borrow_mut().pop().unwrap();
            let (first, second) = if near_first { (&mut near, &mut far) } else { (&mut far, &mut near) };
            first.write_all(b"last words").await.unwrap();
            first.shutdown().await.unwrap();
            let mut heard = Vec::new();
            second.read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, b"last words");
            second.write_all(b"answer").await.unwrap();
            second.shutdown().await.unwrap();
            let mut heard = Vec::new();
            first.read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, b"answer");
        }
    });
}

#[test]
fn an_abort_is_a_reset_at_the_other_side() {
    on_worker(async {
        for near_aborts in [true, false] {
            let (handle, accepted) = collector();
            let (connection, _drain, _end) = tunnel(handle).await;
            let mut near = connection.open(destination()).await.unwrap();
            let mut far = accepted.borrow_mut().pop().unwrap();
            let (first, second) = if near_aborts { (&mut near, &mut far) } else { (&mut far, &mut near) };
            first.write_all(b"part").await.unwrap();
            let mut heard = [0; 4];
            second.read_exact(&mut heard).await.unwrap();
            first.abort();
            let error = second.read(&mut heard).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            let error = loop {
                if let Err(error) = second.write_all(b"more").await {
                    break error;
                }
            };
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    });
}

#[test]
fn a_dropped_stream_is_a_reset_at_the_other_side() {
    on_worker(async {
        let (handle, accepted) = collector();
        let (connection, _drain, _end) = tunnel(handle).await;
        let near = connection.open(destination()).await.unwrap();
        assert_eq!(connection.streams(), 1);
        let mut far = accepted.borrow_mut().pop().unwrap();
        drop(near);
        assert_eq!(connection.streams(), 0);
        let error = far.read(&mut [0; 4]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn the_loss_of_the_tunnel_is_a_reset_of_its_streams() {
    on_worker(async {
        let (handle, _accepted) = collector();
        let (connection, _drain, end) = tunnel(handle).await;
        let mut near = connection.open(destination()).await.unwrap();
        end.abort();
        let error = near.read(&mut [0; 4]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(!connection.has_room());
        let error = connection.open(destination()).await.unwrap_err();
        assert!(matches!(error, HboneError::Connection { .. }), "{error}");
    });
}

#[test]
fn a_refusal_gives_its_status() {
    on_worker(async {
        let (connection, _drain, _end) = tunnel(|incoming| match incoming.request.authority.port_u16() {
            Some(1) => incoming.refuse(StatusCode::UNAUTHORIZED, Reason::PolicyDenied),
            Some(2) => drop(incoming),
            _ => incoming.refuse(StatusCode::BAD_REQUEST, Reason::NoRoute),
        })
        .await;
        for (port, expected) in [(1, 401), (2, 503), (3, 400)] {
            let request = ConnectRequest::to(([10, 0, 0, 1], port).into());
            match connection.open(request).await {
                Err(HboneError::Status(status)) => assert_eq!(status, expected),
                other => panic!("{other:?}"),
            }
        }
    });
}

#[test]
fn what_is_no_connect_with_a_port_is_a_bad_request() {
    on_worker(async {
        let (near, far) = tokio::io::duplex(64 << 10);
        tokio::task::spawn_local(serve(far, |_| panic!("not handed out"), std::future::pending()));
        let (mut handle, connection) = h2::client::handshake(near).await.unwrap();
        tokio::task::spawn_local(connection);
        for request in [
            http::Request::get("http://10.0.0.1:80/").body(()).unwrap(),
            http::Request::connect("10.0.0.1").body(()).unwrap(),
            http::Request::connect("10.0.0.1:0").body(()).unwrap(),
        ] {
            let (response, _) = handle.send_request(request, true).unwrap();
            assert_eq!(response.await.unwrap().status(), 400);
        }
    });
}

#[test]
fn large_transfers_share_a_tunnel_and_a_reader_that_waits_holds_only_its_own_back() {
    on_worker(async {
        const SIZE: usize = 32 << 20;
        let (handle, accepted) = collector();
        let (connection, _drain, _end) = tunnel(handle).await;
        let mut stalled = connection.open(destination()).await.unwrap();
        let mut stalled_far = accepted.borrow_mut().pop().unwrap();
        let written = Rc::new(Cell::new(0));
        let counter = Rc::clone(&written);
        let writer = tokio::task::spawn_local(async move {
            let block = vec![9; 64 << 10];
            while counter.get() < SIZE {
                stalled_far.write_all(&block).await.unwrap();
                counter.set(counter.get() + block.len());
            }
            stalled_far.shutdown().await.unwrap();
        });
        let mut tasks = Vec::new();
        for seed in 0..2_u8 {
            let mut near = connection.open(destination()).await.unwrap();
            let mut far = accepted.borrow_mut().pop().unwrap();
            tasks.push(tokio::task::spawn_local(async move {
                let block: Vec<u8> = (0..60_000).map(|at| (at % 251) as u8 ^ seed).collect();
                for _ in 0..SIZE / block.len() {
                    far.write_all(&block).await.unwrap();
                }
                far.shutdown().await.unwrap();
            }));
            tasks.push(tokio::task::spawn_local(async move {
                let mut buf = vec![0; 60_000];
                let mut blocks = 0;
                while near.read_exact(&mut buf).await.is_ok() {
                    assert!(buf.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8 ^ seed));
                    blocks += 1;
                }
                assert_eq!(blocks, SIZE / buf.len());
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        // What is written while nobody reads is the stream's window and the send buffer, not the transfer.
        assert!(written.get() <= STREAM_WINDOW as usize + SEND_BUFFER + (128 << 10), "{}", written.get());
        let mut all = 0;
        let mut buf = vec![0; 64 << 10];
        loop {
            match stalled.read(&mut buf).await.unwrap() {
                0 => break,
                count => all += count,
            }
        }
        assert_eq!(all, written.get());
        writer.await.unwrap();
    });
}

#[test]
fn a_full_connection_offers_no_more_room() {
    on_worker(async {
        let (handle, _accepted) = collector();
        let (connection, _drain, _end) = tunnel(handle).await;
        let mut open = Vec::new();
        while connection.has_room() {
            open.push(connection.open(destination()).await.unwrap());
        }
        assert_eq!(open.len(), client::MAX_STREAMS);
        open.pop();
        assert!(connection.has_room());
    });
}

#[test]
fn a_drain_offers_no_room_and_keeps_what_is_open() {
    on_worker(async {
        let (handle, accepted) = collector();
        let (connection, drain, end) = tunnel(handle).await;
        let mut near = connection.open(destination()).await.unwrap();
        let mut far = accepted.borrow_mut().pop().unwrap();
        drain.send_replace(true);
        while connection.has_room() {
            tokio::task::yield_now().await;
        }
        near.write_all(b"still").await.unwrap();
        near.shutdown().await.unwrap();
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"still");
        far.write_all(b"here").await.unwrap();
        far.shutdown().await.unwrap();
        let mut heard = Vec::new();
        near.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"here");
        drop((near, far, connection));
        assert!(matches!(end.await.unwrap(), TunnelEnd::Complete));
    });
}

const QUICK: Pace = Pace { interval: Duration::from_millis(5), limit: Duration::from_millis(50) };

#[test]
fn a_peer_that_answers_no_ping_is_given_up() {
    on_worker(async {
        // As a server: SETTINGS, then silence, while reading on.
        let (near, mut far) = tokio::io::duplex(64 << 10);
        far.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        let connection = connect_at(near, QUICK).await.unwrap();
        let (_, read) = tokio::join!(
            async {
                let error = connection.open(destination()).await.unwrap_err();
                assert!(matches!(error, HboneError::Connection { refused: false, .. }), "{error}");
                drop(connection);
            },
            async { far.read_to_end(&mut Vec::new()).await }
        );
        read.unwrap();

        // As a client: preface and SETTINGS, then the same.
        let (mut near, far) = tokio::io::duplex(64 << 10);
        near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        let end = tokio::task::spawn_local(serve_at(far, |_| {}, std::future::pending(), QUICK));
        near.read_to_end(&mut Vec::new()).await.unwrap();
        assert!(matches!(end.await.unwrap(), TunnelEnd::Unanswered));
    });
}

#[test]
fn a_peer_that_answers_its_pings_is_kept() {
    on_worker(async {
        let (near, far) = tokio::io::duplex(64 << 10);
        let (handle, accepted) = collector();
        tokio::task::spawn_local(serve_at(far, handle, std::future::pending(), QUICK));
        let connection = connect_at(near, QUICK).await.unwrap();
        let mut near = connection.open(destination()).await.unwrap();
        let mut far = accepted.borrow_mut().pop().unwrap();
        // Several times the limit, each way idle but for the pings.
        for _ in 0..4 {
            let quiet = tokio::time::timeout(QUICK.limit, near.read_u8()).await;
            assert!(quiet.is_err(), "{quiet:?}");
        }
        far.write_all(b"!").await.unwrap();
        assert_eq!(near.read_u8().await.unwrap(), b'!');
    });
}
