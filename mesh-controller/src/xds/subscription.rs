//! What one stream has been told of one type, and what it is to be told next. Pure.
//!
//! At most one response is under way; the next is made when the node has answered it, from the state as it is then. So a
//! node that is slow gets fewer and larger responses instead of a queue.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_api::codec::REJECTION_TYPE;
use mesh_api::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use mesh_api::proto::mesh::Rejection;
use mesh_api::proto::{Any, Status};
use prost::Message as _;

use super::store::{FellBehind, Store};

/// Bytes of resources in a response; the last one may go beyond. The transport keeps room for the largest response of each
/// connection, so that this times some four is what a node costs.
pub const RESPONSE_BYTES: usize = 64 << 10;
/// Names in a response, for removals weigh nothing in bytes of resources; also the names that are due at a time, so that a
/// stream costs the same however large the state is that it is told.
pub const RESPONSE_NAMES: usize = 1000;

/// Pause before a node is told again what it has rejected: another version of it may be running, or what was in the way gone.
pub const REFUSED_AGAIN: Duration = Duration::from_secs(30);
/// Characters kept of a node's reason.
const REASON: usize = 4096;

/// What a node answered to a response.
#[derive(Debug, PartialEq, Eq)]
pub enum Answered {
    /// Nothing: a change of the subscription only, or an answer to a response that is not under way.
    Nothing,
    /// It applied the response. With it the node has everything up to change number `to`, 0 while parts of its first state
    /// are still to come. What this stream had acknowledged before, or began with, went up to `from`.
    Ack {
        /// Before.
        from: u64,
        /// Now; as before while there is something that it has rejected.
        to: u64,
        /// Whether it has rejected nothing that it was told.
        whole: bool,
    },
    /// It did not.
    Nack {
        /// Its reason.
        message: String,
        /// What it says it is about, else all that was in the response.
        names: Vec<String>,
    },
}

/// The resources that a NACK is about, if it says so.
fn rejected(status: &Status) -> Option<Vec<String>> {
    let detail = status.details.iter().find(|detail| detail.type_url == REJECTION_TYPE)?;
    let rejection = Rejection::decode(detail.value.clone()).ok()?;
    let names: Vec<String> = rejection.resources.into_iter().map(|r| r.name).collect();
    (!names.is_empty()).then_some(names)
}

#[derive(Debug)]
struct UnderWay {
    nonce: String,
    state: u64,
    /// Whether more is to come up to that state.
    more: bool,
    names: Vec<String>,
    sent: Instant,
}

/// One stream's view of one type.
#[derive(Debug)]
pub struct Subscription {
    type_url: &'static str,
    wildcard: bool,
    names: HashSet<String>,
    /// Told up to this change, but for what is in `due`.
    cursor: u64,
    /// There are changes after that which were there when it was looked for them.
    more: bool,
    /// What went up to this change the node has never heard of.
    unknown: u64,
    /// Where it began.
    begun: u64,
    /// The node has everything up to this change; 0 until it has a whole state.
    acknowledged: u64,
    due: VecDeque<Arc<str>>,
    /// What the node has rejected and not taken since.
    refused: BTreeSet<Arc<str>>,
    refused_at: Option<Instant>,
    under_way: Option<UnderWay>,
    /// A response is owed even if it is empty: the node waits to hear that it has everything.
    owed: bool,
    nonces: u64,
}

impl Subscription {
    /// Begins with a stream's first request for a type.
    #[must_use]
    pub fn begin(type_url: &'static str, first: &DeltaDiscoveryRequest, store: &Store) -> Self {
        let named: HashSet<String> =
            first.resource_names_subscribe.iter().filter(|n| *n != "*").cloned().collect();
        // No name at all in the first request means all, for clients of before "*" was written.
        let wildcard = first.resource_names_subscribe.iter().any(|n| n == "*") || named.is_empty();
        let known = &first.initial_resource_versions;
        // Who has nothing and wants everything is told of all changes there ever were, a page at a time.
        let everything = wildcard && named.is_empty() && known.is_empty();
        let (send, remove, begun) = if everything {
            (Vec::new(), Vec::new(), store.seq())
        } else {
            store.difference(type_url, known)
        };
        let mut subscription = Self {
            type_url,
            wildcard,
            names: HashSet::new(),
            cursor: if everything { 0 } else { begun },
            more: false,
            unknown: if everything { begun } else { 0 },
            begun,
            acknowledged: 0,
            due: VecDeque::new(),
            refused: BTreeSet::new(),
            refused_at: None,
            under_way: None,
            owed: true,
            nonces: 0,
        };
        subscription.due.extend(send.into_iter().filter(|n| wildcard || named.contains(&**n)));
        subscription.due.extend(remove);
        subscription.ask_for(named, known);
        subscription
    }

