//! Certificates that no CA of ours makes, put before the checks directly.

use std::time::{Duration, Instant};

use ca::Authority;
use mesh_api::model::Trust;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, OtherNameValue, SanType,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;

use super::peer::{MAX_CHAIN, Role, peer_identity, verify};
use super::refusal::Refusal;
use super::trust::TrustState;

const ID: &str = "spiffe://cluster.local/ns/shop/sa/web";
const DAY: Duration = Duration::from_secs(24 * 3600);

struct Root {
    issuer: Issuer<'static, KeyPair>,
    trust: TrustState,
}

fn root() -> Root {
    let made = Authority::make_root("cluster.local", DAY, OffsetDateTime::now_utc()).unwrap();
    let key = KeyPair::from_pem(&made.key_pem).unwrap();
    let der = pem_der(&made.certificate_pem);
    let trust = Trust { trust_domain: "cluster.local".into(), roots: vec![der.into()] };
    let issuer = Issuer::from_ca_cert_pem(&made.certificate_pem, key).unwrap();
    Root { issuer, trust: TrustState::new(&trust).unwrap() }
}

fn pem_der(pem: &str) -> Vec<u8> {
    use rustls_pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

fn uri(name: &str) -> SanType {
    SanType::URI(Ia5String::try_from(name).unwrap())
}

fn dns(name: &str) -> SanType {
    SanType::DnsName(Ia5String::try_from(name).unwrap())
}

fn leaf(names: Vec<SanType>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = OffsetDateTime::now_utc() - Duration::from_secs(60);
    params.not_after = OffsetDateTime::now_utc() + Duration::from_secs(3600);
    params
}

impl Root {
    fn sign(&self, params: &CertificateParams) -> CertificateDer<'static> {
        params.signed_by(&KeyPair::generate().unwrap(), &self.issuer).unwrap().into()
    }

    fn check(&self, params: &CertificateParams) -> Result<(), Refusal> {
        let leaf = self.sign(params);
        let verified = verify(&self.trust, &leaf, &[], Role::Client, UnixTime::now());
        assert_eq!(verified, verify(&self.trust, &leaf, &[], Role::Server, UnixTime::now()));
        verified.map(drop)
    }
}

#[test]
fn the_names_must_be_one_identity_and_one_pod_at_most() {
    let root = root();
    assert_eq!(root.check(&leaf(vec![uri(ID)])), Ok(()), "as Istio's CA issues it");
    assert_eq!(root.check(&leaf(vec![uri(ID), dns("a-1.pod.sockmesh.io")])), Ok(()));
    let other = SanType::OtherName((vec![1, 2, 3], OtherNameValue::Utf8String(ID.into())));
    for names in [
        vec![],
        vec![uri(ID), uri(ID)],
        vec![uri(ID), uri("spiffe://cluster.local/ns/shop/sa/admin")],
        vec![uri(ID), uri("https://example.com")],
        vec![dns("a-1.pod.sockmesh.io")],
        vec![uri(ID), dns("web.shop.svc")],
        vec![uri(ID), dns("a.b.pod.sockmesh.io")],
        vec![uri(ID), dns("a.pod.sockmesh.io"), dns("b.pod.sockmesh.io")],
        vec![uri(ID), SanType::IpAddress([10, 0, 0, 1].into())],
        vec![uri(ID), SanType::Rfc822Name(Ia5String::try_from("a@b").unwrap())],
        vec![uri(ID), other],
        vec![uri("spiffe://cluster.local/ns/shop/sa/web\0")],
        vec![uri("spiffe://cluster.local/ns/shop/sa/we%62")],
        vec![uri("spiffe://cluster.local/ns/shop/sa/web/")],
        vec![uri("spiffe://cluster.local/node/web")],
        vec![uri("spiffe://Cluster.local/ns/shop/sa/web")],
    ] {
        let checked = root.check(&leaf(names.clone()));
        assert!(matches!(checked, Err(Refusal::BadSan(_))), "{names:?}: {checked:?}");
    }
    let mut doubled = leaf(vec![uri(ID)]);
    let names = [&[0x30, 2 + 37, 0x86, 37][..], ID.as_bytes()].concat();
    doubled.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], names)];
    let checked = root.check(&doubled);
    assert!(matches!(checked, Err(Refusal::BadSan(_) | Refusal::Malformed(_))), "{checked:?}");
}

