//! The certificates of the node's pods, and the TLS configurations that show them.
//!
//! A configuration is made once for each pod and list of protocols. It looks the pod's certificate and the trust bundle
//! up when a handshake begins, so that neither a renewed certificate nor another bundle means making it again.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use mesh_api::identity::SpiffeId;
use parking_lot::{Mutex, RwLock};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};
use rustls_pki_types::CertificateDer;
use tokio::sync::Notify;

use super::peer::peer_identity;
use super::provider::provider;
use super::refusal::Refusal;
use super::signer::{KeydKey, SignChannels};
use super::trust::TrustHandle;
use super::verifier::{VerifyClient, VerifyServer};

/// A pod's certificate and the way to its key.
#[derive(Debug)]
struct Svid {
    certified: Arc<CertifiedKey>,
    spiffe: SpiffeId,
    not_after_unix: i64,
}

/// Why a certificate is not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SvidError {
    /// Not the certificate of a workload.
    #[error("certificate for pod {0} is not that of a workload: {1}")]
    NotWorkload(String, Box<Refusal>),
    /// The certificate bears the UID of another pod.
    #[error("certificate for pod {pod} bears the UID of pod {bears}")]
    OtherPod {
        /// The pod it was brought for.
        pod: String,
        /// The pod it was issued for.
        bears: String,
    },
}

/// Protocols in order of preference, most preferred first, as in ALPN.
type Protocols = Vec<Vec<u8>>;

#[derive(Debug, Default)]
struct Pod {
    current: ArcSwapOption<Svid>,
    servers: Mutex<Vec<(Protocols, Arc<ServerConfig>)>>,
    clients: Mutex<Vec<(Protocols, ClientConfig)>>,
}

/// Shows the pod's current certificate, whatever name or root the peer asks for.
#[derive(Debug)]
struct Current(Arc<Pod>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.certified()
    }
}

