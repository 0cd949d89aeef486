//! How the API server is followed when it does not make it easy: a server that is played, so that it fails at the right
//! moment.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use kube::Client;
use kube::client::Body;
use mesh_api::model::{Denied, Resource, TRUST_TYPE, WORKLOAD_TYPE};
use mesh_controller::certificates::ledger::Ledger;
use mesh_controller::cluster::{Cluster, TrustAnchor};
use mesh_controller::index::IndexConfig;
use mesh_controller::metrics::Metrics;
use mesh_controller::source::kubernetes;
use parking_lot::Mutex;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Longest wait for something that should happen soon; only reached when it does not happen at all.
const PATIENCE: Duration = Duration::from_secs(60);
const PODS: &str = "/api/v1/pods";
const NAMESPACES: &str = "/api/v1/namespaces";
const KINDS: [&str; 6] = [
    NAMESPACES,
    "/api/v1/nodes",
    "/api/v1/serviceaccounts",
    "/api/v1/services",
    "/apis/discovery.k8s.io/v1/endpointslices",
    PODS,
];
/// A kind that an API server has since Kubernetes 1.33; this one is older.
const ABSENT: &str = "/apis/networking.k8s.io/v1/servicecidrs";

/// What a list answers instead of what there is.
enum Answer {
    /// An HTTP status.
    Status(u16),
    /// These items and a token for more.
    Page(Vec<Value>, &'static str),
}

#[derive(Default)]
struct State {
    objects: BTreeMap<&'static str, Vec<Value>>,
    /// Answers to the next lists of pods.
    lists: VecDeque<Answer>,
    /// Status with which every watch of pods from the first place on is refused.
    refuse_first_place: Option<u16>,
    place: u64,
    /// The open watch of a kind.
    watches: BTreeMap<&'static str, mpsc::UnboundedSender<Value>>,
    lists_of_pods: usize,
    /// Kinds whose lists are not answered.
    held: Vec<&'static str>,
}

#[derive(Clone)]
struct Played(Arc<Mutex<State>>);

type Answered = Response<BoxBody<Bytes, Infallible>>;

fn response(status: u16, value: &Value) -> Answered {
    let body = Full::new(Bytes::from(serde_json::to_vec(value).unwrap())).boxed();
    Response::builder().status(status).body(body).unwrap()
}

fn status(code: u16) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "played", "reason": "Played", "code": code})
}

impl Played {
    fn new() -> Self {
        let mut state = State { place: 1, ..State::default() };
        for kind in KINDS {
            state.objects.insert(kind, Vec::new());
        }
        state.objects.insert(NAMESPACES, vec![namespace()]);
        Self(Arc::new(Mutex::new(state)))
    }

    fn client(&self) -> Client {
        let played = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let played = played.clone();
            async move { Ok::<_, Infallible>(played.answer(request).await) }
        });
        Client::new(service, "default")
    }

    async fn answer(&self, request: Request<Body>) -> Answered {
        if request.uri().path() == ABSENT {
            return response(404, &status(404));
        }
        let kind = KINDS.into_iter().find(|k| *k == request.uri().path()).expect("a kind that is read");
        let query = request.uri().query().unwrap_or_default().to_owned();
        drop(request);
        let held = self.0.lock().held.contains(&kind);
        if held {
            return std::future::pending().await;
        }
        let mut state = self.0.lock();
        if query.contains("watch=true") {
            let first_place = query.split('&').any(|part| part == "resourceVersion=1");
            if kind == PODS
                && first_place
                && let Some(code) = state.refuse_first_place
            {
                return response(code, &status(code));
            }
            let (sender, events) = mpsc::unbounded_channel::<Value>();
            state.watches.insert(kind, sender);
            let lines = stream::unfold(events, |mut events| async {
                let event = events.recv().await?;
                let line = Bytes::from(format!("{event}\n"));
                Some((Ok::<_, Infallible>(Frame::data(line)), events))
            });
            return Response::new(StreamBody::new(lines).boxed());
        }
        let mut items = state.objects[kind].clone();
        let mut metadata = json!({"resourceVersion": state.place.to_string()});
        if kind == PODS {
            state.lists_of_pods += 1;
            match state.lists.pop_front() {
                None => {}
                Some(Answer::Status(code)) => return response(code, &status(code)),
                Some(Answer::Page(page, more)) => {
                    items = page;
                    metadata["continue"] = json!(more);
                }
            }
        }
        response(200, &json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items}))
    }

    fn set(&self, kind: &'static str, objects: Vec<Value>) {
        let mut state = self.0.lock();
        state.place += 1;
        state.objects.insert(kind, objects);
    }

    fn tell(&self, kind: &'static str, event: Value) {
        self.0.lock().watches[kind].send(event).unwrap();
    }

    /// Loses the place of the watch of pods, as after the API server forgot its history.
    fn lose_place(&self) {
        self.tell(PODS, json!({"type": "ERROR", "object": status(410)}));
    }

    fn watches(&self, kind: &'static str) -> bool {
        self.0.lock().watches.get(kind).is_some_and(|w| !w.is_closed())
    }
}

