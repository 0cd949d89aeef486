//! Which node an address belongs to: the longest of the ranges that hold it.

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;

/// Values by range. A look-up costs one hash for each length of range there is, and there are few: pod ranges of one
/// size, node addresses.
pub(super) struct Ranges<T> {
    /// Longest first.
    v4: Vec<(u8, HashMap<u32, T>)>,
    v6: Vec<(u8, HashMap<u128, T>)>,
}

impl<T> Ranges<T> {
    pub(super) fn new() -> Self {
        Self { v4: Vec::new(), v6: Vec::new() }
    }

    /// Host bits of `range` are of no account.
    pub(super) fn insert(&mut self, range: IpNet, value: T) {
        match range {
            IpNet::V4(net) => put(&mut self.v4, net.prefix_len(), u32::from(net.network()), value),
            IpNet::V6(net) => put(&mut self.v6, net.prefix_len(), u128::from(net.network()), value),
        }
    }

    pub(super) fn find(&self, address: IpAddr) -> Option<&T> {
        match address {
            IpAddr::V4(a) => {
                let bits = u32::from(a);
                self.v4.iter().find_map(|(len, map)| map.get(&(bits & mask(*len, 32) as u32)))
            }
            IpAddr::V6(a) => {
                let bits = u128::from(a);
                self.v6.iter().find_map(|(len, map)| map.get(&(bits & mask(*len, 128))))
            }
        }
    }
}

fn put<K: std::hash::Hash + Eq, T>(lengths: &mut Vec<(u8, HashMap<K, T>)>, len: u8, key: K, value: T) {
    let at = match lengths.binary_search_by(|(l, _)| len.cmp(l)) {
        Ok(at) => at,
        Err(at) => {
            lengths.insert(at, (len, HashMap::new()));
            at
        }
    };
    lengths[at].1.insert(key, value);
}

/// A mask of the `len` highest of `width` bits.
fn mask(len: u8, width: u32) -> u128 {
    let host = width - u32::from(len);
    let all = if width == 128 { u128::MAX } else { (1 << width) - 1 };
    if host >= 128 { 0 } else { all >> host << host }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_longest_range_decides() {
        let mut ranges = Ranges::new();
        for (range, name) in [
            ("10.0.0.0/8", "wide"),
            ("10.1.2.0/24", "pods"),
            ("10.1.2.7/32", "pod"),
            ("fd00::/64", "six"),
            ("::/0", "all"),
        ] {
            ranges.insert(range.parse().unwrap(), name);
        }
        let find = |a: &str| ranges.find(a.parse().unwrap()).copied();
        assert_eq!(find("10.1.2.7"), Some("pod"));
        assert_eq!(find("10.1.2.8"), Some("pods"));
        assert_eq!(find("10.200.0.1"), Some("wide"));
        assert_eq!(find("11.0.0.1"), None);
        assert_eq!(find("fd00::9"), Some("six"));
        assert_eq!(find("fe80::1"), Some("all"));
    }

    proptest! {
        #[test]
        fn a_look_up_finds_what_comparing_with_every_range_finds(nets in proptest::collection::vec((any::<u32>(), 0..=32u8), 1..20), probes in proptest::collection::vec(any::<u32>(), 1..20)) {
            let nets: Vec<IpNet> = nets.into_iter().map(|(a, len)| IpNet::new(IpAddr::V4(a.into()), len).unwrap().trunc()).collect();
            let mut ranges = Ranges::new();
            for net in &nets {
                ranges.insert(*net, *net);
            }
            for probe in probes.into_iter().map(|p| IpAddr::V4(p.into())).chain(nets.iter().map(IpNet::addr)) {
                let expected = nets.iter().filter(|n| n.contains(&probe)).max_by_key(|n| n.prefix_len());
                prop_assert_eq!(ranges.find(probe), expected);
            }
        }
    }
}
