//! What a certificate signing request may hold.
//!
//! A request proves that its sender has the private key, and nothing else: every name in the certificate comes from the
//! decision of the caller, and only the public key is taken from here. A request that asks for more than that, or for
//! something else, is refused with the reason, because its sender is either broken or trying something.

use mesh_api::identity::{SpiffeId, SpiffeIdError};
use x509_parser::asn1_rs::{Sequence, Set};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::{ParsedCriAttribute, X509CriAttribute};
use x509_parser::extensions::{GeneralName, ParsedExtension, X509Extension};
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_PKCS1_RSAENCRYPTION, OID_SIG_ECDSA_WITH_SHA256, Oid,
};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::node::{NodeId, NodeIdError};

/// Longest request in bytes. One with the longest SPIFFE ID stays below it.
pub const MAX_CSR: usize = 4096;

/// Whom the certificate will be for.
#[derive(Debug, Clone, Copy)]
pub enum Expected<'a> {
    /// A pod: the request has an empty subject and exactly this URI name.
    Workload(&'a SpiffeId),
    /// A node: the request has this URI name or none. Its subject is not looked at.
    Node(&'a NodeId),
}

/// Why a request is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CsrRefusal {
    /// Longer than [`MAX_CSR`].
    #[error("request has {0} bytes, at most {MAX_CSR} are allowed")]
    TooLong(usize),
    /// Not a PKCS #10 request (RFC 2986) in DER.
    #[error("request is not DER of a PKCS #10 request: {0}")]
    Malformed(&'static str),
    /// The key is not ECDSA on P-256 in uncompressed form.
    #[error("key type {0} is not ECDSA P-256")]
    KeyType(String),
    /// Signed with another algorithm than ECDSA with SHA-256.
    #[error("signature algorithm {0} is not ecdsa-with-SHA256")]
    SignatureAlgorithm(String),
    /// The sender does not have the private key.
    #[error("signature does not fit the key in the request")]
    BadSignature,
    /// The subject of a pod's request is not empty.
    #[error("subject {0:?} is not empty; a pod is named by its URI name only")]
    Subject(String),
    /// An attribute other than one extension request.
    #[error("attribute {0} does not belong in a request")]
    Attribute(String),
    /// A CA certificate is asked for.
    #[error("request asks for a CA certificate")]
    Ca,
    /// An extended key usage is asked for.
    #[error("request asks for an extended key usage; the CA sets these itself")]
    ExtendedKeyUsage,
    /// A key usage is asked for.
    #[error("request asks for a key usage; the CA sets these itself")]
    KeyUsage,
    /// Another extension than subject alternative names.
    #[error("extension {0} does not belong in a request")]
    Extension(String),
    /// Several extensions of subject alternative names.
    #[error("request has several extensions of alternative names")]
    DuplicateNames,
    /// A pod's request names nobody.
    #[error("request has no URI name; it must have exactly {0}")]
    NoName(String),
    /// More than one name.
    #[error("request has {0} alternative names, exactly one URI is allowed")]
    SeveralNames(usize),
    /// A name that is not a URI, or names where none belong.
    #[error("alternative name of type {0} does not belong in this request")]
    NameType(&'static str),
    /// A URI that is no identity of a workload.
    #[error("URI name is not an identity: {0}")]
    WorkloadName(#[from] SpiffeIdError),
    /// A URI that is no identity of a node.
    #[error("URI name is not a node's identity: {0}")]
    NodeName(#[from] NodeIdError),
    /// An identity, but of somebody else.
    #[error("request is for {asked}, expected {expected}")]
    OtherIdentity {
        /// Identity in the request.
        asked: String,
        /// Identity that the caller decided on.
        expected: String,
    },
}

/// Checks a request and returns its public key (DER of SubjectPublicKeyInfo).
///
/// # Errors
/// [`CsrRefusal`] for anything that does not belong in the request.
pub fn check(der: &[u8], expected: Expected<'_>) -> Result<Vec<u8>, CsrRefusal> {
    if der.len() > MAX_CSR {
        return Err(CsrRefusal::TooLong(der.len()));
    }
    let (rest, request) =
        X509CertificationRequest::from_der(der).map_err(|_| CsrRefusal::Malformed("it cannot be parsed"))?;
    if !rest.is_empty() {
        return Err(CsrRefusal::Malformed("bytes after its end"));
    }
    let info = &request.certification_request_info;
    if info.version.0 != 0 {
        return Err(CsrRefusal::Malformed("version is not 0"));
    }
    check_key(&info.subject_pki)?;
    let algorithm = &request.signature_algorithm;
    if algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 || algorithm.parameters.is_some() {
        return Err(CsrRefusal::SignatureAlgorithm(algorithm.algorithm.to_id_string()));
    }
    if !is_framed_as_der(der, info.raw, &request.signature_value.data) {
        return Err(CsrRefusal::Malformed("its outermost structure is not DER"));
    }
    request.verify_signature().map_err(|_| CsrRefusal::BadSignature)?;

    if matches!(expected, Expected::Workload(_)) && info.subject.iter_rdn().next().is_some() {
        return Err(CsrRefusal::Subject(info.subject.to_string()));
    }
    let attributes: Vec<_> = info.iter_attributes().collect();
    let names = match attributes.as_slice() {
        [] => Vec::new(),
        [one] => requested_names(one)?,
        [_, second, ..] => return Err(CsrRefusal::Attribute(second.oid.to_id_string())),
    };
    check_names(&names, expected)?;
    Ok(info.subject_pki.raw.to_vec())
}

/// Whether these are the bytes that RFC 2986 §4.2 gives for these parts: the parser is lenient with tags, and the frame
/// around the signed part is signed by nobody.
fn is_framed_as_der(der: &[u8], info: &[u8], signature: &[u8]) -> bool {
    // AlgorithmIdentifier { ecdsa-with-SHA256 }, RFC 5758 §3.2.
    const ALGORITHM: [u8; 12] = [0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    // A P-256 signature has at most 72 bytes, so that its length is one byte.
    let Ok(signature_length @ ..0x80) = u8::try_from(signature.len() + 1) else { return false };
    let bit_string = [&[0x03, signature_length, 0x00], signature].concat();
    let length = info.len() + ALGORITHM.len() + bit_string.len();
    let header = match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short @ ..0x80), _) => vec![0x30, short],
        (Ok(byte), _) => vec![0x30, 0x81, byte],
        (_, Ok(word)) => [&[0x30, 0x82][..], &word.to_be_bytes()].concat(),
        _ => return false,
    };
    der == [&header, info, &ALGORITHM, &bit_string].concat()
}

fn check_key(key: &SubjectPublicKeyInfo<'_>) -> Result<(), CsrRefusal> {
    let algorithm = &key.algorithm;
    if algorithm.algorithm == OID_PKCS1_RSAENCRYPTION {
        return Err(CsrRefusal::KeyType("RSA".to_owned()));
    }
    if algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY {
        return Err(CsrRefusal::KeyType(algorithm.algorithm.to_id_string()));
    }
    let curve: Option<Oid<'_>> = algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
    match curve {
        Some(curve) if curve == OID_EC_P256 => {}
        Some(curve) => return Err(CsrRefusal::KeyType(format!("EC on curve {}", curve.to_id_string()))),
        None => return Err(CsrRefusal::KeyType("EC without a named curve".to_owned())),
    }
    // RFC 5480 §2.2: 0x04 and two coordinates of 32 bytes. That the point is on the curve is seen when it verifies.
    let point = &key.subject_public_key;
    if point.data.len() != 65 || point.data[0] != 4 || point.unused_bits != 0 {
        return Err(CsrRefusal::KeyType("EC P-256 with a point that is not uncompressed".to_owned()));
    }
    Ok(())
}

/// The names of the only extension that a request may have.
fn requested_names<'a>(attribute: &'a X509CriAttribute<'a>) -> Result<Vec<GeneralName<'a>>, CsrRefusal> {
    let ParsedCriAttribute::ExtensionRequest(requested) = attribute.parsed_attribute() else {
        return Err(CsrRefusal::Attribute(attribute.oid.to_id_string()));
    };
    check_single_value(attribute.value)?;
    let mut names = None;
    for extension in &requested.extensions {
        let of_this = names_of(extension)?;
        if names.replace(of_this).is_some() {
            return Err(CsrRefusal::DuplicateNames);
        }
    }
    Ok(names.unwrap_or_default())
}

/// An attribute is a SET of values; the parser reads the first and would not tell of a second.
fn check_single_value(value: &[u8]) -> Result<(), CsrRefusal> {
    const ODD: CsrRefusal = CsrRefusal::Malformed("extension request with more than one value");
    let (rest, set) = Set::from_der(value).map_err(|_| ODD)?;
    if !rest.is_empty() {
        return Err(ODD);
    }
    let (rest, _) = Sequence::from_der(&set.content).map_err(|_| ODD)?;
    if rest.is_empty() { Ok(()) } else { Err(ODD) }
}

fn names_of<'a>(extension: &'a X509Extension<'a>) -> Result<Vec<GeneralName<'a>>, CsrRefusal> {
    match extension.parsed_extension() {
        ParsedExtension::SubjectAlternativeName(san) => Ok(san.general_names.clone()),
        ParsedExtension::BasicConstraints(basic) if basic.ca => Err(CsrRefusal::Ca),
        ParsedExtension::ExtendedKeyUsage(_) => Err(CsrRefusal::ExtendedKeyUsage),
        ParsedExtension::KeyUsage(_) => Err(CsrRefusal::KeyUsage),
        ParsedExtension::ParseError { .. } => Err(CsrRefusal::Malformed("an extension cannot be parsed")),
        _ => Err(CsrRefusal::Extension(extension.oid.to_id_string())),
    }
}

fn check_names(names: &[GeneralName<'_>], expected: Expected<'_>) -> Result<(), CsrRefusal> {
    let name = match (names, expected) {
        ([], Expected::Workload(id)) => return Err(CsrRefusal::NoName(id.to_string())),
        ([], _) => return Ok(()),
        ([name], _) => name,
        (several, _) => return Err(CsrRefusal::SeveralNames(several.len())),
    };
    let GeneralName::URI(uri) = name else {
        return Err(CsrRefusal::NameType(type_of(name)));
    };
    let other = |expected: String| CsrRefusal::OtherIdentity { asked: (*uri).to_owned(), expected };
    match expected {
        Expected::Workload(id) if uri.parse::<SpiffeId>()? == *id => Ok(()),
        Expected::Workload(id) => Err(other(id.to_string())),
        Expected::Node(id) if uri.parse::<NodeId>()? == *id => Ok(()),
        Expected::Node(id) => Err(other(id.to_string())),
    }
}

fn type_of(name: &GeneralName<'_>) -> &'static str {
    match name {
        GeneralName::OtherName(..) => "otherName",
        GeneralName::RFC822Name(_) => "e-mail",
        GeneralName::DNSName(_) => "DNS",
        GeneralName::X400Address(_) => "X.400",
        GeneralName::DirectoryName(_) => "directory name",
        GeneralName::EDIPartyName(_) => "EDI party",
        GeneralName::URI(_) => "URI",
        GeneralName::IPAddress(_) => "IP address",
        GeneralName::RegisteredID(_) => "registered ID",
        GeneralName::Invalid(..) => "invalid encoding",
    }
}
