//! The system calls that no dependency offers in the needed form: bpf(2) on maps and links by descriptor, and two
//! socket options. The only unsafe code of this crate.
#![allow(unsafe_code)]

use std::{
    ffi::CString,
    io,
    marker::PhantomData,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::libc;

use crate::tunnel::types::{Address, DropKey, DropValue, Range, State};
use crate::types::{
    Addr, CidrData, ConnectionKey, ListenerKey, NodeEntry, Note, Path as FastPath, PodEntry, PortKey,
    RefusedKey,
};

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

/// What may go to and come from a map as bytes.
///
/// # Safety
/// Implementors have no padding, and any bytes are a value of them.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers.
unsafe impl Plain for u32 {}
// SAFETY: integers.
unsafe impl Plain for u64 {}
// SAFETY: an array of integers, transparent in effect through repr(C).
unsafe impl Plain for Addr {}
// SAFETY: repr(C), integers only, sizes asserted below to be the sums of the fields.
unsafe impl Plain for PodEntry {}
// SAFETY: as above.
unsafe impl Plain for NodeEntry {}
// SAFETY: as above.
unsafe impl Plain for ListenerKey {}
// SAFETY: as above.
unsafe impl Plain for PortKey {}
// SAFETY: as above.
unsafe impl Plain for RefusedKey {}
// SAFETY: as above.
unsafe impl Plain for Note {}
// SAFETY: as above.
unsafe impl Plain for ConnectionKey {}
// SAFETY: as above.
unsafe impl Plain for CidrKey {}
// SAFETY: as above.
unsafe impl Plain for FastPath {}

// SAFETY: an array of integers, transparent in effect through repr(C).
unsafe impl Plain for Address {}
// SAFETY: repr(C), integers only, sizes asserted below to be the sums of the fields.
unsafe impl Plain for RangeKey {}
// SAFETY: as above.
unsafe impl Plain for Range {}
// SAFETY: as above.
unsafe impl Plain for State {}
// SAFETY: as above.
unsafe impl Plain for DropKey {}
// SAFETY: as above.
unsafe impl Plain for DropValue {}

const _: () = {
    assert!(size_of::<RangeKey>() == 20);
    assert!(size_of::<Range>() == 8);
    assert!(size_of::<State>() == 16);
    assert!(size_of::<DropKey>() == 40);
    assert!(size_of::<DropValue>() == 16);
    assert!(size_of::<PodEntry>() == 8);
    assert!(size_of::<NodeEntry>() == 16);
    assert!(size_of::<ListenerKey>() == 16);
    assert!(size_of::<PortKey>() == 16);
    assert!(size_of::<RefusedKey>() == 20);
    assert!(size_of::<Note>() == 20);
    assert!(size_of::<ConnectionKey>() == 48);
    assert!(size_of::<CidrKey>() == 32);
    assert!(size_of::<FastPath>() == 64);
};

/// Key of a longest-prefix-match map (`struct bpf_lpm_trie_key`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CidrKey {
    pub(crate) prefix_len: u32,
    pub(crate) data: CidrData,
}

/// Key of the map of ranges around the tunnel.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RangeKey {
    pub(crate) prefix_len: u32,
    pub(crate) address: Address,
}

/// The part of `union bpf_attr` for map elements.
#[repr(C)]
struct ElemAttr {
    map_fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The part of `union bpf_attr` for pinned objects.
#[repr(C)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// The part of `union bpf_attr` for programs that are attached to a map.
#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    program_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// `BPF_SK_SKB_STREAM_VERDICT` and `BPF_SK_MSG_VERDICT` of `enum bpf_attach_type`.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
pub(crate) enum SocketMapHook {
    Arrived = 5,
    Message = 7,
}

#[repr(C)]
struct LinkDetachAttr {
    link_fd: u32,
}

/// The beginning of `struct bpf_map_info`, which has had this form since Linux 4.13.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MapInfo {
    pub(crate) map_type: u32,
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) map_flags: u32,
}

/// # Safety
/// `T` is the part of `union bpf_attr` that `command` reads, and every pointer in it is good for what the command
/// does with it.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the attribute is a live object of the given size; the rest is the caller's promise. The kernel takes a
    // shorter attribute than its own and reads the rest as zero.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as i32) }
}

