//! Excluded ports and networks in their maps.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    error::Error,
    settings::Exclusions,
    sys::{CidrKey, Map, Plain},
    types::{
        Addr, CIDR_FIXED_BITS, CidrData, INBOUND, OUTBOUND, POD_EXCLUDES_IN, POD_EXCLUDES_OUT, PortKey,
        TUNNEL_PORT,
    },
};

/// Bits of an address before the IPv4 part of a mapped one.
const MAPPED_PREFIX_BITS: u32 = 96;

#[derive(Debug)]
pub(crate) struct ExclusionMaps {
    pub(crate) ports: Map<PortKey, u32>,
    pub(crate) cidrs: Map<CidrKey, u32>,
}

/// The flags that make the programs look into these maps.
pub(crate) fn flags(exclusions: &Exclusions) -> u32 {
    let outbound = !(exclusions.outbound_ports.is_empty() && exclusions.outbound_cidrs.is_empty());
    let inbound = !(exclusions.inbound_ports.is_empty() && exclusions.inbound_cidrs.is_empty());
    u32::from(outbound) * POD_EXCLUDES_OUT + u32::from(inbound) * POD_EXCLUDES_IN
}

impl ExclusionMaps {
    /// Makes `exclusions` the ones of `scope`.
    pub(crate) fn set(&self, scope: u64, exclusions: &Exclusions) -> Result<(), Error> {
        if exclusions.inbound_ports.contains(&TUNNEL_PORT) {
            return Err(Error::Invalid(format!(
                "inbound port {TUNNEL_PORT} is the mesh's tunnel port and cannot be excluded"
            )));
        }
        let ports: HashSet<PortKey> =
            [(OUTBOUND, &exclusions.outbound_ports), (INBOUND, &exclusions.inbound_ports)]
                .into_iter()
                .flat_map(|(direction, ports)| {
                    ports.iter().map(move |port| PortKey { scope, port: *port, direction, zero: 0 })
                })
                .collect();
        replace(&self.ports, "EXCLUDED_PORTS", ports, |key| key.scope == scope)?;
        let cidrs: HashSet<CidrKey> =
            [(OUTBOUND, &exclusions.outbound_cidrs), (INBOUND, &exclusions.inbound_cidrs)]
                .into_iter()
                .flat_map(|(direction, nets)| nets.iter().map(move |net| cidr_key(scope, direction, *net)))
                .collect();
        replace(&self.cidrs, "EXCLUDED_CIDRS", cidrs, |key| scope_of(key) == scope)
    }

    /// The exclusions of every scope that has any, in ascending order.
    pub(crate) fn all(&self) -> Result<HashMap<u64, Exclusions>, Error> {
        let mut found: HashMap<u64, Exclusions> = HashMap::new();
        for key in self.ports.keys().map_err(Error::sys("list map EXCLUDED_PORTS"))? {
            let of_scope = found.entry(key.scope).or_default();
            let outbound = key.direction == OUTBOUND;
            let ports = if outbound { &mut of_scope.outbound_ports } else { &mut of_scope.inbound_ports };
            ports.push(key.port);
        }
        for key in self.cidrs.keys().map_err(Error::sys("list map EXCLUDED_CIDRS"))? {
            let of_scope = found.entry(scope_of(&key)).or_default();
            let outbound = key.data.direction == OUTBOUND;
            let nets = if outbound { &mut of_scope.outbound_cidrs } else { &mut of_scope.inbound_cidrs };
            nets.push(net_of(&key)?);
        }
        for exclusions in found.values_mut() {
            exclusions.outbound_ports.sort_unstable();
            exclusions.inbound_ports.sort_unstable();
            exclusions.outbound_cidrs.sort_unstable();
            exclusions.inbound_cidrs.sort_unstable();
        }
        Ok(found)
    }
}

/// Adds what is missing, then removes what is not wanted; entries outside the scope are left alone.
fn replace<K: Plain + Eq + Hash>(
    map: &Map<K, u32>,
    name: &str,
    wanted: HashSet<K>,
    in_scope: impl Fn(&K) -> bool,
) -> Result<(), Error> {
    let keys = map.keys().map_err(Error::sys(format!("list map {name}")))?;
    let present: HashSet<K> = keys.into_iter().filter(in_scope).collect();
    for key in wanted.difference(&present) {
        map.insert(key, &1).map_err(Error::sys(format!("add to map {name}")))?;
    }
    for key in present.difference(&wanted) {
        map.remove(key).map_err(Error::sys(format!("remove from map {name}")))?;
    }
    Ok(())
}

fn cidr_key(scope: u64, direction: u16, net: IpNet) -> CidrKey {
    let address_bits = match net {
        IpNet::V4(net) => MAPPED_PREFIX_BITS + u32::from(net.prefix_len()),
        IpNet::V6(net) => u32::from(net.prefix_len()),
    };
    let mut data = CidrData::of(scope, direction, Addr::from(net.network()));
    data.family = if matches!(net, IpNet::V4(_)) { 4 } else { 6 };
    CidrKey { prefix_len: CIDR_FIXED_BITS + address_bits, data }
}

fn scope_of(key: &CidrKey) -> u64 {
    u64::from(key.data.scope[0]) | u64::from(key.data.scope[1]) << 32
}

fn net_of(key: &CidrKey) -> Result<IpNet, Error> {
    let invalid = || Error::Invalid(format!("map EXCLUDED_CIDRS holds {key:?}, which is no network"));
    let fixed = if key.data.family == 4 { CIDR_FIXED_BITS + MAPPED_PREFIX_BITS } else { CIDR_FIXED_BITS };
    let bits =
        key.prefix_len.checked_sub(fixed).and_then(|bits| u8::try_from(bits).ok()).ok_or_else(invalid)?;
    IpNet::new(IpAddr::from(key.data.addr), bits).map_err(|_error| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_survive_the_way_to_the_kernel_and_back() {
        for text in ["10.0.0.0/8", "0.0.0.0/0", "192.168.1.7/32", "fd00::/8", "::/0", "fd00::1/128"] {
            let net: IpNet = text.parse().unwrap();
            let key = cidr_key(0x0102_0304_0506_0708, INBOUND, net);
            assert_eq!(net_of(&key).unwrap(), net, "{text}");
            assert_eq!(scope_of(&key), 0x0102_0304_0506_0708, "{text}");
        }
    }

    #[test]
    fn host_bits_of_a_network_do_not_matter() {
        let loose: IpNet = "10.1.2.3/8".parse().unwrap();
        let strict: IpNet = "10.0.0.0/8".parse().unwrap();
        assert_eq!(cidr_key(1, OUTBOUND, loose), cidr_key(1, OUTBOUND, strict));
    }

    #[test]
    fn every_ipv6_address_is_not_every_ipv4_address() {
        let v6 = cidr_key(1, OUTBOUND, "::/0".parse().unwrap());
        let looked_up = CidrData::of(1, OUTBOUND, Addr::from("10.0.0.1".parse::<IpAddr>().unwrap()));
        assert_ne!(v6.data.family, looked_up.family);
    }

    #[test]
    fn flags_say_in_which_direction_there_is_something_to_look_up() {
        let mut exclusions = Exclusions::default();
        assert_eq!(flags(&exclusions), 0);
        exclusions.inbound_ports.push(9090);
        assert_eq!(flags(&exclusions), POD_EXCLUDES_IN);
        exclusions.outbound_cidrs.push("10.0.0.0/8".parse().unwrap());
        assert_eq!(flags(&exclusions), POD_EXCLUDES_IN | POD_EXCLUDES_OUT);
    }
}
