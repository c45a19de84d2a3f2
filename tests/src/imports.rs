//! The imports between a crate's source files, read from the text: `use` trees and paths that begin with `crate`, `super`, `self` or a
//! child module. Macros are not expanded.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A module's path below the crate's root; empty for `lib.rs`.
type Module = Vec<String>;

/// The files of one crate and their imports.
#[derive(Debug, Default)]
pub struct Imports {
    /// From each file to the files that it imports. Paths below the crate's `src`.
    pub edges: BTreeMap<String, BTreeSet<String>>,
}

impl Imports {
    /// Reads every file below `src`. A file of `impl` blocks that is split off its parent module may import that parent: such imports are
    /// not counted. `main.rs` is left out, because nothing can import it.
    ///
    /// # Errors
    /// A folder or file that cannot be read.
    pub fn read(src: &Path) -> std::io::Result<Self> {
        let mut texts = BTreeMap::new();
        collect(src, src, &mut texts)?;
        let files: BTreeMap<Module, String> = texts.keys().map(|file| (module(file), file.clone())).collect();
        let exports = texts.iter().flat_map(|(file, text)| exports(&code_of(text), &module(file))).collect();
        let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (file, text) in &texts {
            let own = module(file);
            let code = code_of(text);
            let imported = edges.entry(file.clone()).or_default();
            for path in paths(&code, &own) {
                let target = defined_in(path, &files, &exports);
                let parent = own.split_last().and_then(|(_, parent)| files.get(parent));
                if let Some(target) = target.filter(|target| *target != file && Some(*target) != parent) {
                    imported.insert(target.clone());
                }
            }
        }
        Ok(Self { edges })
    }

    /// Sets of files that import each other, directly or through others.
    #[must_use]
    pub fn circles(&self) -> Vec<BTreeSet<String>> {
        let reach: BTreeMap<&String, BTreeSet<&String>> =
            self.edges.keys().map(|file| (file, self.reachable(file))).collect();
        let mut circles: Vec<BTreeSet<String>> = Vec::new();
        for (file, reached) in &reach {
            if !reached.contains(file) || circles.iter().any(|circle| circle.contains(*file)) {
                continue;
            }
            let back = |other: &&&String| reach[**other].contains(file);
            circles.push(reached.iter().filter(back).map(|other| (*other).clone()).collect());
        }
        circles
    }

    fn reachable(&self, from: &String) -> BTreeSet<&String> {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&String> = self.edges[from].iter().collect();
        while let Some(file) = next.pop() {
            if reached.insert(file) {
                next.extend(&self.edges[file]);
            }
        }
        reached
    }
}

