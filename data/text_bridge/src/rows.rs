// SPDX-License-Identifier: Apache-2.0
//! Parquet files as JSON lines.

use crate::Result;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use std::ffi::OsStr;
use std::fmt::Write;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;

pub struct Rows {
    rows: RowIter<'static>,
    num_rows: u64,
    read: u64,
}

fn in_words(error: ParquetError) -> String {
    error.to_string()
}

impl Rows {
    pub fn open(path: &[u8]) -> Result<Rows> {
        let file = File::open(OsStr::from_bytes(path)).map_err(|error| error.to_string())?;
        let reader = SerializedFileReader::new(file).map_err(in_words)?;
        let num_rows = reader.metadata().file_metadata().num_rows();
        let num_rows = u64::try_from(num_rows).map_err(|_| format!("the footer counts {num_rows} rows"))?;
        Ok(Rows { rows: RowIter::from_file_into(Box::new(reader)), num_rows, read: 0 })
    }

    pub fn num_rows(&self) -> u64 {
        self.num_rows
    }

    pub fn next_lines(&mut self, max_rows: u64, max_bytes: u64) -> Result<String> {
        let mut lines = String::new();
        for _ in 0..max_rows {
            if lines.len() as u64 >= max_bytes {
                break;
            }
            match self.rows.next() {
                None if self.read == self.num_rows => break,
                None => return Err(format!("the file ends after {} of the {} rows its footer counts", self.read, self.num_rows)),
                Some(row) => write_row(&row.map_err(|error| format!("row {}: {error}", self.read + 1))?, &mut lines),
            }
            lines.push('\n');
            self.read += 1;
        }
        Ok(lines)
    }
}

fn write_row(row: &Row, out: &mut String) {
    out.push('{');
    for (index, (name, field)) in row.get_column_iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        write_string(name, out);
        out.push(':');
        write_field(field, out);
    }
    out.push('}');
}

fn write_field(field: &Field, out: &mut String) {
    match field {
        Field::Null => out.push_str("null"),
        Field::Str(text) => write_string(text, out),
        Field::Group(row) => write_row(row, out),
        Field::ListInternal(list) => {
            out.push('[');
            for (index, element) in list.elements().iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                write_field(element, out);
            }
            out.push(']');
        }
        // JSON's keys are text: a key of another type is written as its JSON text, as Python's json does for numbers.
        Field::MapInternal(map) => {
            out.push('{');
            for (index, (key, value)) in map.entries().iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                match key {
                    Field::Str(text) => write_string(text, out),
                    other => {
                        let mut text = String::new();
                        write_field(other, &mut text);
                        write_string(text.trim_matches('"'), out);
                    }
                }
                out.push(':');
                write_field(value, out);
            }
            out.push('}');
        }
        Field::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Field::Float16(value) => write_float(f64::from(value.to_f32()), out),
        Field::Float(value) => write_float(f64::from(*value), out),
        Field::Double(value) => write_float(*value, out),
        // Old writers do not mark text as text. Bytes that are no text at all (pictures) are base64.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => write_string(text, out),
            Err(_) => write_string(&base64(bytes.data()), out),
        },
        Field::Byte(value) => write!(out, "{value}").unwrap_or(()),
        Field::Short(value) => write!(out, "{value}").unwrap_or(()),
        Field::Int(value) => write!(out, "{value}").unwrap_or(()),
        Field::Long(value) => write!(out, "{value}").unwrap_or(()),
        Field::UByte(value) => write!(out, "{value}").unwrap_or(()),
        Field::UShort(value) => write!(out, "{value}").unwrap_or(()),
        Field::UInt(value) => write!(out, "{value}").unwrap_or(()),
        Field::ULong(value) => write!(out, "{value}").unwrap_or(()),
        // Decimals, dates and times: as the crate prints them.
        other => write_string(&other.to_string(), out),
    }
}

/// JSON has no NaN and no infinity; such a cell says nothing, so it is null.
fn write_float(value: f64, out: &mut String) {
    match serde_json::Number::from_f64(value) {
        Some(number) => write!(out, "{number}").unwrap_or(()),
        None => out.push_str("null"),
    }
}

fn write_string(text: &str, out: &mut String) {
    out.push('"');
    let mut plain = 0;
    for (index, byte) in text.bytes().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.push_str(&text[plain..index]);
        match byte {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            _ => write!(out, "\\u{byte:04x}").unwrap_or(()),
        }
        plain = index + 1;
    }
    out.push_str(&text[plain..]);
    out.push('"');
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = u32::from_be_bytes([0, group[0], *group.get(1).unwrap_or(&0), *group.get(2).unwrap_or(&0)]);
        for place in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * place)) as usize & 63];
            out.push(if place <= group.len() { letter as char } else { '=' });
        }
    }
    out
}
