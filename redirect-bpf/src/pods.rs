//! Enrolling and un-enrolling single pods.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::Path,
};

use nix::{libc, sys::socket::SockaddrStorage};

use crate::{
    acceleration::Directions,
    error::Error,
    exclusions, object,
    redirect::{Redirect, pin_link},
    settings::{EnrolledPod, Exclusions, Listeners, PodSettings, PodSpec},
    sys,
    types::{
        Addr, LISTENER_INBOUND_V4, LISTENER_INBOUND_V6, LISTENER_OUTBOUND_V4, LISTENER_OUTBOUND_V6,
        ListenerKey, POD_CAPTURE_IN, POD_CAPTURE_OUT, POD_FAIL_CLOSED, POD_FAST_TO_APPLICATION,
        POD_FAST_TO_WORKER, PodEntry,
    },
};

const LISTENER_KINDS: [u32; 4] =
    [LISTENER_OUTBOUND_V4, LISTENER_OUTBOUND_V6, LISTENER_INBOUND_V4, LISTENER_INBOUND_V6];

impl Redirect {
    /// Captures a pod, or brings the entry of a pod that is enrolled already to this state. When this returns, every
    /// later `connect` and incoming SYN is captured.
    ///
    /// # Errors
    /// A pod that was not enrolled before is not enrolled afterwards; one that was may have part of the new state.
    pub fn enrol(&mut self, pod: &PodSpec<'_>) -> Result<(), Error> {
        let known = self.entry(pod.netns_cookie)?.is_some();
        let enrolled = self
            .write(pod.netns_cookie, &pod.settings, &pod.listeners)
            .and_then(|()| self.attach_inbound(pod.netns_cookie, pod.netns));
        if let Err(error) = enrolled {
            if !known {
                self.unenrol(pod.netns_cookie)?;
            }
            return Err(error);
        }
        Ok(())
    }

    /// Changes settings and listeners of an enrolled pod; listeners that are `None` stay as they are.
    ///
    /// # Errors
    /// When the pod is not enrolled, and the kernel's.
    pub fn update(
        &mut self,
        netns_cookie: u64,
        settings: &PodSettings,
        listeners: &Listeners<'_>,
    ) -> Result<(), Error> {
        if self.entry(netns_cookie)?.is_none() {
            return Err(Error::Invalid(format!(
                "no pod with netns cookie {netns_cookie} is enrolled; enrol it"
            )));
        }
        self.write(netns_cookie, settings, listeners)
    }

    /// Stops capturing a pod. Unknown cookies are no error: the namespace may be gone.
    ///
    /// # Errors
    /// The kernel's.
    pub fn unenrol(&mut self, netns_cookie: u64) -> Result<(), Error> {
        // The inbound program goes first: without the pod's entry it drops everything.
        remove_link(&self.pins.pod(netns_cookie))?;
        self.pods.remove(&netns_cookie).map_err(Error::sys("remove from map PODS"))?;
        for kind in LISTENER_KINDS {
            let key = ListenerKey { netns_cookie, kind, zero: 0 };
            // A sockhash answers EINVAL when there is no such entry.
            match self.listeners.remove(&key) {
                Err(error) if error.raw_os_error() != Some(libc::EINVAL) => {
                    return Err(Error::Sys { what: "remove from map LISTENERS".into(), source: error });
                }
                _ => {}
            }
        }
        self.set_addresses(netns_cookie, &[])?;
        self.exclusions.set(netns_cookie, &Exclusions::default())
    }

