//! The client's traffic: HTTP requests from the load program, queries from MariaDB's own client.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::Signal;
use testbed::load::{LoadReport, load};
use testbed::{Pod, Process};

use super::world::World;

/// Connections of the HTTP client.
const CONNECTIONS: &str = "8";
/// Between two queries.
const QUERY_PAUSE: Duration = Duration::from_millis(100);
/// How long the load program may take to end: it waits for its last requests.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Queries so far.
#[derive(Debug, Default)]
pub(super) struct Queries {
    stop: AtomicBool,
    pub(super) answered: AtomicU64,
    pub(super) failed: AtomicU64,
    /// Queries that were sent again, because a worker that dies takes the TCP streams with it that it carried.
    pub(super) resent: AtomicU64,
}

/// Traffic that flows.
pub(super) struct Traffic {
    load: Process,
    /// The load program's newest line.
    pub(super) http: LoadReport,
    pub(super) queries: Arc<Queries>,
    querying: Option<JoinHandle<Result<()>>>,
}

impl Traffic {
    /// Starts both. `meshed` says whether services can be reached.
    pub(super) fn start(world: &World, rate: f64, canary: &str, meshed: bool) -> Result<Self> {
        let (web, db) = if meshed {
            (world.web_vip(), world.db_vip())
        } else {
            (world.web_address(), world.db_address())
        };
        let load = load(world.client())?
            .arg(format!("http://{}:{}/", web.0, web.1))
            .args(["--concurrency", CONNECTIONS, "--rate", &rate.to_string(), "--canary", canary])
            .args(["--interval", "0.25"])
            .spawn()?;
        let queries = Arc::new(Queries::default());
        let querying = std::thread::Builder::new()
            .name("queries".into())
            .spawn({
                let (queries, pod, canary) =
                    (Arc::clone(&queries), world.client().clone(), canary.to_owned());
                move || query(&pod, db, &canary, &queries)
            })
            .context("cannot start the thread for queries")?;
        Ok(Self { load, http: LoadReport::default(), queries, querying: Some(querying) })
    }

    /// Reads how it stands.
    pub(super) fn look(&mut self) -> Result<()> {
        if let Some(report) = LoadReport::newest(&self.load)? {
            self.http = report;
        }
        Ok(())
    }

    /// Ends both and keeps their last word.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.queries.stop.store(true, Ordering::Relaxed);
        self.load.signal(Signal::SIGTERM)?;
        self.load.wait(STOP_LIMIT)?;
        self.http = LoadReport::last(&self.load)?;
        match self.querying.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(anyhow!("the thread for queries panicked")),
        }
    }
}

/// Asks the database for the canary, each time on a connection of its own, until told to stop.
fn query(pod: &Pod, db: (IpAddr, u16), canary: &str, queries: &Queries) -> Result<()> {
    let ask = || -> Result<bool> {
        let out = pod
            .launch("mariadb")
            .args(["--no-defaults", "--batch", "--skip-column-names", "--connect-timeout=10"])
            .args(["-h", &db.0.to_string(), "-P", &db.1.to_string(), "-e", &format!("select '{canary}'")])
            .limit(Duration::from_secs(15))
            .output()?;
        Ok(out.status.success() && out.text().trim() == canary)
    };
    while !queries.stop.load(Ordering::Relaxed) {
        let mut answered = ask()?;
        if !answered {
            queries.resent.fetch_add(1, Ordering::Relaxed);
            answered = ask()?;
        }
        let counter = if answered { &queries.answered } else { &queries.failed };
        counter.fetch_add(1, Ordering::Relaxed);
        testbed::wait::pause(QUERY_PAUSE)?;
    }
    Ok(())
}
