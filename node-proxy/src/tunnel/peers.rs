//! Other nodes, between the messages and the device's own types.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use wireguard::device::{PeerKey, PeerNode, PublicKey};

use crate::ipc::proto::{TunnelPeer, TunnelPeerKey, TunnelRange};

fn bytes_of(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn address_of(bytes: &[u8]) -> Result<IpAddr, String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes)
        .map_err(|_| format!("an address has 4 or 16 bytes, not {}", bytes.len()))?;
    Ok(Ipv6Addr::from(v6).into())
}

/// For the tunnel's process.
pub(crate) fn to_wire(peers: &[PeerNode]) -> Vec<TunnelPeer> {
    let key = |key: &PeerKey| TunnelPeerKey {
        generation: key.generation,
        public_key: key.public.bytes().to_vec(),
        addresses: key.addresses.iter().copied().map(bytes_of).collect(),
        even_port: key.ports[0].into(),
        odd_port: key.ports[1].into(),
    };
    let range =
        |range: &IpNet| TunnelRange { address: bytes_of(range.addr()), prefix: range.prefix_len().into() };
    let peer = |peer: &PeerNode| TunnelPeer {
        node: peer.name.clone(),
        keys: peer.keys.iter().map(key).collect(),
        allowed: peer.allowed_ips.iter().map(range).collect(),
    };
    peers.iter().map(peer).collect()
}

/// For the device.
pub(crate) fn from_wire(peers: &[TunnelPeer]) -> Result<Vec<PeerNode>, String> {
    let mut names = HashSet::new();
    if let Some(twice) = peers.iter().find(|peer| !names.insert(&peer.node)) {
        return Err(format!("node {}: it is there twice", twice.node));
    }
    peers.iter().map(|peer| one(peer).map_err(|e| format!("node {}: {e}", peer.node))).collect()
}

fn one(peer: &TunnelPeer) -> Result<PeerNode, String> {
    let port = |port: u32| u16::try_from(port).map_err(|_| format!("{port} is no UDP port"));
    let key = |key: &TunnelPeerKey| {
        let public: [u8; 32] =
            key.public_key.as_slice().try_into().map_err(|_| "a key has 32 bytes".to_owned())?;
        Ok(PeerKey {
            generation: key.generation,
            public: PublicKey::from(public),
            addresses: key.addresses.iter().map(|a| address_of(a)).collect::<Result<_, _>>()?,
            ports: [port(key.even_port)?, port(key.odd_port)?],
        })
    };
    let range = |range: &TunnelRange| {
        let prefix =
            u8::try_from(range.prefix).map_err(|_| format!("{} is no length of a prefix", range.prefix))?;
        IpNet::new(address_of(&range.address)?, prefix).map_err(|e| e.to_string())
    };
    Ok(PeerNode {
        name: peer.node.clone(),
        keys: peer.keys.iter().map(key).collect::<Result<_, String>>()?,
        allowed_ips: peer.allowed.iter().map(range).collect::<Result<_, String>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_agent_sends_is_what_the_tunnel_gets() {
        let peers = vec![PeerNode {
            name: "b".to_owned(),
            keys: vec![PeerKey {
                generation: 7,
                public: PublicKey::from([3; 32]),
                addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
                ports: [51_871, 51_872],
            }],
            allowed_ips: vec!["10.1.0.0/16".parse().unwrap(), "2001:db8:1::/64".parse().unwrap()],
        }];
        assert_eq!(from_wire(&to_wire(&peers)), Ok(peers));
    }

    #[test]
    fn a_peer_that_makes_no_sense_is_refused_by_name() {
        let mut wire = TunnelPeer { node: "b".to_owned(), ..TunnelPeer::default() };
        wire.allowed = vec![TunnelRange { address: vec![1, 2, 3], prefix: 8 }];
        assert_eq!(from_wire(&[wire.clone()]).unwrap_err(), "node b: an address has 4 or 16 bytes, not 3");
        wire.allowed = vec![TunnelRange { address: vec![10, 0, 0, 0], prefix: 40 }];
        from_wire(&[wire.clone()]).expect_err("a prefix of 40 bits is too long for IPv4");
        wire.allowed.clear();
        let error = from_wire(&[wire.clone(), wire.clone()]).unwrap_err();
        assert_eq!(error, "node b: it is there twice");
        wire.keys = vec![TunnelPeerKey { public_key: vec![1; 31], ..TunnelPeerKey::default() }];
        assert_eq!(from_wire(&[wire]).unwrap_err(), "node b: a key has 32 bytes");
    }
}
