//! The conversation with the agent: one JSON object a line in each direction, as `node-proxy`'s `agent::requests` has it.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// On top of what the agent may take itself.
const GRACE: Duration = Duration::from_secs(5);

/// What the plugin asks.
#[derive(Debug, Serialize)]
#[serde(tag = "op")]
pub enum Request<'a> {
    /// A pod comes up: enrol it if it is in the mesh.
    #[serde(rename = "cni-add")]
    Add {
        /// `metadata.uid`.
        uid: &'a str,
        /// Its namespace.
        namespace: &'a str,
        /// Its name.
        name: &'a str,
        /// Path of its network namespace.
        netns: &'a Path,
        /// Longest wait in milliseconds.
        timeout_ms: u64,
    },
    /// A pod's network namespace goes.
    #[serde(rename = "cni-del")]
    Del {
        /// `metadata.uid`.
        uid: &'a str,
        /// Path of the namespace; may be empty.
        netns: &'a str,
    },
    /// Whether a pod of the mesh is captured.
    #[serde(rename = "cni-check")]
    Check {
        /// `metadata.uid`.
        uid: &'a str,
    },
}

/// How it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Done, or nothing to do.
    Done,
    /// Not done, and why.
    Refused(String),
    /// There is nobody to ask, and how that showed.
    Away(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    Done {},
    Error { message: String },
}

/// Asks the agent behind `socket`.
#[must_use]
pub fn ask(socket: &Path, request: &Request<'_>, timeout: Duration) -> Answer {
    let talk = || -> io::Result<String> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(timeout + GRACE))?;
        stream.set_write_timeout(Some(GRACE))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer)
    };
    match talk() {
        Err(e) => Answer::Away(format!("{}: {e}", socket.display())),
        Ok(answer) if answer.is_empty() => {
            Answer::Away(format!("{}: it went away before it answered", socket.display()))
        }
        Ok(answer) => match serde_json::from_str(&answer) {
            Ok(Reply::Done {}) => Answer::Done,
            Ok(Reply::Error { message }) => Answer::Refused(message),
            Err(e) => Answer::Refused(format!(
                "the agent's answer is not understood ({e}); is it of another version?"
            )),
        },
    }
}
