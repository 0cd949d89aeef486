//! Reads Kubernetes objects from files.
//!
//! Every `*.yaml`, `*.yml` and `*.json` below a directory, in order of path, with any number of documents, and `kind: List`
//! as `kubectl get -o yaml` writes it. Files and directories whose names begin with a dot are left out: a ConfigMap volume
//! keeps its versions in those and shows the current one through symlinks, which are followed.
//!
//! The set is one thing: if a single document is bad the whole set is, with all its errors, and the caller stays with the
//! last good one. Half a set would look like the deletion of the other half.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use serde::de::DeserializeOwned;

use super::yaml::{self, Located, Value};
use crate::index::object::{Invalid, Object};

/// Directories within directories; more are a loop of symlinks.
const MAX_DEPTH: usize = 16;

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ManifestError {
    /// The file.
    pub file: PathBuf,
    /// Line from 1; 0 when the file as a whole is meant.
    pub line: u64,
    /// Kind and name of the object; empty when that is what is missing.
    pub object: String,
    /// Path of the field; empty when none is meant.
    pub field: String,
    /// What is wrong.
    pub problem: String,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if self.line > 0 {
            write!(f, "{}:", self.line)?;
        }
        for part in [&self.object, &self.field] {
            if !part.is_empty() {
                write!(f, " {part}:")?;
            }
        }
        write!(f, " {}", self.problem)
    }
}

impl std::error::Error for ManifestError {}

/// Reads the whole set.
///
/// # Errors
/// Every error of every file.
pub fn read(dir: &Path) -> Result<Vec<Object>, Vec<ManifestError>> {
    let mut reader = Reader::default();
    reader.directory(dir, 0);
    if reader.errors.is_empty() { Ok(reader.objects) } else { Err(reader.errors) }
}

#[derive(Default)]
struct Reader {
    objects: Vec<Object>,
    errors: Vec<ManifestError>,
    /// Where each object, and each pod UID, was met first.
    seen: HashMap<String, String>,
}

impl Reader {
    fn file_error(&mut self, file: &Path, line: u64, problem: String) {
        let (object, field) = (String::new(), String::new());
        self.errors.push(ManifestError { file: file.to_owned(), line, object, field, problem });
    }

    fn io_error(&mut self, path: &Path, error: &io::Error) {
        self.file_error(path, 0, format!("cannot be read: {error}"));
    }

    fn directory(&mut self, dir: &Path, depth: usize) {
        if depth > MAX_DEPTH {
            self.file_error(
                dir,
                0,
                format!("more than {MAX_DEPTH} directories deep; do symlinks form a loop?"),
            );
            return;
        }
        let entries = fs::read_dir(dir).and_then(|entries| {
            let paths: io::Result<Vec<PathBuf>> = entries.map(|e| e.map(|e| e.path())).collect();
            paths
        });
        let mut paths = match entries {
            Ok(paths) => paths,
            Err(e) => return self.io_error(dir, &e),
        };
        paths.sort();
        for path in paths {
            let hidden = path.file_name().is_none_or(|n| n.as_encoded_bytes().starts_with(b"."));
            if hidden {
                continue;
            }
            let manifest = path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
            match fs::metadata(&path) {
                Ok(meta) if meta.is_dir() => self.directory(&path, depth + 1),
                Ok(_) if !manifest => {}
                Ok(_) => match fs::read_to_string(&path) {
                    Ok(text) => self.text(&path, &text),
                    Err(e) => self.io_error(&path, &e),
                },
                Err(e) => self.io_error(&path, &e),
            }
        }
    }

    fn text(&mut self, file: &Path, text: &str) {
        match yaml::documents(text) {
            Ok(documents) => {
                for document in &documents {
                    self.document(file, document);
                }
            }
            Err(e) => self.file_error(file, e.line, e.message),
        }
    }

