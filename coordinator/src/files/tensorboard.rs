//! Event files for TensorBoard: the rows of the metrics files in the format that TensorBoard reads.
//!
//! A file is a sequence of TFRecords, each an `Event` message. Tags are those of Hugging Face's callback, so that runs of TRL and
//! Dyad appear in the same charts: `train/loss`, `train/rewards/margins`, `eval/loss`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dyad_proto::names::metric;
use dyad_proto::{Fault, files, safe_file};
use prost::Message;

use crate::files::output_dir::rows::{still_there, unwritten};
use crate::run::metrics_row::MetricsRow;

/// `tensorflow.Event`, with the fields that are written here.
#[derive(Clone, PartialEq, Message)]
struct TensorboardEvent {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(TensorboardSummary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct TensorboardSummary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<ScalarValue>,
}

/// `tensorflow.Summary.Value` with a plain number.
#[derive(Clone, PartialEq, Message)]
struct ScalarValue {
    #[prost(string, tag = "1")]
    tag: String,
    /// Optional, because prost omits a plain field that is zero.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// `tensorflow.SessionLog`: a start makes TensorBoard drop the events of an interrupted run from that step on.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SessionLog.START`.
const START: i32 = 1;

/// One event file.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
    /// Expected length of the file in bytes.
    bytes: u64,
}

impl EventFile {
    /// Creates a file in this folder. With `resumed` > 0 it continues the curves of earlier files after that many steps.
    pub fn create(dir: &Path, resumed: u64) -> Result<Self, Fault> {
        let now = now();
        let path = dir.join(file_name(now));
        let file = safe_file::folder(dir).and_then(|()| safe_file::create(&path));
        let file = file.map_err(|error| unwritten(&path, &error))?;
        let mut records = Vec::new();
        record(&mut records, now, 0, What::FileVersion("brain.Event:2".into()));
        if resumed > 0 {
            let start = What::SessionLog(SessionLog { status: START });
            record(&mut records, now, resumed as i64 + 1, start);
        }
        let mut made = Self { path, file, bytes: 0 };
        made.append(&records).inspect_err(|_| made.discard())?;
        Ok(made)
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file, before it holds a row.
    pub fn discard(&self) {
        // Ignored: the caller reports the error that led here.
        let _ = std::fs::remove_file(&self.path);
    }

    /// Adds a row of either metrics file, under the row's step.
    pub fn add(&mut self, row: &MetricsRow) -> Result<(), Fault> {
        let step = row.get(metric::STEP).unwrap_or_default() as i64;
        let values = row.iter().filter(|(key, _)| *key != metric::STEP);
        let value = values
            .map(|(key, value)| ScalarValue { tag: tag(key), simple_value: Some(value as f32) })
            .collect();
        let mut records = Vec::new();
        record(&mut records, now(), step, What::Summary(TensorboardSummary { value }));
        self.append(&records)
    }

    /// Writes all records in one call, so that a reader hardly ever sees a torn record.
    fn append(&mut self, records: &[u8]) -> Result<(), Fault> {
        still_there(&self.path, &self.file, self.bytes)?;
        self.file.write_all(records).map_err(|error| unwritten(&self.path, &error))?;
        self.bytes += records.len() as u64;
        Ok(())
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Name of a new file; TensorBoard reads the files of a folder in the order of the seconds in their names.
fn file_name(now: Duration) -> String {
    let host = files::of_kernel("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("events.out.tfevents.{:010}.{}.{}.0", now.as_secs(), host.trim(), std::process::id())
}

/// `loss` is `train/loss`, `eval_loss` is `eval/loss`.
fn tag(key: &str) -> String {
    key.strip_prefix(metric::EVAL).map_or_else(|| format!("train/{key}"), |key| format!("eval/{key}"))
}

/// Appends one TFRecord: length and data, each with its checksum.
fn record(out: &mut Vec<u8>, now: Duration, step: i64, what: What) {
    let data = TensorboardEvent { wall_time: now.as_secs_f64(), step, what: Some(what) }.encode_to_vec();
    let length = (data.len() as u64).to_le_bytes();
    out.extend(length);
    out.extend(masked(&length).to_le_bytes());
    out.extend(&data);
    out.extend(masked(&data).to_le_bytes());
}

/// TFRecord's checksum: CRC-32C, rotated and offset, because a plain CRC over data that contains CRCs is problematic.
fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_those_of_hugging_face() {
        let tags = ["loss", "rewards/margins", "eval_loss", "eval_rewards/accuracies"].map(tag);
        assert_eq!(tags, ["train/loss", "train/rewards/margins", "eval/loss", "eval/rewards/accuracies"]);
    }

    #[test]
    fn a_value_of_zero_is_written() {
        let value = ScalarValue { tag: tag("loss"), simple_value: Some(0.0) };
        assert!(value.encode_to_vec().ends_with(&[0x15, 0, 0, 0, 0]));
    }

    /// The length counts the data only; a checksum of 4 bytes follows the length, and another one the data.
    #[test]
    fn records_carry_masked_checksums_of_length_and_data() {
        let mut bytes = Vec::new();
        record(&mut bytes, Duration::ZERO, 0, What::FileVersion("brain.Event:2".into()));
        let (length, rest) = bytes.split_at(8);
        assert_eq!(u64::from_le_bytes(length.try_into().unwrap()) as usize, rest.len() - 8);
        // RFC 3720's test vector of CRC-32C: 32 zero bytes give 8a9136aa.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked(&[0; 32]), 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }
}
