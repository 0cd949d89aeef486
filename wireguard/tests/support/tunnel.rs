//! The real tunnel between the nodes of a world, in user space.

use std::net::IpAddr;

use ipnet::IpNet;
use wireguard::device::{
    OwnKey, PeerKey, PeerNode, PrivateKey, Tunnel,
    user::{self, QUEUES, UserDevice},
};

use super::{DEVICE, Node, PORT};

/// MTU of the device as it is made; the router sets what a test wants.
const MTU: u16 = 1408;

/// Tunnels on all of the nodes, which know each other by these addresses. The devices go away with them.
pub(crate) fn open(nodes: &[Node], endpoint: impl Fn(&Node) -> IpAddr) -> Vec<UserDevice> {
    let keys: Vec<PrivateKey> = nodes.iter().map(|_| PrivateKey::generate().unwrap()).collect();
    let announced = |node: &Node, key: &PrivateKey| PeerNode {
        name: format!("node-{}", node.number),
        keys: vec![PeerKey {
            generation: 0,
            public: key.public(),
            addresses: vec![endpoint(node)],
            ports: [PORT; 2],
        }],
        allowed_ips: node.ranges().into_iter().chain(node.addresses().into_iter().map(IpNet::from)).collect(),
    };
    let all: Vec<PeerNode> = nodes.iter().zip(&keys).map(|(node, key)| announced(node, key)).collect();
    let start = |(at, key): (usize, PrivateKey)| {
        let device = nodes[at].netns.run(make);
        let others = all.iter().enumerate().filter(|(other, _)| *other != at);
        let others = others.map(|(_, node)| node.clone()).collect();
        let conflicts = device.apply(vec![OwnKey { generation: 0, private: key }], others).unwrap();
        assert_eq!(conflicts, []);
        device
    };
    keys.into_iter().enumerate().map(start).collect()
}

/// In the network namespace of the calling thread.
fn make() -> UserDevice {
    let made = user::interface(DEVICE, MTU, QUEUES, 0).unwrap();
    let sockets = user::sockets(PORT, 2, None).unwrap();
    let settings = user::Settings {
        interface: DEVICE.to_owned(),
        port: PORT,
        mtu: MTU.into(),
        datagram_runs: made.datagram_runs,
        ..user::Settings::default()
    };
    UserDevice::new(made.queues, sockets, settings).unwrap()
}
