//! Names, types and sizes that the programs' maps must have, to judge pinned ones before they are taken over. A test
//! compares this table with what the kernel makes of the programs themselves.

use std::path::{Path, PathBuf};

use crate::{
    error::Error,
    sys::CidrKey,
    types::{self, *},
};

const ARRAY: u32 = 2;
const HASH: u32 = 1;
const PERCPU_ARRAY: u32 = 6;
const LPM_TRIE: u32 = 11;
const SOCKHASH: u32 = 18;
const SK_STORAGE: u32 = 24;

/// One map of `programs/src/maps.rs`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MapSpec {
    pub(crate) name: &'static str,
    pub(crate) map_type: u32,
    pub(crate) key_size: usize,
    pub(crate) value_size: usize,
    pub(crate) max_entries: usize,
    /// Written from user space and needed by programs of the next version: carried over into a new layout.
    pub(crate) carried: bool,
}

const fn map<K, V>(name: &'static str, map_type: u32, max_entries: usize) -> MapSpec {
    let (key_size, value_size) = (size_of::<K>(), size_of::<V>());
    let carried = matches!(map_type, HASH | LPM_TRIE);
    MapSpec { name, map_type, key_size, value_size, max_entries, carried }
}

pub(crate) const MAPS: &[MapSpec] = &[
    map::<u32, NodeEntry>("NODE", ARRAY, 1),
    map::<u64, PodEntry>("PODS", HASH, PODS_MAX),
    map::<Addr, u64>("POD_ADDRESSES", HASH, POD_ADDRESSES_MAX),
    map::<ListenerKey, u32>("LISTENERS", SOCKHASH, LISTENERS_MAX),
    map::<PortKey, u32>("EXCLUDED_PORTS", HASH, EXCLUDED_PORTS_MAX),
    map::<CidrKey, u32>("EXCLUDED_CIDRS", LPM_TRIE, EXCLUDED_CIDRS_MAX),
    map::<RefusedKey, u32>("REFUSED", HASH, REFUSED_MAX),
    map::<u32, u32>("OWN", SK_STORAGE, 0),
    map::<u32, Note>("NOTES", SK_STORAGE, 0),
    map::<ConnectionKey, Note>("HANDOFF", HASH, HANDOFF_MAX),
    map::<ConnectionKey, u32>("FAST", SOCKHASH, FAST_MAX),
    map::<u32, types::Path>("PATHS", SK_STORAGE, 0),
    map::<u32, u64>("COUNTERS", PERCPU_ARRAY, BRANCHES),
];

/// The directories of one node below the bpf file system.
#[derive(Debug, Clone)]
pub(crate) struct Pins {
    pub(crate) root: PathBuf,
}

impl Pins {
    /// Node names are DNS subdomains (RFC 1123), as in Kubernetes; a bpf file system takes no name with a dot, so
    /// dots become underscores, which such a name cannot have.
    pub(crate) fn new(bpffs: &Path, node: &str) -> Result<Self, Error> {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
        if node.is_empty() || !node.bytes().all(is_name) {
            return Err(Error::Invalid(format!(
                "node name {node:?} is no DNS name (letters, digits, '-' and '.'); name the node as Kubernetes does"
            )));
        }
        Ok(Self { root: bpffs.join("sockmesh").join(node.replace('.', "_")) })
    }

    pub(crate) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    /// Where maps of another layout are prepared while the old ones are in use.
    pub(crate) fn next_maps(&self) -> PathBuf {
        self.root.join("maps-next")
    }

    /// Where maps of the old layout are for the moment in which they are replaced.
    pub(crate) fn old_maps(&self) -> PathBuf {
        self.root.join("maps-old")
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub(crate) fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    pub(crate) fn pod(&self, netns_cookie: u64) -> PathBuf {
        self.pods().join(format!("{netns_cookie:016x}"))
    }

    /// The pods whose inbound program is pinned.
    pub(crate) fn pinned_pods(&self) -> std::io::Result<Vec<u64>> {
        let mut cookies = Vec::new();
        for entry in std::fs::read_dir(self.pods())? {
            let name = entry?.file_name();
            if let Some(cookie) = name.to_str().and_then(|name| u64::from_str_radix(name, 16).ok()) {
                cookies.push(cookie);
            }
        }
        cookies.sort_unstable();
        Ok(cookies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_pinned_under_a_name_that_the_file_system_takes() {
        let pins = Pins::new(Path::new("/sys/fs/bpf"), "ip-10-0-0-1.example.org").unwrap();
        assert_eq!(pins.root, Path::new("/sys/fs/bpf/sockmesh/ip-10-0-0-1_example_org"));
    }

    #[test]
    fn a_node_name_cannot_leave_its_directory() {
        for name in ["", "a/b", "a_b", "a b"] {
            assert!(Pins::new(Path::new("/sys/fs/bpf"), name).is_err(), "{name:?}");
        }
    }
}
