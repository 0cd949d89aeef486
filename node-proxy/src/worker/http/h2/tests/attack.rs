//! Clients that mean harm, frame by frame. Each loses its own connection and nothing else.

use std::future::poll_fn;

use ::h2::Reason as Code;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

const SETTINGS: u8 = 4;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A client without manners.
struct Raw {
    io: DuplexStream,
    unread: Vec<u8>,
}

/// A frame that came back.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Frame {
    /// The code of a GOAWAY or RST_STREAM.
    fn code(&self) -> Code {
        let code = if self.kind == 7 { &self.payload[4..8] } else { &self.payload[..4] };
        u32::from_be_bytes(code.try_into().unwrap()).into()
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// HPACK without compression or indexing (RFC 7541 §6.2.2).
fn hpack(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            assert!(text.len() < 127, "one length byte");
            block.push(text.len() as u8);
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

const GET: &[(&str, &str)] =
    &[(":method", "GET"), (":scheme", "http"), (":authority", "web.test"), (":path", "/")];
const POST: &[(&str, &str)] =
    &[(":method", "POST"), (":scheme", "http"), (":authority", "web.test"), (":path", "/")];
/// Has no idle timeout of its own.
const GRPC: &[(&str, &str)] = &[
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "web.test"),
    (":path", "/s/m"),
    ("content-type", "application/grpc"),
];

impl Raw {
    /// Sends preface and SETTINGS.
    async fn new(io: DuplexStream, settings: &[u8]) -> Self {
        let mut raw = Self { io, unread: Vec::new() };
        raw.io.write_all(PREFACE).await.unwrap();
        raw.send(&frame(SETTINGS, 0, 0, settings)).await;
        raw
    }

    /// Writes as long as the other side takes it.
    async fn send(&mut self, bytes: &[u8]) -> bool {
        self.io.write_all(bytes).await.is_ok()
    }

    async fn headers(&mut self, stream: u32, end: bool, fields: &[(&str, &str)]) -> bool {
        let flags = END_HEADERS | if end { END_STREAM } else { 0 };
        self.send(&frame(1, flags, stream, &hpack(fields))).await
    }

    /// The next frame; `None` at the end of the connection.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some((head, rest)) = self.unread.split_first_chunk::<9>() {
                let len = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
                if rest.len() >= len {
                    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                    let frame =
                        Frame { kind: head[3], flags: head[4], stream, payload: rest[..len].to_vec() };
                    self.unread.drain(..9 + len);
                    return Some(frame);
                }
            }
            if self.io.read_buf(&mut self.unread).await.ok()? == 0 {
                return None;
            }
        }
    }

    /// The next frame of a stream or GOAWAY, whatever else comes before.
    async fn next_of(&mut self, kinds: &[u8]) -> Option<Frame> {
        loop {
            let frame = self.next().await?;
            if kinds.contains(&frame.kind) {
                return Some(frame);
            }
        }
    }
}

/// Sends `bytes` again and again, reading what comes back, until the connection ends; gives the last GOAWAY's code.
async fn flood(mut raw: Raw, mut next: impl FnMut(u32) -> Vec<u8> + 'static) -> Option<Code> {
    let Raw { io, unread } = &mut raw;
    let (mut reader, mut writer) = tokio::io::split(std::mem::replace(io, tokio::io::duplex(1).0));
    let mut received = std::mem::take(unread);
    let writing = tokio::task::spawn_local(async move {
        let mut round = 0;
        // Bounded, so that a defence that does nothing fails the test instead of hanging it.
        while round < 200_000 && writer.write_all(&next(round)).await.is_ok() {
            round += 1;
        }
        round < 200_000
    });
    while reader.read_buf(&mut received).await.is_ok_and(|count| count > 0) {}
    assert!(writing.await.unwrap(), "the flood ended before the connection");
    let mut last = Raw { io: tokio::io::duplex(1).0, unread: received };
    let mut code = None;
    loop {
        if last.unread.len() < 9 {
            return code;
        }
        let len = usize::from(last.unread[1]) << 8 | usize::from(last.unread[2]);
        if last.unread.len() < 9 + len {
            return code;
        }
        let frame = last.next().await?;
        if frame.kind == 7 {
            code = Some(frame.code());
        }
    }
}

