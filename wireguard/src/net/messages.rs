//! Our rules and routes as netlink messages, and back. What is not ours, or not of a form that we write, comes back as
//! `None`.

use std::{collections::HashMap, net::IpAddr};

use ipnet::IpNet;
use rtnetlink::packet_route::{
    AddressFamily, IpProtocol,
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
        RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};

use super::{
    plan::{Action, Family, Match, Route, Rule, Target, Transport},
    settings::{ROUTE_PROTOCOL, Settings},
};

/// Number of rules that are ours, from the first priority on.
const PRIORITIES: u32 = 10;

/// The bit of RTAX_MTU, which is 2 (linux/rtnetlink.h): it locks a route's MTU.
const LOCK_MTU: u32 = 1 << 2;

/// Names of devices by number, and numbers by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Devices {
    pub(crate) names: HashMap<u32, String>,
}

impl Devices {
    pub(crate) fn number(&self, name: &str) -> Option<u32> {
        self.names.iter().find(|(_, found)| found.as_str() == name).map(|(number, _)| *number)
    }
}

fn family(address_family: AddressFamily) -> Option<Family> {
    match address_family {
        AddressFamily::Inet => Some(Family::V4),
        AddressFamily::Inet6 => Some(Family::V6),
        _ => None,
    }
}

pub(crate) fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// The message for a rule.
pub(crate) fn of_rule(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL)));
    match rule.action {
        Action::Table(table) => {
            message.header.action = RuleAction::ToTable;
            attributes.push(RuleAttribute::Table(table));
        }
        Action::Skip(to) => {
            message.header.action = RuleAction::Goto;
            attributes.push(RuleAttribute::Goto(to));
        }
        Action::Nothing => message.header.action = RuleAction::Nop,
    }
    let matches = &rule.matches;
    if let Some(from) = matches.from {
        message.header.src_len = from.prefix_len();
        attributes.push(RuleAttribute::Source(from.addr()));
    }
    if let Some(to) = matches.to {
        message.header.dst_len = to.prefix_len();
        attributes.push(RuleAttribute::Destination(to.addr()));
    }
    if matches.from_here {
        attributes.push(RuleAttribute::Iifname("lo".to_owned()));
    }
    if let Some(transport) = matches.transport {
        let protocol = match transport {
            Transport::Tcp => IpProtocol::Tcp,
            Transport::Udp => IpProtocol::Udp,
        };
        attributes.push(RuleAttribute::IpProtocol(protocol));
    }
    let range = |(start, end)| RulePortRange { start, end };
    attributes.extend(matches.source_ports.map(range).map(RuleAttribute::SourcePortRange));
    attributes.extend(matches.destination_ports.map(range).map(RuleAttribute::DestinationPortRange));
    message
}

/// The rule of ours that a message tells of.
pub(crate) fn to_rule(settings: &Settings, message: &RuleMessage) -> Option<Rule> {
    let mut rule = Rule {
        family: family(message.header.family)?,
        priority: 0,
        matches: Match::default(),
        action: Action::Nothing,
    };
    let (mut table, mut goto, mut is_ours) = (u32::from(message.header.table), None, false);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Protocol(protocol) => is_ours = *protocol == RouteProtocol::Other(ROUTE_PROTOCOL),
            RuleAttribute::Table(found) => table = *found,
            RuleAttribute::Goto(found) => goto = Some(*found),
            RuleAttribute::Source(from) => rule.matches.from = IpNet::new(*from, message.header.src_len).ok(),
            RuleAttribute::Destination(to) => rule.matches.to = IpNet::new(*to, message.header.dst_len).ok(),
            RuleAttribute::Iifname(name) => rule.matches.from_here = name == "lo",
            RuleAttribute::IpProtocol(IpProtocol::Tcp) => rule.matches.transport = Some(Transport::Tcp),
            RuleAttribute::IpProtocol(IpProtocol::Udp) => rule.matches.transport = Some(Transport::Udp),
            RuleAttribute::SourcePortRange(range) => {
                rule.matches.source_ports = Some((range.start, range.end))
            }
            RuleAttribute::DestinationPortRange(range) => {
                rule.matches.destination_ports = Some((range.start, range.end));
            }
            _ => {}
        }
    }
    let at_our_priority = (settings.priority..settings.priority + PRIORITIES).contains(&rule.priority);
    if !is_ours || !at_our_priority {
        return None;
    }
    rule.action = match (message.header.action, goto) {
        (RuleAction::ToTable, _) => Action::Table(table),
        (RuleAction::Goto, Some(to)) => Action::Skip(to),
        _ => Action::Nothing,
    };
    Some(rule)
}

fn address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

fn to_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// The message for a route; `None` when its device is not there.
pub(crate) fn of_route(devices: &Devices, route: &Route) -> Option<RouteMessage> {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(Family::of_net(&route.destination));
    message.header.destination_prefix_length = route.destination.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_UNSPEC;
    message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    attributes.push(RouteAttribute::Priority(route.metric));
    attributes.push(RouteAttribute::Destination(address(route.destination.addr())));
    match &route.target {
        Target::Device { name, mtu, locked, advmss, source } => {
            message.header.kind = RouteType::Unicast;
            message.header.scope = RouteScope::Link;
            attributes.push(RouteAttribute::Oif(devices.number(name)?));
            let mut metrics = vec![RouteMetric::Mtu((*mtu).into())];
            if *locked {
                metrics.push(RouteMetric::Lock(LOCK_MTU));
            }
            metrics.extend(advmss.map(|segment| RouteMetric::Advmss(segment.into())));
            attributes.push(RouteAttribute::Metrics(metrics));
            attributes.extend(source.map(|source| RouteAttribute::PrefSource(address(source))));
        }
        Target::Throw => message.header.kind = RouteType::Throw,
        Target::Unreachable => message.header.kind = RouteType::Unreachable,
    }
    Some(message)
}

/// The route of ours that a message tells of.
pub(crate) fn to_route(settings: &Settings, devices: &Devices, message: &RouteMessage) -> Option<Route> {
    if message.header.protocol != RouteProtocol::Other(ROUTE_PROTOCOL) {
        return None;
    }
    let unspecified: IpAddr = match family(message.header.address_family)? {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let (mut table, mut metric, mut to) = (u32::from(message.header.table), 0, unspecified);
    let (mut device, mut mtu, mut locked, mut advmss, mut source) = (None, 0, false, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(found) => table = *found,
            RouteAttribute::Priority(found) => metric = *found,
            RouteAttribute::Destination(found) => to = to_address(found)?,
            RouteAttribute::Oif(number) => device = devices.names.get(number).cloned(),
            RouteAttribute::PrefSource(found) => source = to_address(found),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(found) => mtu = u16::try_from(*found).unwrap_or(u16::MAX),
                        RouteMetric::Lock(found) => locked = found & LOCK_MTU != 0,
                        RouteMetric::Advmss(found) => advmss = u16::try_from(*found).ok(),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if table != settings.table && table != settings.node_table {
        return None;
    }
    let target = match message.header.kind {
        RouteType::Unicast => Target::Device { name: device?, mtu, locked, advmss, source },
        RouteType::Throw => Target::Throw,
        RouteType::Unreachable => Target::Unreachable,
        _ => return None,
    };
    let destination = IpNet::new(to, message.header.destination_prefix_length).ok()?;
    Some(Route { table, destination, metric, target })
}
