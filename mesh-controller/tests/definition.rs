//! The definition of MeshNode in charts/sockmesh-crds is that of the program.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;

use mesh_controller::nodes::object::definition;
use serde_json::Value;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/sockmesh-crds/templates/meshnodes.yaml");

/// With `UPDATE_DEFINITION` set, writes the file instead.
#[test]
fn the_chart_installs_the_definition_of_the_program() {
    let wanted = serde_json::to_value(definition().unwrap()).unwrap();
    if std::env::var_os("UPDATE_DEFINITION").is_some() {
        let text = serde_saphyr::to_string(&wanted).unwrap();
        let head = "# Made from mesh-controller/src/nodes/object.rs by `UPDATE_DEFINITION=1 cargo test -p mesh-controller --test definition`.\n";
        std::fs::write(Path::new(FILE), format!("{head}{text}")).unwrap();
        return;
    }
    let text = std::fs::read_to_string(FILE).unwrap();
    assert!(!text.contains("{{"), "Helm would read that as its own");
    let there: Value = serde_saphyr::from_str(&text).unwrap();
    assert_eq!(
        there, wanted,
        "if that is meant: UPDATE_DEFINITION=1 cargo test -p mesh-controller --test definition"
    );
}
