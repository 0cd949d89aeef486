//! One service as the data path reads it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_api::model::{Service, ServicePort};

use super::serial;
use crate::worker::balance::load::{Load, LoadSettings};
use crate::worker::balance::{Balancer, Endpoint, EndpointSet};

/// One port of a service.
#[derive(Debug, Clone)]
pub struct PortState {
    /// Number, name, protocol.
    pub port: ServicePort,
    /// Its endpoints of either address family; the same objects for as long as the service has the port.
    balancers: [Arc<Balancer>; 2],
}

impl PortState {
    /// The endpoints for a connection to `address`: those of the same family, as kube-proxy has it, since an application
    /// that asked for IPv4 may reach one that listens on nothing else.
    #[must_use]
    pub fn balancer(&self, address: IpAddr) -> &Arc<Balancer> {
        &self.balancers[usize::from(!address.to_canonical().is_ipv4())]
    }

    pub(super) fn balancers(&self) -> &[Arc<Balancer>; 2] {
        &self.balancers
    }
}

/// One service.
#[derive(Debug)]
pub struct ServiceState {
    /// `namespace/name`.
    pub key: Arc<str>,
    /// The resource it was made from.
    pub service: Service,
    /// Its ports, in the resource's order.
    pub ports: Vec<PortState>,
    /// Unique in this process; another one after every change.
    pub serial: u64,
}

impl ServiceState {
    /// Index of a port in [`Self::ports`].
    #[must_use]
    pub fn port_index(&self, port: u16) -> Option<usize> {
        self.ports.iter().position(|p| p.port.port == port)
    }

    /// No cluster IP: its endpoints are what names resolve to.
    #[must_use]
    pub fn headless(&self) -> bool {
        self.service.vips.is_empty()
    }

    /// Builds the state and, apart from it, the endpoints of each port, which the caller publishes once the whole
    /// change holds. Ports keep the balancer and endpoints the load that they have in `previous`.
    pub(super) fn build(
        key: Arc<str>,
        service: Service,
        previous: Option<&Self>,
        settings: &Arc<LoadSettings>,
    ) -> (Self, Vec<(Arc<Balancer>, EndpointSet)>) {
        let mut sets = Vec::with_capacity(service.ports.len());
        let ports = service
            .ports
            .iter()
            .map(|port| {
                let before = previous.and_then(|s| s.ports.iter().find(|p| p.port.port == port.port));
                let balancers: [Arc<Balancer>; 2] = before.map(|p| p.balancers.clone()).unwrap_or_default();
                for (balancer, ipv4) in balancers.iter().zip([true, false]) {
                    let endpoints = endpoints(&service, port.port, ipv4, &balancer.endpoints(), settings);
                    sets.push((balancer.clone(), endpoints));
                }
                PortState { port: port.clone(), balancers }
            })
            .collect();
        (Self { key, service, ports, serial: serial() }, sets)
    }

    /// What its endpoints add to the index by pod address.
    pub(super) fn endpoint_refs(&self) -> impl Iterator<Item = (IpAddr, EndpointRef)> {
        self.service.endpoints.iter().flat_map(|endpoint| {
            endpoint.ports.iter().map(|&(service_port, target_port)| {
                let service = self.key.clone();
                let reference = EndpointRef { target_port, headless: self.headless(), service, service_port };
                (endpoint.address.to_canonical(), reference)
            })
        })
    }
}

fn endpoints(
    service: &Service,
    port: u16,
    ipv4: bool,
    before: &EndpointSet,
    settings: &Arc<LoadSettings>,
) -> EndpointSet {
    let mut all = Vec::with_capacity(service.endpoints.len());
    for endpoint in service.endpoints.iter().filter(|e| e.address.to_canonical().is_ipv4() == ipv4) {
        for &(_, target) in endpoint.ports.iter().filter(|(service_port, _)| *service_port == port) {
            let address = SocketAddr::new(endpoint.address.to_canonical(), target);
            let load = before
                .get(address)
                .filter(|e| e.workload == endpoint.workload)
                .map_or_else(|| Arc::new(Load::new(settings.clone())), |e| e.load.clone());
            all.push(Arc::new(Endpoint {
                address,
                workload: endpoint.workload.clone(),
                ready: endpoint.ready,
                terminating: endpoint.terminating,
                load,
            }));
        }
    }
    EndpointSet::new(all)
}

/// That a pod's port is an endpoint of a service port. The order is the order of preference for one target port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EndpointRef {
    pub(super) target_port: u16,
    pub(super) headless: bool,
    pub(super) service: Arc<str>,
    pub(super) service_port: u16,
}
