//! The CA on disk: made at the first start, loaded at every other, never replaced by surprise.
//!
//! In the state directory: `ca.pem` and `ca.key` (0600) unless the CA was given by the operator, `issued.log`, and
//! `root.pem` with all roots that nodes are to trust.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use ca::Authority;
use ca::log::{Durability, FileLog, LogError};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use time::OffsetDateTime;

use crate::cluster::TrustAnchor;
use crate::config::Config;

/// Life of a root that the controller makes for itself.
pub(crate) const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Files of the state directory.
#[derive(Debug, Clone)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// Opens the directory, making it with mode 0700 if it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(path: &Path) -> Result<Self> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.with_context(|| format!("state directory {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }

    /// The CA's certificate.
    #[must_use]
    pub fn ca_cert(&self) -> PathBuf {
        self.0.join("ca.pem")
    }

    /// The CA's key.
    #[must_use]
    pub fn ca_key(&self) -> PathBuf {
        self.0.join("ca.key")
    }

    /// What nodes are to trust.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.0.join("root.pem")
    }

    /// The issuance log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.0.join("issued.log")
    }

    /// The issuance log, to be written to.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_log(&self, config: &Config) -> Result<FileLog, LogError> {
        let limit = config.issuance_log_mib << 20;
        Ok(FileLog::open(&self.log(), Durability::EachEntry)?.limited_to(limit))
    }
}

/// Makes a CA if the operator gave none and there never was one.
///
/// # Errors
/// When one half of a CA is there without the other, or the files cannot be written.
pub fn make_if_first(config: &Config, state: &StateDir, now: OffsetDateTime) -> Result<()> {
    let (certificate, key) = (state.ca_cert(), state.ca_key());
    let first = config.ca_cert.is_none() && !certificate.try_exists()? && !key.try_exists()?;
    if first { make_root(&config.trust_domain, &certificate, &key, now) } else { Ok(()) }
}

/// Loads the CA and the roots to trust besides its own, and writes `root.pem`.
///
/// # Errors
/// When a CA that should be there cannot be used; another one is then not made, because nodes would not trust it.
pub fn open(config: &Config, state: &StateDir, now: OffsetDateTime) -> Result<TrustAnchor> {
    let (certificate, key) = match (&config.ca_cert, &config.ca_key) {
        (Some(certificate), Some(key)) => (certificate.clone(), key.clone()),
        _ => {
            let (certificate, key) = (state.ca_cert(), state.ca_key());
            match (certificate.try_exists()?, key.try_exists()?) {
                (true, true) => only_for_owner(&key)?,
                (false, false) => {
                    bail!("{} and {} are gone: restore them", certificate.display(), key.display())
                }
                (true, false) => bail!(
                    "{} is there but {} is not: restore the key, or remove the certificate to begin with a new CA that no \
                     node trusts yet",
                    certificate.display(),
                    key.display()
                ),
                (false, true) => bail!(
                    "{} is there but {} is not: restore the certificate, or remove the key to begin with a new CA that no \
                     node trusts yet",
                    key.display(),
                    certificate.display()
                ),
            }
            (certificate, key)
        }
    };
    let log = state.open_log(config)?;
    let authority = Authority::load_files(&config.trust_domain, &certificate, &key, now, log)
        .with_context(|| format!("CA {} with key {}", certificate.display(), key.display()))?;
    let mut roots: Vec<Arc<[u8]>> = vec![authority.root_der().into()];
    let mut bundle = authority.root_pem();
    if let Some(file) = &config.trust_roots {
        let text = fs::read_to_string(file).with_context(|| format!("--trust-roots {}", file.display()))?;
        for root in CertificateDer::pem_slice_iter(text.as_bytes()) {
            let root: Arc<[u8]> =
                root.with_context(|| format!("--trust-roots {}", file.display()))?.as_ref().into();
            if !roots.contains(&root) {
                roots.push(root);
            }
        }
        bundle.push_str(&text);
    }
    replace(&state.root(), bundle.as_bytes(), 0o644)?;
    Ok(TrustAnchor { authority, roots })
}

fn only_for_owner(key: &Path) -> Result<()> {
    let mode = fs::metadata(key).with_context(|| format!("key {}", key.display()))?.permissions().mode();
    if mode & 0o077 != 0 {
        bail!("{} can be read by others (mode {:03o}): chmod 600 it", key.display(), mode & 0o777);
    }
    Ok(())
}

fn make_root(trust_domain: &str, certificate: &Path, key: &Path, now: OffsetDateTime) -> Result<()> {
    let root = Authority::make_root(trust_domain, ROOT_LIFE, now)?;
    replace(key, root.key_pem.as_bytes(), 0o600)?;
    replace(certificate, root.certificate_pem.as_bytes(), 0o644)?;
    tracing::info!(certificate = %certificate.display(), "made a root CA");
    Ok(())
}

/// Writes a file so that it is there as a whole or not at all.
fn replace(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let write = || -> io::Result<()> {
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
