//! What the kernel holds of this node's tunnel, whoever made it: its interfaces outlive the processes that do, and tell the
//! next one what it has to know. Nothing of it is kept anywhere else.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use wireguard_uapi::{DeviceInterface, WgSocket};

use super::link::Links;
use super::{NUMBERS, Settings, ports};
use crate::device::{OwnKey, PrivateKey};

/// An own key that interfaces of the kernel have.
#[derive(Clone, Debug)]
pub struct HeldKey {
    /// The key.
    pub own: OwnKey,
    /// Since it was made, by the clock.
    pub age: Duration,
    /// Another tunnel takes its place, and other nodes are told of it no more.
    pub leaving: bool,
    /// Bytes received under it.
    pub received: u64,
    /// As [`crate::device::Tunnel::ports`].
    pub ports: [u16; 2],
}

/// What is noted at an interface, where `ip link` shows it: of which key it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Note {
    pub(super) generation: u64,
    /// Seconds since 1970.
    pub(super) made: u64,
    pub(super) leaving: bool,
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Note {
    pub(super) fn read(text: &str) -> Option<Self> {
        let words: Vec<&str> = text.split(' ').collect();
        let (generation, made, leaving) = match words[..] {
            ["sockmesh", "key", generation, "made", made] => (generation, made, false),
            ["sockmesh", "key", generation, "made", made, "leaving"] => (generation, made, true),
            _ => return None,
        };
        Some(Self { generation: generation.parse().ok()?, made: made.parse().ok()?, leaving })
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let leaving = if self.leaving { " leaving" } else { "" };
        write!(f, "sockmesh key {} made {}{leaving}", self.generation, self.made)
    }
}

/// The own keys that the kernel holds, the oldest first; none where it has no WireGuard. What bears no note is not of a
/// configuration that was completed, and of no use.
///
/// # Errors
/// If the kernel cannot be asked, or the interfaces are of another kind.
pub fn held(settings: &Settings) -> io::Result<Vec<HeldKey>> {
    let links = Links::open()?;
    let mut all: BTreeMap<u64, HeldKey> = BTreeMap::new();
    for number in NUMBERS {
        let name = settings.name(number);
        let Some(link) = links.get(&name)? else { continue };
        let Some(note) = link.alias.as_deref().and_then(Note::read) else { continue };
        let mut socket = WgSocket::connect().map_err(io::Error::other)?;
        let device = socket.get_device(DeviceInterface::from_name(name)).map_err(io::Error::other)?;
        let Some(private) = device.private_key else { continue };
        let received: u64 = device.peers.iter().map(|peer| peer.rx_bytes).sum();
        let age = Duration::from_secs(now().saturating_sub(note.made));
        let own = OwnKey { generation: note.generation, private: PrivateKey::from(private) };
        let ports = ports(settings.port, note.generation);
        let held =
            all.entry(note.generation).or_insert(HeldKey { own, age, leaving: false, received: 0, ports });
        held.age = held.age.max(age);
        held.leaving |= note.leaving;
        held.received += received;
    }
    Ok(all.into_values().collect())
}

/// Notes of all keys that the kernel holds that another tunnel takes their place.
///
/// # Errors
/// If the kernel refuses.
pub fn leave(settings: &Settings) -> io::Result<()> {
    let links = Links::open()?;
    for number in NUMBERS {
        let name = settings.name(number);
        let note = links.get(&name)?.and_then(|link| Note::read(link.alias.as_deref()?));
        if let Some(note) = note.filter(|note| !note.leaving) {
            links.note(&name, &Note { leaving: true, ..note }.to_string())?;
        }
    }
    Ok(())
}

/// Removes all interfaces; how many there were.
///
/// # Errors
/// If the kernel refuses.
pub fn remove(settings: &Settings) -> io::Result<usize> {
    let links = Links::open()?;
    let mut removed = 0;
    for number in NUMBERS {
        removed += usize::from(links.delete(&settings.name(number))?);
    }
    Ok(removed)
}

/// Why the kernel's WireGuard cannot be used here; `None` if it can. Asking loads its module where it is one, makes an
/// interface and removes it again.
pub fn missing(settings: &Settings) -> Option<String> {
    if let Err(error) = WgSocket::connect() {
        return Some(format!(
            "the kernel has no WireGuard: {error}; `modprobe wireguard` on the node says why, and loads it if there is one"
        ));
    }
    let name = format!("{}t", settings.interface);
    let tried = || {
        let links = Links::open()?;
        links.make(&name, settings.mtu)?;
        links.delete(&name)
    };
    let error = tried().err()?;
    Some(format!("the kernel makes no WireGuard interface: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_as_it_is_written_and_nothing_else_is() {
        for leaving in [false, true] {
            let note = Note { generation: 12, made: 1_795_309_388, leaving };
            assert_eq!(Note::read(&note.to_string()), Some(note));
        }
        for other in
            ["", "sockmesh", "sockmesh key 12", "sockmesh key x made 1", "sockmesh key 1 made 1 ", "uplink"]
        {
            assert_eq!(Note::read(other), None, "{other:?}");
        }
    }
}
