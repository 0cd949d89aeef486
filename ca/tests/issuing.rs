//! What is issued: verified with webpki, field by field, and never beyond its issuer.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use ca::log::{Durability, FileLog, Kind, MemoryLog};
use ca::{
    Authority, BACKDATE, IssueError, Issued, LoadError, MAX_TTL, NewRoot, NodeId, NodeRequest,
    WorkloadRequest,
};
use mesh_api::identity::SpiffeId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P384_SHA384, PublicKeyData, SanType,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert, aws_lc_rs::ECDSA_P256_SHA256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

const DAY: Duration = Duration::from_secs(24 * 3600);
const ID: &str = "spiffe://cluster.local/ns/shop/sa/web";
const UID: &str = "0b7a3f6e-6f0e-4a52-9d0b-2f9d2b0c7a11";

fn now() -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(1_790_000_000).unwrap()
}

fn root() -> NewRoot {
    Authority::make_root("cluster.local", 10 * DAY, now()).unwrap()
}

fn authority() -> (Authority, Arc<MemoryLog>) {
    let log = Arc::new(MemoryLog::default());
    let root = root();
    let authority =
        Authority::load("cluster.local", &root.certificate_pem, &root.key_pem, now(), Arc::clone(&log))
            .unwrap();
    (authority, log)
}

fn csr(names: &[&str]) -> (Vec<u8>, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names.iter().map(|n| SanType::URI((*n).try_into().unwrap())).collect();
    (params.serialize_request(&key).unwrap().der().to_vec(), key)
}

fn request(csr_der: &[u8], ttl: Duration) -> WorkloadRequest<'_> {
    WorkloadRequest { csr_der, spiffe_id: ID.parse().unwrap(), pod_uid: UID, node: "node-a", ttl }
}

fn issue(authority: &Authority, ttl: Duration, at: OffsetDateTime) -> Result<Issued, IssueError> {
    authority.issue_workload(&request(&csr(&[ID]).0, ttl), at)
}

fn verify(
    issued: &Issued,
    root_der: &[u8],
    usage: KeyUsage,
    at: OffsetDateTime,
) -> Result<(), webpki::Error> {
    let root = CertificateDer::from(root_der);
    let anchors = [anchor_from_trusted_cert(&root).unwrap()];
    let chain: Vec<_> = issued.chain_der.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let leaf = EndEntityCert::try_from(&chain[0]).unwrap();
    let at = UnixTime::since_unix_epoch(Duration::from_secs(at.unix_timestamp().try_into().unwrap()));
    leaf.verify_for_usage(&[ECDSA_P256_SHA256], &anchors, &chain[1..], at, usage, None, None).map(|_| ())
}

#[test]
fn a_pods_certificate_verifies_as_server_and_as_client_and_says_what_was_decided() {
    let (authority, log) = authority();
    let (csr, key) = csr(&[ID]);
    let issued = authority.issue_workload(&request(&csr, DAY), now()).unwrap();
    for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
        verify(&issued, authority.root_der(), usage, now()).unwrap();
    }
    assert_eq!(issued.chain_der.len(), 1, "the root is not sent");

    let (_, leaf) = X509Certificate::from_der(&issued.chain_der[0]).unwrap();
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    assert_eq!(leaf.raw_serial(), issued.serial.as_bytes());
    assert_eq!(leaf.subject().iter_rdn().count(), 0);
    let names = &leaf.subject_alternative_name().unwrap().unwrap().value.general_names;
    let uid_name = format!("{UID}.pod.sockmesh.io");
    assert_eq!(*names, [GeneralName::URI(ID), GeneralName::DNSName(&uid_name)]);
    let basic = leaf.basic_constraints().unwrap().unwrap();
    assert!(basic.critical && !basic.value.ca);
    let usage = leaf.key_usage().unwrap().unwrap();
    assert!(usage.critical);
    assert_eq!(usage.value.flags, 1, "digitalSignature and nothing else");
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any && !extended.code_signing);
    assert_eq!(leaf.validity().not_before.to_datetime(), now() - BACKDATE);
    assert_eq!(leaf.validity().not_after.to_datetime(), now() + DAY);

    let entries = log.entries();
    assert_eq!(entries.len(), 1);
    assert_eq!((entries[0].kind, &entries[0].serial), (Kind::Workload, &issued.serial));
    assert_eq!((entries[0].node.as_str(), entries[0].pod_uid.as_str()), ("node-a", UID));
    assert_eq!(entries[0].san, [format!("URI:{ID}"), format!("DNS:{UID}.pod.sockmesh.io")]);
    assert_eq!(
        (entries[0].time.as_str(), entries[0].not_after.as_str()),
        ("2026-09-21T14:13:20Z", "2026-09-22T14:13:20Z")
    );
}

