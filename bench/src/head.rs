//! Heads of HTTP/1.1 messages, as far as the bench's own client and server need them. Not a general parser: a message
//! without Content-Length has no body here, and chunked bodies are refused, so that every variant moves the same bytes.

use anyhow::{Context, Result, bail};
use memchr::memmem;

/// Longest head that is waited for.
const LIMIT: usize = 64 * 1024;

/// What a head says.
#[derive(Debug, PartialEq, Eq)]
pub struct Head<'a> {
    /// First line, without its end.
    pub line: &'a str,
    /// Bytes of the head with the empty line.
    pub length: usize,
    /// Bytes of the body.
    pub body: usize,
    /// Whether the connection ends with this message.
    pub close: bool,
}

impl<'a> Head<'a> {
    /// The head at the start of `buffer`, or `None` when its end has not arrived.
    ///
    /// # Errors
    /// When it is too long, is not text, or announces a chunked body.
    pub fn parse(buffer: &'a [u8]) -> Result<Option<Self>> {
        let Some(end) = memmem::find(buffer, b"\r\n\r\n") else {
            if buffer.len() > LIMIT {
                bail!("{} bytes and no end of a head", buffer.len());
            }
            return Ok(None);
        };
        let text = std::str::from_utf8(&buffer[..end]).context("a head that is not UTF-8")?;
        let mut lines = text.split("\r\n");
        let line = lines.next().unwrap_or_default();
        let mut head = Self { line, length: end + 4, body: 0, close: false };
        for field in lines {
            let (name, value) = field.split_once(':').with_context(|| format!("no colon in {field:?}"))?;
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                head.body = value.parse().with_context(|| format!("Content-Length {value:?}"))?;
            } else if name.eq_ignore_ascii_case("connection") {
                head.close = value.eq_ignore_ascii_case("close");
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                bail!("a body with Transfer-Encoding {value:?}; Content-Length was sent");
            }
        }
        Ok(Some(head))
    }

    /// The status of an answer.
    ///
    /// # Errors
    /// When the first line is no status line.
    pub fn status(&self) -> Result<u16> {
        let status = self.line.split(' ').nth(1).and_then(|s| s.parse().ok());
        status.with_context(|| format!("{:?} is no status line", self.line))
    }

    /// The path of a request.
    ///
    /// # Errors
    /// When the first line is no request line.
    pub fn path(&self) -> Result<&'a str> {
        self.line.split(' ').nth(1).with_context(|| format!("{:?} is no request line", self.line))
    }
}

#[cfg(test)]
mod tests {
    use super::Head;

    #[test]
    fn a_head_that_has_not_arrived_whole_is_waited_for() {
        assert_eq!(Head::parse(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n").unwrap(), None);
    }

    #[test]
    fn length_and_close_are_found_whatever_the_case_of_their_names() {
        let head = Head::parse(b"HTTP/1.1 503 no\r\nContent-length: 3\r\nCONNECTION: Close\r\n\r\nabc");
        let head = head.unwrap().unwrap();
        assert_eq!((head.status().unwrap(), head.body, head.close), (503, 3, true));
        assert_eq!(head.length, "HTTP/1.1 503 no\r\nContent-length: 3\r\nCONNECTION: Close\r\n\r\n".len());
    }

    #[test]
    fn a_request_has_its_path() {
        let head = Head::parse(b"GET /large HTTP/1.1\r\nhost: a:1\r\n\r\n").unwrap().unwrap();
        assert_eq!((head.path().unwrap(), head.body, head.close), ("/large", 0, false));
    }

    #[test]
    fn a_chunked_body_is_refused_by_name() {
        let error = Head::parse(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap_err();
        assert!(error.to_string().contains("chunked"), "{error}");
    }
}
