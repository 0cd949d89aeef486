//! The kernel's reverse path filter at the tunnel's own devices.

use std::fs;

/// For all devices of this thread's network namespace.
const ALL: &str = "/proc/sys/net/ipv4/conf/all/rp_filter";
/// A route back by any device is asked for (`rp_filter` of the kernel's ip-sysctl.rst).
const LOOSE: i32 = 2;

/// What `rp_filter` of a device of the tunnel is to be: off, for the tunnel itself lets nothing in but from the ranges of the
/// node that sent it. Answers may leave by another device, of the node or of the tunnel, and of a device that has no address
/// yet the loose filter, too, drops such packets (`__fib_validate_source` in net/ipv4/fib_frontend.c). The larger of a
/// device's mode and that of all holds: where all are filtered, loosely is the least.
pub(crate) fn mode() -> i32 {
    of_device(fs::read_to_string(ALL).ok().as_deref())
}

fn of_device(all: Option<&str>) -> i32 {
    if all.is_some_and(|all| all.trim() == "0") { 0 } else { LOOSE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tunnels_devices_are_as_lenient_as_the_node_lets_them() {
        assert_eq!([Some("0\n"), Some("1\n"), Some("2\n"), None].map(of_device), [0, LOOSE, LOOSE, LOOSE]);
    }
}
