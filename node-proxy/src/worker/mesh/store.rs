//! Makes the next [`MeshState`] from resource changes.
//!
//! A change is applied as a whole or not at all: everything is checked first, and all that is wrong is named. Until the
//! first full configuration there is no state to look into ([`Unsynced`]), so nothing can be decided by accident.

use std::collections::{HashMap, HashSet};
use std::ops::Deref;
use std::sync::Arc;

use arc_swap::{ArcSwapOption, Guard};
use mesh_api::codec::TRUST_NAME;
use mesh_api::model::{
    ADDRESS_RANGES_TYPE, NODE_TUNNEL_TYPE, Resource, SERVICE_TYPE, Service, TRUST_TYPE, Trust, WORKLOAD_TYPE,
    Workload,
};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::service::ServiceState;
use super::{Claim, MeshState, WorkloadEntry, serial};
use crate::worker::balance::load::LoadSettings;
use crate::worker::balance::{Balancer, EndpointSet};

/// No full configuration has come yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the node has no configuration yet; is the controller reachable from this node?")]
pub struct Unsynced;

/// Names a resource to remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResourceName<'a> {
    /// Type URL, as in the delta stream.
    pub type_url: &'a str,
    /// Name within the type.
    pub name: &'a str,
}

/// A consistent view, borrowed from the store for a decision. Whatever lives longer than that takes a new one for each
/// decision: one that is kept keeps a whole old mesh in memory, and decides by it.
#[derive(Debug)]
pub struct Snapshot(Guard<Option<Arc<MeshState>>>);

impl Deref for Snapshot {
    type Target = Arc<MeshState>;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref().expect("Store::state makes snapshots of what is there only")
    }
}

/// Holds the current state.
#[derive(Debug, Default)]
pub struct Store {
    current: ArcSwapOption<MeshState>,
    /// Held by who makes the next state.
    writer: Mutex<Texts>,
    changes: watch::Sender<()>,
    load: Arc<LoadSettings>,
}

impl Store {
    /// An empty store whose endpoints count load with these constants.
    #[must_use]
    pub fn new(load: LoadSettings) -> Self {
        Self { load: Arc::new(load), ..Self::default() }
    }

    /// The current state.
    ///
    /// # Errors
    /// [`Unsynced`] before the first full configuration.
    pub fn state(&self) -> Result<Snapshot, Unsynced> {
        let guard = self.current.load();
        if guard.is_none() { Err(Unsynced) } else { Ok(Snapshot(guard)) }
    }

    /// Tells of every change after this call.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Applies a change; with `full`, what `upserts` does not hold is gone. Removing what is not there is no error.
    ///
    /// # Errors
    /// One sentence for each thing that is wrong, naming the resource; then nothing was changed.
    pub fn apply(
        &self,
        upserts: Vec<Resource>,
        removals: &[ResourceName<'_>],
        full: bool,
    ) -> Result<(), Vec<String>> {
        let mut texts = self.writer.lock();
        let old = self.current.load_full();
        if old.is_none() && !full {
            return Err(vec![
                "configuration: a partial change came before the first full one; send a full one".into(),
            ]);
        }
        check(&upserts, removals)?;
        let mut next = Change { state: old.as_deref().cloned().unwrap_or_default(), publish: Vec::new() };
        let ranges = Arc::clone(&next.state.ranges);
        if full {
            next.retain(&upserts);
        }
        for name in removals {
            match name.type_url {
                WORKLOAD_TYPE => next.remove_workload(name.name),
                SERVICE_TYPE => next.remove_service(name.name),
                ADDRESS_RANGES_TYPE => Arc::make_mut(&mut next.state.ranges).remove(name.name),
                _ if name.name == TRUST_NAME => next.set_trust(None)?,
                // Part of the deny list, which is not looked for here.
                _ => {}
            }
        }
        let mut workloads = Vec::with_capacity(upserts.len());
        let mut services = Vec::new();
        for resource in upserts {
            match resource {
                Resource::Workload(workload) => workloads.push(workload),
                Resource::Service(service) => services.push(service),
                Resource::Trust(trust) => next.set_trust(Some(trust))?,
                // Refused above.
                Resource::NodeTunnel(_) => {}
                Resource::Denied(_) => {}
                Resource::AddressRanges(ranges) => Arc::make_mut(&mut next.state.ranges).set(ranges),
            }
        }
        if !Arc::ptr_eq(&ranges, &next.state.ranges) {
            Arc::make_mut(&mut next.state.ranges).index();
        }
        // Identities need the trust domain, so trust goes first.
        let mut errors = Vec::new();
        for mut workload in workloads {
            texts.share_those_of(&mut workload);
            if let Err(error) = next.set_workload(workload) {
                errors.push(error);
            }
        }
        texts.sweep();
        if !errors.is_empty() {
            return Err(errors);
        }
        for service in services {
            next.set_service(service, &self.load);
        }
        let Change { state, publish } = next;
        for (balancer, endpoints) in publish {
            balancer.publish(endpoints);
        }
        self.current.store(Some(Arc::new(state)));
        self.changes.send_replace(());
        Ok(())
    }
}

/// Texts that many workloads have in common, such as their namespace: kept once and not once for each.
#[derive(Debug, Default)]
struct Texts {
    known: HashSet<Arc<str>>,
    /// How many there were after the last sweep.
    swept: usize,
}

impl Texts {
    /// Texts that are kept before any sweep is worth its time.
    const FEW: usize = 1024;

