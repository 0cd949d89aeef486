//! All maps around the tunnel.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
    helpers::bpf_ktime_get_ns,
    macros::btf_map,
};

use crate::types::*;

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static STATE: Array<State, 1> = Array::new();
#[btf_map]
pub static RANGES: LpmTrie<Address, Range, RANGES_MAX> = LpmTrie::new();
#[btf_map]
pub static PODS: HashMap<Address, u32, PODS_MAX, ON_DEMAND> = HashMap::new();
/// Number of a device → `DEVICE_*`.
#[btf_map]
pub static DEVICES: HashMap<u32, u32, DEVICES_MAX> = HashMap::new();
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, COUNTERS_LEN> = PerCpuArray::new();
/// What was dropped last: only for people to read, nothing is decided by it.
#[btf_map]
pub static DROPS: LruHashMap<DropKey, DropValue, DROPS_MAX> = LruHashMap::new();

/// Where the program that runs on this CPU is in its packet. What is read back from here is unknown to the verifier, so
/// that all ways through a packet's headers meet again after each header; otherwise it would follow each combination by
/// itself. Programs of this hook do not interrupt each other on one CPU.
#[btf_map]
static WALK: PerCpuArray<Walk, 1> = PerCpuArray::new();

/// See `WALK`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Walk {
    pub at: u32,
    pub protocol: u32,
    pub fragment: u32,
    pub odd: u32,
}

impl Walk {
    /// Gives this back as the verifier does not know it; `None` never.
    #[inline(always)]
    pub fn forget(self) -> Option<Self> {
        let place = WALK.get_ptr_mut(0)?;
        unsafe {
            core::ptr::write_volatile(&raw mut (*place).at, self.at);
            core::ptr::write_volatile(&raw mut (*place).protocol, self.protocol);
            core::ptr::write_volatile(&raw mut (*place).fragment, self.fragment);
            core::ptr::write_volatile(&raw mut (*place).odd, self.odd);
            Some(Self {
                at: core::ptr::read_volatile(&raw const (*place).at),
                protocol: core::ptr::read_volatile(&raw const (*place).protocol),
                fragment: core::ptr::read_volatile(&raw const (*place).fragment),
                odd: core::ptr::read_volatile(&raw const (*place).odd),
            })
        }
    }
}

/// What is known about an address.
#[inline(always)]
pub fn range(address: Address) -> Range {
    RANGES.get(&Key::new(128, address)).copied().unwrap_or_default()
}

#[inline(always)]
pub fn count(cause: Cause, direction: u8) {
    if let Some(counter) = COUNTERS.get_ptr_mut(2 * cause as u32 + u32::from(direction)) {
        unsafe { *counter += 1 }
    }
}

/// Remembers a drop. Two CPUs that drop the same at the same moment may count one of the two; the counters are exact.
#[inline(always)]
pub fn remember(key: &DropKey) {
    let now = unsafe { bpf_ktime_get_ns() };
    if let Some(value) = DROPS.get_ptr_mut(key) {
        unsafe {
            (*value).packets += 1;
            (*value).last = now;
        }
        return;
    }
    // No room is no harm: the drop is counted.
    let _ = DROPS.insert(key, &DropValue { packets: 1, last: now }, 0);
}
