//! How the processes' allocator (jemalloc) gives memory back to the kernel.
//!
//! jemalloc keeps freed pages for reuse and returns them in the course of about ten seconds, driven by further
//! allocations. An agent that has started makes hardly any, so that it would keep for hours what its start needed once:
//! reading the kernel's types for the eBPF programs takes some 30 MB. So the default here is to return pages at once. The
//! worker, for which that would be a system call every few requests, is started with jemalloc's own default.
#![allow(unsafe_code)]

/// Read by jemalloc before `main`; the name is that of jemalloc's `malloc_conf` as tikv-jemalloc-sys builds it.
// SAFETY: the symbol is jemalloc's weak `const char *malloc_conf`, made to be defined by programs: a pointer to a string
// that ends with a zero byte and lives for ever. A reference to an array is such a pointer.
#[used]
#[unsafe(export_name = "_rjem_malloc_conf")]
static SETTINGS: &[u8; 17] = b"dirty_decay_ms:0\0";

/// Variable of the environment, and its value, with which a worker is started: ten seconds, jemalloc's default.
pub const WORKER_SETTINGS: (&str, &str) = ("_RJEM_MALLOC_CONF", "dirty_decay_ms:10000");
