//! The keys.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use mesh_api::identity::SpiffeId;
use parking_lot::{Mutex, RwLock};
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType, SigningKey};
use zeroize::Zeroizing;

use super::content::is_certificate_verify;
use super::rate::Bucket;
use crate::ipc::proto::{KeyOf, KeydCounters};

/// Why a key was not made or not used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyError {
    /// The identity is none.
    #[error("{0}")]
    Identity(#[from] mesh_api::identity::SpiffeIdError),
    /// The pod has no UID.
    #[error("a key needs the UID of a pod")]
    NoUid,
    /// As many keys as allowed.
    #[error("keyd holds its {0} keys already; drop those of pods that are gone")]
    Full(usize),
    /// Making or using the key failed.
    #[error("key operation failed: {0}")]
    Crypto(String),
    /// There is no such key: dropped, or keyd was started anew.
    #[error("keyd has no key {0:?}")]
    Unknown(String),
    /// Not the content of a TLS 1.3 CertificateVerify.
    #[error("refused: not the content of a TLS 1.3 CertificateVerify (RFC 8446 section 4.4.3)")]
    Content,
    /// Used too often.
    #[error("refused: the key is used more than {0} times a second")]
    Rate(u32),
}

struct Key {
    uid: String,
    pair: Zeroizing<KeyPair>,
    bucket: Mutex<Bucket>,
}

/// All keys of the node's pods, by random ID. Neither shown nor stored.
pub struct Keys {
    by_id: RwLock<HashMap<String, Arc<Key>>>,
    max: usize,
    per_second: u32,
    signed: AtomicU64,
    refused_content: AtomicU64,
    refused_key: AtomicU64,
    refused_rate: AtomicU64,
}

/// A key just made.
pub struct NewKey {
    /// Names it; random, so that the ID of a key from before a restart never names another.
    pub id: String,
    /// Certificate request: empty subject, the identity as the only name (PKCS #10, DER).
    pub csr_der: Vec<u8>,
}

impl Keys {
    /// None yet.
    #[must_use]
    pub fn new(max: usize, per_second: u32) -> Self {
        Self {
            by_id: RwLock::default(),
            max,
            per_second,
            signed: AtomicU64::new(0),
            refused_content: AtomicU64::new(0),
            refused_key: AtomicU64::new(0),
            refused_rate: AtomicU64::new(0),
        }
    }

    /// Makes a key for a pod, and the request for its certificate.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn make(&self, uid: &str, spiffe_id: &str) -> Result<NewKey, KeyError> {
        let id: SpiffeId = spiffe_id.parse()?;
        if uid.is_empty() {
            return Err(KeyError::NoUid);
        }
        let crypto = |e: rcgen::Error| KeyError::Crypto(e.to_string());
        let pair = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto)?);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(id.to_string()).map_err(crypto)?)];
        let csr_der = params.serialize_request(&*pair).map_err(crypto)?.der().to_vec();

        let id = format!("{:032x}", rand::random::<u128>());
        let bucket = Mutex::new(Bucket::new(self.per_second, Instant::now()));
        let mut by_id = self.by_id.write();
        if by_id.len() >= self.max {
            return Err(KeyError::Full(self.max));
        }
        by_id.insert(id.clone(), Arc::new(Key { uid: uid.to_owned(), pair, bucket }));
        Ok(NewKey { id, csr_der })
    }

    /// Forgets a key.
    ///
    /// # Errors
    /// [`KeyError::Unknown`].
    pub fn forget(&self, id: &str) -> Result<(), KeyError> {
        self.by_id.write().remove(id).map(drop).ok_or_else(|| KeyError::Unknown(id.to_owned()))
    }

    /// Signs the content of a CertificateVerify with ECDSA P-256 and SHA-256 (DER).
    ///
    /// # Errors
    /// [`KeyError`] for anything else, for an unknown key, and above the key's rate.
    pub fn sign(&self, id: &str, message: &[u8], now: Instant) -> Result<Vec<u8>, KeyError> {
        if !is_certificate_verify(message) {
            self.refused_content.fetch_add(1, Ordering::Relaxed);
            return Err(KeyError::Content);
        }
        let Some(key) = self.by_id.read().get(id).cloned() else {
            self.refused_key.fetch_add(1, Ordering::Relaxed);
            // What a worker sends is not repeated at any length.
            return Err(KeyError::Unknown(id.chars().take(64).collect()));
        };
        if !key.bucket.lock().take(now) {
            self.refused_rate.fetch_add(1, Ordering::Relaxed);
            return Err(KeyError::Rate(self.per_second));
        }
        let signature = key.pair.sign(message).map_err(|e| KeyError::Crypto(e.to_string()))?;
        self.signed.fetch_add(1, Ordering::Relaxed);
        Ok(signature)
    }

    /// Every key and its pod.
    #[must_use]
    pub fn list(&self) -> Vec<KeyOf> {
        let of = |(id, key): (&String, &Arc<Key>)| KeyOf { key_id: id.clone(), uid: key.uid.clone() };
        self.by_id.read().iter().map(of).collect()
    }

    /// What has happened since the start.
    #[must_use]
    pub fn counters(&self) -> KeydCounters {
        KeydCounters {
            signed: self.signed.load(Ordering::Relaxed),
            refused_content: self.refused_content.load(Ordering::Relaxed),
            refused_key: self.refused_key.load(Ordering::Relaxed),
            refused_rate: self.refused_rate.load(Ordering::Relaxed),
        }
    }
}
