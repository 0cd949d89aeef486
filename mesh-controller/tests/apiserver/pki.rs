//! Keys and certificates of the API server and its users.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};

/// The CA; its files are in the directory.
pub struct Pki {
    issuer: Issuer<'static, KeyPair>,
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

fn params(common_name: &str, organization: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    if let Some(organization) = organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    params
}

impl Pki {
    /// A CA, the API server's certificate, the key of service accounts, and the users `admin`, `controller` and `cleanup`.
    pub fn make(dir: &Path) -> Self {
        let ca_key = key();
        let mut ca = params("test-ca", None);
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate = ca.self_signed(&ca_key).unwrap();
        std::fs::write(dir.join("ca.crt"), certificate.pem()).unwrap();
        let accounts = key();
        std::fs::write(dir.join("sa.key"), accounts.serialize_pem()).unwrap();
        std::fs::write(dir.join("sa.pub"), accounts.public_key_pem()).unwrap();
        let pki = Self { issuer: Issuer::new(ca, ca_key) };
        let mut server = params("kube-apiserver", None);
        server.subject_alt_names = vec![
            SanType::IpAddress([127, 0, 0, 1].into()),
            SanType::DnsName("localhost".try_into().unwrap()),
        ];
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        pki.issue(dir, "apiserver", server);
        for (user, groups) in [("admin", Some("system:masters")), ("controller", None), ("cleanup", None)] {
            let mut client = params(user, groups);
            client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            pki.issue(dir, user, client);
        }
        pki
    }

    fn issue(&self, dir: &Path, name: &str, params: CertificateParams) {
        let key = key();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(dir.join(format!("{name}.crt")), certificate.pem()).unwrap();
        std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}
