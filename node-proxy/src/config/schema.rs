//! How a configuration section describes itself.
//!
//! [`settings!`] declares a struct whose every field has a default, a unit, a range and a sentence. From that one
//! declaration come the defaults, the reader that collects all errors instead of stopping at the first, the JSON form
//! that travels to the worker, and the table that `--help` prints. Non-goal: a general serialisation format.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;

/// One line of the table that [`Setting::describe`] makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// Dotted name, e.g. `worker.timeouts.connect`.
    pub name: String,
    /// What holds when nothing is said.
    pub default: String,
    /// Unit of the value.
    pub unit: &'static str,
    /// Allowed values, empty when the type says it all.
    pub range: String,
    /// What it does.
    pub sentence: String,
}

/// Everything that was wrong with a configuration, each line naming its field.
#[derive(Debug, Default)]
pub struct Problems {
    lines: Vec<String>,
    /// Whether a name that nobody knows is a problem: yes in an operator's file, no between two versions of us.
    strict_names: bool,
}

impl Problems {
    /// An empty list; `strict_names` makes unknown names problems.
    #[must_use]
    pub fn new(strict_names: bool) -> Self {
        Self { lines: Vec::new(), strict_names }
    }

    /// Notes a problem of the field `path`.
    pub fn add(&mut self, path: &str, what: impl std::fmt::Display) {
        let path = if path.is_empty() { "configuration" } else { path };
        self.lines.push(format!("{path}: {what}"));
    }

    /// Notes those keys of `object` that are not in `known`.
    pub fn unknown(&mut self, path: &str, object: &serde_json::Map<String, Value>, known: &[&str]) {
        if !self.strict_names {
            return;
        }
        let known: BTreeSet<&str> = known.iter().copied().collect();
        for key in object.keys().filter(|k| !known.contains(k.as_str())) {
            let mut names: Vec<&str> = known.iter().copied().collect();
            names.sort_unstable();
            self.add(&join(path, key), format_args!("no such setting; here are: {}", names.join(", ")));
        }
    }

    /// The problems in the order in which they were found.
    #[must_use]
    pub fn into_lines(self) -> Vec<String> {
        self.lines
    }
}

/// `a.b` from `a` and `b`.
#[must_use]
pub fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// A value that can stand in a configuration.
pub trait Setting: Sized {
    /// Reads the value, or notes why not.
    fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self>;
    /// The JSON form, which [`Self::read`] understands.
    fn to_json(&self) -> Value;
    /// Lines about the fields below `path`; a plain value has none.
    fn describe(&self, _path: &str, _lines: &mut Vec<Described>) {}
    /// How the value looks in a message.
    fn show(&self) -> String {
        match self.to_json() {
            Value::String(s) => s,
            Value::Null => "none".to_owned(),
            other => other.to_string(),
        }
    }
}

impl Setting for bool {
    fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self> {
        let read = match value {
            Value::Bool(b) => Some(*b),
            Value::String(s) => s.parse().ok(),
            _ => None,
        };
        if read.is_none() {
            problems.add(path, format_args!("{value} is neither true nor false"));
        }
        read
    }
    fn to_json(&self) -> Value {
        Value::Bool(*self)
    }
}

macro_rules! integer {
    ($($t:ty),*) => {$(
        impl Setting for $t {
            fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self> {
                let read = match value {
                    Value::Number(n) => n.as_u64().and_then(|n| <$t>::try_from(n).ok()),
                    Value::String(s) => s.parse().ok(),
                    _ => None,
                };
                if read.is_none() {
                    problems.add(path, format_args!("{value} is not a whole number from 0 to {}", <$t>::MAX));
                }
                read
            }
            fn to_json(&self) -> Value {
                Value::from(*self)
            }
        }
    )*};
}
integer!(u16, u32, u64, usize);

impl Setting for f64 {
    fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self> {
        let read = match value {
            Value::Number(n) => n.as_f64(),
            Value::String(s) => s.parse().ok(),
            _ => None,
        }
        .filter(|f: &f64| f.is_finite());
        if read.is_none() {
            problems.add(path, format_args!("{value} is not a number"));
        }
        read
    }
    fn to_json(&self) -> Value {
        Value::from(*self)
    }
}

impl Setting for String {
    fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self> {
        match value {
            Value::String(s) => Some(s.clone()),
            Value::Number(n) => Some(n.to_string()),
            other => {
                problems.add(path, format_args!("{other} is not text"));
                None
            }
        }
    }
    fn to_json(&self) -> Value {
        Value::String(self.clone())
    }
}

