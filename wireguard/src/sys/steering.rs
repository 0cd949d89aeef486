//! Which queue of a TUN device a packet goes to: chosen by its source address (TUNSETSTEERINGEBPF, Linux 4.16).
//!
//! A queue that is full drops what comes next, whoever sent it. By source, a pod that floods fills one queue, and the
//! others' packets lie in other queues, of which each has its turn.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// BPF_PROG_LOAD of bpf(2).
const PROG_LOAD: libc::c_int = 5;
/// BPF_PROG_TYPE_SOCKET_FILTER, which the TUN device asks for.
const SOCKET_FILTER: u32 = 1;

/// `struct bpf_insn`: operation, registers (destination in the lower half), jump, constant.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction(u8, u8, i16, i32);

/// The part of `union bpf_attr` for PROG_LOAD that every kernel with this program type knows.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// Folds the source address into 32 bits and takes the upper half of its product with 2^32 divided by the golden ratio. A
/// packet that is cut off returns 0.
const HASH: [Instruction; 17] = [
    Instruction(0xbf, 0x16, 0, 0),                      // r6 = the packet
    Instruction(0x30, 0x00, 0, 0),                      // r0 = first byte
    Instruction(0x77, 0x00, 0, 4),                      // r0 >>= 4
    Instruction(0x15, 0x00, 2, 6),                      // if r0 == 6: IPv6, two further
    Instruction(0x20, 0x00, 0, 12),                     // r0 = IPv4 source
    Instruction(0x05, 0x00, 9, 0),                      // to the product
    Instruction(0x20, 0x00, 0, 8),                      // r0 = IPv6 source, 1st word
    Instruction(0xbf, 0x07, 0, 0),                      // r7 = r0
    Instruction(0x20, 0x00, 0, 12),                     // r0 = 2nd
    Instruction(0xaf, 0x07, 0, 0),                      // r7 ^= r0
    Instruction(0x20, 0x00, 0, 16),                     // r0 = 3rd
    Instruction(0xaf, 0x07, 0, 0),                      // r7 ^= r0
    Instruction(0x20, 0x00, 0, 20),                     // r0 = 4th
    Instruction(0xaf, 0x07, 0, 0),                      // r7 ^= r0
    Instruction(0xbf, 0x70, 0, 0),                      // r0 = r7
    Instruction(0x24, 0x00, 0, 0x9e37_79b1_u32 as i32), // r0 *= constant, 32 bits
    Instruction(0x74, 0x00, 0, 16),                     // r0 >>= 16, 32 bits
];

/// Chooses one of `count` queues from number `first` on. The device takes the remainder by the number of queues that it
/// has: when those before are gone, it is still one of these.
fn program(first: i32, count: i32) -> Vec<Instruction> {
    let end = [
        Instruction(0x94, 0x00, 0, count), // r0 %= count, 32 bits
        Instruction(0x04, 0x00, 0, first), // r0 += first, 32 bits
        Instruction(0x95, 0x00, 0, 0),     // return r0
    ];
    HASH.into_iter().chain(end).collect()
}

nix::ioctl_read!(
    /// TUNSETSTEERINGEBPF: the descriptor of a program is read from the pointer.
    set_steering,
    b'T',
    224,
    libc::c_int
);

/// Has the device of this queue choose by source address from now on, among `count` queues of which the first is number
/// `first`.
///
/// # Errors
/// If this process may not load the program, or the kernel is older than 4.16.
pub(crate) fn by_source(queue: &OwnedFd, first: usize, count: usize) -> io::Result<()> {
    let number = |number: usize| i32::try_from(number).map_err(|_| io::ErrorKind::InvalidInput);
    let program = load(&program(number(first)?, number(count.max(1))?))?;
    let mut fd: RawFd = program.as_raw_fd();
    // SAFETY: the descriptor is of a TUN queue, and the pointer is to an int that lives through the call.
    unsafe { set_steering(queue.as_raw_fd(), &mut fd) }?;
    Ok(())
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = Load {
        kind: SOCKET_FILTER,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        licence: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the pointers in `attributes`, and the one to it, are to data that live through the call, of the lengths given.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &attributes, size_of::<Load>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: bpf(2) has just returned this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