fn collect(root: &Path, folder: &Path, texts: &mut BTreeMap<String, String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        if path.is_dir() {
            collect(root, &path, texts)?;
        } else if name.ends_with(".rs") && name != "main.rs" && !is_test(&name) {
            texts.insert(name, std::fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

/// Unit tests in their own files.
fn is_test(file: &str) -> bool {
    file.split('/').any(|part| part == "tests" || part == "tests.rs")
}

fn module(file: &str) -> Module {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    if path == "lib" { Vec::new() } else { path.split('/').map(str::to_owned).collect() }
}

/// Returns the code without line comments and unit tests.
fn code_of(text: &str) -> String {
    let mut marks = text.match_indices("\n#[cfg(test)]\n");
    let tests = marks.find(|(at, mark)| {
        let line = text[at + mark.len()..].lines().next().unwrap_or_default();
        line.contains("mod ") && line.ends_with('{')
    });
    let text = &text[..tests.map_or(text.len(), |(at, _)| at)];
    let lines = text.lines().map(|line| match line.find("//") {
        Some(at) if !line[..at].contains('"') => &line[..at],
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Returns the names that a module re-exports with `pub use`, with the paths they stand for.
fn exports(code: &str, own: &[String]) -> Vec<(Module, Module)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("pub use ").chain(code.match_indices("pub(crate) use ")) {
        let (_, text) = code[at..].split_once("use ").unwrap_or_default();
        let mut paths = Vec::new();
        tree(text.split(';').next().unwrap_or_default(), own.to_vec(), &mut paths);
        for path in paths {
            let name = path.last().cloned().into_iter();
            found.push((own.iter().cloned().chain(name).collect(), path));
        }
    }
    found
}

/// Returns the file that defines the item at a path.
fn defined_in<'a>(
    mut path: Module,
    files: &'a BTreeMap<Module, String>,
    exports: &BTreeMap<Module, Module>,
) -> Option<&'a String> {
    // A name may be re-exported several times; the limit ends a cycle.
    for _ in 0..8 {
        let Some((length, target)) = (1..=path.len())
            .rev()
            .find_map(|length| exports.get(&path[..length]).map(|target| (length, target)))
        else {
            break;
        };
        if files.contains_key(&path[..length]) {
            break;
        }
        path.splice(..length, target.iter().cloned());
    }
    (0..=path.len()).rev().find_map(|length| files.get(&path[..length]))
}

/// Returns every path into this crate, from the crate's root.
fn paths(code: &str, own: &[String]) -> Vec<Module> {
    let children: BTreeSet<&str> = code
        .lines()
        .filter_map(|line| {
            line.trim().trim_start_matches("pub ").trim_start_matches("pub(crate) ").strip_prefix("mod ")
        })
        .filter_map(|rest| rest.strip_suffix(';'))
        .collect();
    let mut found = Vec::new();
    let word = |c: char| c.is_alphanumeric() || c == '_';
    for (at, _) in code.match_indices(word) {
        // Skip the middle of a path or word, and `pub(in …)`.
        if code[..at].ends_with(|c: char| word(c) || c == ':') || code[..at].ends_with("pub(in ") {
            continue;
        }
        let rest = &code[at..];
        let first = &rest[..rest.find(|c| !word(c)).unwrap_or(rest.len())];
        if rest[first.len()..].starts_with("::")
            && (["crate", "super", "self"].contains(&first) || children.contains(first))
        {
            tree(rest, own.to_vec(), &mut found);
        }
    }
    found
}

/// Splits a path or a `use` tree that begins at `base` into plain paths.
fn tree(text: &str, base: Module, found: &mut Vec<Module>) {
    let text = text.trim_start();
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let mut here = base;
    match name {
        "crate" => here.clear(),
        "super" => drop(here.pop()),
        "self" | "" => {}
        name => here.push(name.to_owned()),
    }
    let Some(rest) = rest.strip_prefix("::") else { return found.push(here) };
    let Some(inner) = rest.trim_start().strip_prefix('{') else { return tree(rest, here, found) };
    let (mut depth, mut start) = (0, 0);
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                if !inner[start..at].trim().is_empty() {
                    tree(&inner[start..at], here.clone(), found);
                }
                start = at + 1;
                if c == '}' {
                    return;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_trees_and_plain_paths_are_parsed() {
        let code =
            "mod child;\nuse crate::a::{b::{C, d}, E};\nuse super::f;\nfn g() { child::h(); crate::i::j() }";
        let own = ["x".to_owned(), "y".to_owned()];
        let found: Vec<String> = paths(code, &own).iter().map(|path| path.join("::")).collect();
        assert_eq!(found, ["a::b::C", "a::b::d", "a::E", "x::f", "x::y::child::h", "i::j"]);
    }

    #[test]
    fn a_cycle_of_three_files_is_found_and_a_chain_is_not() {
        let edges = [("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")];
        let mut imports = Imports::default();
        for file in ["a", "b", "c", "d"] {
            let to = edges.iter().filter(|(from, _)| *from == file).map(|(_, to)| (*to).to_owned()).collect();
            imports.edges.insert(file.to_owned(), to);
        }
        let circles = imports.circles();
        assert_eq!(circles, [["a", "b", "c"].map(str::to_owned).into()]);
    }
}