impl Setting for PathBuf {
    fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self> {
        match value {
            Value::String(s) if s.starts_with('/') => Some(Self::from(s)),
            other => {
                problems.add(path, format_args!("{other} is not an absolute path"));
                None
            }
        }
    }
    fn to_json(&self) -> Value {
        Value::String(self.to_string_lossy().into_owned())
    }
}

impl Setting for SocketAddr {
    fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self> {
        let read = value.as_str().and_then(|s| s.parse().ok());
        if read.is_none() {
            problems
                .add(path, format_args!("{value} is not an address with a port, such as 127.0.0.1:15020"));
        }
        read
    }
    fn to_json(&self) -> Value {
        Value::String(self.to_string())
    }
}

impl Setting for IpNet {
    fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self> {
        let read = value.as_str().and_then(|s| s.parse::<Self>().ok());
        if read.is_none() {
            problems.add(path, format_args!("{value} is not a CIDR, such as 192.0.2.0/24"));
        }
        read.map(|net| net.trunc())
    }
    fn to_json(&self) -> Value {
        Value::String(self.to_string())
    }
}

impl<T: Setting> Setting for Option<T> {
    fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self> {
        match value {
            Value::Null => Some(None),
            value => T::read(value, path, problems).map(Some),
        }
    }
    fn to_json(&self) -> Value {
        self.as_ref().map_or(Value::Null, T::to_json)
    }
}

impl<T: Setting> Setting for Vec<T> {
    fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self> {
        match value {
            Value::Array(items) => items
                .iter()
                .enumerate()
                .map(|(i, item)| T::read(item, &format!("{path}[{i}]"), problems))
                .collect::<Vec<_>>()
                .into_iter()
                .collect(),
            Value::String(s) => Self::read(
                &Value::Array(
                    s.split(',').filter(|s| !s.trim().is_empty()).map(|s| s.trim().into()).collect(),
                ),
                path,
                problems,
            ),
            other => {
                problems.add(path, format_args!("{other} is not a list"));
                None
            }
        }
    }
    fn to_json(&self) -> Value {
        Value::Array(self.iter().map(T::to_json).collect())
    }
}

const UNITS: [(&str, u64); 5] =
    [("ms", 1_000_000), ("us", 1_000), ("s", 1_000_000_000), ("m", 60_000_000_000), ("h", 3_600_000_000_000)];

/// Reads `250ms`, `5s`, `1h30m` or a plain `0`.
fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut nanos: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let count: u64 = rest.get(..digits)?.parse().ok()?;
        rest = rest.get(digits..)?;
        let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let unit = rest.get(..letters)?;
        let (_, scale) = UNITS.iter().find(|(name, _)| *name == unit)?;
        nanos = nanos.checked_add(count.checked_mul(*scale)?)?;
        rest = rest.get(letters..)?;
    }
    (!text.is_empty()).then(|| Duration::from_nanos(nanos))
}

fn show_duration(duration: Duration) -> String {
    let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    if nanos == 0 {
        return "0".to_owned();
    }
    for unit in ["h", "m", "s", "ms", "us"] {
        let scale = UNITS.iter().find(|(name, _)| *name == unit).map_or(1, |(_, scale)| *scale);
        if nanos.is_multiple_of(scale) {
            return format!("{}{unit}", nanos / scale);
        }
    }
    format!("{}us", nanos / 1_000)
}

impl Setting for Duration {
    fn read(value: &Value, path: &str, problems: &mut Problems) -> Option<Self> {
        let read = match value {
            Value::String(s) => parse_duration(s),
            Value::Number(n) if n.as_u64() == Some(0) => Some(Self::ZERO),
            _ => None,
        };
        if read.is_none() {
            problems.add(path, format_args!("{value} is not a duration such as 250ms, 5s, 10m or 1h"));
        }
        read
    }
    fn to_json(&self) -> Value {
        Value::String(show_duration(*self))
    }
}

/// Declares a [`Setting`] with a closed set of names.
macro_rules! choice {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$vmeta])* $variant,)+ }

        impl $name {
            /// As it is written.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl $crate::config::schema::Setting for $name {
            fn read(
                value: &serde_json::Value, path: &str, problems: &mut $crate::config::schema::Problems,
            ) -> Option<Self> {
                match value.as_str() {
                    $(Some($text) => Some(Self::$variant),)+
                    _ => {
                        problems.add(path, format_args!("{value} is not one of {}", [$($text),+].join(", ")));
                        None
                    }
                }
            }
            fn to_json(&self) -> serde_json::Value {
                match self { $(Self::$variant => serde_json::Value::from($text),)+ }
            }
        }
    };
}

