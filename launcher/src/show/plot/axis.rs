//! Range, ticks and labels of an axis. Pure.
//!
//! - LNC-T1: ticks are 1, 2 or 5 times a power of ten apart, and each lies at the value of its label.
//! - LNC-T2: no two ticks have the same label.
//! - LNC-T3: ticks of a step axis are whole numbers.

use std::ops::Range;

/// Maximum number of ticks of an axis.
const MOST: f64 = 8.0;
/// A curve with a smaller relative spread is drawn as a constant, so that labels stay short.
const FLAT: f64 = 1e-6;
/// Values are clamped to this, so that a difference of two values does not overflow.
const GREATEST: f64 = 1e300;
/// Minimum length of an axis, far enough from underflow for exact ticks.
const SHORTEST: f64 = 1e-290;
/// Labels have no exponent if the largest tick is in this range.
const PLAIN: Range<f64> = 1e-4..1e6;

/// An axis.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    /// First and last value.
    pub(super) range: Range<f64>,
    /// In ascending order.
    pub(super) ticks: Vec<f64>,
    /// Power of ten of the tick distance.
    power: i32,
    /// Common exponent of all labels; `None` if labels have no exponent.
    exponent: Option<i32>,
}

impl Axis {
    /// Axis for the values of curves.
    pub(super) fn of_values(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = extent(values).unwrap_or((0.0, 1.0));
        let size = low.abs().max(high.abs());
        let (low, high) = match high - low > (FLAT * size).max(SHORTEST) {
            true => (low, high),
            // A constant gets room on both sides.
            false if size > SHORTEST => (low - 0.1 * size, high + 0.1 * size),
            false => (-1.0, 1.0),
        };
        let margin = 0.05 * (high - low);
        Self::over(low - margin..high + margin, f64::MIN_POSITIVE)
    }

    /// Axis for the steps of a run.
    pub(super) fn of_steps(steps: impl Iterator<Item = f64>) -> Self {
        let (low, high) = extent(steps).unwrap_or((0.0, 1.0));
        let margin = if high > low { 0.02 * (high - low) } else { 0.5 };
        let axis = Self::over(low..high, 1.0);
        Self { range: low - margin..high + margin, exponent: None, ..axis }
    }

    /// Axis over `range` with ticks at least `least` apart.
    fn over(range: Range<f64>, least: f64) -> Self {
        let (digit, power) = distance(((range.end - range.start) / (MOST - 1.0)).max(least));
        let distance = scaled(digit, power);
        let first = (range.start / distance).ceil();
        let count = ((range.end / distance).floor() - first).clamp(0.0, 2.0 * MOST) as u32;
        let ticks: Vec<f64> =
            (0..=count).map(|index| scaled((first + f64::from(index)) * digit, power)).collect();
        let size = ticks.iter().fold(0.0_f64, |size, tick| size.max(tick.abs()));
        let exponent = (size > 0.0 && !PLAIN.contains(&size)).then(|| size.log10().floor() as i32);
        Self { range, ticks, power, exponent }
    }

    /// Label of a tick, with enough digits to differ from the next tick's.
    pub(super) fn label(&self, tick: f64) -> String {
        // Also for -0.0.
        if tick == 0.0 {
            return "0".into();
        }
        match self.exponent {
            None => format!("{tick:.*}", (-self.power).max(0) as usize),
            Some(exponent) => {
                let digits = (exponent - self.power).max(0) as usize;
                format!("{:.digits$}e{exponent}", scaled(tick, -exponent))
            }
        }
    }
}

/// Minimum and maximum of the finite values, clamped to [`GREATEST`]; `None` if there are none.
fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let values = values.filter(|value| value.is_finite()).map(|value| value.clamp(-GREATEST, GREATEST));
    values.fold(None, |extent, value| match extent {
        None => Some((value, value)),
        Some((low, high)) => Some((low.min(value), high.max(value))),
    })
}

/// The smallest of 1, 2 and 5 times a power of ten that is at least `least`: the digit and the power.
fn distance(least: f64) -> (f64, i32) {
    let power = least.log10().floor() as i32;
    let digit = scaled(least, -power);
    // Tolerate a rounding error just above a digit.
    match [1.0, 2.0, 5.0].into_iter().find(|round| digit <= round * (1.0 + 1e-9)) {
        Some(round) => (round, power),
        None => (1.0, power + 1),
    }
}

