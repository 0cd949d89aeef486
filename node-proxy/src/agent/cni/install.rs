//! Putting the plugin into the node's chain: its program into the directory of plugins, its entry into the configuration
//! that the container runtime uses, which is the first one by name.
//!
//! Every file is replaced by renaming, so the runtime never reads half of one. A single plugin's file (`X.conf`) is
//! replaced by a chain (`X.conflist`) and kept beside it under a name that the runtime does not read.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::chain::{self, PLUGIN};
use super::{Chained, knowledge_file};
use crate::config::{CniSettings, NodeConfig, NodeSettings};

/// Suffix of a file that a chain has replaced.
const SAVED: &str = ".sockmesh-saved";
/// Prefix of files that are being written; the runtime reads no such suffix as they have.
const WRITING: &str = ".sockmesh-new";

pub(super) fn about(what: &str, path: &Path, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("cannot {what} {}: {e}", path.display()))
}

fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(WRITING);
    let temporary = path.with_file_name(name);
    let write = || {
        fs::write(&temporary, bytes)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(mode))?;
        fs::File::open(&temporary)?.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| about("write", path, &e))
}

/// The configurations that the runtime reads, in its order.
fn configurations(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| about("list", dir, &e))? {
        let path = entry.map_err(|e| about("list", dir, &e))?.path();
        let read = path.extension().is_some_and(|e| e == "conf" || e == "conflist" || e == "json");
        if read && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn to_text(configuration: &Value) -> Vec<u8> {
    format!("{configuration:#}\n").into_bytes()
}

/// What is to be done to a directory of configurations.
#[derive(Debug)]
enum Change {
    /// Write a file as a whole.
    Write { path: PathBuf, text: Vec<u8>, mode: u32 },
    /// Take a single plugin's file out of the runtime's sight: a chain stands in for it.
    SetAside(PathBuf),
}

impl Change {
    fn make(self) -> io::Result<()> {
        match self {
            Self::Write { path, text, mode } => replace(&path, &text, mode),
            Self::SetAside(path) => {
                fs::rename(&path, saved(&path)).map_err(|e| about("set aside", &path, &e))
            }
        }
    }
}

/// What it takes to have `entry` at the end of the first configuration that can be chained to, and nowhere else. Changes
/// nothing.
fn plan(dir: &Path, entry: &Value) -> io::Result<(Chained, Vec<Change>)> {
    let mut problems = Vec::new();
    let mut changes = Vec::new();
    let mut chained = None;
    for path in configurations(dir)? {
        let text = fs::read(&path).map_err(|e| about("read", &path, &e))?;
        let mode = mode(&path)?;
        if chained.is_some() {
            if let Some(without) = chain::without(&text, entry["socket"].as_str().map(Path::new)) {
                changes.push(Change::Write { path, text: to_text(&without), mode });
            }
            continue;
        }
        match chain::with(&text, entry) {
            Ok(None) => chained = Some(path),
            Ok(Some(configuration)) => {
                let is_list =
                    serde_json::from_slice::<Value>(&text).is_ok_and(|v| v.get("plugins").is_some());
                let target = if is_list { path.clone() } else { path.with_extension("conflist") };
                if !is_list && target.exists() && !names_plugin(&target)? {
                    let failed = format!(
                        "{} is in use and {} stands where its chain would go; remove one of them",
                        path.display(),
                        target.display()
                    );
                    return Ok((Chained::Failed(failed), Vec::new()));
                }
                changes.push(Change::Write { path: target.clone(), text: to_text(&configuration), mode });
                if !is_list {
                    changes.push(Change::SetAside(path));
                }
                chained = Some(target);
            }
            Err(problem) => problems.push(format!("{} {problem}", path.display())),
        }
    }
    let chained = match chained {
        Some(file) => Chained::In(file),
        None if problems.is_empty() => Chained::Nowhere,
        None => Chained::Failed(format!(
            "no configuration in {} can be chained to, and none was changed: {}; correct or remove it",
            dir.display(),
            problems.join("; ")
        )),
    };
    Ok((chained, changes))
}

/// Puts `entry` where [`plan`] has it.
fn put(dir: &Path, entry: &Value) -> io::Result<Chained> {
    let (chained, changes) = plan(dir, entry)?;
    let changed = !changes.is_empty();
    changes.into_iter().try_for_each(Change::make)?;
    if let (Chained::In(file), true) = (&chained, changed) {
        tracing::info!(file = %file.display(), "the CNI plugin is in the chain");
    }
    Ok(chained)
}

fn mode(path: &Path) -> io::Result<u32> {
    Ok(fs::metadata(path).map_err(|e| about("look at", path, &e))?.permissions().mode() & 0o777)
}

/// Where a single plugin's file is kept while a list stands in for it.
fn saved(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SAVED);
    name.into()
}

