//! The worker's side: what the kernel knows about sockets that the worker holds.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use crate::{
    settings::socket_address,
    sys::Map,
    types::{NOTE_FROM_NODE, NOTE_FROM_POD, NOTE_TO_APPLICATION, Note},
};

/// Notes of single sockets. Plain bpf(2) calls by descriptor: needs no capability (from Linux 5.19 on; before, where
/// `kernel.unprivileged_bpf_disabled` is 0), no loader and no allocation, and reaches only sockets that the caller
/// holds a descriptor of.
#[derive(Debug)]
pub struct FlowMaps {
    notes: Map<u32, Note>,
}

impl FlowMaps {
    /// Takes the map of [`crate::Redirect::worker_map`].
    ///
    /// # Errors
    /// When the descriptor is no map of this version.
    pub fn from_fd(notes: OwnedFd) -> io::Result<Self> {
        Ok(Self { notes: Map::from_fd(notes)? })
    }

    /// Where the application wanted to connect, for a socket accepted on an outbound listener. `None`: the connection
    /// was not made by a captured `connect` (someone dialled the listener itself); close it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn original_destination(&self, accepted: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
        let note = self.note(accepted)?.filter(|note| note.kind == NOTE_FROM_POD);
        Ok(note.map(|note| socket_address(note.addr, note.port)))
    }

    /// Whether a socket accepted on an inbound listener was connected by a process in the node's own network
    /// namespace (a kubelet probe).
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_from_node(&self, accepted: BorrowedFd<'_>) -> io::Result<bool> {
        Ok(self.note(accepted)?.is_some_and(|note| note.kind == NOTE_FROM_NODE))
    }

    /// Before connecting `socket` (one of the mesh's own) to an application in the same namespace: whom the
    /// application shall see as its peer. Display data only.
    ///
    /// # Errors
    /// The kernel's; `ENOMEM` when the socket's option memory is used up.
    pub fn set_peer_name(&self, socket: BorrowedFd<'_>, name: SocketAddr) -> io::Result<()> {
        let note = Note { kind: NOTE_TO_APPLICATION, port: name.port(), addr: name.ip().into() };
        self.notes.insert(&(socket.as_raw_fd() as u32), &note)
    }

    fn note(&self, socket: BorrowedFd<'_>) -> io::Result<Option<Note>> {
        self.notes.get(&(socket.as_raw_fd() as u32))
    }
}