    fn document(&mut self, file: &Path, document: &Located) {
        let text = |key: &str| document.get(key).and_then(Located::as_str).unwrap_or_default();
        let (api_version, kind) = (text("apiVersion"), text("kind"));
        if !matches!(document.value, Value::Map(_)) {
            return self.file_error(file, document.line, "is not a Kubernetes object".to_owned());
        }
        for (key, value) in [("apiVersion", api_version), ("kind", kind)] {
            if value.is_empty() {
                let problem = format!("{key} is missing or is not text; every object has one");
                return self.file_error(file, document.line_of(key), problem);
            }
        }
        match (api_version, kind) {
            ("v1", "List") => match document.get("items").map(|i| &i.value) {
                Some(Value::List(items)) => {
                    for item in items {
                        self.document(file, item);
                    }
                }
                None | Some(Value::Null) => {}
                Some(_) => self.file_error(file, document.line_of("items"), "items is not a list".to_owned()),
            },
            ("v1", "Namespace") => self.object::<core::Namespace>(file, document),
            ("v1", "Node") => self.object::<core::Node>(file, document),
            ("v1", "ServiceAccount") => self.object::<core::ServiceAccount>(file, document),
            ("v1", "Pod") => self.object::<core::Pod>(file, document),
            ("v1", "Service") => self.object::<core::Service>(file, document),
            ("discovery.k8s.io/v1", "EndpointSlice") => {
                self.object::<discovery::EndpointSlice>(file, document)
            }
            ("networking.k8s.io/v1", "ServiceCIDR") => self.object::<networking::ServiceCIDR>(file, document),
            (version, "EndpointSlice") if version.starts_with("discovery.k8s.io/") => {
                let problem = format!("{version} is not read; write discovery.k8s.io/v1");
                self.file_error(file, document.line_of("apiVersion"), problem);
            }
            _ => {
                tracing::debug!(file = %file.display(), line = document.line, api_version, kind, "kind not read")
            }
        }
    }

    fn object<T: DeserializeOwned>(&mut self, file: &Path, document: &Located)
    where
        Object: for<'a> TryFrom<&'a T, Error = Invalid>,
    {
        let parsed = serde_path_to_error::deserialize::<_, T>(document.to_json())
            .map_err(|e| Invalid { field: e.path().to_string(), problem: e.into_inner().to_string() })
            .and_then(|typed| Object::try_from(&typed));
        match parsed {
            Ok(object) => self.add(file, document, object),
            Err(invalid) => self.errors.push(ManifestError {
                file: file.to_owned(),
                line: document.line_of(&invalid.field),
                object: describe(document),
                field: invalid.field,
                problem: invalid.problem,
            }),
        }
    }

    /// Adds an object unless another has its name or, for a pod, its UID.
    fn add(&mut self, file: &Path, document: &Located, object: Object) {
        let mut names = vec![(object.key().to_string(), "metadata.name")];
        if let Object::Pod(pod) = &object {
            names.push((format!("UID {}", pod.uid), "metadata.uid"));
        }
        for (name, field) in names {
            let line = document.line_of(field);
            if let Some(first) = self.seen.get(&name) {
                let problem = format!("{name} is at {first} already");
                self.errors.push(ManifestError {
                    file: file.to_owned(),
                    line,
                    object: describe(document),
                    field: field.to_owned(),
                    problem,
                });
                return;
            }
            self.seen.insert(name, format!("{}:{line}", file.display()));
        }
        self.objects.push(object);
    }
}

/// Kind and name as far as the document has them.
fn describe(document: &Located) -> String {
    let kind = document.get("kind").and_then(Located::as_str).unwrap_or_default();
    let meta = |key: &str| document.get("metadata").and_then(|m| m.get(key)).and_then(Located::as_str);
    match (meta("namespace"), meta("name")) {
        (Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
        (None, Some(name)) => format!("{kind} {name}"),
        (_, None) => kind.to_owned(),
    }
}