    /// Every pod in the pinned maps.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pods(&self) -> Result<Vec<EnrolledPod>, Error> {
        let mut cookies = self.pods.keys().map_err(Error::sys("list map PODS"))?;
        cookies.sort_unstable();
        // Each map is walked once, not once for each pod.
        let listeners = self.listeners.keys().map_err(Error::sys("list map LISTENERS"))?;
        let listeners: HashSet<(u64, u32)> =
            listeners.iter().map(|key| (key.netns_cookie, key.kind)).collect();
        let mut exclusions = self.exclusions.all()?;
        let mut addresses: HashMap<u64, Vec<IpAddr>> = HashMap::new();
        for (address, owner) in self.address_owners()? {
            addresses.entry(owner).or_default().push(address.into());
        }
        let mut pods = Vec::with_capacity(cookies.len());
        for netns_cookie in cookies {
            let Some(entry) = self.entry(netns_cookie)? else { continue };
            let mut addresses = addresses.remove(&netns_cookie).unwrap_or_default();
            addresses.sort_unstable();
            let capture_outbound = entry.flags & POD_CAPTURE_OUT != 0;
            let capture_inbound = entry.flags & POD_CAPTURE_IN != 0;
            let takes = |outbound, inbound| {
                (!capture_outbound || listeners.contains(&(netns_cookie, outbound)))
                    && (!capture_inbound || listeners.contains(&(netns_cookie, inbound)))
            };
            pods.push(EnrolledPod {
                netns_cookie,
                settings: PodSettings {
                    addresses,
                    capture_outbound,
                    capture_inbound,
                    fail_closed: entry.flags & POD_FAIL_CLOSED != 0,
                    exclusions: exclusions.remove(&netns_cookie).unwrap_or_default(),
                    acceleration: Directions {
                        to_worker: entry.flags & POD_FAST_TO_WORKER != 0,
                        to_application: entry.flags & POD_FAST_TO_APPLICATION != 0,
                    },
                },
                outbound_port_v4: entry.outbound_port_v4,
                outbound_port_v6: entry.outbound_port_v6,
                listening: takes(LISTENER_OUTBOUND_V4, LISTENER_INBOUND_V4)
                    || takes(LISTENER_OUTBOUND_V6, LISTENER_INBOUND_V6),
                inbound_attached: self.pins.pod(netns_cookie).exists(),
            });
        }
        Ok(pods)
    }

    /// Puts newly loaded inbound programs over the maps in `maps` into the links of all pods; forgets pods whose
    /// namespace is gone.
    pub(crate) fn renew_inbound(&mut self, maps: &Path) -> Result<(), Error> {
        let pinned = self.pins.pinned_pods().map_err(Error::sys("list pinned pods"))?;
        for netns_cookie in pinned {
            if !self.update_inbound(maps, netns_cookie)? {
                self.unenrol(netns_cookie)?;
            }
        }
        // An entry without that link is what a crash left of an enrolment or of a self-test.
        let pinned = self.pins.pinned_pods().map_err(Error::sys("list pinned pods"))?;
        for netns_cookie in self.pods.keys().map_err(Error::sys("list map PODS"))? {
            if !pinned.contains(&netns_cookie) {
                self.unenrol(netns_cookie)?;
            }
        }
        Ok(())
    }

    fn entry(&self, netns_cookie: u64) -> Result<Option<PodEntry>, Error> {
        self.pods.get(&netns_cookie).map_err(Error::sys("read map PODS"))
    }

    /// Writes everything but the inbound link; the pod's entry, which makes the rest count, comes last.
    pub(crate) fn write(
        &mut self,
        netns_cookie: u64,
        settings: &PodSettings,
        listeners: &Listeners<'_>,
    ) -> Result<(), Error> {
        let mut entry = self.entry(netns_cookie)?.unwrap_or_default();
        for (kind, listener) in LISTENER_KINDS.into_iter().zip([
            listeners.outbound_v4,
            listeners.outbound_v6,
            listeners.inbound_v4,
            listeners.inbound_v6,
        ]) {
            let Some(listener) = listener else { continue };
            let what = || format!("put listener {kind} of netns {netns_cookie} into map LISTENERS");
            self.listeners
                .insert(&ListenerKey { netns_cookie, kind, zero: 0 }, &(listener.as_raw_fd() as u32))
                .map_err(Error::sys(what()))?;
            match kind {
                LISTENER_OUTBOUND_V4 => entry.outbound_port_v4 = local_port(listener)?,
                LISTENER_OUTBOUND_V6 => entry.outbound_port_v6 = local_port(listener)?,
                _ => {}
            }
        }
        self.exclusions.set(netns_cookie, &settings.exclusions)?;
        let addresses: Vec<Addr> = settings.addresses.iter().map(|address| (*address).into()).collect();
        self.set_addresses(netns_cookie, &addresses)?;
        entry.flags = flags(settings);
        self.pods
            .insert(&netns_cookie, &entry)
            .map_err(Error::sys(format!("add netns {netns_cookie} to map PODS")))
    }

    fn address_owners(&self) -> Result<Vec<(Addr, u64)>, Error> {
        let mut owners = Vec::new();
        for address in self.pod_addresses.keys().map_err(Error::sys("list map POD_ADDRESSES"))? {
            if let Some(owner) =
                self.pod_addresses.get(&address).map_err(Error::sys("read map POD_ADDRESSES"))?
            {
                owners.push((address, owner));
            }
        }
        Ok(owners)
    }

    fn set_addresses(&self, netns_cookie: u64, wanted: &[Addr]) -> Result<(), Error> {
        for address in wanted {
            self.pod_addresses
                .insert(address, &netns_cookie)
                .map_err(Error::sys("add to map POD_ADDRESSES"))?;
        }
        for (address, owner) in self.address_owners()? {
            if owner == netns_cookie && !wanted.contains(&address) {
                self.pod_addresses.remove(&address).map_err(Error::sys("remove from map POD_ADDRESSES"))?;
            }
        }
        Ok(())
    }

    fn attach_inbound(&mut self, netns_cookie: u64, netns: BorrowedFd<'_>) -> Result<(), Error> {
        let pin = self.pins.pod(netns_cookie);
        if pin.exists() {
            // Enrolled already: the program looks everything else up in the maps.
            return Ok(());
        }
        let what = || format!("attach the inbound program to netns {netns_cookie}");
        let mut object = self.loader.open(&self.pins.maps())?;
        let program = object::load_inbound(&mut object, netns_cookie)?;
        let id = program.attach(netns).map_err(Error::program(what()))?;
        let link = program.take_link(id).map_err(Error::program(what()))?;
        pin_link(link.into(), &pin)
    }

    /// False when the namespace is gone.
    fn update_inbound(&mut self, maps: &Path, netns_cookie: u64) -> Result<bool, Error> {
        let pin = self.pins.pod(netns_cookie);
        let what = || format!("update link {}", pin.display());
        let link = sys::open_pinned(&pin).map_err(Error::sys(what()))?;
        let mut object = self.loader.open(maps)?;
        let program =
            object::load_inbound(&mut object, netns_cookie)?.fd().map_err(Error::program(what()))?;
        match sys::link_update(link.as_fd(), program.as_fd()) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
            Err(error) => Err(Error::Sys { what: what(), source: error }),
        }
    }
}