    /// Adds names. Each is answered, also when it does not exist, unless the node has just said that it has it.
    fn ask_for(&mut self, names: HashSet<String>, known: &HashMap<String, String>) {
        for name in names {
            let queued = self.due.iter().any(|d| **d == *name);
            if !known.contains_key(&name) && !queued {
                self.due.push_back(name.as_str().into());
            }
            self.names.insert(name);
        }
    }

    /// Takes a later request of the stream: an answer, a change of names, or both.
    pub fn take(&mut self, request: &DeltaDiscoveryRequest) -> Answered {
        let unsubscribe: HashSet<&String> = request.resource_names_unsubscribe.iter().collect();
        if !unsubscribe.is_empty() {
            self.wildcard &= !request.resource_names_unsubscribe.iter().any(|n| n == "*");
            self.names.retain(|n| !unsubscribe.contains(n));
        }
        let subscribe: HashSet<String> = request.resource_names_subscribe.iter().cloned().collect();
        if !subscribe.is_empty() {
            let (wildcard, named): (HashSet<String>, HashSet<String>) =
                subscribe.into_iter().partition(|n| n == "*");
            if !wildcard.is_empty() && !self.wildcard {
                self.wildcard = true;
                // What changed before is not known to this node any more.
                (self.cursor, self.unknown) = (0, 0);
            }
            self.ask_for(named, &HashMap::new());
        }
        if request.response_nonce.is_empty() {
            return Answered::Nothing;
        }
        match self.under_way.take_if(|u| u.nonce == request.response_nonce) {
            None => Answered::Nothing,
            Some(under_way) => match &request.error_detail {
                None => {
                    let from = self.acknowledged.max(self.begun);
                    for name in &under_way.names {
                        self.refused.remove(name.as_str());
                    }
                    // Taking something else does not make up for what it rejected.
                    let whole = self.refused.is_empty();
                    if !under_way.more && whole {
                        self.acknowledged = from.max(under_way.state);
                    }
                    Answered::Ack { from, to: self.acknowledged, whole }
                }
                Some(status) => {
                    self.refused.extend(under_way.names.iter().map(|name| Arc::from(name.as_str())));
                    self.refused_at = Some(Instant::now());
                    // It may name what it was told, and nothing else.
                    let told: HashSet<&String> = under_way.names.iter().collect();
                    let named = rejected(status).map(|mut names| {
                        names.retain(|name| told.contains(name));
                        names
                    });
                    Answered::Nack {
                        message: status.message.chars().take(REASON).collect(),
                        names: named.filter(|names| !names.is_empty()).unwrap_or(under_way.names),
                    }
                }
            },
        }
    }

    /// Whether there is something that the node has rejected.
    #[must_use]
    pub fn has_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    /// When the response under way was sent.
    #[must_use]
    pub fn sent_at(&self) -> Option<Instant> {
        self.under_way.as_ref().map(|u| u.sent)
    }

    /// The next response, if there is something to say and nothing under way.
    ///
    /// # Errors
    /// [`FellBehind`]: the stream has to end, the node comes back with what it knows.
    pub fn next(&mut self, store: &Store) -> Result<Option<DeltaDiscoveryResponse>, FellBehind> {
        self.next_at(store, Instant::now())
    }

