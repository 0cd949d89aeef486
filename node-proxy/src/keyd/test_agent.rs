//! A keyd in a thread, and its agent, for tests.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use super::{Settings, serve};
use crate::ipc::blocking::{recv_frame, send_frame};
use crate::ipc::proto::{FromKeyd, KeydHello, NewKey, SignChannel, ToKeyd, to_keyd::Message};

pub(crate) struct Keyd {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

pub(crate) fn own_uid() -> u32 {
    nix::unistd::getuid().as_raw()
}

impl Keyd {
    pub(crate) fn start() -> Self {
        Self::start_with(Settings { control_uid: own_uid(), ..Settings::default() })
    }

    pub(crate) fn start_with(settings: Settings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keyd.sock");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || serve(&listener, settings));
        Self { path, _dir: dir }
    }

    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    pub(crate) fn agent(&self) -> Agent {
        Agent(self.connect())
    }
}

pub(crate) struct Agent(UnixStream);

impl Agent {
    pub(crate) fn ask(&self, message: Option<Message>, descriptors: &[BorrowedFd<'_>]) -> FromKeyd {
        send_frame(&self.0, &ToKeyd { id: 42, message }, descriptors).unwrap();
        let (answer, _) = recv_frame::<FromKeyd>(&self.0).unwrap().unwrap();
        assert_eq!(answer.id, 42);
        answer
    }

    pub(crate) fn new_key(&self, uid: &str, spiffe_id: &str) -> FromKeyd {
        self.ask(Some(Message::NewKey(NewKey { uid: uid.into(), spiffe_id: spiffe_id.into() })), &[])
    }

    pub(crate) fn hello(&self) -> FromKeyd {
        self.ask(Some(Message::Hello(KeydHello {})), &[])
    }

    pub(crate) fn sign_channel(&self) -> UnixStream {
        let (own, keyds) = UnixStream::pair().unwrap();
        let answer = self.ask(Some(Message::SignChannel(SignChannel {})), &[keyds.as_fd()]);
        assert_eq!(answer.error, "");
        own
    }
}
