//! What arrives at an enrolled pod. Real sockets in network namespaces.

mod support;

use std::net::SocketAddr;

use redirect_bpf::{Exclusions, PodSettings, TUNNEL_PORT};
use support::*;

#[test]
#[ignore = "needs root"]
fn a_connection_from_outside_reaches_the_listener_on_any_port() {
    let world = World::enrolled();
    for port in [80, 9999, TUNNEL_PORT] {
        for (client, pod) in [
            (REMOTE_V4.to_string(), SocketAddr::from((POD_V4, port))),
            (REMOTE_V6.to_string(), SocketAddr::from((POD_V6, port))),
        ] {
            let answer = world.remote.run(|| ask(pod)).unwrap();
            assert_eq!(answer, format!("inbound from outside {client} to {pod}"));
        }
    }
    assert_eq!(world.counter("inbound_captured_v4"), 3);
    assert_eq!(world.counter("inbound_captured_v6"), 3);
}

#[test]
#[ignore = "needs root"]
fn a_port_that_the_application_listens_on_is_taken_over() {
    let world = World::enrolled();
    let application = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    let pod: SocketAddr = (POD_V4, application.port()).into();
    let answer = world.remote.run(|| ask(pod)).unwrap();
    assert_eq!(answer, format!("inbound from outside {REMOTE_V4} to {pod}"));
}

#[test]
#[ignore = "needs root"]
fn a_process_of_the_node_is_recognised() {
    let world = World::enrolled();
    for (client, pod) in [
        ("10.77.0.1", SocketAddr::from((POD_ON_NODE_V4, 8080))),
        ("fd77::1", SocketAddr::from((POD_ON_NODE_V6, 8080))),
    ] {
        let answer = world.node.run(|| ask(pod)).unwrap();
        assert_eq!(answer, format!("inbound from node {client} to {pod}"));
    }
}

#[test]
#[ignore = "needs root"]
fn a_socket_of_the_mesh_in_the_nodes_namespace_is_no_process_of_the_node() {
    use std::os::fd::AsFd;
    let world = World::enrolled();
    let pod: SocketAddr = (POD_ON_NODE_V4, 8080).into();
    let own =
        world.node.run(|| socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap());
    world.redirect.mark_own(own.as_fd()).unwrap();
    own.connect(&pod.into()).unwrap();
    assert_eq!(line(&own.into()).unwrap(), format!("inbound from outside 10.77.0.1 to {pod}"));
}

#[test]
#[ignore = "needs root"]
fn excluded_ports_and_sources_go_to_the_application_but_never_the_tunnel_port() {
    let mut world = World::new();
    let application = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    let other = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    let exclusions = Exclusions {
        inbound_ports: vec![application.port()],
        inbound_cidrs: vec!["10.77.0.0/24".parse().unwrap()],
        ..Exclusions::default()
    };
    world.enrol(PodSettings { exclusions, ..settings() });
    let ask_remote = |port| world.remote.run(|| ask((POD_V4, port).into())).unwrap();
    assert_eq!(ask_remote(application.port()), DIRECT);
    assert!(ask_remote(other.port()).starts_with("inbound from outside"));
    let ask_node = |port| world.node.run(|| ask((POD_ON_NODE_V4, port).into())).unwrap();
    assert_eq!(ask_node(other.port()), DIRECT);
    assert!(ask_node(TUNNEL_PORT).starts_with("inbound from node"));
    assert_eq!(world.counter("inbound_passed_excluded_port"), 1);
    assert_eq!(world.counter("inbound_passed_excluded_cidr"), 1);
}

#[test]
#[ignore = "needs root"]
fn with_inbound_capture_off_the_application_answers() {
    let mut world = World::new();
    let application = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    world.enrol(PodSettings { capture_inbound: false, ..settings() });
    let answer = world.remote.run(|| ask((POD_V4, application.port()).into())).unwrap();
    assert_eq!(answer, DIRECT);
    assert_eq!(world.counter("inbound_passed_capture_off"), 1);
}
