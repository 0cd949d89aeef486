//! What the kernel should hold, as pure data made from pure data.
//!
//! Our rules, in the order in which the kernel asks them (`priority` + n), for each family that has pods:
//!
//! | n | rule | why |
//! |---|---|---|
//! | 0 | from the node itself, UDP source port of the tunnel: skip | the tunnel's own datagrams must not enter it |
//! | 1 | TCP destination or source port 15008: skip | the mesh's mutual TLS is encrypted already |
//! | 3 | from the pods of this node: our table | |
//! | 4 | from the node itself, UDP to the ports of overlays: skip | they carry pods' packets |
//! | 5 | TCP and UDP from the node itself and its own address: the nodes' table | |
//! | 6 | from the node itself and any other address: skip | IPv6: the next rule cannot say "no address" |
//! | 7 | TCP and UDP from the node itself, from no address yet: the nodes' table | the route gives it the node's |
//! | 9 | nothing: where "skip" continues | rules of others after ours still hold |
//!
//! Rules 4 to 7 are there only while something of the node's own traffic goes inside. What a process sends from another
//! address than the node's, a virtual one perhaps, stays outside: the peer would take it for somebody else's.
//!
//! Our tables have no default: what they do not know goes on to the next rule. A pod range has a refusal for when its device
//! is gone; a node's address has none, and goes outside then.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    mtu,
    settings::{FALLBACK_METRIC, Settings, TUNNEL_METRIC, WithoutDevice},
};

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Of a network.
    #[must_use]
    pub fn of_net(net: &IpNet) -> Self {
        Self::of(net.addr())
    }
}

/// Transport protocol of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What a rule is about; what is not said matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Match {
    pub(crate) from: Option<IpNet>,
    pub(crate) to: Option<IpNet>,
    pub(crate) transport: Option<Transport>,
    pub(crate) source_ports: Option<(u16, u16)>,
    pub(crate) destination_ports: Option<(u16, u16)>,
    /// Only packets that a process of this network namespace sends.
    pub(crate) from_here: bool,
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Action {
    /// Asks a table.
    Table(u32),
    /// Goes on at a later priority.
    Skip(u32),
    /// Nothing: a place to go on at.
    Nothing,
}

/// One policy rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Rule {
    pub(crate) family: Family,
    pub(crate) priority: u32,
    pub(crate) matches: Match,
    pub(crate) action: Action,
}

/// Where a route of ours leads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Target {
    /// Through a tunnel device.
    Device {
        name: String,
        /// Largest packet, in bytes.
        mtu: u16,
        /// Holds for forwarded IPv6 packets too, for which the kernel else asks the device alone; packets of the node itself
        /// learn of no smaller one behind the tunnel then.
        locked: bool,
        /// TCP's maximum segment where it does not follow from `mtu`.
        advmss: Option<u16>,
        /// Source address of the node's own packets.
        source: Option<IpAddr>,
    },
    /// On to the next rule.
    Throw,
    /// Refused.
    Unreachable,
}

/// One route of ours. Two of them with the same `table`, `destination` and `metric` cannot be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Route {
    pub(crate) table: u32,
    pub(crate) destination: IpNet,
    pub(crate) metric: u32,
    pub(crate) target: Target,
}

/// All that should be there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Desired {
    pub(crate) rules: BTreeSet<Rule>,
    pub(crate) routes: BTreeSet<Route>,
    /// Device and address of it.
    pub(crate) addresses: BTreeSet<(String, IpAddr)>,
}

/// This node as others see it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalNode {
    /// Ranges that the pods of this node have their addresses from, or the addresses themselves.
    pub pod_ranges: Vec<IpNet>,
    /// Addresses of the node.
    pub node_addresses: Vec<IpAddr>,
}

/// A device of the tunnel on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelDevice {
    /// Its name.
    pub name: String,
    /// Largest packet that it should take, in bytes; see [`super::mtu`].
    pub mtu: u16,
}

