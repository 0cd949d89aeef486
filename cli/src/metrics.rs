//! Prometheus's text format, as far as the mesh's own endpoints write it.

pub(crate) use testbed::metrics::Sample;

/// All samples of a page. Lines that are none are left out: a page may be of a newer version.
pub(crate) fn parse(page: &str) -> Vec<Sample> {
    page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| Sample::read(line).ok()).collect()
}

/// The sum of all samples of this name; none when there is none.
pub(crate) fn sum(samples: &[Sample], name: &str) -> Option<f64> {
    samples.iter().filter(|s| s.name == name).map(|s| s.value).reduce(|a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_have_name_labels_and_value_and_everything_else_is_left_out() {
        let page = "# HELP a_total Things.\n# TYPE a_total counter\n\
                    a_total{x=\"1\",y=\"a \\\"b\\\" {c}, d\\\\\\n\"} 3\n\
                    a_total 4.5 1700000000\n\
                    broken{x=\"1\n\
                    nothing\n\
                    # EOF\n";
        let samples = parse(page);
        assert_eq!(samples.len(), 2);
        assert_eq!(samples[0].label("y"), "a \"b\" {c}, d\\\n");
        assert_eq!(samples[0].label("z"), "");
        assert_eq!(samples[1].value, 4.5);
        assert_eq!(sum(&samples, "a_total"), Some(7.5));
        assert_eq!(sum(&samples, "b_total"), None);
    }
}
