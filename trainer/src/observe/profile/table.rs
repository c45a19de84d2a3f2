//! The profile as text.

use dyad_proto::names::phase;
use std::fmt::Write;

use serde::Serialize;

use super::cost::Class;
use super::roofline::Roofline;
use super::summary::{ProfileRow, Summary};
use crate::batch::TokenCounts;

/// Most operators in the table.
const OPERATORS: usize = 12;

/// All results of a profile.
#[derive(Clone, Debug, Serialize)]
pub struct ProfileReport {
    /// What was profiled: rank, device, precision, threads, steps.
    pub title: String,
    /// Where the time went.
    pub summary: Summary,
    /// Measured limits of the machine.
    pub roofline: Roofline,
    /// Tokens of one step on this rank.
    pub tokens: TokenCounts,
}

impl ProfileReport {
    /// Share of the step that its matrix products and attention would take at the roofline's rate.
    #[must_use]
    pub fn roofline_share(&self) -> f64 {
        self.summary.flops() / self.roofline.flops_per_second / self.summary.step_seconds
    }

    /// Renders the table.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = format!("{}\n\n", self.title);
        self.limits(&mut out);
        self.phases(&mut out);
        let classes = ["by class of operator", "host, per step"];
        self.rows(&mut out, classes, &self.summary.classes);
        if !self.summary.kernels.is_empty() {
            self.rows(&mut out, ["by class of kernel", "accelerator, per step"], &self.summary.kernels);
        }
        let count = self.summary.operators.len().min(OPERATORS);
        self.rows(&mut out, ["by operator", "host, per step"], &self.summary.operators[..count]);
        out
    }

    fn limits(&self, out: &mut String) {
        let Roofline { flops_per_second, bytes_per_second } = self.roofline;
        let _ = writeln!(
            out,
            "this machine        {:.1} GFLOP/s in a large matrix product, {:.1} GB/s in a large copy",
            flops_per_second * 1e-9,
            bytes_per_second * 1e-9
        );
        let _ = writeln!(
            out,
            "step                {:.3} s for {:.1} GFLOP in matrix products and attention: {:.1} % of the roofline",
            self.summary.step_seconds,
            self.summary.flops() * 1e-9,
            100.0 * self.roofline_share()
        );
        let waited = self.summary.phases.iter().find(|phase| phase.name == phase::ALL_REDUCE_WAIT);
        let _ = writeln!(
            out,
            "communication       in flight for {:.4} s, of which the step waited {:.4} s",
            self.summary.communication_seconds,
            waited.map_or(0.0, |phase| phase.seconds)
        );
        let _ = writeln!(out, "attention           {}", self.summary.attention().join(", "));
        let TokenCounts { computed, repeated_prompt, padding, unshared } = self.tokens;
        let _ = writeln!(
            out,
            "tokens              {computed} computed, of which {repeated_prompt} repeated prompt and {padding} padding; \
             {unshared} if every output had a prompt of its own\n"
        );
    }

    fn phases(&self, out: &mut String) {
        let _ = write!(out, "{:22}{:>9}{:>7}", "by part of the step", "seconds", "share");
        for class in Class::ALL {
            let _ = write!(out, "{:>16}", class.name());
        }
        let _ = writeln!(out, "{:>10}", "the rest");
        for phase in &self.summary.phases {
            let share = 100.0 * phase.seconds / self.summary.step_seconds;
            let _ = write!(out, "  {:20}{:>9.4}{share:>6.1}%", phase.name, phase.seconds);
            for class in Class::ALL {
                let _ = write!(out, "{:>16.4}", phase.classes.get(&class).copied().unwrap_or_default());
            }
            let rest = phase.seconds - phase.classes.values().sum::<f64>();
            let _ = writeln!(out, "{:>10.4}", rest.max(0.0));
        }
        out.push('\n');
    }

    fn rows(&self, out: &mut String, [heading, place]: [&str; 2], rows: &[ProfileRow]) {
        let _ = writeln!(
            out,
            "{:52}{:>9}{:>7}{:>8}{:>11}{:>14}{:>9}{:>14}",
            format!("{heading} ({place})"),
            "seconds",
            "share",
            "calls",
            "GFLOP/s",
            "of roofline",
            "GB/s",
            "of roofline"
        );
        for row in rows {
            let rate = |amount: f64, limit: f64| match amount > 0.0 && row.seconds > 0.0 {
                true => {
                    let rate = amount / row.seconds;
                    (format!("{:.1}", rate * 1e-9), format!("{:.1}%", 100.0 * rate / limit))
                }
                false => (String::new(), String::new()),
            };
            let (flops, of_flops) = rate(row.flops, self.roofline.flops_per_second);
            let (bytes, of_bytes) = rate(row.bytes, self.roofline.bytes_per_second);
            let share = 100.0 * row.seconds / self.summary.step_seconds;
            let _ = writeln!(
                out,
                "  {:50}{:>9.4}{share:>6.1}%{:>8.0}{flops:>11}{of_flops:>14}{bytes:>9}{of_bytes:>14}",
                row.name, row.seconds, row.calls
            );
        }
        out.push('\n');
    }
}