/// Declares a section. A field is `name: type = default, "unit"[, min..=max];`, or `name: type;` for a section below.
macro_rules! settings {
    (
        $(#[doc = $sdoc:literal])+
        pub struct $name:ident {
            $($(#[doc = $doc:literal])+ $field:ident: $type:ty $(= $default:expr, $unit:literal $(, $min:expr => $max:expr)?)?;)+
        }
    ) => {
        $(#[doc = $sdoc])+
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name { $($(#[doc = $doc])+ pub $field: $type,)+ }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: settings!(@default $type $(, $default)?),)+ }
            }
        }

        impl $crate::config::schema::Setting for $name {
            fn read(
                value: &serde_json::Value, path: &str, problems: &mut $crate::config::schema::Problems,
            ) -> Option<Self> {
                use $crate::config::schema::join;
                let mut section = Self::default();
                let object = match value {
                    serde_json::Value::Object(object) => object,
                    // An empty section in YAML.
                    serde_json::Value::Null => return Some(section),
                    other => {
                        problems.add(path, format_args!("{other} is not a section with settings"));
                        return None;
                    }
                };
                problems.unknown(path, object, &[$(stringify!($field)),+]);
                $(
                    if let Some(value) = object.get(stringify!($field)) {
                        let path = join(path, stringify!($field));
                        if let Some(read) = <$type as $crate::config::schema::Setting>::read(value, &path, problems) {
                            $($(
                                let (min, max): ($type, $type) = ($min, $max);
                                if !(min..=max).contains(&read) {
                                    problems.add(&path, format_args!(
                                        "{} is out of range, {} to {} is allowed ({})",
                                        read.show(), min.show(), max.show(), $unit,
                                    ));
                                }
                            )?)?
                            section.$field = read;
                        }
                    }
                )+
                Some(section)
            }

            fn to_json(&self) -> serde_json::Value {
                let mut object = serde_json::Map::new();
                $(object.insert(
                    stringify!($field).to_owned(),
                    <$type as $crate::config::schema::Setting>::to_json(&self.$field),
                );)+
                serde_json::Value::Object(object)
            }

            fn describe(&self, path: &str, lines: &mut Vec<$crate::config::schema::Described>) {
                $(
                    let name = $crate::config::schema::join(path, stringify!($field));
                    settings!(@describe self, $field, $type, name, lines, concat!($($doc),+) $(, $unit $(, $min, $max)?)?);
                )+
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                $crate::config::schema::Setting::to_json(self).serialize(serializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let value = serde_json::Value::deserialize(deserializer)?;
                // Names that this version does not know come from a newer agent and change nothing.
                let mut problems = $crate::config::schema::Problems::new(false);
                let read = <Self as $crate::config::schema::Setting>::read(&value, "", &mut problems);
                let lines = problems.into_lines();
                match read {
                    Some(read) if lines.is_empty() => Ok(read),
                    _ => Err(serde::de::Error::custom(lines.join("; "))),
                }
            }
        }
    };
    (@default $type:ty) => { <$type>::default() };
    (@default $type:ty, $default:expr) => { $default };
    (@describe $self:ident, $field:ident, $type:ty, $name:ident, $lines:ident, $doc:expr) => {
        $crate::config::schema::Setting::describe(&$self.$field, &$name, $lines);
    };
    (@describe $self:ident, $field:ident, $type:ty, $name:ident, $lines:ident, $doc:expr, $unit:literal) => {
        $lines.push($crate::config::schema::Described {
            name: $name,
            default: $crate::config::schema::Setting::show(&$self.$field),
            unit: $unit,
            range: String::new(),
            sentence: $doc.trim().to_owned(),
        });
    };
    (@describe $self:ident, $field:ident, $type:ty, $name:ident, $lines:ident, $doc:expr, $unit:literal, $min:expr, $max:expr) => {
        let (min, max): ($type, $type) = ($min, $max);
        $lines.push($crate::config::schema::Described {
            name: $name,
            default: $crate::config::schema::Setting::show(&$self.$field),
            unit: $unit,
            range: format!(
                "{} to {}",
                $crate::config::schema::Setting::show(&min), $crate::config::schema::Setting::show(&max),
            ),
            sentence: $doc.trim().to_owned(),
        });
    };
}

pub(super) use {choice, settings};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_survive_a_round_trip() {
        for (text, nanos) in [
            ("0", 0),
            ("250ms", 250_000_000),
            ("5s", 5_000_000_000),
            ("90s", 90_000_000_000),
            ("1h", 3_600_000_000_000),
        ] {
            let duration = parse_duration(text).unwrap();
            assert_eq!(duration.as_nanos(), nanos, "{text}");
            assert_eq!(parse_duration(&show_duration(duration)), Some(duration), "{text}");
        }
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        for bad in ["", "5", "s", "5x", "-5s", "1.5s", "5s ", "99999999999999h"] {
            assert_eq!(parse_duration(bad), None, "{bad:?}");
        }
    }
}
