//! Single calls of the API server: each with an end in time, each failure counted.

use std::future::Future;
use std::time::Duration;

use crate::metrics::Metrics;

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The API server or the way there.
    #[error("{0}")]
    Api(#[from] kube::Error),
    /// It took too long.
    #[error("no answer from the API server within {0:?}")]
    Timeout(Duration),
}

impl CallError {
    /// HTTP status, if the API server gave one.
    #[must_use]
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Api(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }

    /// Somebody else wrote meanwhile, or made it first.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }
}

/// Waits for a call until `timeout`. `call` names what it is for and is one of a closed set.
///
/// # Errors
/// [`CallError`], which has been counted; conflicts are not, they are how replicas take turns.
pub async fn within<T>(
    timeout: Duration,
    call: &'static str,
    metrics: &Metrics,
    future: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, CallError> {
    let result = match tokio::time::timeout(timeout, future).await {
        Ok(result) => result.map_err(CallError::Api),
        Err(_) => Err(CallError::Timeout(timeout)),
    };
    if let Err(error) = result.as_ref()
        && !error.is_conflict()
    {
        metrics.api_error(call, error.code());
    }
    result
}