    fn share(&mut self, text: &mut Arc<str>) {
        match self.known.get(text) {
            Some(known) => *text = known.clone(),
            None => drop(self.known.insert(text.clone())),
        }
    }

    fn share_those_of(&mut self, workload: &mut Workload) {
        self.share(&mut workload.namespace);
        self.share(&mut workload.service_account);
        self.share(&mut workload.node);
        self.share(&mut workload.workload_name);
        self.share(&mut workload.app);
        self.share(&mut workload.version);
        self.share(&mut workload.canonical_service);
        self.share(&mut workload.canonical_revision);
    }

    /// Forgets texts that nobody else has, once there are twice as many as there were.
    fn sweep(&mut self) {
        if self.known.len() > 2 * self.swept + Self::FEW {
            self.known.retain(|text| Arc::strong_count(text) > 1);
            self.swept = self.known.len();
        }
    }
}

/// A state in the making and the endpoints to show when it is done.
struct Change {
    state: MeshState,
    publish: Vec<(Arc<Balancer>, EndpointSet)>,
}

impl Change {
    /// Removes what a full configuration does not hold.
    fn retain(&mut self, keep: &[Resource]) {
        let (mut uids, mut keys, mut trust) = (HashSet::new(), HashSet::new(), false);
        for resource in keep {
            match resource {
                Resource::Workload(w) => drop(uids.insert(&*w.uid)),
                Resource::Service(s) => drop(keys.insert(s.key())),
                Resource::Trust(_) => trust = true,
                Resource::NodeTunnel(_) | Resource::Denied(_) | Resource::AddressRanges(_) => {}
            }
        }
        let gone = |name: &Arc<str>, kept: bool| (!kept).then(|| name.clone());
        let workloads: Vec<_> =
            self.state.workloads.iter().filter_map(|(uid, _)| gone(uid, uids.contains(&**uid))).collect();
        let services: Vec<_> =
            self.state.services.iter().filter_map(|(key, _)| gone(key, keys.contains(&**key))).collect();
        workloads.iter().for_each(|uid| self.remove_workload(uid));
        services.iter().for_each(|key| self.remove_service(key));
        if !trust {
            self.state.trust = None;
        }
        // Those that stay are among what is kept.
        self.state.ranges = Arc::default();
    }