    fn next_at(&mut self, store: &Store, now: Instant) -> Result<Option<DeltaDiscoveryResponse>, FellBehind> {
        if self.under_way.is_some() {
            return Ok(None);
        }
        while self.due.is_empty() {
            let changed = store.since(self.type_url, self.cursor, self.unknown, RESPONSE_NAMES)?;
            (self.cursor, self.more) = (changed.cursor, changed.more);
            let (wildcard, names) = (self.wildcard, &self.names);
            self.due.extend(changed.names.into_iter().filter(|n| wildcard || names.contains(&**n)));
            if !self.more {
                break;
            }
        }
        // In responses of their own: what is rejected again takes nothing else with it.
        if self.due.is_empty() && self.refused_at.is_some_and(|at| now.duration_since(at) >= REFUSED_AGAIN) {
            self.refused_at = None;
            self.due.extend(self.refused.iter().cloned());
        }
        if self.due.is_empty() && !self.owed {
            return Ok(None);
        }
        let mut response =
            DeltaDiscoveryResponse { type_url: self.type_url.to_owned(), ..Default::default() };
        let (mut bytes, mut names) = (0, Vec::new());
        while bytes < RESPONSE_BYTES && names.len() < RESPONSE_NAMES {
            let Some(name) = self.due.pop_front() else { break };
            names.push(name.to_string());
            match store.get(self.type_url, &name) {
                None => response.removed_resources.push(name.to_string()),
                Some(encoded) => {
                    bytes += encoded.bytes.len();
                    response.resources.push(Resource {
                        version: encoded.version.to_string(),
                        name: name.to_string(),
                        resource: Some(Any { type_url: self.type_url.to_owned(), value: encoded.bytes }),
                    });
                }
            }
        }
        self.nonces += 1;
        response.nonce = self.nonces.to_string();
        response.system_version_info = self.cursor.to_string();
        response.more = !self.due.is_empty() || self.more;
        // Whoever was told that there is more also hears of the end.
        self.owed = response.more;
        self.under_way = Some(UnderWay {
            nonce: response.nonce.clone(),
            state: self.cursor,
            more: response.more,
            names,
            sent: Instant::now(),
        });
        Ok(Some(response))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_api::model::{self, WORKLOAD_TYPE, Workload};
    use mesh_api::proto::Status;
    use mesh_api::proto::mesh::RejectedResource;

    fn workload(uid: &str, node: &str) -> model::Resource {
        model::Resource::Workload(Workload {
            uid: uid.into(),
            name: uid.into(),
            namespace: "n".into(),
            service_account: "s".into(),
            node: node.into(),
            ..Workload::default()
        })
    }

    fn store(uids: &[&str]) -> Store {
        let store = Store::default();
        store.update(&uids.iter().map(|u| workload(u, "1")).collect::<Vec<_>>(), &[], None);
        store
    }

    fn first(names: &[&str]) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest { response_nonce: response.nonce.clone(), ..Default::default() }
    }

    fn sent(response: &DeltaDiscoveryResponse) -> Vec<&str> {
        response.resources.iter().map(|r| r.name.as_str()).collect()
    }

    #[test]
    fn the_first_response_has_everything_and_the_next_only_what_changed() {
        let store = store(&["a", "b"]);
        let mut s = Subscription::begin(WORKLOAD_TYPE, &first(&["*"]), &store);
        let response = s.next(&store).unwrap().unwrap();
        assert_eq!((sent(&response), response.more), (vec!["a", "b"], false));
        store.update(&[workload("b", "2")], &[(WORKLOAD_TYPE, "a".to_owned())], None);
        assert_eq!(s.next(&store), Ok(None), "the first is under way");
        assert!(matches!(s.take(&ack(&response)), Answered::Ack { .. }));
        let response = s.next(&store).unwrap().unwrap();
        assert_eq!(
            (sent(&response), response.removed_resources.as_slice()),
            (vec!["b"], &["a".to_owned()][..])
        );
        s.take(&ack(&response));
        assert_eq!(s.next(&store), Ok(None));
    }

    #[test]
    fn changes_while_a_response_is_under_way_become_one() {
        let store = store(&["a"]);
        let mut s = Subscription::begin(WORKLOAD_TYPE, &first(&["*"]), &store);
        let response = s.next(&store).unwrap().unwrap();
        for node in ["2", "3", "4"] {
            store.update(&[workload("a", node)], &[], None);
        }
        s.take(&ack(&response));
        let response = s.next(&store).unwrap().unwrap();
        assert_eq!(response.resources[0].version, &*store.get(WORKLOAD_TYPE, "a").unwrap().version);
        s.take(&ack(&response));
        assert_eq!(s.next(&store), Ok(None));
    }

    #[test]
    fn someone_who_has_it_all_gets_an_empty_response_that_says_so() {
        let store = store(&["a"]);
        let mut request = first(&["*"]);
        let version = store.get(WORKLOAD_TYPE, "a").unwrap().version.to_string();
        request.initial_resource_versions.insert("a".to_owned(), version);
        let mut s = Subscription::begin(WORKLOAD_TYPE, &request, &store);
        let response = s.next(&store).unwrap().unwrap();
        assert!(response.resources.is_empty() && response.removed_resources.is_empty() && !response.more);
    }

    #[test]
    fn an_empty_store_answers_too() {
        let store = store(&[]);
        let mut s = Subscription::begin(WORKLOAD_TYPE, &first(&[]), &store);
        assert!(s.next(&store).unwrap().is_some());
    }

