// SPDX-License-Identifier: Apache-2.0
//! Where Jinja2's values are Python's and minijinja's differ: numbers as text, JSON, white space, methods.

use minijinja::value::{from_args, Kwargs, Tuple, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State};
use regex::Regex;
use std::ffi::CString;
use std::fmt::Write;
use std::sync::OnceLock;

type Result<T> = std::result::Result<T, Error>;

fn refuse<T>(words: impl Into<String>) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidOperation, words.into()))
}

pub fn add_to_environment(environment: &mut Environment) {
    environment.set_unknown_method_callback(call_method);
    environment.set_formatter(format_value);
    environment.add_filter("tojson", to_json);
    environment.add_filter("trim", |text: String, letters: Option<String>| trimmed(&text, letters.as_deref(), true, true).to_string());
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("center", |text: String, width: Option<i64>| padded(&text, "center", width.unwrap_or(80), " "));
    environment.add_filter("wordcount", |text: String| {
        text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("truncate", truncate);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain || value.is_undefined());
    environment.add_filter("string", |value: &Value| text_of(value));
    environment.add_filter("e", escape);
    environment.add_filter("escape", escape);
    // Whatever has a length and items, Jinja2's Undefined included.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined) || (value.kind() == ValueKind::Iterable && value.len().is_some())
    });
    environment.add_test("iterable", |value: &Value| value.try_iter().is_ok() && !value.is_none());
    environment.add_function("strftime_now", strftime_now);
}

/// len(), which knows Jinja2's Undefined as an empty thing.
fn length(value: &Value) -> Result<usize> {
    match value.len() {
        Some(length) => Ok(length),
        None if value.is_undefined() => Ok(0),
        None => refuse(format!("object of type {} has no length", value.kind())),
    }
}

/// Jinja2's truncate(length=255, killwords=False, end="...", leeway=5).
fn truncate(text: String, length: Option<usize>, kill_words: Option<bool>, end: Option<String>, named: Kwargs) -> Result<String> {
    let length = length.or(named.get("length")?).unwrap_or(255);
    let kill_words = kill_words.or(named.get("killwords")?).unwrap_or(false);
    let end = end.or(named.get("end")?).unwrap_or_else(|| "...".into());
    let leeway = named.get::<Option<usize>>("leeway")?.unwrap_or(5);
    named.assert_all_used()?;
    let letters: Vec<char> = text.chars().collect();
    if letters.len() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let Some(room) = length.checked_sub(end.chars().count()) else { return refuse("truncate: the end is longer than the length") };
    let mut kept: String = letters[..room].iter().collect();
    if !kill_words {
        kept.truncate(kept.rfind(' ').unwrap_or(kept.len()));
    }
    Ok(kept + &end)
}

/// str.ljust, rjust, center and zfill.
fn padded(text: &str, method: &str, width: i64, fill: &str) -> Result<String> {
    let width = usize::try_from(width).unwrap_or(0);
    if width > 1_000_000 || fill.chars().count() != 1 {
        return refuse(format!("{method}: a width above a million, or a fill that is not one letter"));
    }
    let missing = width.saturating_sub(text.chars().count());
    // The odd letter of str.center goes to the left when the width is odd (CPython's rule).
    let left = match method {
        "ljust" => 0,
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let (sign, rest) = match text.strip_prefix(['+', '-']) {
        Some(rest) if method == "zfill" => (&text[..1], rest),
        _ => ("", text),
    };
    Ok(format!("{sign}{}{rest}{}", fill.repeat(left), fill.repeat(missing - left)))
}

fn format_value(out: &mut Output, _: &mut State, value: &Value) -> Result<()> {
    match value.as_str() {
        Some(text) => out.write_str(text).map_err(Error::from),
        None => out.write_str(&text_of(value)).map_err(Error::from),
    }
}

/// str(value). Minijinja prints nearly the same; floats far from one and letters that cannot be seen are the difference.
fn text_of(value: &Value) -> String {
    let mut out = String::new();
    match value.as_str() {
        Some(text) => out.push_str(text),
        None => write_repr(value, 0, &mut out),
    }
    out
}

fn write_repr(value: &Value, depth: usize, out: &mut String) {
    let is_tuple = value.is_tuple();
    match value.kind() {
        _ if depth > 200 => out.push_str("..."),
        ValueKind::String => write_string_repr(value.as_str().unwrap_or(""), out),
        ValueKind::Number => match float_of(value) {
            Some(number) => out.push_str(&float_text(number)),
            None => write!(out, "{value}").unwrap_or(()),
        },
        ValueKind::Seq => {
            let items: Vec<Value> = value.try_iter().map(|items| items.collect()).unwrap_or_default();
            out.push(if is_tuple { '(' } else { '[' });
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_repr(item, depth + 1, out);
            }
            out.push_str(if is_tuple && items.len() == 1 { "," } else { "" });
            out.push(if is_tuple { ')' } else { ']' });
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_repr(&key, depth + 1, out);
                out.push_str(": ");
                write_repr(&value.get_item(&key).unwrap_or_default(), depth + 1, out);
            }
            out.push('}');
        }
        ValueKind::Undefined if depth > 0 => out.push_str("Undefined"),
        _ => write!(out, "{value}").unwrap_or(()),
    }
}

