//! Whether bytes between applications and the worker skip TCP on this node: asked of the kernel once, at the start. New
//! connections of every pod follow; what is fast already stays so.

use redirect_bpf::{Acceleration, Arrivals, Directions, Redirect, Verdict};

use crate::config::AccelerationMode;

/// What was decided at the start.
#[derive(Debug, Clone)]
pub(super) struct Decision {
    /// What is on for pods.
    pub(super) directions: Directions,
    /// Each direction and its state, `on...` or `off: <reason>`, for a person.
    pub(super) states: [(&'static str, String); 2],
}

pub(super) fn decide(mode: AccelerationMode, redirect: &mut Redirect) -> Decision {
    match mode {
        AccelerationMode::Off => everywhere(Directions::NONE, "off: node.acceleration is off"),
        AccelerationMode::Auto => by_self_test(redirect.accelerate()),
        AccelerationMode::Forced => match redirect.load_acceleration(Arrivals::Untouched) {
            Ok(()) => {
                tracing::warn!("acceleration is forced: applications may see what the self-test looks for");
                everywhere(Directions::BOTH, "on, forced without the self-test")
            }
            Err(error) => everywhere(Directions::NONE, &format!("off: {error}")),
        },
    }
}

fn by_self_test(found: Acceleration) -> Decision {
    let directions = found.directions();
    let state = |verdict| match verdict {
        Verdict::On => "on".to_owned(),
        Verdict::Off(why) => format!("off: {why}"),
    };
    Decision {
        directions,
        states: [
            ("application_to_worker", state(found.to_worker)),
            ("worker_to_application", state(found.to_application)),
        ],
    }
}

fn everywhere(directions: Directions, state: &str) -> Decision {
    Decision {
        directions,
        states: [("application_to_worker", state.to_owned()), ("worker_to_application", state.to_owned())],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directions_that_passed_are_switched_on() {
        let decision = by_self_test(Acceleration {
            to_worker: Verdict::On,
            to_application: Verdict::Off("FIONREAD: it tells 0".to_owned()),
        });
        assert_eq!(decision.directions, Directions { to_worker: true, to_application: false });
        let states: Vec<&str> = decision.states.iter().map(|(_, state)| state.as_str()).collect();
        assert_eq!(states, ["on", "off: FIONREAD: it tells 0"]);
    }
}
