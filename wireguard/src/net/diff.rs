//! What to change, in an order that never lets a packet take a way that neither the old nor the new state has.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::plan::{Action, Desired, Route, Rule};

/// What the kernel holds of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) held: Desired,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    AddAddress(String, std::net::IpAddr),
    RemoveAddress(String, std::net::IpAddr),
    /// Adds, or replaces the one with the same destination and metric.
    SetRoute(Route),
    RemoveRoute(Route),
    AddRule(Rule),
    RemoveRule(Rule),
}

/// What tells routes apart.
fn place(route: &Route) -> (u32, IpNet, u32) {
    (route.table, route.destination, route.metric)
}

/// The changes from `observed` to `desired`: first what makes new ways, then what sends packets there, and only then
/// what takes old ways away. A rule that skips comes before the rule that it keeps packets from, and leaves after it.
pub(crate) fn changes(observed: &Observed, desired: &Desired) -> Vec<Change> {
    let held = &observed.held;
    let mut changes = Vec::new();
    let added = desired.addresses.difference(&held.addresses);
    changes.extend(added.map(|(device, address)| Change::AddAddress(device.clone(), *address)));

    let new_routes: Vec<&Route> = desired.routes.difference(&held.routes).collect();
    let replaced: BTreeSet<(u32, IpNet, u32)> = new_routes.iter().map(|route| place(route)).collect();
    changes.extend(new_routes.into_iter().cloned().map(Change::SetRoute));

    let asks = |rule: &&Rule| matches!(rule.action, Action::Table(_));
    let (tables, skips): (Vec<&Rule>, Vec<&Rule>) = desired.rules.difference(&held.rules).partition(asks);
    // The place that skips go to is the last of the plan, so it is added first.
    changes.extend(skips.into_iter().rev().chain(tables).cloned().map(Change::AddRule));
    let (tables, skips): (Vec<&Rule>, Vec<&Rule>) = held.rules.difference(&desired.rules).partition(asks);
    changes.extend(tables.into_iter().chain(skips).cloned().map(Change::RemoveRule));

    let old_routes = held.routes.difference(&desired.routes);
    let gone = old_routes.filter(|route| !replaced.contains(&place(route)));
    changes.extend(gone.cloned().map(Change::RemoveRoute));
    let removed = held.addresses.difference(&desired.addresses);
    changes.extend(removed.map(|(device, address)| Change::RemoveAddress(device.clone(), *address)));
    changes
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::net::{
        plan::{Inputs, LocalNode, PeerRoute, TunnelDevice, plan},
        settings::{Settings, WithoutDevice},
    };

    /// What the kernel does with a change.
    fn make(held: &mut Desired, change: &Change) {
        match change.clone() {
            Change::AddAddress(device, address) => assert!(held.addresses.insert((device, address))),
            Change::RemoveAddress(device, address) => assert!(held.addresses.remove(&(device, address))),
            Change::SetRoute(route) => {
                held.routes.retain(|other| place(other) != place(&route));
                held.routes.insert(route);
            }
            Change::RemoveRoute(route) => assert!(held.routes.remove(&route), "{route:?} is not there"),
            Change::AddRule(rule) => assert!(held.rules.insert(rule)),
            Change::RemoveRule(rule) => assert!(held.rules.remove(&rule), "{rule:?} is not there"),
        }
    }

    fn inputs() -> impl Strategy<Value = (Settings, Inputs)> {
        let peer = (0_u8..6, 0_u8..6, any::<bool>(), proptest::option::of(1000_u16..1500));
        let local = (0_u8..6, any::<bool>());
        (vec(peer, 0..6), local, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            |(peers, (own, has_v6), include_mesh, is_inside, is_open)| {
                let ranges = |n: u8, has_v6: bool| {
                    let mut ranges = vec![format!("10.92.{n}.0/24").parse().unwrap()];
                    if has_v6 {
                        ranges.push(format!("fd92:0:0:{n}::/64").parse().unwrap());
                    }
                    ranges
                };
                let nodes = |n: u8| {
                    vec![format!("10.91.0.{n}").parse().unwrap(), format!("fd91::{n}").parse().unwrap()]
                };
                let settings = Settings {
                    include_mesh,
                    without_device: if is_open { WithoutDevice::Pass } else { WithoutDevice::Refuse },
                    ..Settings::default()
                };
                let device = |n: u8| format!("sockmesh_wg{}", n % 2);
                let inputs = Inputs {
                    local: LocalNode { pod_ranges: ranges(own, has_v6), node_addresses: nodes(own) },
                    devices: (0..2).map(|n| TunnelDevice { name: device(n), mtu: 1408 }).collect(),
                    peers: peers
                        .into_iter()
                        .map(|(n, dev, has_v6, usable_mtu)| PeerRoute {
                            name: format!("node-{n}"),
                            device: (dev < 5).then(|| device(dev)),
                            pod_ranges: ranges(n, has_v6),
                            node_addresses: nodes(n),
                            node_device: (dev < 4 && is_inside).then(|| device(dev)),
                            usable_mtu,
                        })
                        .collect(),
                };
                (settings, inputs)
            },
        )
    }

    proptest! {
        #[test]
        fn any_state_becomes_any_other_and_then_nothing_is_left_to_change(
            (first, from) in inputs(),
            (second, to) in inputs(),
            own: [bool; 2],
        ) {
            let addresses = |is_there: bool| -> Vec<std::net::IpAddr> {
                let nodes = ["10.91.0.0", "10.91.0.1", "10.91.0.2", "fd91::0", "fd91::1", "fd91::2"];
                let address = is_there.then_some("10.92.1.1");
                address.into_iter().chain(nodes).map(|address| address.parse().unwrap()).collect()
            };
            let from = plan(&first, &from, &addresses(own[0])).desired;
            let to = plan(&second, &to, &addresses(own[1])).desired;
            let mut held = from.clone();
            for change in changes(&Observed { held: from }, &to) {
                make(&mut held, &change);
            }
            prop_assert_eq!(&held, &to);
            prop_assert_eq!(changes(&Observed { held }, &to), vec![]);
        }

        #[test]
        fn no_rule_asks_our_table_before_all_that_skip_it_are_there((settings, inputs) in inputs()) {
            let to = plan(&settings, &inputs, &inputs.local.node_addresses).desired;
            let asks = |rule: &Rule| matches!(rule.action, Action::Table(_));
            let skips: Vec<&Rule> = to.rules.iter().filter(|rule| !asks(rule)).collect();
            let mut held = Desired::default();
            // Made, and taken away again.
            let back = changes(&Observed { held: to.clone() }, &Desired::default());
            for change in changes(&Observed::default(), &to).into_iter().chain(back) {
                make(&mut held, &change);
                if held.rules.iter().any(asks) {
                    prop_assert!(skips.iter().all(|skip| held.rules.contains(skip)), "{change:?}");
                    prop_assert!(to.routes.iter().all(|route| held.routes.contains(route)), "{change:?}");
                }
            }
            prop_assert_eq!(held, Desired::default());
        }

        #[test]
        fn a_route_never_leads_a_local_address_into_the_tunnel((settings, inputs) in inputs()) {
            let desired = plan(&settings, &inputs, &inputs.local.node_addresses).desired;
            for local in &inputs.local.pod_ranges {
                let address = local.hosts().nth(5).unwrap();
                let best = desired
                    .routes
                    .iter()
                    .filter(|route| route.table == settings.table && route.destination.contains(&address))
                    .max_by_key(|route| (route.destination.prefix_len(), std::cmp::Reverse(route.metric)));
                prop_assert_eq!(&best.unwrap().target, &crate::net::plan::Target::Throw);
            }
        }
    }
}
