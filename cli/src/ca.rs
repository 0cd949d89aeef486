//! `sockmesh ca`: the certificate authority, and replacing its root.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Subcommand;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use time::OffsetDateTime;

use crate::Output;
use crate::access::{Access, Call, Read, Target, Unread};
use crate::date;
use crate::look::{self, CONTROLLER, CONTROLLER_PORT};
use crate::pages::{Ca, Rotation};
use crate::table::{Table, one_line};

/// Annotation of the Secret that asks for a rotation.
const ROTATE: &str = "sockmesh.io/rotate";
/// Mode of a CA that the controller may replace.
const SELF_SIGNED: &str = "self-signed";
/// Pause between two looks while it waits.
const PAUSE: Duration = Duration::from_secs(5);
/// Looks in a row that may fail while it waits: controllers and API servers are restarted now and then.
const FAILURES: u32 = 24;

/// Shows and replaces the certificate authority.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Where the CA comes from, how long it signs, whom the mesh trusts, how far a rotation is
    Status {
        /// How to show it
        #[arg(long, short, value_enum, default_value_t)]
        output: Output,
    },
    /// Has the controller replace its root, while everybody keeps talking; takes a few minutes
    Rotate {
        /// Wait until the last root is gone and say how far it is; may be interrupted, the controller goes on
        #[arg(long)]
        wait: bool,
    },
}

