//! Time: repeated handshakes, new sessions after two minutes, keepalives, the end of sessions. Only pairs that have said
//! or heard something are visited; with none, the thread sleeps, unless sessions are wanted with all nodes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Device;

/// How often pairs are visited. The protocol's times are whole seconds.
const PERIOD: Duration = Duration::from_millis(250);
/// How often is looked whether there are the sessions that are wanted.
const WANT_EVERY: Duration = Duration::from_secs(1);

/// Runs until the device stops.
pub(super) fn run(device: &Device) {
    let mut wanted = Instant::now();
    loop {
        let is_eager = || device.eager.load(Ordering::SeqCst);
        let mut pairs = {
            let mut active = device.active.lock();
            while active.is_empty() && !is_eager() && !device.stop.load(Ordering::SeqCst) {
                device.changed.wait(&mut active);
            }
            if device.stop.load(Ordering::SeqCst) {
                return;
            }
            // Woken early only by pairs that are new, of which the next round is soon enough.
            device.changed.wait_for(&mut active, PERIOD);
            if device.stop.load(Ordering::SeqCst) {
                return;
            }
            active.clone()
        };
        pairs.retain(|pair| !pair.tick(device));
        if is_eager() && wanted.elapsed() >= WANT_EVERY {
            wanted = Instant::now();
            device.want_sessions();
        }
        if !pairs.is_empty() {
            device.active.lock().retain(|pair| pair.active.load(Ordering::Relaxed));
        }
    }
}
