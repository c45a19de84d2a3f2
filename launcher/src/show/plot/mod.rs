//! `metrics.svg`: the run's metrics as curves. The `plotters` crate draws curves and axes; this module places ticks, labels and
//! legends.

mod axis;
mod thin;

use std::ops::Range;
use std::path::{Path, PathBuf};

use dyad_proto::names::metric;
use dyad_proto::{Fault, safe_file};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::show::rows::{Row, read, series};
use axis::Axis;
use thin::thin;

/// Width and height of a panel in pixels.
const PANEL: (u32, u32) = (600, 280);
/// Panels side by side.
const COLUMNS: usize = 2;
/// Height of a panel's head in pixels: its title and, below that, the legend.
const HEAD: u32 = 52;
const FONT: &str = "sans-serif";
/// Okabe and Ito's palette, which colour-blind people can distinguish.
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(204, 121, 167)];
/// A curve with more points has no marks; they would hide the line.
const MARKS: usize = 60;

/// One picture: a title and the curves in it.
struct Panel {
    title: &'static str,
    curves: Vec<Curve>,
    /// Values that the axis always includes.
    shows: &'static [f64],
}

struct Curve {
    label: &'static str,
    points: Vec<(f64, f64)>,
    /// Values of evaluations, which are few: drawn with marks.
    evaluated: bool,
}

/// Draws the metrics files and returns the plot's path; `None` if there is nothing to draw yet.
pub fn draw(output_dir: &Path) -> Result<Option<PathBuf>, Fault> {
    let steps = read(&output_dir.join("metrics.jsonl"));
    let evaluations = read(&output_dir.join("eval_metrics.jsonl"));
    let panels = panels(&steps, &evaluations);
    if panels.is_empty() {
        return Ok(None);
    }
    let path = output_dir.join("metrics.svg");
    let drawn = picture(&panels).and_then(|svg| Ok(safe_file::write(&path, svg.as_bytes())?));
    drawn.map_err(|error| Fault::failed(format!("cannot draw {}: {error}", path.display())))?;
    Ok(Some(path))
}

/// Panels with at least one curve. Which metrics exist depends on the method, and on whether the reference model was computed.
fn panels(steps: &[Row], evaluations: &[Row]) -> Vec<Panel> {
    let trained = |label, name: &str| Curve { label, points: thin(series(steps, name)), evaluated: false };
    let held_out = |label, name: &str| {
        let points = thin(series(evaluations, &format!("eval_{name}")));
        Curve { label, points, evaluated: true }
    };
    let both = |name: &str| vec![trained("training", name), held_out("held-out", name)];
    let sides = |chosen: &str, rejected: &str| {
        vec![
            trained("chosen", chosen),
            trained("rejected", rejected),
            held_out("chosen, held-out", chosen),
            held_out("rejected, held-out", rejected),
        ]
    };
    let panels: [(&str, Vec<Curve>, &[f64]); 8] = [
        ("loss", both(metric::LOSS), &[]),
        ("reward accuracy", both(metric::REWARDS_ACCURACIES), &[0.0, 1.0]),
        ("rewards", sides(metric::REWARDS_CHOSEN, metric::REWARDS_REJECTED), &[]),
        ("reward margin", both(metric::REWARDS_MARGINS), &[]),
        ("log-probability of a completion (nats)", sides(metric::LOGPS_CHOSEN, metric::LOGPS_REJECTED), &[]),
        ("KL divergence from the reference (nats per token)", both(metric::KL), &[]),
        ("gradient norm before clipping", vec![trained("training", metric::GRAD_NORM)], &[]),
        ("learning rate", vec![trained("training", metric::LEARNING_RATE)], &[]),
    ];
    let panels = panels.into_iter().map(|(title, mut curves, shows)| {
        curves.retain(|curve| !curve.points.is_empty());
        Panel { title, curves, shows }
    });
    panels.filter(|panel| !panel.curves.is_empty()).collect()
}

