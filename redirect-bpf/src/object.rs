//! The compiled programs and how they are loaded.

use std::{os::fd::AsFd, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    maps::Array,
    programs::{
        CgroupAttachMode, CgroupSockAddr, Program, ProgramError, ProgramFd, SkLookup, SockOps, links::FdLink,
    },
};

use crate::{error::Error, layout::MAPS};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect"));

/// The programs attached to the cgroup, with the names of their link pins.
pub(crate) const CGROUP_HOOKS: [(&str, &str); 5] = [
    // What hands over comes first: no connection may be captured before it can be explained.
    ("sock_ops", "sockmesh_handoff"),
    ("getpeername4", "sockmesh_getpeername4"),
    ("getpeername6", "sockmesh_getpeername6"),
    ("connect4", "sockmesh_connect4"),
    ("connect6", "sockmesh_connect6"),
];

const INBOUND_PROGRAM: &str = "sockmesh_inbound";

/// Makes copies of the programs. Kept for as long as pods come and go, because making one reads all types of the
/// kernel, which takes longer than everything else.
#[derive(Debug)]
pub(crate) struct Loader(EbpfLoader<'static>);

impl Loader {
    pub(crate) fn new() -> Self {
        static PRESENT: u32 = 1;
        static ABSENT: u32 = 0;
        let mut loader = EbpfLoader::new();
        // No program looks into the kernel's own structures, so there is nothing to relocate against its types.
        loader.btf(None);
        let has_set_retval = if has_set_retval() { &PRESENT } else { &ABSENT };
        loader.override_global("HAS_SET_RETVAL", has_set_retval, true);
        Self(loader)
    }

    /// Tells the programs that look into the kernel's TCP sockets where the field is that they read.
    pub(crate) fn set_write_seq_offset(&mut self, bytes: u32) {
        // The same for as long as the machine runs.
        static OFFSET: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
        self.0.override_global("WRITE_SEQ_OFFSET", OFFSET.get_or_init(|| bytes), true);
    }

    /// Opens the object over the maps pinned in `maps`; those that are missing are made and pinned.
    pub(crate) fn open(&mut self, maps: &Path) -> Result<Ebpf, Error> {
        for spec in MAPS {
            self.0.map_pin_path(spec.name, maps.join(spec.name));
        }
        self.0.load(OBJECT).map_err(|error| Error::Load(Box::new(error)))
    }
}

/// Whether the connect hooks may choose their error (`bpf_set_retval`, Linux 5.18).
pub(crate) fn has_set_retval() -> bool {
    use aya::{
        programs::ProgramType,
        sys::{BpfHelper, is_helper_supported},
    };
    is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval).unwrap_or(false)
}

/// A loaded program that is attached to the cgroup.
pub(crate) enum CgroupProgram<'a> {
    SockAddr(&'a mut CgroupSockAddr),
    SockOps(&'a mut SockOps),
}

impl<'a> CgroupProgram<'a> {
    /// Loads the program called `name` into the kernel.
    pub(crate) fn load(object: &'a mut Ebpf, name: &str) -> Result<Self, Error> {
        let what = || format!("load eBPF program {name}");
        let program = object.program_mut(name).ok_or_else(|| missing(name))?;
        if let Ok(program) = <&mut SockOps>::try_from(&mut *program) {
            program.load().map_err(Error::program(what()))?;
        } else {
            let program = <&mut CgroupSockAddr>::try_from(&mut *program).map_err(Error::program(what()))?;
            program.load().map_err(Error::program(what()))?;
        }
        match program {
            aya::programs::Program::SockOps(program) => Ok(Self::SockOps(program)),
            aya::programs::Program::CgroupSockAddr(program) => Ok(Self::SockAddr(program)),
            _ => Err(missing(name)),
        }
    }

    pub(crate) fn fd(&self) -> Result<&ProgramFd, ProgramError> {
        match self {
            Self::SockAddr(program) => program.fd(),
            Self::SockOps(program) => program.fd(),
        }
    }

    /// Attaches beside whatever else is attached to the cgroup.
    pub(crate) fn attach(&mut self, cgroup: impl AsFd) -> Result<FdLink, ProgramError> {
        // Links are always beside others (`cgroup_bpf_link_attach` adds BPF_F_ALLOW_MULTI and refuses any flag here).
        const MODE: CgroupAttachMode = CgroupAttachMode::Single;
        let link: Result<FdLink, _> = match self {
            Self::SockAddr(program) => {
                let id = program.attach(cgroup, MODE)?;
                program.take_link(id)?.try_into()
            }
            Self::SockOps(program) => {
                let id = program.attach(cgroup, MODE)?;
                program.take_link(id)?.try_into()
            }
        };
        link.map_err(|_not_a_link| ProgramError::NotAttached)
    }
}

/// Loads the inbound program for one pod.
pub(crate) fn load_inbound(object: &mut Ebpf, netns_cookie: u64) -> Result<&mut SkLookup, Error> {
    let what = || format!("load eBPF program {INBOUND_PROGRAM}");
    object
        .map_mut("POD")
        .ok_or_else(|| missing(INBOUND_PROGRAM))
        .and_then(|map| Array::try_from(map).map_err(Error::map("open map POD")))?
        .set(0, netns_cookie, 0)
        .map_err(Error::map("write map POD"))?;
    let program = object.program_mut(INBOUND_PROGRAM).ok_or_else(|| missing(INBOUND_PROGRAM))?;
    let program = <&mut SkLookup>::try_from(program).map_err(Error::program(what()))?;
    program.load().map_err(Error::program(what()))?;
    Ok(program)
}

/// A program of the object by its name.
pub(crate) fn program<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, Error> {
    object.program_mut(name).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> Error {
    Error::Invalid(format!("the built eBPF object has no usable program {name}; rebuild redirect-bpf"))
}
