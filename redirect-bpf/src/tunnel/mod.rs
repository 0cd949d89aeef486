//! Around the tunnel between nodes: drops pods' packets that would cross between nodes in clear text (strict mode), and
//! makes TCP segments fit the tunnel.
//!
//! ```text
//! <bpffs>/sockmesh-tunnel/<node, '_' for '.'>/
//!   maps-<layout>/<NAME>                    every map of `programs/src/tunnel/maps.rs`
//!   links/<device number>-<in|out>-<program>  tcx links, or before Linux 6.6 the program of a filter of qdisc clsact
//! ```
//!
//! Nothing here is shared with the redirection of connections: a new layout of one does not touch the other. Maps of
//! another layout are in a directory of another name; they stay in force until the new ones are filled, and then every
//! program is replaced inside its link, so there is no moment without strict mode.

mod attach;
mod filter;
mod policy;
#[path = "../../programs/src/tunnel/types.rs"]
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "the programs' side needs what this side does not"
)]
pub(crate) mod types;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

pub use attach::Attach;
pub use filter::{CauseCount, Direction, Dropped, TunnelFilter, TunnelOptions, TunnelStatus};
pub use policy::{Device, Pod, Policy, RemoteRange, Role, Strict};
pub use types::CAUSE_NAMES;

use crate::{error::Error, layout::Pins, redirect::remove_directory};

/// The directory of one node.
fn directory(bpffs: &Path, node: &str) -> Result<PathBuf, Error> {
    let redirect = Pins::new(bpffs, node)?.root;
    let name = redirect.file_name().unwrap_or_default();
    Ok(bpffs.join("sockmesh-tunnel").join(name))
}

/// Removes every link, program and map around the tunnel that is pinned for `node`. Nothing pinned is no error. Has to be
/// called in the node's network namespace where programs were attached without links (before Linux 6.6); the empty qdisc
/// clsact stays there, since others may use it.
///
/// # Errors
/// Names what could not be removed; a second call goes on where this one ended.
pub fn uninstall(bpffs: &Path, node: &str) -> Result<(), Error> {
    let root = directory(bpffs, node)?;
    if !root.exists() {
        return Ok(());
    }
    attach::detach_others(&root.join("links"), &[])?;
    remove_directory(&root)?;
    // The last node of this machine takes the common directory with it.
    match fs::remove_dir(bpffs.join("sockmesh-tunnel")) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => {
            Err(Error::Sys { what: "remove the directory of pins".to_owned(), source: error })
        }
        _ => Ok(()),
    }
}