#[test]
fn a_nodes_certificate_is_a_clients_and_names_the_node_only() {
    let (authority, log) = authority();
    let (csr, _) = csr(&[]);
    let issued = authority
        .issue_node(&NodeRequest { csr_der: &csr, node: "node-a.example", ttl: DAY }, now())
        .unwrap();
    verify(&issued, authority.root_der(), KeyUsage::client_auth(), now()).unwrap();
    assert!(verify(&issued, authority.root_der(), KeyUsage::server_auth(), now()).is_err());
    let id = NodeId::of_certificate(&issued.chain_der[0], "cluster.local").unwrap();
    assert_eq!(&*id.name, "node-a.example");
    assert!(NodeId::of_certificate(&issued.chain_der[0], "other").is_err());
    assert_eq!(log.entries()[0].kind, Kind::Node);

    let pod = issue(&authority, DAY, now()).unwrap();
    assert!(NodeId::of_certificate(&pod.chain_der[0], "cluster.local").is_err(), "a pod is no node");
    let bad = NodeRequest { csr_der: &csr, node: "../node", ttl: DAY };
    assert!(matches!(authority.issue_node(&bad, now()), Err(IssueError::Node(_))));
}

#[test]
fn the_controllers_certificate_is_a_servers_and_never_has_a_pods_name() {
    let (authority, _) = authority();
    let names = ["controller.sockmesh-system.svc".to_owned()];
    let made = authority.issue_controller_server_cert(&names, &[[10, 0, 0, 1].into()], DAY, now()).unwrap();
    verify(&made.issued, authority.root_der(), KeyUsage::server_auth(), now()).unwrap();
    assert!(verify(&made.issued, authority.root_der(), KeyUsage::client_auth(), now()).is_err());
    let (_, leaf) = X509Certificate::from_der(&made.issued.chain_der[0]).unwrap();
    let key = KeyPair::from_pem(&made.key_pem).unwrap();
    assert_eq!(&*leaf.public_key().subject_public_key.data, key.public_key_raw());
    assert!(made.issued.chain_pem().starts_with("-----BEGIN CERTIFICATE-----\n"));
    for bad in [&format!("{UID}.pod.sockmesh.io"), "", "a..b", "*.example", "a b", "UPPER"] {
        let made = authority.issue_controller_server_cert(&[bad.to_owned()], &[], DAY, now());
        assert!(matches!(made, Err(IssueError::ServerName(_))), "{bad:?}");
    }
    assert!(matches!(
        authority.issue_controller_server_cert(&[], &[], DAY, now()),
        Err(IssueError::ServerName(_))
    ));
}

#[test]
fn a_leaf_never_outlives_its_issuer_nor_starts_before_it() {
    let (authority, _) = authority();
    let late = now() + 9 * DAY + Duration::from_secs(1);
    let issued = issue(&authority, 2 * DAY, late).unwrap();
    assert_eq!(issued.not_after, authority.not_after());
    assert_eq!(issued.not_after, now() + 10 * DAY);
    verify(&issued, authority.root_der(), KeyUsage::server_auth(), issued.not_after - Duration::from_secs(1))
        .unwrap();
    for after in [Duration::ZERO, Duration::from_secs(1), DAY] {
        let refused = issue(&authority, DAY, now() + 10 * DAY + after);
        assert!(matches!(refused, Err(IssueError::IssuerExpired(_))), "{refused:?}");
    }
    // The root starts BACKDATE before it was made; so does the first leaf, whatever the clock of the asking side.
    assert_eq!(issue(&authority, DAY, now() - BACKDATE / 2).unwrap().not_before, now() - BACKDATE);
}

