//! Whatever an agent may say.

use std::io::Write;
use std::net::Shutdown;

use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::ipc::blocking::recv_frame;
use crate::ipc::proto::{
    TunnelAnnounced, TunnelHello, TunnelNewKey, TunnelPeer, TunnelPeerKey, TunnelQuery, TunnelRange,
};

/// Few numbers, so that messages are about the same keys.
fn generation() -> impl Strategy<Value = u64> {
    prop_oneof![0..12u64, Just(u64::MAX)]
}

fn number() -> impl Strategy<Value = u32> {
    prop_oneof![0..70u32, Just(51_871), any::<u32>()]
}

fn address() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![Just(4usize), Just(16), 0..20usize]
        .prop_flat_map(|n| proptest::collection::vec(any::<u8>(), n))
}

fn peer() -> impl Strategy<Value = TunnelPeer> {
    let public_key = prop_oneof![Just(32usize), 0..40usize];
    let public_key = public_key.prop_flat_map(|n| proptest::collection::vec(any::<u8>(), n));
    let addresses = proptest::collection::vec(address(), 0..3);
    let key = (generation(), public_key, addresses, number(), number()).prop_map(
        |(generation, public_key, addresses, even_port, odd_port)| TunnelPeerKey {
            generation,
            public_key,
            addresses,
            even_port,
            odd_port,
        },
    );
    let range = (address(), number()).prop_map(|(address, prefix)| TunnelRange { address, prefix });
    let (keys, allowed) = (proptest::collection::vec(key, 0..3), proptest::collection::vec(range, 0..4));
    ("[a-c]", keys, allowed).prop_map(|(node, keys, allowed)| TunnelPeer { node, keys, allowed })
}

fn apply() -> impl Strategy<Value = TunnelApply> {
    let generations = proptest::collection::vec(generation(), 0..4);
    (generations, proptest::collection::vec(peer(), 0..3), number(), any::<bool>())
        .prop_map(|(generations, peers, mtu, eager)| TunnelApply { generations, peers, mtu, eager })
}

fn message() -> impl Strategy<Value = Option<Message>> {
    let open = (".{0,20}", any::<[u32; 4]>(), any::<bool>(), proptest::option::of(apply())).prop_map(
        |(interface, [queues, port, mtu, keepalive_seconds], datagram_runs, apply)| TunnelOpen {
            interface,
            queues,
            port,
            mtu,
            datagram_runs,
            keepalive_seconds,
            apply,
        },
    );
    let new = (generation(), number()).prop_map(|(generation, port)| TunnelNewKey { generation, port });
    let announced = proptest::collection::vec(generation(), 0..4);
    prop_oneof![
        1 => Just(None),
        1 => Just(Some(Message::Hello(TunnelHello {}))),
        1 => Just(Some(Message::Query(TunnelQuery {}))),
        1 => open.prop_map(|open| Some(Message::Open(open))),
        4 => new.prop_map(|new| Some(Message::NewKey(new))),
        1 => announced.prop_map(|generations| Some(Message::Announced(TunnelAnnounced { generations }))),
        1 => apply().prop_map(|apply| Some(Message::Apply(apply))),
    ]
}

proptest! {
    /// As an agent of another version would, or one whose bytes got lost: what is refused changes nothing, and what is
    /// answered never has a private key in it.
    #[test]
    fn no_conversation_stops_the_process_or_takes_its_keys(
        messages in proptest::collection::vec((message(), any::<prop::sample::Index>(), proptest::option::of(any::<u8>())), 1..30),
    ) {
        let mut state = State::default();
        for (message, at, byte) in messages {
            let mut bytes = ToTunnel { id: 1, message }.encode_to_vec();
            if let Some(byte) = byte {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let Ok(request) = ToTunnel::decode(bytes.as_slice()) else { continue };
            let before = state.public_keys();
            let socket = OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
            match state.answer(request, vec![socket]) {
                Ok(answer) => {
                    for key in state.keys.values() {
                        let private = key.private.bytes();
                        let told = answer.encode_to_vec();
                        prop_assert!(!told.windows(32).any(|part| *part == private[..]));
                    }
                }
                Err(error) => {
                    prop_assert!(!error.is_empty());
                    prop_assert_eq!(state.public_keys(), before);
                }
            }
            prop_assert!(state.keys.len() <= MAX_KEYS && state.opened.is_none());
        }
    }
}

fn hello(control: &Control) -> FromTunnel {
    let hello = ToTunnel { id: 7, message: Some(Message::Hello(TunnelHello {})) };
    control.0.lock().answer(hello, Vec::new()).expect("a hello is always answered")
}

proptest! {
    #[test]
    fn whatever_an_agent_says_is_answered_or_refused_and_no_key_is_made_or_lost_by_it(
        messages in proptest::collection::vec(message(), 0..30),
    ) {
        let control = Control::default();
        for message in messages {
            let before = hello(&control).keys;
            let answer = control.0.lock().answer(ToTunnel { id: 1, message: message.clone() }, Vec::new());
            let after = hello(&control).keys;
            prop_assert!(after.len() <= MAX_KEYS);
            match (&message, &answer) {
                (Some(Message::NewKey(new)), Ok(answer)) => {
                    prop_assert_eq!(after.len(), before.len() + 1);
                    prop_assert!(answer.keys.iter().any(|key| key.generation == new.generation));
                }
                (Some(Message::Announced(now)), Ok(_)) => {
                    let told = |key: &TunnelOwnKey| key.announced == now.generations.contains(&key.generation);
                    prop_assert!(after.iter().all(told));
                }
                // Nothing was ever opened.
                (Some(Message::Apply(_) | Message::Query(_) | Message::Open(_)) | None, answer) => {
                    prop_assert!(answer.is_err());
                    prop_assert_eq!(after, before);
                }
                _ => prop_assert_eq!(after, before),
            }
        }
    }

    #[test]
    fn whatever_comes_over_the_socket_ends_at_most_its_own_connection(
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        head in proptest::option::of((any::<u32>(), 0..3_u32)),
        message in message(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut frame = ToTunnel { id: 3, message }.encode_to_vec();
        frame.truncate(cut.index(frame.len() + 1));
        let mut framed = (frame.len() as u32).to_be_bytes().to_vec();
        framed.extend([0; 4]);
        framed.extend(frame);
        let mut hostile: Vec<u8> = Vec::new();
        if let Some((length, descriptors)) = head {
            hostile.extend(length.to_be_bytes());
            hostile.extend(descriptors.to_be_bytes());
        }
        hostile.extend(noise);
        let control = Control::default();
        for bytes in [framed, hostile] {
            let (mut agent, process) = UnixStream::pair().unwrap();
            agent.write_all(&bytes).unwrap();
            agent.shutdown(Shutdown::Write).unwrap();
            // An error is the end of this connection.
            let _ = control.serve(&process);
            drop(process);
            while let Ok(Some((answer, _))) = recv_frame::<FromTunnel>(&agent) {
                prop_assert!(answer.opened.is_none());
            }
            prop_assert_eq!(hello(&control).pid, std::process::id());
        }
    }
}
