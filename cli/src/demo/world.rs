//! Who is in the demo: a client, three web servers on both nodes, a database that speaks first.

use std::net::IpAddr;

use anyhow::{Context, Result, anyhow};
use testbed::control::binary;
use testbed::mesh::need;
use testbed::{Mesh, Pod, PodSpec, Process, ServiceSpec, programs};

/// Port of the web servers in their pods.
const WEB_PORT: u16 = 8080;
/// Port of the database.
const DB_PORT: u16 = 3306;
/// The replica that is killed, by its place among the web pods.
const VICTIM: usize = 1;

/// Programs that the demo needs, with the Debian package of each.
const NEEDED: &[(&str, &str)] = &[
    ("curl", "curl"),
    ("mariadb", "mariadb-client"),
    ("mariadbd", "mariadb-server"),
    ("nginx", "nginx-light"),
    ("tcpdump", "tcpdump"),
];

/// Fails early, with all that is missing.
pub(super) fn check_requirements(without_mesh: bool) -> Result<()> {
    need(NEEDED).context("the demo runs real programs; `make demo` installs them")?;
    binary("testbed-load")?;
    if !without_mesh {
        binary("sockmesh-controller")?;
        binary("sockmesh-node")?;
    }
    Ok(())
}

/// A word that occurs nowhere else.
pub(super) fn canary() -> String {
    format!("canary-{:032x}", rand::random::<u128>())
}

/// The pods and what runs in them.
pub(super) struct World {
    client: Pod,
    web: Vec<(Pod, Process)>,
    db: Pod,
    _mariadb: Process,
    web_vip: IpAddr,
    db_vip: IpAddr,
}

impl World {
    /// Makes pods and services and starts the programs, all at the same time.
    pub(super) fn new(mesh: &Mesh) -> Result<Self> {
        mesh.meshed_namespace("shop")?;
        let client =
            mesh.pod(PodSpec::new("shop", "client").service_account("client").label("app", "client"))?;
        let mut pods = Vec::new();
        for (name, node) in [("web-1", 1), ("web-2", 2), ("web-3", 2)] {
            let spec = PodSpec::new("shop", name).node(node).service_account("web").label("app", "web");
            pods.push(mesh.pod(spec.port("http", WEB_PORT))?);
        }
        let spec = PodSpec::new("shop", "db").node(2).service_account("db").label("app", "db");
        let db = mesh.pod(spec.port("sql", DB_PORT))?;
        let web_vips =
            mesh.service(ServiceSpec::new("shop", "web").selector("app", "web").port("http", 80, WEB_PORT))?;
        // No protocol is declared: the mesh has to find out that the server speaks first.
        let db_vips =
            mesh.service(ServiceSpec::new("shop", "db").selector("app", "db").port("sql", DB_PORT, DB_PORT))?;
        let (web, mariadb) = std::thread::scope(|scope| {
            let starts: Vec<_> =
                pods.iter().map(|pod| scope.spawn(|| programs::nginx(pod, WEB_PORT))).collect();
            let mariadb = programs::mariadb(&db, DB_PORT);
            let web: Vec<Result<Process>> = starts
                .into_iter()
                .map(|start| {
                    start.join().unwrap_or_else(|_| Err(anyhow!("the thread that starts nginx panicked")))
                })
                .collect();
            (web, mariadb)
        });
        let web: Vec<Process> = web.into_iter().collect::<Result<_>>()?;
        let first = |vips: Vec<IpAddr>| vips.into_iter().next().context("the service has no address");
        Ok(Self {
            client,
            web: pods.into_iter().zip(web).collect(),
            db,
            _mariadb: mariadb?,
            web_vip: first(web_vips)?,
            db_vip: first(db_vips)?,
        })
    }

    pub(super) fn pods(&self) -> Vec<&Pod> {
        let web = self.web.iter().map(|(pod, _)| pod);
        [&self.client].into_iter().chain(web).chain([&self.db]).collect()
    }

    pub(super) fn client(&self) -> &Pod {
        &self.client
    }

    /// The web service.
    pub(super) fn web_vip(&self) -> (IpAddr, u16) {
        (self.web_vip, 80)
    }

    /// The database service.
    pub(super) fn db_vip(&self) -> (IpAddr, u16) {
        (self.db_vip, DB_PORT)
    }

    /// A web server on the other node than the client, past the service: what can be reached without a mesh.
    pub(super) fn web_address(&self) -> (IpAddr, u16) {
        (self.web[VICTIM].0.v4().into(), WEB_PORT)
    }

    /// The database, past the service.
    pub(super) fn db_address(&self) -> (IpAddr, u16) {
        (self.db.v4().into(), DB_PORT)
    }

    /// The replica that is killed.
    pub(super) fn replica(&self) -> &Pod {
        &self.web[VICTIM].0
    }

    pub(super) fn kill_replica(&mut self) -> Result<()> {
        self.web[VICTIM].1.kill()
    }

    pub(super) fn restart_replica(&mut self) -> Result<()> {
        let (pod, process) = &mut self.web[VICTIM];
        *process = programs::nginx(pod, WEB_PORT)?;
        Ok(())
    }
}
