//! Exclusions, refused destinations, and what happens when the listener is gone. Real sockets in network namespaces.

mod support;

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
};

use redirect_bpf::{Exclusions, PodSettings};
use socket2::{Domain, Socket, Type};
use support::*;

#[test]
#[ignore = "needs root"]
fn excluded_ports_and_networks_are_connected_directly() {
    let mut world = World::new();
    let second_v4 = world.remote.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    let exclusions =
        Exclusions { outbound_ports: vec![world.application_v4.port()], ..Exclusions::default() };
    world.enrol(PodSettings { exclusions, ..settings() });
    let second: SocketAddr = (REMOTE_V4, second_v4.port()).into();
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), DIRECT);
    assert_eq!(world.ask_from_pod(second).unwrap(), captured(second));
    assert_eq!(world.counter("connect_passed_excluded_port"), 1);

    let exclusions =
        Exclusions { outbound_cidrs: vec!["10.78.0.0/24".parse().unwrap()], ..Exclusions::default() };
    world.enrol(PodSettings { exclusions, ..settings() });
    assert_eq!(world.ask_from_pod(second).unwrap(), DIRECT);
    assert_eq!(world.ask_from_pod(world.remote_v6()).unwrap(), captured(world.remote_v6()));
    assert_eq!(world.counter("connect_passed_excluded_cidr"), 1);

    // Every IPv6 network is not every network.
    let exclusions = Exclusions { outbound_cidrs: vec!["::/0".parse().unwrap()], ..Exclusions::default() };
    world.enrol(PodSettings { exclusions, ..settings() });
    assert_eq!(world.ask_from_pod(second).unwrap(), captured(second));
    assert_eq!(world.ask_from_pod(world.remote_v6()).unwrap(), DIRECT);
}

#[test]
#[ignore = "needs root"]
fn exclusions_of_the_node_hold_for_every_pod() {
    let exclusions =
        Exclusions { outbound_cidrs: vec!["fd78::/16".parse().unwrap()], ..Exclusions::default() };
    let mut world = World::with_node_exclusions(exclusions);
    world.enrol(settings());
    assert_eq!(world.ask_from_pod(world.remote_v6()).unwrap(), DIRECT);
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), captured(world.remote_v4()));
}

#[test]
#[ignore = "needs root"]
fn an_excluded_tunnel_port_is_an_error_that_says_so() {
    let mut world = World::new();
    let exclusions = Exclusions { inbound_ports: vec![redirect_bpf::TUNNEL_PORT], ..Exclusions::default() };
    let spec = redirect_bpf::PodSpec {
        netns_cookie: world.pod.cookie(),
        netns: world.pod.fd(),
        settings: PodSettings { exclusions, ..settings() },
        listeners: redirect_bpf::Listeners::default(),
    };
    let error = world.redirect.enrol(&spec).unwrap_err().to_string();
    assert!(error.contains("15008"), "{error}");
    assert!(world.redirect.pods().unwrap().is_empty());
}

#[test]
#[ignore = "needs root"]
fn a_service_without_endpoints_refuses_at_once_and_only_for_enrolled_pods() {
    let mut world = World::enrolled();
    let service: SocketAddr = "172.20.0.10:80".parse().unwrap();
    let service_v6: SocketAddr = "[fdaa::10]:80".parse().unwrap();
    let refused: Vec<(IpAddr, u16)> = [service, service_v6, world.remote_v4()]
        .iter()
        .map(|address| (address.ip(), address.port()))
        .collect();
    world.redirect.set_refused(&refused).unwrap();
    for destination in [service, service_v6, world.remote_v4()] {
        let error = world.ask_from_pod(destination).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{destination}");
        // Not as EINPROGRESS either: a non-blocking connect fails in the call.
        let error = world.pod.run(|| {
            let socket =
                Socket::new(Domain::for_address(destination), Type::STREAM.nonblocking(), None).unwrap();
            socket.connect(&destination.into()).unwrap_err()
        });
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{destination}");
    }
    assert_eq!(world.counter("connect_refused_no_endpoint"), 6);
    let other_port: SocketAddr = "172.20.0.10:81".parse().unwrap();
    assert_eq!(world.ask_from_pod(other_port).unwrap(), captured(other_port));
    let address = world.remote_v4();
    assert_eq!(world.remote.run(|| ask(address)).unwrap(), DIRECT);

    world.redirect.set_refused(&refused[1..]).unwrap();
    assert_eq!(world.ask_from_pod(service).unwrap(), captured(service));
    assert_eq!(world.ask_from_pod(service_v6).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
#[ignore = "needs root"]
fn without_listeners_a_fail_closed_pod_refuses() {
    let mut world = World::enrolled();
    world.outbound_v4 = None;
    world.outbound_v6 = None;
    for destination in [world.remote_v4(), world.remote_v6()] {
        let error = world.ask_from_pod(destination).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{destination}");
    }
    assert_eq!(world.counter("connect_refused_no_listener"), 2);
    // A child that is being started elsewhere in this process may hold a copy of the descriptor for a moment.
    wait_until("the kernel dropped the listeners", || !world.redirect.pods().unwrap()[0].listening);
}

#[test]
#[ignore = "needs root"]
fn a_listener_that_was_shut_down_but_not_closed_does_not_count() {
    let world = World::enrolled();
    let listener = world.outbound_v4.as_ref().unwrap().socket();
    listener.shutdown(std::net::Shutdown::Both).unwrap();
    let error = world.ask_from_pod(world.remote_v4()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(world.counter("connect_refused_no_listener"), 1);
}

#[test]
#[ignore = "needs root"]
fn without_listeners_a_fail_open_pod_connects_directly() {
    let mut world = World::new();
    world.enrol(PodSettings { fail_closed: false, ..settings() });
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), captured(world.remote_v4()));
    world.outbound_v4 = None;
    world.outbound_v6 = None;
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), DIRECT);
    assert_eq!(world.ask_from_pod(world.remote_v6()).unwrap(), DIRECT);
    assert_eq!(world.counter("connect_passed_no_listener"), 2);
}

#[test]
#[ignore = "needs root"]
fn without_an_inbound_listener_a_fail_closed_pod_takes_nothing_from_outside() {
    let mut world = World::enrolled();
    let application = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    world.inbound_v4 = None;
    let pod: SocketAddr = (POD_V4, application.port()).into();
    let refusals = || world.counter("inbound_dropped_no_listener");
    let error = world.remote.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.connect_timeout(&pod.into(), std::time::Duration::from_secs(30)).unwrap_err()
    });
    // A lookup that is told to drop answers like a closed port.
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(refusals(), 1);
    // The application is still there for the pod itself.
    assert_eq!(world.ask_from_pod(pod).unwrap(), DIRECT);
}

#[test]
#[ignore = "needs root"]
fn without_an_inbound_listener_the_application_of_a_fail_open_pod_answers() {
    let mut world = World::new();
    let application = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    world.enrol(PodSettings { fail_closed: false, ..settings() });
    world.inbound_v4 = None;
    let pod: SocketAddr = (POD_V4, application.port()).into();
    assert_eq!(world.remote.run(|| ask(pod)).unwrap(), DIRECT);
    assert_eq!(world.counter("inbound_passed_no_listener"), 1);
}

#[test]
#[ignore = "needs root"]
fn an_own_socket_passes_even_when_the_listener_is_gone() {
    let mut world = World::enrolled();
    world.outbound_v4 = None;
    let own = world.pod.run(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    world.redirect.mark_own(own.as_fd()).unwrap();
    own.connect(&world.remote_v4().into()).unwrap();
    assert_eq!(line(&own.into()).unwrap(), DIRECT);
}
