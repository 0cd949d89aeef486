//! The successor gets ready and takes the node.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use redirect_bpf::Opened;
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::super::certificates::{self, CertificateError};
use super::super::netns::Listeners;
use super::super::requests::{self, Front, Reply, Request};
use super::super::{Agent, admin, cni, pods, save_config};
use super::record::Record;
use super::{Begun, Charge, Offer, Phase, Successor, end_generation, start};
use crate::child::LogArguments;
use crate::config::NodeConfig;
use crate::ipc::proto::{
    Commit, Freeze, Frozen, HandedPod, ListenerKind, QueryKind, ToIncumbent, ToSuccessor, to_incumbent,
    to_successor,
};
use crate::ipc::stream::{FrameReader, FrameWriter, split};

/// How long an agent may take to answer whether it hands the node over, and to hand over what it has, which waits for the
/// enrolments that are under way.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long pods that came last may keep the node frozen until they have their certificates.
const LAST_CERTIFICATES: Duration = Duration::from_secs(20);
/// Pause before another look at what is missing.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What the agent in charge handed over.
struct Handed {
    charge: Charge,
    pods: Vec<GivenPod>,
}

/// A pod of the agent in charge.
pub(in super::super) struct GivenPod {
    pub(in super::super) uid: String,
    pub(in super::super) netns_path: PathBuf,
    pub(in super::super) netns: OwnedFd,
    pub(in super::super) cookie: u64,
    pub(in super::super) own_addresses: Vec<std::net::IpAddr>,
    pub(in super::super) listeners: Listeners,
}

/// Takes the node over from the agent in charge.
///
/// # Errors
/// Why not; that agent then goes on, and nothing of this attempt is left.
pub(super) async fn take(
    config: &NodeConfig,
    log: &LogArguments,
    front: &Arc<Front>,
    stream: UnixStream,
    offer: Offer,
) -> anyhow::Result<Begun> {
    tracing::info!(
        pid = offer.pid,
        version = offer.version,
        "another agent has this node and hands it over; getting ready beside it"
    );
    let (agent, below) = Agent::make(config, log, offer.generation + 1, Phase::Preparing, front)?;
    *agent.takeover.predecessor.lock() = Some((offer.version, offer.pid));
    agent.disk.write_if(false);
    pods::foresee(&agent);
    let below = below.start(&agent);
    front.set(&agent);
    let (reader, writer) = split(stream);
    match take_over(&agent, reader, writer).await {
        Ok(charge) => {
            let in_charge = start(&agent, charge)?;
            Ok(Begun { agent, below, in_charge })
        }
        Err(error) => {
            front.clear();
            drop(below);
            end_generation(&config.node.run_dir, agent.takeover.generation).await?;
            Err(error)
        }
    }
}

/// Asks the agent in charge for the node.
///
/// # Errors
/// Why it does not hand it over.
pub(super) async fn ask(config: &NodeConfig) -> anyhow::Result<(UnixStream, Offer)> {
    let path = requests::socket(&config.node.run_dir);
    let request = Request::TakeOver(Successor {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        instance: config.node.instance.clone(),
    });
    let asked = tokio::time::timeout(ANSWER_TIMEOUT, requests::converse_at(&path, &request));
    match asked.await.context("it does not answer")?? {
        Some((stream, Reply::TakeOver(offer))) => Ok((stream, offer)),
        Some((_, Reply::Error { message })) => {
            anyhow::bail!("it does not hand the node over ({message}); it has to be ended first")
        }
        Some(_) => anyhow::bail!("its answer is not understood; it has to be ended first"),
        None => anyhow::bail!("it does not answer on {} yet, or not any more", path.display()),
    }
}

/// What is missing before the node can be taken.
pub(in super::super) fn missing(agent: &Agent) -> Vec<String> {
    let mut missing = missing_to_serve(agent);
    // The agent in charge has it in the chain; one that could not put it there would let new pods run outside the mesh.
    // It is looked at last, since files are read for it.
    if missing.is_empty()
        && let Some(problem) = cni::obstacle(&agent.config)
    {
        missing.push(format!("the CNI plugin would not be in the chain: {problem}"));
    }
    missing
}

