//! Opening: load or adopt, attach or update in place. Then what concerns the node as a whole.

use std::{
    collections::HashSet,
    fs, io,
    net::IpAddr,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

use nix::libc;

use crate::{
    error::Error,
    exclusions::ExclusionMaps,
    layout::{MAPS, MapSpec, Pins},
    object::{CGROUP_HOOKS, CgroupProgram, Loader},
    probe::{cgroup2_at, find_cgroup2},
    settings::{Opened, Options, PodSpec},
    sys::{self, Map},
    types::{
        self, Addr, BRANCH_NAMES, ConnectionKey, EVERY_POD, ListenerKey, NodeEntry, Note, PodEntry,
        RefusedKey,
    },
};

/// The installed redirection of one node. Dropping it leaves everything in force: what captures is pinned.
#[derive(Debug)]
pub struct Redirect {
    pub(crate) pins: Pins,
    pub(crate) loader: Loader,
    opened: Opened,
    cpus: usize,
    node: Map<u32, NodeEntry>,
    pub(crate) pods: Map<u64, PodEntry>,
    pub(crate) pod_addresses: Map<Addr, u64>,
    pub(crate) listeners: Map<ListenerKey, u32>,
    pub(crate) exclusions: ExclusionMaps,
    refused: Map<RefusedKey, u32>,
    refused_now: HashSet<RefusedKey>,
    own: Map<u32, u32>,
    notes: Map<u32, Note>,
    pub(crate) fast: Map<ConnectionKey, u32>,
    pub(crate) paths: Map<u32, types::Path>,
    counters: OwnedFd,
}

impl Redirect {
    /// Loads the programs, takes over what is pinned, and attaches what is not. Pods whose namespace is gone are
    /// forgotten.
    ///
    /// # Errors
    /// Names the missing file system, right or kernel feature; see also [`crate::probe`].
    pub fn open(options: &Options) -> Result<Self, Error> {
        Self::open_with(options, &[])
    }

    /// The same, with these pods and their listeners in the maps from the first moment. Maps that are made anew cannot have
    /// the listeners of those before them, and without a listener a pod is refused.
    ///
    /// # Errors
    /// As [`Redirect::open`].
    pub fn open_with(options: &Options, pods: &[PodSpec<'_>]) -> Result<Self, Error> {
        require_bpffs(&options.bpffs)?;
        let cgroup_path = match &options.cgroup {
            Some(path) => cgroup2_at(path),
            None => find_cgroup2().ok_or(Error::NoCgroup2)?,
        };
        let cgroup = fs::File::open(&cgroup_path)
            .map_err(Error::sys(format!("open cgroup2 root {}", cgroup_path.display())))?;
        let pins = Pins::new(&options.bpffs, &options.node)?;
        finish_replacing_maps(&pins)?;
        for directory in [pins.maps(), pins.links(), pins.pods()] {
            make_directory(&directory)?;
        }

        let (opened, maps) = match compare_layout(&pins)? {
            Compared::NothingPinned => (Opened::Fresh, pins.maps()),
            Compared::Same => (Opened::Adopted, pins.maps()),
            Compared::Differs(why) => {
                make_directory(&pins.next_maps())?;
                (Opened::Recreated(why), pins.next_maps())
            }
        };
        let mut loader = Loader::new();
        let mut object = loader.open(&maps)?;
        let recreated = matches!(opened, Opened::Recreated(_));
        if recreated {
            carry_over(&pins)?;
        }
        let cpus = aya::util::nr_cpus().map_err(|(path, error)| Error::Sys {
            what: format!("count the possible CPUs in {path}"),
            source: error,
        })?;
        let refused: Map<RefusedKey, u32> = pinned_map(&maps, "REFUSED")?;
        let refused_now = refused.keys().map_err(Error::sys("list map REFUSED"))?.into_iter().collect();
        let mut redirect = Self {
            loader,
            opened,
            cpus,
            node: pinned_map(&maps, "NODE")?,
            pods: pinned_map(&maps, "PODS")?,
            pod_addresses: pinned_map(&maps, "POD_ADDRESSES")?,
            listeners: pinned_map(&maps, "LISTENERS")?,
            exclusions: ExclusionMaps {
                ports: pinned_map(&maps, "EXCLUDED_PORTS")?,
                cidrs: pinned_map(&maps, "EXCLUDED_CIDRS")?,
            },
            refused,
            refused_now,
            own: pinned_map(&maps, "OWN")?,
            notes: pinned_map(&maps, "NOTES")?,
            fast: pinned_map(&maps, "FAST")?,
            paths: pinned_map(&maps, "PATHS")?,
            counters: sys::open_pinned(&maps.join("COUNTERS"))
                .map_err(Error::sys("open pinned map COUNTERS"))?,
            pins,
        };
        redirect.exclusions.set(EVERY_POD, &options.exclusions)?;
        let node = NodeEntry {
            netns_cookie: options.node_netns_cookie,
            flags: crate::exclusions::flags(&options.exclusions),
            zero: 0,
        };
        redirect.node.insert(&0, &node).map_err(Error::sys("write map NODE"))?;
        for pod in pods {
            redirect.write(pod.netns_cookie, &pod.settings, &pod.listeners)?;
        }
        for (link, program) in CGROUP_HOOKS {
            let program = CgroupProgram::load(&mut object, program)?;
            attach_or_update(&redirect.pins.links().join(link), program, cgroup.as_fd())?;
        }
        drop(object);
        redirect.renew_inbound(&maps)?;
        if recreated {
            replace_maps(&redirect.pins)?;
        }
        Ok(redirect)
    }

    /// How this start began.
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    /// Marks a socket as the mesh's own: its `connect` is never captured. The mark dies with the socket, so there is
    /// nothing to unmark.
    ///
    /// # Errors
    /// The kernel's; the socket must not be used when it is not marked.
    pub fn mark_own(&self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        let key = socket.as_raw_fd() as u32;
        self.own.insert(&key, &1).map_err(Error::sys("mark a socket as the mesh's own (map OWN)"))
    }

    /// The map in which [`Redirect::mark_own`] marks, for [`Redirect::use_maps`] of another process.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn own_map(&self) -> Result<OwnedFd, Error> {
        self.own.as_fd().try_clone_to_owned().map_err(Error::sys("duplicate the descriptor of map OWN"))
    }

    /// Marks sockets in the maps of another process from now on ([`Redirect::own_map`], [`Redirect::worker_map`]), since the
    /// programs in force look there. Nothing else of this object is of use then.
    ///
    /// # Errors
    /// When a descriptor is no map of the right form.
    pub fn use_maps(&mut self, own: OwnedFd, notes: OwnedFd) -> Result<(), Error> {
        self.own = Map::from_fd(own).map_err(Error::sys("use another process's map OWN"))?;
        self.notes = Map::from_fd(notes).map_err(Error::sys("use another process's map NOTES"))?;
        Ok(())
    }

    /// Destinations that refuse at once (services without a ready endpoint): the whole set, compared with the last.
    ///
    /// # Errors
    /// When the map is full: then the rest is not refused here but by the proxy.
    pub fn set_refused(&mut self, destinations: &[(IpAddr, u16)]) -> Result<(), Error> {
        let wanted: HashSet<RefusedKey> = destinations
            .iter()
            .map(|(address, port)| RefusedKey { addr: (*address).into(), port: *port, zero: 0 })
            .collect();
        // Removal first: a destination that has an endpoint again must not wait for room.
        for key in self.refused_now.difference(&wanted).copied().collect::<Vec<_>>() {
            self.refused.remove(&key).map_err(Error::sys("remove from map REFUSED"))?;
            self.refused_now.remove(&key);
        }
        for key in wanted.difference(&self.refused_now).copied().collect::<Vec<_>>() {
            self.refused.insert(&key, &1).map_err(Error::sys("add to map REFUSED"))?;
            self.refused_now.insert(key);
        }
        Ok(())
    }

    /// Name and value of every branch counter, summed over the CPUs, since the maps were made.
    ///
    /// # Errors
    /// The kernel's.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, Error> {
        let mut buffer = vec![0; self.cpus];
        BRANCH_NAMES
            .iter()
            .enumerate()
            .map(|(index, name)| {
                let sum = sys::per_cpu_sum(self.counters.as_fd(), index as u32, &mut buffer)
                    .map_err(Error::sys(format!("read counter {name}")))?;
                Ok((*name, sum))
            })
            .collect()
    }

    /// The map that a worker needs, for [`crate::FlowMaps::from_fd`]. It is for reading and writing: a worker reaches
    /// only the entries of sockets that it holds.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn worker_map(&self) -> Result<OwnedFd, Error> {
        self.notes.as_fd().try_clone_to_owned().map_err(Error::sys("duplicate the descriptor of map NOTES"))
    }
}

