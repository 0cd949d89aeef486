//! Where the controller is and what to show it.

use std::fmt;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// Longest time for TCP and TLS to the controller.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A controller that answers no HTTP/2 ping for this long is gone; also the interval of the pings.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Pause before another attempt is made beside those that have not come to anything yet. The address is usually a
/// Service's, each connection to which may lead to another replica, and one whose machine is gone stays among them for
/// most of a minute.
const NEXT_ATTEMPT: Duration = Duration::from_secs(1);

/// The outcome of the attempt that ends first, of one and another after each pause.
async fn first_to_end<T, E, F: Future<Output = Result<T, E>>>(attempt: impl Fn() -> F) -> Result<T, E> {
    let mut attempts = FuturesUnordered::new();
    loop {
        attempts.push(attempt());
        if let Ok(Some(ended)) = tokio::time::timeout(NEXT_ATTEMPT, attempts.next()).await {
            return ended;
        }
    }
}

/// A node's client certificate and its key.
#[derive(Clone)]
pub struct ClientIdentity {
    /// Chain, leaf first, PEM.
    pub chain_pem: String,
    /// PKCS#8, PEM.
    pub key_pem: String,
}

impl fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientIdentity(..)")
    }
}

/// The controller's address and the material for mutual TLS with it.
#[derive(Debug, Clone)]
pub struct ControllerEndpoint {
    /// `host:port`; an IPv6 host in brackets.
    pub address: String,
    /// Name that the controller's certificate must bear, e.g. `sockmesh-controller`.
    pub server_name: String,
    /// Roots that the controller's certificate must lead to, PEM. A node puts those of the `Trust` resource here whenever
    /// they change: when a root is replaced, the controller's own certificate comes to lead to the other one.
    pub roots_pem: String,
    /// Absent only for `NodeService.Register`.
    pub identity: Option<ClientIdentity>,
}

/// The controller could not be reached.
#[derive(Debug, thiserror::Error)]
#[error("controller {address} (as {server_name}): {reason}")]
pub struct ConnectError {
    address: String,
    server_name: String,
    reason: String,
}

/// An error and what caused it, as one line: tonic's own messages end before the reason.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}

impl ControllerEndpoint {
    /// Connects with TLS, mutual when [`Self::identity`] is there.
    ///
    /// # Errors
    /// [`ConnectError`] when the address is malformed, nobody answers within 5 s, or either side's certificate is not
    /// accepted. TLS 1.3 servers judge the client's certificate after the handshake: then the first call fails instead.
    pub async fn connect(&self) -> Result<Channel, ConnectError> {
        let fail = |e: tonic::transport::Error| ConnectError {
            address: self.address.clone(),
            server_name: self.server_name.clone(),
            reason: with_causes(&e),
        };
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.roots_pem))
            .domain_name(self.server_name.clone());
        if let Some(identity) = &self.identity {
            tls = tls.identity(Identity::from_pem(&identity.chain_pem, &identity.key_pem));
        }
        let endpoint = Endpoint::from_shared(format!("https://{}", self.address))
            .and_then(|e| e.tls_config(tls))
            .map_err(fail)?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        // Tonic's own limit is for TCP alone: a machine that loses power in the middle of the handshake says nothing more.
        match tokio::time::timeout(CONNECT_TIMEOUT, first_to_end(|| endpoint.connect())).await {
            Ok(connected) => connected.map_err(fail),
            Err(_) => Err(ConnectError {
                address: self.address.clone(),
                server_name: self.server_name.clone(),
                reason: format!("no connection within {CONNECT_TIMEOUT:?}"),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_comes_to_nothing_is_joined_by_others_until_one_ends() {
        let made = Cell::new(0);
        let attempt = || {
            made.set(made.get() + 1);
            let number = made.get();
            async move {
                if number < 3 {
                    std::future::pending::<()>().await;
                }
                Ok::<_, ()>(number)
            }
        };
        assert_eq!(first_to_end(attempt).await, Ok(3));
        assert_eq!(made.get(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_takes_its_time_is_not_given_up_for_a_later_one() {
        let began = tokio::time::Instant::now();
        let attempt = || async {
            tokio::time::sleep(NEXT_ATTEMPT * 3).await;
            Err::<(), _>(began.elapsed())
        };
        assert_eq!(first_to_end(attempt).await, Err(NEXT_ATTEMPT * 3));
    }
}
