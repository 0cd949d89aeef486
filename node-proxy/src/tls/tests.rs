//! Handshakes between pods of two nodes, with certificates of the real CA and keys in a real keyd.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use ca::log::MemoryLog;
use ca::rotation::TrustStore;
use ca::{Authority, Issued, Serial, WorkloadRequest};
use mesh_api::identity::SpiffeId;
use mesh_api::model::{Denied, Resource, Trust};
use rustls::client::Resumption;
use rustls::version::TLS13;
use rustls::{HandshakeKind, NamedGroup, ProtocolVersion};
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsConnector, client, server};

use super::*;
use crate::ipc::proto::{DropKey, to_keyd::Message};
use crate::keyd::test_agent::{Agent, Keyd};
use crate::tls::verifier::VerifyServer;

mod tunnels;

const HOUR: Duration = Duration::from_secs(3600);
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const DB: &str = "spiffe://cluster.local/ns/shop/sa/db";
const PROTOCOLS: &[&[u8]] = &[b"sockmesh/1", b"h2"];

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

fn authority_of(trust_domain: &str) -> Authority {
    let now = OffsetDateTime::now_utc();
    let root = Authority::make_root(trust_domain, 1000 * HOUR, now - 500 * HOUR).unwrap();
    Authority::load(trust_domain, &root.certificate_pem, &root.key_pem, now, MemoryLog::default()).unwrap()
}

fn authority() -> Authority {
    authority_of("cluster.local")
}

fn trust(roots: &[&[u8]]) -> Trust {
    Trust { trust_domain: "cluster.local".into(), roots: roots.iter().map(|r| (*r).into()).collect() }
}

/// Puts a serial on a node's deny list.
fn deny(node: &Node, serial: &Serial) {
    let serial: std::sync::Arc<[u8]> = serial.as_bytes().into();
    let part = Denied { part: Denied::part_of(&serial), serials: vec![serial], pods: Vec::new() };
    let before = node.tls.trust.get().unwrap();
    let after = TrustState::after(Some(&before), &[Resource::Denied(part)], &[], false);
    node.tls.trust.put(after.unwrap().unwrap());
}

/// A node: keyd, its agent, and what its worker knows.
struct Node {
    agent: Agent,
    tls: Tls,
    _keyd: Keyd,
}

impl Node {
    fn new() -> Self {
        let keyd = Keyd::start();
        let agent = keyd.agent();
        let tls = Tls::default();
        tls.channels.replace(vec![agent.sign_channel(), agent.sign_channel()]).unwrap();
        Self { agent, tls, _keyd: keyd }
    }

    fn trusting(ca: &Authority) -> Self {
        let node = Self::new();
        node.tls.trust.set(&trust(&[ca.root_der()])).unwrap();
        node
    }

