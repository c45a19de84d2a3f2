//! `make bench-plane`: the data and control plane on this machine: tokenising, a large file, many trainers.
//!
//! Arguments: any of `tokens`, `file`, `trainers`; none means all.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark that cannot set itself up has failed, and prints its results"
)]

mod check;
mod coordinator;
mod families;
mod runs;
mod text;
mod tokens;
mod trainers;
mod usage;

use runs::Shape;

/// Pairs of the large file.
const MANY: usize = 1_000_000;
const TRAINERS: Shape = Shape { trainers: 1000, batch: 8000, steps: 20, beats: 5 };
/// A run that only measures the pairs of the large file.
const MEASURING: Shape = Shape { steps: 1, beats: 0, ..TRAINERS };

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |part: &str| chosen.is_empty() || chosen.iter().any(|name| name == part);
    let dir = tempfile::tempdir().unwrap();
    if wanted("tokens") {
        print("Tokenising and templating, one core", &[]);
        tokens::measure(dir.path(), 3.0, &|name, figure| println!("| {name} | {figure} |"));
    }
    let data = dir.path().join("pairs.jsonl");
    if wanted("file") {
        text::write_pairs(&data, MANY).unwrap();
        let mut rows = coordinator::index(dir.path(), &data, MANY);
        rows.extend(runs::measure(dir.path(), &data, MEASURING).into_iter().take(3));
        rows.extend(check::measure(&data, MANY));
        print("A large file", &rows);
    }
    if wanted("trainers") {
        text::write_pairs(&data, 4 * TRAINERS.batch).unwrap();
        print("Many trainers", &runs::measure(dir.path(), &data, TRAINERS));
    }
}

fn print(title: &str, rows: &[(String, String)]) {
    println!("\n| {title} | |\n|---|---|");
    for (what, figure) in rows {
        println!("| {what} | {figure} |");
    }
}