/// Does it.
pub(crate) async fn run(args: &Args) -> Result<ExitCode> {
    let target = &args.target;
    match &args.what {
        What::Status { output } => {
            let access = Access::open(target).await?;
            let ca = ask(&access, &target.namespace).await?;
            match output {
                Output::Table => print!("{}", told(&ca, OffsetDateTime::now_utc())),
                Output::Json => {
                    println!("{}", serde_json::to_string_pretty(&ca).context("cannot write JSON")?)
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        What::Rotate { wait } => rotate(target, *wait).await,
    }
}

/// What the leader says; another replica when the leader does not answer.
async fn ask(access: &Access, namespace: &str) -> Read<Ca> {
    let pods = look::pods_of(access, namespace, CONTROLLER).await?;
    if pods.is_empty() {
        return Err(Unread::new(
            format!("there is no controller in the namespace {namespace}"),
            "`sockmesh install` installs the mesh; if it is elsewhere, name its namespace with --namespace",
        ));
    }
    let (mut other, mut failed) = (None, None);
    for pod in &pods {
        match look::page::<Ca>(access, namespace, &pod.name_any(), CONTROLLER_PORT, "/debug/ca").await {
            Ok(ca) if ca.leader => return Ok(ca),
            Ok(ca) => other = Some(ca),
            Err(unread) => failed = Some(unread),
        }
    }
    other.ok_or_else(|| failed.unwrap_or_else(|| Unread::new("no controller answers", "`sockmesh status`")))
}

fn told(ca: &Ca, now: OffsetDateTime) -> String {
    let when =
        |text: &str| date::parse(text).map_or_else(|| text.to_owned(), |at| date::with_distance(at, now));
    let mut text = String::new();
    let _ = writeln!(text, "mode          {}", ca.mode);
    if let Some(secret) = &ca.secret {
        let _ = writeln!(text, "Secret        {secret}");
    }
    let _ = writeln!(text, "trust domain  {}", ca.trust_domain);
    let _ = writeln!(text, "signs until   {}", when(&ca.signs_until));
    match &ca.rotation {
        Some(rotation) => {
            let _ = writeln!(text, "rotation      {}", progress(rotation));
        }
        None => text.push_str("rotation      there never was one\n"),
    }
    let mut table = Table::new(&["ROOT", "VALID UNTIL", "SHA-256"]);
    for root in &ca.roots {
        table.row([root.subject.clone(), when(&root.not_after), root.sha256.clone()]);
    }
    let _ = write!(text, "\n{table}");
    text
}

/// How far a rotation is, in one line.
fn progress(rotation: &Rotation) -> String {
    let mut text = format!("{} (id {})", rotation.phase, rotation.id);
    if !rotation.message.is_empty() {
        let _ = write!(text, ": {}", rotation.message);
    }
    if !rotation.waiting_for.is_empty() {
        let _ = write!(text, "; waits for {}", rotation.waiting_for.join(", "));
        if rotation.more > 0 {
            let _ = write!(text, " and {} more", rotation.more);
        }
    }
    one_line(&text)
}

/// Whether this CA can be rotated now, and in which Secret: namespace and name.
fn rotatable(ca: &Ca) -> Read<(&str, &str)> {
    if ca.mode != SELF_SIGNED {
        return Err(Unread::new(
            format!(
                "the CA comes from elsewhere (mode {:?}), and the controller does not change it",
                ca.mode
            ),
            "replace it where it comes from; docs/ca.md says in which order",
        ));
    }
    if let Some(rotation) = ca.rotation.as_ref().filter(|r| r.under_way()) {
        return Err(Unread::new(
            format!("a rotation is under way: {}", progress(rotation)),
            "let it end; `sockmesh ca status` shows how far it is, and `sockmesh check` which nodes do not answer",
        ));
    }
    ca.secret.as_deref().and_then(|secret| secret.split_once('/')).ok_or_else(|| {
        Unread::new(
            "the controller does not say in which Secret its CA is",
            "is it of a version that goes with this program?",
        )
    })
}

async fn rotate(target: &Target, wait: bool) -> Result<ExitCode> {
    let access = Access::open(target).await?;
    let ca = ask(&access, &target.namespace).await?;
    let (namespace, name) = rotatable(&ca)?;
    // Seconds as in the documented kubectl command, and something of its own: two people may ask in one second.
    let id = format!("{}-{:08x}", OffsetDateTime::now_utc().unix_timestamp(), rand::random::<u32>());
    let call = Call { verb: "patch", resource: "secrets", namespace: Some(namespace.to_owned()) };
    let patch = Patch::Merge(json!({ "metadata": { "annotations": { ROTATE: id } } }));
    let secrets: Api<Secret> = Api::namespaced(access.client.clone(), namespace);
    secrets
        .patch_metadata(name, &PatchParams::default(), &patch)
        .await
        .map_err(|error| call.failed(&access.server, &error))?;
    println!("asked for a new root (id {id})");
    if !wait {
        println!("the controller does the rest; `sockmesh ca status` shows how far it is");
        return Ok(ExitCode::SUCCESS);
    }
    follow(&access, &target.namespace, &id).await
}

async fn follow(access: &Access, namespace: &str, id: &str) -> Result<ExitCode> {
    let (began, mut said, mut failures) = (Instant::now(), String::new(), 0);
    loop {
        match ask(access, namespace).await {
            Ok(ca) => {
                failures = 0;
                if let Some(rotation) = ca.rotation.as_ref().filter(|r| r.id == id) {
                    let now = progress(rotation);
                    if now != said {
                        println!("[{:6.0} s] {now}", began.elapsed().as_secs_f64());
                        said = now;
                    }
                    match rotation.phase.as_str() {
                        "done" => return Ok(ExitCode::SUCCESS),
                        "cancelled" | "refused" => return Ok(ExitCode::FAILURE),
                        _ => {}
                    }
                }
            }
            Err(unread) => {
                failures += 1;
                if failures == FAILURES {
                    return Err(
                        anyhow::Error::new(unread).context("the rotation goes on without being watched")
                    );
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_ca() -> Ca {
        serde_json::from_value(json!({
            "mode": "self-signed", "secret": "sockmesh-system/sockmesh-ca", "leader": true,
            "trustDomain": "cluster.local", "signsUntil": "2036-11-18T09:00:00Z",
            "roots": [{"subject": "CN=root", "sha256": "AB:CD", "notBefore": "2026-11-18T09:00:00Z",
                       "notAfter": "2036-11-18T09:00:00Z"}],
        }))
        .unwrap()
    }

    fn a_rotation(phase: &str) -> Rotation {
        Rotation {
            id: "7".into(),
            phase: phase.into(),
            waiting_for: vec!["node1".into()],
            more: 2,
            message: "certificates under the last root are left".into(),
        }
    }

    #[test]
    fn the_ca_is_told_with_its_end_and_its_roots() {
        let now = date::parse("2026-11-21T16:00:00Z").unwrap();
        assert_eq!(
            told(&a_ca(), now),
            "mode          self-signed\n\
             Secret        sockmesh-system/sockmesh-ca\n\
             trust domain  cluster.local\n\
             signs until   2036-11-18 09:00 UTC (in 9 years)\n\
             rotation      there never was one\n\
             \n\
             ROOT     VALID UNTIL                        SHA-256\n\
             CN=root  2036-11-18 09:00 UTC (in 9 years)  AB:CD\n"
        );
        let turning = Ca { rotation: Some(a_rotation("switched")), ..a_ca() };
        let line = "rotation      switched (id 7): certificates under the last root are left; waits for node1 and 2 more\n";
        assert!(told(&turning, now).contains(line), "{}", told(&turning, now));
    }

    #[test]
    fn a_ca_of_somebody_else_is_not_rotated() {
        let theirs = Ca { mode: "secret".into(), ..a_ca() };
        assert!(rotatable(&theirs).unwrap_err().message.contains("comes from elsewhere"));
    }

    #[test]
    fn a_second_rotation_waits_for_the_first() {
        assert_eq!(rotatable(&a_ca()).unwrap(), ("sockmesh-system", "sockmesh-ca"));
        for (phase, free) in [("added", false), ("switched", false), ("done", true), ("cancelled", true)] {
            let ca = Ca { rotation: Some(a_rotation(phase)), ..a_ca() };
            assert_eq!(rotatable(&ca).is_ok(), free, "{phase}");
        }
    }
}
