//! Generated protobuf types, clients and servers, in modules named as their packages.
#![allow(missing_docs, unreachable_pub, clippy::all)]

tonic::include_proto!("mesh_api");

/// Delta transport: `AggregatedDiscoveryService` and its messages.
pub use envoy::service::discovery::v3 as discovery;
/// `google.protobuf.Any` with shared bytes.
pub use google::protobuf::Any;
/// The error that a NACK carries.
pub use google::rpc::Status;
/// Resources and certificate services of the mesh.
pub use sockmesh::v1 as mesh;
