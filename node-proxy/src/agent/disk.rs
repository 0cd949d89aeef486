//! What survives a restart of the agent, in the state directory.
//!
//! ```text
//! config            last good resources: magic, checksum, protobuf
//! tunnels           what is known of tunnels between nodes, in the same form
//! cni.json          who is in the mesh, for the CNI plugin
//! cni-socket        the socket that this agent's entry in a chain of CNI plugins names
//! pods.json         enrolled pods: UID, path and cookie of the network namespace
//! certificates/UID  a pod's certificate (public) and the name of its key in keyd
//! node-key.pem      the node's own key, 0600
//! node-chain.pem    and its certificate
//! ```
//! Files are replaced whole (write, sync, rename). A file that cannot be understood is reported and treated as absent:
//! everything in it can be had again from the controller or by enrolling.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mesh_api::codec::{RESOURCE_TYPES, content_version};
use mesh_api::model::Resource;
use parking_lot::Mutex;
use prost::Message;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use sockmesh_cni::Knowledge;

use super::mesh::{Changes, Stored};

/// First bytes of `config`: what it is and the version of its form.
const MAGIC: &[u8] = b"sockmesh-config-1\n";

#[derive(Clone, PartialEq, prost::Message)]
struct Snapshot {
    #[prost(message, repeated, tag = "1")]
    resources: Vec<SnapshotResource>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SnapshotResource {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(string, tag = "3")]
    version: String,
    #[prost(bytes = "bytes", tag = "4")]
    value: bytes::Bytes,
}

/// An enrolled pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PodRecord {
    /// `metadata.uid`.
    pub(super) uid: String,
    /// Path of its network namespace.
    pub(super) netns: PathBuf,
    /// Cookie of that namespace: tells it from another one under the same path.
    pub(super) cookie: u64,
}

/// A pod's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CertificateRecord {
    /// Name of the key in keyd.
    pub(super) key_id: String,
    /// DER, leaf first.
    pub(super) chain: Vec<Vec<u8>>,
    /// Seconds since the epoch.
    pub(super) issued: i64,
    /// Seconds since the epoch.
    pub(super) not_after: i64,
}

impl CertificateRecord {
    /// The certificate and those above it.
    pub(super) fn chain(&self) -> Vec<CertificateDer<'_>> {
        self.chain.iter().map(|der| CertificateDer::from(&der[..])).collect()
    }
}

/// How writing goes.
#[derive(Debug, Default)]
struct Health {
    failures: AtomicU64,
    /// Another agent writes here.
    others: AtomicBool,
    /// What could not be written and still is not, by file.
    unwritten: Mutex<BTreeMap<PathBuf, String>>,
    turn: tokio::sync::Mutex<()>,
}

/// The state directory. A disk that takes nothing more stops nothing: what is not written is still in memory, and is
/// written once that works again.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    dir: PathBuf,
    health: Arc<Health>,
}

fn about(path: &Path, what: &str, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("cannot {what} {}: {e}", path.display()))
}

/// Makes a directory that only root may enter.
///
/// # Errors
/// With the path.
pub(super) fn make_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| about(path, "make", &e))
}

/// UIDs become file names; Kubernetes makes them of hex digits and dashes.
fn is_file_name(uid: &str) -> bool {
    !uid.is_empty()
        && uid.len() <= 128
        && uid.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && !uid.starts_with('.')
}

