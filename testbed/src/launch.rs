//! Starting programs inside a node or pod: own network namespace, own cgroup, own process group, output to a file.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::{teardown, wait};

/// How long [`Launch::output`] lets a program run unless told.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);
/// How long a program may take to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Enters the cgroup, then becomes the program, so that the pid stays that of the program. Values come as arguments,
/// never as text of the script.
const ENTER: &str = r#"echo 0 > "$1/cgroup.procs" || exit 125
[ -z "$2" ] || cd "$2" || exit 125
ulimit -n "$3" 2>/dev/null || ulimit -n "$(ulimit -Hn)" || exit 125
shift 3
exec "$@""#;

/// Where a program runs.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// File of the network namespace.
    pub(crate) netns: PathBuf,
    /// Directory of the cgroup.
    pub(crate) cgroup: PathBuf,
    /// Directory for output files.
    pub(crate) logs: PathBuf,
    /// Name of the place, for messages and file names.
    pub(crate) name: String,
}

/// A program about to be started.
#[derive(Debug, Clone)]
pub struct Launch {
    place: Place,
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    user: Option<String>,
    dir: Option<PathBuf>,
    stdin: Vec<u8>,
    limit: Duration,
    open_files: u32,
    label: Option<String>,
}

impl Launch {
    pub(crate) fn new(place: Place, program: impl AsRef<OsStr>) -> Self {
        Self {
            place,
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            user: None,
            dir: None,
            stdin: Vec::new(),
            limit: DEFAULT_LIMIT,
            open_files: 20_000,
            label: None,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs as this user and its group instead of root.
    #[must_use]
    pub fn user(mut self, name: &str) -> Self {
        self.user = Some(name.to_owned());
        self
    }

    /// Runs in this directory.
    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = Some(dir.as_ref().to_owned());
        self
    }

    /// Gives it these bytes as standard input (only for [`Launch::output`]).
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// How long [`Launch::output`] lets it run before it is killed; 60 s unless told.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Number of files it may open; 20,000 unless told, and no more than this process may grant.
    #[must_use]
    pub fn open_files(mut self, number: u32) -> Self {
        self.open_files = number;
        self
    }

    /// Name of its output file; the program's name unless told.
    #[must_use]
    pub fn label(mut self, label: &str) -> Self {
        self.label = Some(label.to_owned());
        self
    }

    fn name(&self) -> String {
        let label = self.label.clone().unwrap_or_else(|| {
            Path::new(&self.program)
                .file_name()
                .map_or_else(|| "program".to_owned(), |n| n.to_string_lossy().into_owned())
        });
        format!("{}-{label}", self.place.name)
    }

    fn command(&self, limit: Option<Duration>) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", ENTER, "sh"]).arg(&self.place.cgroup);
        command.arg(self.dir.as_deref().unwrap_or(Path::new("")));
        command.arg(self.open_files.to_string());
        if let Some(limit) = limit {
            command.args(["timeout", "-k", "2"]).arg(format!("{:.3}", limit.as_secs_f64()));
        }
        let mut netns = OsString::from("--net=");
        netns.push(&self.place.netns);
        // Not `ip netns exec`: that also mounts a new /sys, without cgroups and bpffs.
        command.arg("nsenter").arg(netns).arg("--");
        if let Some(user) = &self.user {
            command.args(["setpriv", "--reuid", user, "--regid", user, "--init-groups", "--"]);
        }
        command.arg(&self.program).args(&self.args);
        command.envs(self.env.iter().map(|(k, v)| (k, v))).process_group(0);
        command
    }

    /// Starts it in the background.
    ///
    /// # Errors
    /// When it cannot be started. That the program itself is missing shows in its log.
    pub fn spawn(self) -> Result<Process> {
        let _making = teardown::making()?;
        let name = self.name();
        let (log, file) = self.log_file(&name)?;
        let second = file.try_clone().with_context(|| format!("cannot duplicate {}", log.display()))?;
        let child = self
            .command(None)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(second)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let pid = i32::try_from(child.id()).context("pid out of range")?;
        Ok(Process { name, child, pid, log, launch: self })
    }

    /// A log that nobody wrote yet: a second start of the same program gets a file of its own.
    fn log_file(&self, name: &str) -> Result<(PathBuf, File)> {
        for n in 0..10_000 {
            let file = if n == 0 { format!("{name}.log") } else { format!("{name}.{n}.log") };
            let log = self.place.logs.join(file);
            match File::options().append(true).create_new(true).open(&log) {
                Ok(file) => return Ok((log, file)),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e).with_context(|| format!("cannot make {}", log.display())),
            }
        }
        bail!("{name} was started too often")
    }

    /// Runs it to its end and returns what it wrote.
    ///
    /// # Errors
    /// When it cannot be started. A failure of the program itself is in the answer.
    pub fn output(self) -> Result<Finished> {
        let name = self.name();
        let mut child = {
            let _making = teardown::making()?;
            self.command(Some(self.limit))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .with_context(|| format!("cannot start {name}"))?
        };
        let stdin = child.stdin.take().context("no standard input")?;
        let out = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut stdin = stdin;
                // A program that does not read its input to the end is no failure.
                drop(stdin.write_all(&self.stdin));
            });
            child.wait_with_output()
        })
        .with_context(|| format!("cannot wait for {name}"))?;
        teardown::check_interrupted()?;
        Ok(Finished { name, status: out.status, stdout: out.stdout, stderr: out.stderr })
    }
}

