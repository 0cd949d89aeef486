//! What the kernel says about CPU time and memory.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

/// Clock ticks of /proc/stat and /proc/<pid>/stat per second: USER_HZ, which is 100 on every architecture that Linux's
/// user space knows today (include/asm-generic/param.h).
const TICKS_PER_SECOND: u64 = 100;

/// CPU time that all threads of these processes have used so far.
///
/// /proc/<pid>/task/<tid>/schedstat has nanoseconds; where the kernel was built without it, /proc/<pid>/stat has
/// hundredths of a second. A process that has ended counts nothing.
///
/// # Errors
/// When /proc does not have what it has on Linux.
pub fn cpu_time(pids: &[i32]) -> Result<Duration> {
    let mut sum = Duration::ZERO;
    for pid in pids {
        sum += match threads_time(*pid)? {
            Some(time) => time,
            None => process_time(*pid)?,
        };
    }
    Ok(sum)
}

fn threads_time(pid: i32) -> Result<Option<Duration>> {
    let dir = format!("/proc/{pid}/task");
    let Ok(entries) = fs::read_dir(&dir) else { return Ok(Some(Duration::ZERO)) };
    if !Path::new("/proc/self/schedstat").exists() {
        return Ok(None);
    }
    let mut nanos = 0;
    for entry in entries {
        let file = entry.with_context(|| format!("cannot read {dir}"))?.path().join("schedstat");
        // A thread may end between the two looks.
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let first = text.split_whitespace().next().and_then(|w| w.parse::<u64>().ok());
        nanos += first.with_context(|| format!("{} holds {text:?}", file.display()))?;
    }
    Ok(Some(Duration::from_nanos(nanos)))
}

/// CPU time that a process has used so far, with that of threads that have ended, in steps of 10 ms.
///
/// # Errors
/// When /proc does not have what it has on Linux.
pub fn process_time(pid: i32) -> Result<Duration> {
    let file = format!("/proc/{pid}/stat");
    let Ok(text) = fs::read_to_string(&file) else { return Ok(Duration::ZERO) };
    let ticks = user_and_system_ticks(&text).with_context(|| format!("{file} holds {text:?}"))?;
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

/// Fields 14 and 15 of /proc/<pid>/stat (proc(5)); the command in parentheses may hold anything, so count from its end.
fn user_and_system_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// Most files that a process started from here may open: this process's hard limit, which even root may lack the right
/// to raise.
///
/// # Errors
/// When /proc/self/limits does not have what it has on Linux.
pub fn most_open_files() -> Result<u32> {
    let text = fs::read_to_string("/proc/self/limits").context("cannot read /proc/self/limits")?;
    let line = text.lines().find_map(|l| l.strip_prefix("Max open files"));
    let hard =
        line.and_then(|l| l.split_whitespace().nth(1)).context("/proc/self/limits has no open files")?;
    hard.parse().with_context(|| format!("/proc/self/limits says {hard:?} open files"))
}

/// The machine's CPU time at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    at: Instant,
    cpus: u32,
    /// Idle, waiting for a disk, or given to another guest by the hypervisor.
    not_ours: Duration,
    softirq: Duration,
}

impl Machine {
    /// Reads /proc/stat.
    ///
    /// # Errors
    /// When it does not have what it has on Linux.
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let at = Instant::now();
        let cpus = text.lines().filter(|l| l.starts_with("cpu") && !l.starts_with("cpu ")).count();
        let fields: Vec<u64> = text
            .lines()
            .find_map(|l| l.strip_prefix("cpu "))
            .map(|l| l.split_whitespace().filter_map(|w| w.parse().ok()).collect())
            .unwrap_or_default();
        // proc(5): user nice system idle iowait irq softirq steal
        let [_, _, _, idle, iowait, _, softirq, steal, ..] = fields[..] else {
            anyhow::bail!("/proc/stat has no line \"cpu\" with eight numbers");
        };
        let time = |ticks: u64| Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND);
        Ok(Self {
            at,
            cpus: u32::try_from(cpus).context("too many CPUs")?,
            not_ours: time(idle + iowait + steal),
            softirq: time(softirq),
        })
    }

    /// CPU time that was not idle since `before`, whoever used it. Softirqs and kernel threads are in it.
    pub fn busy_since(&self, before: &Self) -> Duration {
        let all = self.at.duration_since(before.at) * self.cpus;
        all.saturating_sub(self.not_ours.saturating_sub(before.not_ours))
    }

    /// CPU time in softirqs since `before`, as far as the kernel's clock tick saw it.
    pub fn softirq_since(&self, before: &Self) -> Duration {
        self.softirq.saturating_sub(before.softirq)
    }
}

/// Memory of a group of processes in bytes.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Memory {
    /// Resident pages; those that processes share count for each.
    pub rss: u64,
    /// Resident pages; those that n processes share count an n-th for each.
    pub pss: u64,
}

impl Memory {
    /// Reads /proc/<pid>/smaps_rollup of each.
    ///
    /// # Errors
    /// When a process has ended or may not be looked at.
    pub fn of(pids: &[i32]) -> Result<Self> {
        let mut sum = Self::default();
        for pid in pids {
            let file = format!("/proc/{pid}/smaps_rollup");
            let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
            let kib = |name: &str| {
                let line = text.lines().find_map(|l| l.strip_prefix(name));
                line.and_then(|l| l.trim().strip_suffix("kB"))
                    .and_then(|n| n.trim().parse::<u64>().ok())
                    .with_context(|| format!("{file} has no {name}"))
            };
            sum.rss += kib("Rss:")? * 1024;
            sum.pss += kib("Pss:")? * 1024;
        }
        Ok(sum)
    }

    /// What came on top of `before`.
    pub fn above(self, before: Self) -> Self {
        Self { rss: self.rss.saturating_sub(before.rss), pss: self.pss.saturating_sub(before.pss) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Machine, Memory, cpu_time, process_time, user_and_system_ticks};

    fn own_pid() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    #[test]
    fn a_command_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let stat = "7 (a ) b 1 2) S 1 7 7 0 -1 4194560 100 0 0 0 31 11 0 0 20 0 1 0 5 6 7";
        assert_eq!(user_and_system_ticks(stat), Some(42));
    }

    #[test]
    fn work_of_this_process_shows_as_its_cpu_time_and_the_machines() {
        let (before, machine) = (cpu_time(&[own_pid()]).unwrap(), Machine::now().unwrap());
        let start = Instant::now();
        while cpu_time(&[own_pid()]).unwrap() < before + Duration::from_millis(50) {
            assert!(start.elapsed() < Duration::from_secs(60), "50 ms of work do not show");
        }
        // Ticks of 10 ms at either end.
        assert!(Machine::now().unwrap().busy_since(&machine) >= Duration::from_millis(25));
        assert!(process_time(own_pid()).unwrap() >= Duration::from_millis(30));
    }

    #[test]
    fn memory_that_was_written_to_is_resident() {
        let before = Memory::of(&[own_pid()]).unwrap();
        // An optimiser that saw that nobody reads them would not write them.
        let pages = std::hint::black_box(vec![1_u8; 32 << 20]);
        let grown = Memory::of(&[own_pid()]).unwrap().above(before);
        assert!(grown.rss >= 30 << 20 && grown.pss >= 30 << 20, "{grown:?}");
        drop(std::hint::black_box(pages));
    }
}