impl Disk {
    /// Opens the directory, making it if it is not there.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        make_private_dir(dir)?;
        make_private_dir(&dir.join("certificates"))?;
        Ok(Self { dir: dir.to_owned(), health: Arc::default() })
    }

    /// Of the agents of a node, only the one in charge of it writes; what another would write is left out.
    pub(super) fn write_if(&self, in_charge: bool) {
        self.health.others.store(!in_charge, Ordering::Relaxed);
    }

    /// Whether this agent writes.
    pub(super) fn is_written(&self) -> bool {
        !self.health.others.load(Ordering::Relaxed)
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if self.health.others.load(Ordering::Relaxed) {
            return Ok(());
        }
        let temporary = path.with_extension("new");
        let write = || {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, path)?;
            // The rename itself is only on disk when the directory is.
            File::open(path.parent().unwrap_or(&self.dir))?.sync_all()
        };
        let written = write().map_err(|e| about(path, "write", &e));
        let mut unwritten = self.health.unwritten.lock();
        match &written {
            Ok(()) => drop(unwritten.remove(path)),
            Err(error) => {
                // Half a file only takes room.
                let _ = fs::remove_file(&temporary);
                self.health.failures.fetch_add(1, Ordering::Relaxed);
                unwritten.insert(path.to_owned(), error.to_string());
            }
        }
        written
    }

    /// Writes that failed so far.
    pub(super) fn failures(&self) -> u64 {
        self.health.failures.load(Ordering::Relaxed)
    }

    /// What could not be written and still is not.
    pub(super) fn unwritten(&self) -> Vec<String> {
        self.health.unwritten.lock().values().cloned().collect()
    }

    /// `None` when there is no such file.
    fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
        match fs::read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(about(path, "read", &e)),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if self.health.others.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.health.unwritten.lock().remove(path);
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(about(path, "remove", &e)),
            _ => Ok(()),
        }
    }

    /// Waits until nobody else writes what is known, of which some is in two hands. Who has its turn looks at what there is to
    /// write then, so that nothing newer is overwritten.
    pub(super) async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.health.turn.lock().await
    }

    /// Keeps the resources, of which those of tunnels are in a file of their own.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn save_config(&self, resources: Vec<(&'static str, String, Stored)>) -> io::Result<()> {
        self.save(&self.dir.join("config"), resources)
    }

    /// Keeps what is known of tunnels between nodes. That is small where all else is large and written seldom: with keys of
    /// half a minute ago an agent would take working sessions from its tunnel.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn save_tunnels(&self, resources: Vec<(&'static str, String, Stored)>) -> io::Result<()> {
        self.save(&self.dir.join("tunnels"), resources)
    }

    /// Forgets what was known of tunnels.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn forget_tunnels(&self) -> io::Result<()> {
        self.remove(&self.dir.join("tunnels"))
    }

    fn save(&self, path: &Path, resources: Vec<(&'static str, String, Stored)>) -> io::Result<()> {
        let snapshot = Snapshot {
            resources: resources
                .into_iter()
                .map(|(type_url, name, stored)| SnapshotResource {
                    type_url: type_url.to_owned(),
                    name,
                    version: stored.version,
                    value: stored.value,
                })
                .collect(),
        };
        let body = snapshot.encode_to_vec();
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(content_version(&body).as_bytes());
        bytes.push(b'\n');
        bytes.extend_from_slice(&body);
        self.replace(path, &bytes)
    }

    /// The resources as one set of changes, those of tunnels only where they are wanted; empty when there are none.
    ///
    /// # Errors
    /// When the file is unreadable, damaged, or of another form.
    pub(super) fn load_config(&self, with_tunnels: bool) -> io::Result<Changes> {
        let Some(mut changes) = Self::load(&self.dir.join("config"))? else { return Ok(Changes::default()) };
        if with_tunnels && let Some(tunnels) = Self::load(&self.dir.join("tunnels"))? {
            // Some were in the other file once.
            changes.upserts.retain(|(resource, _)| !matches!(resource, Resource::NodeTunnel(_)));
            changes.upserts.extend(tunnels.upserts);
        }
        Ok(changes)
    }

    fn load(path: &Path) -> io::Result<Option<Changes>> {
        let Some(bytes) = Self::read(path)? else { return Ok(None) };
        let damaged = |what: &str| io::Error::other(format!("{} {what}", path.display()));
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| damaged("is of another form"))?;
        let end = memchr::memchr(b'\n', rest).ok_or_else(|| damaged("is cut short"))?;
        let (checksum, body) = (&rest[..end], &rest[end + 1..]);
        if checksum != content_version(body).as_bytes() {
            return Err(damaged("does not match its checksum"));
        }
        let snapshot = Snapshot::decode(body).map_err(|e| damaged(&format!("is not protobuf: {e}")))?;
        let mut changes = Changes::default();
        for r in snapshot.resources {
            if !RESOURCE_TYPES.contains(&r.type_url.as_str()) {
                continue;
            }
            let resource = Resource::decode(&r.type_url, &r.name, &r.value).map_err(io::Error::other)?;
            changes.upserts.push((resource, r.version));
        }
        Ok(Some(changes))
    }

    /// Keeps the list of enrolled pods.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn save_pods(&self, pods: &[PodRecord]) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(pods).map_err(io::Error::other)?;
        self.replace(&self.dir.join("pods.json"), &text)
    }

    /// The enrolled pods of the agent's last life.
    ///
    /// # Errors
    /// When the file is unreadable or damaged.
    pub(super) fn load_pods(&self) -> io::Result<Vec<PodRecord>> {
        let path = self.dir.join("pods.json");
        match Self::read(&path)? {
            None => Ok(Vec::new()),
            Some(text) => serde_json::from_slice(&text)
                .map_err(|e| io::Error::other(format!("{} is damaged: {e}", path.display()))),
        }
    }

    /// Keeps what the CNI plugin is to know while no agent runs.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn save_knowledge(&self, knowledge: &Knowledge) -> io::Result<()> {
        let text = serde_json::to_vec(knowledge).map_err(io::Error::other)?;
        self.replace(&self.dir.join("cni.json"), &text)
    }

    /// What the CNI plugin knows; none before the first time.
    ///
    /// # Errors
    /// When the file is unreadable or damaged.
    pub(super) fn load_knowledge(&self) -> io::Result<Option<Knowledge>> {
        let path = self.dir.join("cni.json");
        if path.exists() { Knowledge::read(&path).map(Some) } else { Ok(None) }
    }

    fn certificate_path(&self, uid: &str) -> io::Result<PathBuf> {
        if is_file_name(uid) {
            Ok(self.dir.join("certificates").join(uid))
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("pod UID {uid:?} may only hold letters, digits, '-', '_' and '.'"),
            ))
        }
    }

    /// Keeps a pod's certificate.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn save_certificate(&self, uid: &str, record: &CertificateRecord) -> io::Result<()> {
        let text = serde_json::to_vec(record).map_err(io::Error::other)?;
        self.replace(&self.certificate_path(uid)?, &text)
    }

    /// A pod's certificate of the agent's last life.
    ///
    /// # Errors
    /// When the file is unreadable or damaged.
    pub(super) fn load_certificate(&self, uid: &str) -> io::Result<Option<CertificateRecord>> {
        let path = self.certificate_path(uid)?;
        match Self::read(&path)? {
            None => Ok(None),
            Some(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|e| io::Error::other(format!("{} is damaged: {e}", path.display()))),
        }
    }

    /// Forgets a pod's certificate.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn remove_certificate(&self, uid: &str) -> io::Result<()> {
        self.remove(&self.certificate_path(uid)?)
    }

    /// Keeps the node's key and certificate (PEM).
    ///
    /// # Errors
    /// With the path.
    pub(super) fn save_node_identity(&self, key: &str, chain: &str) -> io::Result<()> {
        // The chain last: a key without its chain is made anew, a chain without its key would be used.
        self.remove(&self.dir.join("node-chain.pem"))?;
        self.replace(&self.dir.join("node-key.pem"), key.as_bytes())?;
        self.replace(&self.dir.join("node-chain.pem"), chain.as_bytes())
    }

    /// The node's key and certificate (PEM).
    ///
    /// # Errors
    /// When a file is unreadable or not text.
    pub(super) fn load_node_identity(&self) -> io::Result<Option<(String, String)>> {
        let text = |name: &str| {
            let path = self.dir.join(name);
            Self::read(&path)?
                .map(|b| {
                    String::from_utf8(b)
                        .map_err(|_| io::Error::other(format!("{} is not text", path.display())))
                })
                .transpose()
        };
        Ok(text("node-key.pem")?.zip(text("node-chain.pem")?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_api::model::{NODE_TUNNEL_TYPE, NodeTunnel, Trust, TunnelKey};

    use crate::agent::mesh::Mesh;
    use crate::agent::mesh::tests::workload;

    fn disk() -> (tempfile::TempDir, Disk) {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(&dir.path().join("state")).unwrap();
        (dir, disk)
    }

    fn mesh() -> Mesh {
        let mut mesh = Mesh::new("n1".to_owned());
        mesh.apply(Changes {
            upserts: vec![
                (workload("a", "n1"), "v1".to_owned()),
                (
                    Resource::Trust(Trust {
                        trust_domain: "cluster.local".into(),
                        roots: vec![[1, 2, 3].into()],
                    }),
                    "v2".to_owned(),
                ),
            ],
            removals: Vec::new(),
        });
        mesh
    }

    #[test]
    fn resources_and_their_versions_survive_a_round_trip() {
        let (_dir, disk) = disk();
        assert!(disk.load_config(true).unwrap().upserts.is_empty(), "nothing was saved yet");
        disk.save_config(mesh().export()).unwrap();
        let mut again = Mesh::new("n1".to_owned());
        again.apply(disk.load_config(true).unwrap());
        assert_eq!(again.known(), mesh().known());
        assert!(again.local("a").is_some());
    }

    #[test]
    fn what_is_known_of_tunnels_is_as_new_as_its_own_file_whatever_the_clock_says() {
        let (dir, disk) = disk();
        let tunnel = |node: &str, generation| {
            let key = TunnelKey { generation, public_key: [1; 32], ports: [1, 1] };
            let addresses = vec!["192.0.2.1".parse().unwrap()];
            let tunnel =
                NodeTunnel { node: node.into(), addresses, keys: vec![key], ..NodeTunnel::default() };
            Resource::NodeTunnel(tunnel)
        };
        let mut known = mesh();
        let upserts = [tunnel("n1", 1), tunnel("n2", 1)].map(|tunnel| (tunnel, "v1".to_owned()));
        known.apply(Changes { upserts: upserts.into(), removals: Vec::new() });
        disk.save_tunnels(known.export_tunnels()).unwrap();
        disk.save_config(known.export()).unwrap();

        let generations = || -> std::io::Result<Vec<(String, u64)>> {
            let mut again = Mesh::new("n1".to_owned());
            again.apply(disk.load_config(true)?);
            assert!(again.local("a").is_some() && again.trust().is_some());
            let all = again.tunnels();
            let all = all.this.iter().chain(&all.others);
            Ok(all.map(|t| (t.node.to_string(), t.keys[0].generation)).collect())
        };
        assert_eq!(generations().unwrap(), [("n1".to_owned(), 1), ("n2".to_owned(), 1)]);
        let removals = vec![(NODE_TUNNEL_TYPE, "n1".to_owned())];
        known.apply(Changes { upserts: vec![(tunnel("n2", 2), "v2".to_owned())], removals });
        disk.save_tunnels(known.export_tunnels()).unwrap();
        let tunnels = dir.path().join("state/tunnels");
        let before = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
        File::options().write(true).open(&tunnels).unwrap().set_modified(before).unwrap();
        assert_eq!(generations().unwrap(), [("n2".to_owned(), 2)]);
        // Who takes half a file for no tunnels sends in clear text; who wants none needs none of it.
        let good = fs::read(&tunnels).unwrap();
        fs::write(&tunnels, &good[..good.len() - 1]).unwrap();
        assert!(generations().unwrap_err().to_string().contains("tunnels"));
        assert!(disk.load_config(false).is_ok());
        disk.forget_tunnels().unwrap();
        assert_eq!(generations().unwrap(), []);
    }

    #[test]
    fn a_damaged_file_is_an_error_and_never_half_a_state() {
        let (dir, disk) = disk();
        disk.save_config(mesh().export()).unwrap();
        let path = dir.path().join("state/config");
        let good = fs::read(&path).unwrap();
        for cut in 0..good.len() {
            fs::write(&path, &good[..cut]).unwrap();
            assert!(disk.load_config(true).is_err(), "cut at {cut} of {}", good.len());
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(disk.load_config(true).is_err(), "bit flipped in byte {at}");
        }
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_named_until_it_is() {
        let (dir, disk) = disk();
        // Nothing replaces a directory.
        let target = dir.path().join("state/pods.json");
        fs::create_dir(&target).unwrap();
        for failures in 1..=2 {
            let error = disk.save_pods(&[]).unwrap_err().to_string();
            assert!(error.contains("cannot write") && error.contains("pods.json"), "{error}");
            assert_eq!((disk.failures(), disk.unwritten()), (failures, vec![error]));
        }
        assert!(!dir.path().join("state/pods.new").exists(), "half a file takes room");
        fs::remove_dir(&target).unwrap();
        disk.save_pods(&[]).unwrap();
        assert_eq!((disk.failures(), disk.unwritten()), (2, Vec::new()));
    }

    #[test]
    fn a_uid_that_is_a_path_is_refused() {
        let (_dir, disk) = disk();
        for bad in ["", "..", "../x", "a/b", ".hidden", "a\0"] {
            assert!(disk.load_certificate(bad).is_err(), "{bad:?}");
        }
    }
}