impl ResolvesClientCert for Current {
    fn resolve(&self, _root_hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.certified()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl Pod {
    fn certified(&self) -> Option<Arc<CertifiedKey>> {
        self.current.load().as_ref().map(|svid| Arc::clone(&svid.certified))
    }
}

/// The certificates of all pods of the node.
#[derive(Debug)]
pub struct SvidStore {
    pods: RwLock<HashMap<Arc<str>, Arc<Pod>>>,
    /// Some pod has got a certificate.
    came: Notify,
    trust: TrustHandle,
    channels: Arc<SignChannels>,
}

impl SvidStore {
    /// None yet.
    #[must_use]
    pub fn new(trust: TrustHandle, channels: Arc<SignChannels>) -> Self {
        Self { pods: RwLock::default(), came: Notify::new(), trust, channels }
    }

    /// Gives a pod its certificate (leaf first, DER), or another one, which the next handshake shows.
    ///
    /// # Errors
    /// [`SvidError`], and the certificate in use stays so.
    pub fn set(
        &self,
        uid: &str,
        chain_der: Vec<Vec<u8>>,
        key_id: &str,
        not_after_unix: i64,
    ) -> Result<(), SvidError> {
        let chain: Vec<CertificateDer<'static>> = chain_der.into_iter().map(CertificateDer::from).collect();
        let own = peer_identity(&chain).map_err(|e| SvidError::NotWorkload(uid.to_owned(), Box::new(e)))?;
        if let Some(bears) = own.pod_uid.filter(|bears| **bears != *uid) {
            return Err(SvidError::OtherPod { pod: uid.to_owned(), bears: bears.to_string() });
        }
        let key = KeydKey { key_id: key_id.into(), channels: Arc::clone(&self.channels) };
        let certified = Arc::new(CertifiedKey::new(chain, Arc::new(key)));
        let svid = Arc::new(Svid { certified, spiffe: own.spiffe, not_after_unix });
        let pod = Arc::clone(self.pods.write().entry(uid.into()).or_default());
        pod.current.store(Some(svid));
        self.came.notify_waiters();
        Ok(())
    }

    /// Completes when the pod has a certificate.
    pub async fn certified(&self, uid: &str) {
        loop {
            let mut came = pin!(self.came.notified());
            // From here on nothing is missed.
            came.as_mut().enable();
            if self.identity(uid).is_some() {
                return;
            }
            came.await;
        }
    }

    /// Forgets a pod. Handshakes that it has under way may still finish or fail.
    pub fn remove(&self, uid: &str) {
        if let Some(pod) = self.pods.write().remove(uid) {
            // Configurations that are still in somebody's hands must not show it either.
            pod.current.store(None);
        }
    }

    /// Who a pod is.
    #[must_use]
    pub fn identity(&self, uid: &str) -> Option<SpiffeId> {
        let pod = Arc::clone(self.pods.read().get(uid)?);
        pod.current.load().as_ref().map(|svid| svid.spiffe.clone())
    }

    /// Every pod with the end of its certificate's validity (Unix time, seconds).
    #[must_use]
    pub fn expiries(&self) -> Vec<(Arc<str>, i64)> {
        let end = |(uid, pod): (&Arc<str>, &Arc<Pod>)| {
            pod.current.load().as_ref().map(|svid| (Arc::clone(uid), svid.not_after_unix))
        };
        self.pods.read().iter().filter_map(end).collect()
    }

    /// What a pod accepts connections with.
    ///
    /// # Errors
    /// [`Refusal::NoOwnCertificate`].
    pub fn server_config(&self, uid: &str, protocols: &[&[u8]]) -> Result<Arc<ServerConfig>, Refusal> {
        let pod = self.pod(uid)?;
        let mut servers = pod.servers.lock();
        if let Some((_, config)) = servers.iter().find(|(known, _)| known == protocols) {
            return Ok(Arc::clone(config));
        }
        let verifier = Arc::new(VerifyClient { trust: self.trust.clone() });
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has suites of TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(Current(Arc::clone(&pod))));
        config.alpn_protocols = owned(protocols);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        let config = Arc::new(config);
        servers.push((owned(protocols), Arc::clone(&config)));
        Ok(config)
    }

    /// What a pod makes one connection with, to `expected` and nobody else.
    ///
    /// # Errors
    /// [`Refusal::NoOwnCertificate`].
    pub fn client_config(
        &self,
        uid: &str,
        expected: &SpiffeId,
        protocols: &[&[u8]],
    ) -> Result<Arc<ClientConfig>, Refusal> {
        let pod = self.pod(uid)?;
        let verifier = Arc::new(VerifyServer { trust: self.trust.clone(), expected: expected.clone() });
        let mut clients = pod.clients.lock();
        let mut config = match clients.iter().find(|(known, _)| known == protocols) {
            // A handful of counted pointers; all that is costly in a configuration is shared.
            Some((_, config)) => config.clone(),
            None => {
                let mut config = ClientConfig::builder_with_provider(provider())
                    .with_protocol_versions(&[&TLS13])
                    .expect("the provider has suites of TLS 1.3")
                    .dangerous()
                    .with_custom_certificate_verifier(Arc::clone(&verifier) as _)
                    .with_client_cert_resolver(Arc::new(Current(Arc::clone(&pod))));
                config.alpn_protocols = owned(protocols);
                config.resumption = Resumption::disabled();
                config.enable_early_data = false;
                config.enable_sni = false;
                clients.push((owned(protocols), config.clone()));
                config
            }
        };
        config.dangerous().set_certificate_verifier(verifier);
        Ok(Arc::new(config))
    }

    fn pod(&self, uid: &str) -> Result<Arc<Pod>, Refusal> {
        let pod = self.pods.read().get(uid).map(Arc::clone);
        pod.filter(|pod| pod.current.load().is_some()).ok_or_else(|| Refusal::NoOwnCertificate(uid.into()))
    }
}

fn owned(protocols: &[&[u8]]) -> Protocols {
    protocols.iter().map(|p| p.to_vec()).collect()
}
