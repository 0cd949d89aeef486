//! Opening, telling the programs what they should know, and reading what they counted.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, TestRun},
};
use serde::{Deserialize, Serialize};

use super::{
    attach::{self, Attach},
    directory,
    policy::{self, Policy},
    types::{self, Address, CAUSE_NAMES, DropKey, DropValue, FIRST_DROP, Range, State},
};
use crate::{
    error::Error,
    redirect::{make_directory, pinned_map, remove_directory, require_bpffs},
    sys::{self, Map, Plain, RangeKey},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tunnel"));

const PROGRAMS: [&str; 3] = ["sockmesh_strict_in", "sockmesh_strict_out", "sockmesh_clamp"];

/// Names, sizes of keys and values, and numbers of entries of the maps: together the layout.
const MAPS: [(&str, usize, usize, usize); 6] = [
    ("STATE", 4, size_of::<State>(), 1),
    ("RANGES", size_of::<RangeKey>(), size_of::<Range>(), types::RANGES_MAX),
    ("PODS", size_of::<Address>(), 4, types::PODS_MAX),
    ("DEVICES", 4, 4, types::DEVICES_MAX),
    ("COUNTERS", 4, 8, types::COUNTERS_LEN),
    ("DROPS", size_of::<DropKey>(), size_of::<DropValue>(), types::DROPS_MAX),
];

/// Where to install.
#[derive(Debug, Clone)]
pub struct TunnelOptions {
    /// Mount point of the bpf file system, usually `/sys/fs/bpf`.
    pub bpffs: PathBuf,
    /// Name of the node.
    pub node: String,
    /// How to attach to devices.
    pub attach: Attach,
}

/// Which way a packet went at the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the node.
    In,
    /// From the node.
    Out,
}

/// One counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CauseCount {
    /// One of [`CAUSE_NAMES`]: begins with `passed_` or `dropped_`.
    pub cause: String,
    /// Which way.
    pub direction: Direction,
    /// Packets since the maps were made.
    pub packets: u64,
}

/// Packets that were dropped lately, for the same reason, between the same addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Source address.
    pub source: IpAddr,
    /// `namespace/name` of the pod that has it, if it is known here.
    pub source_pod: Option<String>,
    /// Destination address.
    pub destination: IpAddr,
    /// `namespace/name` of the pod that has it, if it is known here.
    pub destination_pod: Option<String>,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port; 0 without one.
    pub port: u16,
    /// Which way.
    pub direction: Direction,
    /// One of [`CAUSE_NAMES`].
    pub cause: String,
    /// How many.
    pub packets: u64,
    /// How long ago the last one was.
    pub ago: Duration,
}

/// How strict mode is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// The mode that the programs act by.
    pub strict: policy::Strict,
    /// They know all ranges and pods.
    pub complete: bool,
    /// Ranges that they know.
    pub ranges: usize,
    /// Addresses of pods that they know.
    pub pods: usize,
    /// Devices that they are attached to.
    pub attached: Vec<String>,
    /// Counters that are not 0.
    pub counters: Vec<CauseCount>,
    /// The last drops, the latest first.
    pub recent: Vec<Dropped>,
}

/// The installed programs of one node. Dropping it leaves everything in force: links and maps are pinned.
#[derive(Debug)]
pub struct TunnelFilter {
    root: PathBuf,
    maps: PathBuf,
    attach: Attach,
    object: Ebpf,
    cpus: usize,
    state: Map<u32, State>,
    ranges: Written<RangeKey, Range>,
    pods: Written<Address, u32>,
    devices: Written<u32, u32>,
    drops: Map<DropKey, DropValue>,
    counters: OwnedFd,
    names: HashMap<Address, String>,
    attached: Vec<String>,
}

/// A map, and what is in it.
#[derive(Debug)]
struct Written<K, V> {
    name: &'static str,
    map: Map<K, V>,
    entries: BTreeMap<K, V>,
}

impl<K: Plain + Ord, V: Plain + PartialEq> Written<K, V> {
    fn open(maps: &Path, name: &'static str) -> Result<Self, Error> {
        let map: Map<K, V> = pinned_map(maps, name)?;
        let mut entries = BTreeMap::new();
        for key in map.keys().map_err(Error::sys(format!("list map {name}")))? {
            if let Some(value) = map.get(&key).map_err(Error::sys(format!("read map {name}")))? {
                entries.insert(key, value);
            }
        }
        Ok(Self { name, map, entries })
    }

    /// Writes what is not there; what is no longer wanted stays.
    fn add(&mut self, wanted: &BTreeMap<K, V>) -> Result<(), Error> {
        for (key, value) in wanted {
            if self.entries.get(key) != Some(value) {
                self.map.insert(key, value).map_err(Error::sys(format!(
                    "add to map {} with {} entries (strict pods reach nothing that is not known while it is full)",
                    self.name,
                    self.entries.len()
                )))?;
                self.entries.insert(*key, *value);
            }
        }
        Ok(())
    }

