//! Which outgoing connections are captured, kind by kind. Real sockets in network namespaces.
#![allow(unsafe_code)]
mod support;

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
};

use nix::libc;
use socket2::{Domain, SockAddr, Socket, Type};
use support::*;

#[test]
#[ignore = "needs root"]
fn a_blocking_connect_reaches_the_listener_and_keeps_its_destination() {
    let world = World::enrolled();
    assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), captured(world.remote_v4()));
    assert_eq!(world.ask_from_pod(world.remote_v6()).unwrap(), captured(world.remote_v6()));
    // A service address that no interface has is as good.
    let service: SocketAddr = "172.20.0.10:80".parse().unwrap();
    assert_eq!(world.ask_from_pod(service).unwrap(), captured(service));
    assert_eq!(world.counter("connect_captured_v4"), 2);
    assert_eq!(world.counter("connect_captured_v6"), 1);
    assert_eq!(world.counter("handoff_taken"), 3);
}

#[test]
#[ignore = "needs root"]
fn a_non_blocking_connect_is_captured() {
    let world = World::enrolled();
    for destination in [world.remote_v4(), world.remote_v6()] {
        let answer = world.pod.run(|| {
            let socket =
                Socket::new(Domain::for_address(destination), Type::STREAM.nonblocking(), None).unwrap();
            match socket.connect(&destination.into()) {
                Ok(()) => {}
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS)),
            }
            wait_writable(&socket);
            assert!(socket.take_error().unwrap().is_none());
            socket.set_nonblocking(false).unwrap();
            line(&socket.into())
        });
        assert_eq!(answer.unwrap(), captured(destination));
    }
}

#[test]
#[ignore = "needs root"]
fn a_fast_open_with_data_in_the_syn_is_captured() {
    let world = World::enrolled();
    let destination = world.remote_v4();
    // 0x607: clients and servers, data in the SYN without a cookie on either side.
    world.pod.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1543").unwrap());
    let listener = world.outbound_v4.as_ref().unwrap().socket();
    set_option(listener, libc::TCP_FASTOPEN, 16);
    let answer = world.pod.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let address = SockAddr::from(destination);
        // SAFETY: the data and the address live through the call and have the given lengths.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                b"early".as_ptr().cast(),
                5,
                libc::MSG_FASTOPEN,
                address.as_ptr().cast(),
                address.len(),
            )
        };
        assert_eq!(sent, 5, "{}", io::Error::last_os_error());
        let stream = TcpStream::from(socket);
        let text = line(&stream)?;
        // The kernel says whether the data went with the SYN.
        const TCPI_OPT_SYN_DATA: u8 = 32;
        assert_ne!(tcp_info_options(&stream) & TCPI_OPT_SYN_DATA, 0, "no data went with the SYN");
        Ok::<_, io::Error>(text)
    });
    assert_eq!(answer.unwrap(), captured(destination));
}

#[test]
#[ignore = "needs root"]
fn a_connect_through_io_uring_is_captured() {
    use io_uring::{IoUring, opcode, types::Fd};

    let world = World::enrolled();
    let mut ring = match IoUring::new(2) {
        Ok(ring) => ring,
        Err(error) => {
            println!("skipped: this kernel gives no io_uring: {error}");
            return;
        }
    };
    let destination = world.remote_v4();
    let answer = world.pod.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let address = SockAddr::from(destination);
        let connect =
            opcode::Connect::new(Fd(socket.as_raw_fd()), address.as_ptr().cast(), address.len()).build();
        // SAFETY: socket and address outlive the operation, whose end is waited for.
        unsafe { ring.submission().push(&connect).unwrap() };
        ring.submit_and_wait(1).unwrap();
        let completion = ring.completion().next().unwrap();
        assert_eq!(completion.result(), 0);
        line(&socket.into())
    });
    assert_eq!(answer.unwrap(), captured(destination));
}

#[test]
#[ignore = "needs root"]
fn an_mptcp_connect_is_captured() {
    let world = World::enrolled();
    for destination in [world.remote_v4(), world.remote_v6()] {
        let answer = world.pod.run(|| {
            let domain = if destination.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let socket = match socket(domain, libc::IPPROTO_MPTCP) {
                Ok(socket) => socket,
                Err(error) => return Err(error),
            };
            connect(&socket, destination)?;
            let stream = TcpStream::from(socket);
            // The kernel asks the peer-name hook about the MPTCP socket, the note is on its first subflow.
            assert!(stream.peer_addr()?.ip().is_loopback());
            line(&stream)
        });
        match answer {
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
                println!("skipped: this kernel has no MPTCP");
                return;
            }
            answer => assert_eq!(answer.unwrap(), captured(destination)),
        }
    }
}

