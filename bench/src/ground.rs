//! Where all variants run: two nodes, a client and servers inside and outside the mesh, the pair of Envoys.
//!
//! Every variant uses pods of its own with the same wires: the mesh's pods are enrolled, those of "direct" and of Envoy
//! are not. The mesh and both Envoys run all the time and are idle while another variant is measured.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use bench::control::{PORTS, Work};
use serde_json::json;
use testbed::{Mesh, Pod, PodSpec, Process, ServiceSpec, control};

use crate::envoy::{Pair, Route};
use crate::rows::{Contender, Variant};
use bench::kernel::most_open_files;

const START_LIMIT: Duration = Duration::from_secs(30);

/// What a ground shall have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup<'a> {
    pub(crate) contenders: &'a [Contender],
    /// The Envoy binary.
    pub(crate) envoy: Option<&'a Path>,
    /// The sockmesh-node binary.
    pub(crate) node: &'a Path,
    /// Pods enrolled on the first node, at least two.
    pub(crate) pods: usize,
    /// TCP congestion control in all pods.
    pub(crate) congestion: &'a str,
    /// `node.acceleration` of the mesh's nodes.
    pub(crate) acceleration: &'a str,
}

/// The ground and all that runs on it. Dropping it removes everything.
#[derive(Debug)]
pub(crate) struct Ground {
    // Processes go before the mesh whose namespaces they are in.
    envoy: Option<Pair>,
    servers: Vec<(Pod, Process)>,
    outside: (Pod, Pod),
    inside: Option<Inside>,
    mesh: Mesh,
}

/// The enrolled pods.
#[derive(Debug)]
struct Inside {
    client: Pod,
    far: IpAddr,
    near: IpAddr,
    far_pod: Pod,
    near_pod: Pod,
}

impl Ground {
    /// Builds what the contenders need.
    pub(crate) fn build(setup: &Setup<'_>) -> Result<Self> {
        let Setup { contenders, envoy, node, pods, .. } = *setup;
        let mesh = Mesh::builder().nodes(2).build()?;
        mesh.agent_program(node);
        mesh.namespace("plain", &[], &[])?;
        let client = mesh.pod(PodSpec::new("plain", "plain-client").node(1).service_account("client"))?;
        let server = mesh.pod(PodSpec::new("plain", "plain-server").node(2).service_account("server"))?;
        let with_mesh = contenders.iter().any(|c| matches!(c, Contender::Mesh | Contender::SameNode));
        let mut ground =
            Self { envoy: None, servers: Vec::new(), outside: (client, server), inside: None, mesh };
        ground.prepare(&ground.outside.0, setup.congestion)?;
        ground.prepare(&ground.outside.1, setup.congestion)?;
        if with_mesh {
            ground.mesh.node_setting("/node/acceleration", json!(setup.acceleration))?;
            ground.inside = Some(Inside::build(&ground.mesh, pods)?);
        }
        let pods: Vec<Pod> = ground
            .inside
            .iter()
            .flat_map(|i| [i.far_pod.clone(), i.near_pod.clone(), i.client.clone()])
            .collect();
        for pod in &pods {
            ground.prepare(pod, setup.congestion)?;
        }
        for pod in pods.into_iter().take(2).chain([ground.outside.1.clone()]) {
            let mut process =
                pod.launch(control::binary("bench-serve")?).open_files(most_open_files()?).spawn()?;
            process.wait_for_port(PORTS.echo, START_LIMIT)?;
            ground.servers.push((pod, process));
        }
        if let Some(binary) = envoy.filter(|_| contenders.contains(&Contender::Envoy)) {
            ground.envoy = Some(Pair::start(binary, &ground.outside.0, &ground.outside.1)?);
        }
        Ok(ground)
    }

    /// The pod's own kernel settings. Ports for a connection per request: a wide range, and those that wait for stray
    /// packets may be taken again. And TCP's congestion control, which is the same for all variants.
    fn prepare(&self, pod: &Pod, congestion: &str) -> Result<()> {
        let script = "cd /proc/sys/net/ipv4 && echo 16000 65000 > ip_local_port_range &&
                      echo 1 > tcp_tw_reuse && echo $0 > tcp_congestion_control";
        let done = pod.launch("sh").args(["-c", script, congestion]).output()?.ok();
        done.map(drop).with_context(|| format!("cannot prepare the network of {}", pod.name()))
    }

