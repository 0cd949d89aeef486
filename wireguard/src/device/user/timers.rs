//! Time: repeated handshakes, new sessions after two minutes, keepalives, the end of sessions. Only pairs that have said
//! or heard something are visited; with none, the thread sleeps.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Device;

/// How often pairs are visited. The protocol's times are whole seconds.
const PERIOD: Duration = Duration::from_millis(250);

/// Runs until the device stops.
pub(super) fn run(device: &Device) {
    loop {
        let mut pairs = {
            let mut active = device.active.lock();
            while active.is_empty() && !device.stop.load(Ordering::SeqCst) {
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
        if !pairs.is_empty() {
            device.active.lock().retain(|pair| pair.active.load(Ordering::Relaxed));
        }
    }
}