/// A script with an upstream that answers GET and leaves anything else without an answer, its body unread.
async fn patient_upstream() -> Rc<Script> {
    let script = Script::new();
    upstream(&script, |request, mut response| async move {
        if request.method() == "GET" {
            response.send_response(ok(), true).unwrap();
        } else {
            let (_parts, _body) = request.into_parts();
            let _ = poll_fn(|cx| response.poll_reset(cx)).await;
        }
    })
    .await;
    script
}

/// Runs an attack beside a client that only wants its answers. Their upstream connections differ as their identities
/// do: what one does to its upstream's patience is no other's loss.
fn attack(
    settings: &'static [u8],
    open: &'static [(bool, &'static [(&'static str, &'static str)])],
    next: impl FnMut(u32) -> Vec<u8> + 'static,
    expected: Code,
) {
    on_worker(async move {
        let script = patient_upstream().await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut honest = client(near).await;
        let script = patient_upstream().await;
        let (near, end) = proxy(&script, HttpLimits::default());
        let mut raw = Raw::new(near, settings).await;
        for (number, (end, fields)) in open.iter().enumerate() {
            raw.headers(number as u32 * 2 + 1, *end, fields).await;
        }
        assert_eq!(flood(raw, next).await, Some(expected));
        assert!(matches!(end.await.unwrap(), ConnectionEnd::Flooded | ConnectionEnd::Failed(_)));
        let (response, _) = honest.send_request(get("/"), true).unwrap();
        assert_eq!(response.await.unwrap().status(), 200);
    });
}

#[test]
fn a_rapid_reset_is_cut() {
    attack(
        &[],
        &[],
        |round| {
            let stream = round * 2 + 1;
            let mut bytes = frame(1, END_HEADERS | END_STREAM, stream, &hpack(GET));
            bytes.extend(frame(3, 0, stream, &[0, 0, 0, 8]));
            bytes
        },
        Code::ENHANCE_YOUR_CALM,
    );
}

#[test]
fn a_continuation_flood_is_cut() {
    attack(
        &[],
        &[],
        |round| match round {
            0 => frame(1, 0, 1, &hpack(GET)),
            _ => frame(9, 0, 1, &hpack(&[("x-filler", "y")])),
        },
        Code::ENHANCE_YOUR_CALM,
    );
}