#[test]
#[ignore = "needs root"]
fn a_socket_opened_before_the_enrolment_is_captured_when_it_connects() {
    let mut world = World::new();
    let opened = world.pod.run(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    world.enrol(settings());
    opened.connect(&world.remote_v4().into()).unwrap();
    assert_eq!(line(&opened.into()).unwrap(), captured(world.remote_v4()));
}

#[test]
#[ignore = "needs root"]
fn a_connection_older_than_the_enrolment_goes_on_uncaptured() {
    let mut world = World::new();
    let address = world.remote_v4();
    let stream = world.pod.run(|| TcpStream::connect(address).unwrap());
    world.enrol(settings());
    assert_eq!(line(&stream).unwrap(), DIRECT);
}

#[test]
#[ignore = "needs root"]
fn an_ipv4_mapped_destination_is_captured_as_ipv4() {
    let world = World::enrolled();
    let port = world.application_v4.port();
    let mapped: SocketAddr = (REMOTE_V4.to_ipv6_mapped(), port).into();
    assert_eq!(world.ask_from_pod(mapped).unwrap(), captured(world.remote_v4()));
    assert_eq!(world.counter("connect_captured_v4"), 1);
    assert_eq!(world.counter("connect_captured_v6"), 0);
}

#[test]
#[ignore = "needs root"]
fn a_source_address_bound_by_the_application_does_not_matter() {
    let world = World::enrolled();
    let destination = world.remote_v4();
    let answer = world.pod.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((POD_V4, 0)).into()).unwrap();
        socket.connect(&destination.into()).unwrap();
        line(&socket.into())
    });
    assert_eq!(answer.unwrap(), captured(destination));
}

#[test]
#[ignore = "needs root"]
fn a_connection_that_the_application_closes_at_once_still_has_its_destination() {
    let world = World::enrolled();
    // A second socket on the listener's place in the map, with nobody accepting yet.
    let listener = world.pod.run(|| listen((Ipv4Addr::LOCALHOST, 0).into()));
    let mut world = world;
    let listeners = redirect_bpf::Listeners { outbound_v4: Some(listener.as_fd()), ..Default::default() };
    world.redirect.update(world.pod.cookie(), &settings(), &listeners).unwrap();
    let destination = world.remote_v4();
    world.pod.run(|| {
        let mut stream = TcpStream::connect(destination).unwrap();
        stream.write_all(b"in a hurry").unwrap();
    });
    let (accepted, _) = listener.accept().unwrap();
    let mut accepted = TcpStream::from(accepted);
    assert_eq!(world.flows.original_destination(accepted.as_fd()).unwrap(), Some(destination));
    let mut text = String::new();
    accepted.read_to_string(&mut text).unwrap();
    assert_eq!(text, "in a hurry");
}

#[test]
#[ignore = "needs root"]
fn connections_inside_the_pod_stay_inside() {
    let world = World::enrolled();
    let application = world.pod.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
    let application_v6 = world.pod.run(|| Server::start(listen(any_v6()), |_, _| DIRECT.to_owned()));
    let (port, port_v6) = (application.port(), application_v6.port());
    let local: [SocketAddr; 5] = [
        (Ipv4Addr::LOCALHOST.to_ipv6_mapped(), port).into(),
        (Ipv4Addr::LOCALHOST, port).into(),
        (Ipv4Addr::UNSPECIFIED, port).into(),
        (Ipv6Addr::LOCALHOST, port_v6).into(),
        (Ipv6Addr::UNSPECIFIED, port_v6).into(),
    ];
    for address in local {
        assert_eq!(world.ask_from_pod(address).unwrap(), DIRECT, "{address}");
    }
    assert_eq!(world.counter("connect_passed_local"), 5);
    for address in [SocketAddr::from((POD_V4, port)), (POD_V6, port_v6).into()] {
        assert_eq!(world.ask_from_pod(address).unwrap(), DIRECT, "{address}");
    }
    assert_eq!(world.counter("connect_passed_own_address"), 2);
    // They arrive over loopback with the pod's own source, so the inbound listener does not take them either.
    assert_eq!(world.counter("inbound_captured_v4") + world.counter("inbound_captured_v6"), 0);
    assert_eq!(world.counter("connect_captured_v4") + world.counter("connect_captured_v6"), 0);
}

