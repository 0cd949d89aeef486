//! One end of our tunnel as a process, so that its CPU time can be told from that of the load.

use std::io::Read;
use std::net::IpAddr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use wireguard::device::user::{QUEUES, Settings, UserDevice, interface, sockets};
use wireguard::device::{OwnKey, PeerKey, PeerNode, PrivateKey, PublicKey, Tunnel};

/// How the device is made.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name of the interface.
    #[arg(long)]
    interface: String,
    /// Its MTU.
    #[arg(long)]
    mtu: u16,
    /// Threads.
    #[arg(long)]
    threads: usize,
    /// UDP port.
    #[arg(long)]
    port: u16,
}

/// What the device reads from standard input, as one line of JSON.
#[derive(Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) private: [u8; 32],
    pub(crate) peer: [u8; 32],
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) allowed: Vec<String>,
}

/// Runs until standard input ends, which it does at the latest with the program that started it.
pub(crate) fn run(args: &Args) -> Result<()> {
    let made = interface(&args.interface, args.mtu, QUEUES, 0)?;
    made.steering.context("the interface's queues cannot be chosen by source")?;
    let udp = sockets(args.port, args.threads, None)?;
    let settings = Settings {
        interface: args.interface.clone(),
        port: args.port,
        mtu: args.mtu.into(),
        datagram_runs: made.datagram_runs,
        ..Settings::default()
    };
    let device = UserDevice::new(made.queues, udp, settings)?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let told: Told =
        serde_json::from_str(&line).context("what came on standard input is no configuration")?;
    let key = PeerKey {
        generation: 0,
        public: PublicKey::from(told.peer),
        addresses: vec![told.address],
        ports: [told.port; 2],
    };
    let allowed_ips = told.allowed.iter().map(|a| a.parse()).collect::<Result<_, _>>()?;
    let peer = PeerNode { name: "peer".to_owned(), keys: vec![key], allowed_ips };
    device.apply(vec![OwnKey { generation: 0, private: PrivateKey::from(told.private) }], vec![peer])?;
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