fn fd_word(fd: BorrowedFd<'_>) -> u32 {
    // Descriptors are never negative.
    fd.as_raw_fd() as u32
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

/// Opens what is pinned at `path`.
pub(crate) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjAttr { pathname: name.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the path is a C string that outlives the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr) }?;
    // SAFETY: the kernel made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Type and sizes of a map.
pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    let mut attr = InfoAttr {
        bpf_fd: fd_word(map),
        info_len: size_of::<MapInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: the kernel writes at most `info_len` bytes to `info`, which is plain integers and outlives the call.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// Puts another program into a link; at every moment one of the two is attached.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr =
        LinkUpdateAttr { link_fd: fd_word(link), new_prog_fd: fd_word(program), flags: 0, old_prog_fd: 0 };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches a link at once; closing its last descriptor would do so later, on a kernel worker.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkDetachAttr { link_fd: fd_word(link) };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// Sets the program of a map of sockets; it holds for sockets that are added from now on, for as long as they live.
pub(crate) fn attach_to_map(
    map: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    hook: SocketMapHook,
) -> io::Result<()> {
    let mut attr = AttachAttr {
        target_fd: fd_word(map),
        program_fd: fd_word(program),
        attach_type: hook as u32,
        flags: 0,
    };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_PROG_ATTACH, &mut attr) }.map(drop)
}

/// Removes this program from a map of sockets; sockets that are in the map keep it.
pub(crate) fn detach_from_map(
    map: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    hook: SocketMapHook,
) -> io::Result<()> {
    let mut attr = AttachAttr {
        target_fd: fd_word(map),
        program_fd: fd_word(program),
        attach_type: hook as u32,
        flags: 0,
    };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_PROG_DETACH, &mut attr) }.map(drop)
}

/// A map whose keys and values are `K` and `V`, used by descriptor: needs no capability, only the descriptor.
#[derive(Debug)]
pub(crate) struct Map<K, V> {
    fd: OwnedFd,
    types: PhantomData<(K, V)>,
}

impl<K: Plain, V: Plain> Map<K, V> {
    /// Takes a descriptor of a map with keys and values of these sizes.
    pub(crate) fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let info = map_info(fd.as_fd())?;
        if (info.key_size as usize, info.value_size as usize) != (size_of::<K>(), size_of::<V>()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "map {} has keys of {} and values of {} bytes instead of {} and {}; it was made by another version",
                    info.id,
                    info.key_size,
                    info.value_size,
                    size_of::<K>(),
                    size_of::<V>()
                ),
            ));
        }
        Ok(Self { fd, types: PhantomData })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn elem(&self, key: &K, value: u64, flags: u64) -> ElemAttr {
        ElemAttr { map_fd: fd_word(self.fd.as_fd()), zero: 0, key: address(key), value, flags }
    }

    pub(crate) fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = MaybeUninit::<V>::zeroed();
        let mut attr = self.elem(key, value.as_mut_ptr() as u64, 0);
        // SAFETY: `from_fd` checked that the kernel reads and writes as many bytes as `K` and `V` have; both live.
        match unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) } {
            // SAFETY: zeroed, perhaps overwritten by the kernel; any bytes are a `V` (`Plain`).
            Ok(_) => Ok(Some(unsafe { value.assume_init() })),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn insert(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attr = self.elem(key, address(value), 0);
        // SAFETY: as in `get`; the kernel only reads.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    /// Whether there was such an entry.
    pub(crate) fn remove(&self, key: &K) -> io::Result<bool> {
        let mut attr = self.elem(key, 0, 0);
        // SAFETY: as in `get`; the kernel only reads the key.
        match unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attr) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// All keys. Entries that others add or remove meanwhile may be missed.
    pub(crate) fn keys(&self) -> io::Result<Vec<K>> {
        let limit = map_info(self.fd.as_fd())?.max_entries as usize;
        let mut keys = Vec::new();
        let mut last: Option<K> = None;
        // The limit ends a walk that concurrent changes send round in circles.
        while keys.len() < limit {
            let mut next = MaybeUninit::<K>::zeroed();
            let mut attr = ElemAttr {
                map_fd: fd_word(self.fd.as_fd()),
                zero: 0,
                key: last.as_ref().map_or(0, address),
                value: next.as_mut_ptr() as u64,
                flags: 0,
            };
            // SAFETY: the kernel reads a key unless it is null and writes a key to `next`; sizes as in `get`.
            match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) } {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                Err(error) => return Err(error),
            }
            // SAFETY: zeroed and overwritten; any bytes are a `K` (`Plain`).
            let key = unsafe { next.assume_init() };
            keys.push(key);
            last = Some(key);
        }
        Ok(keys)
    }
}