#[test]
fn a_settings_flood_is_cut() {
    attack(&[], &[], |_| frame(SETTINGS, 0, 0, &[]), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn a_ping_flood_is_cut() {
    attack(&[], &[], |_| frame(6, 0, 0, &[0; 8]), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn a_priority_flood_is_cut() {
    attack(&[], &[], |_| frame(2, 0, 1, &[0, 0, 0, 0, 1]), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn a_window_update_flood_is_cut() {
    attack(&[], &[(false, POST)], |_| frame(8, 0, 1, &[0, 0, 0, 1]), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn small_data_frames_that_nobody_reads_are_cut() {
    // One-byte frames over twenty streams, against an upstream that does not read.
    attack(&[], &[(false, POST); 20], |round| frame(0, 0, round % 20 * 2 + 1, &[1]), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn empty_data_frames_are_cut() {
    attack(&[], &[(false, POST)], |_| frame(0, 0, 1, &[]), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn server_made_resets_are_cut() {
    // A WINDOW_UPDATE of zero makes h2 reset the stream (CVE-2025-8671).
    attack(
        &[],
        &[],
        |round| {
            let stream = round * 2 + 1;
            let mut bytes = frame(1, END_HEADERS, stream, &hpack(POST));
            bytes.extend(frame(8, 0, stream, &[0x7f, 0xff, 0xff, 0xff]));
            bytes
        },
        Code::ENHANCE_YOUR_CALM,
    );
}

#[test]
fn an_honest_stream_of_small_tokens_lives() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, echo).await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, mut body) = client.send_request(grpc("/llm/Chat"), false).unwrap();
        let mut response = response.await.unwrap();
        for token in 0..20_000_u32 {
            body.send_data(Bytes::copy_from_slice(&token.to_be_bytes()), false).unwrap();
            if token % 50 == 49 {
                let mut bytes = 0;
                while bytes < 200 {
                    let piece = response.body_mut().data().await.unwrap().unwrap();
                    bytes += piece.len();
                    response.body_mut().flow_control().release_capacity(piece.len()).unwrap();
                }
            }
        }
        body.send_data(Bytes::new(), true).unwrap();
        assert!(read(response.body_mut()).await.unwrap().0.is_empty());
        assert!(script.ended(1).await[0].reasons.is_empty());
    });
}

#[test]
fn a_client_that_cancels_as_many_as_it_lets_finish_lives() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, |request, mut response| async move {
            if request.uri().path() == "/hang" {
                let _ = poll_fn(|cx| response.poll_reset(cx)).await;
            } else {
                response.send_response(ok(), true).unwrap();
            }
        })
        .await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        for _ in 0..1000 {
            client = client.ready().await.unwrap();
            let (_hang, mut stream) = client.send_request(get("/hang"), true).unwrap();
            let (response, _) = client.send_request(get("/"), true).unwrap();
            assert_eq!(response.await.unwrap().status(), 200);
            stream.send_reset(Code::CANCEL);
        }
    });
}

#[test]
fn windows_that_stay_shut_hold_little_and_end_with_the_idle_time() {
    on_worker(async {
        const SIZE: usize = 4 << 20;
        let script = Script::new();
        let sent = Rc::new(Cell::new(0));
        let counter = Rc::clone(&sent);
        upstream(&script, move |_, mut response| {
            let sent = Rc::clone(&counter);
            async move {
                let mut out = response.send_response(ok(), false).unwrap();
                for _ in 0..SIZE / 16384 {
                    if send_all(&mut out, Bytes::from_static(&[7; 16384]), false).await.is_err() {
                        return;
                    }
                    sent.set(sent.get() + 16384);
                }
            }
        })
        .await;
        let limits = HttpLimits { stream_idle: Some(Duration::from_millis(100)), ..HttpLimits::default() };
        let (near, _end) = proxy(&script, limits);
        // SETTINGS_INITIAL_WINDOW_SIZE 0.
        let mut raw = Raw::new(near, &[0, 4, 0, 0, 0, 0]).await;
        for stream in 0..20 {
            raw.headers(stream * 2 + 1, true, GET).await;
        }
        for _ in 0..20 {
            let reset = raw.next_of(&[3, 7]).await.unwrap();
            assert_eq!((reset.kind, reset.code()), (3, Code::CANCEL));
        }
        // The upstream's connection window, 1 MiB, and what it had queued: not 20 times 4 MiB.
        assert!(sent.get() <= (1 << 20) + 20 * (64 << 10), "{}", sent.get());
        for outcome in script.ended(20).await {
            assert!(outcome.reasons.has(Reason::StreamIdleTimeout));
        }
    });
}

#[test]
fn a_window_of_one_byte_is_filled_and_waited_for() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, |_, mut response| async move {
            let mut out = response.send_response(ok(), false).unwrap();
            send_all(&mut out, Bytes::from_static(b"answer"), true).await.unwrap();
        })
        .await;
        let (near, _end) = proxy(&script, HttpLimits::default());
        let mut raw = Raw::new(near, &[]).await;
        raw.send(&frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 1])).await;
        raw.headers(1, true, GET).await;
        let mut answer = Vec::new();
        loop {
            let data = raw.next_of(&[0, 3, 7]).await.expect("the connection lives");
            assert_eq!(data.kind, 0, "{data:?}");
            assert!(data.payload.len() <= 1);
            answer.extend_from_slice(&data.payload);
            if data.flags & END_STREAM != 0 {
                break;
            }
            raw.send(&frame(8, 0, 1, &[0, 0, 0, 1])).await;
        }
        assert_eq!(answer, b"answer");
    });
}

#[test]
fn a_client_that_does_not_read_its_socket_pins_no_more_than_the_connection_bound() {
    on_worker(async {
        let script = Script::new();
        let sent = Rc::new(Cell::new(0));
        let counter = Rc::clone(&sent);
        upstream(&script, move |_, mut response| {
            let sent = Rc::clone(&counter);
            async move {
                let mut out = response.send_response(ok(), false).unwrap();
                while send_all(&mut out, Bytes::from_static(&[7; 16384]), false).await.is_ok() {
                    sent.set(sent.get() + 16384);
                }
            }
        })
        .await;
        let limits = HttpLimits { stream_idle: Some(Duration::from_millis(200)), ..HttpLimits::default() };
        let (near, end) = proxy(&script, limits);
        // Windows as wide as they go, and then not one byte is read.
        let mut raw = Raw::new(near, &[0, 4, 0x7f, 0xff, 0xff, 0xff]).await;
        raw.send(&frame(8, 0, 0, &[0x7f, 0, 0, 0])).await;
        for stream in 0..50 {
            raw.headers(stream * 2 + 1, true, GRPC).await;
        }
        assert!(matches!(end.await.unwrap(), ConnectionEnd::Stalled));
        // What waits for the client, the window of the upstream's connection, and what is in the sockets.
        assert!(sent.get() <= buffered::MAX_PER_CONNECTION + (1 << 20) + (768 << 10), "{}", sent.get());
    });
}