#[test]
#[ignore = "needs root"]
fn a_connection_made_to_the_listener_itself_has_no_destination() {
    let world = World::enrolled();
    let listener = world.outbound_v4.as_ref().unwrap().address;
    assert_eq!(world.ask_from_pod(listener).unwrap(), "outbound to nowhere");
}

#[test]
#[ignore = "needs root"]
fn a_socket_of_the_mesh_itself_is_not_captured() {
    let world = World::enrolled();
    let own = world.pod.run(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    world.redirect.mark_own(own.as_fd()).unwrap();
    own.connect(&world.remote_v4().into()).unwrap();
    assert_eq!(line(&own.into()).unwrap(), DIRECT);
    assert_eq!(world.counter("connect_passed_own_socket"), 1);
}

#[test]
#[ignore = "needs root"]
fn other_namespaces_and_other_protocols_are_left_alone() {
    let world = World::enrolled();
    let address = world.remote_v4();
    let not_enrolled = world.counter("connect_passed_not_enrolled");
    assert_eq!(world.remote.run(|| ask(address)).unwrap(), DIRECT);
    assert!(world.counter("connect_passed_not_enrolled") > not_enrolled);
    let peer = world.pod.run(|| {
        let socket = UdpSocket::bind(any_v4()).unwrap();
        socket.connect(address).unwrap();
        socket.peer_addr().unwrap()
    });
    assert_eq!(peer, address);
    assert!(world.counter("connect_passed_not_tcp") >= 1);
}

#[test]
#[ignore = "needs root"]
fn link_local_and_multicast_destinations_are_left_alone() {
    let world = World::enrolled();
    for destination in
        ["169.254.169.254:80", "224.0.0.1:80", "255.255.255.255:80", "[ff02::1]:80", "[fe80::1]:80"]
    {
        let destination: SocketAddr = destination.parse().unwrap();
        // None of them exists here: what counts is that the listener does not answer.
        let outcome = world.pod.run(|| {
            let socket =
                Socket::new(Domain::for_address(destination), Type::STREAM.nonblocking(), None).unwrap();
            socket.connect(&destination.into())
        });
        assert!(outcome.is_err(), "{destination}");
    }
    assert_eq!(world.counter("connect_passed_local"), 5);
    assert_eq!(world.counter("connect_captured_v4") + world.counter("connect_captured_v6"), 0);
}

#[test]
#[ignore = "needs root"]
fn a_socket_bound_to_a_device_fails_instead_of_passing() {
    let world = World::enrolled();
    let destination = world.remote_v4();
    let outcome = world.pod.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind_device(Some(b"eth1")).unwrap();
        socket.connect_timeout(&destination.into(), std::time::Duration::from_millis(200))
    });
    assert!(outcome.is_err());
    world.application_v4.assert_unused();
}

#[test]
#[ignore = "needs root"]
fn two_nodes_on_one_machine_capture_their_own_pods_only() {
    let first = World::enrolled();
    let second = World::enrolled();
    for world in [&first, &second] {
        assert_eq!(world.ask_from_pod(world.remote_v4()).unwrap(), captured(world.remote_v4()));
        assert_eq!(world.counter("connect_captured_v4"), 1);
    }
}

fn wait_writable(socket: &Socket) {
    let mut waiting = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one element, which lives through the call.
    let ready = unsafe { libc::poll(&mut waiting, 1, 10_000) };
    assert_eq!(ready, 1, "the socket never became writable");
}

fn set_option(socket: &Socket, option: libc::c_int, value: libc::c_int) {
    // SAFETY: the value lives through the call and has the given length.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            std::ptr::from_ref(&value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
}

/// `tcpi_options` of `struct tcp_info`, its sixth byte.
fn tcp_info_options(stream: &TcpStream) -> u8 {
    let mut info = [0_u8; 104];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes.
    let answer = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut length,
        )
    };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
    info[5]
}