/// Whether a configuration names the plugin, for whatever agent.
fn names_plugin(path: &Path) -> io::Result<bool> {
    let text = fs::read(path).map_err(|e| about("read", path, &e))?;
    Ok(chain::without(&text, None).is_some())
}

/// Takes the plugin of the agent behind `socket` out of all configurations.
fn take_out(dir: &Path, socket: &Path) -> io::Result<()> {
    for path in configurations(dir)? {
        let text = fs::read(&path).map_err(|e| about("read", &path, &e))?;
        let Some(without) = chain::without(&text, Some(socket)) else { continue };
        let single = ["conf", "json"].map(|e| path.with_extension(e)).into_iter().find(|p| saved(p).exists());
        match single {
            // The network's own installer may have written another one meanwhile, which then is newer.
            Some(single) if single.exists() => {
                let saved = saved(&single);
                fs::remove_file(&saved).map_err(|e| about("remove", &saved, &e))?;
                fs::remove_file(&path).map_err(|e| about("remove", &path, &e))?;
            }
            Some(single) => {
                fs::rename(saved(&single), &single).map_err(|e| about("put back", &single, &e))?;
                fs::remove_file(&path).map_err(|e| about("remove", &path, &e))?;
            }
            None => replace(&path, &to_text(&without), mode(&path)?)?,
        }
    }
    Ok(())
}

/// The plugin's program, unless the same is where it shall be.
fn program_to_copy(settings: &CniSettings) -> io::Result<Option<Vec<u8>>> {
    let own = || std::env::current_exe().map(|exe| exe.with_file_name(PLUGIN));
    let source = settings.program.clone().map_or_else(own, Ok)?;
    let program = fs::read(&source).map_err(|e| about("read the CNI plugin", &source, &e))?;
    let target = settings.bin_dir.join(PLUGIN);
    let executable = |path: &Path| fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o111 == 0o111);
    let there = executable(&target) && fs::read(&target).is_ok_and(|there| there == program);
    Ok((!there).then_some(program))
}

/// The agent's socket as the host sees it, by which an entry in a chain is known to be this agent's.
fn socket(node: &NodeSettings) -> PathBuf {
    node.cni.socket.clone().unwrap_or_else(|| node.run_dir.join("agent.sock"))
}

/// Where the agent notes the socket that its entry names.
fn note(node: &NodeSettings) -> PathBuf {
    node.state_dir.join("cni-socket")
}

/// The plugin's entry in a chain.
fn entry(config: &NodeConfig) -> Value {
    let node = &config.node;
    let timeout = config.processes.enrol_timeout.as_millis();
    json!({
        "type": PLUGIN,
        "socket": socket(node),
        "knowledge": node.cni.knowledge.clone().unwrap_or_else(|| knowledge_file(node)),
        "timeoutMs": u64::try_from(timeout).unwrap_or(u64::MAX),
        "exempt": node.cni.exempt_namespaces,
    })
}

/// Whether the node has something that the plugin could be in.
fn has_network(cni: &CniSettings) -> io::Result<bool> {
    Ok(cni.bin_dir.is_dir() && cni.conf_dir.is_dir() && !configurations(&cni.conf_dir)?.is_empty())
}

/// Has the plugin in the chain.
///
/// # Errors
/// With the path.
pub(super) fn install(config: &NodeConfig) -> io::Result<Chained> {
    let cni = &config.node.cni;
    if !has_network(cni)? {
        return Ok(Chained::Nowhere);
    }
    let (note, socket) = (note(&config.node), socket(&config.node));
    if fs::read(&note).ok().as_deref() != Some(socket.as_os_str().as_bytes()) {
        replace(&note, socket.as_os_str().as_bytes(), 0o600)?;
    }
    // The program first: a chain that names a missing one makes no sandbox at all.
    if let Some(program) = program_to_copy(cni)? {
        replace(&cni.bin_dir.join(PLUGIN), &program, 0o755)?;
    }
    put(&cni.conf_dir, &entry(config))
}

