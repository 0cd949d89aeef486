//! What a large cluster costs an agent each time that it compares the kernel with what should be there: 1,000 nodes with a
//! range each, and with ten single addresses each, as where a CNI uses no ranges. Prints numbers; asserts only that what is
//! measured was done.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod require;
mod support;

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ipnet::IpNet;
use redirect_bpf::tunnel::{Attach, Pod, RemoteRange};
use support::*;
use wireguard::net::{Inputs, LocalNode, PeerRoute, Router, Settings, TunnelDevice};

const NODES: u32 = 1000;
const MTU: u16 = 1408;

/// What the thread has had of a processor so far. That of others on the machine does not count.
fn on_cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

fn print(what: &str, began: Duration) {
    println!("  {what:<48} {:>9.1} ms of CPU", (on_cpu() - began).as_secs_f64() * 1000.0);
}

/// The addresses of a node's pods: a range, or so many single ones.
fn pods(node: u32, singles: u32) -> Vec<IpNet> {
    let base = u32::from(Ipv4Addr::new(10, 128, 0, 0)) + node * 256;
    match singles {
        0 => vec![IpNet::new(Ipv4Addr::from(base).into(), 24).unwrap()],
        _ => (1..=singles).map(|n| IpNet::from(IpAddr::from(Ipv4Addr::from(base + n)))).collect(),
    }
}

fn inputs(singles: u32) -> Inputs {
    let peer = |node: u32| PeerRoute {
        name: format!("node-{node:04}"),
        device: Some(DEVICE.to_owned()),
        pod_ranges: pods(node, singles),
        node_addresses: vec![Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 91, 16, 0)) + node).into()],
        node_device: None,
        usable_mtu: None,
    };
    Inputs {
        local: LocalNode {
            pod_ranges: vec!["10.92.1.0/24".parse().unwrap()],
            node_addresses: vec!["10.91.1.2".parse().unwrap()],
        },
        devices: vec![TunnelDevice { name: DEVICE.to_owned(), mtu: MTU }],
        peers: (0..NODES).map(peer).collect(),
    }
}

#[test]
#[ignore = "needs root"]
fn one_round_of_an_agent_among_a_thousand_nodes() {
    require_network!();
    let world = World::new(1);
    let node = &world.nodes[0];
    node.netns.ip(&format!("tuntap add dev {DEVICE} mode tun"));
    for singles in [0, 10] {
        let ranges = (NODES * singles.max(1)) as usize;
        println!("{NODES} nodes, {ranges} ranges or addresses of pods:");
        let mut inputs = inputs(singles);
        node.netns.run_async(|| async {
            let began = on_cpu();
            let router = Router::open(Settings::default()).unwrap();
            router.apply(&inputs).await.unwrap();
            print("routes: all of them", began);
            let began = on_cpu();
            assert_eq!(router.apply(&inputs).await.unwrap().changes, 0);
            print("routes: nothing to change", began);
            let began = on_cpu();
            let status = router.status(&inputs).await.unwrap();
            print("routes: status", began);
            assert_eq!((status.routes.len(), status.differences), (ranges, 0));
            println!(
                "  {:<48} {:>9.1} KiB",
                "status, as JSON",
                serde_json::to_vec(&status).unwrap().len() as f64 / 1024.0
            );
            let nodes: Vec<IpAddr> =
                inputs.peers.iter().flat_map(|peer| peer.node_addresses.clone()).collect();
            let began = on_cpu();
            router.devices_towards(&nodes).await.unwrap();
            print("devices towards all nodes", began);
            inputs.peers.pop();
            let began = on_cpu();
            assert_ne!(router.apply(&inputs).await.unwrap().changes, 0);
            print("routes: a node goes", began);
        });

        let mut filter = Filter::new(&world, 0, MTU, Attach::Best);
        filter.policy.remote_ranges = (0..NODES)
            .flat_map(|node| pods(node, singles))
            .map(|range| RemoteRange { range, mtu: Some(MTU) })
            .collect();
        filter.policy.pods = (0..NODES)
            .flat_map(|node| pods(node, 10))
            .enumerate()
            .map(|(n, pod)| Pod {
                name: format!("shop/pod-{n}"),
                addresses: vec![pod.addr()],
                strict: true,
                enrolled: false,
            })
            .collect();
        for what in ["strict mode: all of 10,000 pods that ask for it", "strict mode: nothing to change"] {
            // It runs on a thread of its own.
            let (inner, policy) = (&mut filter.filter, &filter.policy);
            node.netns.run(|| {
                let began = on_cpu();
                inner.apply(policy).unwrap();
                print(what, began);
            });
        }
        let status = filter.status();
        assert!(status.complete && status.pods == 10_000, "{status:?}");
        node.uninstall(&Settings::default());
    }
}
