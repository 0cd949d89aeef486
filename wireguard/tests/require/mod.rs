//! What these tests need of the computer.

/// Why tests in network namespaces cannot run here; None if they can.
pub(crate) fn missing() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root");
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        return Some("this kernel has no TUN devices (/dev/net/tun)");
    }
    None
}

/// Returns from the test, saying why, where it cannot run.
#[macro_export]
macro_rules! require_network {
    () => {
        if let Some(reason) = $crate::require::missing() {
            println!("skipped: {reason}");
            return;
        }
    };
}
