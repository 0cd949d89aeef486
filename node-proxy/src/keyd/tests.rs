//! keyd as its agent and its workers see it, over real sockets.

use std::os::fd::AsFd;
use std::time::Instant;

use ca::log::MemoryLog;
use ca::{Authority, WorkloadRequest};
use time::OffsetDateTime;

use super::test_agent::{Agent, Keyd, own_uid};
use super::*;
use crate::ipc::FrameError;
use crate::ipc::blocking::{recv_frame, send_frame};
use crate::ipc::proto::{
    DropKey, FromKeyd, KeydHello, NewKey, SignChannel, SignRequest, SignResponse, ToKeyd, to_keyd::Message,
};

const ID: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn new_key(agent: &Agent, uid: &str) -> FromKeyd {
    agent.new_key(uid, ID)
}

fn sign(channel: &UnixStream, key_id: &str, message: &[u8]) -> SignResponse {
    send_frame(channel, &SignRequest { key_id: key_id.into(), message: message.into() }, &[]).unwrap();
    recv_frame::<SignResponse>(channel).unwrap().unwrap().0
}

fn content() -> Vec<u8> {
    [&[b' '; 64][..], b"TLS 1.3, server CertificateVerify\0", &[7; 32]].concat()
}

#[test]
fn a_key_gets_a_certificate_and_signs_handshakes_that_verify_with_it() {
    let keyd = Keyd::start();
    let agent = keyd.agent();
    let key = new_key(&agent, "pod-1");
    assert_eq!(key.error, "");
    let now = OffsetDateTime::now_utc();
    let root = Authority::make_root("cluster.local", Duration::from_secs(3600), now).unwrap();
    let ca =
        Authority::load("cluster.local", &root.certificate_pem, &root.key_pem, now, MemoryLog::default())
            .unwrap();
    let request = WorkloadRequest {
        csr_der: &key.csr_der,
        spiffe_id: ID.parse().unwrap(),
        pod_uid: "pod-1",
        node: "n",
        ttl: Duration::from_secs(60),
    };
    let issued = ca.issue_workload(&request, now).unwrap();

    let signed = sign(&agent.sign_channel(), &key.key_id, &content());
    assert_eq!(signed.error, "");
    let leaf = rustls_pki_types::CertificateDer::from(issued.chain_der[0].as_slice());
    webpki::EndEntityCert::try_from(&leaf)
        .unwrap()
        .verify_signature(webpki::aws_lc_rs::ECDSA_P256_SHA256, &content(), &signed.signature)
        .unwrap();
}

#[test]
fn nothing_but_a_handshake_is_signed_and_refusals_are_counted() {
    let keyd = Keyd::start();
    let agent = keyd.agent();
    let key = new_key(&agent, "pod-1");
    let channel = agent.sign_channel();
    for message in [&key.csr_der[..], &[7; 32], b"", b"any text"] {
        let refused = sign(&channel, &key.key_id, message);
        assert!(
            refused.signature.is_empty() && refused.error.contains("CertificateVerify"),
            "{}",
            refused.error
        );
    }
    let refused = sign(&channel, "0000", &content());
    assert!(refused.error.contains("no key \"0000\""), "{}", refused.error);
    assert_eq!(sign(&channel, &key.key_id, &content()).error, "", "the channel is still good");
    let counters = agent.hello().counters.unwrap();
    assert_eq!((counters.signed, counters.refused_content, counters.refused_key), (1, 4, 1));
}

#[test]
fn a_key_that_is_used_too_often_is_refused_and_others_are_not() {
    let settings = Settings { control_uid: own_uid(), signatures_per_second: 3, ..Settings::default() };
    let keys = keys::Keys::new(settings.max_keys, settings.signatures_per_second);
    let (busy, quiet) = (keys.make("busy", ID).unwrap(), keys.make("quiet", ID).unwrap());
    let now = Instant::now();
    for _ in 0..3 {
        keys.sign(&busy.id, &content(), now).unwrap();
    }
    assert_eq!(keys.sign(&busy.id, &content(), now), Err(keys::KeyError::Rate(3)));
    assert!(keys.sign(&quiet.id, &content(), now).is_ok());
    assert!(keys.sign(&busy.id, &content(), now + Duration::from_secs(1)).is_ok());
    assert_eq!(keys.counters().refused_rate, 1);
}

