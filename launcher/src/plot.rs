//! `metrics.svg`: how the run went, at a glance.

use std::ops::Range;
use std::path::{Path, PathBuf};

use dyad_proto::{Fault, safe_file};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::rows::{Row, read, series};

const SIZE: (u32, u32) = (1200, 840);
const FONT: &str = "sans-serif";
/// Okabe and Ito's colours, told apart by everyone.
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(204, 121, 167)];

/// One picture: a title and the curves in it.
struct Panel {
    title: &'static str,
    curves: Vec<Curve>,
}

struct Curve {
    label: &'static str,
    points: Vec<(f64, f64)>,
    /// Few and apart: drawn with marks.
    evaluated: bool,
}

/// Draws what the metrics files hold; `None` when there is too little to draw.
pub fn draw(output_dir: &Path) -> Result<Option<PathBuf>, Fault> {
    let steps = read(&output_dir.join("metrics.jsonl"));
    let evaluations = read(&output_dir.join("eval_metrics.jsonl"));
    if steps.len() < 2 {
        return Ok(None);
    }
    let path = output_dir.join("metrics.svg");
    let panels = panels(&steps, &evaluations);
    let drawn = picture(&panels).and_then(|svg| Ok(safe_file::write(&path, svg.as_bytes())?));
    drawn.map_err(|error| Fault::failed(format!("cannot draw {}: {error}", path.display())))?;
    Ok(Some(path))
}

fn panels(steps: &[Row], evaluations: &[Row]) -> Vec<Panel> {
    let trained = |label, name: &str| Curve { label, points: series(steps, name), evaluated: false };
    let evaluated = |label, name: &str| Curve { label, points: series(evaluations, name), evaluated: true };
    let loss = Panel {
        title: "loss",
        curves: vec![trained("training", "loss"), evaluated("held-out", "eval_loss")],
    };
    if steps.iter().any(|row| row.contains_key("rewards/margins")) {
        return vec![
            loss,
            Panel {
                title: "reward accuracy",
                curves: vec![
                    trained("training", "rewards/accuracies"),
                    evaluated("held-out", "eval_rewards/accuracies"),
                ],
            },
            Panel {
                title: "rewards",
                curves: vec![
                    trained("preferred", "rewards/chosen"),
                    trained("other", "rewards/rejected"),
                    trained("margin", "rewards/margins"),
                    evaluated("margin, held-out", "eval_rewards/margins"),
                ],
            },
            Panel {
                title: "log-probability of a completion (nats)",
                curves: vec![trained("preferred", "logps/chosen"), trained("other", "logps/rejected")],
            },
        ];
    }
    vec![
        loss,
        Panel {
            title: "log-probability of the preferred output (nats)",
            curves: vec![trained("training", "logps/chosen"), evaluated("held-out", "eval_logps/chosen")],
        },
        Panel { title: "gradient norm", curves: vec![trained("before clipping", "grad_norm")] },
        Panel { title: "learning rate", curves: vec![trained("AdamW", "learning_rate")] },
    ]
}

type Drawn<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn picture(panels: &[Panel]) -> Drawn<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, panel) in root.split_evenly((2, 2)).iter().zip(panels) {
            draw_panel(area, panel)?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn draw_panel(area: &DrawingArea<SVGBackend<'_>, Shift>, panel: &Panel) -> Drawn {
    let all = || panel.curves.iter().flat_map(|curve| &curve.points);
    let (x, y) = (range(all().map(|point| point.0), 0.0), range(all().map(|point| point.1), 0.05));
    let legend = free_corner(all(), (&x, &y));
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, (FONT, 20))
        .margin(14)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .axis_style(RGBColor(120, 120, 120))
        .label_style((FONT, 14))
        .x_desc("step")
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| label(*value))
        .draw()?;
    for (curve, colour) in panel.curves.iter().zip(COLOURS).filter(|(curve, _)| !curve.points.is_empty()) {
        let line = if curve.evaluated { colour.stroke_width(2) } else { colour.mix(0.7).stroke_width(2) };
        let drawn = chart.draw_series(LineSeries::new(curve.points.iter().copied(), line))?;
        drawn
            .label(curve.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
        if curve.evaluated {
            chart.draw_series(curve.points.iter().map(|&point| Circle::new(point, 4, colour.filled())))?;
        }
    }
    chart
        .configure_series_labels()
        .position(legend)
        .background_style(WHITE.mix(0.8))
        .label_font((FONT, 14))
        .draw()?;
    Ok(())
}