#[test]
fn only_a_leaf_for_handshakes_of_both_sides_is_taken() {
    let root = root();
    let mut ca = leaf(vec![uri(ID)]);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    assert!(matches!(root.check(&ca), Err(Refusal::BadLeaf(_))));
    for usages in [
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign],
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign],
        vec![KeyUsagePurpose::KeyEncipherment],
    ] {
        let mut odd = leaf(vec![uri(ID)]);
        odd.key_usages = usages.clone();
        assert!(matches!(root.check(&odd), Err(Refusal::BadLeaf(_))), "{usages:?}");
    }
    for usages in [
        vec![],
        vec![ExtendedKeyUsagePurpose::ServerAuth],
        vec![ExtendedKeyUsagePurpose::ClientAuth],
        vec![ExtendedKeyUsagePurpose::CodeSigning],
    ] {
        let mut odd = leaf(vec![uri(ID)]);
        odd.extended_key_usages = usages.clone();
        assert!(matches!(root.check(&odd), Err(Refusal::BadLeaf(_))), "{usages:?}");
    }
    let mut foreign = leaf(vec![uri("spiffe://other/ns/shop/sa/web")]);
    assert!(matches!(root.check(&foreign), Err(Refusal::WrongTrustDomain { .. })));
    foreign.subject_alt_names = vec![uri(ID)];
    assert_eq!(root.check(&foreign), Ok(()));
}

#[test]
fn bytes_that_are_no_certificate_are_refused() {
    let root = root();
    let good = root.sign(&leaf(vec![uri(ID)]));
    let check = |der: &[u8]| verify(&root.trust, &der.into(), &[], Role::Client, UnixTime::now());
    assert!(check(&good).is_ok());
    assert!(matches!(check(&[&good[..], &[0]].concat()), Err(Refusal::Malformed(_))));
    for cut in 0..good.len() {
        assert!(matches!(check(&good[..cut]), Err(Refusal::Malformed(_))), "cut at {cut}");
    }
    for at in 0..good.len() {
        let mut flipped = good.to_vec();
        flipped[at] ^= 0x10;
        assert!(check(&flipped).is_err(), "byte {at}");
    }
    assert_eq!(peer_identity(&[]), Err(Refusal::NoCertificate));
}

#[test]
fn a_chain_of_look_alikes_is_refused_without_trying_them_all() {
    let root = root();
    let look_alike = |_| {
        let mut params = leaf(vec![]);
        params.distinguished_name.push(DnType::CommonName, "look-alike");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let certificate: CertificateDer<'static> = params.self_signed(&key).unwrap().into();
        (certificate, Issuer::new(params, key))
    };
    let mut made: Vec<_> = (0..100).map(look_alike).collect();
    let (_, signer) = made.pop().unwrap();
    let peer: CertificateDer<'static> =
        leaf(vec![uri(ID)]).signed_by(&KeyPair::generate().unwrap(), &signer).unwrap().into();
    let chain: Vec<_> = made.into_iter().map(|(certificate, _)| certificate).collect();
    let check = |chain| verify(&root.trust, &peer, chain, Role::Client, UnixTime::now());
    assert_eq!(check(&chain), Err(Refusal::LongChain(100)));
    let begun = Instant::now();
    assert!(matches!(check(&chain[..MAX_CHAIN - 1]), Err(Refusal::UnknownIssuer | Refusal::Malformed(_))));
    println!("a chain of {MAX_CHAIN} look-alikes took {:?}", begun.elapsed());
}
