//! An index of a whole cluster, and what nodes were told so far of one type of resource.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_api::model::Resource;
use mesh_controller::index::object::{Kind, Object, ObjectKey, Phase, Pod};
use mesh_controller::index::{Delta, Index, IndexConfig};

/// The index, and the resources of the type by name.
pub(crate) struct Told {
    pub(crate) index: Index,
    pub(crate) resources: BTreeMap<String, Resource>,
    type_url: &'static str,
}

impl Told {
    pub(crate) fn of(type_url: &'static str) -> Self {
        let config = IndexConfig {
            cluster_domain: "cluster.local".to_owned(),
            derive_endpoints: false,
            complete: true,
        };
        Self { index: Index::new(config), resources: BTreeMap::new(), type_url }
    }

    pub(crate) fn remove(&mut self, kind: Kind, namespace: &str, name: &str) {
        self.index.remove(&ObjectKey { kind, namespace: namespace.into(), name: name.into() });
    }

    pub(crate) fn commit(&mut self) -> Delta {
        let delta = self.index.commit();
        for resource in delta.upserts.iter().filter(|resource| resource.type_url() == self.type_url) {
            // What nodes would not understand must never be told.
            let (type_url, name, bytes) = resource.encode();
            assert_eq!(Resource::decode(type_url, &name, &bytes).as_ref(), Ok(resource));
            self.resources.insert(name, resource.clone());
        }
        for (_, name) in delta.removals.iter().filter(|(type_url, _)| *type_url == self.type_url) {
            self.resources.remove(name).expect("it was never told");
        }
        delta
    }
}

/// A pod of the namespace `shop` that runs.
pub(crate) fn pod(name: &str, node: &str, address: &str) -> Pod {
    Pod {
        uid: format!("uid-{name}").into(),
        name: name.into(),
        namespace: "shop".into(),
        service_account: "default".into(),
        node: node.into(),
        addresses: vec![address.parse::<IpAddr>().unwrap()],
        phase: Phase::Running,
        ..Pod::default()
    }
}

pub(crate) fn object(pod: Pod) -> Object {
    Object::Pod(Box::new(pod))
}
