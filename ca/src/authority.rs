//! The authority: signs for pods, nodes and the controller's endpoint.
//!
//! Every field of a certificate is built here from the caller's decision; of the request only the public key is used.
//! Leaves: cA false, digitalSignature only, start backdated by [`BACKDATE`], end never after that of any certificate
//! above. Pods get both extended key usages, nodes only that of a client, the controller only that of a server, so that
//! none can stand in for another.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::identity::{POD_UID_SUFFIX, SpiffeId, pod_uid_to_dns_name};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber, SigningKey,
    SubjectPublicKeyInfo,
};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use zeroize::Zeroizing;

use crate::csr::{self, CsrRefusal, Expected};
use crate::load::{self, LoadError};
use crate::log::{Entry, IssuanceLog, Kind, LogError};
use crate::node::{NodeId, NodeIdError};
use crate::serial::Serial;

/// How far the start of validity lies in the past, for peers whose clock is behind.
pub const BACKDATE: Duration = Duration::from_secs(300);

/// Longest life that may be asked for. A stolen key works as long as its certificate.
pub const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 3600);

/// A certificate for a pod, as the caller decided it.
#[derive(Debug, Clone)]
pub struct WorkloadRequest<'a> {
    /// The pod's request, from its node (PKCS #10, DER).
    pub csr_der: &'a [u8],
    /// The identity of the pod.
    pub spiffe_id: SpiffeId,
    /// UID of the pod.
    pub pod_uid: &'a str,
    /// Node that asks, for the log.
    pub node: &'a str,
    /// Life from now on.
    pub ttl: Duration,
}

/// A certificate for a node.
#[derive(Debug, Clone)]
pub struct NodeRequest<'a> {
    /// The node's request (PKCS #10, DER).
    pub csr_der: &'a [u8],
    /// Name of the node, as the caller authenticated it.
    pub node: &'a str,
    /// Life from now on.
    pub ttl: Duration,
}

/// An issued certificate.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The leaf, then intermediates; without the root.
    pub chain_der: Vec<Vec<u8>>,
    /// Serial number.
    pub serial: Serial,
    /// Start of validity.
    pub not_before: OffsetDateTime,
    /// End of validity, which may be earlier than asked for.
    pub not_after: OffsetDateTime,
}

impl Issued {
    /// The chain as PEM.
    #[must_use]
    pub fn chain_pem(&self) -> String {
        self.chain_der.iter().map(|der| to_pem("CERTIFICATE", der)).collect()
    }
}

/// A certificate with the key made for it.
pub struct ServerCertificate {
    /// The certificate.
    pub issued: Issued,
    /// Its key, PKCS #8 PEM.
    pub key_pem: Zeroizing<String>,
}

/// A root made here.
pub struct NewRoot {
    /// The certificate.
    pub certificate_pem: String,
    /// Its key, PKCS #8 PEM.
    pub key_pem: Zeroizing<String>,
}