fn namespace() -> Value {
    json!({"metadata": {"name": "shop", "resourceVersion": "1", "labels": {"sockmesh.io/mesh": "enabled"}}})
}

fn pod(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "resourceVersion": "7"},
        "spec": {"nodeName": "n1", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    })
}

fn cluster() -> Arc<Cluster> {
    let now = OffsetDateTime::now_utc();
    let root = ca::Authority::make_root("cluster.local", Duration::from_secs(3600), now).unwrap();
    let log = ca::log::MemoryLog::default();
    let authority =
        ca::Authority::load("cluster.local", &root.certificate_pem, &root.key_pem, now, log).unwrap();
    let roots = vec![authority.root_der().into()];
    let index =
        IndexConfig { cluster_domain: "cluster.local".to_owned(), derive_endpoints: false, complete: true };
    let metrics = Arc::new(Metrics::default());
    Arc::new(Cluster::new(
        index,
        TrustAnchor { authority, roots },
        Ledger::default(),
        metrics,
        Duration::from_secs(3600),
    ))
}

struct Follower {
    cluster: Arc<Cluster>,
    stopping: CancellationToken,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}

impl Follower {
    fn start(played: &Played) -> Self {
        let (cluster, stopping) = (cluster(), CancellationToken::new());
        tokio::spawn(kubernetes::run(played.client(), cluster.clone(), stopping.clone()));
        Self { cluster, stopping }
    }

    async fn ready(played: &Played) -> Self {
        let follower = Self::start(played);
        follower.until("the cluster to be loaded", |f| f.cluster.loaded()).await;
        follower.until("the watch of pods", |_| played.watches(PODS)).await;
        follower
    }

    fn pods(&self) -> Vec<String> {
        self.cluster.store.all(WORKLOAD_TYPE).keys().map(ToString::to_string).collect()
    }

    fn metric(&self, name: &str) -> f64 {
        self.cluster.count();
        let text = self.cluster.metrics.text().unwrap();
        let line = text.lines().find(|l| l.starts_with(name) && l[name.len()..].starts_with(' '));
        line.map_or(0.0, |l| l.rsplit(' ').next().unwrap().parse().unwrap())
    }

