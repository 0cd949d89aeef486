//! Adoption, updates, un-enrolling and uninstalling, with connections going on meanwhile.
#![allow(unsafe_code)]
mod support;

use std::{
    io::ErrorKind,
    net::SocketAddr,
    os::fd::AsFd,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use aya::{
    maps::{MapData, MapInfo},
    programs::links::PinnedLink,
};
use nix::libc;
use redirect_bpf::{
    Arrivals, Directions, Error, Exclusions, Listeners, Opened, Options, PodSettings, Redirect,
};
use support::*;

/// Connects from the pod again and again while `work` goes on; every answer must be in `allowed`. Gives their number.
fn under_connections(world: &World, allowed: &[&str], work: impl FnOnce()) -> u64 {
    let (done, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let destination = world.remote_v4();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                world.pod.run(|| {
                    while !done.load(Ordering::Relaxed) {
                        let answer = match ask(destination) {
                            Ok(answer) => answer,
                            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                                "refused".to_owned()
                            }
                            Err(error) => panic!("{error}"),
                        };
                        assert!(allowed.contains(&answer.as_str()), "{answer:?} is not in {allowed:?}");
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                });
            });
        }
        // Connections go on before, while and after.
        wait_until("first connections", || count.load(Ordering::Relaxed) > 20);
        work();
        let after = count.load(Ordering::Relaxed);
        wait_until("last connections", || count.load(Ordering::Relaxed) > after + 20);
        done.store(true, Ordering::Relaxed);
    });
    count.into_inner()
}

#[test]
#[ignore = "needs root"]
fn a_later_start_takes_over_without_a_gap() {
    let mut world = World::enrolled();
    assert_eq!(world.redirect.opened(), &Opened::Fresh);
    let pins = world.bpffs.path().join("sockmesh").join(&world.options.node);
    let link = |name: &str| {
        let info = PinnedLink::from_pin(pins.join(name)).unwrap();
        let info = aya::programs::links::FdLink::from(info).info().unwrap();
        (info.id(), info.program_id())
    };
    let pod_link = format!("pods/{:016x}", world.pod.cookie());
    let names = ["links/connect4", "links/connect6", "links/sock_ops", &pod_link];
    let before: Vec<_> = names.iter().map(|name| link(name)).collect();
    let pods = world.redirect.pods().unwrap();
    let captured_before = world.counter("connect_captured_v4");

    let options = world.options.clone();
    let mut starts: Vec<Redirect> = Vec::new();
    let connections = under_connections(&world, &[&captured(world.remote_v4())], || {
        for _ in 0..20 {
            // The one before is gone, as after a crash: only the pins hold what is in force.
            starts.clear();
            starts.push(Redirect::open(&options).unwrap());
        }
    });
    world.redirect = starts.pop().unwrap();

    assert_eq!(world.redirect.opened(), &Opened::Adopted);
    assert_eq!(world.redirect.pods().unwrap(), pods);
    assert!(pods[0].listening && pods[0].inbound_attached);
    for (name, (link_id, program_id)) in names.iter().zip(before) {
        let (link_id_now, program_id_now) = link(name);
        assert_eq!(link_id_now, link_id, "{name} was attached anew");
        assert_ne!(program_id_now, program_id, "{name} has the old program");
    }
    // Counters go on too: every connection was captured, none was passed.
    assert_eq!(world.counter("connect_captured_v4"), captured_before + connections);
    world.application_v4.assert_unused();
}

