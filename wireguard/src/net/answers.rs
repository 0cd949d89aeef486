//! The kernel's answers to one request: all of them, or why not. What is left out of a list would be taken for absent, and
//! made again or taken away.

use std::io;

use rtnetlink::packet_core::{NLM_F_DUMP_INTR, NetlinkMessage, NetlinkPayload};

/// How the kernel concludes its answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conclusion {
    /// A list ends with a message that says so.
    List,
    /// What was done is acknowledged.
    Acknowledgement,
    /// One answer is all.
    Answer,
}

/// Why there is no full answer.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The kernel refuses, or cannot go on with its list.
    Kernel(io::Error),
    /// What is listed changed in between, so that the list may lack something or have it twice; the next one may be whole.
    Interrupted,
    /// The answers end before their conclusion: the connection broke, or some were lost.
    Cut,
}

/// The answers so far.
#[derive(Debug)]
pub(crate) struct Answers<T> {
    expected: Conclusion,
    messages: Vec<T>,
    interrupted: bool,
    concluded: bool,
}

impl<T> Answers<T> {
    pub(crate) fn new(expected: Conclusion) -> Self {
        Self { expected, messages: Vec::new(), interrupted: false, concluded: false }
    }

    /// Takes the next.
    pub(crate) fn take(&mut self, answer: NetlinkMessage<T>) -> Result<(), Fault> {
        self.interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
        match answer.payload {
            NetlinkPayload::InnerMessage(message) => {
                self.messages.push(message);
                self.concluded |= self.expected == Conclusion::Answer;
            }
            NetlinkPayload::Error(error) => match error.code {
                Some(_) => return Err(Fault::Kernel(error.to_io())),
                None => self.concluded |= self.expected == Conclusion::Acknowledgement,
            },
            // The kernel says with the end of a list what kept it from going on (netlink(7), netlink_dump_done).
            NetlinkPayload::Done(done) if done.code < 0 => {
                return Err(Fault::Kernel(io::Error::from_raw_os_error(done.code.saturating_neg())));
            }
            NetlinkPayload::Done(_) => self.concluded |= self.expected == Conclusion::List,
            NetlinkPayload::Overrun(_) => return Err(Fault::Cut),
            _ => {}
        }
        Ok(())
    }

