//! All maps. Names and sizes are checked against pinned ones by the user's side before they are taken over.

use core::ffi::c_void;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, BPF_TCP_LISTEN, bpf_sock},
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, SkStorage, SockHash},
    helpers::{bpf_map_lookup_elem, bpf_sk_release, bpf_sk_storage_delete, bpf_sk_storage_get},
    macros::btf_map,
};

use crate::types::*;

/// Entries are allocated when used: memory follows the number of pods, not the limit, and a freed entry is not
/// reused under a program that still reads it.
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static NODE: Array<NodeEntry, 1> = Array::new();
#[btf_map]
pub static PODS: HashMap<u64, PodEntry, PODS_MAX, ON_DEMAND> = HashMap::new();
/// Address of a captured pod → its netns cookie.
#[btf_map]
pub static POD_ADDRESSES: HashMap<Addr, u64, POD_ADDRESSES_MAX, ON_DEMAND> = HashMap::new();
#[btf_map]
pub static LISTENERS: SockHash<ListenerKey, LISTENERS_MAX> = SockHash::new();
#[btf_map]
pub static EXCLUDED_PORTS: HashMap<PortKey, u32, EXCLUDED_PORTS_MAX, ON_DEMAND> = HashMap::new();
#[btf_map]
pub static EXCLUDED_CIDRS: LpmTrie<CidrData, u32, EXCLUDED_CIDRS_MAX> = LpmTrie::new();
#[btf_map]
pub static REFUSED: HashMap<RefusedKey, u32, REFUSED_MAX, ON_DEMAND> = HashMap::new();
/// Sockets of the mesh itself. Written by the agent only.
#[btf_map]
pub static OWN: SkStorage<u32> = SkStorage::new();
#[btf_map]
pub static NOTES: SkStorage<Note> = SkStorage::new();
#[btf_map]
pub static HANDOFF: HashMap<ConnectionKey, Note, HANDOFF_MAX, ON_DEMAND> = HashMap::new();
/// Sockets of both ends of connections between an application and the worker.
#[btf_map]
pub static FAST: SockHash<ConnectionKey, FAST_MAX> = SockHash::new();
#[btf_map]
pub static PATHS: SkStorage<Path> = SkStorage::new();
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, BRANCHES> = PerCpuArray::new();

/// Netns cookie of the pod that this copy of the inbound program belongs to: `bpf_get_netns_cookie` is not for sk_lookup
/// programs. The only map that each copy has for itself and that is not pinned.
#[btf_map]
pub static POD: Array<u64, 1> = Array::new();

/// The kernel has `bpf_set_retval` (5.18). Without it a refusal is EPERM, the default of the hook.
#[unsafe(no_mangle)]
pub static HAS_SET_RETVAL: Global<u32> = Global::new(1);

/// Where `write_seq` is in this kernel's `struct tcp_sock`, in bytes.
#[unsafe(no_mangle)]
pub static WRITE_SEQ_OFFSET: Global<u32> = Global::new(0);

/// Reads one field of a program's context. Volatile, because the verifier takes only loads at constant offsets from
/// the context's own pointer, and the compiler would gladly compute a common pointer for two branches.
macro_rules! field {
    ($context:expr, $($field:tt)+) => {
        unsafe { core::ptr::read_volatile(&raw const (*$context).$($field)+) }
    };
}
pub(crate) use field;

/// Writes one field of a program's context; volatile for the same reason.
macro_rules! set_field {
    ($context:expr, $field:ident $([$index:literal])?, $value:expr) => {
        unsafe { core::ptr::write_volatile(&raw mut (*$context).$field $([$index])?, $value) }
    };
}
pub(crate) use set_field;

/// Reads an IPv6 address of a program's context, word by word.
macro_rules! field_v6 {
    ($context:expr, $field:ident) => {
        Addr([
            field!($context, $field[0]),
            field!($context, $field[1]),
            field!($context, $field[2]),
            field!($context, $field[3]),
        ])
    };
}
pub(crate) use field_v6;

pub fn raw<M>(map: &'static M) -> *mut c_void {
    core::ptr::from_ref(map).cast_mut().cast()
}

#[inline(always)]
pub fn count(branch: Branch) {
    if let Some(counter) = COUNTERS.get_ptr_mut(branch as u32) {
        unsafe { *counter += 1 }
    }
}

/// The value that `map` keeps for `sk`.
#[inline(always)]
pub fn storage<T>(map: &'static SkStorage<T>, sk: *mut c_void) -> Option<&'static mut T> {
    unsafe { bpf_sk_storage_get(raw(map), sk, core::ptr::null_mut(), 0).cast::<T>().as_mut() }
}

/// Sets the note of `sk`; false when there is no memory for it.
#[inline(always)]
pub fn set_note(sk: *mut c_void, note: &Note) -> bool {
    let create = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
    let kept = unsafe { bpf_sk_storage_get(raw(&NOTES), sk, core::ptr::null_mut(), create) };
    match unsafe { kept.cast::<Note>().as_mut() } {
        Some(kept) => {
            *kept = *note;
            true
        }
        None => false,
    }
}

#[inline(always)]
pub fn clear_note(sk: *mut c_void) {
    unsafe { bpf_sk_storage_delete(raw(&NOTES), sk) };
}

/// Runs `with` on a listener, if the kernel still holds it and it listens. It leaves the map by itself when its last
/// descriptor is closed; one that was only shut down is still there.
#[inline(always)]
pub fn with_listener<T>(key: &ListenerKey, with: impl FnOnce(*mut c_void) -> T) -> Option<T> {
    let sk = unsafe { bpf_map_lookup_elem(raw(&LISTENERS), core::ptr::from_ref(key).cast()) };
    if sk.is_null() {
        return None;
    }
    let listens = field!(sk.cast::<bpf_sock>(), state) == BPF_TCP_LISTEN;
    let outcome = if listens { Some(with(sk)) } else { None };
    unsafe { bpf_sk_release(sk) };
    outcome
}

/// Exclusions of the pod and of the node; `bit` is the flag that says that there are any.
pub struct Excluded {
    pub netns_cookie: u64,
    pub direction: u16,
    pub in_pod: bool,
    pub in_node: bool,
}

impl Excluded {
    #[inline(always)]
    pub fn new(netns_cookie: u64, pod: &PodEntry, direction: u16) -> Self {
        let bit = if direction == OUTBOUND { POD_EXCLUDES_OUT } else { POD_EXCLUDES_IN };
        let node_flags = NODE.get(0).map_or(0, |node| node.flags);
        Self { netns_cookie, direction, in_pod: pod.flags & bit != 0, in_node: node_flags & bit != 0 }
    }

    #[inline(always)]
    pub fn port(&self, port: u16) -> bool {
        let is_in = |scope| {
            let key = PortKey { scope, port, direction: self.direction, zero: 0 };
            EXCLUDED_PORTS.get_ptr(&key).is_some()
        };
        (self.in_pod && is_in(self.netns_cookie)) || (self.in_node && is_in(EVERY_POD))
    }

    #[inline(always)]
    pub fn address(&self, addr: Addr) -> bool {
        use aya_ebpf::btf_maps::lpm_trie::Key;
        let is_in = |scope| {
            let key = Key::new(CIDR_FIXED_BITS + 128, CidrData::of(scope, self.direction, addr));
            EXCLUDED_CIDRS.get(&key).is_some()
        };
        (self.in_pod && is_in(self.netns_cookie)) || (self.in_node && is_in(EVERY_POD))
    }
}
