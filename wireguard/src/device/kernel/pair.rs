//! Which UDP ports an own key has.

/// Two of the four ports: those of one own key. The other two are the next key's in a rotation, or another tunnel's of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pair {
    /// The first and the second.
    First,
    /// The third and the fourth.
    Second,
}

impl Pair {
    /// That of a key for which nobody has chosen one.
    pub fn usual(own_generation: u64) -> Self {
        if own_generation.is_multiple_of(2) { Self::First } else { Self::Second }
    }

    /// A pair that none of these ports is of: the usual one if it can be; None where both are in use. `first` is
    /// [`super::Settings::port`].
    pub fn free(first: u16, own_generation: u64, used: &[u16]) -> Option<Self> {
        let usual = Self::usual(own_generation);
        let other = if usual == Self::First { Self::Second } else { Self::First };
        let is_free = |pair: &Self| !pair.ports(first).iter().any(|port| used.contains(port));
        [usual, other].into_iter().find(is_free)
    }

    /// Its ports: for senders whose own generation is even, and odd. `first` is [`super::Settings::port`].
    pub fn ports(self, first: u16) -> [u16; 2] {
        let lower = first + if self == Self::First { 0 } else { 2 };
        [lower, lower + 1]
    }

    /// That of which this port is.
    pub(super) fn of(first: u16, port: u16) -> Option<Self> {
        [Self::First, Self::Second].into_iter().find(|pair| pair.ports(first).contains(&port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_a_pair_of_ports_that_nobody_has_whatever_its_generation() {
        assert_eq!(Pair::free(100, 6, &[]), Some(Pair::First));
        assert_eq!(Pair::free(100, 7, &[]), Some(Pair::Second));
        assert_eq!(Pair::free(100, 6, &[101]), Some(Pair::Second), "somebody has one of 100 and 101");
        assert_eq!(Pair::free(100, 7, &[102]), Some(Pair::First));
        assert_eq!(Pair::free(100, 7, &[100, 103]), None);
    }

    #[test]
    fn a_pair_is_known_by_either_of_its_ports() {
        for pair in [Pair::First, Pair::Second] {
            assert_eq!(pair.ports(100).map(|port| Pair::of(100, port)), [Some(pair); 2]);
        }
        assert_eq!([99, 104].map(|port| Pair::of(100, port)), [None; 2]);
    }
}
