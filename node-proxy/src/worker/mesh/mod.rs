//! What this node knows of the mesh, as the data path reads it.
//!
//! A [`MeshState`] never changes; [`store::Store`] makes the next one from resource changes and swaps it in. A reader
//! keeps the snapshot that it took for as long as it needs one consistent view. The one thing that changes under a
//! snapshot is a service port's [`Balancer`], on purpose: connections that live for days must see today's endpoints.

mod ranges;
pub mod service;
mod sharded;
pub mod store;

use std::cmp::Ordering;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use mesh_api::identity::SpiffeId;
use mesh_api::model::{Trust, Workload, WorkloadState};

use self::ranges::Ranges;
use self::service::{EndpointRef, ServiceState};
use self::sharded::Sharded;
pub use self::store::Store;
#[cfg(doc)]
use super::balance::Balancer;

/// A number that no other entry of this process bears: a key for caches that, unlike an address, is never used again.
fn serial() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Relaxed)
}

/// One workload, and what follows from it.
#[derive(Debug)]
pub struct WorkloadEntry {
    /// The workload.
    pub workload: Workload,
    /// Its identity; `None` as long as no trust domain is known.
    pub identity: Option<SpiffeId>,
    /// [`Self::identity`] as text, `unknown` without one.
    pub principal: Arc<str>,
    /// Unique in this process; another one after every change.
    pub serial: u64,
}

/// Which of several workloads an address means: the best one comes first.
#[derive(Debug, Clone)]
struct Claim(Arc<WorkloadEntry>);

impl Claim {
    /// A pod that is being deleted may still be listed when its address belongs to another one already.
    fn rank(&self) -> (bool, &str) {
        (self.0.workload.state == WorkloadState::Terminating, &self.0.workload.uid)
    }
}

impl Ord for Claim {
    fn cmp(&self, other: &Self) -> Ordering {
        self.rank().cmp(&other.rank())
    }
}

impl PartialOrd for Claim {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Claim {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Claim {}

/// What a service address and port stand for.
#[derive(Debug, Clone)]
pub enum VipLookup {
    /// A port of a service, with its index in [`ServiceState::ports`].
    Port(Arc<ServiceState>, usize),
    /// The service's address, but a port that it has not.
    UnknownPort(Arc<ServiceState>),
    /// No service's address.
    None,
}

/// A view of the mesh at one time.
#[derive(Debug, Clone, Default)]
pub struct MeshState {
    workloads: Sharded<Arc<str>, Arc<WorkloadEntry>>,
    addresses: Sharded<IpAddr, Vec<Claim>>,
    services: Sharded<Arc<str>, Arc<ServiceState>>,
    vips: Sharded<IpAddr, Vec<Arc<str>>>,
    endpoints: Sharded<IpAddr, Vec<EndpointRef>>,
    trust: Option<Arc<Trust>>,
    ranges: Arc<Ranges>,
}

impl MeshState {
    /// The workload that has an address.
    ///
    /// Of several, one that is not terminating, then the one with the smallest UID. Pods in their node's network
    /// namespace are not found by address, which they share with others.
    #[must_use]
    pub fn by_address(&self, address: IpAddr) -> Option<Arc<WorkloadEntry>> {
        Some(self.addresses.get(&address.to_canonical())?.first()?.0.clone())
    }

    /// The workload with a pod UID.
    #[must_use]
    pub fn by_uid(&self, uid: &str) -> Option<Arc<WorkloadEntry>> {
        self.workloads.get(uid).cloned()
    }

    /// What a destination means as a cluster IP. Of several services with one address, the first by `namespace/name`.
    #[must_use]
    pub fn service_by_vip(&self, address: IpAddr, port: u16) -> VipLookup {
        let Some(service) =
            self.vips.get(&address.to_canonical()).and_then(|keys| self.services.get(keys.first()?))
        else {
            return VipLookup::None;
        };
        match service.port_index(port) {
            Some(index) => VipLookup::Port(service.clone(), index),
            None => VipLookup::UnknownPort(service.clone()),
        }
    }

    /// Whether an address that no known pod or service has can only be that of one. Either it was not told of yet, or is gone;
    /// whoever is there is nobody to talk to in plain.
    #[must_use]
    pub fn is_unheard_of(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.addresses.get(&address).is_none_or(Vec::is_empty)
            && self.vips.get(&address).is_none_or(Vec::is_empty)
            && self.ranges.contain(address)
    }

    /// A service by namespace and name.
    #[must_use]
    pub fn service(&self, namespace: &str, name: &str) -> Option<Arc<ServiceState>> {
        self.service_by_key(&format!("{namespace}/{name}"))
    }

    /// A service by `namespace/name`.
    #[must_use]
    pub fn service_by_key(&self, key: &str) -> Option<Arc<ServiceState>> {
        self.services.get(key).cloned()
    }

    /// The service port that has this pod address and target port as an endpoint, ready or not.
    ///
    /// Of several, one with a cluster IP before a headless one, then the first by `namespace/name`, then the lowest
    /// service port: a guess for names in metrics, not for decisions.
    #[must_use]
    pub fn service_of(&self, address: IpAddr, target_port: u16) -> Option<(Arc<ServiceState>, usize)> {
        let refs = self.endpoints.get(&address.to_canonical())?;
        let first = refs.partition_point(|r| r.target_port < target_port);
        let found = refs.get(first).filter(|r| r.target_port == target_port)?;
        let service = self.services.get(&found.service)?;
        Some((service.clone(), service.port_index(found.service_port)?))
    }

    /// Every service that has a pod as an endpoint, by `namespace/name`.
    #[must_use]
    pub fn pod_services(&self, uid: &str) -> Vec<Arc<ServiceState>> {
        let Some(entry) = self.workloads.get(uid) else { return Vec::new() };
        let refs = entry.workload.addresses.iter().filter_map(|a| self.endpoints.get(&a.to_canonical()));
        let mut keys: Vec<_> = refs.flatten().map(|r| &r.service).collect();
        keys.sort();
        keys.dedup();
        keys.into_iter().filter_map(|key| self.services.get(key).cloned()).collect()
    }

    /// Whom the mesh trusts; `None` means nobody.
    #[must_use]
    pub fn trust(&self) -> Option<&Arc<Trust>> {
        self.trust.as_ref()
    }

    /// Every workload, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<WorkloadEntry>> {
        self.workloads.iter().map(|(_, entry)| entry)
    }

    /// Every service, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceState>> {
        self.services.iter().map(|(_, service)| service)
    }

    /// Number of workloads and services.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.workloads.len(), self.services.len())
    }
}