    /// Gives a pod a certificate as if it were `now`.
    fn certify_at(
        &self,
        ca: &Authority,
        uid: &str,
        spiffe: &str,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Issued {
        let key = self.agent.new_key(uid, spiffe);
        assert_eq!(key.error, "");
        let request =
            WorkloadRequest { csr_der: &key.csr_der, spiffe_id: id(spiffe), pod_uid: uid, node: "node", ttl };
        let issued = ca.issue_workload(&request, now).unwrap();
        let end = issued.not_after.unix_timestamp();
        self.tls.svids.set(uid, issued.chain_der.clone(), &key.key_id, end).unwrap();
        issued
    }

    fn certify(&self, ca: &Authority, uid: &str, spiffe: &str) -> Issued {
        self.certify_at(ca, uid, spiffe, HOUR, OffsetDateTime::now_utc())
    }

    fn connector(&self, expected: &str) -> Connector {
        self.tls.connector("client", &id(expected), PROTOCOLS).unwrap()
    }

    fn acceptor(&self) -> Acceptor {
        self.tls.acceptor("server", PROTOCOLS).unwrap()
    }
}

type Client = Result<client::TlsStream<DuplexStream>, Refusal>;
type Server = Result<(server::TlsStream<DuplexStream>, PeerIdentity), Refusal>;

async fn handshake(connector: Connector, acceptor: Acceptor) -> (Client, Server) {
    let (near, far) = duplex(64 << 10);
    tokio::join!(connector.connect(near), acceptor.accept(far))
}

/// A node with client `WEB` and one with server `DB`, both of one mesh.
fn pair() -> (Authority, Node, Node) {
    let ca = authority();
    let (client, server) = (Node::trusting(&ca), Node::trusting(&ca));
    client.certify(&ca, "client", WEB);
    server.certify(&ca, "server", DB);
    (ca, client, server)
}

async fn refused_by_server(client: &Node, server: &Node) -> Refusal {
    let (connected, accepted) = handshake(client.connector(DB), server.acceptor()).await;
    let refusal = accepted.expect_err("the server took the client");
    // A TLS 1.3 client finishes first; it learns of the refusal when it reads.
    let error = connected.expect("the client is done before the server looks").read_u8().await.unwrap_err();
    assert!(matches!(Refusal::of_io(&error), Refusal::ByPeer(_)), "{error}");
    refusal
}

async fn refused_by_client(client: &Node, server: &Node) -> Refusal {
    let (connected, accepted) = handshake(client.connector(DB), server.acceptor()).await;
    assert!(matches!(accepted.expect_err("the server went on"), Refusal::ByPeer(_)));
    connected.expect_err("the client took the server")
}

#[tokio::test]
async fn both_sides_learn_who_the_other_is_over_tls_13_with_a_hybrid_key_exchange() {
    let (_ca, client, server) = pair();
    let (connected, accepted) = handshake(client.connector(DB), server.acceptor()).await;
    let (mut near, (mut far, peer)) = (connected.unwrap(), accepted.unwrap());
    assert_eq!(peer, PeerIdentity { spiffe: id(WEB), pod_uid: Some("client".into()) });
    let connection = near.get_ref().1;
    assert_eq!(peer_identity(connection.peer_certificates().unwrap()).unwrap().spiffe, id(DB));
    assert_eq!(connection.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(connection.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
    assert_eq!(connection.alpn_protocol(), Some(&b"sockmesh/1"[..]));
    assert_eq!(far.get_ref().1.server_name(), None, "no SNI");
    near.write_all(b"ping").await.unwrap();
    let mut buffer = [0; 4];
    far.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"ping");
    assert_eq!(client.tls.svids.identity("client"), Some(id(WEB)));
}

/// Hands on one byte at a time, so that every record comes in pieces.
async fn trickle(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    while let Ok(byte) = from.read_u8().await {
        if to.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_handshake_that_comes_byte_by_byte_is_finished() {
    let (_ca, client, server) = pair();
    let ((near, near_wire), (far, far_wire)) = (duplex(64 << 10), duplex(64 << 10));
    let (near_read, near_write) = tokio::io::split(near_wire);
    let (far_read, far_write) = tokio::io::split(far_wire);
    tokio::spawn(trickle(near_read, far_write));
    tokio::spawn(trickle(far_read, near_write));
    let (connected, accepted) =
        tokio::join!(client.connector(DB).connect(near), server.acceptor().accept(far));
    assert!(connected.is_ok() && accepted.is_ok());
}

#[tokio::test]
async fn no_tickets_are_given_and_none_are_used() {
    let (_ca, client, server) = pair();
    for _ in 0..2 {
        let (connected, accepted) = handshake(client.connector(DB), server.acceptor()).await;
        let (mut near, (mut far, _)) = (connected.unwrap(), accepted.unwrap());
        far.write_all(b"x").await.unwrap();
        near.read_u8().await.unwrap();
        assert_eq!(near.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(near.get_ref().1.tls13_tickets_received(), 0);
        assert!(!near.get_ref().1.is_early_data_accepted());
    }
    let config = server.tls.svids.server_config("server", PROTOCOLS).unwrap();
    assert_eq!((config.send_tls13_tickets, config.max_early_data_size), (0, 0));
    assert!(!config.session_storage.can_cache() && !config.ticketer.enabled());
}

#[tokio::test]
async fn a_client_that_would_resume_gets_a_full_handshake_each_time() {
    let (_ca, client, server) = pair();
    let ours = client.tls.svids.client_config("client", &id(DB), PROTOCOLS).unwrap();
    let mut willing = (*ours).clone();
    willing.resumption = Resumption::in_memory_sessions(8);
    willing.enable_early_data = true;
    let connector = TlsConnector::from(std::sync::Arc::new(willing));
    for _ in 0..3 {
        let (near, far) = duplex(64 << 10);
        let name = rustls_pki_types::ServerName::try_from("db.shop.svc").unwrap();
        let (connected, accepted) =
            tokio::join!(connector.connect(name, near), server.acceptor().accept(far));
        let (mut near, (mut far, _)) = (connected.unwrap(), accepted.unwrap());
        far.write_all(b"x").await.unwrap();
        near.read_u8().await.unwrap();
        assert_eq!(near.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(near.get_ref().1.tls13_tickets_received(), 0);
    }
}

#[tokio::test]
async fn a_server_that_gives_tickets_does_not_make_our_client_resume() {
    let (_ca, client, server) = pair();
    let mut generous = (*server.tls.svids.server_config("server", PROTOCOLS).unwrap()).clone();
    generous.send_tls13_tickets = 2;
    generous.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
    generous.max_early_data_size = 1024;
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(generous));
    for _ in 0..3 {
        let (near, far) = duplex(64 << 10);
        let (connected, accepted) = tokio::join!(client.connector(DB).connect(near), acceptor.accept(far));
        let (mut near, mut far) = (connected.unwrap(), accepted.unwrap());
        far.write_all(b"x").await.unwrap();
        near.read_u8().await.unwrap();
        assert_eq!(near.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
    }
}

#[tokio::test]
async fn the_client_refuses_anybody_but_the_one_it_meant() {
    let (_ca, client, server) = pair();
    let (connected, _) = handshake(client.connector(WEB), server.acceptor()).await;
    let refusal = connected.unwrap_err();
    assert_eq!(refusal, Refusal::UnexpectedIdentity { expected: id(WEB), presented: id(DB) });
    assert_eq!((refusal.code(), refusal.is_identity()), ("unexpected_identity", true));
    // Not even somebody whose name begins or ends the same.
    for near_miss in ["spiffe://cluster.local/ns/shop/sa/d", "spiffe://cluster.local/ns/shop/sa/dbx"] {
        let (connected, _) = handshake(client.connector(near_miss), server.acceptor()).await;
        assert_eq!(connected.unwrap_err().code(), "unexpected_identity");
    }
}

#[tokio::test]
async fn peers_of_another_trust_domain_are_refused_on_both_sides_even_under_a_root_that_is_trusted() {
    let (ca, client, server) = pair();
    let other = authority_of("other.example");
    let foreign_server = Node::trusting(&ca);
    foreign_server.certify(&other, "server", "spiffe://other.example/ns/shop/sa/db");
    let refusal = refused_by_client(&client, &foreign_server).await;
    assert!(matches!(refusal, Refusal::WrongTrustDomain { .. }), "{refusal}");

    let foreign_client = Node::new();
    foreign_client.certify(&other, "client", "spiffe://other.example/ns/shop/sa/web");
    foreign_client.tls.trust.set(&trust(&[ca.root_der()])).unwrap();
    server.tls.trust.set(&trust(&[ca.root_der(), other.root_der()])).unwrap();
    let refusal = refused_by_server(&foreign_client, &server).await;
    assert!(matches!(refusal, Refusal::WrongTrustDomain { .. }), "{refusal}");
}

#[tokio::test]
async fn peers_of_a_foreign_ca_are_refused_on_both_sides() {
    let (ca, client, server) = pair();
    let foreign = authority();
    let impostor = Node::trusting(&ca);
    impostor.certify(&foreign, "server", DB);
    impostor.certify(&foreign, "client", WEB);
    assert_eq!(refused_by_client(&client, &impostor).await, Refusal::UnknownIssuer);
    assert_eq!(refused_by_server(&impostor, &server).await, Refusal::UnknownIssuer);
}

#[tokio::test]
async fn certificates_that_are_expired_or_not_valid_yet_are_refused_on_both_sides() {
    let (ca, client, server) = pair();
    let now = OffsetDateTime::now_utc();
    for (at, expected) in [(now - 3 * HOUR, Refusal::Expired), (now + HOUR, Refusal::NotYetValid)] {
        let odd = Node::trusting(&ca);
        odd.certify_at(&ca, "server", DB, HOUR, at);
        odd.certify_at(&ca, "client", WEB, HOUR, at);
        assert_eq!(refused_by_client(&client, &odd).await, expected);
        assert_eq!(refused_by_server(&odd, &server).await, expected);
    }
}

#[tokio::test]
async fn a_denied_serial_is_refused_from_the_next_handshake_on() {
    let (ca, client, server) = pair();
    let (connected, accepted) = handshake(client.connector(DB), server.acceptor()).await;
    assert!(connected.is_ok() && accepted.is_ok());
    let (at_client, at_server) = (client.certify(&ca, "client", WEB), server.certify(&ca, "server", DB));
    deny(&server, &at_client.serial);
    assert_eq!(refused_by_server(&client, &server).await, Refusal::Denied);
    server.tls.trust.set(&trust(&[ca.root_der()])).unwrap();
    deny(&client, &at_server.serial);
    assert_eq!(refused_by_client(&client, &server).await, Refusal::Denied);
    // Another certificate of the same pod is another serial.
    server.certify(&ca, "server", DB);
    let (connected, accepted) = handshake(client.connector(DB), server.acceptor()).await;
    assert!(connected.is_ok() && accepted.is_ok());
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let (_ca, client, server) = pair();
    let bare = rustls::ClientConfig::builder_with_provider(provider::provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(std::sync::Arc::new(VerifyServer {
            trust: client.tls.trust.clone(),
            expected: id(DB),
        }))
        .with_no_client_auth();
    let with_alpn = |protocols: &[&[u8]]| {
        let mut config = bare.clone();
        config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
        TlsConnector::from(std::sync::Arc::new(config))
    };
    let name = rustls_pki_types::ServerName::try_from("db.shop.svc").unwrap();
    let (near, far) = duplex(64 << 10);
    let connector = with_alpn(PROTOCOLS);
    let (_, accepted) = tokio::join!(connector.connect(name.clone(), near), server.acceptor().accept(far));
    assert_eq!(accepted.unwrap_err(), Refusal::NoCertificate);
    let (near, far) = duplex(64 << 10);
    let connector = with_alpn(&[b"http/1.1"]);
    let (_, accepted) = tokio::join!(connector.connect(name, near), server.acceptor().accept(far));
    assert_eq!(accepted.unwrap_err(), Refusal::NoAlpn);
}

#[tokio::test]
async fn without_a_common_protocol_there_is_no_connection() {
    let (_ca, client, server) = pair();
    let silent = client.tls.connector("client", &id(DB), &[]).unwrap();
    let (_, accepted) = handshake(silent, server.acceptor()).await;
    assert_eq!(accepted.unwrap_err(), Refusal::NoAlpn);
    let silent = server.tls.acceptor("server", &[]).unwrap();
    let (connected, _) = handshake(client.connector(DB), silent).await;
    assert_eq!(connected.unwrap_err(), Refusal::NoAlpn);
    let hbone = server.tls.acceptor("server", &[b"h2"]).unwrap();
    let (connected, accepted) = handshake(client.connector(DB), hbone).await;
    assert_eq!(connected.unwrap().get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    assert!(accepted.is_ok());
}

#[tokio::test]
async fn bytes_that_are_no_tls_13_are_refused() {
    let (_ca, client, server) = pair();
    // A ClientHello of TLS 1.2: version 0x0303, one suite, no extensions.
    let mut hello = vec![0x16, 3, 1, 0, 45, 1, 0, 0, 41, 3, 3];
    hello.extend_from_slice(&[7; 32]);
    hello.extend_from_slice(&[0, 0, 2, 0xc0, 0x2b, 1, 0]);
    for bytes in [&hello[..], b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", &[0x16, 3, 1, 0xff, 0xff, 0]] {
        let (mut near, far) = duplex(64 << 10);
        near.write_all(bytes).await.unwrap();
        let accepted = server.acceptor().accept(far).await;
        assert!(matches!(accepted, Err(Refusal::Protocol(_))), "{:?}", accepted.err());
    }
    let (near, far) = duplex(64 << 10);
    drop(near);
    assert!(matches!(server.acceptor().accept(far).await, Err(Refusal::Io(_))));
    let (near, far) = duplex(64 << 10);
    drop(far);
    assert!(matches!(client.connector(DB).connect(near).await, Err(Refusal::Io(_))));
}

#[tokio::test]
async fn before_trust_or_certificates_are_known_everything_is_refused() {
    let ca = authority();
    let node = Node::new();
    let connector = |node: &Node| node.tls.connector("client", &id(DB), PROTOCOLS).map(drop);
    assert_eq!(connector(&node), Err(Refusal::NoTrust));
    node.tls.trust.set(&trust(&[ca.root_der()])).unwrap();
    assert_eq!(connector(&node), Err(Refusal::NoOwnCertificate("client".into())));
    node.certify(&ca, "client", WEB);
    assert_eq!(connector(&node), Ok(()));
    node.tls.svids.remove("client");
    assert_eq!(connector(&node), Err(Refusal::NoOwnCertificate("client".into())));
    assert!(node.tls.svids.expiries().is_empty());
}

#[tokio::test]
async fn a_pod_that_is_gone_does_not_show_its_certificate_in_handshakes_that_were_about_to_begin() {
    let (_ca, client, server) = pair();
    let connector = client.connector(DB);
    client.tls.svids.remove("client");
    let (_, accepted) = handshake(connector, server.acceptor()).await;
    assert_eq!(accepted.unwrap_err(), Refusal::NoCertificate);
}

#[tokio::test]
async fn an_unusable_bundle_or_certificate_leaves_the_one_in_force() {
    let (ca, client, server) = pair();
    assert_eq!(server.tls.trust.set(&trust(&[])), Err(TrustError::NoRoot("cluster.local".into())));
    let broken = server.tls.trust.set(&trust(&[ca.root_der(), b"no certificate"]));
    assert!(matches!(broken, Err(TrustError::Root { number: 2, .. })), "{broken:?}");
    let set = |uid, chain| server.tls.svids.set(uid, chain, "key", 0);
    assert!(matches!(set("server", vec![]), Err(SvidError::NotWorkload(..))));
    assert!(matches!(set("server", vec![ca.root_der().to_vec()]), Err(SvidError::NotWorkload(..))));
    let others = server.certify(&ca, "other", WEB);
    assert!(matches!(set("server", others.chain_der), Err(SvidError::OtherPod { .. })));
    let (connected, accepted) = handshake(client.connector(DB), server.acceptor()).await;
    assert!(connected.is_ok() && accepted.is_ok());
}

/// Certificates and roots change while handshakes go on, in the order that [`TrustStore`] allows.
#[tokio::test]
async fn a_root_is_replaced_under_handshakes_without_one_that_fails() {
    let (old, client, server) = pair();
    let new = authority();
    let mut store = TrustStore::new(old.root_der().to_vec());
    let nodes = ["client", "server"];
    let mut handshakes = 0;
    // One node after the other takes each step, with handshakes both ways in between.
    for step in 0..3 {
        match step {
            0 => store.add(new.root_der().to_vec()).unwrap(),
            1 => store.switch(nodes).unwrap(),
            _ => store.remove(nodes).unwrap(),
        }
        for (name, node) in [("client", &client), ("server", &server)] {
            // Prepared before the step, used after it.
            let early = (client.connector(DB), server.acceptor());
            node.tls.trust.set(&trust(&store.roots())).unwrap();
            let signing = if store.signing() == old.root_der() { &old } else { &new };
            node.certify(signing, name, if name == "client" { WEB } else { DB });
            store.acknowledge(name, store.generation());
            for (connector, acceptor) in
                [early, (client.connector(DB), server.acceptor()), (client.connector(DB), server.acceptor())]
            {
                let (connected, accepted) = handshake(connector, acceptor).await;
                assert!(
                    connected.is_ok() && accepted.is_ok(),
                    "step {step}, {name}: {connected:?} {accepted:?}"
                );
                handshakes += 1;
            }
        }
    }
    assert_eq!(handshakes, 18);
    // The old root is no longer good for anything.
    let late = Node::trusting(&new);
    late.certify(&old, "client", WEB);
    assert_eq!(refused_by_server(&late, &server).await, Refusal::UnknownIssuer);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_renewed_under_concurrent_handshakes_without_one_that_fails() {
    let (ca, client, server) = pair();
    let (client, server) = (std::sync::Arc::new(client), std::sync::Arc::new(server));
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let (client, server) = (std::sync::Arc::clone(&client), std::sync::Arc::clone(&server));
            tokio::spawn(async move {
                for _ in 0..40 {
                    let (connected, accepted) = handshake(client.connector(DB), server.acceptor()).await;
                    assert!(connected.is_ok() && accepted.is_ok(), "{connected:?} {accepted:?}");
                }
            })
        })
        .collect();
    let mut renewed = 0;
    while tasks.iter().any(|task| !task.is_finished()) {
        client.certify(&ca, "client", WEB);
        server.certify(&ca, "server", DB);
        renewed += 1;
        tokio::task::yield_now().await;
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert!(renewed > 1, "renewed {renewed} times only");
}

#[tokio::test]
async fn a_key_that_keyd_dropped_signs_no_handshake_and_the_reason_is_named() {
    let (_ca, client, server) = pair();
    let key_id = server.agent.hello().keys[0].key_id.clone();
    let answer = server.agent.ask(Some(Message::DropKey(DropKey { key_id })), &[]);
    assert_eq!(answer.error, "");
    let (_, accepted) = handshake(client.connector(DB), server.acceptor()).await;
    let refusal = accepted.unwrap_err();
    assert!(
        matches!(&refusal, Refusal::Signing(signer::SignError::Refused(why)) if why.contains("no key")),
        "{refusal}"
    );
}

#[tokio::test]
async fn a_broken_sign_channel_is_passed_over_and_the_last_one_is_named() {
    let (_ca, client, server) = pair();
    let (broken, gone) = UnixStream::pair().unwrap();
    drop(gone);
    server.tls.channels.replace(vec![broken, server.agent.sign_channel()]).unwrap();
    for _ in 0..3 {
        let (connected, accepted) = handshake(client.connector(DB), server.acceptor()).await;
        assert!(connected.is_ok() && accepted.is_ok());
    }
    let (broken, gone) = UnixStream::pair().unwrap();
    drop(gone);
    server.tls.channels.replace(vec![broken]).unwrap();
    let (_, accepted) = handshake(client.connector(DB), server.acceptor()).await;
    assert!(matches!(accepted, Err(Refusal::Signing(signer::SignError::NoChannel(_)))), "{accepted:?}");
    assert_eq!(server.tls.channels.alive(), 0);
    server.tls.channels.replace(vec![server.agent.sign_channel()]).unwrap();
    let (connected, accepted) = handshake(client.connector(DB), server.acceptor()).await;
    assert!(connected.is_ok() && accepted.is_ok());
}

#[test]
fn a_keyd_that_does_not_answer_is_given_up_after_the_timeout() {
    let channels = SignChannels::new(Duration::from_millis(20));
    assert!(matches!(channels.sign("key", b"x"), Err(signer::SignError::NoChannel(_))));
    let (own, _silent) = UnixStream::pair().unwrap();
    channels.replace(vec![own]).unwrap();
    assert_eq!(channels.alive(), 1);
    assert_eq!(channels.sign("key", b"x"), Err(signer::SignError::Timeout(Duration::from_millis(20))));
    assert_eq!(channels.alive(), 0, "a late answer must not be taken for that to another request");
}

#[tokio::test]
async fn whoever_waits_for_a_certificate_goes_on_when_it_comes() {
    let ca = authority();
    let node = Node::trusting(&ca);
    let waiting = node.tls.svids.certified("client");
    let issuing = async {
        // Another pod's is not the one.
        node.certify(&ca, "other", DB);
        tokio::task::yield_now().await;
        assert!(node.tls.svids.identity("client").is_none());
        node.certify(&ca, "client", WEB);
    };
    tokio::join!(waiting, issuing);
    assert_eq!(node.tls.svids.identity("client"), Some(id(WEB)));
    node.tls.svids.certified("client").await;
}
