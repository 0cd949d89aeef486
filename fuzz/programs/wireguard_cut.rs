//! A frame out of the TUN device is cut.
#![no_main]

use wireguard::device::user::fuzzing;

libfuzzer_sys::fuzz_target!(
    init: sockmesh_fuzz::lay_down(fuzzing::cuts()),
    |bytes: &[u8]| fuzzing::cut(bytes)
);
