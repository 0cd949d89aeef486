//! `sockmesh check`: is everything as it should be, and if not, what to do.

pub(crate) mod before;
pub(crate) mod installed;
pub(crate) mod kinds;
pub(crate) mod report;
mod tunnels;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::Api;
use kube::api::PostParams;

use self::before::Before;
use self::report::Report;
use crate::Output;
use crate::access::{Access, Call, Read, Target};
use crate::helm;
use crate::look::{self, AGENT, Cluster, Depth};

/// Tells whether the cluster is fit for the mesh, and whether the mesh works. Ends with 1 when something is in error.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only what has to be the case before the mesh is installed
    #[arg(long)]
    pre: bool,
    /// How to show it
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    target: Target,
}

/// Rights that `helm install` of both charts takes: verb, group, resource, whether for the whole cluster.
const INSTALLING: [(&str, &str, &str, bool); 14] = [
    ("create", "", "namespaces", true),
    ("create", "apiextensions.k8s.io", "customresourcedefinitions", true),
    ("create", "rbac.authorization.k8s.io", "clusterroles", true),
    ("create", "rbac.authorization.k8s.io", "clusterrolebindings", true),
    ("create", "rbac.authorization.k8s.io", "roles", false),
    ("create", "rbac.authorization.k8s.io", "rolebindings", false),
    ("create", "apps", "deployments", false),
    ("create", "apps", "daemonsets", false),
    ("create", "policy", "poddisruptionbudgets", false),
    ("create", "networking.k8s.io", "networkpolicies", false),
    ("create", "", "services", false),
    ("create", "", "serviceaccounts", false),
    ("create", "", "configmaps", false),
    // Helm keeps its releases there.
    ("create", "", "secrets", false),
];

/// Looks and tells.
pub(crate) async fn run(args: &Args) -> Result<ExitCode> {
    let access = Access::open(&args.target).await?;
    let namespace = &args.target.namespace;
    let (cluster, mut findings) = fit(&access, namespace, args.pre).await;
    // Without an answer to anything, everything else would only repeat that.
    if !args.pre && cluster.version.is_ok() {
        let mesh = look::at_mesh(&access, namespace, Depth::Whole).await;
        findings.extend(installed::mesh(&cluster, &mesh));
        if matches!(mesh.daemonset, Ok(Some(_))) {
            findings.push(kinds::look(&access).await);
        }
    }
    let report = Report::new(findings);
    match args.output {
        Output::Table => print!("{report}"),
        Output::Json => {
            println!("{}", serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?);
        }
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether the cluster is fit; with `pre` also for being installed to.
async fn fit(access: &Access, namespace: &str, pre: bool) -> (Cluster, Vec<report::Finding>) {
    let mut cluster = look::at_cluster(access, namespace).await;
    if let Err(unread) = &cluster.version {
        let only = vec![report::Finding::unread(report::Group::Cluster, "version", unread)];
        return (cluster, only);
    }
    if !pre && let Err(unread) = &mut cluster.nodes {
        unread.hint.push_str("; the rest is checked without it");
    }
    let mut findings = before::cluster(&cluster);
    if pre {
        findings.extend(before::install(&cluster, &before_install(access, namespace).await));
    }
    (cluster, findings)
}

/// What `sockmesh install` looks at first.
pub(crate) async fn before_installing(access: &Access, namespace: &str) -> Report {
    Report::new(fit(access, namespace, true).await.1)
}

async fn before_install(access: &Access, namespace: &str) -> Before {
    let daemonsets = Call { verb: "list", resource: "daemonsets.apps", namespace: None };
    let selector = format!("app.kubernetes.io/name={AGENT}");
    let rights = async {
        let mut rights = Vec::new();
        for (verb, group, resource, whole) in INSTALLING {
            let namespace = (!whole).then(|| namespace.to_owned());
            let given = may(access, verb, group, resource, namespace.as_deref()).await;
            rights.push((Call { verb, resource, namespace }, given));
        }
        rights
    };
    let (rights, installed, helm) = tokio::join!(
        rights,
        access.list(Api::<DaemonSet>::all(access.client.clone()), &daemonsets, Some(&selector)),
        helm::version(),
    );
    Before { rights, installed, helm }
}

/// Whether whoever asks has a right.
async fn may(
    access: &Access,
    verb: &str,
    group: &str,
    resource: &str,
    namespace: Option<&str>,
) -> Read<bool> {
    let call =
        Call { verb: "create", resource: "selfsubjectaccessreviews.authorization.k8s.io", namespace: None };
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                verb: Some(verb.to_owned()),
                group: Some(group.to_owned()),
                resource: Some(resource.to_owned()),
                namespace: namespace.map(str::to_owned),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(access.client.clone());
    let answer = reviews.create(&PostParams::default(), &review).await;
    answer
        .map(|review| review.status.is_some_and(|s| s.allowed))
        .map_err(|error| call.failed(&access.server, &error))
}
