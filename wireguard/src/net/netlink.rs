//! Talking with the kernel: reads what is ours, applies one change at a time.

use std::{collections::BTreeSet, io, net::IpAddr, sync::Arc, time::Duration};

use futures_util::StreamExt;
use nix::libc;
use rtnetlink::{
    Handle,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    },
    packet_route::{
        AddressFamily, IpProtocol, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
        link::{
            AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, LinkAttribute, LinkFlags,
            LinkMessage,
        },
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage},
        rule::RuleMessage,
    },
};
use tokio::{sync::Mutex, task::JoinHandle};

use super::{
    answers::{Answers, Conclusion, Fault},
    diff::{Change, Observed},
    error::Error,
    messages::{self, Devices},
    plan::{Desired, Family, Rule},
    settings::Settings,
};
use crate::reverse_path;

/// The kernel answers in milliseconds; what it could not queue for us never comes.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a list is asked for that changes while it is read.
const MOST_LISTS: u32 = 10;

/// A device of this namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) name: String,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
    /// Its manners; none where the kernel has no IPv4.
    pub(crate) rp_filter: Option<i32>,
    /// How it comes by link-local addresses; none where the kernel has no IPv6.
    pub(crate) addr_gen_mode: Option<In6AddrGenMode>,
}

impl Link {
    /// What has to be said to the kernel so that the device takes what the tunnel brings and adds nothing of its own. Over
    /// netlink, since `/proc/sys` can only be read in a container that is not privileged.
    fn missing_manners(&self) -> Vec<AfSpecUnspec> {
        let mut missing = Vec::new();
        let rp_filter = reverse_path::mode();
        if self.rp_filter.is_some_and(|mode| mode != rp_filter) {
            let mut wanted = InetDevConf::default();
            wanted.rp_filter = rp_filter;
            missing.push(AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(wanted)]));
        }
        // No link-local address: nothing on the other side could answer to it.
        if self.addr_gen_mode.is_some_and(|mode| mode != In6AddrGenMode::None) {
            missing.push(AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]));
        }
        missing
    }

    pub(crate) fn read(message: &LinkMessage) -> Self {
        let up = message.header.flags.contains(LinkFlags::Up);
        let mut link = Self { name: String::new(), mtu: 0, up, rp_filter: None, addr_gen_mode: None };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(found) => link.name.clone_from(found),
                LinkAttribute::Mtu(found) => link.mtu = *found,
                LinkAttribute::AfSpecUnspec(families) => families.iter().for_each(|f| link.read_family(f)),
                _ => {}
            }
        }
        link
    }

    fn read_family(&mut self, family: &AfSpecUnspec) {
        match family {
            AfSpecUnspec::Inet(all) => {
                self.rp_filter = all.iter().find_map(|one| match one {
                    AfSpecInet::DevConf(settings) => Some(settings.rp_filter),
                    _ => None,
                });
            }
            AfSpecUnspec::Inet6(all) => {
                self.addr_gen_mode = all.iter().find_map(|one| match one {
                    AfSpecInet6::AddrGenMode(mode) => Some(*mode),
                    _ => None,
                });
            }
            _ => {}
        }
    }
}

/// Everything that was read at one moment.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) observed: Observed,
    pub(crate) devices: Devices,
    pub(crate) links: Vec<Link>,
    /// Addresses of all devices but the tunnel's.
    pub(crate) addresses: Vec<IpAddr>,
}

