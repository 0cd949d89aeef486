//! What is read from files, and how errors in them are reported.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;

use mesh_controller::index::object::{Object, ObjectKey};
use mesh_controller::source::manifests::read;

fn with_files<T>(files: &[(&str, &str)], check: impl FnOnce(&Path) -> T) -> T {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    check(dir.path())
}

fn objects(files: &[(&str, &str)]) -> Vec<String> {
    with_files(files, |dir| {
        let objects = read(dir).unwrap_or_else(|errors| panic!("{errors:#?}"));
        objects.iter().map(Object::key).map(|k: ObjectKey| k.to_string()).collect()
    })
}

/// The errors, with paths as from the directory of manifests.
fn errors(files: &[(&str, &str)]) -> Vec<String> {
    with_files(files, |dir| {
        let errors = read(dir).expect_err("nothing was wrong");
        let prefix = format!("{}/", dir.display());
        errors.iter().map(|e| e.to_string().replace(&prefix, "")).collect()
    })
}

const POD: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: web-0
  namespace: shop
  uid: u1
spec:
  containers:
  - name: c
    ports:
    - containerPort: 8080
status:
  podIPs:
  - ip: 10.0.0.1
";

#[test]
fn every_yaml_and_json_file_is_read_in_order_of_path_with_all_of_its_documents() {
    let found = objects(&[
        ("b/pod.yml", POD),
        (
            "a.yaml",
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\n---\n# nothing\n---\napiVersion: v1\nkind: Node\nmetadata: {name: n1}\n",
        ),
        (
            "c.json",
            r#"{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web", "namespace": "shop"}}"#,
        ),
        (".hidden.yaml", "not: [yaml"),
        ("..data/x.yaml", "not: [yaml"),
        ("README.md", "not: [yaml"),
    ]);
    assert_eq!(found, ["Namespace shop", "Node n1", "Pod shop/web-0", "ServiceAccount shop/web"]);
}

#[test]
fn what_kubectl_writes_is_understood() {
    // As `kubectl get pods,services,endpointslices -o yaml` prints it, shortened only in the number of objects.
    let found = objects(&[("all.yaml", include_str!("data/kubectl-list.yaml"))]);
    assert_eq!(
        found,
        [
            "Pod shop/web-6d4cf56db6-x7k2p",
            "Service shop/web",
            "EndpointSlice shop/web-5xkq9",
            "Node worker-1"
        ]
    );
}

#[test]
fn other_kinds_are_left_alone_even_with_familiar_names() {
    let found = objects(&[(
        "x.yaml",
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n---\napiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: s}\n",
    )]);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn an_object_without_a_namespace_is_in_default() {
    let found = objects(&[("x.yaml", "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\n")]);
    assert_eq!(found, ["ServiceAccount default/a"]);
}