    /// The pod in which a variant's load runs.
    pub(crate) fn client(&self, variant: Variant) -> Result<&Pod> {
        match variant.contender() {
            Contender::Mesh | Contender::SameNode => Ok(&self.inside()?.client),
            Contender::Direct | Contender::Envoy => Ok(&self.outside.0),
        }
    }

    /// The address to which a variant's load connects.
    pub(crate) fn target(&self, variant: Variant, work: Work) -> Result<SocketAddr> {
        let port = match work {
            Work::Http1 | Work::Http1Download | Work::Http1Upload | Work::Http1Fresh | Work::IdleHttp => {
                PORTS.http1
            }
            Work::Http2 => PORTS.http2,
            Work::Grpc => PORTS.grpc,
            Work::TcpBulk => PORTS.source,
            Work::IdleTcp => PORTS.echo,
        };
        let address = match variant {
            Variant::Direct => (self.outside.1.v4().into(), port),
            Variant::Mesh => (self.inside()?.far, port),
            Variant::SameNode => (self.inside()?.near, port),
            Variant::EnvoyHttp1 | Variant::EnvoyHttp2 | Variant::EnvoyTcp => {
                let route = match (work, variant) {
                    (Work::TcpBulk, _) => Route::Source,
                    (Work::IdleTcp, _) => Route::Echo,
                    (Work::Http2 | Work::Grpc, _) => Route::Http2,
                    (_, Variant::EnvoyHttp2) => Route::Http1OverHttp2,
                    _ => Route::Http1OverHttp1,
                };
                (Ipv4Addr::LOCALHOST.into(), route.client_port())
            }
        };
        Ok(address.into())
    }

    /// The proxies that a variant's traffic goes through: those at the client, those at the server.
    pub(crate) fn proxies(&self, variant: Variant) -> Result<(Vec<i32>, Vec<i32>)> {
        Ok(match variant.contender() {
            Contender::Direct => (Vec::new(), Vec::new()),
            Contender::Mesh => (self.mesh.node(1).mesh_pids()?, self.mesh.node(2).mesh_pids()?),
            Contender::SameNode => (self.mesh.node(1).mesh_pids()?, Vec::new()),
            Contender::Envoy => {
                let pair = self.envoy.as_ref().context("the pair of Envoys does not run")?;
                (vec![pair.client.pid()], vec![pair.server.pid()])
            }
        })
    }

    /// The application that answers a variant.
    pub(crate) fn server(&self, variant: Variant) -> Result<i32> {
        let pod = match variant {
            Variant::Mesh => &self.inside()?.far_pod,
            Variant::SameNode => &self.inside()?.near_pod,
            _ => &self.outside.1,
        };
        let found = self.servers.iter().find(|(p, _)| p.uid() == pod.uid());
        found.map(|(_, process)| process.pid()).with_context(|| format!("no server in {}", pod.name()))
    }

    /// Where sockets may be put.
    pub(crate) fn dir(&self) -> PathBuf {
        self.mesh.dir().to_owned()
    }

    fn inside(&self) -> Result<&Inside> {
        self.inside.as_ref().context("the mesh does not run")
    }
}

impl Inside {
    fn build(mesh: &Mesh, pods: usize) -> Result<Self> {
        mesh.meshed_namespace("bench")?;
        let pod = |name: &str, node: u8, account: &str| {
            mesh.pod(PodSpec::new("bench", name).node(node).service_account(account).label("app", name))
        };
        let client = pod("client", 1, "client")?;
        let far_pod = pod("server", 2, "server")?;
        let near_pod = pod("near", 1, "server")?;
        let service = |name: &str| {
            let spec = ServiceSpec::new("bench", name)
                .selector("app", name)
                .port("http-small", PORTS.http1, PORTS.http1)
                .port("http2-small", PORTS.http2, PORTS.http2)
                .port("grpc-echo", PORTS.grpc, PORTS.grpc)
                .port("tcp-source", PORTS.source, PORTS.source)
                .port("tcp-echo", PORTS.echo, PORTS.echo);
            let addresses = mesh.service(spec)?;
            addresses.first().copied().with_context(|| format!("the service {name} has no address"))
        };
        let (far, near) = (service("server")?, service("near")?);
        let mut all = vec![client.clone(), far_pod.clone(), near_pod.clone()];
        for n in 2..pods {
            all.push(pod(&format!("more{n}"), 1, "more")?);
        }
        mesh.node_setting("/worker/threads", json!(1))?;
        mesh.start()?;
        for pod in &all {
            mesh.enrol(pod)?;
        }
        Ok(Self { client, far, near, far_pod, near_pod })
    }
}
