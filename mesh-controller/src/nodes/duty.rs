//! Which replica writes the object of a node. Pure but for the clock.

use std::time::Duration;

use crate::xds::nodes::NodeStatus;

/// A stream that is gone for less than this is not told of: agents are replaced, certificates renewed.
const STREAM_GRACE: Duration = Duration::from_secs(5);

/// Who writes the object of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Duty {
    /// This replica, which has the node's stream.
    Has,
    /// This replica, which had it last or is the leader; unless the object changed meanwhile.
    Lost,
    /// Somebody else, or nobody yet.
    None,
}

/// What decides about a [`Duty`].
pub(super) struct Claim<'a> {
    /// Name of this replica.
    pub(super) replica: &'a str,
    /// What the node said in this replica's streams, if there were any.
    pub(super) said: Option<&'a NodeStatus>,
    /// The replica that the object names, if there is an object; none in it while it has no status.
    pub(super) named: Option<Option<&'a str>>,
    /// Whether the named replica is another one that lives.
    pub(super) named_lives: bool,
    /// Whether the object says that the named replica has the node's stream.
    pub(super) named_has: bool,
    /// The leader, and in office for long enough.
    pub(super) leads: bool,
    /// Whether this replica has been running for as long.
    pub(super) settled: bool,
    /// Whether there is an agent's pod on the node.
    pub(super) has_agent: bool,
}

impl Claim<'_> {
    /// Whose turn it is.
    pub(super) fn duty(&self) -> Duty {
        if let Some(said) = self.said.filter(|said| said.streams > 0) {
            // Of a node that went elsewhere the stream here may be dead for a while before that shows.
            let other = self.named.flatten().is_some_and(|named| named != self.replica);
            let went = said.elsewhere && other && self.named_lives && self.named_has;
            return if went { Duty::None } else { Duty::Has };
        }
        // Who took its tunnel back first does not come back soon, and other replicas are to hear of it.
        let comes_back = self.said.filter(|said| !said.took_back());
        let left_lately = comes_back.and_then(|s| s.left).is_some_and(|left| left.elapsed() < STREAM_GRACE);
        match self.named {
            _ if left_lately => Duty::None,
            Some(Some(named)) if named == self.replica => {
                // A replica that was started anew under its name waits for its nodes to come back.
                if self.said.is_some() || self.settled { Duty::Lost } else { Duty::None }
            }
            Some(Some(_)) if self.leads && !self.named_lives => Duty::Lost,
            Some(None) if self.leads => Duty::Lost,
            None if self.leads && self.has_agent => Duty::Lost,
            _ => Duty::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn claim<'a>(said: Option<&'a NodeStatus>, named: Option<Option<&'a str>>) -> Claim<'a> {
        Claim {
            replica: "one",
            said,
            named,
            named_lives: true,
            named_has: true,
            leads: false,
            settled: false,
            has_agent: true,
        }
    }

    fn left(ago: Duration) -> NodeStatus {
        NodeStatus { left: Instant::now().checked_sub(ago), ..NodeStatus::default() }
    }

    #[test]
    fn the_replica_with_the_stream_writes_whatever_the_object_says() {
        let said = NodeStatus { streams: 1, ..NodeStatus::default() };
        for named in [None, Some(None), Some(Some("one")), Some(Some("two"))] {
            assert_eq!(claim(Some(&said), named).duty(), Duty::Has);
        }
    }

    #[test]
    fn a_replica_whose_stream_is_dead_leaves_the_object_to_the_one_where_the_node_is() {
        let said = NodeStatus { streams: 1, elsewhere: true, ..NodeStatus::default() };
        let there = || claim(Some(&said), Some(Some("two")));
        assert_eq!(there().duty(), Duty::None);
        assert_eq!(Claim { named_has: false, ..there() }.duty(), Duty::Has, "the other one lost it again");
        assert_eq!(Claim { named_lives: false, ..there() }.duty(), Duty::Has);
        assert_eq!(claim(Some(&said), Some(Some("one"))).duty(), Duty::Has);
    }

    #[test]
    fn a_replica_that_lost_a_stream_says_so_after_a_while_unless_another_has_it() {
        let (lately, long_ago) = (left(Duration::from_secs(1)), left(Duration::from_secs(60)));
        assert_eq!(claim(Some(&lately), Some(Some("one"))).duty(), Duty::None);
        assert_eq!(claim(Some(&long_ago), Some(Some("one"))).duty(), Duty::Lost);
        assert_eq!(claim(Some(&long_ago), Some(Some("two"))).duty(), Duty::None);
        let for_good = NodeStatus { tunnel_keys: Some(Vec::new()), ..lately.clone() };
        assert_eq!(claim(Some(&for_good), Some(Some("one"))).duty(), Duty::Lost, "its tunnel is gone");
        assert_eq!(claim(Some(&for_good), Some(Some("two"))).duty(), Duty::None);
        let anew = || claim(None, Some(Some("one")));
        assert_eq!(anew().duty(), Duty::None, "it was started anew, and its nodes may come back");
        assert_eq!(Claim { settled: true, ..anew() }.duty(), Duty::Lost, "they did not");
    }

    #[test]
    fn the_leader_speaks_for_nodes_that_no_living_replica_has() {
        let leader = |named, named_lives| Claim { leads: true, named_lives, ..claim(None, named) };
        assert_eq!(leader(Some(Some("two")), true).duty(), Duty::None);
        assert_eq!(leader(Some(Some("two")), false).duty(), Duty::Lost);
        assert_eq!(leader(Some(None), false).duty(), Duty::Lost);
        assert_eq!(leader(None, false).duty(), Duty::Lost, "its agent never connected");
        assert_eq!(Claim { has_agent: false, ..leader(None, false) }.duty(), Duty::None);
    }
}
