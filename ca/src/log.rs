//! The append-only record of everything issued: one JSON object a line.
//!
//! An entry is written before its certificate leaves the CA; when that fails (disk full, file system read-only) the
//! certificate is not handed out. So every certificate in the world is in the log, and the log may hold a few that
//! nobody ever got.
//!
//! Durability is the caller's choice: [`Durability::EachEntry`] calls fdatasync(2) for each entry, so that a power failure
//! forgets nothing; [`Durability::ByKernel`] leaves it to the kernel's write-back (some 30 s), which survives the death of
//! the process but not of the machine.
//!
//! A log may be limited ([`FileLog::limited_to`]): a file that is full becomes `<name>.1`, in place of the one that had that
//! name. [`read_all`] reads both.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::serial::Serial;

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A pod.
    Workload,
    /// A node.
    Node,
    /// An endpoint of the controller.
    Server,
}

/// One issued certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When, RFC 3339 in UTC.
    pub time: String,
    /// Serial number.
    pub serial: Serial,
    /// What for.
    pub kind: Kind,
    /// Alternative names as `URI:...`, `DNS:...`, `IP:...`.
    pub san: Vec<String>,
    /// Node that asked; empty for the controller's own.
    pub node: String,
    /// UID of the pod; empty for others.
    pub pod_uid: String,
    /// Start of validity, RFC 3339 in UTC.
    pub not_before: String,
    /// End of validity, RFC 3339 in UTC.
    pub not_after: String,
    /// Serial number of the CA certificate that signed.
    pub issuer_serial: Serial,
}

/// Why an entry could not be written or the log not be opened.
#[derive(Debug, thiserror::Error)]
#[error("issuance log {path}: cannot {what}: {source}; nothing is issued until this is mended")]
pub struct LogError {
    /// The file.
    pub path: PathBuf,
    /// What was tried.
    pub what: &'static str,
    /// What the system said.
    pub source: io::Error,
}

/// Where entries go.
pub trait IssuanceLog: Send + Sync {
    /// Records an entry, or fails, in which case the certificate is not handed out.
    ///
    /// # Errors
    /// [`LogError`].
    fn append(&self, entry: &Entry) -> Result<(), LogError>;
}

/// When an entry counts as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// When the disk has it.
    #[default]
    EachEntry,
    /// When the kernel has it.
    ByKernel,
}

/// The log in a file, opened for appending only.
#[derive(Debug)]
pub struct FileLog {
    path: PathBuf,
    sync: Durability,
    limit: Option<u64>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    /// Bytes in it.
    length: u64,
    /// The last line may lack its end: a write failed half-way, or the process died in one.
    torn: bool,
}

impl FileLog {
    /// Opens `path` for appending, made with mode 0600 when it does not exist.
    ///
    /// # Errors
    /// [`LogError`] when it cannot be opened.
    pub fn open(path: &Path, sync: Durability) -> Result<Self, LogError> {
        let state = State::open(path)?;
        Ok(Self { path: path.to_owned(), sync, limit: None, state: Mutex::new(state) })
    }

    /// Begins a new file before this one has more than `bytes`; one file of before is kept.
    #[must_use]
    pub fn limited_to(mut self, bytes: u64) -> Self {
        self.limit = Some(bytes);
        self
    }

    /// Goes on in a new file.
    fn turn_over(&self, state: &mut State) -> Result<(), LogError> {
        let error = |what| move |source| LogError { path: self.path.clone(), what, source };
        let own = state.file.metadata().map_err(error("look at it"))?;
        let named = std::fs::metadata(&self.path).map_err(error("look at it"))?;
        // Another opening of the same log may have done it.
        if (own.dev(), own.ino()) == (named.dev(), named.ino()) {
            std::fs::rename(&self.path, former(&self.path)).map_err(error("rename it"))?;
        }
        *state = State::open(&self.path)?;
        if self.sync == Durability::EachEntry
            && let Some(folder) = self.path.parent()
        {
            File::open(folder).and_then(|f| f.sync_all()).map_err(error("sync its directory"))?;
        }
        Ok(())
    }
}

impl State {
    fn open(path: &Path) -> Result<Self, LogError> {
        let error = |what| move |source| LogError { path: path.to_owned(), what, source };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(error("open it for appending"))?;
        let torn = ends_torn(&mut file).map_err(error("read its end"))?;
        let length = file.metadata().map_err(error("look at it"))?.len();
        Ok(Self { file, length, torn })
    }
}

/// Where the entries of before are.
fn former(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".1");
    path.with_file_name(name)
}

fn ends_torn(file: &mut File) -> io::Result<bool> {
    if !file.metadata()?.is_file() || file.metadata()?.len() == 0 {
        return Ok(false);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last[0] != b'\n')
}

