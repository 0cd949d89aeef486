//! Brings the kernel to what the plan says, and tells how it is.

use std::{collections::BTreeMap, fs, net::IpAddr};

use serde::{Deserialize, Serialize};

use super::{
    diff::{self, Change},
    error::Error,
    netlink::{self, Netlink, Snapshot},
    plan::{self, Inputs, Plan, Refused, Target, TunnelDevice},
    settings::Settings,
};

/// Keeps routes and rules as they should be. It keeps no state of its own between calls: everything is compared with what
/// the kernel holds, so a start after a crash goes on where the last one ended, and dropping it changes nothing.
#[derive(Debug)]
pub struct Router {
    settings: Settings,
    netlink: Netlink,
}

/// What a call of [`Router::apply`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Number of rules, routes, addresses and devices that were changed.
    pub changes: usize,
    /// What was not routed.
    pub refused: Vec<Refused>,
}

/// One route in the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteStatus {
    /// Pod range or address.
    pub range: ipnet::IpNet,
    /// Tunnel device.
    pub device: String,
    /// Largest packet, in bytes.
    pub mtu: u16,
}

/// One tunnel device in the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
}

/// How routing is, as the kernel tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutingStatus {
    /// Our table.
    pub table: u32,
    /// Number of our rules.
    pub rules: usize,
    /// Routes through the tunnel.
    pub routes: Vec<RouteStatus>,
    /// Those of the node's own processes to other nodes.
    #[serde(default)]
    pub node_routes: Vec<RouteStatus>,
    /// The tunnel's devices.
    pub devices: Vec<DeviceStatus>,
    /// Rules, routes and addresses that are not as they should be.
    pub differences: usize,
    /// What is not as it should be, in sentences; empty when all is well.
    pub findings: Vec<String>,
}

impl Router {
    /// Opens a connection to the kernel in the network namespace of the calling thread, which has to be the node's and
    /// within a tokio runtime. Changes nothing.
    ///
    /// # Errors
    /// When a setting cannot be, or there is no netlink.
    pub fn open(settings: Settings) -> Result<Self, Error> {
        settings.check().map_err(Error::Settings)?;
        Ok(Self { settings, netlink: Netlink::open()? })
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Makes what the inputs ask for, and removes what they do not ask for any more. Call it again whenever inputs
    /// change, a device was made anew, or just now and then: it changes nothing that is right. Has to be called in the
    /// node's network namespace.
    ///
    /// # Errors
    /// The first change that the kernel refused; all others are in force, the next call goes on. Without its device, too,
    /// rules and refusals are in force.
    pub async fn apply(&self, inputs: &Inputs) -> Result<Applied, Error> {
        let snapshot = self.read(inputs).await?;
        let mut changed = 0;
        let mut first = Ok(());
        for device in &inputs.devices {
            match self.prepare(&snapshot, device).await {
                Ok(did) => changed += usize::from(did),
                Err(error) => first = first.and(Err(error)),
            }
        }
        let Plan { desired, refused, .. } = plan::plan(&self.settings, inputs, &snapshot.addresses);
        // A device that was down has lost its routes since, or not had them.
        let snapshot = if changed == 0 { snapshot } else { self.read(inputs).await? };
        let changes = diff::changes(&snapshot.observed, &desired);
        first.and(self.make(&snapshot, &changes).await)?;
        Ok(Applied { changes: changed + changes.len(), refused })
    }

    /// Removes every rule, route and address that is ours. Devices are the tunnel's to remove.
    ///
    /// # Errors
    /// The first removal that the kernel refused; a second call goes on.
    pub async fn uninstall(&self) -> Result<usize, Error> {
        let snapshot = self.read(&Inputs::default()).await?;
        let changes = diff::changes(&snapshot.observed, &netlink::nothing());
        self.make(&snapshot, &changes).await?;
        Ok(changes.len())
    }

    /// Compares what the kernel holds with what the inputs ask for.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub async fn status(&self, inputs: &Inputs) -> Result<RoutingStatus, Error> {
        let snapshot = self.read(inputs).await?;
        let Plan { desired, refused, within, .. } = plan::plan(&self.settings, inputs, &snapshot.addresses);
        let held = &snapshot.observed.held;
        let mut findings: Vec<String> = refused
            .into_iter()
            .map(|Refused { peer, range, reason }| {
                format!("range {range} of node {peer} is not routed: {reason}")
            })
            .collect();
        findings.extend(within.iter().map(ToString::to_string));
        let differences = diff::changes(&snapshot.observed, &desired).len();
        if differences > 0 {
            findings.push(format!(
                "{differences} rules, routes or addresses are not as they should be; the agent sets them right at its \
                 next round, and if they keep coming back, another program changes priorities {} to {} or tables {} and {}",
                self.settings.priority,
                self.settings.priority + 9,
                self.settings.table,
                self.settings.node_table
            ));
        }
        findings.extend(forwarding_findings(inputs));
        for device in &inputs.devices {
            match snapshot.link(&device.name) {
                None => findings.push(Error::NoDevice(device.name.clone()).to_string()),
                Some(link) if !link.up => findings.push(format!("device {} is down", device.name)),
                Some(_) => {}
            }
        }
        let routes = |table: u32| {
            let routes = held.routes.iter().filter(move |route| route.table == table);
            let routes = routes.filter_map(|route| match &route.target {
                Target::Device { name, mtu, .. } => {
                    Some(RouteStatus { range: route.destination, device: name.clone(), mtu: *mtu })
                }
                _ => None,
            });
            routes.collect()
        };
        let devices = snapshot.links.iter().filter(|link| self.is_tunnel(inputs, &link.name));
        Ok(RoutingStatus {
            table: self.settings.table,
            differences,
            rules: held.rules.len(),
            routes: routes(self.settings.table),
            node_routes: routes(self.settings.node_table),
            devices: devices
                .map(|link| DeviceStatus { name: link.name.clone(), mtu: link.mtu, up: link.up })
                .collect(),
            findings,
        })
    }