#[test]
fn validity_is_in_whole_seconds_and_within_bounds() {
    let (authority, _) = authority();
    let at = now() + Duration::from_millis(1700);
    let issued = issue(&authority, Duration::from_millis(1400), at).unwrap();
    assert_eq!(
        (issued.not_before, issued.not_after),
        (now() + Duration::from_secs(1) - BACKDATE, now() + Duration::from_secs(3))
    );
    for bad in [Duration::ZERO, Duration::from_millis(999), MAX_TTL + Duration::from_secs(1)] {
        assert!(matches!(issue(&authority, bad, now()), Err(IssueError::Ttl(_))), "{bad:?}");
    }
}

#[test]
fn serials_are_never_the_same_even_for_the_same_key() {
    let (authority, log) = authority();
    let (csr, _) = csr(&[ID]);
    let mut serials: Vec<_> =
        (0..50).map(|_| authority.issue_workload(&request(&csr, DAY), now()).unwrap().serial).collect();
    serials.sort();
    serials.dedup();
    assert_eq!((serials.len(), log.entries().len()), (50, 50));
}

#[test]
fn a_wrong_trust_domain_pod_or_request_gives_no_certificate_and_no_entry() {
    let (authority, log) = authority();
    let (csr, _) = csr(&["spiffe://other/ns/shop/sa/web"]);
    let foreign: SpiffeId = "spiffe://other/ns/shop/sa/web".parse().unwrap();
    let refused =
        authority.issue_workload(&WorkloadRequest { spiffe_id: foreign, ..request(&csr, DAY) }, now());
    assert!(matches!(refused, Err(IssueError::TrustDomain { .. })));
    let refused = authority.issue_workload(&request(&csr, DAY), now());
    assert!(matches!(refused, Err(IssueError::Csr(_))));
    let refused = authority.issue_workload(&WorkloadRequest { pod_uid: "a.b", ..request(&csr, DAY) }, now());
    assert!(matches!(refused, Err(IssueError::PodUid(_))));
    assert!(log.entries().is_empty());
}

#[test]
fn nothing_is_issued_when_the_log_is_full() {
    let root = root();
    let log = FileLog::open("/dev/full".as_ref(), Durability::EachEntry).unwrap();
    let authority =
        Authority::load("cluster.local", &root.certificate_pem, &root.key_pem, now(), log).unwrap();
    let refused = issue(&authority, DAY, now()).unwrap_err();
    assert!(matches!(refused, IssueError::Log(_)), "{refused}");
    assert!(refused.to_string().contains("/dev/full"), "{refused}");
}

#[test]
fn an_intermediate_sends_its_chain_and_the_root_stays_at_home() {
    let (intermediate, root) = intermediate(|_| {});
    let chain = format!("{}{}", intermediate.certificate_pem, root.certificate_pem);
    let log = MemoryLog::default();
    let authority = Authority::load("cluster.local", &chain, &intermediate.key_pem, now(), log).unwrap();
    let issued = issue(&authority, 2 * DAY, now()).unwrap();
    assert_eq!(issued.chain_der.len(), 2);
    assert_eq!(issued.not_after, now() + DAY, "the intermediate ends first");
    assert_eq!(authority.root_pem().trim(), root.certificate_pem.trim());
    verify(&issued, authority.root_der(), KeyUsage::server_auth(), now()).unwrap();
}

/// An intermediate that ends in a day, and the root above it that may sign it.
fn intermediate(change: impl FnOnce(&mut CertificateParams)) -> (NewRoot, NewRoot) {
    let root_key = KeyPair::generate().unwrap();
    let mut root = ca_params("outer root");
    root.not_after = now() + 10 * DAY;
    let root_certificate = root.self_signed(&root_key).unwrap();
    let root_pem =
        NewRoot { certificate_pem: root_certificate.pem(), key_pem: root_key.serialize_pem().into() };
    let key = KeyPair::generate().unwrap();
    let mut params = ca_params("intermediate");
    change(&mut params);
    let certificate = params.signed_by(&key, &Issuer::new(root, root_key)).unwrap();
    (NewRoot { certificate_pem: certificate.pem(), key_pem: key.serialize_pem().into() }, root_pem)
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = now() - DAY;
    params.not_after = now() + DAY;
    params
}

/// A self-signed CA, changed.
fn odd_root(change: impl FnOnce(&mut CertificateParams)) -> NewRoot {
    let key = KeyPair::generate().unwrap();
    let mut params = ca_params("odd root");
    change(&mut params);
    NewRoot { certificate_pem: params.self_signed(&key).unwrap().pem(), key_pem: key.serialize_pem().into() }
}

