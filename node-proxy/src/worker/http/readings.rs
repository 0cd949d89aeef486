//! What applications read in different ways: paths and field names that are valid, and pass unless the node's setting
//! `worker.limits.ambiguous` says otherwise.
//!
//! A front end that decides by path and a back end that unescapes it first, or that takes `a_b` for `a-b`, disagree on what
//! was asked for. As long as nothing in the mesh decides by path such requests are the application's own business, and
//! refusing them by default would break applications that worked before they joined.

/// How a request can be read in more than one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// An escape that hides a byte which decides about the path.
    Escape,
    /// Segments that are empty, or lead elsewhere.
    Segments,
    /// Parameters of a segment, which some take off.
    Parameter,
    /// `_` in a field's name, which CGI and its heirs take for `-`.
    Underscore,
}

impl Reading {
    /// The rule with its number, for a person.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Escape => "NORM-2: the path has an escaped '/', '\\', '.', '%' or NUL",
            Self::Segments => "NORM-3: the path has a backslash, or an empty, '.' or '..' segment",
            Self::Parameter => "NORM-4: a segment of the path has a parameter (';')",
            Self::Underscore => "NORM-13: '_' in the name of a header field",
        }
    }
}

/// Whether a path (a query may follow it) can be read in more than one way. `*` and an empty path cannot.
///
/// # Errors
/// How.
pub(super) fn check_path(target: &[u8]) -> Result<(), Reading> {
    let path = memchr::memchr(b'?', target).map_or(target, |query| &target[..query]);
    for at in memchr::memchr_iter(b'%', path) {
        let escaped = path.get(at + 1..at + 3).map(|hex| [hex[0], hex[1].to_ascii_lowercase()]);
        // An escape that is none is one to a reader who repairs it.
        let Some(escaped) = escaped.filter(|hex| hex.iter().all(u8::is_ascii_hexdigit)) else {
            return Err(Reading::Escape);
        };
        if [b"2f", b"5c", b"2e", b"25", b"00"].contains(&&escaped) {
            return Err(Reading::Escape);
        }
    }
    if path.contains(&b';') {
        return Err(Reading::Parameter);
    }
    let mut segments = path.split(|byte| *byte == b'/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        if matches!(segment, b"." | b"..") || segment.contains(&b'\\') || (segment.is_empty() && !last) {
            return Err(Reading::Segments);
        }
    }
    Ok(())
}

/// Whether the name of a field can be read in more than one way.
///
/// # Errors
/// How.
pub(super) fn check_name(name: &[u8]) -> Result<(), Reading> {
    if name.contains(&b'_') { Err(Reading::Underscore) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_all_read_alike_pass() {
        for path in
            ["/", "/a", "/a/b.c", "/a/", "*", "/a%20b", "/a?b=//../;%2f", "/a.b/..c/...", "/%C3%A9", ""]
        {
            assert_eq!(check_path(path.as_bytes()), Ok(()), "{path}");
        }
    }

    #[test]
    fn paths_that_some_read_otherwise_are_named() {
        for (rule, paths) in [
            (
                Reading::Escape,
                &["/a%2fb", "/a%2Fb", "/%5c", "/%2e%2e/", "/%252f", "/a%00", "/a%", "/%g0"][..],
            ),
            (Reading::Segments, &["//a", "/a//b", "/./a", "/a/..", "/../a", "/a\\b", "/a//"]),
            (Reading::Parameter, &["/a;b=c/d", "/..;/a", "/.;a=b/"]),
        ] {
            for path in paths {
                assert_eq!(check_path(path.as_bytes()), Err(rule), "{path}");
            }
        }
    }
}
