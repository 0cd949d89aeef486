//! Whom applications see as their peer. Real sockets in network namespaces.

mod support;

use std::{
    io::Read,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::fd::AsFd,
};

use nix::libc;
use socket2::{Domain, Socket, Type};
use support::*;

#[test]
#[ignore = "needs root"]
fn the_client_sees_the_destination_it_asked_for() {
    let world = World::enrolled();
    let mapped: SocketAddr = (REMOTE_V4.to_ipv6_mapped(), 80).into();
    for destination in [world.remote_v4(), world.remote_v6(), mapped] {
        let stream = world.pod.run(|| TcpStream::connect(destination).unwrap());
        assert_eq!(stream.peer_addr().unwrap(), destination);
    }
    assert_eq!(world.counter("peername_shown_destination"), 3);
}

#[test]
#[ignore = "needs root"]
fn a_socket_that_connects_again_elsewhere_shows_where_it_is_now() {
    let world = World::enrolled();
    let application = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    let local: SocketAddr = (Ipv4Addr::LOCALHOST, application.port()).into();
    let socket = world.pod.run(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    socket.connect(&world.remote_v4().into()).unwrap();
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(world.remote_v4()));
    disconnect(&socket);
    socket.connect(&local.into()).unwrap();
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(local));
    assert_eq!(line(&socket.into()).unwrap(), DIRECT);
}

#[test]
#[ignore = "needs root"]
fn the_server_sees_the_true_client_in_accept_and_in_getpeername() {
    let world = World::enrolled();
    let mapped = |address: SocketAddr| match address {
        SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
        v6 => v6,
    };
    let client_v4: SocketAddr = "10.9.8.7:40001".parse().unwrap();
    let client_v6: SocketAddr = "[fd99::7]:40002".parse().unwrap();
    let (loopback_v4, loopback_v6) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    // What the application listens on, where the mesh connects to, the true client, what the application sees.
    let cases: [(bool, std::net::IpAddr, SocketAddr, SocketAddr); 4] = [
        (false, loopback_v4, client_v4, client_v4),
        (true, loopback_v6, client_v6, client_v6),
        // An IPv6 listener that takes IPv4 as well sees mapped addresses.
        (true, loopback_v4, client_v4, mapped(client_v4)),
        // An application that looks at an IPv6 client through the mesh's IPv4 connection.
        (true, loopback_v4, client_v6, client_v6),
    ];
    for (dual, loopback, client, seen) in cases {
        let listener = world.pod.run(|| {
            let address = if dual { any_v6() } else { any_v4() };
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
            if dual {
                socket.set_only_v6(false).unwrap();
            }
            socket.bind(&address.into()).unwrap();
            socket.listen(8).unwrap();
            socket
        });
        let application =
            Server::start(listener, |stream, accepted| format!("{accepted} {}", stream.peer_addr().unwrap()));
        let destination = SocketAddr::new(loopback, application.port());
        let own =
            world.pod.run(|| Socket::new(Domain::for_address(destination), Type::STREAM, None).unwrap());
        world.redirect.mark_own(own.as_fd()).unwrap();
        world.flows.set_peer_name(own.as_fd(), client).unwrap();
        own.connect(&destination.into()).unwrap();
        // The mesh sees its own peer as it is.
        assert_eq!(own.peer_addr().unwrap().as_socket(), Some(destination));
        assert_eq!(line(&own.into()).unwrap(), format!("{seen} {seen}"));
    }
    assert_eq!(world.counter("peername_shown_client"), 8);
}

#[test]
#[ignore = "needs root"]
fn the_name_stays_when_the_mesh_closes_before_the_application_asks() {
    let world = World::enrolled();
    let listener = world.pod.run(|| std_listener(any_v4()));
    let destination: SocketAddr = (Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port()).into();
    let client: SocketAddr = "10.9.8.7:40001".parse().unwrap();
    let own = world.pod.run(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    world.redirect.mark_own(own.as_fd()).unwrap();
    world.flows.set_peer_name(own.as_fd(), client).unwrap();
    own.connect(&destination.into()).unwrap();
    drop(own);
    let (mut accepted, seen) = listener.accept().unwrap();
    assert_eq!(seen, client);
    accepted.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(accepted.peer_addr().unwrap(), client);
}

#[test]
#[ignore = "needs root"]
fn an_ipv4_application_is_not_shown_an_ipv6_client() {
    let world = World::enrolled();
    let application = world.pod.run(|| {
        Server::start(listen((Ipv4Addr::LOCALHOST, 0).into()), |_, accepted| accepted.ip().to_string())
    });
    let own = world.pod.run(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    world.redirect.mark_own(own.as_fd()).unwrap();
    world.flows.set_peer_name(own.as_fd(), "[fd99::7]:40002".parse().unwrap()).unwrap();
    own.connect(&application.address.into()).unwrap();
    assert_eq!(line(&own.into()).unwrap(), "127.0.0.1");
    assert_eq!(world.counter("peername_not_shown_family"), 1);
}

#[test]
#[ignore = "needs root"]
fn a_server_that_listens_with_mptcp_sees_the_true_client() {
    let world = World::enrolled();
    let listener = match world.pod.run(|| socket(libc::AF_INET, libc::IPPROTO_MPTCP)) {
        Ok(listener) => Socket::from(listener),
        Err(error) => {
            println!("skipped: this kernel has no MPTCP: {error}");
            return;
        }
    };
    listener.bind(&any_v4().into()).unwrap();
    listener.listen(8).unwrap();
    let application =
        Server::start(listener, |stream, accepted| format!("{accepted} {}", stream.peer_addr().unwrap()));
    let own = world.pod.run(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    world.redirect.mark_own(own.as_fd()).unwrap();
    let client: SocketAddr = "10.9.8.7:40001".parse().unwrap();
    world.flows.set_peer_name(own.as_fd(), client).unwrap();
    own.connect(&SocketAddr::from((Ipv4Addr::LOCALHOST, application.port())).into()).unwrap();
    assert_eq!(line(&own.into()).unwrap(), format!("{client} {client}"));
}
