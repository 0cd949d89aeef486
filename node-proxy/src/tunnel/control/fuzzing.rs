//! What must hold whatever an agent says: called by the programs of `fuzz/` with inputs that they make up, and by a test with
//! those that are known to lead deep, and with what was found once.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{Ipv4Addr, Shutdown};
use std::os::unix::net::UnixDatagram;

use prost::Message as _;

use super::*;
use crate::ipc::blocking::recv_frame;
use crate::ipc::proto::{
    TunnelAnnounced, TunnelHello, TunnelNewKey, TunnelPeer, TunnelPeerKey, TunnelQuery, TunnelRange,
};

/// Messages of one conversation.
const MESSAGES: usize = 32;
/// Bytes of a stream: the answers to more of the shortest messages do not fit into a socket that nobody reads.
const STREAM: usize = 768;

/// An agent speaks: in messages that come with descriptors, or in any bytes.
pub fn control(bytes: &[u8]) {
    let open_before = open_files();
    if let Some((0, stream)) = bytes.split_first().map(|(first, rest)| (first & 1, rest)) {
        anything(stream);
    } else {
        conversation(bytes.get(1..).unwrap_or_default());
    }
    assert_eq!(open_files(), open_before, "descriptors are left open");
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Each message: how many TUN queues and UDP sockets come with it, its length, and its bytes.
fn conversation(mut bytes: &[u8]) {
    let mut state = State::default();
    for _ in 0..MESSAGES {
        let Some(([with, low, high], rest)) = bytes.split_first_chunk() else { break };
        let (message, rest) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
        bytes = rest;
        let Ok(request) = ToTunnel::decode(message) else { continue };
        // A test with more queues than the kernel gives would say nothing more.
        one(&mut state, request, usize::from(with & 3), usize::from(with >> 2 & 3));
    }
}

fn one(state: &mut State, request: ToTunnel, queues: usize, sockets: usize) {
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for _ in 0..queues {
        let (queue, _) = UnixDatagram::pair().expect("a pair of sockets");
        descriptors.push(queue.into());
    }
    for _ in 0..sockets {
        descriptors.push(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket").into());
    }
    let message = request.message.clone();
    let (keys, opened) = (known(state), state.opened.as_ref().map(|(open, _)| open.clone()));
    let answer = state.answer(request, descriptors);
    let after = known(state);
    assert!(after.len() <= MAX_KEYS, "{} keys", after.len());
    let now = state.opened.as_ref().map(|(open, _)| open.clone());
    let Ok(answer) = answer else {
        assert_eq!(after, keys, "what was refused has changed the keys");
        assert_eq!(now, opened, "what was refused has changed the tunnel");
        return;
    };
    let told = answer.encode_to_vec();
    for key in state.keys.values() {
        let private = key.private.bytes();
        assert!(!told.windows(32).any(|part| *part == private[..]), "a private key is told");
    }
    match message.expect("a message of no kind is refused") {
        Message::NewKey(new) => {
            let mut made = keys;
            made.extend(after.iter().find(|(generation, ..)| *generation == new.generation).copied());
            assert_eq!(after, made, "one key is made, of the generation that was asked for");
        }
        Message::Announced(now) => {
            assert_eq!(after.len(), keys.len());
            assert!(after.iter().all(|(generation, _, told)| *told == now.generations.contains(generation)));
        }
        Message::Apply(apply) => {
            let kept: BTreeSet<_> =
                keys.into_iter().filter(|(generation, ..)| apply.generations.contains(generation)).collect();
            assert_eq!(after, kept, "the keys that are in use are kept, and no other");
            configured(state, &apply);
            let mtu = opened.map_or(0, |open| open.mtu);
            let (open, device) =
                state.opened.as_ref().expect("nothing is applied to a tunnel that is not open");
            assert_eq!(open.mtu, if apply.mtu == 0 { mtu } else { apply.mtu });
            assert_eq!(device.status().mtu, open.mtu);
        }
        Message::Open(open) => {
            assert!(opened.is_none() && now.is_some(), "a tunnel is opened once");
            assert!(open.queues as usize >= 1 && (open.queues as usize) < queues + sockets);
            assert_eq!(after, keys);
            configured(state, &open.apply.unwrap_or_default());
        }
        Message::Hello(_) => {
            assert_eq!((after, &now), (keys, &opened));
            assert_eq!((answer.opened, answer.pid), (now, std::process::id()));
        }
        Message::Query(_) => {
            assert_eq!((after, now), (keys, opened));
            let told: Result<serde_json::Value, _> = serde_json::from_slice(&answer.status_json);
            assert!(told.is_ok_and(|status| status.is_object()));
        }
    }
}

/// What is told of the keys, but for their age.
fn known(state: &State) -> BTreeSet<(u64, [u8; 32], bool)> {
    let of = |key: TunnelOwnKey| {
        let public = key.public_key.try_into().expect("a key has 32 bytes");
        (key.generation, public, key.announced)
    };
    state.public_keys().into_iter().map(of).collect()
}

/// The device has these keys and nodes, each once, and no address has two owners.
fn configured(state: &State, apply: &TunnelApply) {
    let (_, device) = state.opened.as_ref().expect("a tunnel that is open");
    let status = device.status();
    let own: Vec<u64> = status.own_keys.iter().map(|(generation, _)| *generation).collect();
    let asked: BTreeSet<u64> = apply.generations.iter().copied().collect();
    assert_eq!(own, asked.into_iter().rev().collect::<Vec<_>>(), "own keys, the newest first");
    let nodes: BTreeSet<&str> = apply.peers.iter().map(|peer| peer.node.as_str()).collect();
    assert!(status.peers.keys().map(String::as_str).eq(nodes), "the nodes");
    for peer in status.peers.values() {
        // Nobody has spoken, so no pair of keys has a state that costs anything.
        assert!(peer.keys.is_empty() && peer.waiting == Some(0));
    }
}

/// Bytes over the socket end at most their own connection.
fn anything(stream: &[u8]) {
    let control = Control::default();
    let (mut agent, process) = UnixStream::pair().expect("a pair of sockets");
    agent.write_all(&stream[..stream.len().min(STREAM)]).expect("the socket takes as much");
    agent.shutdown(Shutdown::Write).expect("an end");
    let _ = control.serve(&process);
    drop(process);
    while let Ok(Some((answer, descriptors))) = recv_frame::<FromTunnel>(&agent) {
        assert!(descriptors.is_empty() && answer.opened.is_none() && answer.keys.len() <= MAX_KEYS);
    }
    let state = control.0.lock();
    assert!(state.opened.is_none(), "a tunnel without descriptors");
    assert!(state.keys.len() <= MAX_KEYS);
}

/// Inputs to begin with.
#[must_use]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let range = |address: &[u8], prefix| TunnelRange { address: address.to_vec(), prefix };
    let key = |generation, byte: u8, port| TunnelPeerKey {
        generation,
        public_key: vec![byte; 32],
        addresses: vec![vec![192, 0, 2, byte]],
        even_port: port,
        odd_port: port + 1,
    };
    let node = |name: &str, keys: Vec<TunnelPeerKey>, allowed: Vec<TunnelRange>| TunnelPeer {
        node: name.to_owned(),
        keys,
        allowed,
    };
    let first = node("a", vec![key(1, 1, 51_871)], vec![range(&[10, 1, 0, 0], 16)]);
    let both = node(
        "a",
        vec![key(2, 2, 51_871), key(1, 1, 51_871)],
        vec![range(&[10, 1, 0, 0], 16), range(&[0xfd; 16], 64)],
    );
    let other = node("b", vec![key(1, 1, 51_871)], vec![range(&[10, 1, 0, 0], 16)]);
    let apply = |generations: &[u64], peers: &[&TunnelPeer], mtu| TunnelApply {
        generations: generations.to_vec(),
        peers: peers.iter().copied().cloned().collect(),
        mtu,
        eager: mtu % 2 == 1,
    };
    let open = |apply| {
        Message::Open(TunnelOpen {
            interface: "none".to_owned(),
            queues: 1,
            port: 51_871,
            mtu: 1420,
            datagram_runs: true,
            keepalive_seconds: 0,
            apply,
        })
    };
    let new = |generation| Message::NewKey(TunnelNewKey { generation, port: 51_871 });
    let told =
        |generations: &[u64]| Message::Announced(TunnelAnnounced { generations: generations.to_vec() });
    let hello = || Message::Hello(TunnelHello {});
    let query = || Message::Query(TunnelQuery {});
    let encoded = |message: Message| ToTunnel { id: 1, message: Some(message) }.encode_to_vec();
    let play = |messages: Vec<Message>| {
        let mut bytes = vec![1];
        for message in messages {
            let with = if matches!(message, Message::Open(_)) { 1 | 1 << 2 } else { 0 };
            let message = encoded(message);
            bytes.push(with);
            bytes.extend((message.len() as u16).to_le_bytes());
            bytes.extend(message);
        }
        bytes
    };
    let stream = |messages: Vec<Message>| {
        let mut bytes = vec![0];
        for message in messages {
            let message = encoded(message);
            bytes.extend((message.len() as u32).to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(message);
        }
        bytes
    };
    vec![
        ("begins", play(vec![hello(), new(1), open(Some(apply(&[1], &[&first], 0))), told(&[1]), query()])),
        (
            "rotates",
            play(vec![
                new(1),
                open(Some(apply(&[1], &[&first], 0))),
                new(2),
                Message::Apply(apply(&[1, 2], &[&both], 0)),
                told(&[2]),
                Message::Apply(apply(&[2], &[&both], 1380)),
                query(),
                hello(),
            ]),
        ),
        (
            "contradicts",
            play(vec![
                new(1),
                open(None),
                Message::Apply(apply(&[1], &[&first, &other], 0)),
                Message::Apply(apply(&[1], &[&other], 0)),
                query(),
            ]),
        ),
        (
            "twice",
            play(vec![
                new(1),
                new(1),
                open(None),
                open(None),
                Message::Apply(apply(&[1, 1], &[&first], 0)),
                Message::Apply(apply(&[1], &[&first, &first], 0)),
                query(),
            ]),
        ),
        (
            "no-such-key",
            play(vec![open(Some(apply(&[4], &[], 0))), Message::Apply(apply(&[4], &[], 0)), query()]),
        ),
        ("many", play((0..10).map(new).chain([told(&[1, 2, 99])]).collect())),
        ("stream", stream(vec![hello(), new(1), told(&[1]), query(), hello()])),
        ("stream-of-an-apply", stream(vec![new(1), Message::Apply(apply(&[1], &[&both], 0)), open(None)])),
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    use super::*;

    #[test]
    fn what_leads_deep_and_what_was_found_once_holds() {
        // Other tests open descriptors at the same time, and this one counts them: it has a process of its own.
        const ALONE: &str = "SOCKMESH_TEST_ALONE";
        let name = "tunnel::control::fuzzing::tests::what_leads_deep_and_what_was_found_once_holds";
        if std::env::var_os(ALONE).is_none() {
            let mut again = std::process::Command::new(std::env::current_exe().unwrap());
            let status = again.args([name, "--exact", "--test-threads", "1"]).env(ALONE, "1").status();
            assert!(status.unwrap().success());
            return;
        }
        for (name, input) in seeds() {
            println!("{name}");
            control(&input);
        }
        let finds = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/finds/tunnel_control");
        for entry in std::fs::read_dir(finds).into_iter().flatten() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            control(&std::fs::read(path).unwrap());
        }
        // And some that differ a little.
        let changes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8);
        let plays = (prop::sample::select(seeds()), changes).prop_map(|((_, mut input), changes)| {
            for (at, value) in changes {
                let at = at.index(input.len());
                input[at] = value;
            }
            input
        });
        let hold = |input: Vec<u8>| {
            control(&input);
            Ok(())
        };
        TestRunner::default().run(&plays, hold).unwrap();
    }
}
