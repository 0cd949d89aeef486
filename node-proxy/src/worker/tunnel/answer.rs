//! What the far side of a native tunnel says of its connect to the application, when the header asks for it
//! ([`super::header::TunnelHeader::report`]): one byte before the application's own.
//!
//! Zero is "connected", and the application's bytes follow. Anything else says why not, and the tunnel ends. It is sent
//! as soon as it is known and nothing waits for it: the client's bytes flow meanwhile, so it costs no round trip. The
//! source keeps what it sent until the answer comes, so that another endpoint can be tried in place of one that failed.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::worker::dial::DialError;
use crate::worker::io::Transport;
use crate::worker::reason::Reason;

const CONNECTED: u8 = 0;

macro_rules! failures {
    ($($variant:ident = $code:literal, $reason:ident, $text:literal;)*) => {
        /// Why the far side has no connection to the application.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Failure {
            $(#[doc = $text] $variant,)*
        }

        impl Failure {
            #[cfg(test)]
            const ALL: &'static [Self] = &[$(Self::$variant),*];

            fn code(self) -> u8 {
                match self { $(Self::$variant => $code,)* }
            }

            /// What a byte other than [`CONNECTED`] stands for; a peer of another version may know more than this one.
            fn of(code: u8) -> Self {
                match code { $($code => Self::$variant,)* _ => Self::Other }
            }

            /// The flag that stands for it at the source.
            #[must_use]
            pub fn reason(self) -> Reason {
                match self { $(Self::$variant => Reason::$reason,)* }
            }

            /// A sentence for a person.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

failures! {
    Refused = 1, UpstreamConnectFailure, "the application refused the connection; is it listening on this port?";
    TimedOut = 2, UpstreamTimeout, "the application did not accept the connection in time";
    OverBudget = 3, UpstreamOverflow, "the pod used up its share of its node's proxy";
    Denied = 4, PolicyDenied, "policy at the destination does not allow it";
    PlainRefused = 5, PlaintextRefused, "the workload is strict and the connection bears no identity";
    NoRoute = 6, NoRoute, "the tunnel leads to nothing that the destination's node knows";
    Unsynced = 7, Unsynced, "the destination's node has no configuration yet";
    Other = 255, UpstreamConnectFailure, "the destination's node could not connect to the application; its log says why";
}

impl Failure {
    /// Whether it says something about the endpoint, so that another one is worth trying. What policy denies at one, it
    /// denies at all that are alike.
    #[must_use]
    pub fn is_endpoints(self) -> bool {
        !matches!(self, Self::Denied | Self::PlainRefused)
    }
}

impl From<&DialError> for Failure {
    fn from(error: &DialError) -> Self {
        match error {
            DialError::Connect(_, e) if e.kind() == io::ErrorKind::ConnectionRefused => Self::Refused,
            DialError::ConnectTimeout(..) => Self::TimedOut,
            _ => Self::Other,
        }
    }
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::OverBudget => Self::OverBudget,
            Reason::PolicyDenied => Self::Denied,
            Reason::PlaintextRefused => Self::PlainRefused,
            Reason::NoRoute => Self::NoRoute,
            Reason::Unsynced => Self::Unsynced,
            _ => Self::Other,
        }
    }
}

/// Reads an answer.
///
/// # Errors
/// The far side's reason.
pub fn read(byte: u8) -> Result<(), Failure> {
    if byte == CONNECTED { Ok(()) } else { Err(Failure::of(byte)) }
}

/// Says that the application's connection stands.
///
/// # Errors
/// The tunnel's.
pub async fn connected(tunnel: &mut impl Transport) -> io::Result<()> {
    tunnel.write_all(&[CONNECTED]).await?;
    tunnel.flush().await
}

/// How long the peer may take to close a tunnel that was answered with a failure.
const LINGER: Duration = Duration::from_secs(5);

/// Says why there is no connection and ends the tunnel. What the peer sent ahead is read and dropped until it closes
/// too: closing before that would make the kernel send a reset, which can overtake the answer.
pub async fn failed(mut tunnel: impl Transport, why: Failure) {
    let said = async {
        tunnel.write_all(&[why.code()]).await?;
        tunnel.shutdown().await?;
        let mut ignored = [0; 4096];
        while tunnel.read(&mut ignored).await? > 0 {}
        io::Result::Ok(())
    };
    // A peer that does not wait for the answer has no use for it.
    let _ = timeout(LINGER, said).await;
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[test]
    fn every_failure_survives_the_wire_and_an_unknown_one_is_a_failure_too() {
        for failure in Failure::ALL {
            assert_eq!(read(failure.code()), Err(*failure));
        }
        assert_eq!(read(CONNECTED), Ok(()));
        assert_eq!(read(200), Err(Failure::Other));
    }

    #[tokio::test]
    async fn a_failure_is_told_to_a_peer_that_is_still_sending() {
        let (far, mut near) = duplex(64);
        let source = async {
            near.write_all(&[b'x'; 1000]).await.unwrap();
            let mut answer = Vec::new();
            near.read_to_end(&mut answer).await.unwrap();
            drop(near);
            answer
        };
        let ((), answer) = tokio::join!(failed(far, Failure::Refused), source);
        assert_eq!(answer, [1]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_never_closes_is_left() {
        let (far, _near) = duplex(64);
        failed(far, Failure::TimedOut).await;
    }
}