/// str.__repr__: double quotes only around text that has single ones and no double ones.
fn write_string_repr(text: &str, out: &mut String) {
    static HIDDEN: OnceLock<Regex> = OnceLock::new();
    let hidden = HIDDEN.get_or_init(|| Regex::new(r"[[\p{C}\p{Z}]--\x20]").unwrap_or_else(|error| panic!("{error}")));
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for letter in text.chars() {
        match letter {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if letter == quote => out.extend(['\\', letter]),
            ' '..='~' => out.push(letter),
            _ if !hidden.is_match(letter.encode_utf8(&mut [0; 4])) => out.push(letter),
            _ => match letter as u32 {
                code @ 0..=0xff => write!(out, "\\x{code:02x}").unwrap_or(()),
                code @ 0x100..=0xffff => write!(out, "\\u{code:04x}").unwrap_or(()),
                code => write!(out, "\\U{code:08x}").unwrap_or(()),
            },
        }
    }
    out.push(quote);
}

/// markupsafe's escape.
fn escape(text: String) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            other => out.push(other),
        }
    }
    out
}

fn float_of(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    if is_float {
        f64::try_from(value.clone()).ok()
    } else {
        None
    }
}

/// float.__repr__: the shortest digits that read back equal; with an exponent below 1e-4 and from 1e16 on.
fn float_text(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number == 0.0 || (-4..16).contains(&exponent) {
        let fixed = format!("{number}");
        return if fixed.contains('.') { fixed } else { fixed + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

// ---- json.dumps ----

struct JsonStyle {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False), as transformers defines it over json.dumps.
fn to_json(value: &Value, ensure_ascii: Option<Value>, indent: Option<Value>, arguments: Kwargs) -> Result<String> {
    let named = |name: &str| -> Result<Option<Value>> { arguments.get::<Option<Value>>(name) };
    let ensure_ascii = match ensure_ascii {
        Some(given) => Some(given),
        None => named("ensure_ascii")?,
    };
    let indent = match indent {
        Some(given) => Some(given),
        None => named("indent")?,
    };
    let separators = named("separators")?;
    let sort_keys = named("sort_keys")?;
    arguments.assert_all_used()?;
    let indent = match indent {
        Some(given) if given.is_none() || given.is_undefined() => None,
        Some(given) => match (given.as_str(), i64::try_from(given.clone())) {
            (Some(text), _) => Some(text.to_string()),
            (None, Ok(width)) => Some(" ".repeat(width.clamp(0, 64) as usize)),
            _ => return refuse("tojson: indent is neither a number nor text"),
        },
        None => None,
    };
    let (item_separator, key_separator) = match separators {
        Some(pair) if !pair.is_none() => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
        _ if indent.is_some() => (",".into(), ": ".into()),
        _ => (", ".into(), ": ".into()),
    };
    let style = JsonStyle {
        ensure_ascii: ensure_ascii.is_some_and(|flag| flag.is_true()),
        indent,
        item_separator,
        key_separator,
        sort_keys: sort_keys.is_some_and(|flag| flag.is_true()),
    };
    let mut out = String::new();
    write_json(value, &style, 0, &mut out)?;
    if out.len() > LONGEST_JSON {
        return refuse("tojson: makes more than 16 MiB of text");
    }
    Ok(out)
}

/// A filter is one step to the fuel, whatever it makes; and each tojson of a text with quotation marks is twice as long as the last.
const LONGEST_JSON: usize = 16 << 20;

fn write_json(value: &Value, style: &JsonStyle, depth: usize, out: &mut String) -> Result<()> {
    if depth > 200 {
        return refuse("tojson: nested more than 200 deep");
    }
    if out.len() > LONGEST_JSON {
        return refuse("tojson: makes more than 16 MiB of text");
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => match float_of(value) {
            Some(number) if number.is_nan() => out.push_str("NaN"),
            Some(number) if number.is_infinite() => out.push_str(if number > 0.0 { "Infinity" } else { "-Infinity" }),
            Some(number) => out.push_str(&float_text(number)),
            None => write!(out, "{value}")?,
        },
        ValueKind::String => write_json_string(value.as_str().unwrap_or(""), style.ensure_ascii, out),
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            let mut items = Vec::with_capacity(keys.len());
            for key in keys {
                let name = match key.kind() {
                    ValueKind::String => key.to_string(),
                    ValueKind::None => "null".into(),
                    ValueKind::Bool => if key.is_true() { "true".into() } else { "false".into() },
                    ValueKind::Number => float_of(&key).map(float_text).unwrap_or_else(|| key.to_string()),
                    _ => return refuse("tojson: a key is neither text nor a number"),
                };
                items.push((Some(name), value.get_item(&key)?));
            }
            write_items('{', '}', items, style, depth, out)?;
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| (None, item)).collect();
            write_items('[', ']', items, style, depth, out)?;
        }
        ValueKind::Undefined => return refuse("tojson: Undefined is not JSON serializable"),
        other => return refuse(format!("tojson: {other} is not JSON serializable")),
    }
    Ok(())
}

fn write_items(open: char, close: char, items: Vec<(Option<String>, Value)>, style: &JsonStyle, depth: usize, out: &mut String) -> Result<()> {
    out.push(open);
    let new_line = |depth: usize, out: &mut String| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    };
    let is_empty = items.is_empty();
    for (index, (key, item)) in items.into_iter().enumerate() {
        if index > 0 {
            out.push_str(&style.item_separator);
        }
        new_line(depth + 1, out);
        if let Some(key) = key {
            write_json_string(&key, style.ensure_ascii, out);
            out.push_str(&style.key_separator);
        }
        write_json(&item, style, depth + 1, out)?;
    }
    if !is_empty {
        new_line(depth, out);
    }
    out.push(close);
    Ok(())
}

