//! Datagrams come to a device, and frames out of its TUN device.
#![no_main]

use wireguard::device::user::fuzzing;

libfuzzer_sys::fuzz_target!(
    init: sockmesh_fuzz::lay_down(fuzzing::datagram_seeds()),
    |bytes: &[u8]| fuzzing::datagrams(bytes)
);