/// What a request with these fields is answered with: a status, or the code of a reset or GOAWAY.
async fn answer(raw: &mut Raw, stream: u32, fields: &[(&str, &str)]) -> Result<(), Code> {
    raw.headers(stream, true, fields).await;
    let frame = raw.next_of(&[1, 3, 7]).await.unwrap();
    if frame.kind == 1 { Ok(()) } else { Err(frame.code()) }
}

#[test]
fn heads_that_two_readers_could_take_differently_never_reach_the_upstream() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, echo).await;
        let base = |extra: &[(&'static str, &'static str)]| {
            let mut fields = GET.to_vec();
            fields.extend_from_slice(extra);
            fields
        };
        let with = |name: &'static str, value: &'static str| {
            let mut fields = GET.to_vec();
            fields.iter_mut().filter(|field| field.0 == name).for_each(|field| field.1 = value);
            fields
        };
        let cases: Vec<Vec<(&str, &str)>> = vec![
            base(&[("connection", "close")]),
            base(&[("transfer-encoding", "chunked")]),
            base(&[("upgrade", "h2c")]),
            base(&[("keep-alive", "1")]),
            base(&[("te", "gzip")]),
            base(&[("x-value", "a\r\nb: c")]),
            base(&[("x-value", "a\0b")]),
            base(&[("x-value", " a")]),
            base(&[("x-value", "a\t")]),
            base(&[("X-Upper", "a")]),
            base(&[("x name", "a")]),
            base(&[("x-first", "1"), (":path", "/other")]),
            base(&[(":path", "/other")]),
            base(&[(":status", "200")]),
            base(&[("host", "other.test")]),
            base(&[("host", "web.test"), ("host", "web.test")]),
            base(&[("content-length", "5")]),
            base(&[("content-length", "1"), ("content-length", "2")]),
            base(&[("content-length", "+0")]),
            with(":method", "get"),
            with(":method", "GET / HTTP/1.1\r\n"),
            with(":method", ""),
            with(":path", "no/slash"),
            with(":path", "*"),
            with(":path", ""),
            with(":scheme", "ftp"),
            with(":authority", "user@web.test"),
            with(":authority", ""),
            vec![(":method", "GET"), (":scheme", "http"), (":path", "/")],
            vec![(":method", "GET"), (":authority", "web.test"), (":path", "/")],
            vec![(":method", "GET"), (":scheme", "http"), (":authority", "web.test")],
            vec![(":method", "CONNECT"), (":authority", "web.test:80")],
            vec![
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "http"),
                (":authority", "web.test"),
                (":path", "/"),
            ],
        ];
        for fields in cases {
            let (near, _) = proxy(&script, HttpLimits::default());
            let mut raw = Raw::new(near, &[]).await;
            let _refused = answer(&mut raw, 1, &fields).await;
            assert!(script.seen.borrow().is_empty(), "{fields:?} was let through");
        }
        // And those that look odd but are plain.
        for fields in [
            base(&[("host", "WEB.test"), ("te", "trailers"), ("x_y", "1")]),
            with(":path", "/a%2fb%5c%00//./../;x=y?q=%zz"),
            vec![(":method", "OPTIONS"), (":scheme", "http"), (":authority", "web.test"), (":path", "*")],
            vec![(":method", "GET"), (":scheme", "http"), (":path", "/"), ("host", "web.test")],
        ] {
            let (near, _) = proxy(&script, HttpLimits::default());
            let mut raw = Raw::new(near, &[]).await;
            assert_eq!(answer(&mut raw, 1, &fields).await, Ok(()), "{fields:?}");
            assert_eq!(
                script.seen.borrow_mut().pop().as_deref().map(|line| line.contains("web.test")),
                Some(true)
            );
        }
    });
}

#[test]
fn a_body_that_differs_from_its_length_is_cut_before_it_looks_complete() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, echo).await;
        for (body, expected) in [(&b"12345678"[..], Code::PROTOCOL_ERROR), (&b"1"[..], Code::PROTOCOL_ERROR)]
        {
            let (near, _) = proxy(&script, HttpLimits::default());
            let mut raw = Raw::new(near, &[]).await;
            let mut fields = POST.to_vec();
            fields.push(("content-length", "5"));
            raw.headers(1, false, &fields).await;
            raw.send(&frame(0, END_STREAM, 1, body)).await;
            assert_eq!(raw.next_of(&[3, 7]).await.unwrap().code(), expected);
        }
        for outcome in script.ended(2).await {
            assert!(!outcome.reasons.is_empty());
        }
    });
}

