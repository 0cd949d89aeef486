//! Compiles the protobuf definitions without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        [
            "envoy/service/discovery/v3/discovery.proto",
            "sockmesh/v1/resources.proto",
            "sockmesh/v1/certificates.proto",
            "sockmesh/v1/nodes.proto",
        ],
        ["proto"],
    )?;
    // `Any.value` as `Bytes`: one encoded resource is shared by the responses to all nodes.
    tonic_prost_build::configure()
        .compile_well_known_types(true)
        .bytes(".google.protobuf.Any")
        .bytes(".sockmesh.v1")
        .include_file("mesh_api.rs")
        .compile_fds(descriptors)?;
    Ok(())
}
