//! Parses message heads and trailer sections strictly, line by line as the bytes come.
//!
//! Nothing is copied: a [`Head`] holds offsets into the buffer that the bytes are in, so the caller keeps that buffer's
//! front where it was until it is done with the head. A [`Head`] is reused from message to message; its vectors are the
//! only memory it owns.
//!
//! Errors come in the order of the bytes, whatever the pieces in which these arrive.

use super::buffers::{give_back_fields, lend_fields};
use super::gate::Refusal;
use super::syntax;

/// Room for the fields of most messages, so that the vector is made once.
const USUAL_FIELDS: usize = 16;

/// A range of bytes of the buffer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Span {
    start: u32,
    end: u32,
}

impl Span {
    pub(super) fn new(start: usize, end: usize) -> Self {
        let at = |i: usize| u32::try_from(i).expect("heads are limited to far less than 4 GiB");
        Self { start: at(start), end: at(end) }
    }

    pub(super) fn start(self) -> usize {
        self.start as usize
    }

    pub(super) fn end(self) -> usize {
        self.end as usize
    }

    pub(super) fn of(self, buf: &[u8]) -> &[u8] {
        &buf[self.start()..self.end()]
    }
}

/// Fields that mean something to this hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Connection,
    ContentLength,
    ContentType,
    Expect,
    GrpcStatus,
    MeshReason,
    Host,
    Http2Settings,
    KeepAlive,
    ProxyConnection,
    RetryAfter,
    Te,
    TransferEncoding,
    Upgrade,
    UserAgent,
    XForwardedFor,
    XRequestId,
    Other,
}

impl Kind {
    fn of(name: &[u8]) -> Self {
        let named = |candidates: &[(&[u8], Self)]| {
            candidates
                .iter()
                .find(|(n, _)| name.eq_ignore_ascii_case(n))
                .map_or(Self::Other, |(_, kind)| *kind)
        };
        match name.len() {
            2 => named(&[(b"te", Self::Te)]),
            4 => named(&[(b"host", Self::Host)]),
            6 => named(&[(b"expect", Self::Expect)]),
            7 => named(&[(b"upgrade", Self::Upgrade)]),
            10 => named(&[
                (b"user-agent", Self::UserAgent),
                (b"connection", Self::Connection),
                (b"keep-alive", Self::KeepAlive),
            ]),
            11 => named(&[(b"grpc-status", Self::GrpcStatus), (b"retry-after", Self::RetryAfter)]),
            12 => named(&[(b"content-type", Self::ContentType), (b"x-request-id", Self::XRequestId)]),
            14 => {
                named(&[(b"content-length", Self::ContentLength), (b"http2-settings", Self::Http2Settings)])
            }
            15 => named(&[(b"x-forwarded-for", Self::XForwardedFor)]),
            16 => named(&[(b"proxy-connection", Self::ProxyConnection)]),
            17 => named(&[
                (b"transfer-encoding", Self::TransferEncoding),
                (super::MESH_REASON, Self::MeshReason),
            ]),
            _ => Self::Other,
        }
    }
}

/// One field line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    /// The line with its CRLF.
    pub line: Span,
    pub name: Span,
    /// Without the white space around it.
    pub value: Span,
    pub kind: Kind,
    /// Not to be passed on.
    pub drop: bool,
}

impl Field {
    /// At most one space before the value and nothing after it: what every parser reads alike.
    pub(super) fn plain(&self, buf: &[u8]) -> bool {
        let between = &buf[self.name.end() + 1..self.value.start()];
        matches!(between, b"" | b" ") && self.value.end() + 2 == self.line.end()
    }
}

/// What a head belongs to, which decides its first line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Request,
    Response,
    /// Fields only.
    Trailers,
}

/// Sizes that a head must keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Caps {
    /// Bytes, from the first line to the empty one.
    pub bytes: usize,
    /// Field lines.
    pub fields: usize,
}

