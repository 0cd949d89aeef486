//! The pods by name, UID, address and node.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::object::Pod;
use super::{Name, service};

/// Pods and who has which address.
#[derive(Debug, Default)]
pub(super) struct PodTable {
    pub(super) by_name: BTreeMap<Name, Pod>,
    pub(super) by_uid: HashMap<Arc<str>, Name>,
    /// Pods that claim an address and are neither finished nor in their node's network namespace.
    pub(super) claims: HashMap<IpAddr, BTreeSet<Name>>,
    /// Scheduled pods by node.
    pub(super) on_node: HashMap<Arc<str>, BTreeSet<Name>>,
}

impl PodTable {
    /// The pod that has the address: the newest that claims it and is not being deleted. Older ones are remains whose
    /// address was given away.
    pub(super) fn winner(&self, address: IpAddr) -> Option<&Pod> {
        let claims = self.claims.get(&address)?;
        claims
            .iter()
            .filter_map(|n| self.by_name.get(n))
            .max_by_key(|p| (p.deletion.is_none(), p.created, &p.uid))
    }

    pub(super) fn claims_addresses(pod: &Pod) -> bool {
        !pod.finished() && !pod.host_network
    }

    /// Addresses of the pods on a node, without the node's own.
    pub(super) fn addresses_on(&self, node: &str) -> Vec<IpAddr> {
        let pods = self.on_node.get(node).into_iter().flatten().filter_map(|name| self.by_name.get(name));
        let pods = pods.filter(|pod| Self::claims_addresses(pod));
        let owned = |pod: &Pod, a: &IpAddr| self.winner(*a).is_some_and(|winner| winner.uid == pod.uid);
        pods.flat_map(|pod| pod.addresses.iter().filter(|a| owned(pod, a)).copied()).collect()
    }
}

impl service::Pods for PodTable {
    fn owner(&self, namespace: &str, address: IpAddr) -> Option<&Pod> {
        self.winner(address).filter(|p| *p.namespace == *namespace)
    }

    fn foreign(&self, namespace: &str, address: IpAddr) -> Option<&Pod> {
        self.winner(address).filter(|p| *p.namespace != *namespace)
    }

    fn of_namespace<'a>(&'a self, namespace: &str) -> Box<dyn Iterator<Item = &'a Pod> + 'a> {
        let namespace: Arc<str> = namespace.into();
        let from: Name = (namespace.clone(), Arc::from(""));
        let pods = self.by_name.range(from..).take_while(move |((ns, _), _)| *ns == namespace);
        Box::new(pods.map(|(_, p)| p).filter(|p| !p.finished()))
    }

    fn has(&self, pod: &Pod, address: IpAddr) -> bool {
        pod.host_network || self.winner(address).is_some_and(|w| w.uid == pod.uid)
    }
}
