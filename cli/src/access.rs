//! The API server, as the kubeconfig leads to it, and what its refusals mean to a person.

use std::error::Error as _;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use http::StatusCode;
use kube::api::ListParams;
use kube::client::UpgradeConnectionError;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Api, Client, Config, Error};
use serde::de::DeserializeOwned;

/// Longest wait for a connection to the API server.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest silence while an answer is awaited.
const SILENCE: Duration = Duration::from_secs(60);
/// Objects in one answer to a list.
const PAGE: u32 = 500;

/// Which cluster, and where in it the mesh is.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Target {
    /// File that says how the cluster is reached; by default $KUBECONFIG, ~/.kube/config, or the pod this runs in
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig, instead of its current one
    #[arg(long, value_name = "NAME", global = true)]
    pub(crate) context: Option<String>,
    /// Namespace of the mesh
    #[arg(long, short, value_name = "NAME", default_value = "sockmesh-system", global = true)]
    pub(crate) namespace: String,
}

/// Why something could not be looked at or done, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unread {
    /// What was attempted and how it ended.
    pub(crate) message: String,
    /// What to do.
    pub(crate) hint: String,
}

impl Unread {
    pub(crate) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  hint: {}", self.message, self.hint)
    }
}

impl std::error::Error for Unread {}

/// What was looked at, or why it could not be.
pub(crate) type Read<T> = Result<T, Unread>;

/// One call of the API server, as rights name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    /// `get`, `list`, `create`, `patch`.
    pub(crate) verb: &'static str,
    /// As in a Role, with the subresource: `pods/portforward`.
    pub(crate) resource: &'static str,
    /// None for the whole cluster.
    pub(crate) namespace: Option<String>,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {} in namespace {namespace}", self.verb, self.resource),
            // Not a resource but a page of the API server's own.
            None if self.resource.starts_with('/') => write!(f, "{} {}", self.verb, self.resource),
            None => write!(f, "{} {} in the whole cluster", self.verb, self.resource),
        }
    }
}

impl Call {
    /// What a failure of this call means.
    pub(crate) fn failed(&self, server: &str, error: &Error) -> Unread {
        let refused = |detail: String| {
            // To kubectl, what follows a slash is the name of an object.
            let what = self.resource.replacen('/', " --subresource=", 1);
            let check = match &self.namespace {
                Some(namespace) => format!("kubectl auth can-i {} {what} -n {namespace}", self.verb),
                None => format!("kubectl auth can-i {} {what} -A", self.verb),
            };
            Unread::new(
                format!("forbidden: you may not {self}{detail}"),
                format!(
                    "ask an administrator of the cluster for this right, or use another context; `{check}` tells when you have it"
                ),
            )
        };
        let unauthorized = || {
            Unread::new(
                format!("{server} does not accept the credentials of the kubeconfig (to {self})"),
                "log in again as your cluster's provider says, or choose another context with --context",
            )
        };
        match error {
            Error::Api(status) if status.code == 403 => refused(format!(" ({})", status.message)),
            Error::Api(status) if status.code == 401 => unauthorized(),
            Error::Api(status) => Unread::new(
                format!("{server} answers \"{}\" to {self}", status.message),
                "look at the API server; it decides about this",
            ),
            Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(StatusCode::FORBIDDEN)) => {
                refused(String::new())
            }
            Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(StatusCode::UNAUTHORIZED)) => {
                unauthorized()
            }
            Error::Auth(error) => Unread::new(
                format!("no credentials for {server}: {}", chain(error)),
                "run the program that the kubeconfig names for credentials by hand and see what it says",
            ),
            Error::HyperError(_) | Error::Service(_) => Unread::new(
                format!("{server} does not answer (to {self}): {}", chain(error.source().unwrap_or(error))),
                "is the cluster running, is this the right context (--context, --kubeconfig), and does a proxy \
                 (HTTPS_PROXY, NO_PROXY) stand between?",
            ),
            other => Unread::new(
                format!("cannot {self} at {server}: {}", chain(other)),
                "`kubectl get --raw /version` tells whether others get further",
            ),
        }
    }
}

/// An error with its causes, each told once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let one = error.to_string();
        if !text.contains(&one) {
            text.push_str(": ");
            text.push_str(&one);
        }
        cause = error.source();
    }
    text
}

/// A client, and where it leads.
#[derive(Clone)]
pub(crate) struct Access {
    pub(crate) client: Client,
    /// `the API server at <URL>`.
    pub(crate) server: String,
}

impl Access {
    /// Reads the kubeconfig; nothing is sent yet.
    ///
    /// # Errors
    /// When there is none, or it leads nowhere.
    pub(crate) async fn open(target: &Target) -> Read<Self> {
        let options = KubeConfigOptions { context: target.context.clone(), ..KubeConfigOptions::default() };
        let config = match &target.kubeconfig {
            Some(file) => match Kubeconfig::read_from(file) {
                Ok(read) => Config::from_custom_kubeconfig(read, &options).await,
                Err(error) => Err(error),
            },
            None => Config::from_kubeconfig(&options).await,
        };
        let mut config = match config {
            Ok(config) => config,
            Err(error) => match Config::incluster() {
                // A context that was asked for is not replaced by the cluster that this happens to run in.
                Ok(config) if target.kubeconfig.is_none() && target.context.is_none() => config,
                _ => return Err(unusable(target, &error)),
            },
        };
        config.connect_timeout = Some(CONNECT);
        config.read_timeout = Some(SILENCE);
        let server = format!("the API server at {}", config.cluster_url);
        let client = Client::try_from(config).map_err(|error| {
            Unread::new(
                format!("the kubeconfig's way to {server} cannot be used: {}", chain(&error)),
                "`kubectl config view --minify` shows what is used; correct it, or choose another --context",
            )
        })?;
        Ok(Self { client, server })
    }

