//! YAML documents as trees whose nodes know their line, so that an error found after parsing can say where.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number};
use serde_saphyr::Spanned;

/// Nodes in one file: some 300 make a pod as the API server writes it, so this is a file of 30,000 pods.
const MAX_NODES: usize = 10_000_000;

/// Nodes that aliases may stand for in one file.
const MAX_ALIASED: usize = 100_000;

/// A node of a document.
#[derive(Debug, Clone, PartialEq)]
pub struct Located {
    /// Line of its first character, from 1.
    pub line: u64,
    /// What it holds.
    pub value: Value,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`, `~` or nothing.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Number(Number),
    /// Text.
    String(String),
    /// `- ...`
    List(Vec<Located>),
    /// `key: value`, in the order of the file.
    Map(Vec<(String, Located)>),
}

/// A file that is not YAML.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct SyntaxError {
    /// Line from 1; 0 when it is not known.
    pub line: u64,
    /// What the parser says.
    pub message: String,
}

/// All documents of a file that hold something.
///
/// # Errors
/// [`SyntaxError`] for what is not YAML, has a key twice, or is out of all proportion.
pub fn documents(text: &str) -> Result<Vec<Located>, SyntaxError> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        // kubectl writes no aliases; people write a few.
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: MAX_ALIASED },
        budget: serde_saphyr::budget! {
            max_events: MAX_NODES * 2,
            max_nodes: MAX_NODES,
            max_documents: MAX_NODES,
            max_total_scalar_bytes: 1 << 30,
        },
    };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|e| SyntaxError {
        line: e.location().map_or(0, |l| l.line()),
        message: one_line(&e.to_string()),
    })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Located {
    /// The value of a key of a map.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Located> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }

    /// The text, if it is one.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// Line of the node at `path` (`spec.ports[0].port`), or of the nearest one above it that is there.
    #[must_use]
    pub fn line_of(&self, path: &str) -> u64 {
        let mut node = self;
        for segment in path.split(['.', '[']) {
            let next = match segment.strip_suffix(']') {
                Some(index) => match (&node.value, index.parse::<usize>()) {
                    (Value::List(items), Ok(i)) => items.get(i),
                    _ => None,
                },
                None => node.get(segment),
            };
            match next {
                Some(n) => node = n,
                None => break,
            }
        }
        node.line
    }

    /// The same without lines.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(b) => serde_json::Value::Bool(*b),
            Value::Number(n) => serde_json::Value::Number(n.clone()),
            Value::String(s) => serde_json::Value::String(s.clone()),
            Value::List(items) => serde_json::Value::Array(items.iter().map(Self::to_json).collect()),
            Value::Map(entries) => {
                let entries = entries.iter().map(|(k, v)| (k.clone(), v.to_json()));
                serde_json::Value::Object(entries.collect::<Map<_, _>>())
            }
        }
    }
}

impl<'de> Deserialize<'de> for Located {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v)
            .map(Value::Number)
            .ok_or_else(|| E::custom(format!("{v} is not a number of JSON")))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            entries.push((key, map.next_value()?));
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# a comment
kind: Pod
metadata:
  name: \"1\"
  labels: {a: b}
status:
  podIPs:
  - ip: 10.0.0.1
  - ip: fd00::1
---
---
kind: Node
";

    #[test]
    fn every_node_knows_its_line() {
        let docs = documents(TEXT).unwrap();
        assert_eq!(docs.len(), 2, "{docs:#?}");
        for (path, line) in [
            ("kind", 2),
            ("metadata.name", 4),
            ("metadata.labels.a", 5),
            ("status.podIPs[0].ip", 8),
            ("status.podIPs[1].ip", 9),
            ("status.podIPs[7].ip", 8),
            ("metadata.uid", 4),
        ] {
            assert_eq!(docs[0].line_of(path), line, "{path}");
        }
        assert_eq!(docs[1].line_of("kind"), 12);
    }

    #[test]
    fn scalars_keep_their_types() {
        let docs = documents("{a: 1, b: '1', c: true, d: null, e: -1.5, f: 'yes', g: yes, h: 0x10}").unwrap();
        let expected = serde_json::json!({
            "a": 1, "b": "1", "c": true, "d": null, "e": -1.5, "f": "yes", "g": docs[0].get("g").unwrap().to_json(), "h": 16,
        });
        assert_eq!(docs[0].to_json(), expected);
    }

    #[test]
    fn what_is_not_yaml_is_refused_with_its_line() {
        let error = documents("a: 1\nb: [1,\nc: }\n").unwrap_err();
        assert!((2..=4).contains(&error.line), "{error}");
        let error = documents("a: 1\nb: 2\na: 3\n").unwrap_err();
        assert_eq!(error.line, 3, "{error}");
    }

    #[test]
    fn aliases_do_not_explode() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..10 {
            let of = format!("*a{}, ", i - 1).repeat(10);
            bomb.push_str(&format!("a{i}: &a{i} [{of}]\n"));
        }
        assert!(documents(&bomb).is_err());
    }
}
