//! Prometheus text format, version 0.0.4.

use std::fmt::Write;

use super::metric::Histogram;

/// `Content-Type` of what is written here.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Appends a label value, escaped.
pub(super) fn escape(out: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
}

/// Appends `name="value"`, after a comma where it is not the first.
pub(super) fn label(out: &mut String, name: &str, value: &str) {
    if !out.is_empty() && !out.ends_with(',') {
        out.push(',');
    }
    out.push_str(name);
    out.push_str("=\"");
    escape(out, value);
    out.push('"');
}

/// Label text made of static names and values.
pub(super) fn labels(pairs: &[(&str, &str)]) -> String {
    let mut out = String::new();
    for (name, value) in pairs {
        label(&mut out, name, value);
    }
    out
}

/// Begins a family.
pub(super) fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Appends one sample; `labels` is label text without braces, maybe empty.
pub(super) fn sample(out: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    out.push_str(name);
    if !labels.is_empty() {
        out.push('{');
        out.push_str(labels);
        out.push('}');
    }
    let _ = writeln!(out, " {value}");
}

/// Appends the samples of one histogram.
pub(super) fn histogram(out: &mut String, name: &str, labels: &str, histogram: &Histogram) {
    let counts = histogram.cumulative();
    let comma = if labels.is_empty() { "" } else { "," };
    for (le, count) in histogram.bounds.le.iter().chain(["+Inf"].iter()).zip(&counts) {
        let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{le}\"}} {count}");
    }
    let count = counts.last().copied().unwrap_or_default();
    // The sum may be of a few observations more or less than the counts: they are read one after the other.
    let (sum, samples) = (format!("{name}_sum"), format!("{name}_count"));
    sample(out, &sum, labels, histogram.sum());
    sample(out, &samples, labels, count);
}

/// A strict reader of the format, for tests.
#[cfg(test)]
pub(super) mod parse {
    use std::collections::{BTreeMap, HashSet};

    /// Labels of a sample, and its value.
    pub(crate) type Samples = BTreeMap<(String, BTreeMap<String, String>), f64>;

    fn name(text: &str) -> &str {
        let end =
            text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':')).unwrap_or(text.len());
        assert!(end > 0 && !text.starts_with(|c: char| c.is_ascii_digit()), "a name begins {text:?}");
        &text[..end]
    }

    fn labels(mut text: &str) -> (BTreeMap<String, String>, &str) {
        let mut found = BTreeMap::new();
        loop {
            let key = name(text);
            text = text[key.len()..].strip_prefix("=\"").expect("=\" after a label's name");
            let mut value = String::new();
            let mut chars = text.char_indices();
            let end = loop {
                match chars.next().expect("an end of the label value") {
                    (at, '"') => break at,
                    (_, '\\') => value.push(match chars.next().expect("something after \\").1 {
                        'n' => '\n',
                        c @ ('\\' | '"') => c,
                        c => panic!("\\{c} is no escape"),
                    }),
                    (_, c) => value.push(c),
                }
            };
            assert!(found.insert(key.to_owned(), value).is_none(), "label {key} is there twice");
            text = &text[end + 1..];
            match text.as_bytes()[0] {
                b',' => text = &text[1..],
                b'}' => return (found, &text[1..]),
                c => panic!("{} after a label", c as char),
            }
        }
    }

    /// Reads a whole exposition; panics at anything that is not right.
    pub(crate) fn parse(text: &str) -> Samples {
        assert!(text.ends_with('\n'));
        let mut samples = Samples::new();
        let mut families = HashSet::new();
        let (mut current, mut kind, mut helped) = (String::new(), String::new(), String::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a help text");
                assert!(!help.is_empty() && families.insert(name.to_owned()), "{name} is there twice");
                helped = name.to_owned();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, k) = rest.split_once(' ').expect("a type");
                assert_eq!(name, helped, "HELP comes first");
                assert!(["counter", "gauge", "histogram"].contains(&k), "{k}");
                assert_eq!(k == "counter", name.ends_with("_total"), "{name} is a {k}");
                (current, kind) = (name.to_owned(), k.to_owned());
            } else {
                let metric = name(line);
                let suffix =
                    metric.strip_prefix(&current).unwrap_or_else(|| panic!("{metric} is in {current}"));
                let fits = if kind == "histogram" {
                    ["_bucket", "_sum", "_count"].contains(&suffix)
                } else {
                    suffix.is_empty()
                };
                assert!(fits, "{metric} is in the {kind} {current}");
                let rest = &line[metric.len()..];
                let (found, rest) = match rest.strip_prefix('{') {
                    Some(inner) => labels(inner),
                    None => (BTreeMap::new(), rest),
                };
                let value: f64 = rest.strip_prefix(' ').expect("a space").parse().expect("a number");
                let key = (metric.to_owned(), found);
                assert!(!samples.contains_key(&key), "{key:?} is there twice");
                samples.insert(key, value);
            }
        }
        check_histograms(&samples);
        samples
    }

    fn check_histograms(samples: &Samples) {
        let mut buckets: BTreeMap<_, Vec<(f64, f64)>> = BTreeMap::new();
        for ((name, labels), value) in samples {
            if let Some(base) = name.strip_suffix("_bucket") {
                let mut labels = labels.clone();
                let le = labels.remove("le").expect("le").parse().expect("le is a number");
                buckets.entry((base, labels)).or_default().push((le, *value));
            }
        }
        for ((base, labels), mut buckets) in buckets {
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(buckets.windows(2).all(|w| w[0].1 <= w[1].1), "{base} is not cumulative");
            let count = samples.get(&(format!("{base}_count"), labels.clone()));
            assert_eq!(buckets.last(), count.map(|c| (f64::INFINITY, *c)).as_ref(), "{base}");
            assert!(samples.contains_key(&(format!("{base}_sum"), labels)), "{base} has no sum");
        }
    }

    /// The value of the one sample with this name and (at least) these labels.
    pub(crate) fn value(samples: &Samples, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let mut found = samples.iter().filter(|((n, l), _)| {
            n == name && labels.iter().all(|(k, v)| l.get(*k).map(String::as_str) == Some(*v))
        });
        let first = found.next().map(|(_, v)| *v);
        assert!(found.next().is_none(), "{name} with {labels:?} is not unique");
        first
    }
}

#[cfg(test)]
mod tests {
    use super::super::metric::BYTES;
    use super::*;

    #[test]
    fn odd_label_values_survive() {
        let odd = "a\\b\"c\nd,e}f é";
        let mut out = String::new();
        family(&mut out, "odd_total", "counter", "An odd one.");
        sample(&mut out, "odd_total", &labels(&[("first", odd), ("second", "")]), 7);
        assert_eq!(
            parse::value(&parse::parse(&out), "odd_total", &[("first", odd), ("second", "")]),
            Some(7.0)
        );
    }

    #[test]
    fn a_histogram_is_cumulative_and_complete() {
        let h = Histogram::new(&BYTES);
        [1, 100, 101, 1 << 40].iter().for_each(|v| h.record(*v));
        let mut out = String::new();
        family(&mut out, "size_bytes", "histogram", "Sizes.");
        histogram(&mut out, "size_bytes", "", &h);
        histogram(&mut out, "size_bytes", &labels(&[("a", "b")]), &h);
        let samples = parse::parse(&out);
        assert_eq!(parse::value(&samples, "size_bytes_bucket", &[("a", "b"), ("le", "100")]), Some(2.0));
        assert_eq!(parse::value(&samples, "size_bytes_count", &[("a", "b")]), Some(4.0));
    }
}
