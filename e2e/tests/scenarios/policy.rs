//! Who may talk to whom.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, talk};

pub(crate) fn a_strict_pod_refuses_a_stranger_and_a_permissive_one_serves_it() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_refusal("PLAIN");
        for server in [&stage.near, &stage.far] {
            let echo = talk::serve(server, "echo", 7000)?;
            for address in [IpAddr::from(server.v4()), server.v6().into()] {
                let seen = talk::call(&stage.stranger, "look", address, 7000)?;
                ensure!(seen["error"] == "ConnectionResetError", "strict {address} to a stranger: {seen}");
            }
            ensure!(echo.lines()?.is_empty(), "the application heard of the stranger: {:?}", echo.lines()?);
        }
        let annotations = [("sockmesh.io/mtls", "permissive")];
        stage.mesh.namespace("shop", &[("sockmesh.io/mesh", "enabled")], &annotations)?;
        stage.mesh.settle()?;
        for server in [&stage.near, &stage.far] {
            let echo = talk::serve(server, "echo", 7001)?;
            for (n, address) in [IpAddr::from(server.v4()), server.v6().into()].into_iter().enumerate() {
                let seen = talk::call(&stage.stranger, "look", address, 7001)?;
                ensure!(seen["answer"] == "ping", "permissive {address} to a stranger: {seen}");
                let own: IpAddr =
                    if address.is_ipv4() { stage.stranger.v4().into() } else { stage.stranger.v6().into() };
                let served = echo.line_with("accepted", n + 1)?;
                ensure!(served["accepted"] == own.to_string(), "{served}");
            }
            let seen = talk::call(&stage.client, "look", server.v4(), 7001)?;
            ensure!(seen["answer"] == "ping", "a permissive pod to one of the mesh: {seen}");
        }
        Ok(())
    })
}
