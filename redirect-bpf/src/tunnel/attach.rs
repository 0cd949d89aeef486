//! Attaching to devices: by tcx links where the kernel has them (6.6), else as filters of qdisc clsact.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::programs::{
    LinkOrder, ProgramError, SchedClassifier, TcAttachType,
    links::FdLink,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use nix::libc;
use serde::{Deserialize, Serialize};

use super::policy::{Device, Role};
use crate::{error::Error, pods::remove_link, redirect::pin_link, sys};

/// Priority of our filters; its handle is the same.
const PRIORITY: u16 = 15_871;
const HANDLE: TcHandle = TcHandle::new(0, PRIORITY);
/// Ends the name of a pin that is no link but the program of a filter.
const FILTER: &str = "-filter";

/// How to attach to devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attach {
    /// By links, or where the kernel has none for devices by filters.
    #[default]
    Best,
    /// By filters of qdisc clsact, as kernels before 6.6 need it.
    Filters,
}

/// One program at one side of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) device: String,
    pub(super) index: u32,
    pub(super) is_out: bool,
    /// Name in the object.
    pub(super) program: &'static str,
}

impl Place {
    fn pin(&self) -> String {
        let direction = if self.is_out { "out" } else { "in" };
        let program =
            self.program.trim_start_matches("sockmesh_").trim_end_matches("_in").trim_end_matches("_out");
        format!("{}-{direction}-{program}", self.index)
    }

    fn kind(&self) -> TcAttachType {
        if self.is_out { TcAttachType::Egress } else { TcAttachType::Ingress }
    }

    fn what(&self, verb: &str) -> String {
        format!(
            "{verb} {} {} device {}",
            self.program,
            if self.is_out { "behind" } else { "before" },
            self.device
        )
    }
}

/// Where programs belong. A device that is not there is left out: what is not there carries nothing.
pub(super) fn places(devices: &[Device]) -> Result<Vec<Place>, Error> {
    let mut places = Vec::new();
    for device in devices {
        let index = match nix::net::if_::if_nametoindex(device.name.as_str()) {
            Ok(index) => index,
            Err(nix::errno::Errno::ENODEV) => continue,
            Err(errno) => {
                let what = format!("look for device {}", device.name);
                return Err(Error::Sys { what, source: errno.into() });
            }
        };
        let programs = match device.role {
            Role::Uplink => [(false, "sockmesh_strict_in"), (true, "sockmesh_strict_out")],
            Role::Tunnel => [(false, "sockmesh_clamp"), (true, "sockmesh_clamp")],
        };
        let place = |(is_out, program)| Place { device: device.name.clone(), index, is_out, program };
        places.extend(programs.map(place));
    }
    Ok(places)
}

/// Puts the program at its place, or in the place of its predecessor there.
pub(super) fn attach(
    links: &Path,
    place: &Place,
    program: &mut SchedClassifier,
    attach: Attach,
) -> Result<(), Error> {
    let pin = links.join(place.pin());
    let filter = filter_pin(&pin);
    if filter.exists() {
        return set_filter(&filter, place, program);
    }
    match sys::open_pinned(&pin) {
        Ok(link) => {
            let fd = program.fd().map_err(Error::program(place.what("renew")))?;
            match sys::link_update(link.as_fd(), fd.as_fd()) {
                Ok(()) => return Ok(()),
                // The device that it was attached to is gone, and another has its number.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
                    fs::remove_file(&pin).map_err(Error::sys(place.what("remove dead link of")))?;
                }
                Err(error) => return Err(Error::Sys { what: place.what("renew"), source: error }),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::Sys { what: place.what("open link of"), source: error }),
    }
    if attach == Attach::Filters {
        return set_filter(&filter, place, program);
    }
    // Before all others, which may send packets elsewhere.
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    match program.attach_with_options(&place.device, place.kind(), options) {
        Ok(id) => {
            let link = program.take_link(id).map_err(Error::program(place.what("attach")))?;
            let link = FdLink::try_from(link)
                .map_err(|_not_a_link| Error::Invalid(place.what("no link came of attaching")))?;
            pin_link(link, &pin)
        }
        // Kernels before 6.6 do not know the kind of link.
        Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EINVAL) => {
            set_filter(&filter, place, program)
        }
        Err(error) => Err(Error::program(place.what("attach"))(error)),
    }
}

