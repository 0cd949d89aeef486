//! What applications see of each other.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, talk};
use testbed::ServiceSpec;

pub(crate) fn client_and_server_see_each_others_true_addresses() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let service = ServiceSpec::new("shop", "echo").selector("app", "far").port("tcp-echo", 70, 7000);
        let vips = stage.mesh.service(service)?;
        stage.mesh.settle()?;
        for server in [&stage.near, &stage.far] {
            let echo = talk::serve(server, "echo", 7000)?;
            let mut targets: Vec<(IpAddr, u16)> =
                vec![(server.v4().into(), 7000), (server.v6().into(), 7000)];
            if server.name() == "far" {
                targets.extend(vips.iter().map(|vip| (*vip, 70)));
            }
            for (n, (address, port)) in targets.into_iter().enumerate() {
                let seen = talk::call(&stage.client, "look", address, port)?;
                ensure!(seen["answer"] == "ping", "{address}: {seen}");
                ensure!(
                    seen["peer"] == address.to_string() && seen["peer_port"] == port,
                    "{address}: {seen}"
                );
                let served = echo.line_with("accepted", n + 1)?;
                let client: IpAddr =
                    if address.is_ipv4() { stage.client.v4().into() } else { stage.client.v6().into() };
                for name in ["accepted", "peer"] {
                    ensure!(served[name] == client.to_string(), "{} sees {served}", server.name());
                }
            }
        }
        Ok(())
    })
}