    #[test]
    fn a_large_state_comes_in_parts_and_the_last_one_says_so() {
        let uids: Vec<String> = (0..RESPONSE_NAMES + 1).map(|i| format!("u{i:06}")).collect();
        let store = store(&uids.iter().map(String::as_str).collect::<Vec<_>>());
        let mut s = Subscription::begin(WORKLOAD_TYPE, &first(&["*"]), &store);
        let (mut got, mut parts) = (0, 0);
        loop {
            let response = s.next(&store).unwrap().unwrap();
            got += response.resources.len();
            parts += 1;
            assert_eq!(s.next(&store), Ok(None), "one at a time");
            s.take(&ack(&response));
            if !response.more {
                break;
            }
        }
        assert_eq!(got, uids.len());
        assert!(parts > 1);
    }

    #[test]
    fn a_rejection_names_what_was_rejected_and_is_not_repeated() {
        let store = store(&["a"]);
        let mut s = Subscription::begin(WORKLOAD_TYPE, &first(&["*"]), &store);
        let response = s.next(&store).unwrap().unwrap();
        let nack = DeltaDiscoveryRequest {
            error_detail: Some(Status { code: 3, message: "no".to_owned(), details: Vec::new() }),
            ..ack(&response)
        };
        assert_eq!(s.take(&nack), Answered::Nack { message: "no".to_owned(), names: vec!["a".to_owned()] });
        assert_eq!(s.next(&store), Ok(None));
        assert_eq!(s.take(&nack), Answered::Nothing, "an answer counts once");
    }

    fn nack(response: &DeltaDiscoveryResponse, about: &[&str]) -> DeltaDiscoveryRequest {
        let resources =
            about.iter().map(|name| RejectedResource { name: (*name).to_owned(), ..Default::default() });
        let rejection = Rejection { resources: resources.collect() };
        let detail = Any { type_url: REJECTION_TYPE.to_owned(), value: rejection.encode_to_vec().into() };
        DeltaDiscoveryRequest {
            error_detail: Some(Status { code: 3, message: "no".repeat(REASON), details: vec![detail] }),
            ..ack(response)
        }
    }

    #[test]
    fn a_node_that_rejected_something_lacks_it_whatever_else_it_takes_and_is_told_again_by_itself() {
        let store = store(&["a"]);
        let mut s = Subscription::begin(WORKLOAD_TYPE, &first(&["*"]), &store);
        let response = s.next(&store).unwrap().unwrap();
        s.take(&ack(&response));
        store.update(&[workload("a", "2"), workload("b", "2")], &[], None);
        let response = s.next(&store).unwrap().unwrap();
        let Answered::Nack { message, names } = s.take(&nack(&response, &["a", "somebody-elses"])) else {
            panic!("it was a rejection")
        };
        assert_eq!((message.len(), names), (REASON, vec!["a".to_owned()]));

        store.update(&[workload("c", "2")], &[], None);
        let response = s.next(&store).unwrap().unwrap();
        assert_eq!(sent(&response), ["c"], "what was rejected takes nothing with it");
        let Answered::Ack { from, to, whole } = s.take(&ack(&response)) else { panic!("it was taken") };
        assert!(from == to && !whole, "it does not have the state up to the change of c");
        assert_eq!(s.next(&store), Ok(None), "not at once");

        let later = Instant::now() + REFUSED_AGAIN;
        let response = s.next_at(&store, later).unwrap().unwrap();
        assert_eq!(sent(&response), ["a", "b"]);
        let Answered::Ack { from, to, whole } = s.take(&ack(&response)) else { panic!("it was taken") };
        assert!(from < to && whole);
        assert_eq!(s.next_at(&store, later + REFUSED_AGAIN), Ok(None));
    }

    #[test]
    fn named_subscriptions_get_only_their_names_and_hear_of_those_that_do_not_exist() {
        let store = store(&["a", "b"]);
        let mut s = Subscription::begin(WORKLOAD_TYPE, &first(&["a", "x"]), &store);
        let response = s.next(&store).unwrap().unwrap();
        assert_eq!(
            (sent(&response), response.removed_resources.as_slice()),
            (vec!["a"], &["x".to_owned()][..])
        );
        s.take(&ack(&response));
        store.update(&[workload("b", "2")], &[], None);
        assert_eq!(s.next(&store), Ok(None));
        s.take(&first(&["b"]));
        assert_eq!(sent(&s.next(&store).unwrap().unwrap()), ["b"]);
    }
}
