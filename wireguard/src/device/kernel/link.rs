//! Interfaces: made, set up, removed.

use std::io;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkWireguard, new_connection};
use tokio::runtime::{Builder, Runtime};

/// A connection to the kernel, in the network namespace of the thread that opened it.
pub(super) struct Links {
    runtime: Runtime,
    handle: Handle,
}

impl Links {
    pub(super) fn open() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let handle = runtime.block_on(async {
            let (connection, handle, _) = new_connection()?;
            tokio::spawn(connection);
            io::Result::Ok(handle)
        })?;
        Ok(Self { runtime, handle })
    }

    /// Makes the interface unless it is there, and sets it up with this MTU.
    pub(super) fn make(&self, name: &str, mtu: u32) -> io::Result<()> {
        self.runtime.block_on(async {
            let index = match self.index(name).await? {
                Some((index, present)) if present == Some(mtu) => {
                    return self.change(LinkUnspec::new_with_index(index).up()).await;
                }
                Some((index, _)) => index,
                None => {
                    let made = self.handle.link().add(LinkWireguard::new(name).mtu(mtu).up().build());
                    return made.execute().await.map_err(error);
                }
            };
            self.change(LinkUnspec::new_with_index(index).mtu(mtu).up()).await
        })
    }

    /// Removes the interface if it is there.
    pub(super) fn delete(&self, name: &str) -> io::Result<()> {
        self.runtime.block_on(async {
            match self.index(name).await? {
                Some((index, _)) => self.handle.link().del(index).execute().await.map_err(error),
                None => Ok(()),
            }
        })
    }

    async fn change(&self, link: LinkMessageBuilder<LinkUnspec>) -> io::Result<()> {
        self.handle.link().set(link.build()).execute().await.map_err(error)
    }

    /// Index and MTU of the interface.
    async fn index(&self, name: &str) -> io::Result<Option<(u32, Option<u32>)>> {
        let mut found = self.handle.link().get().match_name(name.to_owned()).execute();
        match found.try_next().await {
            Ok(None) => Ok(None),
            Ok(Some(link)) => {
                let mtu = link.attributes.iter().find_map(|a| match a {
                    LinkAttribute::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                Ok(Some((link.header.index, mtu)))
            }
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -libc::ENODEV => Ok(None),
            Err(e) => Err(error(e)),
        }
    }
}

fn error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(e) => e.to_io(),
        other => io::Error::other(other),
    }
}