#[test]
#[ignore = "needs root"]
fn what_a_start_wrote_is_found_by_the_next() {
    let mut world = World::new();
    let exclusions = Exclusions {
        outbound_ports: vec![25, 3306],
        outbound_cidrs: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
        inbound_ports: vec![9090],
        inbound_cidrs: vec!["192.168.0.0/16".parse().unwrap()],
    };
    let mut wanted = PodSettings { exclusions, fail_closed: false, ..settings() };
    wanted.addresses.sort_unstable();
    world.enrol(wanted.clone());
    let pod = Redirect::open(&world.options).unwrap().pods().unwrap().remove(0);
    assert_eq!(pod.netns_cookie, world.pod.cookie());
    assert_eq!(pod.settings, wanted);
    assert_eq!(pod.outbound_port_v4, world.outbound_v4.as_ref().unwrap().port());
    assert_eq!(pod.outbound_port_v6, world.outbound_v6.as_ref().unwrap().port());

    let refused: SocketAddr = "172.20.0.10:80".parse().unwrap();
    world.redirect.set_refused(&[(refused.ip(), refused.port())]).unwrap();
    let mut next = Redirect::open(&world.options).unwrap();
    assert_eq!(world.ask_from_pod(refused).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    // The next start knows what is in the map: an empty set clears it.
    next.set_refused(&[]).unwrap();
    world.enrol(settings());
    assert_eq!(world.ask_from_pod(refused).unwrap(), captured(refused));
}

#[test]
#[ignore = "needs root"]
fn maps_of_another_layout_are_replaced_and_a_fail_closed_pod_never_passes() {
    let mut world = World::enrolled();
    let maps = world.bpffs.path().join("sockmesh").join(&world.options.node).join("maps");
    std::fs::remove_file(maps.join("REFUSED")).unwrap();
    let options = world.options.clone();
    let mut next = None;
    // Between two programs of one connection the layout may change: then the listener gets it without a destination,
    // and the worker closes it.
    let allowed = [&captured(world.remote_v4()), "refused", "outbound to nowhere"];
    under_connections(&world, &allowed, || {
        next = Some(Redirect::open(&options).unwrap());
    });
    world.redirect = next.unwrap();
    assert_eq!(world.redirect.opened(), &Opened::Recreated("REFUSED is missing".to_owned()));
    let pod = world.redirect.pods().unwrap().remove(0);
    assert!(!pod.listening);
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    world.application_v4.assert_unused();

    // The worker needs the map of the new layout; then the pod is enrolled again.
    let flows = redirect_bpf::FlowMaps::from_fd(world.redirect.worker_map().unwrap()).unwrap();
    let listener = world.pod.run(|| listen((std::net::Ipv4Addr::LOCALHOST, 0).into()));
    world.outbound_v4 = Some(Server::start(listener, move |stream, _| {
        captured(flows.original_destination(stream.as_fd()).unwrap().unwrap())
    }));
    world.enrol(settings());
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), captured(world.remote_v4()));
    assert_eq!(Redirect::open(&options).unwrap().opened(), &Opened::Adopted);
}

#[test]
#[ignore = "needs root"]
fn a_successor_with_maps_of_another_form_has_the_pods_and_their_listeners_and_the_one_before_marks_there() {
    let mut world = World::enrolled();
    let maps = world.bpffs.path().join("sockmesh").join(&world.options.node).join("maps");
    // As a version before may have had it: pods in entries of another form, of which none can be carried over.
    std::fs::remove_file(maps.join("PODS")).unwrap();
    MapData::from_pin(maps.join("REFUSED")).unwrap().pin(maps.join("PODS")).unwrap();
    let options = world.options.clone();
    let mut next = None;
    // The worker of this world reads the notes of the maps before.
    let nowhere = "outbound to nowhere";
    let allowed = [&captured(world.remote_v4()), "refused", nowhere];
    under_connections(&world, &allowed, || {
        next = Some(Redirect::open_with(&options, &[world.spec(settings())]).unwrap());
    });
    let next = next.unwrap();
    let Opened::Recreated(why) = next.opened() else { panic!("{:?}", next.opened()) };
    assert!(why.starts_with("PODS has [type, key size, value size, entries] [1, 20, 4, "), "{why}");
    let pod = next.pods().unwrap().remove(0);
    assert!(pod.listening && pod.inbound_attached);
    assert_eq!(pod.settings, PodSettings { addresses: pod.settings.addresses.clone(), ..settings() });
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), nowhere, "the same listener has it");
    world.application_v4.assert_unused();

    // The process before, whose worker drains, marks its sockets in vain until it does so in the maps in force.
    let own_socket = |world: &World| {
        let own = world
            .pod
            .run(|| socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap());
        world.redirect.mark_own(own.as_fd()).unwrap();
        own.connect(&world.remote_v4().into()).unwrap();
        line(&own.into()).unwrap()
    };
    assert_eq!(own_socket(&world), nowhere);
    world.redirect.use_maps(next.own_map().unwrap(), next.worker_map().unwrap()).unwrap();
    assert_eq!(own_socket(&world), DIRECT);
    let flows = redirect_bpf::FlowMaps::from_fd(world.redirect.worker_map().unwrap()).unwrap();
    let listener = world.pod.run(|| listen((std::net::Ipv4Addr::LOCALHOST, 0).into()));
    world.outbound_v4 = Some(Server::start(listener, move |stream, _| {
        captured(flows.original_destination(stream.as_fd()).unwrap().unwrap())
    }));
    world.redirect = next;
    world.enrol(settings());
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), captured(world.remote_v4()));
    assert_eq!(Redirect::open(&options).unwrap().opened(), &Opened::Adopted);
}

