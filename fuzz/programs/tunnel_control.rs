//! An agent speaks to the tunnel's process.
#![no_main]

use node_proxy::tunnel::fuzzing;

libfuzzer_sys::fuzz_target!(
    init: sockmesh_fuzz::lay_down(fuzzing::seeds()),
    |bytes: &[u8]| fuzzing::control(bytes)
);
