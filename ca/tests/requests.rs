//! Requests with anything unexpected in them are refused, with the reason.

#![allow(clippy::unwrap_used)]

use ca::csr::{Expected, MAX_CSR, check};
use ca::node::NodeId;
use mesh_api::identity::SpiffeId;
use proptest::prelude::*;
use rcgen::string::Ia5String;
use rcgen::{
    Attribute, BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, OtherNameValue, PKCS_ECDSA_P256_SHA256,
    PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256, PublicKeyData, SanType, SignatureAlgorithm,
};

const ID: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn uri(name: &str) -> SanType {
    SanType::URI(Ia5String::try_from(name).unwrap())
}

fn dns(name: &str) -> SanType {
    SanType::DnsName(Ia5String::try_from(name).unwrap())
}

fn params(names: Vec<SanType>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params
}

fn good() -> CertificateParams {
    params(vec![uri(ID)])
}

fn der(params: &CertificateParams) -> Vec<u8> {
    der_with(params, &PKCS_ECDSA_P256_SHA256, Vec::new())
}

fn der_with(
    params: &CertificateParams,
    algorithm: &'static SignatureAlgorithm,
    attributes: Vec<Attribute>,
) -> Vec<u8> {
    let key = KeyPair::generate_for(algorithm).unwrap();
    params.serialize_request_with_attributes(&key, attributes).unwrap().der().to_vec()
}

fn refusal(request: &[u8]) -> String {
    let id: SpiffeId = ID.parse().unwrap();
    check(request, Expected::Workload(&id)).expect_err("it was taken").to_string()
}

/// DER of one TLV with a short or long length.
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    match u8::try_from(content.len()) {
        Ok(short @ ..0x80) => out.push(short),
        _ => {
            out.push(0x82);
            out.extend_from_slice(&u16::try_from(content.len()).unwrap().to_be_bytes());
        }
    }
    out.extend_from_slice(content);
    out
}

const SAN_OID: &[u64] = &[2, 5, 29, 17];
/// id-ce-subjectAltName as DER of an OBJECT IDENTIFIER.
const SAN_OID_DER: &[u8] = &[0x06, 0x03, 0x55, 0x1d, 0x11];
/// PKCS #9 extensionRequest.
const EXTENSION_REQUEST: &[u64] = &[1, 2, 840, 113_549, 1, 9, 14];

/// A request whose alternative names are these bytes.
fn with_raw_names(general_names: &[u8]) -> Vec<u8> {
    let mut params = params(Vec::new());
    params.custom_extensions = vec![CustomExtension::from_oid_content(SAN_OID, tlv(0x30, general_names))];
    der(&params)
}

fn extension(name: &str) -> Vec<u8> {
    tlv(0x30, &[SAN_OID_DER, &tlv(0x04, &tlv(0x30, &tlv(0x86, name.as_bytes())))].concat())
}

#[test]
fn a_request_with_the_expected_name_gives_its_public_key() {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let request = good().serialize_request(&key).unwrap();
    let spki = check(request.der(), Expected::Workload(&ID.parse().unwrap())).unwrap();
    assert_eq!(spki, key.subject_public_key_info());
}

#[test]
fn a_uri_that_is_not_exactly_the_expected_identity_is_refused() {
    let long = format!("spiffe://cluster.local/ns/shop/sa/{}", "a".repeat(2049 - 34));
    assert_eq!(long.len(), 2049);
    for (name, reason) in [
        ("spiffe://Cluster.local/ns/shop/sa/web", "trust domain"),
        ("spiffe://cluster.local/ns/shop/sa/web\0", "path"),
        ("spiffe://cluster.local/ns/shop/sa/web\0.evil", "path"),
        ("spiffe://cluster.local\0/ns/shop/sa/web", "trust domain"),
        ("spiffe://cluster.local/ns/shop%2fsa/web", "path"),
        ("spiffe://cluster.local/ns/shop/sa/w%65b", "path"),
        ("spiffe://user@cluster.local/ns/shop/sa/web", "trust domain"),
        ("spiffe://cluster.local:443/ns/shop/sa/web", "trust domain"),
        ("spiffe://cluster.local/ns/shop/sa/web?a=b", "path"),
        ("spiffe://cluster.local/ns/shop/sa/web#f", "path"),
        ("spiffe://cluster.local/ns/../sa/web", "path"),
        ("spiffe://cluster.local/ns/shop/sa/./web", "path"),
        ("spiffe://cluster.local/ns/shop/sa/web/", "path"),
        ("spiffe://cluster.local/ns/shop//sa/web", "path"),
        ("spiffe://cluster.local//ns/shop/sa/web", "path"),
        ("spiffe://cluster.local/ns/shop/sa/", "path"),
        ("spiffe://cluster.local/ns/shop/sa/Web", "path"),
        ("spiffe://cluster.local/ns/shop/sa/web/extra", "path"),
        ("spiffe://cluster.local/node/web", "path"),
        ("spiffe://cluster.local", "path"),
        ("spiffe:///ns/shop/sa/web", "trust domain"),
        ("SPIFFE://cluster.local/ns/shop/sa/web", "spiffe://"),
        ("https://cluster.local/ns/shop/sa/web", "spiffe://"),
        ("", "spiffe://"),
        (" spiffe://cluster.local/ns/shop/sa/web", "spiffe://"),
        (long.as_str(), "2049 bytes"),
        ("spiffe://cluster.local/ns/shop/sa/webx", "expected spiffe://cluster.local/ns/shop/sa/web"),
        ("spiffe://cluster.local/ns/shop/sa/we", "expected"),
        ("spiffe://cluster.local/ns/other/sa/web", "expected"),
        ("spiffe://other.example/ns/shop/sa/web", "expected"),
    ] {
        let why = refusal(&der(&params(vec![uri(name)])));
        assert!(why.contains(reason), "{name:?}: {why}");
    }
}