fn filter_pin(pin: &Path) -> PathBuf {
    let mut name = pin.as_os_str().to_owned();
    name.push(FILTER);
    name.into()
}

/// Filters hold their program by themselves; the pin only tells that there is one.
fn set_filter(pin: &Path, place: &Place, program: &mut SchedClassifier) -> Result<(), Error> {
    let fail = |source: tc::TcError| Error::Program {
        what: place.what("attach"),
        source: Box::new(ProgramError::TcError(source)),
    };
    // The kernel refuses a second one.
    if let Err(error) = tc::qdisc_add_clsact(&place.device)
        && !is_there_already(&error)
    {
        return Err(fail(error));
    }
    let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
    let id = match program.attach_with_options(&place.device, place.kind(), TcAttachOptions::Netlink(options))
    {
        Ok(id) => id,
        Err(ProgramError::TcError(error)) if is_there_already(&error) => {
            let link =
                attached(&place.device, place.kind()).map_err(Error::sys(place.what("find filter of")))?;
            program.attach_to_link(link).map_err(Error::program(place.what("renew")))?
        }
        Err(error) => return Err(Error::program(place.what("attach"))(error)),
    };
    // It stays in force when this process ends.
    std::mem::forget(program.take_link(id).map_err(Error::program(place.what("attach")))?);
    if pin.exists() {
        fs::remove_file(pin).map_err(Error::sys(place.what("unpin predecessor of")))?;
    }
    program.pin(pin).map_err(|error| Error::Sys { what: place.what("pin"), source: io::Error::other(error) })
}

fn attached(device: &str, kind: TcAttachType) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(device, kind, PRIORITY, HANDLE, None)
}

fn is_there_already(error: &tc::TcError) -> bool {
    match error {
        tc::TcError::AlreadyAttached => true,
        tc::TcError::NetlinkError(error) => error.raw_os_error() == Some(libc::EEXIST),
        _ => false,
    }
}

/// Detaches whatever is attached and not in `wanted`.
pub(super) fn detach_others(links: &Path, wanted: &[Place]) -> Result<(), Error> {
    let listing = || Error::sys(format!("list {}", links.display()));
    let entries = match fs::read_dir(links) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(listing()(error)),
    };
    let wanted: Vec<String> = wanted.iter().map(Place::pin).collect();
    for entry in entries {
        let name = entry.map_err(listing())?.file_name();
        let Some(name) = name.to_str() else { continue };
        let pin = links.join(name);
        match name.strip_suffix(FILTER) {
            None if !wanted.iter().any(|wanted| wanted == name) => remove_link(&pin)?,
            Some(place) if !wanted.iter().any(|wanted| wanted == place) => {
                remove_filter(place)?;
                fs::remove_file(&pin).map_err(Error::sys(format!("unpin {}", pin.display())))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes the filter that a pin tells of.
fn remove_filter(place: &str) -> Result<(), Error> {
    let (index, rest) = place.split_once('-').unwrap_or((place, ""));
    let kind = if rest.starts_with("out") { TcAttachType::Egress } else { TcAttachType::Ingress };
    let Ok(index) = index.parse::<u32>() else { return Ok(()) };
    // A filter goes with its device.
    let Ok(device) = nix::net::if_::if_indextoname(index) else { return Ok(()) };
    let device = device.to_string_lossy().into_owned();
    let link = match attached(&device, kind) {
        // It may go at any moment.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
        link => link.map_err(Error::sys(format!("find the filter of device {device}")))?,
    };
    match aya::programs::Link::detach(link) {
        Err(ProgramError::NetlinkError(error)) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map_err(Error::program(format!("remove the filter of device {device}"))),
    }
}