type Drawn<T = ()> = Result<T, Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn picture(panels: &[Panel]) -> Drawn<String> {
    let rows = panels.len().div_ceil(COLUMNS);
    let size = (PANEL.0 * COLUMNS as u32, PANEL.1 * rows as u32);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, panel) in root.split_evenly((rows, COLUMNS)).iter().zip(panels) {
            let (head, chart) = area.split_vertically(HEAD);
            draw_head(&head, panel)?;
            draw_curves(&chart, panel)?;
        }
        root.present()?;
    }
    Ok(svg)
}

/// Draws title and legend above the axes, because a legend inside the chart would hide curves.
fn draw_head(area: &Area<'_>, panel: &Panel) -> Drawn {
    let style = |size: u32| TextStyle::from((FONT, size).into_font()).pos(Pos::new(HPos::Left, VPos::Center));
    area.draw(&Text::new(panel.title, (LEFT, 20), style(21)))?;
    let mut x = LEFT;
    for (curve, colour) in panel.curves.iter().zip(COLOURS) {
        area.draw(&PathElement::new([(x, 42), (x + 20, 42)], colour.stroke_width(3)))?;
        if curve.evaluated {
            area.draw(&Circle::new((x + 10, 42), 4, colour.filled()))?;
        }
        area.draw(&Text::new(curve.label, (x + 26, 42), style(16)))?;
        // The text's width depends on the viewer's font; 7 pixels per letter suffice for wide fonts.
        x += 46 + 7 * curve.label.len() as i32;
    }
    Ok(())
}

/// Pixels left of the axes: enough for the labels of any axis.
const LEFT: i32 = 96;