    /// The devices by which the tunnel's datagrams to these addresses leave the node, but for its own and loopback, with
    /// their MTUs.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub async fn devices_towards(&self, addresses: &[IpAddr]) -> Result<BTreeMap<String, u32>, Error> {
        let snapshot = self.read(&Inputs::default()).await?;
        let mut devices = BTreeMap::new();
        for address in addresses {
            for number in self.netlink.devices_to(*address, self.settings.port).await? {
                let link = snapshot.devices.names.get(&number).and_then(|name| snapshot.link(name));
                devices.extend(link.map(|link| (link.name.clone(), link.mtu)));
            }
        }
        devices.retain(|name, _| name != "lo" && !name.starts_with(&self.settings.device_prefix));
        Ok(devices)
    }

    async fn read(&self, inputs: &Inputs) -> Result<Snapshot, Error> {
        self.netlink.read(&self.settings, |name| self.is_tunnel(inputs, name)).await
    }

    fn is_tunnel(&self, inputs: &Inputs, name: &str) -> bool {
        name.starts_with(&self.settings.device_prefix)
            || inputs.devices.iter().any(|device| device.name == name)
    }

    async fn make(&self, snapshot: &Snapshot, changes: &[Change]) -> Result<(), Error> {
        // What one address or route is refused for is no reason to leave the others undone, rules above all.
        let mut first = Ok(());
        for change in changes {
            first = first.and(self.netlink.apply(&snapshot.devices, change).await);
        }
        first
    }

    /// Brings a device up; whether there was anything to do.
    async fn prepare(&self, snapshot: &Snapshot, device: &TunnelDevice) -> Result<bool, Error> {
        let link = snapshot.link(&device.name).ok_or_else(|| Error::NoDevice(device.name.clone()))?;
        let changed = self.netlink.set_manners(&snapshot.devices, link).await?;
        if link.up && link.mtu == u32::from(device.mtu) {
            return Ok(changed);
        }
        self.netlink.set_device(&snapshot.devices, &device.name, device.mtu).await?;
        Ok(true)
    }
}

/// Whether the kernel forwards packets of the families that pods of other nodes have.
fn forwarding_findings(inputs: &Inputs) -> Vec<String> {
    let ranges = || inputs.peers.iter().flat_map(|peer| &peer.pod_ranges);
    let is_off = |path: &str| fs::read_to_string(path).is_ok_and(|value| value.trim() == "0");
    let families = [
        ("/proc/sys/net/ipv4/ip_forward", ranges().any(|range| range.addr().is_ipv4())),
        ("/proc/sys/net/ipv6/conf/all/forwarding", ranges().any(|range| range.addr().is_ipv6())),
    ];
    let mut findings = Vec::new();
    for (path, needed) in families {
        if needed && is_off(path) {
            findings.push(format!(
                "{path} is 0: the node forwards no packets of its pods; Kubernetes needs it to be 1"
            ));
        }
    }
    findings
}