#[test]
fn errors_name_file_line_object_and_field() {
    let pod = |from: &str, to: &str| {
        assert!(POD.contains(from), "{from}");
        POD.replace(from, to)
    };
    for (text, expected) in [
        // Not YAML, or not an object.
        ("a: 1\nb: [1\n".to_owned(), "x.yaml:"),
        ("- a\n- b\n".to_owned(), "x.yaml:1: is not a Kubernetes object"),
        ("apiVersion: v1\nmetadata: {name: a}\n".to_owned(), "x.yaml:1: kind is missing"),
        ("kind: Pod\n".to_owned(), "x.yaml:1: apiVersion is missing"),
        (pod("  name: web-0\n", "  name: web-0\n  name: web-1\n"), "x.yaml:5:"),
        // A value of another type.
        (
            pod("containerPort: 8080", "containerPort: http"),
            "x.yaml:11: Pod shop/web-0: spec.containers[0].ports[0].containerPort: invalid type: string \"http\", expected i32",
        ),
        (pod("name: web-0", "name: 7"), "x.yaml:4: Pod: metadata.name: invalid type"),
        (
            pod("uid: u1", "uid: u1\n  deletionTimestamp: yesterday"),
            "x.yaml:7: Pod shop/web-0: metadata.deletionTimestamp: ",
        ),
        // A value without a meaning.
        (
            pod("10.0.0.1", "10.0.0"),
            "x.yaml:14: Pod shop/web-0: status.podIPs[0].ip: \"10.0.0\" is not an IP address",
        ),
        (
            pod("containerPort: 8080", "containerPort: 80800"),
            "x.yaml:11: Pod shop/web-0: spec.containers[0].ports[0].containerPort: 80800 is not a port",
        ),
        (
            pod("status:", "status:\n  phase: Sleeping"),
            "x.yaml:13: Pod shop/web-0: status.phase: \"Sleeping\" is not Pending, Running",
        ),
        (pod("  uid: u1\n", ""), "x.yaml:4: Pod shop/web-0: metadata.uid: is missing"),
        (pod("uid: u1", "uid: U/1"), "x.yaml:6: Pod shop/web-0: metadata.uid: \"U/1\" is not a UID"),
        (pod("namespace: shop", "namespace: Shop"), "x.yaml:5: Pod Shop/web-0: metadata.namespace: \"Shop\" is not a name"),
        (
            "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: a}\n".to_owned(),
            "x.yaml:1: discovery.k8s.io/v1beta1 is not read; write discovery.k8s.io/v1",
        ),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  clusterIP: here\n".to_owned(),
            "x.yaml:5: Service a: spec.clusterIP: \"here\" is not an IP address",
        ),
        (
            "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Node\n  metadata: {name: Node_1}\n".to_owned(),
            "x.yaml:6: Node Node_1: metadata.name: \"Node_1\" is not a name",
        ),
    ] {
        let found = errors(&[("x.yaml", &text)]);
        assert_eq!(found.len(), 1, "{found:#?}\n{text}");
        assert!(found[0].starts_with(expected), "{:?} does not begin with {expected:?}", found[0]);
    }
}

#[test]
fn all_errors_of_all_files_come_at_once() {
    let found = errors(&[
        ("a.yaml", "kind: [\n"),
        (
            "b.yaml",
            "apiVersion: v1\nkind: Node\nmetadata: {name: A}\n---\napiVersion: v1\nkind: Node\nmetadata: {}\n",
        ),
        ("c.yaml", POD),
    ]);
    assert_eq!(found.len(), 3, "{found:#?}");
}

#[test]
fn two_objects_of_one_name_or_two_pods_of_one_uid_are_an_error_that_names_both_places() {
    let found = errors(&[("a.yaml", POD), ("b.yaml", POD)]);
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("b.yaml:4: Pod shop/web-0: metadata.name: Pod shop/web-0 is at "),
        "{found:?}"
    );
    assert!(found[0].ends_with("a.yaml:4 already"), "{found:?}");
    let found = errors(&[("a.yaml", POD), ("b.yaml", &POD.replace("web-0", "web-1"))]);
    assert!(found[0].starts_with("b.yaml:6: Pod shop/web-1: metadata.uid: UID u1 is at "), "{found:?}");
}

#[test]
fn what_cannot_be_read_is_an_error() {
    let found = with_files(&[], |dir| {
        std::os::unix::fs::symlink("nowhere", dir.join("a.yaml")).unwrap();
        std::fs::write(dir.join("b.yaml"), b"\xff\xfe\x00").unwrap();
        std::os::unix::fs::symlink(".", dir.join("loop")).unwrap();
        read(dir).unwrap_err().iter().map(ToString::to_string).collect::<Vec<_>>()
    });
    assert!(found.iter().any(|e| e.contains("a.yaml: cannot be read: No such file")), "{found:#?}");
    assert!(found.iter().any(|e| e.contains("b.yaml: cannot be read")), "{found:#?}");
    assert!(found.iter().any(|e| e.contains("do symlinks form a loop")), "{found:#?}");
    let found = read(Path::new("/nonexistent")).unwrap_err();
    assert!(found[0].to_string().contains("/nonexistent: cannot be read"), "{found:?}");
}