/// A head, parsed so far or in full.
#[derive(Debug)]
pub(super) struct Head {
    role: Role,
    caps: Caps,
    /// Where the line begins that is being read.
    line_start: usize,
    /// No line end in the bytes before this.
    scanned: usize,
    first_line_done: bool,
    /// Where the head begins: after an empty line that a client may have sent (RFC 9112 §2.2).
    pub start: usize,
    /// Bytes of the head with the empty line, counted from the front of the buffer.
    pub len: usize,
    /// HTTP/1.1 rather than HTTP/1.0.
    pub v11: bool,
    pub method: Span,
    pub target: Span,
    /// Status of a response.
    pub status: u16,
    pub fields: Vec<Field>,
}

impl Head {
    pub(super) fn new(role: Role, caps: Caps) -> Self {
        Self {
            role,
            caps,
            line_start: 0,
            scanned: 0,
            first_line_done: role == Role::Trailers,
            start: 0,
            len: 0,
            v11: false,
            method: Span::default(),
            target: Span::default(),
            status: 0,
            fields: Vec::new(),
        }
    }

    /// Makes it ready for the next message.
    pub(super) fn reset(&mut self) {
        let mut fields = std::mem::take(&mut self.fields);
        fields.clear();
        *self = Self { fields, ..Self::new(self.role, self.caps) };
    }

    /// Gives the memory back that it holds between messages.
    pub(super) fn release_memory(&mut self) {
        give_back_fields(&mut self.fields);
    }

    /// Reads what came since the last call; true when the head is complete.
    ///
    /// # Errors
    /// What is wrong with the first line that is.
    pub(super) fn advance(&mut self, buf: &[u8]) -> Result<bool, Refusal> {
        let visible = &buf[..buf.len().min(self.caps.bytes)];
        while let Some(at) = memchr::memchr(b'\n', &visible[self.scanned..]) {
            let line_end = self.scanned + at + 1;
            let line = self.line_start..line_end;
            self.line_start = line_end;
            self.scanned = line_end;
            // Before anything else is said of it, as for a first line that has not ended yet: the verdict must not depend
            // on how the bytes came.
            if self.role == Role::Response
                && !self.first_line_done
                && !may_become_status_line(&buf[line.clone()])
            {
                return Err(Refusal::NotHttp);
            }
            let [content @ .., b'\r', b'\n'] = &buf[line.clone()] else {
                return Err(Refusal::BareLf);
            };
            let start = line.start;
            if !self.first_line_done {
                if content.is_empty() && self.role == Role::Request && start == 0 {
                    self.start = line_end;
                    continue;
                }
                match self.role {
                    Role::Request => self.request_line(content, start)?,
                    Role::Response => self.status_line(content)?,
                    Role::Trailers => {}
                }
                self.first_line_done = true;
            } else if content.is_empty() {
                self.len = line_end;
                return Ok(true);
            } else {
                let field = self.field_line(content, start)?;
                if self.fields.capacity() == 0 {
                    self.fields = lend_fields();
                    self.fields.reserve(USUAL_FIELDS);
                }
                self.fields.push(field);
            }
        }
        self.scanned = visible.len();
        if self.role == Role::Response && !self.first_line_done && !may_become_status_line(visible) {
            return Err(Refusal::NotHttp);
        }
        if buf.len() >= self.caps.bytes { Err(Refusal::HeadTooLarge) } else { Ok(false) }
    }

    fn request_line(&mut self, line: &[u8], start: usize) -> Result<(), Refusal> {
        if let Some(refusal) = control_byte(line) {
            return Err(refusal);
        }
        let method_end = memchr::memchr(b' ', line).ok_or(Refusal::RequestLine)?;
        let method = &line[..method_end];
        if !syntax::is_token(method) {
            return Err(Refusal::RequestLine);
        }
        if method.iter().any(u8::is_ascii_lowercase) {
            return Err(Refusal::MethodCase);
        }
        let rest = &line[method_end + 1..];
        let target_len = memchr::memchr(b' ', rest).ok_or(Refusal::RequestLine)?;
        self.v11 = match &rest[target_len + 1..] {
            _ if target_len == 0 => return Err(Refusal::RequestLine),
            b"HTTP/1.1" => true,
            b"HTTP/1.0" => false,
            version if version.contains(&b' ') => return Err(Refusal::RequestLine),
            _ => return Err(Refusal::Version),
        };
        let target = &rest[..target_len];
        match syntax::bad_target_byte(target) {
            None => {}
            Some(b'#') => return Err(Refusal::Fragment),
            Some(_) => return Err(Refusal::TargetByte),
        }
        if std::str::from_utf8(target).is_err() {
            return Err(Refusal::TargetByte);
        }
        self.method = Span::new(start, start + method_end);
        self.target = Span::new(start + method_end + 1, start + method_end + 1 + target_len);
        Ok(())
    }

