//! The CA in a Secret.
//!
//! Self-signed: made by whichever replica creates the Secret first; the other finds it there and takes it. Given by
//! others (`--ca-mode secret`, as from cert-manager): read, and read again when it changes. In both modes a Secret that is
//! there is never replaced by one of our making, and a CA that cannot be used is an error at start and, later, a reason to
//! stay with the last good one: a fallback would sign what nobody trusts.
//!
//! | key | |
//! |---|---|
//! | `tls.crt`, `tls.key` | the certificate that signs, with its issuers if there are any, and its key |
//! | `ca.crt` | every root that nodes are to trust |
//! | `next.crt`, `next.key`, `rotation` | the state of a rotation, see [`super::rotation`] |

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use ca::Authority;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use time::OffsetDateTime;

use super::calls;
use crate::authority::{ROOT_LIFE, StateDir};
use crate::cluster::TrustAnchor;
use crate::config::{CaMode, Config};
use crate::metrics::Metrics;

/// The certificate that signs.
pub const CERTIFICATE: &str = "tls.crt";
/// Its key.
pub const KEY: &str = "tls.key";
/// All roots to trust.
pub const ROOTS: &str = "ca.crt";
/// Longest wait for one call.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Text of a key of a Secret.
///
/// # Errors
/// When it is missing or not text.
pub fn text<'a>(secret: &'a Secret, key: &str) -> Result<&'a str> {
    let bytes = secret.data.as_ref().and_then(|d| d.get(key)).map(|b| b.0.as_slice()).unwrap_or_default();
    if bytes.is_empty() {
        bail!("it has no {key}");
    }
    std::str::from_utf8(bytes).with_context(|| format!("its {key} is not text"))
}

/// The authority and the roots that a Secret holds.
///
/// # Errors
/// For everything that does not make a CA that can sign now.
pub fn anchor(
    config: &Config,
    state: &StateDir,
    secret: &Secret,
    now: OffsetDateTime,
) -> Result<TrustAnchor> {
    let read = || -> Result<TrustAnchor> {
        let assembled = ca::load::assemble(text(secret, CERTIFICATE)?, text(secret, ROOTS)?)?;
        let log = state.open_log(config)?;
        let key = text(secret, KEY)?;
        let authority = Authority::load(&config.trust_domain, &assembled.chain_pem, key, now, log)?;
        let mut roots: Vec<Arc<[u8]>> = vec![authority.root_der().into()];
        for other in assembled.others {
            let other: Arc<[u8]> = other.into();
            if !roots.contains(&other) {
                roots.push(other);
            }
        }
        Ok(TrustAnchor { authority, roots })
    };
    read().with_context(|| {
        format!(
            "Secret {}/{}: the CA in it cannot be used; mend it, nothing else is used in its place",
            config.namespace, config.ca_secret
        )
    })
}

/// A Secret with a fresh root.
fn fresh(config: &Config, now: OffsetDateTime) -> Result<Secret> {
    let root = Authority::make_root(&config.trust_domain, ROOT_LIFE, now)?;
    let certificate = root.certificate_pem.into_bytes();
    let data = BTreeMap::from([
        (CERTIFICATE.to_owned(), ByteString(certificate.clone())),
        (KEY.to_owned(), ByteString(root.key_pem.as_bytes().to_vec())),
        (ROOTS.to_owned(), ByteString(certificate)),
    ]);
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(config.ca_secret.clone()),
            namespace: Some(config.namespace.clone()),
            labels: Some(super::labels()),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(data),
        ..Secret::default()
    })
}

/// The Secret as it is; made if there is none and the mode allows it.
///
/// # Errors
/// When the API server does not give it, or it has to be there and is not.
pub async fn obtain(
    client: &Client,
    config: &Config,
    metrics: &Metrics,
    now: OffsetDateTime,
) -> Result<Secret> {
    let api: Api<Secret> = Api::namespaced(client.clone(), &config.namespace);
    let name = format!("{}/{}", config.namespace, config.ca_secret);
    let get = || calls::within(TIMEOUT, "ca_secret", metrics, api.get_opt(&config.ca_secret));
    if let Some(secret) = get().await.with_context(|| format!("cannot read Secret {name}"))? {
        return Ok(secret);
    }
    if config.ca_mode == CaMode::Secret {
        bail!(
            "there is no Secret {name}: with --ca-mode secret it has to be there, with tls.crt, tls.key and ca.crt"
        );
    }
    let secret = fresh(config, now)?;
    let parameters = PostParams::default();
    match calls::within(TIMEOUT, "ca_secret", metrics, api.create(&parameters, &secret)).await {
        Ok(made) => {
            tracing::info!(secret = name, "made a root CA");
            Ok(made)
        }
        // Another replica was first, and its root is everybody's.
        Err(error) if error.is_conflict() => {
            let found = get().await.with_context(|| format!("cannot read Secret {name}"))?;
            found.with_context(|| format!("Secret {name} was made and removed at the same time; try again"))
        }
        Err(error) => Err(error).with_context(|| format!("cannot make Secret {name}")),
    }
}
