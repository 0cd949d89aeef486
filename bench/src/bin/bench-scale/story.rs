//! What is measured at one size of the cluster.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hyper::Method;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::api::Api;
use crate::controller::{Controller, Program};
use crate::events::{Event, Want, Watchers};
use crate::measure::{Cost, Phase, Subject};
use crate::nodes::{self, Nodes};
use crate::{Plan, Size, objects};

/// Time between the steps of a pod's life.
const STEP: Duration = Duration::from_secs(2);

/// What was found at one size.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Found {
    pub(crate) size: Size,
    /// Seconds from the controller's start until it had read the cluster.
    pub(crate) read: f64,
    /// CPU seconds that it used for that.
    pub(crate) read_cpu: f64,
    /// Its memory then; bytes.
    pub(crate) read_memory: crate::controller::Resident,
    /// All nodes at once, with nothing.
    pub(crate) first_sync: Cost,
    /// Nothing changes.
    pub(crate) idle: Cost,
    pub(crate) phases: Vec<Phase>,
    /// The controller is killed and started again; all nodes come back with what they know.
    pub(crate) restart: Restart,
}

/// What it took until all nodes were back.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Restart {
    /// Seconds from its start until it had read the cluster.
    pub(crate) read: f64,
    /// Seconds from its start until the last node had heard that it has everything.
    pub(crate) all_back: f64,
    /// Of the new process since its start.
    pub(crate) cost: Cost,
}

/// Measures everything at one size.
pub(crate) async fn play(plan: &Plan, size: Size) -> Result<Found> {
    let say = |text: &str| eprintln!("[{} pods, {} nodes] {text}", size.pods, size.nodes);
    say("filling a store, starting an API server");
    let api = Arc::new(Api::start(&plan.programs, objects::all(&size)).await?);
    say("starting the controller");
    let program = Program::new(&plan.controller)?;
    let controller = program.start(&api).await?;
    let (read_cpu, read_memory) = (controller.process.cpu()?, controller.memory()?);
    let read = controller.ready_after;
    say(&format!("it has read the cluster after {read:.1?}; registering nodes"));
    let endpoints = nodes::register(&api, controller.listen, size.nodes).await?;
    let watchers = Arc::new(Watchers::default());
    let story = Story { api: &api, plan, size, watchers: &watchers };

    // Nothing of the nodes' is there yet, so this is the mark of a moment without nodes.
    let nobody = Nodes::start(Vec::new(), &watchers);
    let before = story.subject(&controller, &nobody).mark().await?;
    let mut nodes = Nodes::start(endpoints, &watchers);
    nodes.synced().await?;
    let first_sync = story.subject(&controller, &nodes).since(&before).await?;
    say(&format!("all nodes have everything after {:.1} s", first_sync.seconds));
    tokio::time::sleep(plan.idle).await;
    let subject = story.subject(&controller, &nodes);
    let before = subject.mark().await?;
    tokio::time::sleep(plan.idle).await;
    let idle = subject.since(&before).await?;

    let mut phases = Vec::new();
    for kind in Kind::ALL {
        say(kind.name());
        let phase = story.phase(&subject, kind).await.with_context(|| kind.name())?;
        say(&format!("  p50 {:.1} ms, p99 {:.1} ms to each node", phase.each.p50, phase.each.p99));
        phases.push(phase);
        tokio::time::sleep(plan.idle).await;
    }
    say("killing the controller, starting it again");
    let restart = story.restart(&program, controller, &mut nodes).await?;
    say(&format!("all nodes are back {:.1} s after its start", restart.all_back));
    Ok(Found {
        size,
        read: read.as_secs_f64(),
        read_cpu: read_cpu.as_secs_f64(),
        read_memory,
        first_sync,
        idle,
        phases,
        restart,
    })
}

/// Sorts of changes.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Churn,
    Service,
    Slice,
    Out,
    In,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Churn, Self::Service, Self::Slice, Self::Out, Self::In];

    fn name(self) -> &'static str {
        match self {
            Self::Churn => "pods come, get ready, go",
            Self::Service => "a port of a service",
            Self::Slice => "an endpoint of the big service",
            Self::Out => "a namespace leaves the mesh",
            Self::In => "a namespace joins the mesh",
        }
    }
}

/// Changes and when each request for one was answered.
type Done = (Vec<Arc<Event>>, Vec<Duration>);

struct Story<'a> {
    api: &'a Arc<Api>,
    plan: &'a Plan,
    size: Size,
    watchers: &'a Arc<Watchers>,
}

