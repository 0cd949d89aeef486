//! By which interfaces packets go to the other nodes. Pure.

use std::collections::BTreeMap;

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

    /// Before anything is known of a tunnel: the kernel's interfaces if there are any, which lead to whom they did, else
    /// a process's.
    pub(super) fn found(interface: &str, exists: impl Fn(&str) -> bool) -> Self {
        let interfaces = Self::of_kernels(interface, exists);
        if interfaces.is_empty() { Self::only(interface) } else { Self { interfaces, ..Self::default() } }
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

    /// The one to a node; none while it cannot be reached.
    pub(super) fn to(&self, node: &str) -> Option<String> {
        self.of.get(node).or(self.otherwise.as_ref()).cloned()
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(Ways::found("wg", |_| false), Ways::only("wg"));
        assert_eq!(Ways::found("wg", |name| name == "wg2").interfaces, ["wg2"]);
    }
}
