//! Finding out how large packets may be on the way to a peer, by sending some that may not be fragmented.
//!
//! The probes go through the tunnel like pods' packets, to an address of the peer that lies in its pods' range, from one
//! of this node that lies in its own. What gets lost and is not answered with "too big" is a black hole; it is told from a
//! path of which the kernel knows that it is narrow.

use std::{
    fmt,
    io::{self, Read},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    echo::{self, Mark},
    error::Error,
    mtu,
    plan::Family,
};

/// How patient probing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// How long to wait for an answer.
    pub answer: Duration,
    /// How often a packet of one size is sent before that size counts as lost.
    pub tries: u16,
}

impl Default for Patience {
    fn default() -> Self {
        Self { answer: Duration::from_millis(500), tries: 3 }
    }
}

/// Where to probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Name of the peer.
    pub peer: String,
    /// Address of this node in its pods' range: probes come from it.
    pub source: IpAddr,
    /// Address of the peer in its pods' range; see [`gateway`].
    pub address: IpAddr,
    /// Address that the tunnel sends to.
    pub endpoint: IpAddr,
    /// MTU of the tunnel's device.
    pub device_mtu: u16,
}

/// What probing found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "path")]
pub enum Path {
    /// Packets as large as the device's MTU arrive.
    Fine,
    /// The path is narrower than the device's MTU allows, and says so.
    Narrow {
        /// What the kernel has learnt about packets between the nodes, in bytes.
        known: u16,
    },
    /// Packets as large as the device's MTU arrive, but only because something on the way cuts them into fragments, and it
    /// does not say that they are too big: the next to drop fragments makes a black hole of it.
    Cut {
        /// Largest packet between the nodes that arrives whole, in bytes.
        carries: u16,
    },
    /// Larger packets disappear, and nobody says that they are too big.
    BlackHole {
        /// What the kernel believes about packets between the nodes, in bytes.
        believed: u16,
    },
    /// Not even small packets are answered.
    Unreachable,
}

/// What is known about the way to one peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathFinding {
    /// Name of the peer.
    pub peer: String,
    /// Address that was asked.
    pub address: IpAddr,
    /// Address that the tunnel sends to.
    pub endpoint: IpAddr,
    /// Largest packet that the device takes, in bytes.
    pub device_mtu: u16,
    /// Largest packet that arrives through the tunnel, in bytes, down to a multiple of 16; 0 when none does.
    pub usable: u16,
    /// What that means.
    #[serde(flatten)]
    pub path: Path,
}

impl PathFinding {
    /// Whether nothing needs to be done.
    #[must_use]
    pub fn is_fine(&self) -> bool {
        self.path == Path::Fine
    }

    /// What [`super::PeerRoute::usable_mtu`] should be from now on. `None` when nothing limits it or nothing is known.
    #[must_use]
    pub fn usable_mtu(&self) -> Option<u16> {
        match self.path {
            Path::Narrow { .. } | Path::Cut { .. } | Path::BlackHole { .. } => Some(self.usable),
            Path::Fine | Path::Unreachable => None,
        }
    }
}

impl fmt::Display for PathFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { peer, address, endpoint, device_mtu, usable, path } = self;
        match path {
            Path::Fine => write!(f, "node {peer}: packets of {usable} bytes arrive"),
            Path::Narrow { known } => write!(
                f,
                "node {peer}: packets of at most {usable} bytes arrive whole, the device takes {device_mtu}: the path \
                 to {endpoint} carries {known} bytes and says so; routes to it get an MTU of {usable}, and with \
                 wireguard.mtu set to it nothing has to be found out"
            ),
            Path::Cut { carries } => write!(
                f,
                "node {peer}: packets of at most {usable} bytes arrive whole, larger ones in fragments: the path to \
                 {endpoint} carries {carries} bytes and does not say so, because something on it drops \"too big\" \
                 messages (allow ICMP type 3 code 4 between nodes); routes to it get an MTU of {usable} until then, \
                 and with wireguard.mtu set to it nothing is cut"
            ),
            Path::BlackHole { believed } => write!(
                f,
                "node {peer}: black hole: packets of more than {usable} bytes disappear on the way to {endpoint}, \
                 which the kernel believes to carry {believed} bytes; something on the path drops \"too big\" messages \
                 (allow ICMP type 3 code 4 and ICMPv6 type 2 between nodes) or fragments, or has a smaller MTU than it \
                 says; routes to it get an MTU of {usable} until then"
            ),
            Path::Unreachable => write!(
                f,
                "node {peer}: {address} does not answer through the tunnel, not even to small packets; see the peer's \
                 last handshake, and whether UDP to {endpoint} is let through"
            ),
        }
    }
}