#[test]
#[ignore = "needs root"]
fn a_start_interrupted_while_it_replaced_the_maps_is_finished_by_the_next() {
    let mut world = World::enrolled();
    let node = world.bpffs.path().join("sockmesh").join(&world.options.node);
    // As left between the two renames: the maps in use have the name of the prepared ones.
    std::fs::create_dir(node.join("maps-old")).unwrap();
    std::fs::rename(node.join("maps"), node.join("maps-next")).unwrap();
    world.redirect = Redirect::open(&world.options).unwrap();
    assert_eq!(world.redirect.opened(), &Opened::Adopted);
    assert_eq!(world.redirect.pods().unwrap().len(), 1);
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), captured(world.remote_v4()));
    // As left while it prepared them.
    std::fs::create_dir(node.join("maps-next")).unwrap();
    world.redirect = Redirect::open(&world.options).unwrap();
    assert_eq!(world.redirect.opened(), &Opened::Adopted);
    assert!(!node.join("maps-next").exists() && !node.join("maps-old").exists());
}

#[test]
#[ignore = "needs root"]
fn a_pod_whose_namespace_is_gone_is_forgotten_by_the_next_start() {
    let mut world = World::enrolled();
    world.forget_pod();
    wait_until("the namespace is gone and forgotten", || {
        world.redirect = Redirect::open(&world.options).unwrap();
        world.redirect.pods().unwrap().is_empty()
    });
}

#[test]
#[ignore = "needs root"]
fn unenrolling_ends_capture_in_both_directions() {
    let mut world = World::enrolled();
    let application = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    let cookie = world.pod.cookie();
    world.redirect.unenrol(cookie).unwrap();
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), DIRECT);
    let pod: SocketAddr = (POD_V4, application.port()).into();
    assert_eq!(world.remote.run(|| ask(pod)).unwrap(), DIRECT);
    assert!(world.redirect.pods().unwrap().is_empty());
    // Again, and of a pod that never was.
    world.redirect.unenrol(cookie).unwrap();
    world.redirect.unenrol(u64::MAX).unwrap();

    world.enrol(settings());
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), captured(world.remote_v4()));
}

#[test]
#[ignore = "needs root"]
fn enrolling_and_unenrolling_in_turn_breaks_no_connection() {
    let mut world = World::enrolled();
    let destination = world.remote_v4();
    let (done, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let pod = world.pod.try_clone();
    thread::scope(|scope| {
        scope.spawn(|| {
            pod.run(|| {
                while !done.load(Ordering::Relaxed) {
                    let answer = ask(destination).unwrap();
                    assert!(answer == DIRECT || answer == captured(destination), "{answer}");
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        });
        for _ in 0..50 {
            world.redirect.unenrol(world.pod.cookie()).unwrap();
            world.enrol(settings());
        }
        wait_until("connections", || count.load(Ordering::Relaxed) > 20);
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
#[ignore = "needs root"]
fn updating_a_pod_that_is_not_enrolled_is_an_error() {
    let mut world = World::new();
    let error = world.redirect.update(world.pod.cookie(), &settings(), &Listeners::default()).unwrap_err();
    assert!(error.to_string().contains("enrol"), "{error}");
}

#[test]
#[ignore = "needs root"]
fn uninstalling_leaves_no_pin_no_link_and_no_map() {
    let mut world = World::enrolled();
    // Its program holds the map that it is attached to.
    world.redirect.load_acceleration(Arrivals::ThroughProgram).unwrap();
    world.enrol(PodSettings { acceleration: Directions::BOTH, ..settings() });
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), captured(world.remote_v4()));
    assert_eq!(world.counter("fast_socket_added"), 2);
    let root = world.bpffs.path().join("sockmesh");
    let node = root.join(&world.options.node);
    let maps: Vec<u32> = std::fs::read_dir(node.join("maps"))
        .unwrap()
        .map(|entry| MapInfo::from_pin(entry.unwrap().path()).unwrap().id())
        .collect();
    assert_eq!(maps.len(), 13);
    redirect_bpf::uninstall(&world.bpffs.path(), &world.options.node).unwrap();
    assert!(!root.exists());
    // At once, not when the last descriptor is closed: this world still holds its maps.
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), DIRECT);
    // Nothing there is no error.
    redirect_bpf::uninstall(&world.bpffs.path(), &world.options.node).unwrap();
    drop(world);
    wait_until("the kernel freed the maps", || maps.iter().all(|id| MapInfo::from_id(*id).is_err()));
}

#[test]
#[ignore = "needs root"]
fn a_worker_without_any_right_reads_and_writes_its_own_sockets() {
    let world = World::enrolled();
    let listener = world.pod.run(|| listen((std::net::Ipv4Addr::LOCALHOST, 0).into()));
    let mut world = world;
    let listeners = Listeners { outbound_v4: Some(listener.as_fd()), ..Listeners::default() };
    world.redirect.update(world.pod.cookie(), &settings(), &listeners).unwrap();
    let destination = world.remote_v4();
    let _client = world.pod.run(|| std::net::TcpStream::connect(destination).unwrap());
    let (accepted, _) = listener.accept().unwrap();
    let own =
        world.pod.run(|| socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap());
    let flows = &world.flows;
    thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: no pointers. The system call itself changes this thread only.
            let answer = unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) };
            assert_eq!(answer, 0);
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
            assert_eq!(flows.original_destination(accepted.as_fd()).unwrap(), Some(destination));
            assert!(!flows.is_from_node(accepted.as_fd()).unwrap());
            flows.set_peer_name(own.as_fd(), destination).unwrap();
        });
    });
}