#[test]
fn keys_and_channels_survive_the_agent_and_a_new_agent_finds_them() {
    let keyd = Keyd::start();
    let agent = keyd.agent();
    let key = new_key(&agent, "pod-1");
    let channel = agent.sign_channel();
    drop(agent);
    assert_eq!(sign(&channel, &key.key_id, &content()).error, "");
    let agent = keyd.agent();
    let hello = agent.hello();
    assert_eq!(hello.pid, std::process::id());
    assert_eq!(hello.keys.len(), 1);
    assert_eq!((hello.keys[0].key_id.as_str(), hello.keys[0].uid.as_str()), (key.key_id.as_str(), "pod-1"));
    let other = keyd.agent();
    assert_eq!(other.hello().keys.len(), 1, "two agents at once, as during an upgrade");
}

#[test]
fn a_dropped_key_signs_no_more() {
    let keyd = Keyd::start();
    let agent = keyd.agent();
    let key = new_key(&agent, "pod-1");
    let channel = agent.sign_channel();
    let drop_key = || agent.ask(Some(Message::DropKey(DropKey { key_id: key.key_id.clone() })), &[]);
    assert_eq!(drop_key().error, "");
    assert!(sign(&channel, &key.key_id, &content()).error.contains("no key"));
    assert!(drop_key().error.contains("no key"));
    assert!(agent.hello().keys.is_empty());
}

#[test]
fn odd_requests_of_the_agent_are_answered_with_the_reason() {
    let settings = Settings { control_uid: own_uid(), max_keys: 1, ..Settings::default() };
    let keyd = Keyd::start_with(settings);
    let agent = keyd.agent();
    let bad = NewKey { uid: "pod-1".into(), spiffe_id: "spiffe://Cluster/ns/a/sa/b".into() };
    assert!(agent.ask(Some(Message::NewKey(bad)), &[]).error.contains("trust domain"));
    assert!(new_key(&agent, "").error.contains("UID"));
    assert!(
        agent.ask(Some(Message::SignChannel(SignChannel {})), &[]).error.contains("one descriptor, not 0")
    );
    assert_eq!(new_key(&agent, "pod-1").error, "");
    assert!(new_key(&agent, "pod-2").error.contains("1 keys already"));
    assert!(agent.ask(None, &[]).error.contains("versions"));
}

#[test]
fn a_peer_of_another_user_is_not_served() {
    let keyd = Keyd::start_with(Settings { control_uid: own_uid() + 1, ..Settings::default() });
    let stream = keyd.connect();
    // The connection may be closed before or after the request is taken.
    let _ = send_frame(&stream, &ToKeyd { id: 1, message: Some(Message::Hello(KeydHello {})) }, &[]);
    match recv_frame::<FromKeyd>(&stream) {
        Ok(None) | Err(FrameError::Io(_)) => {}
        other => panic!("answered: {other:?}"),
    }
}

#[test]
fn connections_are_limited_and_free_again_when_closed() {
    let keyd =
        Keyd::start_with(Settings { control_uid: own_uid(), max_connections: 2, ..Settings::default() });
    let agent = keyd.agent();
    let channel = agent.sign_channel();
    let (_own, keyds) = UnixStream::pair().unwrap();
    let ask = || agent.ask(Some(Message::SignChannel(SignChannel {})), &[keyds.as_fd()]).error;
    assert!(ask().contains("2 connections already"));
    drop(channel);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !ask().is_empty() {
        assert!(Instant::now() < deadline, "the slot of a closed channel is never free");
        thread::yield_now();
    }
}

#[test]
fn a_worker_cannot_make_keyd_take_a_long_message() {
    let keyd = Keyd::start();
    let agent = keyd.agent();
    let channel = agent.sign_channel();
    let long = SignRequest { key_id: "k".into(), message: vec![b' '; channel::MAX_REQUEST] };
    send_frame(&channel, &long, &[]).unwrap();
    assert!(!matches!(recv_frame::<SignResponse>(&channel), Ok(Some(_))), "the channel is closed");
    assert_eq!(agent.hello().error, "", "and keyd lives");
}
