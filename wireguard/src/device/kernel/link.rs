//! Interfaces: made, set up, read, removed.

use std::io;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{
    AfSpecInet, AfSpecUnspec, InetDevConf, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, Stats64,
};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkWireguard, new_connection};
use tokio::runtime::Builder;

use crate::reverse_path;

/// A connection to the kernel, in the network namespace of the thread that opened it.
pub(super) struct Links {
    runtime: Runtime,
    handle: Handle,
    /// What `rp_filter` of interfaces in that namespace is to be.
    rp_filter: i32,
}

/// A runtime of which nothing is waited for at its end: it may come on a thread of another one, which must not wait.
struct Runtime(Option<tokio::runtime::Runtime>);

impl Runtime {
    fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.0.as_ref().expect("it is there until it is dropped").block_on(future)
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// An interface as it is.
pub(super) struct Link {
    index: u32,
    mtu: Option<u32>,
    is_up: bool,
    is_wireguard: bool,
    /// What its maker has noted there.
    pub(super) alias: Option<String>,
    pub(super) counters: Option<Stats64>,
}

impl Links {
    pub(super) fn open() -> io::Result<Self> {
        let runtime = Runtime(Some(Builder::new_current_thread().enable_io().build()?));
        let handle = runtime.block_on(async {
            let (connection, handle, _) = new_connection()?;
            tokio::spawn(connection);
            io::Result::Ok(handle)
        })?;
        Ok(Self { runtime, handle, rp_filter: reverse_path::mode() })
    }

    /// Makes the interface unless it is there. It is down then, so that it listens nowhere before it knows on which port.
    pub(super) fn make(&self, name: &str, mtu: u32) -> io::Result<()> {
        if self.get(name)?.is_some() {
            return Ok(());
        }
        let made = self.handle.link().add(LinkWireguard::new(name).mtu(mtu).build());
        self.runtime.block_on(made.execute()).map_err(error)?;
        let Some(link) = self.get(name)? else { return Err(io::Error::from_raw_os_error(libc::ENODEV)) };
        // What comes before packets are routed this way, too, is not to be dropped.
        let mut manners = InetDevConf::default();
        manners.rp_filter = self.rp_filter;
        let manners = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(manners)]);
        let change = LinkUnspec::new_with_index(link.index);
        self.change(change.append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![manners])))
    }

    /// Sets an interface up that has everything else, with this MTU and this note.
    pub(super) fn finish(&self, name: &str, mtu: u32, alias: &str) -> io::Result<()> {
        let link = self.get(name)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
        if link.mtu == Some(mtu) && link.is_up && link.alias.as_deref() == Some(alias) {
            return Ok(());
        }
        let change = LinkUnspec::new_with_index(link.index);
        self.change(change.mtu(mtu).append_extra_attribute(LinkAttribute::IfAlias(alias.to_owned())).up())
    }

    /// Notes something at an interface that is there.
    pub(super) fn note(&self, name: &str, alias: &str) -> io::Result<()> {
        let link = self.get(name)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
        let change = LinkUnspec::new_with_index(link.index);
        self.change(change.append_extra_attribute(LinkAttribute::IfAlias(alias.to_owned())))
    }

    /// Removes the interface if it is there; whether it was.
    pub(super) fn delete(&self, name: &str) -> io::Result<bool> {
        let Some(link) = self.get(name)? else { return Ok(false) };
        self.runtime.block_on(self.handle.link().del(link.index).execute()).map_err(error)?;
        Ok(true)
    }

    /// The interface, if it is there. One of another kind is an error: it is somebody else's.
    pub(super) fn get(&self, name: &str) -> io::Result<Option<Link>> {
        let found = self.runtime.block_on(async {
            self.handle.link().get().match_name(name.to_owned()).execute().try_next().await
        });
        match found {
            Ok(None) => Ok(None),
            Ok(Some(message)) => {
                let link = Link::read(message);
                if link.is_wireguard {
                    return Ok(Some(link));
                }
                let why =
                    format!("{name} is another kind of interface; remove it, or set wireguard.interface");
                Err(io::Error::new(io::ErrorKind::AlreadyExists, why))
            }
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -libc::ENODEV => Ok(None),
            Err(e) => Err(error(e)),
        }
    }

    /// All interfaces of this kind, by name.
    pub(super) fn wireguards(&self) -> io::Result<Vec<(String, Link)>> {
        let all: Vec<LinkMessage> = self
            .runtime
            .block_on(async { self.handle.link().get().execute().try_collect().await })
            .map_err(error)?;
        let named = |message: LinkMessage| {
            let name = message.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
            Some((name?, Link::read(message)))
        };
        Ok(all.into_iter().filter_map(named).filter(|(_, link)| link.is_wireguard).collect())
    }

    /// Gives an interface another name. It is up afterwards; its routes may be gone, and its sessions.
    pub(super) fn rename(&self, link: &Link, name: &str) -> io::Result<()> {
        let change = || LinkUnspec::new_with_index(link.index);
        match self.change(change().name(name.to_owned())) {
            // Older kernels rename only what is down.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                self.change(change().down())?;
                self.change(change().name(name.to_owned()))?;
            }
            other => other?,
        }
        self.change(change().up())
    }

    fn change(&self, link: LinkMessageBuilder<LinkUnspec>) -> io::Result<()> {
        self.runtime.block_on(self.handle.link().set(link.build()).execute()).map_err(error)
    }
}

impl Link {
    fn read(message: LinkMessage) -> Self {
        let is_up = message.header.flags.contains(LinkFlags::Up);
        let index = message.header.index;
        let mut link = Self { index, mtu: None, is_up, is_wireguard: false, alias: None, counters: None };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::Mtu(mtu) => link.mtu = Some(mtu),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Stats64(counters) => link.counters = Some(counters),
                LinkAttribute::LinkInfo(all) => {
                    link.is_wireguard = all.contains(&LinkInfo::Kind(InfoKind::Wireguard));
                }
                _ => {}
            }
        }
        link
    }
}

fn error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(e) => e.to_io(),
        other => io::Error::other(other),
    }
}
