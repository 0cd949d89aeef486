//! `sockmesh install` and `uninstall`: Helm with the mesh's charts. Whatever Helm can do, it is asked to do; here is only what
//! has to be the case around it.
//!
//! The mesh's own kinds of objects are a chart and a release of their own, installed first and removed on demand only: with
//! a kind, all objects of it go.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::process::Command;

use crate::access::{Access, Call, Read, Target, Unread};
use crate::check;
use crate::check::before::POD_SECURITY;
use crate::check::installed::MESH_LABEL;
use crate::check::kinds::MESH_NODES;

/// Name of the release; the names of the chart's objects do not depend on it.
const RELEASE: &str = "sockmesh";
/// Name of the release of the kinds.
const KINDS_RELEASE: &str = "sockmesh-crds";
/// Where the chart is in the mesh's repository.
const CHART: &str = "charts/sockmesh";

/// Installs the mesh, or changes and upgrades what is installed, with Helm.
#[derive(Debug, clap::Args)]
pub(crate) struct Install {
    /// The chart: a directory, an archive, or a reference that Helm understands; by default charts/sockmesh of the repository
    #[arg(long, value_name = "CHART")]
    chart: Option<String>,
    /// The chart with the mesh's own kinds of objects; by default sockmesh-crds where the other chart is
    #[arg(long, value_name = "CHART")]
    crds_chart: Option<String>,
    /// Leave the kinds alone: somebody else installs them, or nobody, and then nodes have no status and no tunnels
    #[arg(long, conflicts_with = "crds_chart")]
    skip_crds: bool,
    /// A value, as Helm takes it: image.registry=registry.example.com/mesh
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// A file of values
    #[arg(long, short = 'f', value_name = "FILE")]
    values: Vec<PathBuf>,
    /// Wait until everything is ready
    #[arg(long)]
    wait: bool,
    /// Install even if `sockmesh check --pre` finds errors
    #[arg(long)]
    skip_checks: bool,
    #[command(flatten)]
    target: Target,
    /// Further arguments for `helm upgrade --install`
    #[arg(last = true, value_name = "HELM ARGUMENT")]
    further: Vec<String>,
}

/// Removes the mesh, with every trace on the nodes, with Helm.
#[derive(Debug, clap::Args)]
pub(crate) struct Uninstall {
    /// Remove the mesh's own kinds of objects, too, with every object of them
    #[arg(long)]
    crds: bool,
    #[command(flatten)]
    target: Target,
    /// Further arguments for `helm uninstall`
    #[arg(last = true, value_name = "HELM ARGUMENT")]
    further: Vec<String>,
}

/// `$HELM`, or what is in the PATH.
fn program() -> String {
    std::env::var("HELM").ok().filter(|helm| !helm.is_empty()).unwrap_or_else(|| "helm".to_owned())
}

fn not_run(program: &str, error: &io::Error) -> Unread {
    let hint = "install Helm (https://helm.sh), or name the program in $HELM";
    if error.kind() == io::ErrorKind::NotFound {
        return Unread::new(format!("there is no Helm: {program} is not found"), hint);
    }
    Unread::new(format!("Helm cannot be run: {program}: {error}"), hint)
}