    /// Another trust domain gives every workload another identity.
    fn set_trust(&mut self, trust: Option<Trust>) -> Result<(), Vec<String>> {
        let domain = |t: Option<&Trust>| t.map(|t| t.trust_domain.clone());
        let changed = domain(self.state.trust.as_deref()) != domain(trust.as_ref());
        self.state.trust = trust.map(Arc::new);
        if !changed {
            return Ok(());
        }
        let all: Vec<Workload> = self.state.workloads().map(|entry| entry.workload.clone()).collect();
        let errors: Vec<_> = all.into_iter().filter_map(|w| self.set_workload(w).err()).collect();
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn set_workload(&mut self, workload: Workload) -> Result<(), String> {
        let identity = match &self.state.trust {
            None => None,
            Some(trust) => Some(workload.identity(&trust.trust_domain).map_err(|e| {
                format!("workload {} ({}/{}): {e}", workload.uid, workload.namespace, workload.name)
            })?),
        };
        let principal = identity.as_ref().map_or_else(|| "unknown".into(), |id| id.to_string().into());
        self.remove_workload(&workload.uid.clone());
        let entry = Arc::new(WorkloadEntry { workload, identity, principal, serial: serial() });
        if !entry.workload.host_network {
            for address in &entry.workload.addresses {
                self.state.addresses.add(address.to_canonical(), Claim(entry.clone()));
            }
        }
        self.state.workloads.insert(entry.workload.uid.clone(), entry);
        Ok(())
    }

    fn remove_workload(&mut self, uid: &str) {
        if let Some(entry) = self.state.workloads.remove(uid) {
            for address in &entry.workload.addresses {
                self.state.addresses.take(&address.to_canonical(), &Claim(entry.clone()));
            }
        }
    }

    fn set_service(&mut self, service: Service, load: &Arc<LoadSettings>) {
        let key: Arc<str> = service.key().into();
        let previous = self.state.services.remove(&*key);
        let (next, sets) = ServiceState::build(key.clone(), service, previous.as_deref(), load);
        self.publish.extend(sets);
        self.reindex(previous.as_deref(), Some(&next));
        self.state.services.insert(key, Arc::new(next));
    }

    fn remove_service(&mut self, key: &str) {
        if let Some(previous) = self.state.services.remove(key) {
            self.reindex(Some(&previous), None);
        }
    }

    /// Brings the indexes by address from one state of a service to the next, touching only what differs.
    fn reindex(&mut self, previous: Option<&ServiceState>, next: Option<&ServiceState>) {
        let kept = |number| next.is_some_and(|s| s.port_index(number).is_some());
        for port in previous.iter().flat_map(|s| &s.ports).filter(|p| !kept(p.port.port)) {
            // Who still holds the balancer must find nobody there.
            for balancer in port.balancers() {
                self.publish.push((balancer.clone(), EndpointSet::default()));
            }
        }
        let vips = |s: Option<&ServiceState>| -> HashSet<_> {
            s.iter().flat_map(|s| s.service.vips.iter().map(|ip| ip.to_canonical())).collect()
        };
        let (before, after) = (vips(previous), vips(next));
        for gone in before.difference(&after) {
            self.state.vips.take(gone, &previous.expect("it had the address").key);
        }
        for added in after.difference(&before) {
            self.state.vips.add(*added, next.expect("it has the address").key.clone());
        }
        let refs = |s: Option<&ServiceState>| {
            let mut by_address: HashMap<_, Vec<_>> = HashMap::new();
            for (address, reference) in s.iter().flat_map(|s| s.endpoint_refs()) {
                by_address.entry(address).or_default().push(reference);
            }
            by_address
        };
        let (before, after) = (refs(previous), refs(next));
        for (address, references) in &before {
            for reference in references.iter().filter(|r| after.get(address).is_none_or(|a| !a.contains(r))) {
                self.state.endpoints.take(address, reference);
            }
        }
        for (address, references) in after {
            for reference in references {
                self.state.endpoints.add(address, reference);
            }
        }
    }
}

/// What is wrong with a change as such, whatever the state.
fn check(upserts: &[Resource], removals: &[ResourceName<'_>]) -> Result<(), Vec<String>> {
    let mut errors = Vec::new();
    let mut seen = HashSet::new();
    for resource in upserts {
        let (type_url, name) = match resource {
            Resource::Workload(w) => (WORKLOAD_TYPE, w.uid.to_string()),
            Resource::Service(s) => (SERVICE_TYPE, s.key()),
            Resource::Trust(_) | Resource::Denied(_) => (TRUST_TYPE, resource.name()),
            Resource::NodeTunnel(t) => (NODE_TUNNEL_TYPE, t.node.to_string()),
            Resource::AddressRanges(_) => (ADDRESS_RANGES_TYPE, resource.name()),
        };
        match resource {
            Resource::Workload(w) => check_workload(w, &mut errors),
            Resource::Service(s) => check_service(s, &mut errors),
            Resource::Trust(t) => check_trust(t, &mut errors),
            Resource::NodeTunnel(_) => errors.push(format!("{type_url} {name}: is for agents only")),
            // Their decoder found nothing wrong, and what they say is not for us to doubt.
            Resource::Denied(_) | Resource::AddressRanges(_) => {}
        }
        if !seen.insert((type_url, name.clone())) {
            errors.push(format!("{type_url} {name}: is in the change twice"));
        }
    }
    for removal in removals {
        if ![WORKLOAD_TYPE, SERVICE_TYPE, TRUST_TYPE, ADDRESS_RANGES_TYPE].contains(&removal.type_url) {
            errors.push(format!("{} {}: is of no known type", removal.type_url, removal.name));
        } else if seen.contains(&(removal.type_url, removal.name.to_owned())) {
            errors.push(format!("{} {}: is both set and removed", removal.type_url, removal.name));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn check_workload(w: &Workload, errors: &mut Vec<String>) {
    for (field, value) in [
        ("uid", &w.uid),
        ("name", &w.name),
        ("namespace", &w.namespace),
        ("serviceAccount", &w.service_account),
    ] {
        if value.is_empty() {
            errors.push(format!("workload {} ({}/{}): {field} is empty", w.uid, w.namespace, w.name));
        }
    }
}

fn check_service(s: &Service, errors: &mut Vec<String>) {
    let mut fail = |text: String| errors.push(format!("service {}: {text}", s.key()));
    if s.name.is_empty() || s.namespace.is_empty() {
        fail("name or namespace is empty".into());
    }
    let mut numbers = HashSet::new();
    for port in &s.ports {
        if port.port == 0 || !numbers.insert(port.port) {
            fail(format!("port {} is 0 or there twice", port.port));
        }
    }
    for endpoint in &s.endpoints {
        for (port, target) in &endpoint.ports {
            if *target == 0 || !numbers.contains(port) {
                fail(format!(
                    "endpoint {}: maps port {port}, which the service lacks, or to port 0",
                    endpoint.address
                ));
            }
        }
    }
}

fn check_trust(t: &Trust, errors: &mut Vec<String>) {
    if t.trust_domain.is_empty() {
        errors.push("trust: trust_domain is empty".into());
    }
    if t.roots.is_empty() {
        errors.push("trust: has no root certificate, so no peer could be accepted".into());
    }
}

#[cfg(test)]
mod tests;