/// Why nothing was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The request is refused.
    #[error("certificate request refused: {0}")]
    Csr(#[from] CsrRefusal),
    /// The identity belongs to another mesh.
    #[error("{id} is not of the trust domain {own}")]
    TrustDomain {
        /// The identity.
        id: String,
        /// This authority's.
        own: String,
    },
    /// The pod's UID does not fit into a DNS name.
    #[error("pod UID {0:?} is not a DNS label (a-z, 0-9, '-', at most 63 characters)")]
    PodUid(String),
    /// The node's name does not make an identity.
    #[error("{0}")]
    Node(#[from] NodeIdError),
    /// No name, one that is no DNS name, or one that is kept for pods.
    #[error("server name {0:?} cannot stand in a certificate of the controller")]
    ServerName(String),
    /// Zero, or longer than [`MAX_TTL`].
    #[error("life of {0:?} is not between 1 s and {MAX_TTL:?}")]
    Ttl(Duration),
    /// The CA's own certificate is at its end.
    #[error("the CA's certificate is only valid until {0}; rotate or renew it")]
    IssuerExpired(OffsetDateTime),
    /// The log did not take the entry.
    #[error("{0}")]
    Log(#[from] LogError),
    /// Encoding or signing failed.
    #[error("cannot encode or sign the certificate: {0}")]
    Sign(#[from] rcgen::Error),
}

/// The CA's key, wiped from memory when dropped.
struct CaKey(Zeroizing<KeyPair>);

impl PublicKeyData for CaKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for CaKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

/// The authority. Shared between threads; signing takes no lock but the log's.
pub struct Authority {
    trust_domain: Arc<str>,
    issuer: Issuer<'static, CaKey>,
    /// Own certificate first, root last.
    chain: Vec<Vec<u8>>,
    serial: Serial,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    log: Box<dyn IssuanceLog>,
}

/// What differs between the kinds of certificate.
struct Leaf<'a> {
    kind: Kind,
    names: Vec<SanType>,
    usages: Vec<ExtendedKeyUsagePurpose>,
    ttl: Duration,
    node: &'a str,
    pod_uid: &'a str,
}

impl Authority {
    /// Makes a self-signed root. It signs nothing until it is given to [`Self::load`].
    ///
    /// # Errors
    /// When the trust domain is odd or the key cannot be made.
    pub fn make_root(trust_domain: &str, life: Duration, now: OffsetDateTime) -> Result<NewRoot, IssueError> {
        let key = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "sockmesh");
        params.distinguished_name.push(DnType::CommonName, format!("{trust_domain} root"));
        // So that two roots of one mesh have different names, and a verifier tries the right one first.
        let serial = Serial::random();
        params.distinguished_name.push(DnType::OrganizationalUnitName, serial.to_string());
        params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = whole_seconds(now - BACKDATE);
        params.not_after = whole_seconds(now + life);
        let certificate = params.self_signed(&*key)?;
        let key_pem = Zeroizing::new(key.serialize_pem());
        Ok(NewRoot { certificate_pem: certificate.pem(), key_pem })
    }

    /// An authority from the PEM of a CA certificate (its chain up to the root included) and of its key.
    ///
    /// # Errors
    /// [`LoadError`] for anything that is not a valid ECDSA P-256 CA with its whole chain.
    pub fn load(
        trust_domain: &str,
        certificate_pem: &str,
        key_pem: &str,
        now: OffsetDateTime,
        log: impl IssuanceLog + 'static,
    ) -> Result<Self, LoadError> {
        // A workload's parts are the easiest way to have the trust domain checked where its rules live.
        SpiffeId::new(trust_domain, "a", "a").map_err(|_| LoadError::TrustDomain(trust_domain.to_owned()))?;
        let loaded = load::load(certificate_pem, key_pem, now)?;
        let own = loaded.chain[0].as_slice().into();
        let issuer =
            Issuer::from_ca_cert_der(&own, CaKey(loaded.key)).map_err(|_| LoadError::Certificate(1))?;
        Ok(Self {
            trust_domain: trust_domain.into(),
            issuer,
            chain: loaded.chain,
            serial: Serial::from_bytes(&loaded.serial),
            not_before: loaded.not_before,
            not_after: loaded.not_after,
            log: Box::new(log),
        })
    }

    /// As [`Self::load`], from files.
    ///
    /// # Errors
    /// As [`Self::load`], and when a file cannot be read.
    pub fn load_files(
        trust_domain: &str,
        certificate: &Path,
        key: &Path,
        now: OffsetDateTime,
        log: impl IssuanceLog + 'static,
    ) -> Result<Self, LoadError> {
        Self::load(trust_domain, &load::read(certificate)?, &load::read(key)?, now, log)
    }

    /// The mesh's trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The root that peers must trust, DER.
    #[must_use]
    pub fn root_der(&self) -> &[u8] {
        self.chain.last().expect("a loaded chain is not empty")
    }

    /// The root that peers must trust, PEM.
    #[must_use]
    pub fn root_pem(&self) -> String {
        to_pem("CERTIFICATE", self.root_der())
    }

    /// After this nothing is issued any more.
    #[must_use]
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// Issues a certificate for a pod: the URI name is its identity, the DNS name `<uid>.pod.sockmesh.io` its UID.
    ///
    /// # Errors
    /// [`IssueError`].
    pub fn issue_workload(
        &self,
        request: &WorkloadRequest<'_>,
        now: OffsetDateTime,
    ) -> Result<Issued, IssueError> {
        let id = &request.spiffe_id;
        if *id.trust_domain != *self.trust_domain {
            return Err(IssueError::TrustDomain { id: id.to_string(), own: self.trust_domain.to_string() });
        }
        let uid = pod_uid_to_dns_name(request.pod_uid)
            .ok_or_else(|| IssueError::PodUid(request.pod_uid.to_owned()))?;
        let key = csr::check(request.csr_der, Expected::Workload(id))?;
        let leaf = Leaf {
            kind: Kind::Workload,
            names: vec![SanType::URI(ia5(&id.to_string())?), SanType::DnsName(ia5(&uid)?)],
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            ttl: request.ttl,
            node: request.node,
            pod_uid: request.pod_uid,
        };
        self.issue(&SubjectPublicKeyInfo::from_der(&key)?, leaf, now)
    }

    /// Issues a certificate for a node: its only name is the URI `spiffe://<trust-domain>/node/<name>`.
    ///
    /// # Errors
    /// [`IssueError`].
    pub fn issue_node(&self, request: &NodeRequest<'_>, now: OffsetDateTime) -> Result<Issued, IssueError> {
        let id = NodeId::new(&self.trust_domain, request.node)?;
        let key = csr::check(request.csr_der, Expected::Node(&id))?;
        let leaf = Leaf {
            kind: Kind::Node,
            names: vec![SanType::URI(ia5(&id.to_string())?)],
            usages: vec![ExtendedKeyUsagePurpose::ClientAuth],
            ttl: request.ttl,
            node: request.node,
            pod_uid: "",
        };
        self.issue(&SubjectPublicKeyInfo::from_der(&key)?, leaf, now)
    }

    /// Makes a key and issues a certificate for the controller's endpoint under these DNS names and addresses.
    ///
    /// # Errors
    /// [`IssueError`]; [`IssueError::ServerName`] when there is no name, or one that pods could have.
    pub fn issue_controller_server_cert(
        &self,
        dns_names: &[String],
        addresses: &[IpAddr],
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<ServerCertificate, IssueError> {
        let mut names = Vec::new();
        for name in dns_names {
            if !is_dns_name(name) || name.ends_with(POD_UID_SUFFIX) {
                return Err(IssueError::ServerName(name.clone()));
            }
            names.push(SanType::DnsName(ia5(name)?));
        }
        names.extend(addresses.iter().copied().map(SanType::IpAddress));
        if names.is_empty() {
            return Err(IssueError::ServerName(String::new()));
        }
        let key = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = Leaf { kind: Kind::Server, names, usages, ttl, node: "", pod_uid: "" };
        let issued = self.issue(&*key, leaf, now)?;
        Ok(ServerCertificate { issued, key_pem: Zeroizing::new(key.serialize_pem()) })
    }

    fn issue(
        &self,
        key: &impl PublicKeyData,
        leaf: Leaf<'_>,
        now: OffsetDateTime,
    ) -> Result<Issued, IssueError> {
        let (not_before, not_after) = self.validity(leaf.ttl, now)?;
        let serial = Serial::random();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
        params.not_before = not_before;
        params.not_after = not_after;
        params.subject_alt_names = leaf.names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = leaf.usages;
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(key, &self.issuer)?;

        self.log.append(&Entry {
            time: rfc3339(now),
            serial: serial.clone(),
            kind: leaf.kind,
            san: params.subject_alt_names.iter().map(name_text).collect(),
            node: leaf.node.to_owned(),
            pod_uid: leaf.pod_uid.to_owned(),
            not_before: rfc3339(not_before),
            not_after: rfc3339(not_after),
            issuer_serial: self.serial.clone(),
        })?;
        let mut chain_der = vec![certificate.der().to_vec()];
        chain_der.extend_from_slice(&self.chain[..self.chain.len() - 1]);
        Ok(Issued { chain_der, serial, not_before, not_after })
    }

    fn validity(
        &self,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<(OffsetDateTime, OffsetDateTime), IssueError> {
        if ttl < Duration::from_secs(1) || ttl > MAX_TTL {
            return Err(IssueError::Ttl(ttl));
        }
        let not_before = whole_seconds((now - BACKDATE).max(self.not_before));
        let not_after = whole_seconds((now + ttl).min(self.not_after));
        if not_after <= now {
            return Err(IssueError::IssuerExpired(self.not_after));
        }
        Ok((not_before, not_after))
    }
}

fn ia5(name: &str) -> Result<Ia5String, rcgen::Error> {
    Ia5String::try_from(name)
}

fn is_dns_name(name: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn name_text(name: &SanType) -> String {
    match name {
        SanType::URI(uri) => format!("URI:{uri}"),
        SanType::DnsName(dns) => format!("DNS:{dns}"),
        SanType::IpAddress(ip) => format!("IP:{ip}"),
        other => format!("{other:?}"),
    }
}

/// X.509 times have no fractions of a second.
fn whole_seconds(t: OffsetDateTime) -> OffsetDateTime {
    t.to_offset(time::UtcOffset::UTC).replace_nanosecond(0).expect("0 is a valid nanosecond")
}

fn rfc3339(t: OffsetDateTime) -> String {
    t.to_offset(time::UtcOffset::UTC)
        .format(&Rfc3339)
        .expect("times of certificates lie in the years 0 to 9999")
}

/// A certificate (DER) as PEM.
#[must_use]
pub fn pem_of(certificate: &[u8]) -> String {
    to_pem("CERTIFICATE", certificate)
}

fn to_pem(tag: &str, der: &[u8]) -> String {
    pem::encode_config(
        &pem::Pem::new(tag, der),
        pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF),
    )
}
