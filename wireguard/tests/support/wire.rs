//! Listening to the links between the nodes.

use std::{io, mem::MaybeUninit, net::IpAddr};

use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

/// One packet on a link.
#[derive(Debug, Clone)]
pub(crate) struct Packet {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// IP protocol number after extension headers of fragmentation.
    pub(crate) protocol: u8,
    /// 0 when there is none.
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    /// Length of the IP packet.
    pub(crate) length: usize,
    /// From the transport header on.
    pub(crate) segment: Vec<u8>,
    pub(crate) frame: Vec<u8>,
}

/// Everything that passes the router is queued here at once, so nothing is missed between a call and its answer.
pub(crate) struct Wire {
    socket: Socket,
}

impl Wire {
    /// In the network namespace of the calling thread.
    pub(crate) fn open() -> Self {
        let protocol = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).unwrap();
        socket.set_recv_buffer_size(64 << 20).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket }
    }

    /// What came since the last call; neighbour discovery and ARP are not told.
    pub(crate) fn packets(&self) -> Vec<Packet> {
        let mut packets = Vec::new();
        let mut buffer = vec![MaybeUninit::uninit(); 70_000];
        loop {
            match self.socket.recv(&mut buffer) {
                Ok(length) => {
                    // SAFETY: the kernel has written this many bytes.
                    let frame = buffer[..length].iter().map(|byte| unsafe { byte.assume_init() }).collect();
                    packets.extend(parse(frame));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return packets,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Asserts that there was traffic, that all of it was the tunnel's, and that none of it shows `text`.
    pub(crate) fn assert_only_tunnel(&self, text: &[u8]) {
        let packets = self.packets();
        assert!(!packets.is_empty(), "nothing was on the wire");
        for packet in packets {
            assert!(packet.is_tunnel(), "{packet:?}");
            assert!(!packet.shows(text), "{packet:?}");
        }
    }
}

impl Packet {
    pub(crate) fn is_tunnel(&self) -> bool {
        let tunnel = 51_871..=51_874;
        self.protocol == 17 && tunnel.contains(&self.source_port) && tunnel.contains(&self.destination_port)
    }

    pub(crate) fn shows(&self, text: &[u8]) -> bool {
        self.frame.windows(text.len()).any(|window| window == text)
    }

    /// Maximum segment size that a TCP SYN tells.
    pub(crate) fn mss(&self) -> Option<u16> {
        if self.protocol != 6 || self.segment.get(13)? & 2 == 0 {
            return None;
        }
        let mut options = self.segment.get(20..usize::from(self.segment[12] >> 4) * 4)?;
        loop {
            match options {
                [2, 4, high, low, ..] => return Some(u16::from_be_bytes([*high, *low])),
                [1, rest @ ..] => options = rest,
                [_, length, ..] => options = options.get(usize::from(*length).max(2)..)?,
                _ => return None,
            }
        }
    }
}

fn parse(frame: Vec<u8>) -> Option<Packet> {
    let packet = frame.get(14..)?;
    let address = |at: usize, length: usize| -> Option<IpAddr> {
        let bytes = packet.get(at..at + length)?;
        Some(match length {
            4 => <[u8; 4]>::try_from(bytes).ok()?.into(),
            _ => <[u8; 16]>::try_from(bytes).ok()?.into(),
        })
    };
    let (source, destination, mut protocol, mut at) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            (address(12, 4)?, address(16, 4)?, *packet.get(9)?, usize::from(packet.first()? & 15) * 4)
        }
        [0x86, 0xdd] => (address(8, 16)?, address(24, 16)?, *packet.get(6)?, 40),
        _ => return None,
    };
    if protocol == 44 {
        protocol = *packet.get(at)?;
        at += 8;
    }
    // Neighbour discovery, router solicitations and multicast listener reports.
    if protocol == 0 || protocol == 58 && matches!(packet.get(at)?, 130..=137 | 143) {
        return None;
    }
    let segment = packet.get(at..)?.to_vec();
    let port = |at: usize| segment.get(at..at + 2).map_or(0, |port| u16::from_be_bytes([port[0], port[1]]));
    let has_ports = protocol == 6 || protocol == 17;
    let (source_port, destination_port) = if has_ports { (port(0), port(2)) } else { (0, 0) };
    let length = packet.len();
    Some(Packet { source, destination, protocol, source_port, destination_port, length, segment, frame })
}
