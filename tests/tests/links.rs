//! Every relative link of the documentation leads to an existing file and heading.
#![allow(clippy::unwrap_used, reason = "a test that cannot read the documentation has failed")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use dyad_tests::root;

fn documents(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !path.is_symlink() && !name.starts_with('.') && name != "target" {
            documents(&path, found);
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
}

/// Removes code blocks.
fn prose(text: &str) -> String {
    let parts = text.split("\n```").enumerate().filter(|(index, _)| index % 2 == 0);
    parts.map(|(_, part)| part).collect::<Vec<_>>().join("\n")
}

/// Returns the anchors of all headings, as GitHub builds them: lower case, spaces as hyphens, no other punctuation.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter_map(|line| line.strip_prefix('#'));
    headings
        .map(|heading| {
            let heading = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let (mut files, mut broken, mut links) = (Vec::new(), Vec::new(), 0);
    documents(&root(), &mut files);
    for file in &files {
        let text = prose(&std::fs::read_to_string(file).unwrap());
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next()) {
            if link.starts_with("http") {
                continue;
            }
            links += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { file.clone() } else { file.parent().unwrap().join(path) };
            let heading = || anchors(&std::fs::read_to_string(&target).unwrap()).contains(anchor);
            if !target.exists() || !(anchor.is_empty() || heading()) {
                broken.push(format!("{}: {link}", file.display()));
            }
        }
    }
    assert!(links > 30, "only {links} links were found");
    assert!(broken.is_empty(), "{broken:#?}");
}
