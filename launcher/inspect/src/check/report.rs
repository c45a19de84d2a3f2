//! What `launcher check` prints: findings, and a table by file.

use std::fmt::Write;

use dyad_proto::{counted, plain};
use serde_json::{Value, json};

use super::finding::Severity;
use super::lengths::{Lengths, bars, edges};
use super::{CheckReport, CheckedFile, Counts};

const SEVERITIES: [Severity; 3] = [Severity::Error, Severity::LeftOut, Severity::Warning];

/// The report for a terminal.
#[must_use]
pub fn table(report: &CheckReport) -> String {
    let mut out = String::new();
    let unit = |path: &str| {
        report.files.iter().find(|file| file.path == path).map_or("line", |file| file.unit.as_str())
    };
    for finding in &report.findings {
        let _ = writeln!(out, "{}", finding.shown(unit(&finding.file)));
    }
    let more = report.found.iter().sum::<u64>() - report.findings.len() as u64;
    if more > 0 {
        let _ = writeln!(out, "… and {more} more (--limit 0 shows all)");
    }
    if !out.is_empty() {
        out.push('\n');
    }
    let blocks: Vec<String> = report.files.iter().map(|file| block(file, report.max_len)).collect();
    out + &blocks.join("\n")
}

fn block(file: &CheckedFile, max_len: Option<usize>) -> String {
    let CheckedFile { path, unit: _, form, counts, records, written } = file;
    let mut out = String::new();
    let form = form.map_or_else(String::new, |form| format!(", {} ({} form)", form.fields, form.name));
    let _ = writeln!(out, "{}: {}{form}", plain::line(path), counted(counts.records, "record"));
    let mut row = |name: &str, value: String| {
        let _ = writeln!(out, "  {name:<18}{value}");
    };
    let does = ["a run refuses the file", "a run leaves them out", "a run trains on them"];
    for ((severity, count), does) in SEVERITIES.iter().zip(records).zip(does) {
        if *count > 0 {
            row(severity.word(), format!("{}: {does}", counted(*count, "record")));
        }
    }
    for (name, value) in present(counts) {
        row(name, value);
    }
    if let Some(max_len) = max_len {
        tokens(counts, max_len, &mut row);
    }
    if let Some(written) = written {
        row("written", format!("{}: {}", plain::line(&written.clean.0), counted(written.clean.1, "record")));
        row("", format!("{}: {}", plain::line(&written.rejects.0), counted(written.rejects.1, "record")));
    }
    out
}

/// What records have, beyond a question and answers.
fn present(counts: &Counts) -> Vec<(&'static str, String)> {
    let of = |count: u64| counted(count, "record");
    let mut rows: Vec<(&str, String)> = [
        ("plain text", counts.plain_text),
        ("system", counts.system),
        ("several turns", counts.several_turns),
        ("tools", counts.tools),
        ("tool calls", counts.tool_calls),
        ("reasoning", counts.reasoning),
        ("weights", counts.weights),
    ]
    .into_iter()
    .filter(|(_, count)| *count > 0)
    .map(|(name, count)| (name, of(count)))
    .collect();
    if counts.labels != (0, 0) {
        rows.push(("labels", format!("{} true, {} false", counts.labels.0, counts.labels.1)));
    }
    if !counts.passed_over.is_empty() {
        let names: Vec<&str> = counts.passed_over.iter().map(String::as_str).collect();
        rows.push(("not read", format!("the columns {}", names.join(", "))));
    }
    rows
}

fn tokens(counts: &Counts, max_len: usize, row: &mut impl FnMut(&str, String)) {
    let tokens = &counts.tokens;
    let sides = [("prompt", &tokens.prompt), ("chosen", &tokens.chosen), ("rejected", &tokens.rejected)];
    let longest = sides.iter().filter_map(|(_, lengths)| lengths.summary()).map(|summary| summary.max).max();
    let Some(longest) = longest else { return };
    let edges = edges(longest);
    for (name, lengths) in sides {
        let Some(summary) = lengths.summary() else { continue };
        let (min, median, p95, max) = (summary.min, summary.median, summary.p95, summary.max);
        let shape = bars(&lengths.buckets(&edges));
        row(
            &format!("{name} tokens"),
            format!("|{shape}| min {min}, median {median}, 95% {p95}, max {max}, sum {}", summary.total),
        );
    }
    let powers: Vec<String> = edges.iter().map(usize::to_string).collect();
    row("", format!("bars: fewer than {} tokens", powers.join(", ")));
    let cut = match tokens.cut {
        0 => "nothing is cut".to_owned(),
        count => {
            format!("{} cut at the end, by {}", counted(count, "record"), counted(tokens.cut_tokens, "token"))
        }
    };
    row("max_seq_length", format!("{max_len}: {cut}"));
}

/// The report as one JSON object.
#[must_use]
pub fn json(report: &CheckReport) -> Value {
    let lengths = |lengths: &Lengths| {
        let summary = lengths.summary()?;
        let edges = edges(summary.max);
        let mut value = json!(summary);
        value["histogram"] = json!({ "below": edges, "records": lengths.buckets(&edges) });
        Some(value)
    };
    let file = |file: &CheckedFile| {
        let Counts { tokens, .. } = &file.counts;
        let counts = &file.counts;
        json!({
            "path": file.path,
            "unit": file.unit,
            "form": file.form.map(|form| form.format),
            "records": counts.records,
            "records_with": { "error": file.records[0], "left_out": file.records[1], "warning": file.records[2] },
            "plain_text": counts.plain_text,
            "system": counts.system,
            "several_turns": counts.several_turns,
            "tools": counts.tools,
            "tool_calls": counts.tool_calls,
            "reasoning": counts.reasoning,
            "weights": counts.weights,
            "labels": { "true": counts.labels.0, "false": counts.labels.1 },
            "not_read": counts.passed_over,
            "tokens": report.max_len.map(|max_len| json!({
                "prompt": lengths(&tokens.prompt),
                "chosen": lengths(&tokens.chosen),
                "rejected": lengths(&tokens.rejected),
                "max_seq_length": max_len,
                "cut_records": tokens.cut,
                "cut_tokens": tokens.cut_tokens,
            })),
            "written": file.written,
        })
    };
    json!({
        "files": report.files.iter().map(file).collect::<Vec<_>>(),
        "found": { "error": report.found[0], "left_out": report.found[1], "warning": report.found[2] },
        "findings": report.findings,
    })
}