/// Copies all entries between two maps with the same sizes of keys and values.
pub(crate) fn copy_entries(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
) -> io::Result<()> {
    for map in [from, to] {
        let info = map_info(map)?;
        if (info.key_size as usize, info.value_size as usize) != (key_size, value_size) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the maps have entries of different sizes",
            ));
        }
    }
    // In words of 8 bytes, so that the buffers are long and aligned enough for any entry.
    let mut last: Option<Vec<u64>> = None;
    let mut value = vec![0_u64; value_size.div_ceil(8)];
    loop {
        let mut key = vec![0_u64; key_size.div_ceil(8)];
        let mut attr = ElemAttr {
            map_fd: fd_word(from),
            zero: 0,
            key: last.as_ref().map_or(0, |key| key.as_ptr() as u64),
            value: key.as_mut_ptr() as u64,
            flags: 0,
        };
        // SAFETY: keys have the size checked above, and the buffers hold that many bytes.
        match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) } {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            Err(error) => return Err(error),
        }
        let mut attr = ElemAttr {
            map_fd: fd_word(from),
            zero: 0,
            key: key.as_ptr() as u64,
            value: value.as_mut_ptr() as u64,
            flags: 0,
        };
        // SAFETY: as above, for the value as well.
        match unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) } {
            Ok(_) => {
                let mut attr = ElemAttr { map_fd: fd_word(to), ..attr };
                // SAFETY: as above; the kernel only reads.
                unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }?;
            }
            // Removed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
        last = Some(key);
    }
}

/// Sum over the CPUs of one entry of a per-CPU array of u64. `buffer` has one element for each possible CPU.
pub(crate) fn per_cpu_sum(map: BorrowedFd<'_>, index: u32, buffer: &mut [u64]) -> io::Result<u64> {
    buffer.fill(0);
    let mut attr = ElemAttr {
        map_fd: fd_word(map),
        zero: 0,
        key: address(&index),
        value: buffer.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: for a per-CPU map the kernel writes the value size, 8, for each possible CPU; the caller's buffer has
    // that many elements.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) }?;
    Ok(buffer.iter().sum())
}

/// Brings the loopback device of the calling thread's network namespace up (netdevice(7)).
pub(crate) fn loopback_up(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: integers and a union of plain data, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *place = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request is a live ifreq with a name and flags, which is what this ioctl reads.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether a device of the calling thread's network namespace has Ethernet frames (`SIOCGIFHWADDR`, netdevice(7)).
pub(crate) fn is_ethernet(socket: BorrowedFd<'_>, device: &str) -> io::Result<bool> {
    // SAFETY: integers and a union of plain data, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if device.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *place = byte as libc::c_char;
    }
    // SAFETY: the request is a live ifreq with a name, of which this ioctl fills in the address.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has written the hardware address, whose family is the type of the device.
    let kind = unsafe { request.ifr_ifru.ifru_hwaddr.sa_family };
    // Loopback has an empty Ethernet header too.
    Ok(matches!(kind, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK))
}

/// Nanoseconds since boot as programs see them (`bpf_ktime_get_ns`).
pub(crate) fn monotonic_nanoseconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes to a live timespec; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Fewest bytes for which a socket is readable (`SO_RCVLOWAT`, socket(7)).
pub(crate) fn set_low_watermark(socket: BorrowedFd<'_>, bytes: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    let value = std::ptr::from_ref(&bytes).cast();
    // SAFETY: the kernel reads `length` bytes of a live integer.
    let answer =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, length) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads a socket option that is a u64.
fn socket_option_u64(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<u64> {
    let mut value = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `value`; both live.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            std::ptr::from_mut(&mut value).cast(),
            &mut length,
        )
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Cookie of the network namespace that `socket` was made in (`SO_NETNS_COOKIE`, Linux 5.14).
///
/// # Errors
/// The kernel's, for what is no socket or when it lacks the option.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    socket_option_u64(socket, libc::SO_NETNS_COOKIE)
}

/// Cookie of a socket (`SO_COOKIE`, Linux 4.12): unique on the node until it reboots.
///
/// # Errors
/// The kernel's, for what is no socket.
pub fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    socket_option_u64(socket, libc::SO_COOKIE)
}