    fn status_line(&mut self, line: &[u8]) -> Result<(), Refusal> {
        let (version, rest) = line.split_at_checked(8).ok_or(Refusal::NotHttp)?;
        self.v11 = match version {
            b"HTTP/1.1" => true,
            b"HTTP/1.0" => false,
            _ => return Err(Refusal::NotHttp),
        };
        // Servers exist that leave the space before an empty reason out; the status is read the same by everyone.
        let digits = match rest {
            [b' ', a, b, c] | [b' ', a, b, c, b' ', ..] => [*a, *b, *c],
            _ => return Err(Refusal::StatusLine),
        };
        if !digits.iter().all(u8::is_ascii_digit) || digits[0] == b'0' {
            return Err(Refusal::StatusLine);
        }
        if syntax::bad_value_byte(rest).is_some() {
            return Err(control_byte(rest).unwrap_or(Refusal::StatusLine));
        }
        self.status = digits.iter().fold(0, |n, d| n * 10 + u16::from(d - b'0'));
        Ok(())
    }

    fn field_line(&self, line: &[u8], start: usize) -> Result<Field, Refusal> {
        if self.fields.len() == self.caps.fields {
            return Err(Refusal::TooManyFields);
        }
        if matches!(line[0], b' ' | b'\t') {
            return Err(if self.fields.is_empty() { Refusal::LeadingSpace } else { Refusal::ObsFold });
        }
        let name_len = line.iter().position(|b| !syntax::is_token_byte(*b)).unwrap_or(line.len());
        match line.get(name_len) {
            Some(b':') if name_len > 0 => {}
            Some(b' ' | b'\t') if syntax::trim(&line[name_len..]).first() == Some(&b':') => {
                return Err(Refusal::SpaceBeforeColon);
            }
            _ => return Err(control_byte(line).unwrap_or(Refusal::FieldName)),
        }
        let raw = &line[name_len + 1..];
        if syntax::bad_value_byte(raw).is_some() {
            return Err(control_byte(raw).unwrap_or(Refusal::ControlByte));
        }
        let lead = raw.iter().take_while(|b| matches!(b, b' ' | b'\t')).count();
        let value_start = start + name_len + 1 + lead;
        let value_len = syntax::trim(raw).len();
        Ok(Field {
            line: Span::new(start, start + line.len() + 2),
            name: Span::new(start, start + name_len),
            value: Span::new(value_start, value_start + value_len),
            kind: Kind::of(&line[..name_len]),
            drop: false,
        })
    }

    /// The values of all fields of one kind.
    pub(super) fn values<'b>(&self, buf: &'b [u8], kind: Kind) -> impl Iterator<Item = &'b [u8]> {
        self.fields.iter().filter(move |f| f.kind == kind).map(move |f| f.value.of(buf))
    }
}

/// The refusal for the first byte that is a control character, if one is.
fn control_byte(line: &[u8]) -> Option<Refusal> {
    line.iter().find_map(|b| match b {
        b'\r' => Some(Refusal::BareCr),
        0 => Some(Refusal::Nul),
        b'\t' => None,
        0x01..0x20 | 0x7f => Some(Refusal::ControlByte),
        _ => None,
    })
}

fn may_become_status_line(bytes: &[u8]) -> bool {
    let start = b"HTTP/1.";
    let n = bytes.len().min(start.len());
    bytes[..n] == start[..n]
}
