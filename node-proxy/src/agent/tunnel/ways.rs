//! By which interfaces packets go to the other nodes. Pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::model::NodeTunnel;
use wireguard::device::PublicKey;
use wireguard::device::kernel::HeldWay;

/// The tunnel's interfaces, and which of them leads to whom.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ways {
    /// All of them.
    pub(super) interfaces: Vec<String>,
    /// By name of the node.
    pub(super) of: BTreeMap<String, String>,
    /// To all others.
    pub(super) otherwise: Option<String>,
}

impl Ways {
    /// One interface leads to all nodes.
    pub(super) fn only(interface: &str) -> Self {
        let name = interface.to_owned();
        Self { interfaces: vec![name.clone()], of: BTreeMap::new(), otherwise: Some(name) }
    }

    /// The kernel's interfaces that there are.
    pub(super) fn of_kernels(interface: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
        (0..4).map(|number| format!("{interface}{number}")).filter(|name| exists(name)).collect()
    }

    /// What the kernel says: the interface to each node, and whether there is a session on it. As long as there is `another`
    /// one of a process whose keys other nodes know, that leads to nodes with which the kernel has no session yet.
    pub(super) fn of_kernel(
        interfaces: &[String],
        routes: &BTreeMap<String, (String, bool)>,
        another: Option<&str>,
    ) -> Self {
        let of = routes.iter().map(|(node, (interface, has_session))| {
            let interface = another.filter(|_| !has_session).unwrap_or(interface);
            (node.clone(), interface.to_owned())
        });
        let mut interfaces = interfaces.to_vec();
        interfaces.extend(another.map(str::to_owned));
        Self { interfaces, of: of.collect(), otherwise: None }
    }

    /// The same with an interface by which packets go to nodes to which there is no way yet.
    pub(super) fn with(mut self, interface: &str) -> Self {
        if !self.interfaces.iter().any(|is| is == interface) {
            self.interfaces.push(interface.to_owned());
        }
        self.otherwise = Some(interface.to_owned());
        self
    }

    /// The one to a node; none while it cannot be reached.
    pub(super) fn to(&self, node: &str) -> Option<String> {
        self.of.get(node).or(self.otherwise.as_ref()).cloned()
    }
}

/// The interface to each of these nodes, and whether there is a session on it, of the ways that the kernel has: that of the
/// newest keys with a session, else that of the oldest, which are known on both sides for certain.
pub(super) fn held(held: &[HeldWay], others: &[Arc<NodeTunnel>]) -> BTreeMap<String, (String, bool)> {
    let to = |node: &Arc<NodeTunnel>| {
        let generation = |way: &HeldWay| {
            let known = node.keys.iter().find(|key| PublicKey::from(key.public_key) == way.peer);
            known.map(|known| known.generation)
        };
        let mut ways: Vec<(&HeldWay, u64)> =
            held.iter().filter_map(|way| Some((way, generation(way)?))).collect();
        ways.sort_by_key(|(way, theirs)| Reverse((way.own_generation, *theirs)));
        let live = ways.iter().find(|(way, _)| way.has_session);
        let (way, _) = live.or(ways.last())?;
        Some((node.node.to_string(), (way.interface.clone(), way.has_session)))
    };
    others.iter().filter_map(to).collect()
}

#[cfg(test)]
mod tests {
    use mesh_api::model::TunnelKey;

    use super::*;

    #[test]
    fn packets_move_to_the_kernels_interfaces_node_by_node_as_sessions_come_about() {
        let interfaces = ["wg0".to_owned(), "wg2".to_owned()];
        let to = |interface: &str, live| (interface.to_owned(), live);
        let routes = BTreeMap::from([("b".to_owned(), to("wg2", true)), ("c".to_owned(), to("wg0", false))]);
        let changing = Ways::of_kernel(&interfaces, &routes, Some("wg"));
        assert_eq!(changing.interfaces, ["wg0", "wg2", "wg"]);
        let named = |ways: &Ways| ["b", "c", "d"].map(|node| ways.to(node).unwrap_or_default());
        assert_eq!(named(&changing), ["wg2", "wg", ""]);
        assert_eq!(
            named(&Ways::of_kernel(&interfaces, &routes, None)),
            ["wg2", "wg0", ""],
            "the process is gone"
        );
        assert_eq!(named(&Ways::only("wg")), ["wg"; 3]);
        assert_eq!(named(&changing.with("wg")), ["wg2", "wg", "wg"]);
        assert_eq!(Ways::of_kernels("wg", |name| name == "wg2"), ["wg2"]);
    }

    #[test]
    fn an_agent_that_finds_the_kernels_interfaces_goes_on_by_them_and_knows_which_nodes_have_joined_since() {
        let way = |interface: &str, own_generation, peer: u8, has_session| HeldWay {
            interface: interface.to_owned(),
            own_generation,
            peer: [peer; 32].into(),
            has_session,
        };
        let node = |name: &str, keys: &[(u64, u8)]| {
            let key = |(generation, key): &(u64, u8)| TunnelKey {
                generation: *generation,
                public_key: [*key; 32],
                ports: [1, 2],
            };
            let keys = keys.iter().map(key).collect();
            Arc::new(NodeTunnel { node: name.into(), addresses: vec![], pod_ranges: vec![], keys })
        };
        let others = [
            node("b", &[(7, 1), (8, 2)]),
            node("c", &[(3, 3)]),
            node("joined", &[(1, 4)]),
            node("d", &[(1, 5)]),
        ];
        let found = [
            way("wg0", 4, 2, false),
            way("wg1", 4, 1, true),
            way("wg3", 5, 1, false),
            way("wg0", 4, 9, true),
            way("wg3", 5, 3, false),
            way("wg1", 4, 3, false),
            way("wg1", 4, 5, true),
            way("wg3", 5, 5, true),
        ];
        let to = |interface: &str, live| (interface.to_owned(), live);
        let expected = [("b", to("wg1", true)), ("c", to("wg1", false)), ("d", to("wg3", true))];
        assert_eq!(held(&found, &others), expected.map(|(node, to)| (node.to_owned(), to)).into());
    }
}