/// The address of a range that its node has by custom: the first one.
#[must_use]
pub fn gateway(range: &IpNet) -> IpAddr {
    match range {
        IpNet::V4(v4) => v4.hosts().next().unwrap_or(v4.addr()).into(),
        // The first address is every router's (RFC 4291 section 2.6.1).
        IpNet::V6(v6) => v6.hosts().nth(1).unwrap_or(v6.addr()).into(),
    }
}

/// Smallest packet to begin with: less than any path carries.
const SMALL: u16 = 256;

/// Probes the way to one peer. Blocks, for at most `tries` times `answer` for each of about twenty sizes; has to be called
/// in the node's network namespace with `CAP_NET_RAW`. ICMP of the node itself to the endpoint must not go through the
/// tunnel.
///
/// # Errors
/// When the probes cannot be sent at all.
pub fn probe(target: &Target, patience: Patience) -> Result<PathFinding, Error> {
    let mut prober = Prober::open(Some(target.source), target.address, patience)?;
    let mut finding = PathFinding {
        peer: target.peer.clone(),
        address: target.address,
        endpoint: target.endpoint,
        device_mtu: target.device_mtu,
        usable: 0,
        path: Path::Unreachable,
    };
    if !prober.arrives(SMALL)? {
        return Ok(finding);
    }
    let outer = Family::of(target.endpoint);
    let needed = target.device_mtu.saturating_add(mtu::overhead(outer));
    if prober.arrives(target.device_mtu)? {
        // The tunnel's datagrams may be cut on the way. Packets between the nodes that may not be tell.
        let carries = carried(target.endpoint, needed, patience)?;
        let known = path_mtu(target.endpoint)?;
        (finding.usable, finding.path) = if known < needed {
            (mtu::inner(known, [outer]), Path::Narrow { known })
        } else if let Some(carries) = carries.filter(|carries| *carries < needed) {
            (mtu::inner(carries, [outer]), Path::Cut { carries })
        } else {
            (target.device_mtu, Path::Fine)
        };
        return Ok(finding);
    }
    // In units of the padding: what is between two of them is padded to the larger one.
    let units = target.device_mtu.div_ceil(mtu::PADDING);
    finding.usable =
        mtu::PADDING * largest(SMALL / mtu::PADDING, units, |units| prober.arrives(units * mtu::PADDING))?;
    let known = path_mtu(target.endpoint)?;
    let used = finding.usable.saturating_add(mtu::overhead(outer));
    // What the kernel has learnt leaves no room for one unit more.
    finding.path = if known < used.saturating_add(mtu::PADDING) {
        Path::Narrow { known }
    } else {
        Path::BlackHole { believed: known }
    };
    Ok(finding)
}

/// The largest packet between the nodes that arrives whole, up to `needed` bytes and down to a multiple of 4; `None` where
/// nodes do not answer echo requests. When the path says that it is narrow, the kernel knows from then on, and the answer
/// is no better than what it knows.
fn carried(endpoint: IpAddr, needed: u16, patience: Patience) -> Result<Option<u16>, Error> {
    let mut prober = Prober::open(None, endpoint, patience)?;
    if !prober.arrives(SMALL)? {
        return Ok(None);
    }
    if prober.arrives(needed)? || path_mtu(endpoint)? < needed {
        return Ok(Some(needed));
    }
    const STEP: u16 = 4;
    let largest = largest(SMALL / STEP, needed.div_ceil(STEP), |steps| prober.arrives(steps * STEP))?;
    Ok(Some(largest * STEP))
}