    /// Removes what is not wanted.
    fn keep(&mut self, wanted: &BTreeMap<K, V>) -> Result<(), Error> {
        let gone: Vec<K> = self.entries.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        for key in gone {
            self.map.remove(&key).map_err(Error::sys(format!("remove from map {}", self.name)))?;
            self.entries.remove(&key);
        }
        Ok(())
    }
}

impl TunnelFilter {
    /// Loads the programs and takes over the maps of an earlier start; what is attached stays as it is until
    /// [`Self::apply`].
    ///
    /// # Errors
    /// Names the missing file system, right or kernel feature.
    pub fn open(options: &TunnelOptions) -> Result<Self, Error> {
        require_bpffs(&options.bpffs)?;
        let root = directory(&options.bpffs, &options.node)?;
        let maps = root.join(format!("maps-{:08x}", layout()));
        for directory in [&maps, &root.join("links")] {
            make_directory(directory)?;
        }
        let mut loader = EbpfLoader::new();
        // No program looks into the kernel's own structures.
        loader.btf(None);
        for (name, ..) in MAPS {
            loader.map_pin_path(name, maps.join(name));
        }
        let mut object = loader.load(OBJECT).map_err(|error| Error::Load(Box::new(error)))?;
        for name in PROGRAMS {
            let what = || format!("load eBPF program {name}");
            program(&mut object, name)?.load().map_err(Error::program(what()))?;
        }
        let cpus = aya::util::nr_cpus().map_err(|(path, error)| Error::Sys {
            what: format!("count the possible CPUs in {path}"),
            source: error,
        })?;
        Ok(Self {
            attach: options.attach,
            object,
            cpus,
            state: pinned_map(&maps, "STATE")?,
            ranges: Written::open(&maps, "RANGES")?,
            pods: Written::open(&maps, "PODS")?,
            devices: Written::open(&maps, "DEVICES")?,
            drops: pinned_map(&maps, "DROPS")?,
            counters: sys::open_pinned(&maps.join("COUNTERS"))
                .map_err(Error::sys("open pinned map COUNTERS"))?,
            names: HashMap::new(),
            attached: Vec::new(),
            root,
            maps,
        })
    }

    /// Makes the policy the one that holds, compared with the last: first what the programs know, then where they are.
    /// Has to be called in the node's network namespace, again when devices come or go.
    ///
    /// # Errors
    /// When a map is full, the mode is in force all the same, and strict pods reach only what is known to be no pod. Other
    /// errors are the kernel's; the next call goes on.
    pub fn apply(&mut self, policy: &Policy) -> Result<(), Error> {
        self.names = policy.names();
        let written = self.write(policy);
        let state = policy.state(policy.complete && written.is_ok());
        self.state.insert(&0, &state).map_err(Error::sys("write map STATE"))?;
        let placed = self.place(policy);
        written.and(placed)
    }

    /// New entries before old ones leave, pods' before ranges': a pod is never in a range without being known.
    fn write(&mut self, policy: &Policy) -> Result<(), Error> {
        let (ranges, pods) = (policy.ranges(), policy.pods());
        // All that fits, before the first failure is told.
        let added = self.pods.add(&pods).and(self.ranges.add(&ranges));
        self.ranges.keep(&ranges)?;
        self.pods.keep(&pods)?;
        // There may be room now for what did not fit.
        if added.is_err() {
            self.pods.add(&pods)?;
            self.ranges.add(&ranges)?;
        }
        Ok(())
    }