#[test]
fn names_of_another_number_or_type_are_refused() {
    let other = SanType::OtherName((vec![1, 2, 3], OtherNameValue::Utf8String(ID.into())));
    for (names, reason) in [
        (vec![], "no URI name"),
        (vec![uri(ID), uri(ID)], "2 alternative names"),
        (vec![uri(ID), uri("spiffe://cluster.local/ns/shop/sa/admin")], "2 alternative names"),
        (vec![uri(ID), dns("web.shop.svc")], "2 alternative names"),
        (vec![dns("web.shop.svc")], "type DNS"),
        (vec![SanType::IpAddress([10, 0, 0, 1].into())], "type IP address"),
        (vec![SanType::Rfc822Name(Ia5String::try_from("a@b").unwrap())], "type e-mail"),
        (vec![other], "type otherName"),
    ] {
        let why = refusal(&der(&params(names.clone())));
        assert!(why.contains(reason), "{names:?}: {why}");
    }
    // Names that no encoder makes: a URI in UTF-16, an empty list, bytes that are no names.
    let utf16: Vec<u8> = ID.encode_utf16().flat_map(u16::to_be_bytes).collect();
    assert!(refusal(&with_raw_names(&tlv(0x86, &utf16))).contains("spiffe://"));
    assert!(
        refusal(&with_raw_names(&tlv(0x86, b"spiffe://\xff\xfe/ns/a/sa/b"))).contains("invalid encoding")
    );
    assert!(refusal(&with_raw_names(&[])).contains("no URI name"));
    assert!(refusal(&with_raw_names(&[0x86, 0x20, 0x41])).contains("cannot be parsed"));
}

#[test]
fn a_request_for_more_than_a_name_is_refused() {
    let mut ca = good();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    assert!(refusal(&der(&ca)).contains("asks for a CA certificate"));
    let mut no_ca = good();
    no_ca.is_ca = IsCa::ExplicitNoCa;
    assert!(refusal(&der(&no_ca)).contains("extension 2.5.29.19"));
    let mut eku = good();
    eku.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
    assert!(refusal(&der(&eku)).contains("extended key usage"));
    let mut usage = good();
    usage.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    assert!(refusal(&der(&usage)).contains("asks for a key usage"));
    let mut constraints = good();
    constraints.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 30], tlv(0x30, &[]))];
    assert!(
        refusal(&der(&constraints)).contains("2.5.29.30") || refusal(&der(&constraints)).contains("parsed")
    );
    let mut unknown = good();
    unknown.custom_extensions =
        vec![CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], vec![5, 0])];
    assert!(refusal(&der(&unknown)).contains("extension 1.3.6.1.4.1.99999.1"));
    let mut named = good();
    named.distinguished_name.push(DnType::CommonName, "web");
    assert!(refusal(&der(&named)).contains("subject \"CN=web\" is not empty"));
    let mut twice = good();
    let again = tlv(0x30, &tlv(0x86, b"spiffe://cluster.local/ns/shop/sa/admin"));
    twice.custom_extensions = vec![CustomExtension::from_oid_content(SAN_OID, again)];
    assert!(refusal(&der(&twice)).contains("several extensions"));
}