fn write_json_string(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    for letter in text.chars() {
        match letter {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            control if control < ' ' => write!(out, "\\u{:04x}", control as u32).unwrap_or(()),
            other if ensure_ascii && other > '~' => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").unwrap_or(());
                }
            }
            other => out.push(other),
        }
    }
    out.push('"');
}

// ---- the clock ----

/// datetime.now().strftime(format), in the machine's time zone.
fn strftime_now(format: String) -> Result<String> {
    let Ok(format) = CString::new(format) else { return refuse("strftime_now: the format holds a zero byte") };
    if format.as_bytes().is_empty() {
        return Ok(String::new());
    }
    let mut buffer = [0u8; 1024];
    // SAFETY: all pointers are to live values; strftime writes at most the buffer's size.
    let size = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut parts: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut parts).is_null() {
            return refuse("strftime_now: the clock cannot be read");
        }
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr(), &parts)
    };
    match std::str::from_utf8(&buffer[..size]) {
        Ok(text) if size > 0 => Ok(text.to_string()),
        _ => refuse("strftime_now: the format gives more than 1023 bytes, or nothing"),
    }
}

// ---- methods ----

/// str.isspace: Unicode's White_Space and four ASCII separators.
fn is_space(letter: char) -> bool {
    letter.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&letter)
}

fn trimmed<'a>(text: &'a str, letters: Option<&str>, left: bool, right: bool) -> &'a str {
    let is_cut = |letter: char| match letters {
        Some(letters) => letters.contains(letter),
        None => is_space(letter),
    };
    let text = if left { text.trim_start_matches(is_cut) } else { text };
    if right {
        text.trim_end_matches(is_cut)
    } else {
        text
    }
}