    /// All objects of a kind, page by page.
    pub(crate) async fn list<K>(&self, api: Api<K>, call: &Call, labels: Option<&str>) -> Read<Vec<K>>
    where
        K: Clone + fmt::Debug + DeserializeOwned,
    {
        let mut params = ListParams::default().limit(PAGE);
        params.label_selector = labels.map(str::to_owned);
        let mut all = Vec::new();
        loop {
            let page = api.list(&params).await.map_err(|error| call.failed(&self.server, &error))?;
            all.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => return Ok(all),
            }
        }
    }

    /// One object, if it is there.
    pub(crate) async fn get<K>(&self, api: Api<K>, call: &Call, name: &str) -> Read<Option<K>>
    where
        K: Clone + fmt::Debug + DeserializeOwned,
    {
        api.get_opt(name).await.map_err(|error| call.failed(&self.server, &error))
    }
}

/// What is wrong with the kubeconfig.
fn unusable(target: &Target, error: &KubeconfigError) -> Unread {
    let place = match &target.kubeconfig {
        Some(file) => format!("{}", file.display()),
        None => match std::env::var("KUBECONFIG") {
            Ok(files) if !files.is_empty() => format!("$KUBECONFIG ({files})"),
            _ => "~/.kube/config (there is no $KUBECONFIG)".to_owned(),
        },
    };
    match error {
        KubeconfigError::ReadConfig(..) | KubeconfigError::FindPath => Unread::new(
            format!("no kubeconfig: {place}: {}", chain(error)),
            "name one with --kubeconfig or in $KUBECONFIG; your cluster's provider writes it",
        ),
        KubeconfigError::LoadContext(name) => Unread::new(
            format!("there is no context {name} in {place}"),
            "`kubectl config get-contexts` lists those that there are",
        ),
        KubeconfigError::CurrentContextNotSet => Unread::new(
            format!("{place} has no current context"),
            "choose one with --context; `kubectl config get-contexts` lists them",
        ),
        other => Unread::new(
            format!("{place} cannot be used: {}", chain(other)),
            "`kubectl config view` shows what is in it",
        ),
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    const SERVER: &str = "the API server at https://10.0.0.1:6443/";

    fn forwarding() -> Call {
        Call { verb: "create", resource: "pods/portforward", namespace: Some("sockmesh-system".into()) }
    }

    fn answer(code: u16, message: &str) -> Error {
        Error::Api(Box::new(Status { code, message: message.to_owned(), ..Status::default() }))
    }

    #[test]
    fn a_forbidden_call_names_the_right_that_is_missing_and_how_to_see_it_arrive() {
        let list = Call { verb: "list", resource: "nodes", namespace: None };
        let told = list.failed(SERVER, &answer(403, "nodes is forbidden: User \"dev\" cannot list"));
        assert_eq!(
            told.message,
            "forbidden: you may not list nodes in the whole cluster (nodes is forbidden: User \"dev\" cannot list)"
        );
        assert!(told.hint.contains("`kubectl auth can-i list nodes -A`"), "{}", told.hint);
    }

    #[test]
    fn a_port_forward_that_is_refused_says_which_right_it_takes_though_there_is_no_body() {
        let refused = Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(StatusCode::FORBIDDEN));
        let told = forwarding().failed(SERVER, &refused);
        assert_eq!(
            told.message,
            "forbidden: you may not create pods/portforward in namespace sockmesh-system"
        );
        assert!(
            told.hint.contains("can-i create pods --subresource=portforward -n sockmesh-system"),
            "{}",
            told.hint
        );
    }

    #[test]
    fn credentials_that_are_not_accepted_are_told_from_rights_that_are_missing() {
        let told = forwarding().failed(SERVER, &answer(401, "Unauthorized"));
        assert!(told.message.contains("does not accept the credentials"), "{}", told.message);
        assert!(told.hint.contains("log in again"), "{}", told.hint);
    }

    #[test]
    fn a_server_that_does_not_answer_is_named_with_its_address() {
        let error = Error::Service(Box::new(std::io::Error::other("Connection refused (os error 111)")));
        let told = forwarding().failed(SERVER, &error);
        assert!(told.message.contains("https://10.0.0.1:6443/ does not answer"), "{}", told.message);
        assert!(told.message.contains("Connection refused"), "{}", told.message);
        assert_eq!(told.message.matches("Connection refused").count(), 1, "{}", told.message);
        assert!(!told.message.contains("ServiceError"), "{}", told.message);
    }

    #[tokio::test]
    async fn without_a_kubeconfig_it_is_said_where_one_was_looked_for() {
        let target = Target {
            kubeconfig: Some("/nonexistent/kubeconfig".into()),
            context: None,
            namespace: "sockmesh-system".into(),
        };
        let Err(told) = Access::open(&target).await else { panic!("opened without a kubeconfig") };
        assert!(told.message.starts_with("no kubeconfig: /nonexistent/kubeconfig"), "{}", told.message);
        assert!(told.hint.contains("--kubeconfig"), "{}", told.hint);
    }
}
