//! Who a node is before it has a certificate.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use zeroize::Zeroizing;

/// Shortest token; shorter ones are a mistake of whoever wrote the file.
pub const MIN_TOKEN: usize = 16;
/// Longest token, in bytes.
const MAX_TOKEN: u64 = 64 * 1024;

/// Why a node is not who it says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// The name is not that of a node.
    #[error("{0:?} is not the name of a node")]
    Name(String),
    /// Nothing is known of the node.
    #[error("there is no token for node {0}; add the file {1}")]
    Unknown(String, PathBuf),
    /// The token is not the node's.
    #[error("the token is not that of node {0}")]
    Wrong(String),
    /// The token proves something else than being the agent of that node.
    #[error("{message}")]
    Refused {
        /// For metrics; one of a closed set.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// Nobody can tell at the moment.
    #[error("{0}")]
    Unavailable(String),
    /// The controller's side is at fault.
    #[error("token of node {node} in {file}: {problem}")]
    Unusable {
        /// The node.
        node: String,
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// Finds out which node a token proves.
#[tonic::async_trait]
pub trait NodeAuthenticator: Send + Sync {
    /// The name of the node that may have a certificate.
    ///
    /// # Errors
    /// [`AuthError`].
    async fn authenticate(&self, claimed: &str, token: &str) -> Result<Arc<str>, AuthError>;
}

/// One file per node: its name is the node's, its content the token (white space around it does not count). Files are
/// read at each call, so a token is changed by replacing its file.
#[derive(Debug, Clone)]
pub struct TokenDirectory {
    dir: PathBuf,
}

impl TokenDirectory {
    /// Tokens in `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    fn read(&self, node: &str) -> Result<Zeroizing<String>, AuthError> {
        let file = self.dir.join(node);
        let unusable =
            |problem: String| AuthError::Unusable { node: node.to_owned(), file: file.clone(), problem };
        let length = match std::fs::metadata(&file) {
            Ok(meta) if meta.is_file() => meta.len(),
            Ok(_) => return Err(unusable("is not a file".to_owned())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(AuthError::Unknown(node.to_owned(), file));
            }
            Err(e) => return Err(unusable(e.to_string())),
        };
        if length > MAX_TOKEN {
            return Err(unusable(format!("has {length} bytes, at most {MAX_TOKEN} are read")));
        }
        let text = Zeroizing::new(std::fs::read_to_string(&file).map_err(|e| unusable(e.to_string()))?);
        let token = Zeroizing::new(text.trim().to_owned());
        if token.len() < MIN_TOKEN {
            return Err(unusable(format!("has {} characters, at least {MIN_TOKEN} are needed", token.len())));
        }
        Ok(token)
    }
}

#[tonic::async_trait]
impl NodeAuthenticator for TokenDirectory {
    async fn authenticate(&self, claimed: &str, token: &str) -> Result<Arc<str>, AuthError> {
        // Checked before it becomes a path: no separators, nothing hidden.
        ca::NodeId::new("a", claimed).map_err(|_| AuthError::Name(claimed.chars().take(64).collect()))?;
        let expected = self.read(claimed)?;
        if same(expected.as_bytes(), token.trim().as_bytes()) {
            Ok(claimed.into())
        } else {
            Err(AuthError::Wrong(claimed.to_owned()))
        }
    }
}

/// Compares in a time that depends on the length of what was sent and on nothing else.
fn same(secret: &[u8], sent: &[u8]) -> bool {
    let mut difference = u8::from(secret.len() != sent.len());
    for (i, byte) in sent.iter().enumerate() {
        difference |= byte ^ secret[i % secret.len()];
    }
    std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef0123";

    async fn attempt(files: &[(&str, &str)], node: &str, token: &str) -> Result<Arc<str>, AuthError> {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        TokenDirectory::new(dir.path()).authenticate(node, token).await
    }

    #[tokio::test]
    async fn a_node_proves_itself_with_its_own_token_only() {
        let files = [("node-a", "0123456789abcdef0123\n"), ("node-b", "another-token-of-b-1234")];
        assert_eq!(attempt(&files, "node-a", TOKEN).await, Ok("node-a".into()));
        let wrong = Err(AuthError::Wrong("node-b".to_owned()));
        assert_eq!(attempt(&files, "node-b", TOKEN).await, wrong);
        for token in [
            "",
            "0",
            "0123456789abcdef012",
            "0123456789abcdef01230",
            "0123456789abcdef01230123456789abcdef0123",
        ] {
            assert!(attempt(&files, "node-a", token).await.is_err(), "{token:?} was accepted");
        }
    }

    #[tokio::test]
    async fn names_cannot_lead_out_of_the_directory() {
        for name in ["", ".", "..", "../node-a", "a/b", "/etc/passwd", "Node-A", "node-a\0"] {
            let result = attempt(&[("node-a", TOKEN)], name, TOKEN).await;
            assert!(matches!(result, Err(AuthError::Name(_))), "{name:?}: {result:?}");
        }
    }

    #[tokio::test]
    async fn an_empty_or_short_token_file_authenticates_nobody() {
        for content in ["", "\n", "short"] {
            let result = attempt(&[("node-a", content)], "node-a", content).await;
            assert!(matches!(result, Err(AuthError::Unusable { .. })), "{content:?}: {result:?}");
        }
        assert!(matches!(attempt(&[], "node-a", TOKEN).await, Err(AuthError::Unknown(..))));
    }
}