/// `BPF_FS_MAGIC` of linux/magic.h.
pub(crate) const BPF_FS_MAGIC: libc::c_long = 0xcafe_4a11;

pub(crate) fn require_bpffs(path: &Path) -> Result<(), Error> {
    let found = nix::sys::statfs::statfs(path)
        .map_err(|errno| Error::Sys { what: format!("look at {}", path.display()), source: errno.into() })?;
    if found.filesystem_type().0 != BPF_FS_MAGIC {
        return Err(Error::NotBpffs(path.to_owned()));
    }
    Ok(())
}

pub(crate) fn make_directory(path: &Path) -> Result<(), Error> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(Error::sys(format!("make directory {}", path.display())))
}

/// Removes a directory of pins.
pub(crate) fn remove_directory(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::Sys { what: format!("remove {}", path.display()), source: error })
        }
        _ => Ok(()),
    }
}

pub(crate) fn pinned_map<K: sys::Plain, V: sys::Plain>(maps: &Path, name: &str) -> Result<Map<K, V>, Error> {
    sys::open_pinned(&maps.join(name))
        .and_then(Map::from_fd)
        .map_err(Error::sys(format!("open pinned map {}", maps.join(name).display())))
}

enum Compared {
    NothingPinned,
    Same,
    Differs(String),
}

