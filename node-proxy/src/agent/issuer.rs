//! Which root signs, and when certificates that another root issued are replaced.
//!
//! The first root of the bundle that the controller streams is the one that signs; it is another one after a rotation's
//! switch, which ends only when nobody has a certificate of the last root any more. So those are replaced long before they
//! are due, each at a moment of its own by chance.

use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::sync::watch;
use webpki::{EndEntityCert, KeyUsage};

use super::Agent;
use super::certificates::now;
use crate::tls::provider::signature_algorithms;

/// Shortest time until a certificate that replaced one of another root is itself replaced for that reason.
const ISSUED_AGAIN: Duration = Duration::from_secs(10);

/// Certificate of a root, DER.
pub(super) type Root = Arc<[u8]>;

/// The root that signs, as far as the controller has said.
pub(super) struct Issuer(watch::Sender<Option<Root>>);

impl Default for Issuer {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Issuer {
    pub(super) fn subscribe(&self) -> watch::Receiver<Option<Root>> {
        self.0.subscribe()
    }

    pub(super) fn root(&self) -> Option<Root> {
        self.0.borrow().clone()
    }
}

/// Keeps the agent's [`Issuer`]; ends only when aborted.
pub(super) async fn follow(agent: Arc<Agent>) {
    let mut changes = agent.changed.subscribe();
    loop {
        let root = agent.state.lock().mesh.trust().and_then(|trust| trust.roots.first().cloned());
        agent.issuer.0.send_if_modified(|known| {
            let changed = root.is_some() && *known != root;
            if changed {
                known.clone_from(&root);
            }
            changed
        });
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Whether another root than `root` issued the certificate (chain, leaf first). Whatever else is wrong with it says
/// nothing of that.
fn is_of_another(root: &[u8], chain: &[CertificateDer<'_>]) -> bool {
    let root = CertificateDer::from(root);
    let Some((leaf, intermediates)) = chain.split_first() else { return false };
    let (Ok(anchor), Ok(leaf)) = (webpki::anchor_from_trusted_cert(&root), EndEntityCert::try_from(leaf))
    else {
        return false;
    };
    let (algorithms, anchors) = (signature_algorithms().all, [anchor]);
    let usage = KeyUsage::client_auth();
    let verified =
        leaf.verify_for_usage(algorithms, &anchors, intermediates, UnixTime::now(), usage, None, None);
    // Two roots may have the same name; then it is the signature that tells them apart.
    matches!(
        verified.map(drop),
        Err(webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey)
    )
}

/// When one bearer's certificate is to be replaced because of its root.
#[derive(Debug, Default)]
pub(super) struct Early {
    /// The root and the certificate that were looked at last, the latter by a name that no other one has.
    seen: Option<(Root, String)>,
    due: Option<i64>,
}

impl Early {
    /// The moment, in seconds since the epoch; none while the root that signs issued the certificate. The same moment for
    /// the same certificate and root.
    pub(super) fn due<'a>(
        &mut self,
        root: Option<Root>,
        name: &str,
        chain: impl FnOnce() -> Vec<CertificateDer<'a>>,
        spread: Duration,
    ) -> Option<i64> {
        let root = root?;
        if self.seen.as_ref().is_none_or(|(of, seen)| *of != root || seen != name) {
            let mut pause = spread.mul_f64(rand::random()).as_secs();
            // One that was just issued is of another root where the controller's replicas are not of one mind yet.
            if self.seen.as_ref().is_some_and(|(of, _)| *of == root) {
                pause = pause.max(ISSUED_AGAIN.as_secs());
            }
            self.due = is_of_another(&root, &chain())
                .then(|| now().saturating_add(i64::try_from(pause).unwrap_or(i64::MAX)));
            self.seen = Some((root, name.to_owned()));
        }
        self.due
    }
}

#[cfg(test)]
mod tests {
    use ca::log::MemoryLog;
    use ca::{Authority, NodeRequest};
    use time::OffsetDateTime;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn authority() -> Authority {
        let now = OffsetDateTime::now_utc();
        let root = Authority::make_root("cluster.local", 1000 * HOUR, now).unwrap();
        let (certificate, key) = (&root.certificate_pem, &root.key_pem);
        Authority::load("cluster.local", certificate, key, now, MemoryLog::default()).unwrap()
    }

    fn certificate_of(authority: &Authority) -> Vec<CertificateDer<'static>> {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        let csr_der = parameters.serialize_request(&key).unwrap().der().to_vec();
        let request = NodeRequest { csr_der: &csr_der, node: "n1", ttl: HOUR };
        let issued = authority.issue_node(&request, OffsetDateTime::now_utc()).unwrap();
        issued.chain_der.into_iter().map(CertificateDer::from).collect()
    }

    #[test]
    fn certificates_of_a_root_that_no_longer_signs_are_due_within_the_spread_and_others_are_not() {
        let (first, second) = (authority(), authority());
        let root = |of: &Authority| Some(Root::from(of.root_der()));
        let spread = Duration::from_secs(1000);
        let chain = certificate_of(&first);
        let mut early = Early::default();
        let mut due = |of: Option<Root>, name: &str, chain: &[CertificateDer<'static>]| {
            early.due(of, name, || chain.to_vec(), spread)
        };
        assert_eq!(due(None, "1", &chain), None, "nothing is known of roots");
        assert_eq!(due(root(&first), "1", &chain), None);
        let began = now();
        let at = due(root(&second), "1", &chain).expect("another root signs");
        assert!((began..=began + 1001).contains(&at), "{began} {at}");
        for _ in 0..20 {
            assert_eq!(due(root(&second), "1", &chain), Some(at), "the moment is chosen once");
        }
        assert_eq!(due(root(&second), "2", &certificate_of(&second)), None, "it was replaced");
        assert_eq!(due(root(&first), "1", &chain), None, "the first root signs again");
    }

    #[test]
    fn moments_are_spread_and_without_a_spread_they_are_at_once() {
        let (first, second) = (authority(), authority());
        let chain = certificate_of(&first);
        let of = |spread| {
            let root = Some(Root::from(second.root_der()));
            Early::default().due(root, "1", || chain.clone(), spread).unwrap() - now()
        };
        let (moments, at_once): (Vec<_>, Vec<_>) =
            (0..40).map(|_| (of(Duration::from_secs(10_000)), of(Duration::ZERO))).unzip();
        assert!(moments.iter().max().unwrap() - moments.iter().min().unwrap() > 2000, "{moments:?}");
        assert!(at_once.iter().all(|at| *at <= 0), "{at_once:?}");
    }

    #[test]
    fn what_is_no_certificate_says_nothing_of_its_root() {
        let root = authority().root_der().to_vec();
        assert!(!is_of_another(&root, &[]));
        assert!(!is_of_another(&root, &[CertificateDer::from(vec![1, 2, 3])]));
        assert!(!is_of_another(&[1, 2, 3], &certificate_of(&authority())));
    }
}