/// How another node is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRoute {
    /// Name of the node.
    pub name: String,
    /// Device that leads to it, as the tunnel says; while there is none, packets for it are refused, if routing is set up so.
    pub device: Option<String>,
    /// Ranges or single addresses of its pods.
    pub pod_ranges: Vec<IpNet>,
    /// Addresses of the node itself.
    pub node_addresses: Vec<IpAddr>,
    /// Device by which this node's own processes are to reach these addresses; none while they are to do so outside.
    pub node_device: Option<String>,
    /// Largest packet known to reach it through the tunnel, in bytes, when that is less than the device's.
    pub usable_mtu: Option<u16>,
}

/// All that routing depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// This node.
    pub local: LocalNode,
    /// The tunnel's devices.
    pub devices: Vec<TunnelDevice>,
    /// The other nodes that have a tunnel to this one.
    pub peers: Vec<PeerRoute>,
}

/// A range of a peer that is not routed, because it would take packets that are not that peer's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Name of the peer.
    pub peer: String,
    /// What it claims.
    pub range: IpNet,
    /// Why it is not routed, and what to do.
    pub reason: String,
}

/// The desired state, and what was left out of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) desired: Desired,
    pub(crate) refused: Vec<Refused>,
    /// Ranges within those of somebody else, who does not get what is sent there.
    pub(crate) within: Vec<Within>,
    /// Ranges that a peer has, with its name.
    taken: BTreeMap<IpNet, String>,
}

/// A range that lies in another node's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Within {
    range: IpNet,
    of: String,
    around: IpNet,
    around_of: String,
}

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { range, of, around, around_of } = self;
        write!(
            f,
            "range {range} of {of} lies in {around} of {around_of}: packets for it go to {of}, and {around_of} gets none of \
             them; give the nodes ranges that do not overlap"
        )
    }
}

/// Number of the last of our rules, where "skip" goes on.
const END: u32 = 9;

/// Makes the plan. `own_addresses` are all addresses of the node's other devices.
pub(crate) fn plan(settings: &Settings, inputs: &Inputs, own_addresses: &[IpAddr]) -> Plan {
    let mut plan = Plan::default();
    let local_ranges = IpNet::aggregate(&inputs.local.pod_ranges);
    for peer in &inputs.peers {
        add_peer(&mut plan, settings, inputs, &local_ranges, peer);
    }
    // Whatever a peer claims, packets for this node's own pods and for the node stay here.
    let own_nodes = inputs.local.node_addresses.iter().map(|address| IpNet::from(*address));
    for destination in local_ranges.iter().copied().chain(own_nodes) {
        let (table, metric) = (settings.table, TUNNEL_METRIC);
        plan.desired.routes.insert(Route { table, destination, metric, target: Target::Throw });
    }
    // An address that others know the node by and that it does not have (1:1 NAT) nothing can be sent from.
    let own: Vec<IpAddr> =
        inputs.local.node_addresses.iter().copied().filter(|own| own_addresses.contains(own)).collect();
    let mut taken = BTreeMap::new();
    for peer in &inputs.peers {
        add_node(&mut plan, settings, inputs, (&own, &local_ranges), peer, &mut taken);
    }
    plan.within = within(&plan.taken, &local_ranges);
    for family in [Family::V4, Family::V6] {
        let sources: Vec<IpNet> =
            local_ranges.iter().filter(|range| Family::of_net(range) == family).copied().collect();
        let of_nodes = taken.keys().any(|address| Family::of_net(address) == family);
        let own: &[IpAddr] = if of_nodes { &own } else { &[] };
        if !sources.is_empty() || of_nodes {
            plan.desired.rules.extend(rules(settings, family, &sources, own));
        }
    }
    // Masquerading CNIs give packets the address of the device that they leave by: with one from the pods' own range,
    // answers come back through the tunnel.
    for address in
        own_addresses.iter().filter(|address| local_ranges.iter().any(|range| range.contains(*address)))
    {
        for device in &inputs.devices {
            plan.desired.addresses.insert((device.name.clone(), *address));
        }
    }
    plan
}

