//! Reading a packet capture: TCP streams put together far enough to search what they carried.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};

/// Ethernet (LINKTYPE_ETHERNET, tcpdump.org/linktypes.html).
const ETHERNET: u32 = 1;

/// One direction of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Flow {
    pub(crate) source: IpAddr,
    pub(crate) source_port: u16,
    pub(crate) destination: IpAddr,
    pub(crate) destination_port: u16,
}

/// What crossed a link.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    /// Payload of each TCP flow.
    flows: BTreeMap<Flow, Segments>,
    /// Whole packets that are not TCP.
    others: Vec<Vec<u8>>,
    /// Number of packets.
    pub(crate) packets: usize,
    /// Packets of which the capture holds only a part.
    pub(crate) cut: usize,
}

#[derive(Debug, Default)]
struct Segments {
    /// Highest byte seen so far, to unfold sequence numbers that wrap around.
    newest: Option<u64>,
    parts: Vec<(u64, Vec<u8>)>,
}

impl Segments {
    fn add(&mut self, sequence: u32, payload: &[u8]) {
        // 32 bits are unfolded to the value nearest to the newest one (RFC 9293 section 3.4).
        let newest = self.newest.unwrap_or(1 << 40 | u64::from(sequence));
        let distance = sequence.wrapping_sub(newest as u32).cast_signed();
        let at = newest.wrapping_add_signed(distance.into());
        self.newest = Some(newest.max(at));
        self.parts.push((at, payload.to_vec()));
    }

    /// Runs of bytes without a gap. Where two segments disagree about a byte the first one counts; the second one's bytes
    /// come as a run of their own, so that nothing that crossed the wire stays unseen.
    fn runs(&self) -> Vec<Vec<u8>> {
        let mut order: Vec<&(u64, Vec<u8>)> = self.parts.iter().collect();
        order.sort_by_key(|(at, _)| *at);
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut odd = Vec::new();
        for (at, payload) in order {
            let Some((start, run)) = runs.last_mut() else {
                runs.push((*at, payload.clone()));
                continue;
            };
            let end = *start + run.len() as u64;
            if *at > end {
                runs.push((*at, payload.clone()));
                continue;
            }
            let offset = usize::try_from(*at - *start).unwrap_or(usize::MAX);
            let overlap = (run.len() - offset).min(payload.len());
            if run[offset..offset + overlap] != payload[..overlap] {
                odd.push(payload.clone());
            }
            run.extend_from_slice(&payload[overlap..]);
        }
        runs.into_iter().map(|(_, run)| run).chain(odd).collect()
    }
}

