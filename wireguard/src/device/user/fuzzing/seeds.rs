//! Inputs to begin with: short plays that reach what chance alone would need long for.

use super::super::packet::{Gso, VnetHeader};
use super::super::testing;

/// Steps of [`super::datagrams`], as it reads them.
mod step {
    pub(super) fn begin(link: u8) -> Vec<u8> {
        vec![0, link]
    }
    pub(super) fn seal(link: u8, kind: u8, count: u8, size: u16) -> Vec<u8> {
        let [low, high] = size.to_le_bytes();
        vec![1, link, kind | (count - 1) << 4, low, high]
    }
    /// Of the datagrams kept, counted from the last one back.
    pub(super) fn deliver(back: u8, count: u8, from: u8) -> Vec<u8> {
        vec![2, back, count - 1, from]
    }
    pub(super) fn damaged(back: u8, at: u16, value: u8, signed: bool) -> Vec<u8> {
        let [low, high] = at.to_le_bytes();
        vec![2, back, 0, 8 | u8::from(signed) << 5, low, high, value]
    }
    pub(super) fn raw(bytes: &[u8]) -> Vec<u8> {
        let [low, high] = (bytes.len() as u16).to_le_bytes();
        [&[4, 3, low, high], bytes].concat()
    }
    pub(super) fn packet_out(kind: u8, size: u16) -> Vec<u8> {
        let [low, high] = size.to_le_bytes();
        vec![5, 0, kind, low, high]
    }
    pub(super) fn frame(frame: &[u8]) -> Vec<u8> {
        let [low, high] = (frame.len() as u16).to_le_bytes();
        [&[5, 1, low, high], frame].concat()
    }
    pub(super) fn apply(choice: u8) -> Vec<u8> {
        vec![6, choice]
    }
    pub(super) fn tick() -> Vec<u8> {
        vec![7, 0]
    }
    pub(super) fn renew() -> Vec<u8> {
        vec![7, 1]
    }
    pub(super) fn cookie(which: u8) -> Vec<u8> {
        vec![8, which]
    }
}

/// The link of the newest own key and the newest key of node `a`.
const NEWEST: u8 = 5;

fn play(choice: u8, configuration: u8, steps: &[Vec<u8>]) -> Vec<u8> {
    [&[choice, configuration][..], &steps.concat()].concat()
}