fn missing_to_serve(agent: &Agent) -> Vec<String> {
    let mut missing = Vec::new();
    let keyd = agent.keyd.borrow().clone();
    let controller = agent.controller.status();
    let state = agent.state.lock();
    if !state.worker.as_ref().is_some_and(|worker| worker.is_configured()) {
        missing.push("no worker with a configuration".to_owned());
    }
    // What is on disk would do to serve, and not to have certificates signed.
    if !controller.connected || !controller.synced || state.mesh.trust().is_none() {
        missing.push(controller.describe());
    }
    missing.extend(agent.tunnel.missing());
    let Some(keyd) = keyd else {
        missing.push("no keyd".to_owned());
        return missing;
    };
    for (uid, pod) in &state.pods {
        // One that is no longer in the mesh gets none.
        if !state.mesh.local(uid).is_some_and(|workload| workload.enrolled) {
            continue;
        }
        let held = pod.certificate.as_ref().is_some_and(|held| {
            keyd.has_key(&held.record.key_id) && held.record.not_after > certificates::now()
        });
        match &pod.certificate_error {
            _ if held => {}
            // That says something about the pod and nothing about the node; it has none now, either.
            Some(CertificateError::Refused(_)) => {}
            Some(error) => missing.push(format!("pod {uid} has no certificate: {error}")),
            None => missing.push(format!("pod {uid} has no certificate yet")),
        }
    }
    missing
}

