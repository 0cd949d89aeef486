//! The worker process: everything that touches tenants' bytes.
//!
//! Reads top to bottom along a connection: [`thread`] accepts it, [`outbound`] or [`inbound`] finds out what it is about,
//! [`dial`] makes the connection onward through a [`tunnel`] or straight to the application ([`reach`] tries one endpoint after
//! the other), and [`relay`] or the loops of
//! [`http`] move the bytes, asking [`call`] (outbound) or [`app`] (inbound) what is to happen to each request.
//! [`control`] listens to the agent; [`mesh`] is what the controller said.
//!
//! The process has no capability, opens no socket and holds no key.

pub mod app;
pub mod balance;
pub mod call;
pub mod control;
pub mod copy;
pub mod detect;
pub mod dial;
pub mod dump;
pub mod http;
pub mod inbound;
pub mod io;
pub mod mesh;
pub mod outbound;
pub mod pods;
pub mod policy;
pub mod pool;
pub mod reach;
pub mod read_ahead;
pub mod reason;
pub mod relay;
pub mod report;
pub mod resilience;
pub mod shared;
pub mod sockets;
pub mod telemetry;
pub mod thread;
pub mod tunnel;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::Context;
use tokio::net::UnixListener;
use tokio::sync::mpsc::unbounded_channel;

use self::control::Control;
use self::shared::Shared;
use self::thread::Handle;
use crate::config::WorkerSettings;

/// Runs the worker until an agent asks it to drain. `control` is the listening unix socket that agents connect to.
///
/// # Errors
/// When it can't start, or its control socket fails.
pub fn run(control: OwnedFd) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = std::os::unix::net::UnixListener::from(control);
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        // The first Hello bears the settings; without them there is nothing to start.
        let (reader, writer, hello) = loop {
            let (mut reader, writer) =
                control::accept(&listener).await.context("the worker's control socket failed")?;
            match control::hello(&mut reader).await {
                Ok(hello) => break (reader, writer, hello),
                Err(e) => tracing::warn!(error = %e, "a control connection was refused"),
            }
        };
        let settings: WorkerSettings = serde_json::from_slice(&hello.settings_json)
            .context("the agent's settings can't be read; agent and worker are of versions too far apart")?;
        let count = match settings.threads {
            0 => std::thread::available_parallelism()?.get(),
            n => n as usize,
        };
        let (to_agent, outgoing) = unbounded_channel();
        let shared = Arc::new(Shared::new(hello.node, settings, to_agent)?);
        let mut inboxes = Vec::new();
        let handles: Vec<_> = (0..count)
            .map(|_| {
                let (commands, inbox) = unbounded_channel();
                inboxes.push(inbox);
                Handle { commands, open: Arc::default(), listening: Arc::default() }
            })
            .collect();
        for (index, inbox) in inboxes.into_iter().enumerate() {
            let (shared, handles) = (Arc::clone(&shared), handles.clone());
            std::thread::Builder::new().name(format!("data-{index}")).spawn(move || {
                if let Err(e) = thread::run(shared, index, handles, inbox) {
                    // Without its threads the worker is of no use; the agent starts another.
                    tracing::error!(index, error = %e, "a data path thread could not run");
                    std::process::exit(1);
                }
            })?;
        }
        tokio::spawn(shared::sweep(Arc::clone(&shared)));
        tracing::info!(node = shared.node, threads = count, "worker ready");
        let mut control = Control::new(shared, handles);
        let drained = control.drained();
        tokio::select! {
            served = control.serve(listener, (reader, writer), outgoing) => served,
            () = drained.notified() => Ok(()),
        }
    })
}