    fn place(&mut self, policy: &Policy) -> Result<(), Error> {
        let links = self.root.join("links");
        let places = attach::places(&policy.devices)?;
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)
            .map_err(Error::sys("open a socket to ask devices by"))?;
        let mut devices = BTreeMap::new();
        for place in &places {
            let is_ethernet = sys::is_ethernet(socket.as_fd(), &place.device)
                .map_err(Error::sys(format!("ask device {} for its type", place.device)))?;
            devices.insert(place.index, if is_ethernet { 0 } else { types::DEVICE_IP });
        }
        self.devices.add(&devices)?;
        self.attached.clear();
        for place in &places {
            attach::attach(&links, place, program(&mut self.object, place.program)?, self.attach)?;
            if self.attached.last() != Some(&place.device) {
                self.attached.push(place.device.clone());
            }
        }
        attach::detach_others(&links, &places)?;
        self.devices.keep(&devices)?;
        self.remove_old_maps()
    }

    /// Maps of another layout are not used any more: every program has been replaced.
    fn remove_old_maps(&self) -> Result<(), Error> {
        let listing = || Error::sys(format!("list {}", self.root.display()));
        for entry in fs::read_dir(&self.root).map_err(listing())? {
            let path = entry.map_err(listing())?.path();
            let is_maps = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("maps-"));
            if is_maps && path != self.maps {
                remove_directory(&path)?;
            }
        }
        Ok(())
    }

    /// Every counter, summed over the CPUs, since the maps were made.
    ///
    /// # Errors
    /// The kernel's.
    pub fn counters(&self) -> Result<Vec<CauseCount>, Error> {
        let mut buffer = vec![0; self.cpus];
        let mut counters = Vec::new();
        for (number, cause) in CAUSE_NAMES.iter().enumerate() {
            for (offset, direction) in [Direction::In, Direction::Out].into_iter().enumerate() {
                let packets =
                    sys::per_cpu_sum(self.counters.as_fd(), (2 * number + offset) as u32, &mut buffer)
                        .map_err(Error::sys(format!("read counter {cause}")))?;
                counters.push(CauseCount { cause: (*cause).to_owned(), direction, packets });
            }
        }
        Ok(counters)
    }

    /// The last drops, the latest first, with the names of [`Policy::pods`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn recent(&self) -> Result<Vec<Dropped>, Error> {
        let now = sys::monotonic_nanoseconds();
        let mut recent = Vec::new();
        for key in self.drops.keys().map_err(Error::sys("list map DROPS"))? {
            let value = self.drops.get(&key).map_err(Error::sys("read map DROPS"))?;
            // Forgotten meanwhile, or written by programs of a later layout.
            let (Some(value), Some(cause)) = (value, CAUSE_NAMES.get(key.cause as usize)) else { continue };
            recent.push(Dropped {
                source: policy::from_address(key.source),
                source_pod: self.names.get(&key.source).cloned(),
                destination: policy::from_address(key.destination),
                destination_pod: self.names.get(&key.destination).cloned(),
                protocol: key.protocol,
                port: key.port,
                direction: if key.direction == types::EGRESS { Direction::Out } else { Direction::In },
                cause: (*cause).to_owned(),
                packets: value.packets,
                ago: Duration::from_nanos(now.saturating_sub(value.last)),
            });
        }
        recent.sort_by_key(|dropped| dropped.ago);
        Ok(recent)
    }

    /// All that there is to show.
    ///
    /// # Errors
    /// The kernel's.
    pub fn status(&self) -> Result<TunnelStatus, Error> {
        let state = self.state.get(&0).map_err(Error::sys("read map STATE"))?.unwrap_or_default();
        let counters = self.counters()?.into_iter().filter(|counter| counter.packets > 0).collect();
        Ok(TunnelStatus {
            strict: match state.mode {
                types::MODE_OFF => policy::Strict::Off,
                types::MODE_LABELLED => policy::Strict::Labelled,
                _ => policy::Strict::All,
            },
            complete: state.flags & types::STATE_COMPLETE != 0,
            ranges: self.ranges.entries.len(),
            pods: self.pods.entries.len(),
            attached: self.attached.clone(),
            counters,
            recent: self.recent()?,
        })
    }

    /// Runs a program on an Ethernet frame with the maps as they are, without any device (`BPF_PROG_TEST_RUN`): whether it
    /// would pass, and the frame as the program leaves it.
    ///
    /// # Errors
    /// The kernel's, for example when the frame is shorter than its header.
    pub fn try_frame(
        &mut self,
        direction: Option<Direction>,
        frame: &[u8],
    ) -> Result<(bool, Vec<u8>), Error> {
        let name = match direction {
            Some(Direction::In) => "sockmesh_strict_in",
            Some(Direction::Out) => "sockmesh_strict_out",
            None => "sockmesh_clamp",
        };
        let mut out = vec![0; frame.len() + 64];
        let options = aya::programs::TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..Default::default()
        };
        let result = program(&mut self.object, name)?.test_run(options).map_err(|error| Error::Sys {
            what: format!("run {name} on a frame of {} bytes", frame.len()),
            source: io::Error::other(error),
        })?;
        out.truncate(result.data_size_out as usize);
        // TC_ACT_SHOT is 2, "go on" is -1.
        Ok((result.return_value != 2, out))
    }

    /// Number of packets dropped since the maps were made, for every cause and in both directions.
    ///
    /// # Errors
    /// The kernel's.
    pub fn dropped(&self) -> Result<u64, Error> {
        let names = &CAUSE_NAMES[FIRST_DROP as usize..];
        let counters = self.counters()?;
        Ok(counters.iter().filter(|counter| names.contains(&counter.cause.as_str())).map(|c| c.packets).sum())
    }
}

fn program<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, Error> {
    let missing =
        || Error::Invalid(format!("the built eBPF object has no program {name}; rebuild redirect-bpf"));
    let program = object.program_mut(name).ok_or_else(missing)?;
    program.try_into().map_err(Error::program(format!("use eBPF program {name}")))
}

/// A number that changes with the layout: FNV-1a over names and sizes.
fn layout() -> u32 {
    let mut number = 0x811c_9dc5_u32;
    for (name, key, value, entries) in MAPS {
        let sizes = [key, value, entries].map(|size| (size as u32).to_le_bytes());
        for byte in name.bytes().chain(sizes.into_iter().flatten()) {
            number = (number ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        }
    }
    number
}