fn add_peer(plan: &mut Plan, settings: &Settings, inputs: &Inputs, local_ranges: &[IpNet], peer: &PeerRoute) {
    let named = |device: &&TunnelDevice| peer.device.as_ref() == Some(&device.name);
    let device = inputs.devices.iter().find(named);
    if let (None, Some(device)) = (device, &peer.device) {
        let reason = format!("the tunnel has no device {device} on this node");
        let refuse =
            |range: &IpNet| Refused { peer: peer.name.clone(), range: *range, reason: reason.clone() };
        plan.refused.extend(peer.pod_ranges.iter().map(refuse));
    }
    let table = settings.table;
    for range in &peer.pod_ranges {
        let range = range.trunc();
        if let Some(reason) = refusal(&plan.taken, inputs, local_ranges, &range) {
            plan.refused.push(Refused { peer: peer.name.clone(), range, reason });
            continue;
        }
        if let Some(device) = device {
            let family = Family::of_net(&range);
            let (mtu, advmss) = mtu::of_route(family, usable(peer, device));
            let locked = family == Family::V6 && mtu < device.mtu;
            let target = Target::Device { name: device.name.clone(), mtu, locked, advmss, source: None };
            plan.desired.routes.insert(Route { table, destination: range, metric: TUNNEL_METRIC, target });
        }
        plan.taken.insert(range, peer.name.clone());
        if settings.without_device == WithoutDevice::Refuse {
            let target = Target::Unreachable;
            plan.desired.routes.insert(Route { table, destination: range, metric: FALLBACK_METRIC, target });
        }
    }
}

/// Largest packet that reaches a peer through a device.
fn usable(peer: &PeerRoute, device: &TunnelDevice) -> u16 {
    peer.usable_mtu.map_or(device.mtu, |usable| usable.min(device.mtu))
}

/// Has this node's own processes, from the addresses `own`, reach a peer's own addresses through the tunnel. `taken` says whose
/// they are.
fn add_node(
    plan: &mut Plan,
    settings: &Settings,
    inputs: &Inputs,
    (own, local_ranges): (&[IpAddr], &[IpNet]),
    peer: &PeerRoute,
    taken: &mut BTreeMap<IpNet, String>,
) {
    let named = |device: &&TunnelDevice| peer.node_device.as_ref() == Some(&device.name);
    let Some(device) = inputs.devices.iter().find(named) else { return };
    for address in &peer.node_addresses {
        let (destination, family) = (IpNet::from(*address), Family::of(*address));
        // Without an address that the peer knows nothing would be taken for this node's.
        let Some(own) = own.iter().copied().find(|own| Family::of(*own) == family) else { continue };
        if let Some(reason) = refusal(taken, inputs, local_ranges, &destination) {
            plan.refused.push(Refused { peer: peer.name.clone(), range: destination, reason });
            continue;
        }
        let (mtu, advmss) = mtu::of_route(family, usable(peer, device));
        let (name, source) = (device.name.clone(), Some(own));
        // Not locked: the node's own packets are to learn of narrower paths.
        let target = Target::Device { name, mtu, locked: false, advmss, source };
        let (table, metric) = (settings.node_table, TUNNEL_METRIC);
        plan.desired.routes.insert(Route { table, destination, metric, target });
        taken.insert(destination, peer.name.clone());
    }
}

/// Why a peer may not have this range.
fn refusal(
    taken: &BTreeMap<IpNet, String>,
    inputs: &Inputs,
    local_ranges: &[IpNet],
    range: &IpNet,
) -> Option<String> {
    if local_ranges.iter().any(|local| local.contains(range)) {
        return Some(
            "it lies in a pod range of this node; two nodes have the same range, give one another".to_owned(),
        );
    }
    if let Some(own) = inputs.local.node_addresses.iter().find(|own| IpNet::from(**own) == *range) {
        return Some(format!("{own} is this node's own address"));
    }
    if reserved().iter().any(|reserved| reserved.contains(range) || range.prefix_len() == 0) {
        return Some("no pod can have such an address".to_owned());
    }
    if let Some(holder) = taken.get(range) {
        return Some(format!(
            "node {holder} has it already; two nodes have the same range, give one another"
        ));
    }
    None
}

