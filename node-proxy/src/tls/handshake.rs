//! Connecting and accepting.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::identity::SpiffeId;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::peer::{PeerIdentity, peer_identity};
use super::refusal::Refusal;
use super::signer::SignChannels;
use super::svid::SvidStore;
use super::trust::TrustHandle;

/// How long keyd may take for a signature; a handshake as a whole has 5 s.
pub const SIGN_TIMEOUT: Duration = Duration::from_secs(2);

/// Everything that a worker needs for mutual TLS.
#[derive(Debug)]
pub struct Tls {
    /// Whom the mesh trusts.
    pub trust: TrustHandle,
    /// The pods' certificates.
    pub svids: SvidStore,
    /// The connections to keyd.
    pub channels: Arc<SignChannels>,
}

impl Default for Tls {
    fn default() -> Self {
        Self::new(SIGN_TIMEOUT)
    }
}

impl Tls {
    /// Knows nobody yet: every handshake is refused.
    #[must_use]
    pub fn new(sign_timeout: Duration) -> Self {
        let trust = TrustHandle::default();
        let channels = Arc::new(SignChannels::new(sign_timeout));
        let svids = SvidStore::new(trust.clone(), Arc::clone(&channels));
        Self { trust, svids, channels }
    }

    /// For a connection from pod `uid` to `expected`, with one of `protocols` (ALPN).
    ///
    /// # Errors
    /// [`Refusal::NoOwnCertificate`] and [`Refusal::NoTrust`].
    pub fn connector(
        &self,
        uid: &str,
        expected: &SpiffeId,
        protocols: &[&[u8]],
    ) -> Result<Connector, Refusal> {
        self.trust.get()?;
        self.svids.client_config(uid, expected, protocols).map(Connector)
    }

    /// For a connection to pod `uid`, with one of `protocols` (ALPN, most preferred first).
    ///
    /// # Errors
    /// [`Refusal::NoOwnCertificate`] and [`Refusal::NoTrust`].
    pub fn acceptor(&self, uid: &str, protocols: &[&[u8]]) -> Result<Acceptor, Refusal> {
        self.trust.get()?;
        self.svids.server_config(uid, protocols).map(Acceptor)
    }
}

/// Makes one connection.
#[derive(Debug)]
pub struct Connector(Arc<ClientConfig>);

impl Connector {
    /// Runs the handshake. The peer is the expected one when it ends well; that the peer accepts this side shows with
    /// its first bytes only (TLS 1.3 clients finish first), as an error of reading that [`Refusal::of_io`] understands.
    ///
    /// # Errors
    /// [`Refusal`].
    pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
        self,
        stream: S,
    ) -> Result<client::TlsStream<S>, Refusal> {
        // The name is neither sent nor looked at: peers are known by their certificate.
        let name = ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into());
        let stream = TlsConnector::from(self.0).connect(name, stream).await?;
        match stream.get_ref().1.alpn_protocol() {
            Some(_) => Ok(stream),
            None => Err(Refusal::NoAlpn),
        }
    }
}

/// Accepts connections.
#[derive(Debug)]
pub struct Acceptor(Arc<ServerConfig>);

impl Acceptor {
    /// Runs the handshake and says who the peer is.
    ///
    /// # Errors
    /// [`Refusal`].
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        self,
        stream: S,
    ) -> Result<(server::TlsStream<S>, PeerIdentity), Refusal> {
        let stream = TlsAcceptor::from(self.0).accept(stream).await?;
        let connection = stream.get_ref().1;
        if connection.alpn_protocol().is_none() {
            return Err(Refusal::NoAlpn);
        }
        let peer = peer_identity(connection.peer_certificates().unwrap_or_default())?;
        Ok((stream, peer))
    }
}