fn compare_layout(pins: &Pins) -> Result<Compared, Error> {
    let mut pinned = 0;
    let mut differences = Vec::new();
    for spec in MAPS {
        let path = pins.maps().join(spec.name);
        match pinned_info(&path)? {
            Some(found) => {
                pinned += 1;
                if let Some(difference) = difference(spec, &found) {
                    differences.push(difference);
                }
            }
            None => differences.push(format!("{} is missing", spec.name)),
        }
    }
    Ok(match (pinned, differences.is_empty()) {
        (0, _) => Compared::NothingPinned,
        (_, true) => Compared::Same,
        (_, false) => Compared::Differs(differences.join("; ")),
    })
}

fn pinned_info(path: &Path) -> Result<Option<sys::MapInfo>, Error> {
    match sys::open_pinned(path).and_then(|map| sys::map_info(map.as_fd())) {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(Error::Sys { what: format!("look at pinned map {}", path.display()), source: error })
        }
    }
}

fn difference(spec: &MapSpec, found: &sys::MapInfo) -> Option<String> {
    let wanted = [spec.map_type, spec.key_size as u32, spec.value_size as u32, spec.max_entries as u32];
    let found = [found.map_type, found.key_size, found.value_size, found.max_entries];
    (wanted != found).then(|| {
        format!("{} has [type, key size, value size, entries] {found:?} instead of {wanted:?}", spec.name)
    })
}

/// Copies what user space wrote from the maps in use into those of the new layout, where an entry has the same form.
fn carry_over(pins: &Pins) -> Result<(), Error> {
    for spec in MAPS.iter().filter(|spec| spec.carried) {
        let (old, new) = (pins.maps().join(spec.name), pins.next_maps().join(spec.name));
        let Some(info) = pinned_info(&old)? else { continue };
        if (info.map_type, info.key_size as usize, info.value_size as usize)
            != (spec.map_type, spec.key_size, spec.value_size)
        {
            continue;
        }
        let open = |path: &PathBuf| {
            sys::open_pinned(path).map_err(Error::sys(format!("open pinned map {}", path.display())))
        };
        sys::copy_entries(open(&old)?.as_fd(), open(&new)?.as_fd(), spec.key_size, spec.value_size)
            .map_err(Error::sys(format!("carry the entries of map {} over", spec.name)))?;
    }
    Ok(())
}

/// Puts the prepared maps in the place of the old ones, when the programs in force use them already.
fn replace_maps(pins: &Pins) -> Result<(), Error> {
    rename(&pins.maps(), &pins.old_maps())?;
    rename(&pins.next_maps(), &pins.maps())?;
    remove_directory(&pins.old_maps())
}

/// Goes on where a start was interrupted that brought another layout.
fn finish_replacing_maps(pins: &Pins) -> Result<(), Error> {
    if pins.old_maps().exists() && !pins.maps().exists() {
        // Between the two renames above: the prepared maps are the ones in use.
        rename(&pins.next_maps(), &pins.maps())?;
    }
    remove_directory(&pins.next_maps())?;
    remove_directory(&pins.old_maps())
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(Error::sys(format!("rename {} to {}", from.display(), to.display())))
}

/// Puts the program into the pinned link, or attaches it and pins the link.
fn attach_or_update(pin: &Path, mut program: CgroupProgram<'_>, cgroup: BorrowedFd<'_>) -> Result<(), Error> {
    let what = |verb: &str| format!("{verb} link {}", pin.display());
    match sys::open_pinned(pin) {
        Ok(link) => {
            let fd = program.fd().map_err(Error::program(what("update")))?;
            match sys::link_update(link.as_fd(), fd.as_fd()) {
                Ok(()) => return Ok(()),
                // The cgroup that it was attached to is gone.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
                    fs::remove_file(pin).map_err(Error::sys(what("remove dead")))?;
                }
                Err(error) => return Err(Error::Sys { what: what("update"), source: error }),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::Sys { what: what("open"), source: error }),
    }
    let link = program.attach(cgroup).map_err(Error::program(what("attach")))?;
    pin_link(link, pin)
}

/// Pins a link; it is closed here and lives on in the file system.
pub(crate) fn pin_link(link: aya::programs::links::FdLink, pin: &Path) -> Result<(), Error> {
    link.pin(pin).map(drop).map_err(|error| Error::Sys {
        what: format!("pin link {}", pin.display()),
        source: io::Error::other(error),
    })
}