/// Ranges of several addresses that lie in others. A single one in a range is that of a pod which took its address along, and
/// is meant so.
fn within(taken: &BTreeMap<IpNet, String>, local_ranges: &[IpNet]) -> Vec<Within> {
    let own = local_ranges.iter().map(|range| (*range, "this node".to_owned()));
    let mut ranges: Vec<(IpNet, String)> =
        taken.iter().map(|(range, name)| (*range, format!("node {name}"))).chain(own).collect();
    // Whatever lies in a range comes after it.
    ranges.sort();
    let mut within = Vec::new();
    let mut around: Vec<(IpNet, String)> = Vec::new();
    for (range, of) in ranges.into_iter().filter(|(range, _)| range.prefix_len() < range.max_prefix_len()) {
        while around.last().is_some_and(|(last, _)| !last.contains(&range)) {
            around.pop();
        }
        if let Some((wider, around_of)) = around.last().filter(|(_, name)| *name != of) {
            let (around, around_of) = (*wider, around_of.clone());
            within.push(Within { range, of: of.clone(), around, around_of });
        }
        around.push((range, of));
    }
    within
}

/// Loopback, link-local and multicast (RFC 6890, RFC 5771, RFC 4291).
fn reserved() -> [IpNet; 6] {
    let v4 = |a, b, len| IpNet::new_assert(Ipv4Addr::new(a, b, 0, 0).into(), len);
    let v6 = |first, len| IpNet::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0).into(), len);
    [
        v4(127, 0, 8),
        v4(169, 254, 16),
        v4(224, 0, 4),
        IpNet::new_assert(Ipv6Addr::LOCALHOST.into(), 128),
        v6(0xfe80, 10),
        v6(0xff00, 8),
    ]
}

/// UDP ports that overlays send to: VXLAN as Linux (8472) and as RFC 7348 have it, Geneve (RFC 8926), flannel's own (8285),
/// ESP in UDP (RFC 3948), Weave's, and the WireGuard of Calico and flannel.
const OVERLAYS: [(u16, u16); 7] =
    [(8472, 8472), (4789, 4789), (6081, 6081), (8285, 8285), (4500, 4500), (6783, 6784), (51_820, 51_821)];