/// Waits until nothing is missing.
async fn prepared(agent: &Agent) {
    let mut told = Instant::now();
    loop {
        let missing = missing(agent);
        if missing.is_empty() {
            return;
        }
        if told.elapsed() > LAST_CERTIFICATES {
            told = Instant::now();
            tracing::warn!(
                missing = missing.join("; "),
                "not ready to take the node over; the other agent goes on"
            );
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn take_over(
    agent: &Arc<Agent>,
    mut reader: FrameReader,
    mut writer: FrameWriter,
) -> anyhow::Result<Charge> {
    tokio::select! {
        () = prepared(agent) => {}
        message = reader.recv_frame::<ToSuccessor>() => {
            anyhow::bail!(match message {
                Ok(None) => "it ended",
                Ok(Some(_)) => "it said something before it was asked",
                Err(_) => "the connection to it failed",
            })
        }
    }
    let begun = Instant::now();
    send(&mut writer, to_incumbent::Message::Freeze(Freeze {})).await?;
    let handed = tokio::time::timeout(ANSWER_TIMEOUT, receive(agent, &mut reader)).await;
    let Handed { charge, mut pods } = handed.context("it did not hand the node over in time")??;
    let number = pods.len();
    open_missing(agent, &mut pods).await;
    let listeners = pods::take_over(agent, pods)?;
    tokio::time::timeout(LAST_CERTIFICATES, prepared(agent))
        .await
        .map_err(|_| anyhow::anyhow!("the last thing is missing: {}", missing(agent).join("; ")))?;
    // The other one changes nothing there any more, so what is read now holds.
    pods::take_kernel(agent, &listeners)?;
    accept(agent, listeners).await?;
    commit(agent, &mut writer).await?;
    match tokio::time::timeout(ANSWER_TIMEOUT, message(&mut reader)).await {
        Ok(Ok((to_successor::Message::Committed(_), _))) => {}
        // It wrote the record first; what came after that may be lost.
        _ if Record::read(&agent.config.node.run_dir)?.is_of(agent.takeover.generation) => {}
        _ => anyhow::bail!("it did not let the node go"),
    }
    agent.takeover.phase.send_replace(Phase::InCharge);
    agent.disk.write_if(true);
    // What came while the other one wrote.
    save_config(agent).await;
    cni::learn_again(agent);
    pods::save(agent);
    certificates::save(agent);
    agent.touch();
    tracing::info!(
        pods = number,
        frozen_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        "the node is this agent's"
    );
    Ok(charge)
}

/// Opens listeners for pods that came without any: the agent before was started again, and has not heard from its worker
/// yet. A pod in whose namespace there can be none is enrolled anew, if it is found; until then it is refused.
async fn open_missing(agent: &Agent, pods: &mut Vec<GivenPod>) {
    let mut opened = Vec::with_capacity(pods.len());
    for mut pod in pods.drain(..) {
        if pod.listeners.is_empty() {
            let listeners = async {
                let netns = Arc::new(pod.netns.try_clone()?);
                agent.netns.listeners(netns).await
            };
            match listeners.await {
                Ok(listeners) => pod.listeners = listeners,
                Err(error) => {
                    tracing::error!(uid = pod.uid, %error, "the pod has no listeners, and cannot get any");
                    continue;
                }
            }
        }
        opened.push(pod);
    }
    *pods = opened;
}

/// Has the worker accept connections of all pods, and waits until it does.
async fn accept(agent: &Agent, listeners: Vec<(String, Listeners)>) -> anyhow::Result<()> {
    let uids: Vec<String> = listeners.iter().map(|(uid, _)| uid.clone()).collect();
    let worker = {
        let mut state = agent.state.lock();
        let worker = state.worker.clone().context("the worker is gone")?;
        worker.maps(agent.kernel())?;
        for (uid, listeners) in listeners {
            if let Some(pod) = state.pods.get_mut(uid.as_str()) {
                worker.pod_added(&uid, pod.cookie, &listeners);
                pod.listeners = listeners;
            }
        }
        worker
    };
    for uid in uids {
        pods::capture(agent, &uid)?;
    }
    // It answers in order.
    worker.query(QueryKind::Connections).await.map(drop)
}

async fn send(writer: &mut FrameWriter, message: to_incumbent::Message) -> anyhow::Result<()> {
    let message = ToIncumbent { message: Some(message) };
    writer.send_frame(&message, &[]).await.context("the connection to it failed")
}

/// Says that the node is this agent's, and in which maps sockets have to be marked now.
async fn commit(agent: &Agent, writer: &mut FrameWriter) -> anyhow::Result<()> {
    let kernel = agent.kernel();
    let maps = {
        let redirect = kernel.redirect.lock();
        [redirect.own_map()?, redirect.worker_map()?]
    };
    let commit = Commit { other_maps: kernel.opened != Opened::Adopted };
    let message = ToIncumbent { message: Some(to_incumbent::Message::Commit(commit)) };
    let sent = writer.send_frame(&message, &[maps[0].as_fd(), maps[1].as_fd()]).await;
    sent.context("the connection to it failed")
}

async fn message(reader: &mut FrameReader) -> anyhow::Result<(to_successor::Message, Vec<OwnedFd>)> {
    let frame = reader.recv_frame::<ToSuccessor>().await.context("the connection to it failed")?;
    let (message, descriptors) = frame.context("it went away")?;
    Ok((message.message.context("it says what this version does not know")?, descriptors))
}

async fn receive(agent: &Agent, reader: &mut FrameReader) -> anyhow::Result<Handed> {
    let mut charge = None;
    let mut pods = Vec::new();
    loop {
        let (to_successor::Message::Frozen(frozen), descriptors) = message(reader).await? else {
            anyhow::bail!("it let the node go before it handed it over");
        };
        let more = frozen.more;
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().context("it sent fewer descriptors than it named");
        if frozen.charge {
            charge = Some(take_charge(agent, File::from(next()?), next()?.into(), next()?.into())?);
        }
        take_pods(frozen, next, &mut pods)?;
        if !more {
            let charge = charge.context("it did not hand over the lock")?;
            return Ok(Handed { charge, pods });
        }
    }
}

/// The sockets are used on, unless this agent is to be asked elsewhere.
fn take_charge(
    agent: &Agent,
    lock: File,
    requests: UnixListener,
    handed: TcpListener,
) -> anyhow::Result<Charge> {
    let wanted = agent.config.node.admin;
    let same = handed.local_addr().context("cannot look at the admin listener")? == wanted;
    let admin = match admin::bind(wanted) {
        _ if same => handed,
        Ok(bound) => bound,
        Err(error) => {
            // The other agent listens there on all addresses, or on one of them, for as long as it lives.
            tracing::warn!(
                error = format!("{error:#}"),
                "metrics and readiness are at the address of the agent before until this one is started again"
            );
            handed
        }
    };
    Ok(Charge { lock, requests, admin })
}

fn take_pods(
    frozen: Frozen,
    mut next: impl FnMut() -> anyhow::Result<OwnedFd>,
    pods: &mut Vec<GivenPod>,
) -> anyhow::Result<()> {
    for pod in frozen.pods {
        let HandedPod { uid, netns_path, netns_cookie, own_addresses, listeners } = pod;
        let netns = next()?;
        let mut taken = Vec::with_capacity(listeners.len());
        for listener in listeners {
            let kind = ListenerKind::try_from(listener.kind).context("a listener is of no known kind")?;
            taken.push((kind, Arc::new(next()?)));
        }
        let own_addresses = own_addresses.iter().map(|address| address.parse()).collect::<Result<_, _>>();
        pods.push(GivenPod {
            uid,
            netns_path: netns_path.into(),
            netns,
            cookie: netns_cookie,
            own_addresses: own_addresses.context("an address of a pod is none")?,
            listeners: taken,
        });
    }
    Ok(())
}