/// A connection to the kernel, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
    /// Whose question is being answered.
    turn: Arc<Mutex<()>>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    /// Has to be called within a tokio runtime.
    pub(crate) fn open() -> Result<Self, Error> {
        let (mut connection, handle, _) = rtnetlink::new_connection().map_err(Error::Open)?;
        // Without these a connection that breaks looks like a list that ends.
        connection.set_forward_done(true);
        connection.set_forward_ack(true);
        Ok(Self { handle, connection: tokio::spawn(connection), turn: Arc::default() })
    }

    async fn request(
        &self,
        what: impl FnOnce() -> String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let handle = self.handle.clone();
        // In a task of its own, to the end: who asks may be gone before, and the kernel refuses a list within another.
        let asked = tokio::spawn(async move {
            let asked = tokio::time::timeout(PATIENCE, ask(handle, message, flags)).await;
            drop(turn);
            asked.unwrap_or(Ok(Err(Fault::Cut)))
        });
        let fault = match asked.await.unwrap_or(Ok(Err(Fault::Cut))) {
            Ok(Ok(answers)) => return Ok(answers),
            Ok(Err(fault)) => fault,
            Err(source) => return Err(Error::Netlink { what: what(), source: Box::new(source) }),
        };
        Err(match fault {
            Fault::Kernel(source) => Error::refused(what(), source),
            Fault::Interrupted => Error::Incomplete {
                what: what(),
                why: "what is listed kept changing while it was read; it is read again at the next round",
            },
            Fault::Cut => Error::Incomplete { what: what(), why: "the kernel did not answer to the end" },
        })
    }

    async fn dump(
        &self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        self.request(|| format!("list {what}"), message, NLM_F_DUMP).await
    }

    /// Reads what is ours. `tunnel` tells the tunnel's devices by name.
    pub(crate) async fn read(
        &self,
        settings: &Settings,
        tunnel: impl Fn(&str) -> bool,
    ) -> Result<Snapshot, Error> {
        let mut snapshot = Snapshot::default();
        for message in self.dump("devices", RouteNetlinkMessage::GetLink(LinkMessage::default())).await? {
            if let RouteNetlinkMessage::NewLink(link) = message {
                let number = link.header.index;
                let link = Link::read(&link);
                snapshot.devices.names.insert(number, link.name.clone());
                snapshot.links.push(link);
            }
        }
        for message in
            self.dump("addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default())).await?
        {
            if let RouteNetlinkMessage::NewAddress(message) = message {
                snapshot.add_address(&message, &tunnel);
            }
        }
        let held = &mut snapshot.observed.held;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut rules = RuleMessage::default();
            rules.header.family = family;
            for message in self.dump("rules", RouteNetlinkMessage::GetRule(rules)).await? {
                if let RouteNetlinkMessage::NewRule(rule) = message {
                    held.rules.extend(messages::to_rule(settings, &rule));
                }
            }
            let mut routes = RouteMessage::default();
            routes.header.address_family = family;
            routes.header.table = RouteHeader::RT_TABLE_UNSPEC;
            for message in self.dump("routes", RouteNetlinkMessage::GetRoute(routes)).await? {
                if let RouteNetlinkMessage::NewRoute(route) = message {
                    held.routes.extend(messages::to_route(settings, &snapshot.devices, &route));
                }
            }
        }
        Ok(snapshot)
    }

    /// Numbers of the devices by which the tunnel's own datagrams to an address leave the node now, those from `port`; none
    /// without a route. Others may go through the tunnel.
    pub(crate) async fn devices_to(&self, address: IpAddr, port: u16) -> Result<Vec<u32>, Error> {
        let mut question = RouteMessage::default();
        let (family, destination, length) = match address {
            IpAddr::V4(v4) => (AddressFamily::Inet, RouteAddress::Inet(v4), 32),
            IpAddr::V6(v6) => (AddressFamily::Inet6, RouteAddress::Inet6(v6), 128),
        };
        question.header.address_family = family;
        question.header.destination_prefix_length = length;
        question.attributes.push(RouteAttribute::Destination(destination));
        question.attributes.push(RouteAttribute::IpProto(IpProtocol::Udp.into()));
        question.attributes.push(RouteAttribute::Sport(port));
        let what = || format!("ask for the route to {address}");
        let answers = match self.request(what, RouteNetlinkMessage::GetRoute(question), 0).await {
            Err(error) if error.is_unreachable() => return Ok(Vec::new()),
            answers => answers?,
        };
        let mut devices = Vec::new();
        for answer in answers {
            if let RouteNetlinkMessage::NewRoute(route) = answer {
                devices.extend(route.attributes.iter().filter_map(|attribute| match attribute {
                    RouteAttribute::Oif(number) => Some(*number),
                    _ => None,
                }));
            }
        }
        Ok(devices)
    }

    pub(crate) async fn apply(&self, devices: &Devices, change: &Change) -> Result<(), Error> {
        let create = NLM_F_ACK | NLM_F_CREATE;
        let (what, message, flags, fine) = match change {
            Change::AddAddress(device, address) => (
                format!("give device {device} the address {address}"),
                RouteNetlinkMessage::NewAddress(of_address(devices, device, *address)?),
                create | NLM_F_REPLACE,
                libc::EEXIST,
            ),
            Change::RemoveAddress(device, address) => (
                format!("take the address {address} from device {device}"),
                RouteNetlinkMessage::DelAddress(of_address(devices, device, *address)?),
                NLM_F_ACK,
                libc::EADDRNOTAVAIL,
            ),
            Change::SetRoute(route) => (
                format!("set the route {} of table {}", route.destination, route.table),
                RouteNetlinkMessage::NewRoute(route_message(devices, route)?),
                create | NLM_F_REPLACE,
                0,
            ),
            Change::RemoveRoute(route) => (
                format!("remove the route {} of table {}", route.destination, route.table),
                RouteNetlinkMessage::DelRoute(route_message(devices, route)?),
                NLM_F_ACK,
                libc::ESRCH,
            ),
            Change::AddRule(rule) => (
                format!("add {}", describe(rule)),
                RouteNetlinkMessage::NewRule(messages::of_rule(rule)),
                create | NLM_F_EXCL,
                libc::EEXIST,
            ),
            Change::RemoveRule(rule) => (
                format!("remove {}", describe(rule)),
                RouteNetlinkMessage::DelRule(messages::of_rule(rule)),
                NLM_F_ACK,
                libc::ENOENT,
            ),
        };
        match self.request(|| what, message, flags).await {
            // Somebody else was faster, or the kernel removed it with the device.
            Err(error) if fine != 0 && error.kernel().and_then(io::Error::raw_os_error) == Some(fine) => {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Gives a device the manners of a tunnel's; whether it lacked any. Before it is up, or it has an address by then.
    pub(crate) async fn set_manners(&self, devices: &Devices, link: &Link) -> Result<bool, Error> {
        let missing = link.missing_manners();
        if missing.is_empty() {
            return Ok(false);
        }
        let name = &link.name;
        let mut message = LinkMessage::default();
        message.header.index = devices.number(name).ok_or_else(|| Error::NoDevice(name.clone()))?;
        message.attributes.push(LinkAttribute::AfSpecUnspec(missing));
        let what = || format!("set rp_filter and addr_gen_mode of device {name}");
        self.request(what, RouteNetlinkMessage::SetLink(message), NLM_F_ACK).await?;
        Ok(true)
    }

    /// Sets a device's MTU and brings it up.
    pub(crate) async fn set_device(&self, devices: &Devices, name: &str, mtu: u16) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = devices.number(name).ok_or_else(|| Error::NoDevice(name.to_owned()))?;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes.push(LinkAttribute::Mtu(mtu.into()));
        let what = || format!("bring device {name} up with an MTU of {mtu}");
        self.request(what, RouteNetlinkMessage::SetLink(message), NLM_F_ACK).await.map(drop)
    }
}

impl Snapshot {
    fn add_address(&mut self, message: &AddressMessage, tunnel: &impl Fn(&str) -> bool) {
        let local = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        // IPv6 has no local address beside the address, unless there is a peer.
        let address = local.or_else(|| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            })
        });
        let Some((address, name)) = address.zip(self.devices.names.get(&message.header.index)) else {
            return;
        };
        if message.header.scope == AddressScope::Link {
            return;
        }
        if tunnel(name) {
            self.observed.held.addresses.insert((name.clone(), address));
        } else {
            self.addresses.push(address);
        }
    }

    pub(crate) fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }
}

