//! What a real node's processes keep of a large mesh: agent, worker and keyd on a node of the test bed, with few pods of its
//! own and ever more elsewhere.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bench::kernel::Memory;
use serde::Serialize;
use testbed::{Mesh, PodSpec, wait};

use crate::{Size, objects};

/// Longest time until the node has taken over the manifests.
const LIMIT: Duration = Duration::from_secs(300);
/// Pods on the node itself.
const OWN: usize = 2;
/// How long the node is left alone before its memory is read: what was needed for a moment is given back within it.
const SETTLED: Duration = Duration::from_secs(12);

/// Memory of a node's processes.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct NodeMemory {
    /// Pods of other nodes.
    pub(crate) pods: usize,
    /// All processes of the node.
    pub(crate) all: Memory,
    /// By process: its name and its memory.
    pub(crate) processes: Vec<(String, Memory)>,
}

/// Measures a node without pods elsewhere, then with each of the sizes, then again without.
pub(crate) fn measure(node_program: &Path, sizes: &[Size]) -> Result<Vec<NodeMemory>> {
    eprintln!("building a node for its memory");
    let mesh = Mesh::builder().nodes(1).build()?;
    mesh.agent_program(node_program);
    mesh.meshed_namespace("own")?;
    let pods: Vec<_> = (0..OWN)
        .map(|n| mesh.pod(PodSpec::new("own", &format!("own-{n}")).node(1).service_account("own")))
        .collect::<Result<_>>()?;
    mesh.node_setting("/worker/threads", serde_json::json!(1))?;
    mesh.start()?;
    for pod in &pods {
        mesh.enrol(pod)?;
    }
    let mut found = vec![look(&mesh, 0)?];
    for size in sizes {
        fill(&mesh, Some(size))?;
        found.push(look(&mesh, size.pods)?);
    }
    fill(&mesh, None)?;
    found.push(look(&mesh, 0)?);
    Ok(found)
}

/// Writes the objects of that size beside the mesh's own and waits until the node has them.
fn fill(mesh: &Mesh, size: Option<&Size>) -> Result<()> {
    let dir = mesh.manifests().dir();
    let file = dir.join("elsewhere.yaml");
    let expected = match size {
        None => {
            std::fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
            OWN
        }
        Some(size) => {
            let mut text = String::new();
            // The test bed has nodes and agents of its own.
            let own = |key: &str| key.contains(objects::SYSTEM) || key.starts_with("/registry/minions/");
            for stored in objects::all(size).filter(|stored| !own(&stored.key)) {
                writeln!(text, "---\n{}", stored.object)?;
            }
            let part = dir.join(".elsewhere");
            std::fs::write(&part, text).with_context(|| format!("cannot write {}", part.display()))?;
            std::fs::rename(&part, &file).with_context(|| format!("cannot make {}", file.display()))?;
            size.pods + OWN
        }
    };
    let node = mesh.node(1);
    wait::until("the node to know all pods", LIMIT, || {
        let known = node.metrics()?.sum("sockmesh_config_resources", &[("type", "Workload")]);
        Ok((known as usize == expected).then_some(()))
    })
}

fn look(mesh: &Mesh, pods: usize) -> Result<NodeMemory> {
    wait::pause(SETTLED)?;
    let pids = mesh.node(1).mesh_pids()?;
    let mut processes = Vec::new();
    for pid in &pids {
        let file = format!("/proc/{pid}/cmdline");
        let line = std::fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
        let part = |arg: &&str| ["agent", "worker", "keyd"].contains(arg);
        let name = line.split('\0').find(part).unwrap_or("other").to_owned();
        processes.push((name, Memory::of(&[*pid])?));
    }
    processes.sort_by(|a, b| a.0.cmp(&b.0));
    let found = NodeMemory { pods, all: Memory::of(&pids)?, processes };
    eprintln!("  {pods} pods elsewhere: {:.1} MB resident", found.all.rss as f64 / 1e6);
    Ok(found)
}