fn call_method(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value> {
    if let Some(text) = value.as_str() {
        if let Some(result) = string_method(text, method, arguments)? {
            return Ok(result);
        }
    }
    if value.kind() == ValueKind::Map && method == "copy" {
        let () = from_args(arguments)?;
        return Ok(value.clone());
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments)
}

/// The methods that minijinja-contrib lacks, or where white space or arguments differ from Python's.
fn string_method(text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>> {
    let result = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (letters,): (Option<&str>,) = from_args(arguments)?;
            Value::from(trimmed(text, letters, method != "rstrip", method != "lstrip"))
        }
        "split" | "rsplit" => {
            let (separator, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(arguments)?;
            let separator = match separator {
                Some(given) => Some(given),
                None => named.get::<Option<Value>>("sep")?,
            };
            let most = match most {
                Some(given) => given,
                None => named.get::<Option<i64>>("maxsplit")?.unwrap_or(-1),
            };
            named.assert_all_used()?;
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            let separator = separator.filter(|given| !given.is_none());
            let parts = match &separator {
                None => split_at_space(text, most, method == "rsplit"),
                Some(given) => {
                    let Some(separator) = given.as_str().filter(|words| !words.is_empty()) else {
                        return refuse("split: the separator is empty or no text");
                    };
                    let pieces = most.saturating_add(1);
                    if method == "split" {
                        text.splitn(pieces, separator).map(str::to_string).collect()
                    } else {
                        let mut parts: Vec<String> = text.rsplitn(pieces, separator).map(str::to_string).collect();
                        parts.reverse();
                        parts
                    }
                }
            };
            Value::from(parts)
        }
        "splitlines" => {
            let (keep_ends, named): (Option<bool>, Kwargs) = from_args(arguments)?;
            let keep_ends = keep_ends.or(named.get("keepends")?).unwrap_or(false);
            named.assert_all_used()?;
            let mut lines = Vec::new();
            let mut rest = text;
            while !rest.is_empty() {
                let is_end = |letter: char| matches!(letter, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
                let (line, width) = match rest.find(is_end) {
                    Some(place) if rest[place..].starts_with("\r\n") => (place, 2),
                    Some(place) => (place, rest[place..].chars().next().map_or(1, char::len_utf8)),
                    None => (rest.len(), 0),
                };
                lines.push(rest[..line + if keep_ends { width } else { 0 }].to_string());
                rest = &rest[line + width..];
            }
            Value::from(lines)
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            if separator.is_empty() {
                return refuse("partition: the separator is empty");
            }
            let found = if method == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let (before, middle, behind) = match found {
                Some((before, behind)) => (before, separator, behind),
                None if method == "partition" => (text, "", ""),
                None => ("", "", text),
            };
            Value::from(Tuple::from(vec![Value::from(before), Value::from(middle), Value::from(behind)]))
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let (width, fill): (i64, Option<&str>) = from_args(arguments)?;
            Value::from(padded(text, method, width, fill.unwrap_or(if method == "zfill" { "0" } else { " " }))?)
        }
        "title" => {
            let () = from_args(arguments)?;
            let mut in_word = false;
            let mut out = String::with_capacity(text.len());
            for letter in text.chars() {
                if in_word {
                    out.extend(letter.to_lowercase());
                } else {
                    out.extend(letter.to_uppercase());
                }
                in_word = letter.is_uppercase() || letter.is_lowercase();
            }
            Value::from(out)
        }
        "casefold" => {
            let () = from_args(arguments)?;
            Value::from(text.to_lowercase().replace('\u{df}', "ss"))
        }
        "swapcase" => {
            let () = from_args(arguments)?;
            let swap = |letter: char| -> String {
                if letter.is_uppercase() { letter.to_lowercase().collect() } else { letter.to_uppercase().collect() }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(arguments)?;
            let found = if method == "index" { text.find(part) } else { text.rfind(part) };
            match found {
                Some(place) => Value::from(text[..place].chars().count()),
                None => return refuse(format!("{method}: substring not found")),
            }
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

fn split_at_space(text: &str, most: usize, from_right: bool) -> Vec<String> {
    let mut parts = Vec::new();
    let mut rest = trimmed(text, None, !from_right, from_right);
    while !rest.is_empty() {
        let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        match cut {
            Some(place) if parts.len() < most => {
                let width = rest[place..].chars().next().map_or(1, char::len_utf8);
                let (part, remaining) =
                    if from_right { (&rest[place + width..], &rest[..place]) } else { (&rest[..place], &rest[place..]) };
                parts.push(part.to_string());
                rest = trimmed(remaining, None, !from_right, from_right);
            }
            // What is left once the count is used up keeps its white space.
            _ => {
                parts.push(rest.to_string());
                break;
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}
