//! Whether the cluster knows the mesh's own kinds of objects, as this version has them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;

use super::report::{Finding, Group};
use crate::access::{Access, Call, Read};

/// Name of the definition of MeshNode.
pub(crate) const MESH_NODES: &str = "meshnodes.sockmesh.io";
/// The definition as the chart of this version has it.
const TEMPLATE: &str = include_str!("../../../charts/sockmesh-crds/templates/meshnodes.yaml");
/// Annotation that names a definition's content.
const MARK: &str = "sockmesh.io/definition";
/// Label with the version that a definition came with.
const VERSION: &str = "app.kubernetes.io/version";
const CHECK: &str = "kinds";

/// The definition's content by name, as this version has it.
fn expected() -> Option<&'static str> {
    TEMPLATE.lines().find_map(|line| line.trim().strip_prefix(MARK)?.strip_prefix(": "))
}

/// Looks at the definitions.
pub(crate) async fn look(access: &Access) -> Finding {
    let call =
        Call { verb: "get", resource: "customresourcedefinitions.apiextensions.k8s.io", namespace: None };
    let api: Api<CustomResourceDefinition> = Api::all(access.client.clone());
    told(&access.get(api, &call, MESH_NODES).await)
}

fn told(read: &Read<Option<CustomResourceDefinition>>) -> Finding {
    let upgrade = "`sockmesh install` installs the charts sockmesh-crds and sockmesh; or: helm upgrade --install \
                   sockmesh-crds charts/sockmesh-crds";
    let definition = match read {
        // Many who look after the mesh may not look at definitions, and the mesh works without.
        Err(unread) => {
            return Finding::warning(Group::Installation, CHECK, &unread.message, &unread.hint);
        }
        Ok(None) => {
            let what = format!(
                "the cluster does not know {MESH_NODES}: there is no status of nodes, and they cannot share keys of tunnels"
            );
            return Finding::warning(Group::Installation, CHECK, what, upgrade);
        }
        Ok(Some(definition)) => definition,
    };
    let conditions = definition.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    if let Some(not) = conditions.iter().find(|c| c.type_ == "Established" && c.status != "True") {
        let why = not.message.as_deref().unwrap_or_default();
        let what = format!("{MESH_NODES} is not established: {why}");
        let hint = format!("`kubectl describe crd {MESH_NODES}`; another definition may have its names");
        return Finding::warning(Group::Installation, CHECK, what, hint);
    }
    let annotations = definition.metadata.annotations.as_ref();
    if annotations.and_then(|a| a.get(MARK)).map(String::as_str) == expected() {
        return Finding::ok(Group::Installation, CHECK, format!("{MESH_NODES} is that of this version"));
    }
    let labels = definition.metadata.labels.as_ref();
    let version = labels.and_then(|l| l.get(VERSION)).map_or("a version that it does not name", |v| v);
    let what = format!("{MESH_NODES} is that of {version}, not as {} has it", env!("CARGO_PKG_VERSION"));
    Finding::warning(Group::Installation, CHECK, what, upgrade)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::access::Unread;
    use crate::check::report::Level;

    fn definition(mark: &str, established: &str) -> Read<Option<CustomResourceDefinition>> {
        let object: Value = json!({
            "metadata": {"name": MESH_NODES, "annotations": {MARK: mark}, "labels": {VERSION: "0.0.9"}},
            "spec": {"group": "sockmesh.io", "names": {"kind": "MeshNode", "plural": "meshnodes"}, "scope": "Cluster", "versions": []},
            "status": {"conditions": [{"type": "Established", "status": established, "message": "names are taken"}]},
        });
        Ok(Some(serde_json::from_value(object).unwrap()))
    }

    #[test]
    fn the_kinds_of_this_version_are_well_and_others_are_told_of() {
        let mark = expected().unwrap();
        assert_eq!(mark.len(), 32, "{mark}");
        assert_eq!(told(&definition(mark, "True")).level, Level::Ok);
        for (read, words) in [
            (Ok(None), "does not know meshnodes.sockmesh.io"),
            (definition("of before", "True"), "is that of 0.0.9"),
            (definition(mark, "False"), "names are taken"),
            (Err(Unread::new("you may not get it", "ask")), "you may not get it"),
        ] {
            let finding = told(&read);
            assert_eq!(finding.level, Level::Warning);
            assert!(finding.message.contains(words), "{}", finding.message);
            assert!(finding.hint.is_some());
        }
    }
}