/// What a program that ended had to say.
#[derive(Debug)]
pub struct Finished {
    /// Where it ran and what it was.
    pub name: String,
    /// How it ended. 124 is the exit code when it ran out of time.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// The standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The standard error as text.
    #[must_use]
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The standard output of a program that succeeded.
    ///
    /// # Errors
    /// With what it wrote, if it failed.
    pub fn ok(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.text());
        }
        let how = match (self.status.code(), self.status.signal()) {
            (Some(124), _) => "ran out of time".to_owned(),
            (Some(code), _) => format!("ended with code {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "failed".to_owned(),
        };
        bail!("{} {how}\nstdout: {}\nstderr: {}", self.name, self.text().trim(), self.errors().trim())
    }
}

/// A program that runs in the background. Dropping it kills its process group.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid: i32,
    log: PathBuf,
    launch: Launch,
}

impl Process {
    /// Where it runs and what it is.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id, and that of its process group.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The file with its output.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Its output so far.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn log(&self) -> Result<String> {
        let bytes = fs::read(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether it still runs, `None`, or how it ended.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot ask whether {} runs", self.name))
    }

    fn must_run(&mut self) -> Result<()> {
        if let Some(status) = self.exited()? {
            let log = self.log()?;
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(20)..].join("\n");
            bail!("{} ended too early ({status}); its last lines:\n{tail}", self.name);
        }
        Ok(())
    }

    /// Waits until its output holds `text`.
    ///
    /// # Errors
    /// When it ends before that, or time is up.
    pub fn wait_for_log(&mut self, text: &str, limit: Duration) -> Result<()> {
        let what = format!("{} to write {text:?} to {}", self.name, self.log.display());
        wait::until(&what, limit, || {
            if self.log()?.contains(text) {
                return Ok(Some(()));
            }
            self.must_run()?;
            Ok(None)
        })
    }

    /// Waits until a TCP socket listens on `port` in its network namespace. Looks at /proc, so that no connection is made.
    ///
    /// # Errors
    /// When it ends before that, or time is up.
    pub fn wait_for_port(&mut self, port: u16, limit: Duration) -> Result<()> {
        let what = format!("{} to listen on port {port}", self.name);
        wait::until(&what, limit, || {
            self.must_run()?;
            Ok((self.has_entered()? && listening_ports(self.pid)?.contains(&port)).then_some(()))
        })
    }

    /// Whether it is in its network namespace yet, and not still on the way there.
    fn has_entered(&self) -> Result<bool> {
        let inode = |path: &Path| fs::metadata(path).map(|m| m.ino());
        let place = &self.launch.place.netns;
        let wanted = inode(place).with_context(|| format!("cannot look at {}", place.display()))?;
        Ok(inode(Path::new(&format!("/proc/{}/ns/net", self.pid))).is_ok_and(|i| i == wanted))
    }

    /// Waits until a unix socket or file exists at `path`.
    ///
    /// # Errors
    /// When it ends before that, or time is up.
    pub fn wait_for_file(&mut self, path: &Path, limit: Duration) -> Result<()> {
        let what = format!("{} to make {}", self.name, path.display());
        wait::until(&what, limit, || {
            self.must_run()?;
            Ok(path.exists().then_some(()))
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When time is up.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait::until(&what, limit, || self.exited())
    }

    /// Sends a signal to its process group.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        killpg(Pid::from_raw(self.pid), signal)
            .with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Sends a signal to it and to no other process of its group.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn signal_alone(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid), signal)
            .with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Kills its process group at once and waits for its end.
    ///
    /// # Errors
    /// When it had ended already or does not end.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait(STOP_LIMIT).map(drop)
    }

    /// Asks it to end (SIGTERM) and waits for that.
    ///
    /// # Errors
    /// When it had ended already or does not end.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(STOP_LIMIT)
    }

    /// Starts the same program again, in the same place.
    ///
    /// # Errors
    /// As [`Launch::spawn`].
    pub fn again(&self) -> Result<Self> {
        self.launch.clone().spawn()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already is what was wanted; and what is left of the group, if its leader has ended, goes with the cgroup.
        if matches!(self.child.try_wait(), Ok(None)) {
            drop(self.signal(Signal::SIGKILL));
            drop(self.child.wait());
        }
    }
}

/// TCP ports, v4 and v6, on which sockets listen in the network namespace of a process.
fn listening_ports(pid: i32) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for file in ["tcp", "tcp6"] {
        let path = format!("/proc/{pid}/net/{file}");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // Without IPv6 there is no tcp6; a process that has just ended shows at the next look at it.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => continue,
            Err(e) => return Err(e).with_context(|| format!("cannot read {path}")),
        };
        for line in text.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            // 0A is TCP_LISTEN (include/net/tcp_states.h).
            if let [_, local, _, "0A", ..] = words[..]
                && let Some((_, port)) = local.rsplit_once(':')
                && let Ok(port) = u16::from_str_radix(port, 16)
            {
                ports.push(port);
            }
        }
    }
    Ok(ports)
}
