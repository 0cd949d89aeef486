//! Decrypted packets are joined.
#![no_main]

use wireguard::device::user::fuzzing;

libfuzzer_sys::fuzz_target!(
    init: sockmesh_fuzz::lay_down(fuzzing::joins()),
    |bytes: &[u8]| fuzzing::join(bytes)
);
