//! What the kernel holds of this node's tunnel, whoever made it: its interfaces outlive the processes that do, and tell the
//! next one what it has to know. Nothing of it is kept anywhere else.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sched::{CloneFlags, unshare};
use wireguard_uapi::{DeviceInterface, WgSocket};

use super::link::{Link, Links};
use super::{NUMBERS, Pair, Settings, age};
use crate::device::{OwnKey, PrivateKey, PublicKey};

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
    /// Which UDP ports it has.
    pub pair: Pair,
    /// The same, as [`crate::device::Tunnel::ports`].
    pub ports: [u16; 2],
}

/// A way to another node by one of the kernel's interfaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldWay {
    /// The interface.
    pub interface: String,
    /// Generation of its own key.
    pub own_generation: u64,
    /// The other node's key.
    pub peer: PublicKey,
    /// There is a session.
    pub has_session: bool,
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

fn note(link: &Link) -> Option<Note> {
    Note::read(link.alias.as_deref()?)
}

/// The interfaces of a configuration that was completed: their names, notes, and what they are like. What bears no note is of
/// no use.
fn noted(settings: &Settings) -> io::Result<Vec<(String, Note, wireguard_uapi::get::Device)>> {
    let links = Links::open()?;
    let mut all = Vec::new();
    for name in NUMBERS.map(|number| settings.name(number)) {
        let Some(note) = links.get(&name)?.as_ref().and_then(note) else { continue };
        let mut socket = WgSocket::connect().map_err(io::Error::other)?;
        let device =
            socket.get_device(DeviceInterface::from_name(name.as_str())).map_err(io::Error::other)?;
        all.push((name, note, device));
    }
    Ok(all)
}

/// The own keys that the kernel holds, the oldest first; none where it has no WireGuard.
///
/// # Errors
/// If the kernel cannot be asked, or the interfaces are of another kind.
pub fn held(settings: &Settings) -> io::Result<Vec<HeldKey>> {
    let mut all: BTreeMap<u64, HeldKey> = BTreeMap::new();
    for (_, note, device) in noted(settings)? {
        let Some(private) = device.private_key else { continue };
        let received: u64 = device.peers.iter().map(|peer| peer.rx_bytes).sum();
        let age = Duration::from_secs(now().saturating_sub(note.made));
        let pair =
            Pair::of(settings.port, device.listen_port).unwrap_or_else(|| Pair::usual(note.generation));
        let held = all.entry(note.generation).or_insert(HeldKey {
            own: OwnKey { generation: note.generation, private: PrivateKey::from(private) },
            age,
            leaving: false,
            received: 0,
            pair,
            ports: pair.ports(settings.port),
        });
        held.age = held.age.max(age);
        held.leaving |= note.leaving;
        held.received += received;
    }
    Ok(all.into_values().collect())
}

/// The ways to other nodes that the kernel has, whoever set them up.
///
/// # Errors
/// As [`held`].
pub fn ways(settings: &Settings) -> io::Result<Vec<HeldWay>> {
    let of_one = |(interface, note, device): (String, Note, wireguard_uapi::get::Device)| {
        let way = move |peer: wireguard_uapi::get::Peer| HeldWay {
            interface: interface.clone(),
            own_generation: note.generation,
            has_session: age(&peer).is_some(),
            peer: peer.public_key.into(),
        };
        device.peers.into_iter().map(way)
    };
    Ok(noted(settings)?.into_iter().flat_map(of_one).collect())
}

/// Notes of all keys that the kernel holds that another tunnel takes their place.
///
/// # Errors
/// If the kernel refuses.
pub fn leave(settings: &Settings) -> io::Result<()> {
    let links = Links::open()?;
    for name in NUMBERS.map(|number| settings.name(number)) {
        let note = links.get(&name)?.as_ref().and_then(note);
        if let Some(note) = note.filter(|note| !note.leaving) {
            links.note(&name, &Note { leaving: true, ..note }.to_string())?;
        }
    }
    Ok(())
}

/// Gives interfaces that bear our notes under other names those of these settings: they were made with another
/// [`Settings::interface`], and have the node's keys and ports. Where there is one of that name already, it is the one that
/// counts, and the other is removed. Returns the old names.
///
/// # Errors
/// If the kernel refuses; what was not dealt with is at the next call.
pub fn adopt(settings: &Settings) -> io::Result<Vec<String>> {
    let links = Links::open()?;
    let ours: Vec<String> = NUMBERS.map(|number| settings.name(number)).collect();
    let mut adopted = Vec::new();
    for (name, link) in links.wireguards()? {
        if note(&link).is_none() || ours.contains(&name) {
            continue;
        }
        let same = ours.iter().find(|ours| ours.chars().last() == name.chars().last());
        match same {
            Some(ours) if links.get(ours)?.is_none() => links.rename(&link, ours)?,
            _ => drop(links.delete(&name)?),
        }
        adopted.push(name);
    }
    Ok(adopted)
}

/// Removes all interfaces, those included that bear our notes under other names: the names of those that are gone, and what
/// the kernel refused.
pub fn remove(settings: &Settings) -> (Vec<String>, io::Result<()>) {
    let mut removed = Vec::new();
    let mut refused = Vec::new();
    let links = match Links::open() {
        Ok(links) => links,
        Err(error) => return (removed, Err(error)),
    };
    let mut names: Vec<String> = NUMBERS.map(|number| settings.name(number)).collect();
    match links.wireguards() {
        Ok(all) => {
            names.extend(all.into_iter().filter(|(_, link)| note(link).is_some()).map(|(name, _)| name))
        }
        Err(error) => refused.push(format!("cannot look for interfaces: {error}")),
    }
    for name in names {
        match links.delete(&name) {
            Ok(true) => removed.push(name),
            Ok(false) => {}
            Err(error) => refused.push(format!("cannot remove {name}: {error}")),
        }
    }
    let outcome = if refused.is_empty() { Ok(()) } else { Err(io::Error::other(refused.join("; "))) };
    (removed, outcome)
}

/// Why the kernel's WireGuard cannot be used here; `None` if it can. Asking loads its module where it is one, and makes an
/// interface in a network of its own, which is gone with it whatever happens.
pub fn missing(settings: &Settings) -> Option<String> {
    if let Err(error) = WgSocket::connect() {
        return Some(format!(
            "the kernel has no WireGuard: {error}; `modprobe wireguard` on the node says why, and loads it if there is one"
        ));
    }
    let (name, mtu) = (settings.name(0), settings.mtu);
    let tried = std::thread::spawn(move || {
        // Of this thread alone.
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| {
            io::Error::new(io::Error::from(error).kind(), format!("no network to try it in: {error}"))
        })?;
        Links::open()?.make(&name, mtu)
    });
    let error = match tried.join() {
        Ok(tried) => tried.err()?,
        Err(_) => io::Error::other("the attempt broke off"),
    };
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
