//! A Parquet file: one line for each row, with the JSON values that the JSON Lines form of the same data has.
//!
//! - A column of structs has every field in every row, and null where a record lacks it. So null fields of structs are left out, as TRL's
//!   `remove_none_values` does. Null items of lists and null values of maps stay.
//! - Columns of the type JSON, which `datasets` writes for values of mixed types, hold JSON as text. They become that JSON.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use parquet::basic::{ConvertedType, LogicalType};
use parquet::errors::ParquetError;
use parquet::file::reader::FileReader;
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde::de::IgnoredAny;
use serde_json::Value;

use super::Problem;
use crate::alive;

pub(super) fn unpack(file: File, to: &mut dyn Write) -> Result<(), Problem> {
    // The reader asserts what a damaged file may break.
    catch_unwind(AssertUnwindSafe(|| rows(file, to)))
        .unwrap_or_else(|_| Err(Problem::content("its schema or pages contradict themselves")))
}

/// The error without the library's own "error".
fn plain(error: &ParquetError) -> String {
    let text = error.to_string();
    text.strip_prefix("Parquet error: ").unwrap_or(&text).to_owned()
}

fn rows(file: File, to: &mut dyn Write) -> Result<(), Problem> {
    let reader = SerializedFileReader::new(file).map_err(|error| Problem::content(plain(&error)))?;
    let schema = reader.metadata().file_metadata().schema();
    let mut at = 0;
    let mut line = String::new();
    for row in reader.get_row_iter(None).map_err(|error| Problem::content(plain(&error)))? {
        at += 1;
        let damaged = |what: String| Problem::Content { what, at: Some(at) };
        line.clear();
        object(&mut line, &row.map_err(|error| damaged(plain(&error)))?, schema).map_err(damaged)?;
        line.push('\n');
        to.write_all(line.as_bytes()).map_err(Problem::Writing)?;
        if at.is_multiple_of(1024) {
            alive::advance();
        }
    }
    Ok(())
}

/// Writes a struct. Its fields are in the order of the schema.
fn object(out: &mut String, row: &Row, schema: &Type) -> Result<(), String> {
    let mut begin = '{';
    for ((name, field), of) in row.get_column_iter().zip(schema.get_fields()) {
        if matches!(field, Field::Null) {
            continue;
        }
        out.push(begin);
        begin = ',';
        text(out, name);
        out.push(':');
        value(out, field, of)?;
    }
    out.push_str(if begin == '{' { "{}" } else { "}" });
    Ok(())
}

fn value(out: &mut String, field: &Field, schema: &Type) -> Result<(), String> {
    match field {
        Field::Null => out.push_str("null"),
        Field::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Field::Byte(value) => shown(out, value),
        Field::Short(value) => shown(out, value),
        Field::Int(value) => shown(out, value),
        Field::Long(value) => shown(out, value),
        Field::UByte(value) => shown(out, value),
        Field::UShort(value) => shown(out, value),
        Field::UInt(value) => shown(out, value),
        Field::ULong(value) => shown(out, value),
        // With its own shortest digits: 0.1, not 0.10000000149011612.
        Field::Float16(value) => real(out, value.to_f64(), value),
        Field::Float(value) => real(out, f64::from(*value), value),
        Field::Double(value) => real(out, *value, value),
        Field::Str(content) if is_json(schema) => json(out, content)?,
        Field::Str(content) => text(out, content),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(content) => text(out, content),
            // An image or the like. No form reads it, and its size tells what it is.
            Err(_) => drop(write!(out, "{{\"bytes\":{}}}", bytes.len())),
        },
        Field::Group(row) => object(out, row, schema)?,
        Field::ListInternal(list) => {
            let schema = element(schema);
            out.push('[');
            for (at, item) in list.elements().iter().enumerate() {
                if at > 0 {
                    out.push(',');
                }
                value(out, item, schema)?;
            }
            out.push(']');
        }
        Field::MapInternal(map) => {
            let schema = schema.get_fields()[0].get_fields()[1].as_ref();
            out.push('{');
            for (at, (key, of)) in map.entries().iter().enumerate() {
                if at > 0 {
                    out.push(',');
                }
                match key {
                    Field::Str(key) => text(out, key),
                    other => text(out, &other.to_string()),
                }
                out.push(':');
                value(out, of, schema)?;
            }
            out.push('}');
        }
        // Dates, times and decimals, which JSON has no type for, as text.
        other => text(out, other.to_string().trim_matches('"')),
    }
    Ok(())
}

fn shown(out: &mut String, value: impl std::fmt::Display) {
    // Writing into a String cannot fail.
    let _ = write!(out, "{value}");
}

/// A number with a decimal point or an exponent; null if it is no number.
fn real(out: &mut String, wide: f64, digits: impl std::fmt::Debug) {
    match wide.is_finite() {
        true => drop(write!(out, "{digits:?}")),
        false => out.push_str("null"),
    }
}

fn text(out: &mut String, content: &str) {
    // Serialising a text cannot fail.
    out.push_str(&Value::String(content.to_owned()).to_string());
}

fn json(out: &mut String, content: &str) -> Result<(), String> {
    let valid = serde_json::from_str::<IgnoredAny>(content);
    valid.map_err(|error| format!("a column of the type JSON holds other text ({error})"))?;
    // In valid JSON, line ends stand only between tokens.
    out.push_str(&content.replace(['\n', '\r'], " "));
    Ok(())
}

fn is_json(schema: &Type) -> bool {
    let about = schema.get_basic_info();
    about.converted_type() == ConvertedType::JSON || about.logical_type_ref() == Some(&LogicalType::Json)
}

/// The type of a list's elements, by the format's rules for old and new writers.
fn element(list: &Type) -> &Type {
    let annotated = [ConvertedType::LIST, ConvertedType::MAP, ConvertedType::MAP_KEY_VALUE];
    if list.is_primitive() || !annotated.contains(&list.get_basic_info().converted_type()) {
        // A repeated field without a list around it.
        return list;
    }
    let repeated = list.get_fields()[0].as_ref();
    let old = || repeated.name() == "array" || repeated.name().ends_with("_tuple");
    if repeated.is_primitive() || repeated.get_fields().len() > 1 || old() {
        return repeated;
    }
    repeated.get_fields()[0].as_ref()
}
