//! Full maps, sockets without memory, and entries that are missing: refused and counted, never past the mesh. Real sockets
//! in network namespaces.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails its test")]
mod support;

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
};

use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use nix::libc;
use redirect_bpf::PodSettings;
use socket2::{Domain, SockFilter, Socket, Type};
use support::*;

/// What a listener says of a connection whose destination it was not told; the worker closes it.
const NOWHERE: &str = "outbound to nowhere";

fn pinned<K: Pod, V: Pod>(world: &World, name: &str) -> HashMap<MapData, K, V> {
    let path = world.bpffs.path().join("sockmesh").join(&world.options.node).join("maps").join(name);
    Map::HashMap(MapData::from_pin(path).unwrap()).try_into().unwrap()
}

/// Takes every place of map `HANDOFF` with connections that nobody makes.
fn fill_handoff(world: &World) {
    let mut handoff: HashMap<MapData, [u8; 48], [u8; 20]> = pinned(world, "HANDOFF");
    for number in 0..u64::MAX {
        let mut key = [0xff; 48];
        key[8..16].copy_from_slice(&number.to_ne_bytes());
        if let Err(error) = handoff.insert(key, [0; 20], 0) {
            let text = format!("{error:?}");
            assert!(text.contains(&format!("code: {}", libc::E2BIG)), "{text}");
            return;
        }
    }
}

/// Makes the pod's sockets as poor in option memory as kernels before 6.8 make every socket, so that a filter can use all
/// of it up (a filter has at most 4096 instructions).
fn lower_option_memory(pod: &Netns) {
    pod.run(|| match std::fs::write("/proc/sys/net/core/optmem_max", "20480") {
        Err(error) if error.kind() != ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    });
}

/// Attaches the longest filter that the socket has memory for; it accepts every packet. Sockets that a listener accepts
/// have a copy, and as little memory left.
fn use_up_option_memory(socket: &Socket) {
    let accept = || SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, u32::MAX);
    let fits = |instructions: usize| -> io::Result<()> {
        // A filter is only charged less than its predecessor when that one is gone.
        match socket.detach_filter() {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
            _ => {}
        }
        let filter: Vec<SockFilter> = (0..instructions).map(|_| accept()).collect();
        socket.attach_filter(&filter)
    };
    let (mut most, mut too_many) = (1, 4096);
    assert!(fits(too_many).is_err(), "there is more option memory than a filter can use up");
    while too_many - most > 1 {
        let middle = most.midpoint(too_many);
        match fits(middle) {
            Ok(()) => most = middle,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
                too_many = middle;
            }
        }
    }
    fits(most).unwrap();
}

#[test]
#[ignore = "needs root"]
fn a_socket_without_memory_for_its_destination_is_refused() {
    let world = World::enrolled();
    lower_option_memory(&world.pod);
    for destination in [world.remote_v4(), world.remote_v6()] {
        let socket =
            world.pod.run(|| Socket::new(Domain::for_address(destination), Type::STREAM, None).unwrap());
        use_up_option_memory(&socket);
        let error = socket.connect(&destination.into()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{destination}");
        // The same socket, once it has memory again.
        socket.detach_filter().unwrap();
        socket.connect(&destination.into()).unwrap();
        assert_eq!(line(&socket.into()).unwrap(), captured(destination));
    }
    assert_eq!(world.counter("connect_refused_no_memory"), 2);
    world.application_v4.assert_unused();
    world.application_v6.assert_unused();
}

#[test]
#[ignore = "needs root"]
fn an_accepted_socket_without_memory_has_no_destination() {
    let world = World::enrolled();
    lower_option_memory(&world.pod);
    for (listener, destination) in
        [(&world.outbound_v4, world.remote_v4()), (&world.outbound_v6, world.remote_v6())]
    {
        let listener = listener.as_ref().unwrap().socket();
        use_up_option_memory(listener);
        assert_eq!(world.ask_from_pod(destination).unwrap(), NOWHERE);
        listener.detach_filter().unwrap();
        assert_eq!(world.ask_from_pod(destination).unwrap(), captured(destination));
    }
    assert_eq!(world.counter("handoff_no_memory"), 2);
    world.application_v4.assert_unused();
    world.application_v6.assert_unused();
}

#[test]
#[ignore = "needs root"]
fn connections_that_find_the_handoff_full_have_no_destination_and_no_privilege() {
    let world = World::enrolled();
    fill_handoff(&world);
    for destination in [world.remote_v4(), world.remote_v6()] {
        assert_eq!(world.ask_from_pod(destination).unwrap(), NOWHERE);
    }
    assert_eq!(world.counter("handoff_full"), 2);
    world.application_v4.assert_unused();
    world.application_v6.assert_unused();
    // A process of the node is not known as one, so a strict pod takes it for anybody.
    let answer = world.node.run(|| ask((POD_ON_NODE_V4, 8080).into())).unwrap();
    assert!(answer.starts_with("inbound from outside"), "{answer}");
    assert_eq!(world.counter("handoff_full"), 3);

    let mut handoff: HashMap<MapData, [u8; 48], [u8; 20]> = pinned(&world, "HANDOFF");
    let keys: Vec<[u8; 48]> = handoff.keys().map(Result::unwrap).collect();
    assert_eq!(keys.len(), 65_536);
    for key in keys {
        handoff.remove(&key).unwrap();
    }
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), captured(world.remote_v4()));
}

#[test]
#[ignore = "needs root"]
fn a_namespace_whose_entry_is_missing_takes_nothing_from_outside() {
    let world = World::enrolled();
    let application = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    let application_v6 = world.pod.run(|| Server::start(listen(any_v6()), |_, _| DIRECT.to_owned()));
    // As left by a crash in the middle, or by somebody who edits the map: the link stays.
    let mut pods: HashMap<MapData, u64, [u8; 8]> = pinned(&world, "PODS");
    let cookie = world.pod.cookie();
    let entry = pods.get(&cookie, 0).unwrap();
    pods.remove(&cookie).unwrap();
    let addresses: [SocketAddr; 2] =
        [(POD_V4, application.port()).into(), (POD_V6, application_v6.port()).into()];
    for pod in addresses {
        let error = world.remote.run(|| ask(pod)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{pod}");
    }
    assert_eq!(world.counter("inbound_dropped_unknown_pod"), 2);
    application.assert_unused();
    application_v6.assert_unused();

    pods.insert(cookie, entry, 0).unwrap();
    for pod in addresses {
        let answer = world.remote.run(|| ask(pod)).unwrap();
        assert!(answer.starts_with("inbound from outside"), "{answer}");
    }
}

#[test]
#[ignore = "needs root"]
fn with_outbound_capture_off_the_pod_connects_directly_and_is_counted() {
    let mut world = World::new();
    world.enrol(PodSettings { capture_outbound: false, ..settings() });
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), DIRECT);
    assert_eq!(world.ask_from_pod(world.remote_v6()).unwrap(), DIRECT);
    assert_eq!(world.counter("connect_passed_capture_off"), 2);
}