/// For [`super::datagrams`].
#[must_use]
pub fn datagrams() -> Vec<(&'static str, Vec<u8>)> {
    use step::{apply, begin, cookie, damaged, deliver, frame, packet_out, raw, renew, seal, tick};
    let session = || [begin(NEWEST), deliver(0, 1, 0), deliver(0, 1, 0)].concat();
    let ours = || [packet_out(2, 50), deliver(0, 1, 0), deliver(0, 1, 0)].concat();
    let run = run(Gso::Tcp4, &testing::tcp4(&[3000], 9).remove(0), 20, 52, 1000);
    let stranger = |kind: u8, len: usize| {
        let mut bytes = vec![0x5a; len];
        bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
        raw(&bytes)
    };
    vec![
        (
            "peer-begins",
            play(0, 0, &[session(), seal(NEWEST, 0, 8, 1000), deliver(7, 8, 0), packet_out(0, 700)]),
        ),
        ("we-begin", play(0, 0, &[ours(), packet_out(3, 100), seal(NEWEST, 2, 3, 200), deliver(2, 3, 0)])),
        ("run-out", play(0, 0, &[session(), frame(&run)])),
        ("run-waits", play(0, 0, &[frame(&run), deliver(0, 1, 0), deliver(0, 1, 0)])),
        (
            "copies",
            play(
                0,
                0,
                &[session(), seal(NEWEST, 1, 2, 30), deliver(1, 2, 0), deliver(0, 1, 2), deliver(1, 1, 3)],
            ),
        ),
        ("moves", play(0, 0, &[session(), seal(NEWEST, 0, 1, 30), deliver(0, 1, 2), packet_out(0, 30)])),
        (
            "backwards",
            play(
                0,
                0,
                &[session(), seal(NEWEST, 0, 3, 90), deliver(0, 1, 0), deliver(1, 1, 0), deliver(2, 1, 0)],
            ),
        ),
        ("marked", play(0, 0, &[session(), seal(NEWEST, 8, 2, 90), vec![1, 2], deliver(1, 2, 4)])),
        (
            "damaged",
            play(
                0,
                0,
                &[session(), seal(NEWEST, 0, 1, 90), damaged(0, 20, 1, false), damaged(0, 9, 1, false)],
            ),
        ),
        (
            "forged",
            play(
                0,
                0,
                &[begin(NEWEST), damaged(0, 100, 1, true), damaged(0, 50, 1, true), damaged(0, 12, 1, true)],
            ),
        ),
        (
            "spoofed",
            play(0, 0, &[begin(6), deliver(0, 1, 1), deliver(0, 1, 1), seal(6, 0, 1, 50), deliver(0, 1, 1)]),
        ),
        (
            "stranger",
            play(
                0,
                0,
                &[
                    begin(7),
                    deliver(0, 1, 3),
                    stranger(1, 148),
                    stranger(2, 92),
                    stranger(3, 64),
                    stranger(4, 48),
                ],
            ),
        ),
        (
            "under-load",
            play(2, 0, &[begin(NEWEST), deliver(0, 1, 0), begin(NEWEST), deliver(0, 1, 0), deliver(0, 1, 0)]),
        ),
        ("cookie", play(0, 0, &[packet_out(0, 50), cookie(0), deliver(0, 1, 0), renew(), tick()])),
        (
            "rotates",
            play(
                0,
                2,
                &[
                    begin(0),
                    deliver(0, 1, 0),
                    deliver(0, 1, 0),
                    packet_out(0, 9),
                    apply(0),
                    packet_out(0, 9),
                    deliver(0, 1, 0),
                    deliver(0, 1, 0),
                    apply(1),
                    packet_out(0, 9),
                ],
            ),
        ),
        (
            "leaves",
            play(
                0,
                0,
                &[
                    session(),
                    apply(8),
                    packet_out(0, 9),
                    apply(0),
                    deliver(0, 1, 0),
                    packet_out(0, 9),
                    deliver(0, 1, 0),
                ],
            ),
        ),
        ("no-key", play(0, 6, &[packet_out(0, 9), packet_out(1, 9)])),
        (
            "renews",
            play(
                1,
                0,
                &[
                    session(),
                    renew(),
                    deliver(0, 1, 0),
                    deliver(0, 1, 0),
                    seal(NEWEST, 2, 4, 1300),
                    deliver(3, 4, 0),
                ],
            ),
        ),
    ]
}

fn run(gso: Gso, packet: &[u8], transport: u16, headers: u16, size: u16) -> Vec<u8> {
    let header = VnetHeader {
        needs_checksum: true,
        gso,
        header_len: headers,
        gso_size: size,
        csum_start: transport,
        csum_offset: if gso == Gso::Udp { 6 } else { 16 },
        ..VnetHeader::PLAIN
    };
    [&header.bytes()[..], packet].concat()
}

/// For [`super::cut`].
#[must_use]
pub fn cuts() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("tcp4", run(Gso::Tcp4, &testing::tcp4(&[400], 9).remove(0), 20, 52, 150)),
        ("tcp6", run(Gso::Tcp6, &testing::tcp6(&[400], 9).remove(0), 40, 72, 100)),
        ("udp4", run(Gso::Udp, &testing::udp4(&[400]).remove(0), 20, 28, 200)),
        ("udp6", run(Gso::Udp, &testing::udp6(&[400]).remove(0), 40, 48, 199)),
        ("one", run(Gso::None, &testing::udp4(&[40]).remove(0), 20, 28, 0)),
    ]
}

/// For [`super::join`].
#[must_use]
pub fn joins() -> Vec<(&'static str, Vec<u8>)> {
    let packets = |what: u8, size: u16, count: u8| [&[what][..], &size.to_le_bytes(), &[count - 1]].concat();
    let all = |parts: &[Vec<u8>]| [&[1][..], &parts.concat()].concat();
    vec![
        ("streams", all(&[packets(0, 100, 4), packets(0, 100, 3), packets(2, 100, 3), packets(2, 60, 1)])),
        ("datagrams", all(&[packets(4, 300, 8), packets(5, 300, 8), packets(4, 8, 1)])),
        ("refused", all(&[packets(0, 30, 1), packets(7, 0, 1), packets(0, 30, 1), packets(7, 0, 1)])),
        ("changed", all(&[packets(8 | 16, 100, 4), vec![2, 8, 0, 1], packets(8, 100, 3), vec![1, 60, 0, 7]])),
        (
            "short",
            all(&[packets(32, 100, 4), vec![30], packets(32 | 5, 100, 4), vec![77], packets(1, 10, 2)]),
        ),
    ]
}
