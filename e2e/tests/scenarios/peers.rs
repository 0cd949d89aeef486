//! What applications see of each other.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, talk};
use testbed::{Capture, ServiceSpec};

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
                    ensure!(
                        served[name] == client.to_string(),
                        "{}, called by {client} at {address}, sees {served}",
                        server.name()
                    );
                }
            }
        }
        Ok(())
    })
}

pub(crate) fn every_kind_of_tcp_socket_is_captured() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _echo = talk::serve(&stage.far, "echo", 7000)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for kind in ["blocking", "nonblocking", "fastopen", "mapped"] {
            for address in [IpAddr::from(stage.far.v4()), stage.far.v6().into()] {
                if kind == "mapped" && address.is_ipv6() {
                    continue;
                }
                let seen = talk::ask(&stage.client, kind, address, 7000)?;
                ensure!(seen["answer"] == "ping", "{kind} to {address}: {seen}");
                let shown = if kind == "mapped" { format!("::ffff:{address}") } else { address.to_string() };
                ensure!(seen["peer"] == shown, "{kind} to {address}: {seen}");
            }
        }
        let seen = capture.finish()?;
        ensure!(seen.bytes_off_port(15008) == 0 && seen.bytes_on_port(15008) > 0, "TCP went past the tunnel");
        Ok(())
    })
}

pub(crate) fn an_mptcp_socket_is_captured() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _echo = [talk::serve(&stage.near, "echo", 7000)?, talk::serve(&stage.far, "echo", 7000)?];
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for (_, to) in stage.targets() {
            let seen = talk::ask(&stage.client, "mptcp", to, 7000)?;
            // socket(2): not built in (CONFIG_MPTCP), or turned off (net.mptcp.enabled).
            if seen["call"] == "socket" {
                stage.skip(format!("this kernel gives no MPTCP: {seen}"));
                return Ok(());
            }
            // It is captured like any other, but `getpeername` shows it the proxy's listener.
            ensure!(seen["answer"] == "ping", "{to}: {seen}");
        }
        let seen = capture.finish()?;
        ensure!(seen.bytes_off_port(15008) == 0 && seen.bytes_on_port(15008) > 0, "TCP went past the tunnel");
        Ok(())
    })
}

pub(crate) fn a_connect_through_io_uring_is_captured() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _echo = [talk::serve(&stage.near, "echo", 7000)?, talk::serve(&stage.far, "echo", 7000)?];
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for (_, to) in stage.targets() {
            let seen = talk::ask(&stage.client, "io_uring", to, 7000)?;
            // Not built in, or forbidden (kernel.io_uring_disabled). A connect that fails is the mesh's doing, though.
            if seen["call"] == "io_uring_setup" {
                stage.skip(format!("this kernel gives no io_uring: {seen}"));
                return Ok(());
            }
            ensure!(seen["answer"] == "ping" && seen["peer"] == to.to_string(), "{to}: {seen}");
        }
        let seen = capture.finish()?;
        ensure!(seen.bytes_off_port(15008) == 0 && seen.bytes_on_port(15008) > 0, "TCP went past the tunnel");
        Ok(())
    })
}

pub(crate) fn a_pod_reaches_itself_as_without_a_mesh() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        let _echo = talk::serve(&stage.client, "echo", 7000)?;
        let own = [IpAddr::from(stage.client.v4()), stage.client.v6().into()];
        let local = ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::"].map(str::parse::<IpAddr>);
        for address in own.into_iter().map(Ok).chain(local) {
            let address = address?;
            let seen = talk::ask(&stage.client, "blocking", address, 7000)?;
            ensure!(seen["answer"] == "ping", "{address}: {seen}");
        }
        Ok(())
    })
}