/// Fails where no file can be made: a directory of a file system that is mounted for reading, or of somebody else.
fn writable(dir: &Path) -> io::Result<()> {
    use rustix::fs::{Access, access};
    access(dir, Access::WRITE_OK | Access::EXEC_OK).map_err(|e| about("write in", dir, &e.into()))
}

/// Why the plugin would not come into the chain if this agent had the node, as far as that can be seen without a change.
///
/// # Errors
/// What cannot be read or written.
fn rehearse(config: &NodeConfig) -> io::Result<Option<String>> {
    let node = &config.node;
    let cni = &node.cni;
    if !cni.enabled {
        return Ok(None);
    }
    if !has_network(cni)? {
        // A node without a network of its own has no note, either.
        let note = note(node);
        return Ok(note.exists().then(|| {
            format!(
                "there is no network configuration in {} (node.cni.conf_dir) with plugins in {} (node.cni.bin_dir), and \
                 there was one: correct the setting, or remove {} if the node has no such network any more",
                cni.conf_dir.display(),
                cni.bin_dir.display(),
                note.display()
            )
        }));
    }
    if program_to_copy(cni)?.is_some() {
        writable(&cni.bin_dir)?;
    }
    let (chained, changes) = plan(&cni.conf_dir, &entry(config))?;
    if !changes.is_empty() {
        writable(&cni.conf_dir)?;
    }
    Ok(match chained {
        Chained::Failed(problem) => Some(problem),
        _ => None,
    })
}

/// See [`rehearse`].
pub(in super::super) fn obstacle(config: &NodeConfig) -> Option<String> {
    rehearse(config).unwrap_or_else(|error| Some(error.to_string()))
}

