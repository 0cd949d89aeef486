//! One object of the API server, reduced as it is read, understood or not.
//!
//! A list is read object by object: one whose fields are not what they should be says so and leaves the others alone, and
//! the full form of a pod, of which the mesh needs a tenth, is gone before the next one is read.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::api::ObjectMeta;
use kube::core::Resource;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error as _};

use crate::index::object::{Invalid, Kind, Object, ObjectKey};

/// Types that a watch is opened for.
pub trait Watched:
    Resource<DynamicType = ()> + DeserializeOwned + Clone + fmt::Debug + Send + Sync + 'static
where
    Object: for<'a> TryFrom<&'a Self, Error = Invalid>,
{
    /// Its kind in the index.
    const KIND: Kind;
    /// An API server of a supported version may be without it, which is the same as one without any object of it.
    const OPTIONAL: bool = false;
}

impl Watched for core::Namespace {
    const KIND: Kind = Kind::Namespace;
}
impl Watched for core::Node {
    const KIND: Kind = Kind::Node;
}
impl Watched for core::ServiceAccount {
    const KIND: Kind = Kind::ServiceAccount;
}
impl Watched for core::Pod {
    const KIND: Kind = Kind::Pod;
}
impl Watched for core::Service {
    const KIND: Kind = Kind::Service;
}
impl Watched for discovery::EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
}
impl Watched for networking::ServiceCIDR {
    const KIND: Kind = Kind::ServiceCidr;
    const OPTIONAL: bool = true;
}

/// An object as it was read.
#[derive(Debug, Clone)]
pub struct Seen<K> {
    /// Namespace, name and resource version; the rest is dropped.
    meta: ObjectMeta,
    /// What the index needs of it.
    pub object: Result<Object, Invalid>,
    of: PhantomData<fn() -> K>,
}

/// What a watch needs of any object.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    #[serde(default)]
    metadata: NamedMeta,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NamedMeta {
    name: Option<String>,
    namespace: Option<String>,
    resource_version: Option<String>,
}

impl<K: Watched> Seen<K>
where
    Object: for<'a> TryFrom<&'a K, Error = Invalid>,
{
    /// Which object it is.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let text = |part: &Option<String>| part.as_deref().unwrap_or_default().into();
        ObjectKey { kind: K::KIND, namespace: text(&self.meta.namespace), name: text(&self.meta.name) }
    }
}

impl<'de, K: Watched> Deserialize<'de> for Seen<K>
where
    Object: for<'a> TryFrom<&'a K, Error = Invalid>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        // Without a name nobody could say which object is bad; that is an error of the whole answer.
        let Named { metadata } = Named::deserialize(&value).map_err(D::Error::custom)?;
        let meta = ObjectMeta {
            name: metadata.name,
            namespace: metadata.namespace,
            resource_version: metadata.resource_version,
            ..ObjectMeta::default()
        };
        let object = serde_path_to_error::deserialize::<_, K>(value)
            .map_err(|e| Invalid { field: e.path().to_string(), problem: e.into_inner().to_string() })
            .and_then(|typed| Object::try_from(&typed));
        Ok(Self { meta, object, of: PhantomData })
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Seen<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}