/// Helm's version.
///
/// # Errors
/// When it cannot be run.
pub(crate) async fn version() -> Read<String> {
    let program = program();
    let output = Command::new(&program).args(["version", "--short"]).output().await;
    let output = output.map_err(|error| not_run(&program, &error))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Unread::new(format!("{program} version fails: {said}"), "is $HELM Helm?"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The chart in or above one of these places.
fn find_chart(places: &[PathBuf]) -> Option<PathBuf> {
    let mut all = places.iter().flat_map(|place| place.ancestors());
    all.find_map(|place| Some(place.join(CHART)).filter(|chart| chart.join("Chart.yaml").is_file()))
}

/// The repository is where people stand, or where this program was built.
fn default_chart() -> Result<PathBuf> {
    let places: Vec<PathBuf> =
        [std::env::current_dir().ok(), std::env::current_exe().ok()].into_iter().flatten().collect();
    find_chart(&places).with_context(|| {
        format!(
            "there is no {CHART} in or above the current directory\n  hint: run this in a copy of the mesh's repository \
             of the version that you want ({}), or name the chart with --chart",
            env!("CARGO_PKG_VERSION")
        )
    })
}

/// What Helm is told about the cluster.
fn cluster(target: &Target) -> Vec<String> {
    let mut arguments = vec!["--namespace".to_owned(), target.namespace.clone()];
    if let Some(file) = &target.kubeconfig {
        arguments.extend(["--kubeconfig".to_owned(), file.display().to_string()]);
    }
    if let Some(context) = &target.context {
        arguments.extend(["--kube-context".to_owned(), context.clone()]);
    }
    arguments
}

fn installing(args: &Install, chart: &Path) -> Vec<String> {
    let mut arguments: Vec<String> = ["upgrade", "--install", RELEASE].map(str::to_owned).into();
    arguments.push(chart.display().to_string());
    arguments.extend(cluster(&args.target));
    arguments.extend(args.values.iter().flat_map(|file| ["--values".to_owned(), file.display().to_string()]));
    arguments.extend(args.set.iter().flat_map(|value| ["--set".to_owned(), value.clone()]));
    if args.wait {
        arguments.push("--wait".to_owned());
    }
    arguments.extend(args.further.iter().cloned());
    arguments
}

/// The chart of the kinds beside the mesh's: a directory, an archive or a reference, with the same ending.
fn kinds_chart(chart: &str) -> Result<String> {
    let chart = chart.trim_end_matches('/');
    let (place, name) = chart.rsplit_once('/').map_or(("", chart), |(place, name)| (place, name));
    let ending = name.strip_prefix(RELEASE).with_context(|| {
        format!("no chart of the mesh's own kinds is known beside {chart}\n  hint: name it with --crds-chart, or give --skip-crds")
    })?;
    let slash = if place.is_empty() { "" } else { "/" };
    Ok(format!("{place}{slash}{KINDS_RELEASE}{ending}"))
}

fn installing_kinds(args: &Install, chart: &str) -> Vec<String> {
    let mut arguments: Vec<String> = ["upgrade", "--install", KINDS_RELEASE, chart].map(str::to_owned).into();
    arguments.extend(cluster(&args.target));
    arguments
}

fn uninstalling(args: &Uninstall) -> Vec<String> {
    let mut arguments: Vec<String> = ["uninstall", RELEASE].map(str::to_owned).into();
    arguments.extend(cluster(&args.target));
    arguments.extend(args.further.iter().cloned());
    arguments
}

/// Runs Helm on this terminal. What it says is what people see.
async fn helm(arguments: &[String]) -> Result<ExitCode> {
    let program = program();
    eprintln!("{program} {}", arguments.join(" "));
    let status = Command::new(&program).args(arguments).status().await;
    let status = status.map_err(|error| not_run(&program, &error))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// `sockmesh install`.
pub(crate) async fn install(args: &Install) -> Result<ExitCode> {
    let chart = match &args.chart {
        Some(chart) => PathBuf::from(chart),
        None => default_chart()?,
    };
    version().await?;
    let access = Access::open(&args.target).await?;
    let namespace = &args.target.namespace;
    if !args.skip_checks {
        let report = check::before_installing(&access, namespace).await;
        if !report.ok {
            eprint!("{report}");
            bail!(
                "the cluster is not fit for the mesh\n  hint: see above; --skip-checks installs all the same"
            );
        }
    }
    make_namespace(&access, namespace).await?;
    if !args.skip_crds {
        let kinds = match &args.crds_chart {
            Some(chart) => chart.clone(),
            None => kinds_chart(&chart.display().to_string())?,
        };
        let code = helm(&installing_kinds(args, &kinds)).await?;
        if code != ExitCode::SUCCESS {
            eprintln!(
                "the mesh's own kinds are not installed, and so the mesh is not; --skip-crds installs it without them"
            );
            return Ok(code);
        }
    }
    let code = helm(&installing(args, &chart)).await?;
    if code == ExitCode::SUCCESS {
        eprintln!("`sockmesh status --wait` waits until it is ready, `sockmesh check` looks at everything");
    }
    Ok(code)
}

/// Makes the namespace if it is not there, as one whose pods may be what node agents are. One that is there is its owner's.
async fn make_namespace(access: &Access, name: &str) -> Result<()> {
    let api: Api<Namespace> = Api::all(access.client.clone());
    let call = |verb| Call { verb, resource: "namespaces", namespace: None };
    if access.get(api.clone(), &call("get"), name).await?.is_some() {
        return Ok(());
    }
    let made: Namespace = serde_json::from_value(json!({
        "metadata": { "name": name, "labels": { POD_SECURITY: "privileged" } },
    }))
    .context("the namespace to be made")?;
    let made = api.create(&PostParams::default(), &made).await;
    made.map_err(|error| call("create").failed(&access.server, &error))?;
    Ok(())
}

/// `sockmesh uninstall`.
pub(crate) async fn uninstall(args: &Uninstall) -> Result<ExitCode> {
    version().await?;
    let access = Access::open(&args.target).await?;
    let call = Call { verb: "list", resource: "namespaces", namespace: None };
    let enabled = format!("{MESH_LABEL}=enabled");
    let namespaces = access.list(Api::<Namespace>::all(access.client.clone()), &call, Some(&enabled)).await?;
    if !namespaces.is_empty() {
        let names: Vec<String> = namespaces.iter().map(ResourceExt::name_any).collect();
        eprintln!(
            "note: still opted in: {}. Until their node is cleaned, their pods are refused; docs/uninstall.md has the order \
             that interrupts nobody",
            names.join(", ")
        );
    }
    let code = helm(&uninstalling(args)).await?;
    if code != ExitCode::SUCCESS || !args.crds {
        return Ok(code);
    }
    remove_kinds(args, &access).await
}

/// Helm only forgets the release, for the definitions say that it is to keep them.
async fn remove_kinds(args: &Uninstall, access: &Access) -> Result<ExitCode> {
    let mut arguments: Vec<String> =
        ["uninstall", KINDS_RELEASE, "--ignore-not-found"].map(str::to_owned).into();
    arguments.extend(cluster(&args.target));
    let code = helm(&arguments).await?;
    let api: Api<CustomResourceDefinition> = Api::all(access.client.clone());
    let call =
        Call { verb: "delete", resource: "customresourcedefinitions.apiextensions.k8s.io", namespace: None };
    match api.delete(MESH_NODES, &DeleteParams::default()).await {
        Ok(_) => eprintln!("{MESH_NODES} is removed"),
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Err(error) => return Err(call.failed(&access.server, &error).into()),
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        install: Install,
    }

    #[test]
    fn values_and_what_only_helm_knows_are_passed_through_in_an_order_that_set_wins() {
        let words = "x --set a=1 --set b=2,c=3 -f one.yaml --wait --context prod -n mesh -- --timeout 9m";
        let args = Cli::try_parse_from(words.split(' ')).unwrap().install;
        assert_eq!(
            installing(&args, Path::new("charts/sockmesh")).join(" "),
            "upgrade --install sockmesh charts/sockmesh --namespace mesh --kube-context prod --values one.yaml \
             --set a=1 --set b=2,c=3 --wait --timeout 9m"
        );
    }

    #[test]
    fn the_chart_of_the_kinds_is_beside_the_other_one_and_takes_no_values() {
        for (chart, kinds) in [
            ("charts/sockmesh", "charts/sockmesh-crds"),
            ("/a/charts/sockmesh/", "/a/charts/sockmesh-crds"),
            ("sockmesh-0.1.0.tgz", "sockmesh-crds-0.1.0.tgz"),
            ("oci://registry.example.com/mesh/sockmesh", "oci://registry.example.com/mesh/sockmesh-crds"),
        ] {
            assert_eq!(kinds_chart(chart).unwrap(), kinds);
        }
        let error = kinds_chart("charts/other").unwrap_err().to_string();
        assert!(error.contains("--crds-chart") && error.contains("--skip-crds"), "{error}");
        let words = "x --set a=1 -f one.yaml --wait -n mesh -- --timeout 9m";
        let args = Cli::try_parse_from(words.split(' ')).unwrap().install;
        assert_eq!(
            installing_kinds(&args, "charts/sockmesh-crds").join(" "),
            "upgrade --install sockmesh-crds charts/sockmesh-crds --namespace mesh"
        );
    }

    #[test]
    fn uninstalling_names_release_and_cluster() {
        let target =
            Target { kubeconfig: Some("/k".into()), context: None, namespace: "sockmesh-system".into() };
        let args = Uninstall { crds: false, target, further: vec!["--debug".into()] };
        assert_eq!(
            uninstalling(&args).join(" "),
            "uninstall sockmesh --namespace sockmesh-system --kubeconfig /k --debug"
        );
    }

    #[test]
    fn the_chart_is_found_from_anywhere_in_the_repository_and_from_its_build() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let chart = repository.join(CHART);
        assert_eq!(find_chart(&[repository.join("target/release/sockmesh")]), Some(chart.clone()));
        assert_eq!(find_chart(&["/nowhere".into(), repository.join("docs")]), Some(chart));
        assert_eq!(find_chart(&["/nowhere".into()]), None);
    }

    #[test]
    fn a_helm_that_is_not_there_is_told_from_one_that_cannot_be_run() {
        let told = not_run("helm", &io::ErrorKind::NotFound.into());
        assert!(told.message.starts_with("there is no Helm") && told.hint.contains("$HELM"), "{told}");
        let told = not_run("/x/helm", &io::ErrorKind::PermissionDenied.into());
        assert!(told.message.starts_with("Helm cannot be run: /x/helm"), "{told}");
    }
}