impl IssuanceLog for FileLog {
    fn append(&self, entry: &Entry) -> Result<(), LogError> {
        let error = |what| move |source| LogError { path: self.path.clone(), what, source };
        let mut line =
            serde_json::to_vec(entry).map_err(io::Error::from).map_err(error("encode an entry"))?;
        line.push(b'\n');
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let after = state.length + line.len() as u64;
        if state.length > 0 && self.limit.is_some_and(|limit| after > limit) {
            self.turn_over(&mut state)?;
        }
        if state.torn {
            // The torn line stays as evidence; it must not swallow this one.
            line.insert(0, b'\n');
        }
        // One write for the whole line: with O_APPEND it lands in one piece even beside another writer.
        state.torn = true;
        state.file.write_all(&line).map_err(error("append"))?;
        state.torn = false;
        state.length += line.len() as u64;
        if self.sync == Durability::EachEntry {
            state.file.sync_data().map_err(error("sync to the disk"))?;
        }
        Ok(())
    }
}

/// The log in memory, for tests and tools that issue certificates for themselves.
#[derive(Debug, Default)]
pub struct MemoryLog(Mutex<Vec<Entry>>);

impl MemoryLog {
    /// What was recorded.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl IssuanceLog for MemoryLog {
    fn append(&self, entry: &Entry) -> Result<(), LogError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(entry.clone());
        Ok(())
    }
}

impl<L: IssuanceLog + ?Sized> IssuanceLog for std::sync::Arc<L> {
    fn append(&self, entry: &Entry) -> Result<(), LogError> {
        (**self).append(entry)
    }
}

/// Reads a log. A line that is no entry (torn by a crash) comes as its number, from 1, and the reason.
///
/// # Errors
/// When the file cannot be opened.
pub fn read(path: &Path) -> io::Result<impl Iterator<Item = Result<Entry, (usize, String)>> + use<>> {
    let lines = BufReader::new(File::open(path)?).split(b'\n');
    Ok(lines.enumerate().map(|(index, line)| {
        let line = line.map_err(|e| (index + 1, e.to_string()))?;
        serde_json::from_slice(&line).map_err(|e| (index + 1, e.to_string()))
    }))
}

/// Reads a log with what was before it, the oldest entry first; otherwise as [`read`].
///
/// # Errors
/// When one of the files cannot be opened. That nothing was before is no error.
pub fn read_all(path: &Path) -> io::Result<impl Iterator<Item = Result<Entry, (usize, String)>> + use<>> {
    let before = match read(&former(path)) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok(before.into_iter().flatten().chain(read(path)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(uid: &str) -> Entry {
        Entry {
            time: "2026-11-21T08:00:00Z".into(),
            serial: Serial::random(),
            kind: Kind::Workload,
            san: vec!["URI:spiffe://td/ns/a/sa/b".into()],
            node: "n1".into(),
            pod_uid: uid.into(),
            not_before: "2026-11-21T07:55:00Z".into(),
            not_after: "2026-11-22T08:00:00Z".into(),
            issuer_serial: Serial::random(),
        }
    }

    #[test]
    fn entries_of_two_openings_are_all_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("issued.log");
        let (a, b) = (entry("a"), entry("b"));
        FileLog::open(&path, Durability::EachEntry).unwrap().append(&a).unwrap();
        FileLog::open(&path, Durability::ByKernel).unwrap().append(&b).unwrap();
        assert_eq!(read(&path).unwrap().collect::<Vec<_>>(), [Ok(a), Ok(b)]);
    }

    #[test]
    fn a_line_torn_by_a_crash_does_not_swallow_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("issued.log");
        std::fs::write(&path, b"{\"time\":\"2026").unwrap();
        let next = entry("next");
        FileLog::open(&path, Durability::EachEntry).unwrap().append(&next).unwrap();
        let lines: Vec<_> = read(&path).unwrap().collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].as_ref().unwrap_err().0, 1);
        assert_eq!(lines[1].as_ref(), Ok(&next));
    }

    #[test]
    fn a_limited_log_keeps_the_file_before_and_loses_nothing_of_it_when_opened_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("issued.log");
        let length = serde_json::to_vec(&entry("0")).unwrap().len() as u64 + 1;
        let open = || FileLog::open(&path, Durability::EachEntry).unwrap().limited_to(2 * length);
        let (log, other) = (open(), open());
        let uids = || -> Vec<String> { read_all(&path).unwrap().map(|e| e.unwrap().pod_uid).collect() };
        for uid in ["0", "1", "2"] {
            log.append(&entry(uid)).unwrap();
        }
        assert_eq!(uids(), ["0", "1", "2"]);
        assert_eq!(read(&path).unwrap().count(), 1);
        // Still at what is the former file now.
        for uid in ["3", "4", "5"] {
            other.append(&entry(uid)).unwrap();
        }
        assert_eq!(uids(), ["0", "1", "3", "4", "2", "5"]);
        for uid in ["6", "7"] {
            log.append(&entry(uid)).unwrap();
        }
        assert_eq!(uids(), ["2", "5", "6", "7"]);
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let log = FileLog::open(Path::new("/dev/full"), Durability::EachEntry).unwrap();
        let error = log.append(&entry("a")).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().contains("/dev/full"), "{error}");
    }

    #[test]
    fn a_log_that_cannot_be_opened_says_where() {
        let error = FileLog::open(Path::new("/nonexistent/issued.log"), Durability::EachEntry).unwrap_err();
        assert!(
            error.to_string().starts_with("issuance log /nonexistent/issued.log: cannot open"),
            "{error}"
        );
    }
}