#[test]
fn attributes_other_than_one_extension_request_are_refused() {
    let challenge =
        Attribute { oid: &[1, 2, 840, 113_549, 1, 9, 7], values: tlv(0x31, &tlv(0x0c, b"secret")) };
    let with =
        |params: &CertificateParams, attribute| der_with(params, &PKCS_ECDSA_P256_SHA256, vec![attribute]);
    assert!(refusal(&with(&good(), challenge.clone())).contains("attribute 1.2.840.113549.1.9."));
    assert!(refusal(&with(&params(vec![]), challenge)).contains("attribute 1.2.840.113549.1.9.7"));
    let admin = tlv(0x30, &extension("spiffe://cluster.local/ns/shop/sa/admin"));
    let own = tlv(0x30, &extension(ID));
    let second = Attribute { oid: EXTENSION_REQUEST, values: tlv(0x31, &admin) };
    assert!(refusal(&with(&good(), second)).contains("attribute"));
    // Two values in one attribute, of which a parser may only see the first.
    let double = Attribute { oid: EXTENSION_REQUEST, values: tlv(0x31, &[own.clone(), admin].concat()) };
    assert!(refusal(&with(&params(vec![]), double)).contains("more than one value"));
    let single = Attribute { oid: EXTENSION_REQUEST, values: tlv(0x31, &own) };
    assert!(check(&with(&params(vec![]), single), Expected::Workload(&ID.parse().unwrap())).is_ok());
}

#[test]
fn other_key_types_are_refused() {
    for (algorithm, reason) in
        [(&PKCS_RSA_SHA256, "RSA"), (&PKCS_ECDSA_P384_SHA384, "EC on curve"), (&PKCS_ED25519, "1.3.101.112")]
    {
        let why = refusal(&der_with(&good(), algorithm, Vec::new()));
        assert!(why.starts_with("key type") && why.contains(reason), "{why}");
    }
}

#[test]
fn a_request_without_proof_of_the_key_is_refused() {
    let request = der(&good());
    let mut forged = request.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert!(refusal(&forged).contains("signature does not fit"));
    // Somebody else's public key in a request that one has signed oneself.
    let (own, others) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut swapped = good().serialize_request(&own).unwrap().der().to_vec();
    let at = swapped.windows(65).position(|w| w == own.public_key_raw()).unwrap();
    swapped[at..at + 65].copy_from_slice(others.public_key_raw());
    assert!(refusal(&swapped).contains("signature does not fit"));
    // A name changed after signing.
    let mut renamed = request.clone();
    let at = renamed.windows(3).position(|w| w == b"web").unwrap();
    renamed[at..at + 3].copy_from_slice(b"adm");
    assert!(refusal(&renamed).contains("signature does not fit"));
}

#[test]
fn bytes_that_are_no_request_are_refused() {
    let request = der(&good());
    assert!(refusal(&[]).contains("cannot be parsed"));
    assert!(refusal(b"-----BEGIN CERTIFICATE REQUEST-----").contains("cannot be parsed"));
    assert!(refusal(&vec![0x30; MAX_CSR + 1]).contains("4097 bytes"));
    assert!(refusal(&[request.clone(), vec![0]].concat()).contains("bytes after its end"));
    for cut in 0..request.len() {
        refusal(&request[..cut]);
    }
    // No flipped bit anywhere goes unnoticed: all of it is signed, or is the signature, or the frame around both.
    for at in 0..request.len() {
        for bit in 0..8 {
            let mut flipped = request.clone();
            flipped[at] ^= 1 << bit;
            refusal(&flipped);
        }
    }
}

#[test]
fn a_node_may_leave_its_name_out_but_not_take_another() {
    let node = NodeId::new("cluster.local", "node-a").unwrap();
    let check_node = |names| check(&der(&params(names)), Expected::Node(&node));
    assert!(check_node(vec![]).is_ok());
    assert!(check_node(vec![uri("spiffe://cluster.local/node/node-a")]).is_ok());
    for name in ["spiffe://cluster.local/node/node-b", "spiffe://other/node/node-a", ID, "node-a"] {
        assert!(check_node(vec![uri(name)]).is_err(), "{name}");
    }
    assert!(check_node(vec![dns("node-a")]).is_err());
}

proptest! {
    /// Bytes put anywhere into a request, or taken out of it, are never taken and never make the parser panic.
    #[test]
    fn a_spliced_request_is_refused(at in 0..300_usize, cut in 0..40_usize, put in prop::collection::vec(any::<u8>(), 0..40)) {
        let request = der(&good());
        let (at, end) = (at.min(request.len()), (at + cut).min(request.len()));
        let mut spliced = request.clone();
        spliced.splice(at..end, put);
        prop_assume!(spliced != request);
        refusal(&spliced);
    }
}