#[test]
#[ignore = "needs root"]
fn no_note_stays_behind_whether_connections_succeed_or_fail() {
    let world = World::enrolled();
    let own_to = |address: SocketAddr| {
        let own = world
            .pod
            .run(|| socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap());
        world.redirect.mark_own(own.as_fd()).unwrap();
        world.flows.set_peer_name(own.as_fd(), world.remote_v4()).unwrap();
        own.connect(&address.into())
    };
    let application = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    world.ask_from_pod(world.remote_v4()).unwrap();
    own_to(application.address).unwrap();
    world.node.run(|| ask((POD_ON_NODE_V4, 80).into())).unwrap();
    assert_eq!(world.counter("handoff_taken"), 3);
    // Nobody takes these: port 1 is closed, and the inbound listeners do not listen any more.
    let closed = own_to("127.0.0.1:1".parse().unwrap()).unwrap_err();
    assert_eq!(closed.kind(), ErrorKind::ConnectionRefused);
    world.inbound_v4.as_ref().unwrap().socket().shutdown(std::net::Shutdown::Both).unwrap();
    world.node.run(|| ask((POD_ON_NODE_V4, 80).into())).unwrap_err();
    assert_eq!(world.counter("handoff_left"), 5);

    let path = world.bpffs.path().join("sockmesh").join(&world.options.node).join("maps/HANDOFF");
    let handoff = aya::maps::Map::HashMap(aya::maps::MapData::from_pin(path).unwrap());
    let handoff: aya::maps::HashMap<_, [u8; 48], [u8; 20]> = handoff.try_into().unwrap();
    assert_eq!(handoff.keys().count(), 0);
}

#[test]
#[ignore = "needs root"]
fn a_directory_that_is_no_bpf_file_system_is_named_with_what_to_do() {
    let options = Options {
        bpffs: "/tmp".into(),
        node: "node".into(),
        cgroup: None,
        node_netns_cookie: 1,
        exclusions: Exclusions::default(),
    };
    let error = Redirect::open(&options).unwrap_err();
    assert!(matches!(error, Error::NotBpffs(_)));
    assert!(error.to_string().contains("mount -t bpf bpf /tmp"), "{error}");
    let missing = redirect_bpf::probe(Path::new("/tmp"));
    assert_eq!(missing.len(), 1, "{missing:?}");
    assert!(missing[0].fatal && missing[0].remedy.contains("mount -t bpf bpf /tmp"));
}

#[test]
#[ignore = "needs root"]
fn this_kernel_has_everything() {
    let world = World::new();
    assert_eq!(redirect_bpf::probe(&world.bpffs.path()), []);
}

#[test]
#[ignore = "needs root"]
fn cookies_are_the_same_from_a_socket_and_from_its_namespace() {
    let world = World::new();
    let socket =
        world.pod.run(|| socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap());
    assert_eq!(redirect_bpf::netns_cookie(socket.as_fd()).unwrap(), world.pod.cookie());
    assert_ne!(world.pod.cookie(), world.node.cookie());
    assert_ne!(redirect_bpf::socket_cookie(socket.as_fd()).unwrap(), 0);
}
