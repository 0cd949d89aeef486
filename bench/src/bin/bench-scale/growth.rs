//! How figures grow with the size of the cluster.

/// The exponent k of figure = c · size^k, by least squares of the logarithms: 0 does not grow, 1 grows as the cluster does,
/// more is worse. `None` with fewer than two sizes, or with figures of zero.
pub(crate) fn exponent(points: &[(f64, f64)]) -> Option<f64> {
    if points.len() < 2 || points.iter().any(|(x, y)| *x <= 0.0 || *y <= 0.0) {
        return None;
    }
    let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let n = logs.len() as f64;
    let (mean_x, mean_y) =
        (logs.iter().map(|l| l.0).sum::<f64>() / n, logs.iter().map(|l| l.1).sum::<f64>() / n);
    let spread: f64 = logs.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    let together: f64 = logs.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    (spread > 0.0).then(|| together / spread)
}

#[cfg(test)]
mod tests {
    use super::exponent;

    #[test]
    fn the_exponent_tells_constant_linear_and_square() {
        for k in [0.0, 1.0, 2.0] {
            let points: Vec<(f64, f64)> =
                [1e3, 3e3, 1e4, 3e4].into_iter().map(|x: f64| (x, 7.0 * x.powf(k))).collect();
            assert!((exponent(&points).unwrap() - k).abs() < 1e-9);
        }
        assert_eq!(exponent(&[(1.0, 1.0)]), None);
        assert_eq!(exponent(&[(1.0, 0.0), (2.0, 1.0)]), None);
    }
}