impl Story<'_> {
    fn subject<'b>(&'b self, controller: &'b Controller, nodes: &'b Nodes) -> Subject<'b> {
        Subject { api: self.api, controller, nodes, number: self.size.nodes }
    }

    async fn phase(&self, subject: &Subject<'_>, kind: Kind) -> Result<Phase> {
        let before = subject.mark().await?;
        let (events, written) = match kind {
            Kind::Churn => self.churn().await?,
            Kind::Service => self.services().await?,
            Kind::Slice => self.slices().await?,
            Kind::Out => self.label(Value::Null, false).await?,
            Kind::In => self.label(json!("enabled"), true).await?,
        };
        for event in &events {
            event.seen_by_all().await?;
        }
        let cost = subject.since(&before).await?;
        self.watchers.clear();
        Ok(Phase::of(kind.name(), &events, written, cost))
    }

    /// Pods that are made, get ready and are deleted, a step apart each; so many steps of all of them a second.
    async fn churn(&self) -> Result<Done> {
        let mut lives = JoinSet::new();
        let every = Duration::from_secs_f64(3.0 / self.plan.rate);
        let mut turn = tokio::time::interval(every);
        for i in 0..(self.plan.rate * self.plan.seconds / 3.0).ceil() as usize {
            turn.tick().await;
            let (api, watchers, size) = (self.api.clone(), self.watchers.clone(), self.size);
            lives.spawn(async move { life(&api, &watchers, &size, i).await });
        }
        let mut all = (Vec::new(), Vec::new());
        while let Some(done) = lives.join_next().await {
            let (events, written) = done??;
            all.0.extend(events);
            all.1.extend(written);
        }
        Ok(all)
    }

    /// One after the other, each when all nodes have seen the last.
    async fn services(&self) -> Result<Done> {
        let mut done = (Vec::new(), Vec::new());
        for i in 0..self.plan.single {
            let number = i % self.size.services;
            let namespace = objects::namespace(number % self.size.namespaces);
            let name = objects::service_name(number);
            let port = 8000 + u16::try_from(i).unwrap_or(0);
            let ports = json!([{ "name": "http", "port": port, "protocol": "TCP", "targetPort": "http" }]);
            let path = format!("/api/v1/namespaces/{namespace}/services/{name}");
            let body = json!({ "spec": { "ports": ports } });
            self.one(&format!("{namespace}/{name}"), Want::Port(port), &path, &body, &mut done).await?;
        }
        Ok(done)
    }

    async fn slices(&self) -> Result<Done> {
        let mut done = (Vec::new(), Vec::new());
        let namespace = objects::namespace(0);
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices/big-0");
        let address = objects::address(0).parse().context("an address of the test's own")?;
        for i in 0..self.plan.single {
            let ready = i % 2 == 1;
            let body = json!({ "endpoints": objects::first_slice(&self.size, ready) });
            let want = Want::Endpoint(address, ready);
            self.one(&format!("{namespace}/big"), want, &path, &body, &mut done).await?;
        }
        Ok(done)
    }

    async fn one(&self, name: &str, want: Want, path: &str, body: &Value, done: &mut Done) -> Result<()> {
        let event = self.watchers.expect(name, want, self.size.nodes);
        let sent = Instant::now();
        self.api.call(Method::PATCH, path, body).await?;
        done.1.push(sent.elapsed());
        event.seen_by_all().await?;
        done.0.push(event);
        Ok(())
    }

    /// Each pod of the namespace is a change of its own.
    async fn label(&self, value: Value, enrolled: bool) -> Result<Done> {
        let number = 1 % self.size.namespaces;
        let expect =
            |pod| self.watchers.expect(&objects::pod_name(pod), Want::Enrolled(enrolled), self.size.nodes);
        let events = objects::pods_of(&self.size, number).map(expect).collect();
        let path = format!("/api/v1/namespaces/{}", objects::namespace(number));
        let sent = Instant::now();
        self.api
            .call(Method::PATCH, &path, &json!({ "metadata": { "labels": { "sockmesh.io/mesh": value } } }))
            .await?;
        Ok((events, vec![sent.elapsed()]))
    }

    async fn restart(&self, program: &Program, old: Controller, nodes: &mut Nodes) -> Result<Restart> {
        let before = {
            let mut mark = self.subject(&old, nodes).mark().await?;
            mark.process_begins();
            mark
        };
        drop(old);
        nodes.forget();
        let began = Instant::now();
        let new = program.start(self.api).await?;
        nodes.synced().await?;
        let all_back = began.elapsed().as_secs_f64();
        let cost = self.subject(&new, nodes).since(&before).await?;
        Ok(Restart { read: new.ready_after.as_secs_f64(), all_back, cost })
    }
}

/// A pod that is made, gets ready, and is deleted.
async fn life(api: &Api, watchers: &Watchers, size: &Size, number: usize) -> Result<Done> {
    let mut done = (Vec::new(), Vec::new());
    let number = size.pods + number;
    let namespace = objects::namespace(number % size.namespaces);
    let name = objects::pod_name(number);
    let all = format!("/api/v1/namespaces/{namespace}/pods");
    let path = format!("{all}/{name}");
    let mut pod = objects::pod(size, number, &namespace, &name, number % size.nodes, "default");
    if let Some(metadata) = pod["metadata"].as_object_mut() {
        // The API server's to say.
        for field in ["uid", "creationTimestamp", "managedFields"] {
            metadata.remove(field);
        }
    }
    let mut took = |sent: Instant, event| {
        done.1.push(sent.elapsed());
        done.0.push(event);
    };
    let (event, sent) = (watchers.expect(&name, Want::Listed, size.nodes), Instant::now());
    let made = api.call(Method::POST, &all, &pod).await?;
    took(sent, event);
    tokio::time::sleep(STEP).await;
    let status = json!({ "status": objects::status(&objects::address(number), true) });
    let (event, sent) = (watchers.expect(&name, Want::Ready, size.nodes), Instant::now());
    api.call(Method::PATCH, &format!("{path}/status"), &status).await?;
    took(sent, event);
    tokio::time::sleep(STEP).await;
    let uid = made["metadata"]["uid"].as_str().context("the API server made a pod without UID")?;
    let (event, sent) = (watchers.expect(uid, Want::Gone, size.nodes), Instant::now());
    api.call(Method::DELETE, &path, &json!({ "gracePeriodSeconds": 0 })).await?;
    took(sent, event);
    Ok(done)
}