/// Makes an axis usable by plotters.
impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        first + (share * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

fn draw_curves(area: &Area<'_>, panel: &Panel) -> Drawn {
    let all = || panel.curves.iter().flat_map(|curve| &curve.points);
    let steps = Axis::of_steps(all().map(|point| point.0));
    let values = Axis::of_values(all().map(|point| point.1).chain(panel.shows.iter().copied()));
    let mut chart = ChartBuilder::on(area)
        .margin_right(16)
        .x_label_area_size(40)
        .y_label_area_size(LEFT)
        .build_cartesian_2d(steps.clone(), values.clone())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .axis_style(RGBColor(120, 120, 120))
        .label_style((FONT, 15))
        .x_desc("step")
        .x_label_formatter(&|tick| steps.label(*tick))
        .y_label_formatter(&|tick| values.label(*tick))
        .draw()?;
    for (curve, colour) in panel.curves.iter().zip(COLOURS) {
        let line = if curve.evaluated { colour.stroke_width(2) } else { colour.mix(0.7).stroke_width(2) };
        chart.draw_series(LineSeries::new(curve.points.iter().copied(), line))?;
        // A single point has no line: draw a mark.
        if curve.points.len() == 1 || (curve.evaluated && curve.points.len() <= MARKS) {
            chart.draw_series(curve.points.iter().map(|&point| Circle::new(point, 4, colour.filled())))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SVG of a run with these rows.
    fn drawn(steps: &str, evaluations: &str) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("metrics.jsonl"), steps).unwrap();
        std::fs::write(dir.path().join("eval_metrics.jsonl"), evaluations).unwrap();
        draw(dir.path()).unwrap().map(|path| std::fs::read_to_string(path).unwrap())
    }

    fn step(step: u32) -> String {
        format!(
            "{{\"step\":{step},\"loss\":0.{step},\"grad_norm\":1.5,\"learning_rate\":1e-6,\"rewards/chosen\":0.1,\
             \"rewards/rejected\":-0.1,\"rewards/margins\":0.2,\"rewards/accuracies\":1.0,\"logps/chosen\":-9.0,\
             \"logps/rejected\":-12.0,\"kl\":0.01}}\n"
        )
    }

    fn evaluation(step: u32) -> String {
        let values = [
            "loss",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
            "kl",
        ];
        let values: String = values.iter().map(|name| format!(",\"eval_{name}\":0.5")).collect();
        format!("{{\"step\":{step}{values}}}\n")
    }

    const TITLES: [&str; 8] = [
        "loss",
        "reward accuracy",
        "rewards",
        "reward margin",
        "log-probability of a completion (nats)",
        "KL divergence from the reference (nats per token)",
        "gradient norm before clipping",
        "learning rate",
    ];

    /// `(y, text)` of every text in the SVG.
    fn texts(svg: &str) -> Vec<(i32, String)> {
        let text = |part: &str| {
            let (attributes, rest) = part.split_once('>')?;
            let y = attributes.split_once(" y=\"")?.1.split_once('"')?.0.parse().ok()?;
            Some((y, rest.split_once('<')?.0.trim().to_owned()))
        };
        svg.split("<text").skip(1).filter_map(text).collect()
    }

    #[test]
    fn a_preference_run_shows_rewards_kl_gradient_norm_and_learning_rate() {
        let svg = drawn(&(step(1) + &step(2) + &step(3)), &(evaluation(0) + &evaluation(3))).unwrap();
        let texts = texts(&svg);
        for title in TITLES {
            assert_eq!(texts.iter().filter(|(_, text)| text == title).count(), 1, "{title}: {texts:?}");
        }
        // Two panels have four curves (both sides, trained and held out), four have two, the last two have one.
        assert!(svg.matches("<polyline").count() >= 2 * 4 + 4 * 2 + 2);
        assert_eq!(texts.iter().filter(|(_, text)| text == "held-out").count(), 4);
        assert_eq!(texts.iter().filter(|(_, text)| text == "rejected, held-out").count(), 2);
    }

    #[test]
    fn a_supervised_run_shows_only_panels_with_data() {
        let row = |step: u32| {
            format!(
                "{{\"step\":{step},\"loss\":2.5,\"grad_norm\":1.0,\"learning_rate\":0.001,\"logps/chosen\":-9.0}}\n"
            )
        };
        let svg = drawn(&(row(1) + &row(2)), "").unwrap();
        let shown: Vec<&str> =
            TITLES.into_iter().filter(|title| svg.contains(&format!("{title}\n"))).collect();
        assert_eq!(shown, [TITLES[0], TITLES[4], TITLES[6], TITLES[7]]);
    }

    #[test]
    fn one_step_is_drawn_and_zero_steps_are_not() {
        assert_eq!(drawn("", ""), None);
        let svg = drawn(&step(1), "").unwrap();
        assert!(svg.matches("<circle").count() >= 10, "a point alone has no mark");
    }

    #[test]
    fn nan_and_infinity_are_left_out() {
        let broken = "{\"step\":2,\"loss\":null,\"grad_norm\":1e999}\n";
        let svg = drawn(&(step(1) + broken + &step(3)), "").unwrap();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn a_legend_stands_above_the_curves_and_hides_none_of_them() {
        let svg = drawn(&(1..=9).map(step).collect::<String>(), &evaluation(0)).unwrap();
        let legends: Vec<i32> = texts(&svg)
            .into_iter()
            .filter(|(_, text)| ["training", "held-out", "chosen", "rejected"].contains(&text.as_str()))
            .map(|(y, _)| y % PANEL.1 as i32)
            .collect();
        assert!(!legends.is_empty() && legends.iter().all(|y| *y < HEAD as i32), "{legends:?}");
        // Curves have many points; lines of the legend have two.
        let curves =
            svg.split("<polyline").skip(1).filter_map(|part| part.split_once("points=\"")?.1.split_once('"'));
        let rows: Vec<i32> = curves
            .filter(|(points, _)| points.split_whitespace().count() > 2)
            .flat_map(|(points, _)| points.split_whitespace())
            .map(|point| point.split_once(',').unwrap().1.parse::<i32>().unwrap() % PANEL.1 as i32)
            .collect();
        assert!(rows.len() > 50 && rows.iter().all(|y| *y >= HEAD as i32), "{rows:?}");
    }
}
