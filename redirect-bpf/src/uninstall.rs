//! Taking everything away again.

use std::{fs, io, path::Path};

use crate::{
    error::Error, layout::Pins, object::CGROUP_HOOKS, pods::remove_link, redirect::remove_directory,
};

/// Removes every link, program and map pinned for `node`, those around the tunnel too. Nothing pinned is no error.
///
/// # Errors
/// Names what could not be removed; a second call goes on where this one ended.
pub fn uninstall(bpffs: &Path, node: &str) -> Result<(), Error> {
    crate::tunnel::uninstall(bpffs, node)?;
    let pins = Pins::new(bpffs, node)?;
    if !pins.root.exists() {
        return Ok(());
    }
    // Capture ends before what it needs is taken away: connect hooks first.
    for (link, _) in CGROUP_HOOKS.iter().rev() {
        remove_link(&pins.links().join(link))?;
    }
    match pins.pinned_pods() {
        Ok(cookies) => {
            for cookie in cookies {
                remove_link(&pins.pod(cookie))?;
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(Error::Sys { what: format!("list {}", pins.pods().display()), source: error });
        }
    }
    remove_directory(&pins.root)?;
    // The last node of this machine takes the common directory with it.
    let _still_used = fs::remove_dir(bpffs.join("sockmesh"));
    Ok(())
}
