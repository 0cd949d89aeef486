//! Why a request or connection ended the way it did: one closed set of flags.
//!
//! The names follow Envoy's response flags (`envoy.data.accesslog.v3.ResponseFlags`) where one exists, so that existing
//! dashboards and people understand them; the mesh's own follow the same style. They appear in the access log, in the
//! `response_flags` metric label and in the [`HEADER`] response header.

use std::fmt;

/// Response header that carries the reasons of a reply made by the mesh itself.
pub const HEADER: &str = "x-sockmesh-reason";

macro_rules! reasons {
    ($($variant:ident = $bit:literal, $flag:literal, $text:literal;)*) => {
        /// One reason.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Reason {
            $(#[doc = $text] $variant = $bit,)*
        }

        impl Reason {
            const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The short flag, e.g. `UF`.
            #[must_use]
            pub fn flag(self) -> &'static str {
                match self { $(Self::$variant => $flag,)* }
            }

            /// A sentence for a person.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

reasons! {
    UpstreamConnectFailure = 0, "UF", "no connection to the upstream could be made";
    UpstreamOverflow = 1, "UO", "a connection or request limit towards the upstream was reached";
    NoHealthyUpstream = 2, "UH", "the service has no ready endpoint";
    NoRoute = 3, "NR", "nothing is known of the destination";
    RetryLimit = 4, "URX", "the upstream still failed after the retries that the policy allows";
    UpstreamTimeout = 5, "UT", "the upstream did not answer in time";
    DurationTimeout = 6, "DT", "the request took longer than its timeout";
    DownstreamTermination = 7, "DC", "the client went away before the answer was complete";
    UpstreamTermination = 8, "UC", "the upstream closed the connection before the answer was complete";
    UpstreamReset = 9, "UR", "the upstream reset the stream";
    UpstreamProtocolError = 10, "UPE", "the upstream's answer was not valid";
    DownstreamProtocolError = 11, "DPE", "the client's request was not valid";
    StreamIdleTimeout = 12, "SI", "nothing moved on the stream for its idle timeout";
    RequestHeaderTimeout = 13, "RHT", "the client did not send a complete request head in time";
    PolicyDenied = 14, "DENY", "policy does not allow it";
    PlaintextRefused = 15, "PLAIN", "the workload is strict and the connection bears no identity";
    TlsFailure = 16, "TLS", "the mutual TLS handshake failed";
    IdentityMismatch = 17, "IDM", "the peer is not the workload that was meant";
    NoCertificate = 18, "NC", "the mesh holds no valid certificate for the pod";
    Unsynced = 19, "UNS", "the node has no configuration yet";
    OverBudget = 20, "OB", "the pod used up its share of the proxy";
    Draining = 21, "DRAIN", "the proxy or the workload is shutting down";
    RetryBudget = 22, "RB", "a retry was due but the retry budget is used up";
    PeerGone = 23, "GONE", "the peer's pod is no longer part of the mesh";
}

/// A set of [`Reason`]s.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Reasons(u32);

impl Reasons {
    /// No reason: all went well.
    pub const NONE: Self = Self(0);

    /// Adds one.
    pub fn add(&mut self, reason: Reason) {
        self.0 |= 1 << reason as u8;
    }

    /// Whether it holds `reason`.
    #[must_use]
    pub fn has(self, reason: Reason) -> bool {
        self.0 & (1 << reason as u8) != 0
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those it holds.
    pub fn iter(self) -> impl Iterator<Item = Reason> {
        Reason::ALL.iter().copied().filter(move |r| self.has(*r))
    }
}

impl From<Reason> for Reasons {
    fn from(reason: Reason) -> Self {
        let mut set = Self::NONE;
        set.add(reason);
        set
    }
}

/// Flags joined by commas, `-` for none (Istio's convention for the `response_flags` label).
impl fmt::Display for Reasons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        for (i, reason) in self.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            f.write_str(reason.flag())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Reasons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