fn refused(certificate_pem: &str, key_pem: &str) -> LoadError {
    Authority::load("cluster.local", certificate_pem, key_pem, now(), MemoryLog::default())
        .err()
        .expect("loaded")
}

#[test]
fn a_ca_that_is_not_fit_to_sign_is_refused_and_never_replaced() {
    let good = root();
    let (cert, key) = (good.certificate_pem.as_str(), &*good.key_pem);
    let expired = odd_root(|p| p.not_after = now());
    let future = odd_root(|p| p.not_before = now() + Duration::from_secs(1));
    let leaf = odd_root(|p| p.is_ca = IsCa::NoCa);
    let explicit = odd_root(|p| p.is_ca = IsCa::ExplicitNoCa);
    let cannot_sign = odd_root(|p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    let no_usage = odd_root(|p| p.key_usages = vec![]);
    assert!(matches!(refused(&expired.certificate_pem, &expired.key_pem), LoadError::Expired { .. }));
    assert!(matches!(refused(&future.certificate_pem, &future.key_pem), LoadError::NotYetValid { .. }));
    assert!(matches!(refused(&leaf.certificate_pem, &leaf.key_pem), LoadError::NotCa { .. }));
    assert!(matches!(refused(&explicit.certificate_pem, &explicit.key_pem), LoadError::NotCa { .. }));
    assert!(matches!(refused(&cannot_sign.certificate_pem, &cannot_sign.key_pem), LoadError::NotCa { .. }));
    assert!(matches!(refused(&no_usage.certificate_pem, &no_usage.key_pem), LoadError::NotCa { .. }));
    assert!(matches!(refused(cert, &root().key_pem), LoadError::KeyMismatch { .. }));
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap().serialize_pem();
    assert!(matches!(refused(cert, &p384), LoadError::KeyType));
    assert!(matches!(refused(cert, ""), LoadError::Key));
    assert!(matches!(
        refused(cert, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"),
        LoadError::Key
    ));
    assert!(matches!(refused("", key), LoadError::NoCertificate));
    assert!(matches!(
        refused("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n", key),
        LoadError::CertificatePem(_)
    ));
    assert!(matches!(
        refused("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", key),
        LoadError::Certificate(1)
    ));
    assert!(matches!(refused(&format!("{cert}{key}"), key), LoadError::Block(_)));
    assert!(matches!(refused(&format!("{cert}{}", root().certificate_pem), key), LoadError::Chain { .. }));

    let (own, above) = intermediate(|_| {});
    let error = refused(&own.certificate_pem, &own.key_pem);
    assert!(matches!(error, LoadError::Incomplete { .. }));
    assert!(error.to_string().contains("append its issuers"), "{error}");
    let reversed = format!("{}{}", above.certificate_pem, own.certificate_pem);
    assert!(matches!(refused(&reversed, &own.key_pem), LoadError::Chain { .. }));
    let (own, above) = intermediate(|p| p.not_after = now() - Duration::from_secs(1));
    let chain = format!("{}{}", own.certificate_pem, above.certificate_pem);
    assert!(matches!(refused(&chain, &own.key_pem), LoadError::Expired { .. }));
}

#[test]
fn a_ca_is_loaded_from_files_and_a_missing_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join("ca.pem"), dir.path().join("ca.key"));
    let root = root();
    std::fs::write(&cert, &root.certificate_pem).unwrap();
    let load = || Authority::load_files("cluster.local", &cert, &key, now(), MemoryLog::default());
    let error = load().err().unwrap();
    assert!(error.to_string().contains("ca.key"), "{error}");
    std::fs::write(&key, root.key_pem.as_bytes()).unwrap();
    assert_eq!(load().unwrap().root_pem().trim(), root.certificate_pem.trim());
    let odd = Authority::load_files("Cluster.Local", &cert, &key, now(), MemoryLog::default());
    assert!(matches!(odd, Err(LoadError::TrustDomain(_))));
}

#[test]
fn certificates_of_another_root_do_not_verify() {
    let (one, other) = (authority().0, authority().0);
    let issued = issue(&one, DAY, now()).unwrap();
    assert!(verify(&issued, other.root_der(), KeyUsage::server_auth(), now()).is_err());
}