    /// All of them, when there are no more.
    pub(crate) fn finish(self) -> Result<Vec<T>, Fault> {
        match (self.concluded, self.interrupted) {
            (false, _) => Err(Fault::Cut),
            (true, true) => Err(Fault::Interrupted),
            (true, false) => Ok(self.messages),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use rtnetlink::packet_core::{
        Emitable, NLM_F_MULTIPART, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader,
    };
    use rtnetlink::packet_route::RouteNetlinkMessage;

    use super::*;
    use crate::net::messages::{self, Devices};
    use crate::net::netlink::Link;
    use crate::net::plan::{Action, Family, Match, Route, Rule, Target};
    use crate::net::settings::Settings;

    type Message = NetlinkMessage<RouteNetlinkMessage>;

    /// A message of this type as the kernel writes it.
    fn bytes(message_type: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = (16 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend(message_type.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        bytes
    }

    fn written(message: RouteNetlinkMessage) -> Vec<u8> {
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        message.header.flags = NLM_F_MULTIPART;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    fn settings() -> Settings {
        Settings::default()
    }

    fn devices() -> Devices {
        Devices { names: [(7, "sockmesh_wg".to_owned())].into() }
    }

    fn a_rule() -> Rule {
        let matches = Match { from: Some("10.1.0.0/24".parse().unwrap()), ..Match::default() };
        Rule { family: Family::V4, priority: 15_873, matches, action: Action::Table(15_871) }
    }

    fn a_route() -> Route {
        let name = "sockmesh_wg".to_owned();
        let target = Target::Device { name, mtu: 1300, locked: true, advmss: Some(1240), source: None };
        Route { table: 15_871, destination: "fd92::/64".parse().unwrap(), metric: 100, target }
    }

    /// A rule, a route and an end, as they come in one datagram.
    fn datagrams() -> [Vec<u8>; 3] {
        let route = messages::of_route(&devices(), &a_route()).unwrap();
        [
            written(RouteNetlinkMessage::NewRule(messages::of_rule(&a_rule()))),
            written(RouteNetlinkMessage::NewRoute(route)),
            bytes(NLMSG_DONE, NLM_F_MULTIPART, &0_i32.to_ne_bytes()),
        ]
    }

    /// What is read of a datagram, as the connection reads it: as far as it makes sense.
    fn read(mut datagram: &[u8]) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Ok(buffer) = NetlinkBuffer::new_checked(&datagram) {
            let (message, rest) = datagram.split_at(buffer.length() as usize);
            messages.extend(Message::deserialize(message));
            datagram = rest;
        }
        messages
    }

    fn answers(expected: Conclusion, datagrams: &[&[u8]]) -> Result<Vec<RouteNetlinkMessage>, Fault> {
        let mut answers = Answers::new(expected);
        datagrams.iter().flat_map(|datagram| read(datagram)).try_for_each(|m| answers.take(m))?;
        answers.finish()
    }

    fn rules_and_routes(messages: &[RouteNetlinkMessage]) -> (Vec<Rule>, Vec<Route>) {
        let (mut rules, mut routes) = (Vec::new(), Vec::new());
        for message in messages {
            match message {
                RouteNetlinkMessage::NewRule(rule) => rules.extend(messages::to_rule(&settings(), rule)),
                RouteNetlinkMessage::NewRoute(route) => {
                    routes.extend(messages::to_route(&settings(), &devices(), route));
                }
                RouteNetlinkMessage::NewLink(link) => drop(Link::read(link)),
                _ => {}
            }
        }
        (rules, routes)
    }

    #[test]
    fn a_list_that_ends_as_it_should_is_what_was_written() {
        let [rule, route, done] = datagrams();
        let whole = [rule.clone(), route.clone(), done.clone()].concat();
        let found = answers(Conclusion::List, &[&whole]).unwrap();
        assert_eq!(rules_and_routes(&found), (vec![a_rule()], vec![a_route()]));
        let found = answers(Conclusion::List, &[&rule, &route, &done]).unwrap();
        assert_eq!(found.len(), 2, "in datagrams of their own");
        let bare = bytes(NLMSG_DONE, NLM_F_MULTIPART, &[]);
        assert!(answers(Conclusion::List, &[&rule, &bare]).is_ok(), "the kernel may leave the code out");
    }

    #[test]
    fn a_list_that_changed_meanwhile_or_was_broken_off_is_no_list() {
        let [rule, route, done] = datagrams();
        for interrupted in [&rule, &done] {
            let mut changed = interrupted.clone();
            changed[6] |= NLM_F_DUMP_INTR as u8;
            let changed = if interrupted == &rule { [&changed[..], &done] } else { [&route[..], &changed] };
            assert!(matches!(answers(Conclusion::List, &changed), Err(Fault::Interrupted)));
        }
        let failed = bytes(NLMSG_DONE, NLM_F_MULTIPART, &(-nix::libc::ENOBUFS).to_ne_bytes());
        let Err(Fault::Kernel(error)) = answers(Conclusion::List, &[&rule, &failed]) else {
            panic!("the end says that it failed")
        };
        assert_eq!(error.raw_os_error(), Some(nix::libc::ENOBUFS));
        assert!(matches!(answers(Conclusion::List, &[&rule, &route]), Err(Fault::Cut)));
        assert!(matches!(answers(Conclusion::List, &[]), Err(Fault::Cut)));
    }

    #[test]
    fn what_is_to_be_done_is_done_only_when_the_kernel_says_so() {
        let error = |code: i32| bytes(NLMSG_ERROR, 0, &[&code.to_ne_bytes()[..], &[0; 16]].concat());
        assert!(answers(Conclusion::Acknowledgement, &[&error(0)]).is_ok());
        assert!(matches!(answers(Conclusion::Acknowledgement, &[]), Err(Fault::Cut)));
        let Err(Fault::Kernel(refused)) = answers(Conclusion::Acknowledgement, &[&error(-nix::libc::EPERM)])
        else {
            panic!("it was refused")
        };
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_message_cut_anywhere_or_with_any_length_is_read_as_another_or_not_at_all() {
        let [rule, route, done] = datagrams();
        let whole = [rule, route, done].concat();
        for cut in 0..whole.len() {
            let found = answers(Conclusion::List, &[&whole[..cut]]);
            assert!(matches!(found, Err(Fault::Cut)), "cut at {cut} of {}", whole.len());
        }
        // Every pair of bytes, which covers each length field, as nothing, as too little and as much too much.
        for at in 0..whole.len() - 1 {
            for length in [0_u16, 1, 3, 0x7fff, u16::MAX] {
                let mut hostile = whole.clone();
                hostile[at..at + 2].copy_from_slice(&length.to_ne_bytes());
                if let Ok(found) = answers(Conclusion::List, &[&hostile]) {
                    rules_and_routes(&found);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_or_left(
            noise in vec(any::<u8>(), 0..200),
            message_type in prop_oneof![Just(16_u16), Just(20), Just(24), Just(32), any::<u16>()],
            flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        ) {
            let mut whole = datagrams().concat();
            for (at, to) in flips {
                let at = at.index(whole.len());
                whole[at] = to;
            }
            for datagram in [noise.clone(), bytes(message_type, 0, &noise), whole] {
                if let Ok(found) = answers(Conclusion::List, &[&datagram]) {
                    rules_and_routes(&found);
                }
            }
        }
    }
}