/// The rules of a family for pods in `sources` and, if any of its traffic goes inside, for the node with the addresses `own`.
fn rules(settings: &Settings, family: Family, sources: &[IpNet], own: &[IpAddr]) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    let mut add = |number: u32, action: Action, matches: Match| {
        rules.insert(Rule { family, priority: settings.priority + number, matches, action });
    };
    let skip = Action::Skip(settings.priority + END);
    let ask = Action::Table(settings.table);
    let ports: RangeInclusive<u16> = settings.port..=settings.port.saturating_add(3);
    let ports = Some((*ports.start(), *ports.end()));
    add(
        0,
        skip,
        Match { transport: Some(Transport::Udp), source_ports: ports, from_here: true, ..Match::default() },
    );
    if !settings.include_mesh {
        let mesh = Some((settings.mesh_port, settings.mesh_port));
        let tcp = Match { transport: Some(Transport::Tcp), ..Match::default() };
        add(1, skip, Match { destination_ports: mesh, ..tcp.clone() });
        add(1, skip, Match { source_ports: mesh, ..tcp });
    }
    for source in sources {
        add(3, ask, Match { from: Some(*source), ..Match::default() });
    }
    let own: Vec<IpNet> =
        own.iter().filter(|own| Family::of(**own) == family).map(|own| IpNet::from(*own)).collect();
    if !own.is_empty() {
        let here = Match { from_here: true, ..Match::default() };
        for ports in OVERLAYS {
            let (transport, destination_ports) = (Some(Transport::Udp), Some(ports));
            add(4, skip, Match { transport, destination_ports, ..here.clone() });
        }
        let ask = Action::Table(settings.node_table);
        // Other protocols are left alone: they are other tunnels' (GRE, IP in IP, ESP), or say of the network how it is (ICMP).
        for transport in [Some(Transport::Tcp), Some(Transport::Udp)] {
            for own in &own {
                add(5, ask, Match { from: Some(*own), transport, ..here.clone() });
            }
            // The kernel asks without a source address when it is to choose one. IPv4 has "no address" for a source; IPv6
            // rules with a source are not asked then, so all that have one are sent off first.
            let from = (family == Family::V4).then(|| IpNet::from(IpAddr::from(Ipv4Addr::UNSPECIFIED)));
            add(7, ask, Match { from, transport, ..here.clone() });
        }
        if family == Family::V6 {
            for half in [Ipv6Addr::UNSPECIFIED, Ipv6Addr::new(0x8000, 0, 0, 0, 0, 0, 0, 0)] {
                add(6, skip, Match { from: Some(IpNet::new_assert(half.into(), 1)), ..here.clone() });
            }
        }
    }
    add(END, Action::Nothing, Match::default());
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, device: Option<&str>, ranges: &[&str]) -> PeerRoute {
        PeerRoute {
            name: name.to_owned(),
            device: device.map(str::to_owned),
            pod_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            node_addresses: Vec::new(),
            node_device: None,
            usable_mtu: None,
        }
    }

    fn inputs(devices: &[&str], peers: Vec<PeerRoute>) -> Inputs {
        let device = |name: &&str| TunnelDevice { name: (*name).to_owned(), mtu: 1408 };
        Inputs {
            local: LocalNode { pod_ranges: vec!["10.1.0.0/24".parse().unwrap()], node_addresses: Vec::new() },
            devices: devices.iter().map(device).collect(),
            peers,
        }
    }

    #[test]
    fn whose_range_is_cut_by_anothers_is_told_by_name() {
        let peers = vec![
            peer("b", Some("wg"), &["10.2.0.0/16", "10.0.0.0/12"]),
            peer("c", Some("wg"), &["10.2.5.0/24", "10.9.0.0/24", "10.2.6.7/32"]),
            peer("d", Some("wg"), &["10.9.0.0/24", "10.2.5.128/25", "fd00::/64"]),
        ];
        let plan = plan(&Settings::default(), &inputs(&["wg"], peers), &[]);
        let told: Vec<String> = plan.within.iter().map(ToString::to_string).collect();
        let begins = |text: &String, with: &str| assert!(text.starts_with(with), "{text}");
        assert_eq!(told.len(), 4, "{told:?}");
        begins(
            &told[0],
            "range 10.1.0.0/24 of this node lies in 10.0.0.0/12 of node b: packets for it go to this node",
        );
        begins(
            &told[1],
            "range 10.2.5.0/24 of node c lies in 10.2.0.0/16 of node b: packets for it go to node c",
        );
        begins(&told[2], "range 10.2.5.128/25 of node d lies in 10.2.5.0/24 of node c");
        begins(&told[3], "range 10.9.0.0/24 of node c lies in 10.0.0.0/12 of node b");
        let refused: Vec<_> = plan.refused.iter().map(|r| (r.peer.as_str(), r.range.to_string())).collect();
        assert_eq!(refused, [("d", "10.9.0.0/24".to_owned())]);
        assert!(plan.refused[0].reason.starts_with("node c has it already"), "{}", plan.refused[0].reason);
    }

    #[test]
    fn nodes_are_reached_inside_only_by_a_device_that_is_there_and_are_refused_never() {
        let inside = |device: Option<&str>, address: &str| PeerRoute {
            node_addresses: vec![address.parse().unwrap()],
            node_device: device.map(str::to_owned),
            usable_mtu: Some(1300),
            ..peer(address, Some("wg"), &[])
        };
        let with = |peers: Vec<PeerRoute>| {
            let mut inputs = inputs(&["wg"], peers);
            inputs.local.node_addresses = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
            let has = inputs.local.node_addresses.clone();
            (plan(&Settings::default(), &inputs, &has), plan(&Settings::default(), &inputs, &has[1..]))
        };
        let peers = vec![
            inside(Some("wg"), "192.0.2.2"),
            inside(None, "192.0.2.3"),
            inside(Some("gone"), "192.0.2.4"),
            inside(Some("wg"), "192.0.2.2"),
            inside(Some("wg"), "10.1.0.7"),
        ];
        let (made, without_address) = with(peers);
        let tables =
            |plan: &Plan| plan.desired.routes.iter().map(|route| route.table).collect::<BTreeSet<_>>();
        assert_eq!(tables(&without_address), BTreeSet::from([15_871]), "nothing can be sent from it");
        let of_nodes: Vec<&Route> =
            made.desired.routes.iter().filter(|route| route.table == 15_872).collect();
        let (name, source) = ("wg".to_owned(), Some("192.0.2.1".parse().unwrap()));
        let target = Target::Device { name, mtu: 1300, locked: false, advmss: None, source };
        let (destination, metric) = ("192.0.2.2/32".parse().unwrap(), TUNNEL_METRIC);
        assert_eq!(of_nodes, [&Route { table: 15_872, destination, metric, target }]);
        let refused: Vec<_> = made.refused.iter().map(|r| r.range.to_string()).collect();
        assert_eq!(refused, ["192.0.2.2/32", "10.1.0.7/32"], "of two nodes, and of a pod of this one");
        let asking: Vec<_> =
            made.desired.rules.iter().filter(|rule| rule.action == Action::Table(15_872)).collect();
        assert_eq!(asking.len(), 4, "TCP and UDP, with the node's address and without any: {asking:?}");
        assert!(asking.iter().all(|rule| rule.family == Family::V4 && rule.matches.from_here));

        let six = with(vec![inside(Some("wg"), "2001:db8::2")]).0.desired;
        let numbers: BTreeSet<u32> =
            six.rules.iter().filter(|rule| rule.family == Family::V6).map(|rule| rule.priority).collect();
        assert_eq!(numbers.into_iter().collect::<Vec<_>>(), [0, 1, 4, 5, 6, 7, 9].map(|n| 15_870 + n));

        let outside = with(vec![inside(None, "192.0.2.2")]).0.desired;
        assert!(outside.rules.iter().all(|rule| rule.priority <= 15_873 || rule.priority == 15_879));
        assert!(outside.routes.iter().all(|route| route.table == 15_871));
    }

    #[test]
    fn without_a_device_packets_are_refused_and_not_left_to_others() {
        for (devices, device) in [(&[][..], None), (&[][..], Some("wg")), (&["wg"][..], None)] {
            let plan =
                plan(&Settings::default(), &inputs(devices, vec![peer("b", device, &["10.2.0.0/24"])]), &[]);
            let to_peer: Vec<&Route> =
                plan.desired.routes.iter().filter(|route| route.target != Target::Throw).collect();
            let destination = "10.2.0.0/24".parse().unwrap();
            let (table, metric) = (15_871, FALLBACK_METRIC);
            let refusal = Route { table, destination, metric, target: Target::Unreachable };
            assert_eq!(to_peer, [&refusal], "{devices:?}, {device:?}");
            let asks = |rule: &&Rule| matches!(rule.action, Action::Table(_));
            assert_eq!(plan.desired.rules.iter().filter(asks).count(), 1, "this node's pods ask the table");
            assert_eq!(plan.refused.is_empty(), device.is_none(), "a device that should be there is named");
        }
        let open = Settings { without_device: WithoutDevice::Pass, ..Settings::default() };
        let plan = plan(&open, &inputs(&[], vec![peer("b", None, &["10.2.0.0/24"])]), &[]);
        assert!(plan.desired.routes.iter().all(|route| route.target == Target::Throw));
    }
}