/// Asks, and asks again for a list that changed while it was read.
async fn ask(
    handle: Handle,
    message: RouteNetlinkMessage,
    flags: u16,
) -> Result<Result<Vec<RouteNetlinkMessage>, Fault>, rtnetlink::Error> {
    let expected = match flags {
        flags if flags & NLM_F_DUMP == NLM_F_DUMP => Conclusion::List,
        flags if flags & NLM_F_ACK != 0 => Conclusion::Acknowledgement,
        _ => Conclusion::Answer,
    };
    let mut asked = 0;
    loop {
        asked += 1;
        let mut request = NetlinkMessage::from(message.clone());
        request.header.flags = NLM_F_REQUEST | flags;
        let mut stream = handle.clone().request(request)?;
        let mut answers = Answers::new(expected);
        let mut fault = None;
        // To the end, also of what is of no use any more: the next list must not begin within this one.
        while let Some(answer) = stream.next().await {
            fault = fault.or(answers.take(answer).err());
        }
        match fault.map_or_else(|| answers.finish(), Err) {
            Err(Fault::Interrupted) if asked < MOST_LISTS => {}
            answers => return Ok(answers),
        }
    }
}

/// What nothing is left of when all that is ours is gone.
pub(crate) fn nothing() -> Desired {
    Desired { rules: BTreeSet::new(), routes: BTreeSet::new(), addresses: BTreeSet::new() }
}

fn route_message(devices: &Devices, route: &super::plan::Route) -> Result<RouteMessage, Error> {
    messages::of_route(devices, route).ok_or_else(|| match &route.target {
        super::plan::Target::Device { name, .. } => Error::NoDevice(name.clone()),
        _ => Error::NoDevice(String::new()),
    })
}

fn of_address(devices: &Devices, device: &str, address: IpAddr) -> Result<AddressMessage, Error> {
    let mut message = AddressMessage::default();
    message.header.family = messages::address_family(Family::of(address));
    message.header.prefix_len = if address.is_ipv4() { 32 } else { 128 };
    message.header.index = devices.number(device).ok_or_else(|| Error::NoDevice(device.to_owned()))?;
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    // Nobody else on this device could have the address, and there is nothing around it to reach.
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
    Ok(message)
}

fn describe(rule: &Rule) -> String {
    let family = match rule.family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    format!("the {family} rule at priority {}", rule.priority)
}
