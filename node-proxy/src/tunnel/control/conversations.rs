//! Whatever an agent may say.

use proptest::prelude::*;
use prost::Message as _;

use super::*;
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
    (generations, proptest::collection::vec(peer(), 0..3), number())
        .prop_map(|(generations, peers, mtu)| TunnelApply { generations, peers, mtu })
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
