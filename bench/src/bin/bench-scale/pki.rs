//! Keys and certificates of the API server and of who talks to it.

use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// Writes a CA (`ca.crt`), the API server's certificate (`apiserver`), the key of service accounts (`sa`) and a client
/// certificate of an administrator (`admin`) into a directory.
pub(crate) fn make(dir: &Path) -> Result<()> {
    let ca_key = KeyPair::generate().context("cannot make a key")?;
    let mut ca = named("bench-scale");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let certificate = ca.self_signed(&ca_key).context("cannot make a CA")?;
    write(&dir.join("ca.crt"), &certificate.pem())?;
    let accounts = KeyPair::generate().context("cannot make a key")?;
    write(&dir.join("sa.key"), &accounts.serialize_pem())?;
    write(&dir.join("sa.pub"), &accounts.public_key_pem())?;
    let issuer = Issuer::new(ca, ca_key);
    let mut server = named("kube-apiserver");
    server.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    issue(dir, "apiserver", &server, &issuer)?;
    let mut admin = named("admin");
    admin.distinguished_name.push(DnType::OrganizationName, "system:masters");
    admin.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    issue(dir, "admin", &admin, &issuer)
}

fn named(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

fn issue(dir: &Path, name: &str, params: &CertificateParams, issuer: &Issuer<'_, KeyPair>) -> Result<()> {
    let key = KeyPair::generate().context("cannot make a key")?;
    let certificate = params.signed_by(&key, issuer).with_context(|| format!("cannot sign for {name}"))?;
    write(&dir.join(format!("{name}.crt")), &certificate.pem())?;
    write(&dir.join(format!("{name}.key")), &key.serialize_pem())
}

fn write(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}
