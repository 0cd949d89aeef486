//! Prometheus's text format, as far as tests and the demo read it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// One line of an exposition.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Name of the series.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

impl Sample {
    /// A label's value, empty if it is not there.
    #[must_use]
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }

    /// Reads one line.
    ///
    /// # Errors
    /// Why it is not one.
    pub fn read(line: &str) -> Result<Self> {
        let end = line.find(['{', ' ']).context("no value")?;
        let (name, mut rest) = line.split_at(end);
        let mut labels = BTreeMap::new();
        if let Some(inside) = rest.strip_prefix('{') {
            rest = inside;
            loop {
                rest = rest.trim_start_matches([',', ' ']);
                if let Some(after) = rest.strip_prefix('}') {
                    rest = after;
                    break;
                }
                let (label, after) = rest.split_once("=\"").context("a label without a value")?;
                let (value, after) = quoted(after)?;
                labels.insert(label.trim().to_owned(), value);
                rest = after;
            }
        }
        // A time stamp or an exemplar may follow the value.
        let value = rest.split_whitespace().next().context("no value")?;
        let value = match value {
            "+Inf" => f64::INFINITY,
            "-Inf" => f64::NEG_INFINITY,
            number => number.parse().context("the value is not a number")?,
        };
        Ok(Self { name: name.to_owned(), labels, value })
    }
}

/// All samples of one or more scrapes.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// In the order they were read.
    pub samples: Vec<Sample>,
}

impl Metrics {
    /// Reads the text format.
    ///
    /// # Errors
    /// With the line that is not of that format.
    pub fn parse(text: &str) -> Result<Self> {
        let mut samples = Vec::new();
        for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
            samples.push(
                Sample::read(line)
                    .with_context(|| format!("not a line of Prometheus's text format: {line:?}"))?,
            );
        }
        Ok(Self { samples })
    }

    /// Adds another scrape's samples.
    pub fn add(&mut self, other: Self) {
        self.samples.extend(other.samples);
    }

    /// Samples of one name that have all of these labels.
    pub fn select<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |s| s.name == name && labels.iter().all(|(k, v)| s.label(k) == *v))
    }

    /// Sum over those samples; 0 if there is none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.select(name, labels).map(|s| s.value).sum()
    }
}

/// Reads up to the closing quote; returns the text and what follows.
fn quoted(text: &str) -> Result<(String, &str)> {
    let mut out = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((out, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, 'n')) => out.push('\n'),
                Some((_, c)) => out.push(c),
                None => break,
            },
            c => out.push(c),
        }
    }
    bail!("a quote is not closed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_with_quotes_braces_and_commas_are_read() {
        let m = Metrics::parse(
            "# HELP a b\n# TYPE a counter\na_total{x=\"1\",y=\"say \\\"hi\\\", {you}\\n\"} 3 1700000000\na_total{x=\"2\"} 4.5\nb 1\n",
        )
        .unwrap();
        assert_eq!(m.samples.len(), 3);
        assert_eq!(m.samples[0].label("y"), "say \"hi\", {you}\n");
        assert!((m.sum("a_total", &[]) - 7.5).abs() < f64::EPSILON);
        assert!((m.sum("a_total", &[("x", "2")]) - 4.5).abs() < f64::EPSILON);
        assert!(m.sum("c", &[]).abs() < f64::EPSILON);
    }

    #[test]
    fn a_line_that_is_no_sample_is_an_error() {
        for bad in ["a", "a{x=\"1} 3", "a{x} 3", "a three"] {
            assert!(Metrics::parse(bad).is_err(), "{bad:?} was read");
        }
    }
}
