//! Tunnels of nodes.

use std::collections::HashSet;

use bytes::Bytes;
use ipnet::IpNet;

use super::{
    FieldError, address_to_wire, addresses_from_wire, cidrs_to_wire, networks_from_wire, port_from_wire,
    required,
};
use crate::model::{MAX_TUNNEL_KEYS, NodeTunnel, TunnelKey};
use crate::proto::mesh as pb;

/// A public key of a node's tunnel that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct TunnelKeyError {
    /// Path of the field, e.g. `keys[1].public_key`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

/// Keys as they go over the wire.
#[must_use]
pub fn tunnel_keys_to_wire(keys: &[TunnelKey]) -> Vec<pb::TunnelKey> {
    let one = |key: &TunnelKey| pb::TunnelKey {
        generation: key.generation,
        public_key: Bytes::copy_from_slice(&key.public_key),
        even_port: u32::from(key.ports[0]),
        odd_port: u32::from(key.ports[1]),
    };
    keys.iter().map(one).collect()
}

/// Keys as they came.
///
/// # Errors
/// [`TunnelKeyError`] for a key that has not 32 bytes or is all zeros, a port of 0, a generation or key that is there
/// twice, and more than [`MAX_TUNNEL_KEYS`].
pub fn tunnel_keys_from_wire(keys: &[pb::TunnelKey]) -> Result<Vec<TunnelKey>, TunnelKeyError> {
    keys_from_wire(keys).map_err(|e| TunnelKeyError { field: e.field, problem: e.problem })
}

fn keys_from_wire(keys: &[pb::TunnelKey]) -> Result<Vec<TunnelKey>, FieldError> {
    if keys.len() > MAX_TUNNEL_KEYS {
        let problem = format!("{} keys; a node has at most {MAX_TUNNEL_KEYS}", keys.len());
        return Err(FieldError::new("keys", problem));
    }
    let (mut generations, mut seen) = (HashSet::new(), HashSet::new());
    let one = |(i, key): (usize, &pb::TunnelKey)| {
        let field = |name: &str| format!("keys[{i}].{name}");
        let public_key = <[u8; 32]>::try_from(&key.public_key[..]).map_err(|_| {
            let problem = format!("a key has 32 bytes, not {}", key.public_key.len());
            FieldError::new(field("public_key"), problem)
        })?;
        if public_key == [0; 32] {
            return Err(FieldError::new(field("public_key"), "is all zeros, which is no key"));
        }
        if !seen.insert(public_key) {
            return Err(FieldError::new(field("public_key"), "is there already"));
        }
        if !generations.insert(key.generation) {
            let problem = format!("{} is there already", key.generation);
            return Err(FieldError::new(field("generation"), problem));
        }
        Ok(TunnelKey {
            generation: key.generation,
            public_key,
            ports: [
                port_from_wire(key.even_port, field("even_port"))?,
                port_from_wire(key.odd_port, field("odd_port"))?,
            ],
        })
    };
    keys.iter().enumerate().map(one).collect()
}

pub(super) fn tunnel_to_wire(tunnel: &NodeTunnel) -> pb::NodeTunnel {
    pb::NodeTunnel {
        node: tunnel.node.to_string(),
        addresses: tunnel.addresses.iter().map(address_to_wire).collect(),
        pod_ranges: cidrs_to_wire(&tunnel.pod_ranges),
        keys: tunnel_keys_to_wire(&tunnel.keys),
    }
}

pub(super) fn tunnel_from_wire(tunnel: pb::NodeTunnel) -> Result<NodeTunnel, FieldError> {
    let addresses = addresses_from_wire(&tunnel.addresses, "addresses")?;
    if addresses.is_empty() {
        return Err(FieldError::new("addresses", "a node without an address cannot be reached"));
    }
    let pod_ranges = networks_from_wire(&tunnel.pod_ranges, "pod_ranges")?;
    for (i, range) in pod_ranges.iter().enumerate() {
        let bad = |problem: String| Err(FieldError::new(format!("pod_ranges[{i}]"), problem));
        if let Some(inside) = addresses.iter().find(|address| range.contains(*address)) {
            return bad(format!("{range} contains the node's own address {inside}"));
        }
        if let Some(other) = pod_ranges.iter().take(i).find(|other| overlap(range, other)) {
            return bad(format!("{range} and {other} overlap"));
        }
    }
    let keys = keys_from_wire(&tunnel.keys)?;
    if keys.is_empty() {
        return Err(FieldError::new("keys", "a tunnel without a key is none"));
    }
    Ok(NodeTunnel { node: required(tunnel.node, "node")?, addresses, pod_ranges, keys })
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}
