//! Compiles the messages between the node's processes; `protox` is a protobuf compiler in Rust, so no `protoc` is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/node.proto", "proto/tunnel.proto"], ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    // The table of addresses that the loader adjusts at each start, 30,000 of them, as a bitmap (DT_RELR): 700 KB less to
    // read and keep for each of the node's processes. glibc can do it since 2.36.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    Ok(())
}