/// The corner in which fewest points would be hidden.
fn free_corner<'p>(
    points: impl Iterator<Item = &'p (f64, f64)>,
    (x, y): (&Range<f64>, &Range<f64>),
) -> SeriesLabelPosition {
    use SeriesLabelPosition::{LowerLeft, LowerRight, UpperLeft, UpperRight};
    let share = |value: f64, range: &Range<f64>| (value - range.start) / (range.end - range.start);
    let mut hidden = [(UpperRight, 0), (LowerRight, 0), (UpperLeft, 0), (LowerLeft, 0)];
    for (across, up) in points.map(|point| (share(point.0, x), share(point.1, y))) {
        let [upper_right, lower_right, upper_left, lower_left] = &mut hidden;
        match (across > 0.6, across < 0.4, up > 0.65, up < 0.35) {
            (true, _, true, _) => upper_right.1 += 1,
            (true, _, _, true) => lower_right.1 += 1,
            (_, true, true, _) => upper_left.1 += 1,
            (_, true, _, true) => lower_left.1 += 1,
            _ => {}
        }
    }
    hidden.into_iter().min_by_key(|(_, count)| *count).map_or(UpperRight, |(corner, _)| corner)
}

/// From the least to the greatest value, widened by a share on both sides.
fn range(values: impl Iterator<Item = f64>, margin: f64) -> Range<f64> {
    let (low, high) = values
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return 0.0..1.0;
    }
    let spread = if high > low { high - low } else { low.abs().max(1e-6) };
    let margin = if high > low { margin } else { margin.max(0.05) };
    low - margin * spread..high + margin * spread
}

/// Three significant digits, in scientific notation where plain digits would be long.
fn label(value: f64) -> String {
    match value.abs() {
        size if size < 1e-12 => "0".into(),
        size if !(1e-3..1e5).contains(&size) => format!("{value:.1e}"),
        size if size < 1.0 => format!("{value:.3}"),
        size if size < 100.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_curve_still_has_a_range() {
        let range = range([2.0, 2.0].into_iter(), 0.05);
        assert!(range.start < 2.0 && range.end > 2.0);
        assert_eq!(super::range(std::iter::empty(), 0.05), 0.0..1.0);
    }

    #[test]
    fn the_legend_hides_as_little_as_possible() {
        let corner = |curve: fn(f64) -> f64| {
            let points: Vec<(f64, f64)> =
                (0..=10).map(|at| f64::from(at) / 10.0).map(|at| (at, curve(at))).collect();
            format!("{:?}", free_corner(points.iter(), (&(0.0..1.0), &(0.0..1.0))))
        };
        assert_eq!(corner(|x| (1.0 - x).powi(3)), "UpperRight");
        assert_eq!(corner(|x| 1.0 - (1.0 - x).powi(3)), "LowerRight");
        assert_eq!(corner(|x| if x < 0.5 { 0.5 } else { (x * 10.0).round() % 2.0 }), "UpperLeft");
    }

    #[test]
    fn every_curve_of_a_preference_run_is_in_the_picture() {
        let dir = tempfile::tempdir().unwrap();
        let row = |step: u32| {
            format!(
                "{{\"step\":{step},\"loss\":0.{step},\"rewards/chosen\":0.1,\"rewards/rejected\":-0.1,\"rewards/margins\":0.2,\"rewards/accuracies\":1.0,\"logps/chosen\":-9.0,\"logps/rejected\":-12.0}}\n"
            )
        };
        std::fs::write(dir.path().join("metrics.jsonl"), row(1) + &row(2) + &row(3)).unwrap();
        let svg = std::fs::read_to_string(draw(dir.path()).unwrap().unwrap()).unwrap();
        for text in ["loss", "reward accuracy", "rewards", "log-probability", "preferred", "margin", "step"] {
            assert!(svg.contains(text), "no {text}");
        }
        assert!(svg.matches("<polyline").count() >= 7);
    }
}