/// `number * 10^power`. Divides if the power is negative, so that e.g. 3 and -1 give exactly the float 0.3.
fn scaled(number: f64, power: i32) -> f64 {
    match power {
        // In two steps: 10^power alone may overflow.
        ..-300 => number / 10_f64.powi(300) / 10_f64.powi(-power - 300),
        -300..0 => number / 10_f64.powi(-power),
        0..=300 => number * 10_f64.powi(power),
        _ => number * 10_f64.powi(300) * 10_f64.powi(power - 300),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|tick| axis.label(*tick)).collect()
    }

    fn of_values(values: &[f64]) -> Vec<String> {
        labels(&Axis::of_values(values.iter().copied()))
    }

    fn of_steps(steps: &[f64]) -> Vec<String> {
        labels(&Axis::of_steps(steps.iter().copied()))
    }

    #[test]
    fn ticks_are_round_numbers_with_the_digits_they_need() {
        assert_eq!(of_values(&[0.0, 1.0]), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(of_values(&[0.31, 0.69]), ["0.3", "0.4", "0.5", "0.6", "0.7"]);
        assert_eq!(of_values(&[-12.0, 3.0]), ["-10", "-5", "0"]);
        assert_eq!(of_values(&[0.59310, 0.59318]), ["0.59310", "0.59312", "0.59314", "0.59316", "0.59318"]);
        assert_eq!(of_values(&[0.0, 5e-7]), ["0", "1e-7", "2e-7", "3e-7", "4e-7", "5e-7"]);
        assert_eq!(of_values(&[2e9, 2.5e9]), ["2.0e9", "2.1e9", "2.2e9", "2.3e9", "2.4e9", "2.5e9"]);
    }

    #[test]
    fn ticks_of_steps_are_whole_numbers() {
        assert_eq!(of_steps(&[1.0]), ["1"]);
        assert_eq!(of_steps(&[0.0, 1.0]), ["0", "1"]);
        assert_eq!(of_steps(&[1.0, 2.0, 3.0]), ["1", "2", "3"]);
        assert_eq!(of_steps(&[1.0, 20.0]), ["5", "10", "15", "20"]);
        assert_eq!(of_steps(&[0.0, 5000.0]), ["0", "1000", "2000", "3000", "4000", "5000"]);
        assert_eq!(of_steps(&[990_001.0, 990_002.0]), ["990001", "990002"]);
    }

    #[test]
    fn a_constant_curve_still_has_a_range() {
        for value in [2.0, -3e-9, 0.0, 1e300, f64::MAX, f64::MIN_POSITIVE, 1e-300] {
            let axis = Axis::of_values([value, value].into_iter());
            let shown = value.clamp(-GREATEST, GREATEST);
            assert!(axis.range.start < shown && shown < axis.range.end, "{value}: {axis:?}");
            assert!(axis.ticks.len() >= 2, "{value}: {axis:?}");
        }
        assert!(Axis::of_values([f64::NAN, f64::INFINITY].into_iter()).range.contains(&0.5));
        assert!(Axis::of_values(std::iter::empty()).range.contains(&0.5));
    }

    proptest! {
        #[test]
        fn every_tick_lies_on_the_axis_and_where_its_label_says(
            low in proptest::num::f64::NORMAL | proptest::num::f64::ZERO,
            span in proptest::num::f64::POSITIVE | proptest::num::f64::ZERO,
        ) {
            let axis = Axis::of_values([low, low + span].into_iter());
            let slack = 1e-9 * (axis.range.end - axis.range.start);
            prop_assert!((1..=16).contains(&axis.ticks.len()), "{axis:?}");
            for tick in &axis.ticks {
                prop_assert!(axis.range.start - slack <= *tick && *tick <= axis.range.end + slack, "{axis:?}");
                let label: f64 = axis.label(*tick).parse().unwrap();
                prop_assert!((label - tick).abs() <= slack, "{label} {tick}");
            }
            let mut labels = labels(&axis);
            let count = labels.len();
            prop_assert!(labels.iter().all(|label| label.len() <= 16), "{labels:?}");
            labels.dedup();
            prop_assert_eq!(labels.len(), count);
        }

        #[test]
        fn steps_of_any_run_have_whole_ticks(first in 0_u32..2_000_000_000, more in 0_u32..2_000_000_000) {
            let axis = Axis::of_steps([first, first + more].into_iter().map(f64::from));
            let mut labels = labels(&axis);
            prop_assert!(!labels.is_empty() && labels.len() <= 8, "{labels:?}");
            for label in &labels {
                let step: u64 = label.parse().unwrap();
                prop_assert!((u64::from(first)..=u64::from(first + more)).contains(&step), "{step}");
            }
            let count = labels.len();
            labels.dedup();
            prop_assert_eq!(labels.len(), count);
        }
    }
}