    /// Waits for a state; polls because the state has no notice of its own.
    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let all = async {
            while !holds(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            panic!("waited in vain for {what}: {:?} {:?}", self.pods(), self.cluster.source());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_told_before_every_kind_has_been_listed() {
    let played = Played::new();
    played.set(PODS, vec![pod("a", "10.0.0.1")]);
    played.0.lock().held.push("/api/v1/nodes");
    let follower = Follower::start(&played);
    follower.until("six kinds", |f| f.cluster.source().listed.len() == 6).await;
    assert!(!follower.cluster.loaded());
    assert_eq!(*follower.cluster.store.version().borrow(), None);
    assert!(follower.cluster.store.get(TRUST_TYPE, "trust").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_place_means_a_new_list_and_only_what_it_does_not_name_is_gone() {
    let played = Played::new();
    played.set(PODS, vec![pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]);
    let follower = Follower::ready(&played).await;
    assert_eq!(follower.pods(), ["uid-a", "uid-b"]);
    let before = follower.cluster.store.get(WORKLOAD_TYPE, "uid-b").unwrap();
    let seq = follower.cluster.store.seq();
    played.set(PODS, vec![pod("b", "10.0.0.2"), pod("c", "10.0.0.3")]);
    played.lose_place();
    follower.until("the new list", |f| f.pods() == ["uid-b", "uid-c"]).await;
    assert_eq!(follower.cluster.store.get(WORKLOAD_TYPE, "uid-b"), Some(before));
    assert_eq!(
        follower.cluster.store.seq() - seq,
        3,
        "one came, one went and is denied, nothing else was touched"
    );
    assert_eq!(follower.metric("sockmesh_controller_relists_total{object=\"Pod\"}"), 2.0);
    assert_eq!(follower.metric("sockmesh_controller_api_errors_total{call=\"watch\",code=\"410\"}"), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_that_breaks_off_in_the_middle_removes_nothing() {
    let played = Played::new();
    played.set(PODS, vec![pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), pod("c", "10.0.0.3")]);
    let follower = Follower::ready(&played).await;
    {
        let mut state = played.0.lock();
        for _ in 0..3 {
            state.lists.push_back(Answer::Page(vec![pod("b", "10.0.0.22")], "more"));
            state.lists.push_back(Answer::Status(500));
        }
    }
    played.set(PODS, vec![pod("a", "10.0.0.1"), pod("b", "10.0.0.22")]);
    played.lose_place();
    // What a broken list names is true, what it does not name is not gone; only the last, whole list removes c.
    let changed = |f: &Follower| {
        f.cluster.index().pod("uid-b").is_some_and(|(p, _)| p.addresses[0].to_string() == "10.0.0.22")
    };
    follower.until("the page", changed).await;
    assert_eq!(follower.pods(), ["uid-a", "uid-b", "uid-c"]);
    follower.until("the whole list", |f| f.pods() == ["uid-a", "uid-b"]).await;
    assert!(played.0.lock().lists.is_empty(), "all broken lists came before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_is_refused_as_gone_begins_anew_with_a_list() {
    let played = Played::new();
    played.0.lock().objects.insert(PODS, vec![pod("a", "10.0.0.1")]);
    played.0.lock().refuse_first_place = Some(410);
    let follower = Follower::start(&played);
    follower.until("the refused watch", |f| f.cluster.loaded()).await;
    played.set(PODS, vec![pod("b", "10.0.0.2")]);
    follower.until("the list from the next place", |f| f.pods() == ["uid-b"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_that_is_refused_again_and_again_is_given_up() {
    // As an API server whose store was restored from a backup answers: the place is in its future.
    let played = Played::new();
    played.0.lock().objects.insert(PODS, vec![pod("a", "10.0.0.1")]);
    played.0.lock().refuse_first_place = Some(504);
    let follower = Follower::start(&played);
    follower.until("the first list", |f| f.cluster.loaded()).await;
    played.set(PODS, vec![pod("b", "10.0.0.2")]);
    follower.until("the list from the next place", |f| f.pods() == ["uid-b"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_list_of_what_was_not_empty_is_believed_when_it_comes_twice() {
    let played = Played::new();
    played.set(PODS, vec![pod("a", "10.0.0.1")]);
    let follower = Follower::ready(&played).await;
    // Once empty by mistake: nothing happens.
    played.0.lock().lists.push_back(Answer::Page(Vec::new(), ""));
    played.lose_place();
    let distrusted = "sockmesh_controller_distrusted_lists_total{object=\"Pod\"}";
    follower.until("the doubt", |f| f.metric(distrusted) == 1.0).await;
    assert_eq!(follower.pods(), ["uid-a"]);
    follower.until("the watch after the second list", |_| played.watches(PODS)).await;
    follower
        .until("the second list", |f| f.metric("sockmesh_controller_relists_total{object=\"Pod\"}") == 3.0)
        .await;
    assert_eq!(follower.pods(), ["uid-a"]);
    // Empty for good.
    played.set(PODS, Vec::new());
    follower.until("the watch", |_| played.watches(PODS)).await;
    played.lose_place();
    follower.until("the pods to be gone", |f| f.pods().is_empty()).await;
    assert_eq!(follower.metric(distrusted), 2.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_makes_no_sense_leaves_the_others_and_its_own_last_good_form() {
    let played = Played::new();
    played.set(PODS, vec![pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]);
    let follower = Follower::ready(&played).await;
    let mut odd_type = pod("b", "10.0.0.2");
    odd_type["spec"]["hostNetwork"] = json!("yes");
    for (bad, field) in [(pod("b", "ten"), "status.podIPs[0].ip"), (odd_type, "spec.hostNetwork")] {
        played.tell(PODS, json!({"type": "MODIFIED", "object": bad}));
        played.tell(PODS, json!({"type": "MODIFIED", "object": pod("a", "10.0.0.7")}));
        let told =
            |f: &Follower| f.cluster.source().invalid.get("Pod shop/b").is_some_and(|p| p.contains(field));
        follower.until(field, told).await;
    }
    let address = |uid: &str| follower.cluster.index().pod(uid).unwrap().0.addresses[0].to_string();
    follower.until("the good object", |_| address("uid-a") == "10.0.0.7").await;
    assert_eq!(address("uid-b"), "10.0.0.2");
    assert_eq!(follower.metric("sockmesh_controller_invalid_objects_total{object=\"Pod\"}"), 2.0);
    assert_eq!(follower.metric("sockmesh_controller_invalid_objects_now"), 1.0);

    // Bad in a list as well: it is there, so it is not gone.
    played.set(PODS, vec![pod("a", "10.0.0.7"), pod("b", "ten")]);
    played.lose_place();
    follower
        .until("the list", |f| f.metric("sockmesh_controller_relists_total{object=\"Pod\"}") == 2.0)
        .await;
    assert_eq!(follower.pods(), ["uid-a", "uid-b"]);
    follower.until("the watch", |_| played.watches(PODS)).await;
    played.tell(PODS, json!({"type": "MODIFIED", "object": pod("b", "10.0.0.9")}));
    follower.until("the mended object", |_| address("uid-b") == "10.0.0.9").await;
    assert!(follower.cluster.source().invalid.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denial_is_told_at_once_and_changes_only_its_part_of_a_long_list() {
    let played = Played::new();
    let follower = Follower::ready(&played).await;
    let (cluster, until) = (&follower.cluster, OffsetDateTime::now_utc() + Duration::from_secs(3600));
    let denied = |f: &Follower| f.metric("sockmesh_controller_denied_pods");
    for i in 0..3000 {
        cluster.shared.deny(&format!("gone-{i}"), until);
    }
    cluster.deny_list_changed();
    assert_eq!(denied(&follower), 3000.0);
    let seq = cluster.store.seq();
    cluster.shared.deny("one-more", until);
    cluster.deny_list_changed();
    assert_eq!(denied(&follower), 3001.0);
    let changed = cluster.store.since(TRUST_TYPE, seq, 0, 10).unwrap().names;
    let part = Denied::part_of("one-more");
    assert_eq!(changed.iter().map(|name| &**name).collect::<Vec<_>>(), [Denied::name_of(part)]);
    let told = cluster.store.get(TRUST_TYPE, &changed[0]).unwrap();
    let Ok(Resource::Denied(told)) = Resource::decode(TRUST_TYPE, &changed[0], &told.bytes) else { panic!() };
    assert!(told.has_pod("one-more") && told.pods.len() < 100);
    cluster.prune(OffsetDateTime::now_utc() + Duration::from_secs(7200));
    assert_eq!(denied(&follower), 0.0);
    assert!(cluster.store.get(TRUST_TYPE, &changed[0]).is_none(), "empty parts are gone");
}
