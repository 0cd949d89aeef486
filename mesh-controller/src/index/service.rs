//! Service and endpoints to service resource.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_api::model::{Endpoint, Service, ServicePort};

use super::object::{EndpointSlice, Pod, PodReference, Service as Object, TargetPort};
use super::{Problem, protocol};

/// What a service's compilation may look up.
pub(super) trait Pods {
    /// The pod of `namespace` that has `address` for its own; none for host-network pods.
    fn owner(&self, namespace: &str, address: IpAddr) -> Option<&Pod>;
    /// The pod of another namespace that has `address` for its own.
    fn foreign(&self, namespace: &str, address: IpAddr) -> Option<&Pod>;
    /// Pods of `namespace` that have not finished.
    fn of_namespace<'a>(&'a self, namespace: &str) -> Box<dyn Iterator<Item = &'a Pod> + 'a>;
    /// Whether `address` is the pod's at the moment.
    fn has(&self, pod: &Pod, address: IpAddr) -> bool;
}

/// Compiles a service. Without slices, a service with a selector gets its endpoints from the pods that it selects when
/// `derive` is set, as Kubernetes' endpoint controller would make them.
pub(super) fn compile(
    service: &Object,
    slices: &[&EndpointSlice],
    pods: &impl Pods,
    derive: bool,
    cluster_domain: &str,
    problems: &mut Vec<Problem>,
) -> Service {
    let mut endpoints = Endpoints::default();
    if !slices.is_empty() {
        for slice in slices {
            from_slice(service, slice, &mut endpoints);
        }
    } else if derive && !service.selector.is_empty() {
        from_pods(service, pods, &mut endpoints);
    }
    Service {
        name: service.name.clone(),
        namespace: service.namespace.clone(),
        hostname: format!("{}.{}.svc.{cluster_domain}", service.name, service.namespace).into(),
        vips: service.vips.clone(),
        ports: service
            .ports
            .iter()
            .map(|p| ServicePort {
                port: p.port,
                name: p.name.clone(),
                protocol: protocol::declared(p.app_protocol.as_deref(), &p.name),
            })
            .collect(),
        endpoints: endpoints.finish(&service.namespace, pods, problems),
    }
}

/// Endpoints by address; an address that several slices list has the ports of all of them.
#[derive(Default)]
struct Endpoints(BTreeMap<IpAddr, Collected>);

#[derive(Default)]
struct Collected {
    /// Pods that the slices say it to be; an endpoint that is not the pod that it is said to be has no identity.
    said: Vec<PodReference>,
    ready: bool,
    terminating: bool,
    ports: Vec<(u16, u16)>,
}

impl Endpoints {
    fn add(&mut self, address: IpAddr, ready: bool, terminating: bool, ports: &[(u16, u16)]) {
        let collected = self.0.entry(address).or_default();
        collected.ready |= ready;
        collected.terminating |= terminating;
        collected.ports.extend_from_slice(ports);
    }

    fn said(&mut self, address: IpAddr, pod: Option<&PodReference>) {
        if let (Some(pod), Some(collected)) = (pod, self.0.get_mut(&address))
            && !collected.said.contains(pod)
        {
            collected.said.push(pod.clone());
        }
    }

    fn finish(self, namespace: &str, pods: &impl Pods, problems: &mut Vec<Problem>) -> Vec<Endpoint> {
        let one = |(address, mut collected): (IpAddr, Collected)| {
            collected.ports.sort_unstable();
            collected.ports.dedup();
            if let Some(pod) = pods.foreign(namespace, address) {
                problems.push(Problem {
                    field: "endpoints".to_owned(),
                    message: format!(
                        "{address} is the address of pod {}/{}; outside its namespace it is an endpoint without identity",
                        pod.namespace, pod.name
                    ),
                });
            }
            let agrees = |pod: &&Pod| collected.said.iter().all(|said| said.is(pod));
            let workload = pods.owner(namespace, address).filter(agrees).map(|pod| pod.uid.clone());
            Endpoint {
                address,
                workload,
                ready: collected.ready,
                terminating: collected.terminating,
                ports: collected.ports,
            }
        };
        self.0.into_iter().map(one).collect()
    }
}

fn from_slice(service: &Object, slice: &EndpointSlice, endpoints: &mut Endpoints) {
    let mut ports = Vec::new();
    for (name, target) in &slice.ports {
        for port in service.ports.iter().filter(|p| *p.name == **name) {
            ports.push((port.port, *target));
        }
    }
    for e in &slice.endpoints {
        endpoints.add(e.address, e.ready, e.terminating, &ports);
        endpoints.said(e.address, e.pod.as_ref());
    }
}

fn from_pods(service: &Object, pods: &impl Pods, endpoints: &mut Endpoints) {
    for pod in pods.of_namespace(&service.namespace) {
        if !service.selector.iter().all(|(k, v)| pod.labels.get(k) == Some(v)) {
            continue;
        }
        let mut ports = Vec::new();
        for port in &service.ports {
            let target = match &port.target {
                TargetPort::Number(number) => Some(*number),
                TargetPort::Name(name) => pod.named_ports.iter().find(|p| p.name == *name).map(|p| p.port),
            };
            // A pod without the named port does not serve it, and may serve others.
            ports.extend(target.map(|t| (port.port, t)));
        }
        let terminating = pod.deletion.is_some();
        let ready = service.publish_not_ready || (pod.ready() && !terminating);
        for address in &pod.addresses {
            let wanted = if address.is_ipv4() { service.families.0 } else { service.families.1 };
            if wanted && pods.has(pod, *address) {
                endpoints.add(*address, ready, terminating, &ports);
            }
        }
    }
}
