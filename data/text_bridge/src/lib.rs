// SPDX-License-Identifier: Apache-2.0
//! The Rust side of text_bridge.h: every function here is declared and described there.
//!
//! Rules of the border: no panic leaves a function (`guarded`), what is handed out is a boxed slice that comes back
//! through the free functions, and pointers are only followed when their size is not zero.

mod chat;
mod contain;
mod python;
mod rows;
mod tokens;

use contain::{contained, Containment};
use std::any::Any;
use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Once;

/// What went wrong, in one line for a person.
pub type Result<T> = std::result::Result<T, String>;

#[repr(C)]
pub struct AlambicText {
    data: *mut u8,
    size: usize,
}

#[repr(C)]
pub struct AlambicNumbers {
    data: *mut u32,
    size: usize,
}

fn give_text(text: Vec<u8>) -> AlambicText {
    let size = text.len();
    AlambicText { data: Box::into_raw(text.into_boxed_slice()) as *mut u8, size }
}

fn give_numbers(numbers: Vec<u32>) -> AlambicNumbers {
    let size = numbers.len();
    AlambicNumbers { data: Box::into_raw(numbers.into_boxed_slice()) as *mut u32, size }
}

unsafe fn borrow<'a, T>(data: *const T, size: usize) -> &'a [T] {
    if size == 0 {
        &[]
    } else {
        std::slice::from_raw_parts(data, size)
    }
}

unsafe fn borrow_text<'a>(data: *const u8, size: usize, what: &str) -> Result<&'a str> {
    std::str::from_utf8(borrow(data, size)).map_err(|error| format!("{what} is not UTF-8 at byte {}", error.valid_up_to()))
}

thread_local! {
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

fn words_of(payload: &(dyn Any + Send)) -> String {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(words), _) => words.to_string(),
        (_, Some(words)) => words.clone(),
        _ => String::from("no message"),
    }
}

/// Runs `work`; a panic inside becomes an error, and nothing is printed.
pub fn quietly<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            let place = info.location().map(|l| format!(" ({}:{})", file_name(l.file()), l.line())).unwrap_or_default();
            let words = format!("{}{place}", words_of(info.payload()));
            let _ = LAST_PANIC.try_with(|last| *last.borrow_mut() = words);
        }))
    });
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result,
        Err(_) => Err(format!("the library panicked: {}", LAST_PANIC.with(|last| last.take()))),
    }
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn one_line(words: &str) -> String {
    const MOST: usize = 600; // bytes; a message may quote the file it complains about
    let mut end = words.len().min(MOST);
    while !words.is_char_boundary(end) {
        end -= 1;
    }
    let dots = if end < words.len() { "..." } else { "" };
    words[..end].split_whitespace().collect::<Vec<_>>().join(" ") + dots
}

unsafe fn guarded(error: *mut AlambicText, work: impl FnOnce() -> Result<()>) -> bool {
    match quietly(work) {
        Ok(()) => true,
        Err(words) => {
            *error = give_text(one_line(&words).into_bytes());
            false
        }
    }
}

#[no_mangle]
pub unsafe extern "C" fn alambic_text_free(text: AlambicText) {
    if !text.data.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(text.data, text.size)));
    }
}

#[no_mangle]
pub unsafe extern "C" fn alambic_numbers_free(numbers: AlambicNumbers) {
    if !numbers.data.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(numbers.data, numbers.size)));
    }
}

// ---- tokenizers ----

