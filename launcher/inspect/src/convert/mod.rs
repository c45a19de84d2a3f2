//! `launcher convert`: writes the records of files in another form. What the other form cannot say is an error, or a loss that is counted
//! and named.

mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use dyad_proto::pairs::json_lines;
use dyad_proto::pairs::source::Located;
use dyad_proto::run_config::{DataFiles, DatasetFormat};
use dyad_proto::{Fault, counted, plain, safe_file};
use rayon::prelude::*;
use serde_json::Value;

pub use self::write::Target;
use self::write::Written;
use crate::records::{Records, files};

/// What was converted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// Records read.
    pub read: u64,
    /// Records written.
    pub written: u64,
    /// What was lost, and in how many records.
    pub lost: BTreeMap<String, u64>,
}

impl Converted {
    /// The outcome in a few lines.
    #[must_use]
    pub fn shown(&self, out: &Path) -> String {
        let mut text = format!(
            "{}: {} of {}\n",
            out.display(),
            counted(self.written, "record"),
            counted(self.read, "record")
        );
        for (what, count) in &self.lost {
            text += &format!("lost in {}: {}\n", counted(*count, "record"), plain::line(what));
        }
        text
    }
}

/// Writes all records of some places into one file of lines. `format` is their form, unless the first record of each file decides.
pub fn run(
    places: &DataFiles,
    format: DatasetFormat,
    target: Target,
    out: &Path,
) -> Result<Converted, Fault> {
    let cannot = |error: std::io::Error| {
        Fault::failed(format!("cannot write {}: {error}", out.display())).hint("choose another file with -o")
    };
    if out.symlink_metadata().is_ok() {
        return Err(Fault::input(format!("{} exists", out.display()))
            .hint("remove it, or choose another file with -o"));
    }
    let located = files("FILE", places)?;
    let scratch = safe_file::scratch(out);
    let mut to = BufWriter::with_capacity(1 << 20, safe_file::create(&scratch).map_err(cannot)?);
    let done = all(&located, format, target, &mut to).and_then(|converted| {
        to.flush()
            .and_then(|()| to.get_ref().sync_all())
            .and_then(|()| std::fs::rename(&scratch, out))
            .map_err(cannot)?;
        Ok(converted)
    });
    if done.is_err() {
        let _ = std::fs::remove_file(&scratch);
    }
    done
}

fn all(
    located: &[Located],
    format: DatasetFormat,
    target: Target,
    to: &mut BufWriter<File>,
) -> Result<Converted, Fault> {
    let mut converted = Converted::default();
    for file in located {
        let mut records = Records::open("FILE", file, format)?;
        while let Some(window) = records.next()? {
            let Some(form) = records.form() else { continue };
            let one = |line: &crate::records::Line| {
                let place = || format!("{} {} {}", file.shown, file.unit, line.number);
                let mut unread = Default::default();
                let example =
                    json_lines::examine(form, window.record(line), &mut unread).map_err(|error| {
                        Fault::input(format!("{}: {error}", place())).hint(
                            "launcher check shows every problem of a file; --fix writes one without them",
                        )
                    })?;
                let mut written = write::record(&example, target).map_err(|what| {
                    Fault::input(format!("{}: {what}", place())).hint(format!(
                        "{} cannot say that; `launcher convert --help` has all forms",
                        target.name()
                    ))
                })?;
                written.lost.extend(unread.into_iter().map(|name| format!("the column {name}")));
                Ok::<Written, Fault>(written)
            };
            let done: Vec<Result<Vec<Written>, Fault>> =
                window.parts().map(|lines| lines.iter().map(one).collect()).collect();
            for part in done {
                for Written { records, lost } in part? {
                    converted.read += 1;
                    converted.written += records.len() as u64;
                    lost.into_iter().for_each(|what| *converted.lost.entry(what).or_default() += 1);
                    put(to, &records)?;
                }
            }
        }
    }
    match converted.read {
        0 => Err(Fault::input("the files hold no records").hint("docs/data.md has all forms")),
        _ => Ok(converted),
    }
}

fn put(to: &mut BufWriter<File>, records: &[Value]) -> Result<(), Fault> {
    for record in records {
        let line = record.to_string() + "\n";
        to.write_all(line.as_bytes()).map_err(|error| Fault::failed(format!("cannot write: {error}")))?;
    }
    Ok(())
}