/// The largest number for which `works` holds, between one for which it does and one for which it does not.
fn largest(
    mut holds: u16,
    mut fails: u16,
    mut works: impl FnMut(u16) -> Result<bool, Error>,
) -> Result<u16, Error> {
    while fails - holds > 1 {
        let middle = holds + (fails - holds) / 2;
        if works(middle)? {
            holds = middle;
        } else {
            fails = middle;
        }
    }
    Ok(holds)
}

/// What the kernel knows or believes about the path to an address, in bytes: the device's MTU, the route's, or what it
/// was told. Needs `CAP_NET_RAW`.
///
/// # Errors
/// When there is no route.
pub fn path_mtu(address: IpAddr) -> Result<u16, Error> {
    let fail =
        |source: io::Error| Error::Probe { what: format!("ask for the path MTU to {address}"), source };
    // Of ICMP, which takes the way of the tunnel's datagrams where the node's UDP goes through the tunnel. Nothing is sent.
    let socket = icmp(Family::of(address)).map_err(fail)?;
    socket.connect(&SocketAddr::new(address, 0).into()).map_err(fail)?;
    let known = match Family::of(address) {
        Family::V4 => sockopt::ip_mtu(&socket),
        Family::V6 => sockopt::ipv6_mtu(&socket),
    };
    let known = known.map_err(|errno| fail(errno.into()))?;
    Ok(u16::try_from(known).unwrap_or(u16::MAX))
}

fn icmp(family: Family) -> io::Result<Socket> {
    let (domain, protocol) = match family {
        Family::V4 => (Domain::IPV4, Protocol::ICMPV4),
        Family::V6 => (Domain::IPV6, Protocol::ICMPV6),
    };
    Socket::new(domain, Type::RAW, Some(protocol))
}

/// An ICMP socket towards one address.
struct Prober {
    socket: Socket,
    family: Family,
    address: IpAddr,
    mark: Mark,
    patience: Patience,
}

impl Prober {
    fn open(source: Option<IpAddr>, address: IpAddr, patience: Patience) -> Result<Self, Error> {
        let fail = |source: io::Error| Error::Probe { what: format!("prepare to probe {address}"), source };
        let family = Family::of(address);
        let socket = icmp(family).map_err(fail)?;
        // Not fragmented, whatever is known about the path: what is known is in question.
        let set = match family {
            Family::V4 => sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE),
            Family::V6 => sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::PROBE),
        };
        set.map_err(|errno| fail(errno.into()))?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into()).map_err(fail)?;
        }
        let mark = Mark { id: std::process::id() as u16, sequence: 0 };
        Ok(Self { socket, family, address, mark, patience })
    }

    /// Whether a packet of this many bytes gets there and back.
    fn arrives(&mut self, length: u16) -> Result<bool, Error> {
        for _ in 0..self.patience.tries {
            self.mark.sequence = self.mark.sequence.wrapping_add(1);
            let message = echo::request(self.family, self.mark, length.into());
            match self.socket.send_to(&message, &SocketAddr::new(self.address, 0).into()) {
                Ok(_) => {}
                // Larger than the device takes, or refused by the route.
                Err(error) if error.raw_os_error() == Some(nix::libc::EMSGSIZE) => return Ok(false),
                Err(error) if is_unreachable(&error) => return Ok(false),
                Err(source) => {
                    return Err(Error::Probe {
                        what: format!("send {length} bytes to {}", self.address),
                        source,
                    });
                }
            }
            if self.answered()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn answered(&self) -> Result<bool, Error> {
        let fail = |source: io::Error| Error::Probe { what: format!("wait for {}", self.address), source };
        let deadline = Instant::now() + self.patience.answer;
        let mut buffer = [0; 128];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.socket.set_read_timeout(Some(left)).map_err(fail)?;
            // The beginning tells; the rest of the packet is cut off.
            match (&self.socket).read(&mut buffer) {
                Ok(length) if echo::reply(self.family, &buffer[..length]) == Some(self.mark) => {
                    return Ok(true);
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(false);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted || is_unreachable(&error) => {}
                Err(error) => return Err(fail(error)),
            }
        }
    }
}

fn is_unreachable(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable)
}
