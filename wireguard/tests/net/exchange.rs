//! Pods that talk: datagrams, a stream, an echo request.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

use super::{Namespace, PATIENCE};

/// A socket of a pod.
pub(crate) fn udp(ns: &Namespace, address: IpAddr) -> UdpSocket {
    let socket = ns.enter(|| UdpSocket::bind((address, 0))).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Sends `payload` from one socket to the other and checks what arrives, and from where.
pub(crate) fn deliver(from: &UdpSocket, to: &UdpSocket, payload: &[u8]) {
    from.send_to(payload, to.local_addr().unwrap()).unwrap();
    let mut buffer = vec![0; 65_536];
    // A wait with a limit is over when the process was stopped meanwhile, though nothing else happened (signal(7)).
    let (len, source) = loop {
        match to.recv_from(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => break received.unwrap(),
        }
    };
    assert_eq!(source, from.local_addr().unwrap());
    assert!(buffer[..len] == *payload, "{len} bytes arrived, or others than the {} sent", payload.len());
}

/// Sends `total` bytes over one TCP connection and checks each of them.
pub(crate) fn stream(client: &Namespace, server: &Namespace, address: IpAddr, total: usize) {
    let listener = server.enter(|| TcpListener::bind((address, 0))).unwrap();
    let target: SocketAddr = listener.local_addr().unwrap();
    let byte = |at: usize| (at * 31 + at / 251) as u8;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = vec![0; 1 << 18];
            let mut at = 0;
            while at < total {
                let len = stream.read(&mut buffer).unwrap();
                assert!(len > 0, "the stream ended after {at} of {total} bytes");
                assert!(
                    buffer[..len].iter().enumerate().all(|(i, b)| *b == byte(at + i)),
                    "wrong bytes after {at}"
                );
                at += len;
            }
            stream.write_all(b"all").unwrap();
        });
        let mut stream = client.enter(|| TcpStream::connect(target)).unwrap();
        let data: Vec<u8> = (0..total).map(byte).collect();
        stream.write_all(&data).unwrap();
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).unwrap();
    });
}

/// Sends an echo request with `size` bytes and waits for the answer.
pub(crate) fn echo(ns: &Namespace, target: IpAddr, size: usize) {
    let (domain, protocol, request, header) = match target {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8, 20),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128, 0),
    };
    let socket = ns.enter(|| Socket::new(domain, Type::RAW, Some(protocol))).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut message = vec![request, 0, 0, 0, 0x12, 0x34, 0, size as u8];
    message.extend((0..size).map(|i| i as u8));
    if target.is_ipv4() {
        let words = message.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
        let sum: u32 = words.sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    socket.send_to(&message, &SocketAddr::new(target, 0).into()).unwrap();
    let mut buffer = vec![0; 65_536];
    loop {
        let len = (&socket).read(&mut buffer).unwrap();
        let bytes = &buffer[header..len];
        let answer = if target.is_ipv4() { 0 } else { 129 };
        if bytes[0] == answer && bytes[4..] == message[4..] {
            return;
        }
    }
}
