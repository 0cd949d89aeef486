//! What a peer's certificate must be, and the identity in it.
//!
//! Exactly one URI name, a SPIFFE ID of the mesh's trust domain (X509-SVID §2 and §5); besides it at most the DNS name
//! that bears the pod's UID; no CA; both extended key usages; issued by a root of the mesh; not expired, not denied. The
//! host name or address dialled plays no part.

use std::sync::Arc;

use mesh_api::identity::{SpiffeId, pod_uid_from_dns_name};
use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::provider::signature_algorithms;
use super::refusal::Refusal;
use super::trust::TrustState;

/// Most certificates that a peer may send. A mesh that signs with an intermediate of an intermediate sends three.
pub const MAX_CHAIN: usize = 4;

/// Who a peer is, as its certificate says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// Its identity.
    pub spiffe: SpiffeId,
    /// UID of its pod; other meshes' CAs do not write it.
    pub pod_uid: Option<Arc<str>>,
}

/// In which role the peer shows its certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It accepted the connection.
    Server,
    /// It made the connection.
    Client,
}

/// The identity in the certificate of a peer (chain, leaf first) whose handshake has been finished, and which was
/// verified then.
///
/// # Errors
/// [`Refusal::NoCertificate`], [`Refusal::Malformed`] and [`Refusal::BadSan`].
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, Refusal> {
    let leaf = chain.first().ok_or(Refusal::NoCertificate)?;
    identity(&parse(leaf)?)
}

/// Verifies a peer's chain.
///
/// # Errors
/// [`Refusal`].
pub fn verify(
    trust: &TrustState,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    role: Role,
    now: UnixTime,
) -> Result<PeerIdentity, Refusal> {
    if intermediates.len() >= MAX_CHAIN {
        return Err(Refusal::LongChain(intermediates.len() + 1));
    }
    let certificate = parse(leaf)?;
    check_leaf(&certificate)?;
    let peer = identity(&certificate)?;
    if peer.spiffe.trust_domain != trust.trust_domain {
        return Err(Refusal::WrongTrustDomain {
            presented: peer.spiffe,
            own: Arc::clone(&trust.trust_domain),
        });
    }
    let usage = match role {
        Role::Server => KeyUsage::server_auth(),
        Role::Client => KeyUsage::client_auth(),
    };
    EndEntityCert::try_from(leaf)
        .and_then(|end| {
            end.verify_for_usage(
                signature_algorithms().all,
                &trust.anchors,
                intermediates,
                now,
                usage,
                None,
                None,
            )
            .map(drop)
        })
        .map_err(|e| of_webpki(&e))?;
    // Last, so that a stranger cannot try out which serials are denied.
    let pod_is_gone = peer.pod_uid.as_ref().is_some_and(|uid| trust.is_denied_pod(uid));
    if pod_is_gone || trust.is_denied(certificate.raw_serial()) {
        return Err(Refusal::Denied);
    }
    Ok(peer)
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Refusal> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(Refusal::Malformed("bytes after its end".to_owned())),
        Err(e) => Err(Refusal::Malformed(e.to_string())),
    }
}

fn check_leaf(certificate: &X509Certificate<'_>) -> Result<(), Refusal> {
    let malformed = |e: x509_parser::error::X509Error| Refusal::Malformed(e.to_string());
    if certificate.basic_constraints().map_err(malformed)?.is_some_and(|basic| basic.value.ca) {
        return Err(Refusal::BadLeaf("it is that of a CA"));
    }
    if let Some(usage) = certificate.key_usage().map_err(malformed)? {
        if usage.value.key_cert_sign() || usage.value.crl_sign() {
            return Err(Refusal::BadLeaf("its key may sign certificates or revocation lists"));
        }
        if !usage.value.digital_signature() {
            return Err(Refusal::BadLeaf("its key may not sign handshakes"));
        }
    }
    match certificate.extended_key_usage().map_err(malformed)? {
        Some(usage) if usage.value.server_auth && usage.value.client_auth => Ok(()),
        _ => Err(Refusal::BadLeaf("it is not for both a server and a client")),
    }
}

fn identity(certificate: &X509Certificate<'_>) -> Result<PeerIdentity, Refusal> {
    let bad = |why: &str| Refusal::BadSan(why.to_owned());
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| bad("its names cannot be parsed"))?
        .ok_or_else(|| bad("it has no names"))?;
    let (mut uri, mut uid) = (None, None);
    for name in &names.value.general_names {
        match name {
            GeneralName::URI(name) => {
                if uri.replace(*name).is_some() {
                    return Err(bad("it has several URI names"));
                }
            }
            GeneralName::DNSName(name) => {
                let pod = pod_uid_from_dns_name(name)
                    .ok_or_else(|| bad("it has a DNS name that is no pod's UID"))?;
                if uid.replace(pod).is_some() {
                    return Err(bad("it has the UIDs of several pods"));
                }
            }
            _ => return Err(bad("it has a name that is neither URI nor DNS name")),
        }
    }
    let uri = uri.ok_or_else(|| bad("it has no URI name"))?;
    let spiffe =
        uri.parse().map_err(|e: mesh_api::identity::SpiffeIdError| Refusal::BadSan(e.to_string()))?;
    Ok(PeerIdentity { spiffe, pod_uid: uid.map(Into::into) })
}

fn of_webpki(error: &webpki::Error) -> Refusal {
    use webpki::Error;
    match error {
        Error::CertExpired { .. } => Refusal::Expired,
        Error::CertNotValidYet { .. } => Refusal::NotYetValid,
        Error::UnknownIssuer => Refusal::UnknownIssuer,
        Error::InvalidSignatureForPublicKey => Refusal::BadSignature,
        Error::CaUsedAsEndEntity => Refusal::BadLeaf("it is that of a CA"),
        other => Refusal::Malformed(other.to_string()),
    }
}