#[test]
fn header_lists_beyond_the_limit_are_refused_and_bombs_are_cut() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, echo).await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut raw = Raw::new(near, &[]).await;
        let mut many = GET.to_vec();
        many.extend([("x-many", "1"); 101]);
        // One too many fields: 431, and the connection lives.
        assert_eq!(answer(&mut raw, 1, &many).await, Ok(()));
        assert!(script.seen.borrow().is_empty());
        assert_eq!(answer(&mut raw, 3, GET).await, Ok(()));

        // A field in the dynamic table, then references to it: 16 KiB that decode to 64 MiB.
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut raw = Raw::new(near, &[]).await;
        let mut block = hpack(GET);
        let value = [b'v'; 126];
        block.extend_from_slice(&[0x40, 6]);
        block.extend_from_slice(b"x-bomb");
        block.push(value.len() as u8);
        block.extend_from_slice(&value);
        block.resize(16000, 0x80 | 62);
        raw.send(&frame(1, END_HEADERS | END_STREAM, 1, &block)).await;
        let cut = raw.next_of(&[1, 3, 7]).await.unwrap();
        assert_eq!((cut.kind, cut.code()), (7, Code::ENHANCE_YOUR_CALM));
        assert_eq!(raw.next().await, None);
    });
}

#[test]
fn a_preface_in_pieces_is_served_and_half_a_preface_times_out() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, echo).await;
        let (mut near, _) = proxy(&script, HttpLimits::default());
        for byte in PREFACE {
            near.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        let mut raw = Raw { io: near, unread: Vec::new() };
        raw.send(&frame(SETTINGS, 0, 0, &[])).await;
        assert_eq!(answer(&mut raw, 1, GET).await, Ok(()));

        let limits = HttpLimits { header_timeout: Duration::from_millis(20), ..HttpLimits::default() };
        let (mut near, end) = proxy(&script, limits);
        near.write_all(&PREFACE[..10]).await.unwrap();
        assert!(matches!(end.await.unwrap(), ConnectionEnd::HandshakeTimeout));
    });
}

#[test]
fn uploads_that_nobody_reads_hold_little() {
    on_worker(async {
        let script = patient_upstream().await;
        let limits = HttpLimits { h2_connection_window: 64 << 20, ..HttpLimits::default() };
        // An upstream with wide windows whose socket nobody reads any more.
        let (near, mut far) = tokio::io::duplex(64 << 10);
        let open =
            [&frame(SETTINGS, 0, 0, &[0, 4, 0x7f, 0, 0, 0])[..], &frame(8, 0, 0, &[0x7f, 0, 0, 0])].concat();
        far.write_all(&open).await.unwrap();
        let (handle, connection) = client_handshake(near, &limits).await.unwrap();
        tokio::task::spawn_local(connection);
        script.upstreams.replace([handle].into());
        let (near, _end) = proxy(&script, limits);
        let mut raw = Raw::new(near, &[]).await;
        raw.next_of(&[8]).await.expect("the connection's window is opened first");
        let mut accepted = 0;
        for stream in 0..60 {
            raw.headers(stream * 2 + 1, false, GRPC).await;
        }
        // h2 gives a stream no room before its head was written; from then on nothing is read.
        far.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
        let mut far = Raw { io: far, unread: Vec::new() };
        for _ in 0..60 {
            far.next_of(&[1]).await.unwrap();
        }
        for stream in 0..60 {
            for _ in 0..4 {
                raw.send(&frame(0, 0, stream * 2 + 1, &[1; 16000])).await;
            }
        }
        // Every window that was given back belongs to bytes that were queued towards the upstream. All that comes is
        // there once nothing came for a while.
        let quiet = Duration::from_millis(300);
        while let Ok(frame) = tokio::time::timeout(quiet, raw.next_of(&[1, 3, 7, 8])).await {
            let frame = frame.expect("the connection lives");
            assert_eq!(frame.kind, 8, "{frame:?}");
            if frame.stream != 0 {
                accepted += u32::from_be_bytes(frame.payload.try_into().unwrap()) as usize;
            }
        }
        assert!(accepted > 0);
        assert!(accepted <= buffered::MAX_PER_CONNECTION + (256 << 10), "{accepted}");
    });
}