impl Traffic {
    /// Reads a capture file as tcpdump writes it (pcap 2.4, either byte order, micro- or nanoseconds).
    pub(crate) fn parse(file: &[u8]) -> Result<Self> {
        let magic: [u8; 4] = file.get(..4).and_then(|m| m.try_into().ok()).context("the capture is empty")?;
        let big = match magic {
            [0xa1, 0xb2, 0xc3, 0xd4] | [0xa1, 0xb2, 0x3c, 0x4d] => true,
            [0xd4, 0xc3, 0xb2, 0xa1] | [0x4d, 0x3c, 0xb2, 0xa1] => false,
            _ => bail!("not a pcap file: it begins with {magic:02x?}"),
        };
        let number = |at: usize| -> Result<u32> {
            let bytes =
                file.get(at..at + 4).and_then(|b| b.try_into().ok()).context("the capture is cut off")?;
            Ok(if big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
        };
        // The upper bits may hold the length of the frame check sequence.
        let link = number(20)? & 0x0fff_ffff;
        if link != ETHERNET {
            bail!("the capture's link type is {link}, not Ethernet");
        }
        let mut traffic = Self::default();
        let mut at = 24;
        while at < file.len() {
            let (kept, whole) = (number(at + 8)? as usize, number(at + 12)? as usize);
            let frame =
                file.get(at + 16..at + 16 + kept).context("the capture ends in the middle of a packet")?;
            traffic.packets += 1;
            traffic.cut += usize::from(kept < whole);
            traffic.frame(frame);
            at += 16 + kept;
        }
        Ok(traffic)
    }

    fn frame(&mut self, frame: &[u8]) {
        match tcp(frame) {
            Some((flow, sequence, payload)) => {
                if !payload.is_empty() {
                    self.flows.entry(flow).or_default().add(sequence, payload);
                }
            }
            None => self.others.push(frame.to_vec()),
        }
    }

    /// How often `text` occurs, in TCP streams, across the borders of segments too, and in whatever else there was.
    pub(crate) fn occurrences(&self, text: &[u8]) -> usize {
        let find = |bytes: &[u8]| memchr::memmem::find_iter(bytes, text).count();
        let in_streams: usize = self.flows.values().flat_map(Segments::runs).map(|run| find(&run)).sum();
        in_streams + self.others.iter().map(|packet| find(packet)).sum::<usize>()
    }

    /// Source and destination of each packet that is IP and not TCP.
    pub(crate) fn not_tcp(&self) -> impl Iterator<Item = (IpAddr, IpAddr)> {
        self.others.iter().filter_map(|frame| addresses(frame))
    }

    /// TCP flows with the number of distinct bytes that each carried.
    pub(crate) fn flows(&self) -> impl Iterator<Item = (Flow, usize)> {
        self.flows.iter().map(|(flow, segments)| (*flow, segments.runs().iter().map(Vec::len).sum()))
    }
}

/// Source and destination of an Ethernet frame with IP in it.
fn addresses(frame: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let packet = frame.get(14..)?;
    let v4 = |at: usize| -> Option<[u8; 4]> { packet.get(at..at + 4)?.try_into().ok() };
    let v6 = |at: usize| -> Option<[u8; 16]> { packet.get(at..at + 16)?.try_into().ok() };
    match frame.get(12..14)? {
        [0x08, 0x00] => Some((v4(12)?.into(), v4(16)?.into())),
        [0x86, 0xdd] => Some((v6(8)?.into(), v6(24)?.into())),
        _ => None,
    }
}

/// The flow, sequence number and payload of an Ethernet frame with TCP in it, `None` for everything else.
fn tcp(frame: &[u8]) -> Option<(Flow, u32, &[u8])> {
    let packet = frame.get(14..)?;
    let (source, destination, segment): (IpAddr, IpAddr, &[u8]) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let length = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
            // Fragments are searched as they are.
            let fragment = u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?) & 0x3fff;
            if *packet.get(9)? != 6 || fragment != 0 {
                return None;
            }
            // A length of 0 is a packet that segmentation offload made longer than the field can tell.
            let end = if length == 0 { packet.len() } else { length.min(packet.len()) };
            let address = |at: usize| -> Option<[u8; 4]> { packet.get(at..at + 4)?.try_into().ok() };
            (address(12)?.into(), address(16)?.into(), packet.get(header..end)?)
        }
        [0x86, 0xdd] => {
            if *packet.get(6)? != 6 {
                return None;
            }
            let length = usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?));
            let end = if length == 0 { packet.len() } else { (40 + length).min(packet.len()) };
            let address = |at: usize| -> Option<[u8; 16]> { packet.get(at..at + 16)?.try_into().ok() };
            (address(8)?.into(), address(24)?.into(), packet.get(40..end)?)
        }
        _ => return None,
    };
    let port =
        |at: usize| -> Option<u16> { Some(u16::from_be_bytes(segment.get(at..at + 2)?.try_into().ok()?)) };
    let sequence = u32::from_be_bytes(segment.get(4..8)?.try_into().ok()?);
    let header = usize::from(segment.get(12)? >> 4) * 4;
    let flow = Flow { source, source_port: port(0)?, destination, destination_port: port(2)? };
    Some((flow, sequence, segment.get(header..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00]);
        let total = u16::try_from(40 + payload.len()).unwrap();
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x1f, 0x90, 0x00, 0x50]);
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    fn capture(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut file = vec![0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0];
        file.extend([0; 8]);
        file.extend(262_144_u32.to_le_bytes());
        file.extend(ETHERNET.to_le_bytes());
        for frame in frames {
            file.extend([0; 8]);
            let length = u32::try_from(frame.len()).unwrap().to_le_bytes();
            file.extend(length);
            file.extend(length);
            file.extend(frame);
        }
        file
    }

    fn count(frames: &[Vec<u8>]) -> usize {
        Traffic::parse(&capture(frames)).unwrap().occurrences(b"canary-1")
    }

    #[test]
    fn text_across_two_segments_is_found() {
        assert_eq!(count(&[segment(100, b"xx cana"), segment(107, b"ry-1 yy")]), 1);
    }

    #[test]
    fn segments_out_of_order_are_put_in_order() {
        assert_eq!(count(&[segment(107, b"ry-1 yy"), segment(100, b"xx cana")]), 1);
    }

    #[test]
    fn a_retransmission_is_not_counted_twice() {
        assert_eq!(
            count(&[segment(100, b"canary-1"), segment(100, b"canary-1"), segment(108, b"canary-1")]),
            2
        );
    }

    #[test]
    fn a_retransmission_with_other_bytes_does_not_hide_text() {
        assert_eq!(count(&[segment(100, b"nothing!"), segment(100, b"canary-1")]), 1);
    }

    #[test]
    fn a_lost_segment_does_not_join_its_neighbours() {
        assert_eq!(count(&[segment(100, b"cana"), segment(110, b"ry-1")]), 0);
    }

    #[test]
    fn sequence_numbers_may_wrap_around() {
        assert_eq!(count(&[segment(u32::MAX - 2, b"cana"), segment(1, b"ry-1")]), 1);
        assert_eq!(count(&[segment(1, b"ry-1"), segment(u32::MAX - 2, b"cana")]), 1);
    }

    #[test]
    fn text_in_a_packet_that_is_not_tcp_is_found() {
        let mut frame = segment(100, b"canary-1");
        frame[23] = 17;
        assert_eq!(count(&[frame]), 1);
    }

    #[test]
    fn a_capture_cut_off_in_a_packet_is_an_error() {
        let mut file = capture(&[segment(100, b"canary-1")]);
        file.pop();
        assert!(Traffic::parse(&file).is_err());
        assert!(Traffic::parse(b"").is_err());
        assert!(Traffic::parse(b"\x0a\x0d\x0d\x0a1234").is_err());
    }
}
