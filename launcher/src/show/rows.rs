//! Rows of `metrics.jsonl` and `eval_metrics.jsonl`.

use std::collections::HashMap;
use std::path::Path;

/// Metrics of one row, by name.
pub type Row = HashMap<String, f64>;

/// All rows of a file; empty if there is no file.
#[must_use]
pub fn read(path: &Path) -> Vec<Row> {
    let text = dyad_proto::files::read_rows(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let row = |line: &str| {
        let json: HashMap<String, serde_json::Value> = serde_json::from_str(line).ok()?;
        Some(json.into_iter().filter_map(|(key, value)| Some((key, value.as_f64()?))).collect())
    };
    text.lines().filter_map(row).collect()
}

/// `(step, value)` of every row with a finite value of the metric.
#[must_use]
pub fn series(rows: &[Row], name: &str) -> Vec<(f64, f64)> {
    rows.iter()
        .filter_map(|row| Some((*row.get("step")?, *row.get(name)?)))
        .filter(|(_, y)| y.is_finite())
        .collect()
}
