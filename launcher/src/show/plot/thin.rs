//! Thins out curves to the visible points, so that the plot of a million steps is as small as that of a thousand. Pure.

/// Parts of a curve's width. Each part keeps two points, which is about one per pixel.
const PARTS: usize = 400;

/// Keeps minimum and maximum of every part, in order, and both ends of the curve: outliers stay visible.
pub(super) fn thin(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if points.len() <= 2 * PARTS + 2 {
        return points;
    }
    let part = points.len().div_ceil(PARTS);
    let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
    let mut kept: Vec<(f64, f64)> = points.first().copied().into_iter().collect();
    for part in points.chunks(part) {
        let ends = part.iter().min_by(by_value).zip(part.iter().max_by(by_value));
        if let Some((least, greatest)) = ends {
            let (first, second) = if least.0 <= greatest.0 { (least, greatest) } else { (greatest, least) };
            kept.extend([*first, *second]);
        }
    }
    kept.extend(points.last());
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_keeps_its_ends_and_outliers() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|step| (f64::from(step), 1.0)).collect();
        points[54_321].1 = 9.0;
        points[54_322].1 = -9.0;
        let kept = thin(points.clone());
        assert!(kept.len() <= 2 * PARTS + 2, "{}", kept.len());
        assert!(kept.is_sorted_by(|a, b| a.0 <= b.0));
        for point in [points[0], points[54_321], points[54_322], points[99_999]] {
            assert!(kept.contains(&point), "{point:?}");
        }
    }

    #[test]
    fn a_short_curve_stays_as_it_is() {
        let points: Vec<(f64, f64)> = (0..802).map(|step| (f64::from(step), 0.0)).collect();
        assert_eq!(thin(points.clone()), points);
    }
}