/// Takes this agent's plugin off the node.
///
/// # Errors
/// With the path. The program stays as long as a chain names it.
pub(in super::super) fn remove(node: &NodeSettings) -> io::Result<()> {
    let cni = &node.cni;
    if cni.conf_dir.is_dir() {
        take_out(&cni.conf_dir, &socket(node))?;
        // Who uninstalls may see the host's directories elsewhere than the agent did.
        let note = note(node);
        match fs::read(&note) {
            Ok(noted) => take_out(&cni.conf_dir, Path::new(OsStr::from_bytes(&noted)))?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(about("read", &note, &e)),
        }
        for path in configurations(&cni.conf_dir)? {
            if names_plugin(&path)? {
                return Ok(());
            }
        }
    }
    let program = cni.bin_dir.join(PLUGIN);
    match fs::remove_file(&program) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(about("remove", &program, &e))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Host {
        dir: tempfile::TempDir,
        config: NodeConfig,
    }

    impl Host {
        fn new(files: &[(&str, Value)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().join(name);
            for name in ["bin", "conf", "state"] {
                fs::create_dir(path(name)).unwrap();
            }
            fs::write(path("plugin"), "program").unwrap();
            for (name, value) in files {
                fs::write(path("conf").join(name), value.to_string()).unwrap();
            }
            let mut config = NodeConfig::default();
            config.node.cni.enabled = true;
            config.node.cni.bin_dir = path("bin");
            config.node.cni.conf_dir = path("conf");
            config.node.cni.program = Some(path("plugin"));
            config.node.state_dir = path("state");
            Self { dir, config }
        }

        fn files(&self) -> Vec<(String, Value)> {
            let entries = fs::read_dir(self.dir.path().join("conf")).unwrap();
            let mut files: Vec<_> = entries
                .map(|entry| {
                    let path = entry.unwrap().path();
                    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                    (name, serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
                })
                .collect();
            files.sort_by(|a, b| a.0.cmp(&b.0));
            files
        }

        fn program(&self) -> PathBuf {
            self.dir.path().join("bin").join(PLUGIN)
        }
    }

    fn list(name: &str) -> Value {
        json!({ "cniVersion": "1.0.0", "name": name, "plugins": [{ "type": "ptp" }] })
    }

    fn types(configuration: &Value) -> Vec<&str> {
        configuration["plugins"].as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap()).collect()
    }

    #[test]
    fn the_first_chain_gets_the_plugin_and_gives_it_back() {
        let host = Host::new(&[("10-a.conflist", list("a")), ("20-b.conflist", list("b"))]);
        let before = host.files();
        install(&host.config).unwrap();
        install(&host.config).unwrap();
        let after = host.files();
        assert_eq!(types(&after[0].1), ["ptp", PLUGIN]);
        assert_eq!(after[0].1["plugins"][1]["socket"], "/run/sockmesh/agent.sock");
        assert_eq!(after[1], before[1]);
        assert_eq!(fs::metadata(host.program()).unwrap().permissions().mode() & 0o777, 0o755);
        remove(&host.config.node).unwrap();
        remove(&host.config.node).unwrap();
        assert_eq!(host.files(), before);
        assert!(!host.program().exists());
    }

    #[test]
    fn a_chain_that_comes_to_be_first_is_the_one() {
        let host = Host::new(&[("20-b.conflist", list("b"))]);
        install(&host.config).unwrap();
        fs::write(host.dir.path().join("conf/10-a.conflist"), list("a").to_string()).unwrap();
        install(&host.config).unwrap();
        let files = host.files();
        assert_eq!((types(&files[0].1), types(&files[1].1)), (vec!["ptp", PLUGIN], vec!["ptp"]));
    }

    #[test]
    fn a_single_plugin_is_set_aside_for_a_chain_and_comes_back() {
        let host = Host::new(&[("10-a.conf", json!({ "name": "a", "type": "bridge" }))]);
        let before = host.files();
        install(&host.config).unwrap();
        install(&host.config).unwrap();
        let names: Vec<String> = host.files().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["10-a.conf.sockmesh-saved", "10-a.conflist"]);
        assert_eq!(types(&host.files()[1].1), ["bridge", PLUGIN]);
        remove(&host.config.node).unwrap();
        assert_eq!(host.files(), before);
    }

    #[test]
    fn what_the_networks_own_installer_writes_anew_is_chained_again() {
        let host = Host::new(&[("10-a.conflist", list("a"))]);
        install(&host.config).unwrap();
        fs::write(host.dir.path().join("conf/10-a.conflist"), list("newer").to_string()).unwrap();
        fs::write(host.program(), "something else").unwrap();
        install(&host.config).unwrap();
        assert_eq!(types(&host.files()[0].1), ["ptp", PLUGIN]);
        assert_eq!(host.files()[0].1["name"], "newer");
        assert_eq!(fs::read(host.program()).unwrap(), b"program");
    }

    #[test]
    fn a_configuration_that_cannot_be_understood_is_named_and_left_alone() {
        let host = Host::new(&[("10-a.conflist", json!({ "name": "broken" }))]);
        let before = host.files();
        let Chained::Failed(problem) = install(&host.config).unwrap() else { panic!("it is in no chain") };
        assert!(problem.contains("10-a.conflist is neither a plugin nor a list of plugins"), "{problem}");
        assert!(
            problem.contains("none was changed") && problem.contains("correct or remove it"),
            "{problem}"
        );
        assert_eq!(host.files(), before);
    }

    #[test]
    fn a_list_that_another_network_made_is_not_written_over() {
        let files =
            [("10-a.conf", json!({ "name": "a", "type": "bridge" })), ("10-a.conflist", list("other"))];
        let host = Host::new(&files);
        let before = host.files();
        let Chained::Failed(problem) = install(&host.config).unwrap() else { panic!("it is in no chain") };
        assert!(problem.contains("10-a.conflist stands where its chain would go"), "{problem}");
        assert_eq!(host.files(), before);
    }

    #[test]
    fn a_node_without_cni_is_no_failure() {
        let host = Host::new(&[]);
        assert_eq!(install(&host.config).unwrap(), Chained::Nowhere);
        let mut config = host.config.clone();
        config.node.cni.conf_dir = "/nonexistent/net.d".into();
        config.node.cni.bin_dir = "/nonexistent/bin".into();
        assert_eq!(install(&config).unwrap(), Chained::Nowhere);
        remove(&config.node).unwrap();
    }

    #[test]
    fn a_rehearsal_changes_nothing_and_finds_what_would_fail() {
        let host = Host::new(&[
            ("10-a.conf", json!({ "name": "a", "type": "bridge" })),
            ("20-b.conflist", list("b")),
        ]);
        let before = host.files();
        assert_eq!(obstacle(&host.config), None);
        assert_eq!(host.files(), before);
        assert!(!host.program().exists() && !note(&host.config.node).exists());
        install(&host.config).unwrap();
        assert_eq!(obstacle(&host.config), None);

        let expect = |change: &dyn Fn(&mut CniSettings), problem: &str| {
            let mut config = host.config.clone();
            change(&mut config.node.cni);
            let found = obstacle(&config).unwrap_or_default();
            assert!(found.contains(problem), "{found:?} does not say {problem:?}");
        };
        expect(
            &|cni| cni.program = Some("/nonexistent/plugin".into()),
            "cannot read the CNI plugin /nonexistent",
        );
        expect(&|cni| cni.conf_dir = "/nonexistent/net.d".into(), "/nonexistent/net.d (node.cni.conf_dir)");
        expect(&|cni| cni.bin_dir = "/nonexistent/bin".into(), "/nonexistent/bin (node.cni.bin_dir)");
        let broken = host.dir.path().join("broken");
        fs::create_dir(&broken).unwrap();
        fs::write(broken.join("10-a.conflist"), "{}").unwrap();
        expect(&|cni| cni.conf_dir.clone_from(&broken), "correct or remove it");

        let mut off = host.config.clone();
        off.node.cni.enabled = false;
        off.node.cni.conf_dir = "/nonexistent/net.d".into();
        assert_eq!(obstacle(&off), None);
    }

    /// A file system for reading only, on a temporary directory.
    struct ReadOnly(tempfile::TempDir);

    impl ReadOnly {
        fn new(files: &[(&str, Value)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let mount = |options: &[&str]| {
                let mount = std::process::Command::new("mount").args(options).arg(dir.path()).status();
                assert!(mount.unwrap().success());
            };
            mount(&["-t", "tmpfs", "none"]);
            for (name, value) in files {
                fs::write(dir.path().join(name), value.to_string()).unwrap();
            }
            mount(&["-o", "remount,ro"]);
            Self(dir)
        }
    }

    impl Drop for ReadOnly {
        fn drop(&mut self) {
            assert!(std::process::Command::new("umount").arg(self.0.path()).status().unwrap().success());
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn directories_that_cannot_be_written_are_found_before_the_node_changes_hands() {
        let host = Host::new(&[("10-a.conflist", list("a"))]);
        let (bin, conf) = (ReadOnly::new(&[]), ReadOnly::new(&[("10-a.conflist", list("a"))]));
        for (name, dir) in [("bin", &bin), ("conf", &conf)] {
            let mut config = host.config.clone();
            let path = dir.0.path();
            match name {
                "bin" => config.node.cni.bin_dir = path.to_owned(),
                _ => config.node.cni.conf_dir = path.to_owned(),
            }
            let problem = obstacle(&config).unwrap_or_default();
            assert!(problem.contains(&format!("cannot write in {}", path.display())), "{name}: {problem:?}");
            install(&config).expect_err(name);
        }
    }

    #[test]
    fn who_uninstalls_may_see_the_run_directory_elsewhere() {
        let host = Host::new(&[("10-a.conflist", list("a"))]);
        let before = host.files();
        install(&host.config).unwrap();
        let mut elsewhere = host.config.node.clone();
        elsewhere.run_dir = "/host/run/sockmesh".into();
        remove(&elsewhere).unwrap();
        assert_eq!(host.files(), before);
        assert!(!host.program().exists());
    }

    #[test]
    fn another_agent_takes_nothing_away() {
        let host = Host::new(&[("10-a.conflist", list("a"))]);
        install(&host.config).unwrap();
        let before = host.files();
        let mut other = host.config.node.clone();
        other.run_dir = "/run/other".into();
        other.state_dir = "/nonexistent/other".into();
        remove(&other).unwrap();
        assert_eq!(host.files(), before);
        assert!(host.program().exists(), "the chain names it");
    }
}
