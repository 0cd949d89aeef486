//! In a test program of its own, because it changes the whole process.

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit};

#[test]
fn keyd_leaves_no_core_dump_and_cannot_be_traced() {
    node_proxy::keyd::harden().expect("every process may take these from itself");
    assert!(!prctl::get_dumpable().expect("prctl answers"));
    assert_eq!(getrlimit(Resource::RLIMIT_CORE).expect("getrlimit answers"), (0, 0));
}
