//! What a service port says it speaks.

use mesh_api::model::AppProtocol;

/// The protocol that `appProtocol` declares, else the one that the port's name begins with (`http-web`, `grpc`), else
/// detection. `appProtocol` values are IANA service names or Kubernetes' own (KEP-3726); Istio's spellings are known
/// too. A value with a meaning that is not ours to know (`example.com/x`) leaves the matter to detection, not to the
/// name.
#[must_use]
pub fn declared(app_protocol: Option<&str>, port_name: &str) -> AppProtocol {
    match app_protocol {
        Some(value) => by_word(&value.to_ascii_lowercase()).unwrap_or_default(),
        None => {
            let name = port_name.to_ascii_lowercase();
            // gRPC-Web is HTTP of either version, whatever its name begins with.
            if name == "grpc-web" || name.starts_with("grpc-web-") {
                return AppProtocol::Detect;
            }
            by_word(name.split('-').next().unwrap_or_default()).unwrap_or_default()
        }
    }
}

fn by_word(word: &str) -> Option<AppProtocol> {
    Some(match word {
        "http" | "kubernetes.io/ws" | "ws" => AppProtocol::Http1,
        "http2" | "h2c" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        "https" | "tls" | "kubernetes.io/wss" | "wss" => AppProtocol::Tls,
        "tcp" | "postgres" | "postgresql" | "mysql" | "redis" | "mongo" | "mongodb" => AppProtocol::Tcp,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use AppProtocol::{Detect, Grpc, Http1, Http2, Tcp, Tls};

    #[test]
    fn app_protocol_wins_over_the_name_and_the_name_over_nothing() {
        for (app_protocol, name, expected) in [
            (Some("http"), "", Http1),
            (Some("HTTP"), "", Http1),
            (Some("kubernetes.io/h2c"), "", Http2),
            (Some("kubernetes.io/ws"), "", Http1),
            (Some("kubernetes.io/wss"), "", Tls),
            (Some("grpc"), "http-web", Grpc),
            (Some("https"), "", Tls),
            (Some("tls"), "", Tls),
            (Some("tcp"), "http", Tcp),
            (Some("example.com/own"), "http", Detect),
            (None, "http", Http1),
            (None, "http-metrics", Http1),
            (None, "http2-api", Http2),
            (None, "grpc-api", Grpc),
            (None, "grpc-web", Detect),
            (None, "grpc-web-ui", Detect),
            (None, "https-admin", Tls),
            (None, "tls", Tls),
            (None, "tcp-x", Tcp),
            (None, "postgres", Tcp),
            (None, "mysql-primary", Tcp),
            (None, "redis", Tcp),
            (None, "mongo-0", Tcp),
            (None, "httpx", Detect),
            (None, "web", Detect),
            (None, "", Detect),
        ] {
            assert_eq!(declared(app_protocol, name), expected, "{app_protocol:?} {name:?}");
        }
    }
}