fn flags(settings: &PodSettings) -> u32 {
    let mut flags = exclusions::flags(&settings.exclusions);
    for (wanted, flag) in [
        (settings.capture_outbound, POD_CAPTURE_OUT),
        (settings.capture_inbound, POD_CAPTURE_IN),
        (settings.fail_closed, POD_FAIL_CLOSED),
        (settings.acceleration.to_worker, POD_FAST_TO_WORKER),
        (settings.acceleration.to_application, POD_FAST_TO_APPLICATION),
    ] {
        if wanted {
            flags |= flag;
        }
    }
    flags
}

/// Detaches a pinned link at once and removes the pin. No pin is no error.
pub(crate) fn remove_link(pin: &Path) -> Result<(), Error> {
    let what = |verb: &str| format!("{verb} link {}", pin.display());
    match sys::open_pinned(pin) {
        Ok(link) => match sys::link_detach(link.as_fd()) {
            Ok(()) => {}
            // What it was attached to is gone.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
            Err(error) => return Err(Error::Sys { what: what("detach"), source: error }),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::Sys { what: what("open"), source: error }),
    }
    fs::remove_file(pin).map_err(Error::sys(what("unpin")))
}

fn local_port(listener: BorrowedFd<'_>) -> Result<u16, Error> {
    let name: SockaddrStorage = nix::sys::socket::getsockname(listener.as_raw_fd())
        .map_err(|errno| Error::Sys { what: "ask a listener for its port".into(), source: errno.into() })?;
    let port =
        name.as_sockaddr_in().map(|name| name.port()).or(name.as_sockaddr_in6().map(|name| name.port()));
    port.filter(|port| *port != 0)
        .ok_or_else(|| Error::Invalid("an outbound listener is not bound to a port".into()))
}
