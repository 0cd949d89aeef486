//! Tunnels in sessions as the data path makes them.

use mesh_api::model::AppProtocol;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsStream;

use super::*;
use crate::worker::io::Stream;
use crate::worker::read_ahead::ReadAhead;
use crate::worker::resilience::pod::Held;
use crate::worker::resilience::{PodBudget, PodLimits};
use crate::worker::tunnel::{HBONE_ALPN, header, mux};

fn opening() -> header::TunnelHeader {
    header::TunnelHeader {
        source: "10.1.0.2:40000".parse().unwrap(),
        destination: "10.2.0.3:8080".parse().unwrap(),
        protocol: AppProtocol::Http1,
        service: None,
        report: false,
    }
}

fn unread() -> Held {
    PodBudget::new(&PodLimits::default()).buffer(0).unwrap()
}

/// A session over TCP between `client` and a server that takes `accepted`, as the data path makes it.
async fn tunnel(accepted: &[&[u8]]) -> (Stream, Stream, Option<Vec<u8>>) {
    let (_ca, client, server) = pair();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    let connector = client.tls.connector("client", &id(DB), &[mux::ALPN, header::ALPN]).unwrap();
    let acceptor = server.tls.acceptor("server", accepted).unwrap();
    let (near, far) =
        tokio::join!(connector.connect(ReadAhead::new(near)), acceptor.accept(ReadAhead::new(far)));
    let (near, (far, _)) = (near.unwrap(), far.unwrap());
    let alpn = near.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
    let near = Stream::Tls(Box::new(TlsStream::Client(near)));
    (near, Stream::Tls(Box::new(TlsStream::Server(far))), alpn)
}

#[tokio::test]
async fn many_tunnels_share_one_session() {
    let work = async {
        let (near, far, alpn) = tunnel(&[mux::ALPN, header::ALPN, HBONE_ALPN]).await;
        assert_eq!(alpn.as_deref(), Some(mux::ALPN));
        let echo = |mut stream: mux::MuxStream| {
            tokio::task::spawn_local(async move {
                let mut heard = Vec::new();
                stream.read_to_end(&mut heard).await.unwrap();
                stream.write_all(&heard).await.unwrap();
                stream.shutdown().await.unwrap();
            });
        };
        let served =
            tokio::task::spawn_local(mux::server::serve(far, unread(), echo, std::future::pending()));
        let connection = mux::client::connect(near, unread());
        let streams: Vec<_> = (0..20_u8)
            .map(|i| {
                let mut stream = connection.open(&opening()).unwrap();
                tokio::task::spawn_local(async move {
                    let sent = vec![i; 300_000];
                    stream.write_all(&sent).await.unwrap();
                    stream.shutdown().await.unwrap();
                    let mut heard = Vec::new();
                    stream.read_to_end(&mut heard).await.unwrap();
                    assert!(heard.ends_with(&sent));
                })
            })
            .collect();
        for stream in streams {
            stream.await.unwrap();
        }
        drop(connection);
        assert_eq!(served.await.unwrap(), Ok(()), "the end was announced");
    };
    tokio::task::LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_peer_that_knows_no_shared_tunnels_agrees_on_a_plain_one() {
    let (_near, _far, alpn) = tunnel(&[header::ALPN, HBONE_ALPN]).await;
    assert_eq!(alpn.as_deref(), Some(header::ALPN));
}

#[tokio::test]
async fn a_session_that_is_cut_is_an_error_on_its_tunnels() {
    let work = async {
        let (near, mut far, _) = tunnel(&[mux::ALPN]).await;
        let connection = mux::client::connect(near, unread());
        let mut stream = connection.open(&opening()).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        far.read_u8().await.unwrap();
        // TCP ends in order, without TLS's close_notify.
        drop(far);
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    };
    tokio::task::LocalSet::new().run_until(work).await;
}