#[no_mangle]
pub unsafe extern "C" fn alambic_tokenizer_new(
    json: *const u8,
    json_size: usize,
    tokenizer: *mut *mut tokens::Tokens,
    error: *mut AlambicText,
) -> bool {
    guarded(error, || {
        let json = borrow(json, json_size).to_vec();
        // A real file takes some twenty times its size while it is read, and a few seconds.
        let limits = Containment { megabytes: 1024 + (json.len() >> 20) as i64 * 100, seconds: 300 };
        let loaded = contained(limits, move || tokens::Tokens::new(&json))?;
        *tokenizer = Box::into_raw(Box::new(loaded));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn alambic_tokenizer_extend(
    json: *const u8,
    json_size: usize,
    tokens: *const u8,
    tokens_size: usize,
    special: bool,
    extended: *mut AlambicText,
    error: *mut AlambicText,
) -> bool {
    guarded(error, || {
        let json = borrow(json, json_size).to_vec();
        let tokens: Vec<String> = serde_json::from_slice(borrow(tokens, tokens_size)).map_err(|error| error.to_string())?;
        let limits = Containment { megabytes: 1024 + (json.len() >> 20) as i64 * 200, seconds: 300 };
        let text = contained(limits, move || tokens::Tokens::extended(&json, &tokens, special))?;
        *extended = give_text(text.into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn alambic_tokenizer_unknown_id(tokenizer: *const tokens::Tokens, id: *mut u32) -> bool {
    match quietly(|| Ok((*tokenizer).unknown_id())) {
        Ok(Some(number)) => {
            *id = number;
            true
        }
        _ => false,
    }
}

#[no_mangle]
pub unsafe extern "C" fn alambic_tokenizer_free(tokenizer: *mut tokens::Tokens) {
    if !tokenizer.is_null() {
        let _ = quietly(|| {
            drop(Box::from_raw(tokenizer));
            Ok(())
        });
    }
}

#[no_mangle]
pub unsafe extern "C" fn alambic_tokenizer_encode(
    tokenizer: *const tokens::Tokens,
    text: *const u8,
    text_size: usize,
    add_special_tokens: bool,
    with_offsets: bool,
    numbers: *mut AlambicNumbers,
    error: *mut AlambicText,
) -> bool {
    guarded(error, || {
        let text = borrow_text(text, text_size, "the text")?;
        *numbers = give_numbers((*tokenizer).encode(text, add_special_tokens, with_offsets)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn alambic_tokenizer_decode(
    tokenizer: *const tokens::Tokens,
    ids: *const u32,
    num_ids: usize,
    skip_special_tokens: bool,
    text: *mut AlambicText,
    error: *mut AlambicText,
) -> bool {
    guarded(error, || {
        *text = give_text((*tokenizer).decode(borrow(ids, num_ids), skip_special_tokens)?.into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn alambic_tokenizer_vocabulary_size(tokenizer: *const tokens::Tokens) -> u32 {
    (*tokenizer).vocabulary_size()
}

#[no_mangle]
pub unsafe extern "C" fn alambic_tokenizer_id_of(
    tokenizer: *const tokens::Tokens,
    token: *const u8,
    token_size: usize,
    id: *mut u32,
) -> bool {
    let found = quietly(|| Ok((*tokenizer).id_of(borrow_text(token, token_size, "the token")?)));
    match found {
        Ok(Some(number)) => {
            *id = number;
            true
        }
        _ => false,
    }
}

#[no_mangle]
pub unsafe extern "C" fn alambic_tokenizer_token_of(tokenizer: *const tokens::Tokens, id: u32, token: *mut AlambicText) -> bool {
    match quietly(|| Ok((*tokenizer).token_of(id))) {
        Ok(Some(words)) => {
            *token = give_text(words.into_bytes());
            true
        }
        _ => false,
    }
}

#[no_mangle]
pub unsafe extern "C" fn alambic_tokenizer_canonical(
    tokenizer: *const tokens::Tokens,
    canonical: *mut AlambicText,
    error: *mut AlambicText,
) -> bool {
    guarded(error, || {
        *canonical = give_text((*tokenizer).canonical()?.into_bytes());
        Ok(())
    })
}

// ---- chat templates ----

#[no_mangle]
pub unsafe extern "C" fn alambic_template_render(
    source: *const u8,
    source_size: usize,
    variables: *const u8,
    variables_size: usize,
    fuel: u64,
    max_bytes: u64,
    text: *mut AlambicText,
    spans: *mut AlambicNumbers,
    error: *mut AlambicText,
) -> bool {
    guarded(error, || {
        let source = borrow_text(source, source_size, "the template")?;
        let variables = borrow_text(variables, variables_size, "the conversation")?;
        let max_bytes = usize::try_from(max_bytes).unwrap_or(usize::MAX);
        let containment = Containment { megabytes: 512 + (max_bytes.saturating_add(variables.len()) >> 20) as i64 * 8, seconds: 60 };
        let limits = chat::Limits { fuel, max_bytes };
        let (source, variables) = (source.to_string(), variables.to_string());
        let rendered = contained(containment, move || chat::render(&source, &variables, limits))?;
        *text = give_text(rendered.text.into_bytes());
        *spans = give_numbers(rendered.spans);
        Ok(())
    })
}

// ---- Parquet ----

#[no_mangle]
pub unsafe extern "C" fn alambic_rows_open(
    path: *const u8,
    path_size: usize,
    rows: *mut *mut rows::Rows,
    num_rows: *mut u64,
    error: *mut AlambicText,
) -> bool {
    guarded(error, || {
        let opened = rows::Rows::open(borrow(path, path_size))?;
        *num_rows = opened.num_rows();
        *rows = Box::into_raw(Box::new(opened));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn alambic_rows_free(rows: *mut rows::Rows) {
    if !rows.is_null() {
        let _ = quietly(|| {
            drop(Box::from_raw(rows));
            Ok(())
        });
    }
}

#[no_mangle]
pub unsafe extern "C" fn alambic_rows_next(
    rows: *mut rows::Rows,
    max_rows: u64,
    max_bytes: u64,
    lines: *mut AlambicText,
    error: *mut AlambicText,
) -> bool {
    guarded(error, || {
        *lines = give_text((*rows).next_lines(max_rows, max_bytes)?.into_bytes());
        Ok(())
    })
}
