// SPDX-License-Identifier: Apache-2.0
//! Chat templates, rendered by minijinja in the environment that transformers gives them (chat_template_utils.py).

use crate::python;
use crate::Result;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use std::borrow::Cow;
use std::cell::RefCell;
use std::io;

#[derive(Clone, Copy)]
pub struct Limits {
    pub fuel: u64,
    pub max_bytes: usize,
}

pub struct Rendered {
    pub text: String,
    pub spans: Vec<u32>,
}

const TEMPLATE: &str = "chat template";
const GENERATION: &str = "__alambic_generation";
const MARKED: &str = "__alambic_marked";
/// Noncharacters of plane 16: no text that is meant to be exchanged holds them.
const BEGIN: char = '\u{10FFFE}';
const END: char = '\u{10FFFF}';

/// A compiled template. Conversations come by the thousand, so each thread keeps the last one.
struct Compiled {
    source: String,
    environment: Environment<'static>,
    has_generation: bool,
}

thread_local! {
    static LAST: RefCell<Option<Compiled>> = const { RefCell::new(None) };
}

pub fn render(source: &str, variables: &str, limits: Limits) -> Result<Rendered> {
    let variables: Value = serde_json::from_str(variables).map_err(|error| format!("the conversation: {error}"))?;
    LAST.with(|last| {
        let mut last = last.borrow_mut();
        if last.as_ref().is_none_or(|compiled| compiled.source != source) {
            *last = Some(compile(source)?);
        }
        let Some(compiled) = last.as_mut() else { return Err("the template is gone".into()) };
        compiled.environment.set_fuel(Some(limits.fuel));
        let text = compiled.run(&variables, false, limits)?;
        if !compiled.has_generation {
            return Ok(Rendered { text, spans: Vec::new() });
        }
        // Rendered again with a mark before and behind each block. Should the template look at what a block rendered
        // (trim it, measure it), the text would come out otherwise: then nothing can be said about where it went.
        let marked = compiled.run(&variables, true, limits)?;
        let (unmarked, spans) = take_marks(&marked)?;
        if unmarked != text {
            return Err("the template changes the text of its generation blocks afterwards, so their places are unknown".into());
        }
        Ok(Rendered { text, spans })
    })
}

fn take_marks(marked: &str) -> Result<(String, Vec<u32>)> {
    let mut text = String::with_capacity(marked.len());
    let mut spans: Vec<(u32, u32)> = Vec::new();
    let mut open = Vec::new();
    for (index, piece) in marked.split_inclusive([BEGIN, END]).enumerate() {
        let body = piece.trim_end_matches([BEGIN, END]);
        if piece.len() - body.len() > BEGIN.len_utf8() {
            return Err(format!("piece {index} of the text holds the noncharacters that mark generation blocks"));
        }
        text.push_str(body);
        let place = u32::try_from(text.len()).map_err(|_| String::from("the text is longer than 4 GiB"))?;
        if piece.ends_with(BEGIN) {
            open.push(spans.len());
            spans.push((place, place));
        } else if piece.ends_with(END) {
            let Some(span) = open.pop() else { return Err("the text holds the noncharacters that mark generation blocks".into()) };
            spans[span].1 = place;
        }
    }
    if !open.is_empty() {
        return Err("the text holds the noncharacters that mark generation blocks".into());
    }
    Ok((text, spans.into_iter().flat_map(|(begin, end)| [begin, end]).collect()))
}

fn compile(source: &str) -> Result<Compiled> {
    // Jinja2 reads templates with any line end and keeps one kind.
    let lines: Cow<str> =
        if source.contains('\r') { source.replace("\r\n", "\n").replace('\r', "\n").into() } else { source.into() };
    let (rewritten, has_generation) = rewrite_generation(&lines);
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    let blocks = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(blocks.map_err(|error| error.to_string())?);
    minijinja_contrib::add_to_environment(&mut environment);
    environment.remove_global("debug"); // Jinja2 has no such global, and templates ask whether names are defined
    python::add_to_environment(&mut environment);
    environment.add_function("raise_exception", |message: Value| -> std::result::Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, Raised(message.to_string()).mark()))
    });
    environment.add_function(GENERATION, |state: &mut State, arguments: Kwargs| -> std::result::Result<Value, Error> {
        let caller: Value = arguments.get("caller")?;
        let body = caller.call(state, &[])?;
        let marked = state.lookup(MARKED).is_some_and(|flag| flag.is_true());
        Ok(if marked { Value::from(format!("{BEGIN}{body}{END}")) } else { body })
    });
    environment.add_template_owned(TEMPLATE, rewritten).map_err(|error| in_words(&error, None))?;
    Ok(Compiled { source: source.to_string(), environment, has_generation })
}

impl Compiled {
    fn run(&self, variables: &Value, marked: bool, limits: Limits) -> Result<String> {
        let words = |error: Error| in_words(&error, Some(limits));
        let context = minijinja::context! { ..minijinja::context! { __alambic_marked => marked }, ..variables.clone() };
        // A mark is four bytes; there are fewer marks than bytes of any sane text.
        let mut out = Capped { bytes: Vec::new(), most: limits.max_bytes.saturating_mul(if marked { 2 } else { 1 }) };
        let template = self.environment.get_template(TEMPLATE).map_err(words)?;
        template.render_captured_to(context, &mut out).map_err(words)?;
        String::from_utf8(out.bytes).map_err(|error| error.to_string())
    }
}

struct Capped {
    bytes: Vec<u8>,
    most: usize,
}

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.most {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the template itself complains about, told apart from the engine's own complaints by a prefix.
struct Raised(String);

impl Raised {
    const PREFIX: &'static str = "\u{10FFFE}";
    fn mark(self) -> String {
        Self::PREFIX.to_string() + &self.0
    }
}

fn in_words(error: &Error, limits: Option<Limits>) -> String {
    // The innermost error with a line is where it happened; the outer ones are the calls on the way there.
    let mut line = error.line();
    let mut detail = error.detail().map(str::to_string);
    let mut kind = error.kind();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(inner) = inner.downcast_ref::<Error>() {
            line = inner.line().or(line);
            if inner.detail().is_some() {
                detail = inner.detail().map(str::to_string);
                kind = inner.kind();
            }
        } else if inner.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::FileTooLarge) {
            kind = ErrorKind::WriteFailure;
        }
        source = inner.source();
    }
    let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
    match (kind, limits) {
        (ErrorKind::OutOfFuel, Some(limits)) => format!("{place}it runs for more than {} steps", limits.fuel),
        (ErrorKind::WriteFailure, Some(limits)) => format!("{place}it renders more than {} bytes", limits.max_bytes),
        _ => match detail.as_deref().and_then(|words| words.strip_prefix(Raised::PREFIX)) {
            Some(words) => format!("{place}the template refuses: {words}"),
            None => format!("{place}{kind}{}", detail.map(|words| format!(": {words}")).unwrap_or_default()),
        },
    }
}

/// {% generation %} ... {% endgeneration %} as a call block, which is what transformers' extension makes of it: the same
/// scope, and white space handled by the same rules. Tags in comments, strings and raw blocks are left alone.
fn rewrite_generation(source: &str) -> (String, bool) {
    let bytes = source.as_bytes();
    let mut out = String::with_capacity(source.len());
    let (mut copied, mut at, mut found) = (0, 0, false);
    while at + 1 < bytes.len() {
        match &bytes[at..at + 2] {
            b"{#" => at = source[at..].find("#}").map_or(bytes.len(), |end| at + end + 2),
            b"{{" => at = end_of_tag(bytes, at + 2, b"}}"),
            b"{%" => {
                let end = end_of_tag(bytes, at + 2, b"%}");
                let inside = source.get(at + 2..end.saturating_sub(2)).unwrap_or("");
                let name = inside.trim_matches(|letter: char| letter.is_ascii_whitespace() || letter == '-' || letter == '+');
                let new_name = match name {
                    "generation" => Some(format!("call {GENERATION}()")),
                    "endgeneration" => Some(String::from("endcall")),
                    _ => None,
                };
                if let Some(new_name) = new_name {
                    out.push_str(&source[copied..at + 2]);
                    out.push_str(&inside.replacen(name, &new_name, 1));
                    copied = end - 2;
                    found = true;
                }
                at = end;
                if name == "raw" {
                    at = end_of_raw(source, at);
                }
            }
            _ => at += 1,
        }
    }
    out.push_str(&source[copied..]);
    (out, found)
}

/// Just behind the first `end` that is not inside a string, or the end of the text.
fn end_of_tag(bytes: &[u8], mut at: usize, end: &[u8; 2]) -> usize {
    let mut quote = None;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), letter) if open == letter => quote = None,
            (None, letter @ (b'"' | b'\'')) => quote = Some(letter),
            (None, _) if bytes[at..].starts_with(end) => return at + 2,
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

fn end_of_raw(source: &str, mut at: usize) -> usize {
    while let Some(tag) = source[at..].find("{%") {
        let inside = at + tag + 2;
        let Some(length) = source[inside..].find("%}") else { break };
        at = inside + length + 2;
        let name = source[inside..inside + length].trim_matches(|letter: char| letter.is_ascii_whitespace() || letter == '-' || letter == '+');
        if name == "endraw" {
            return at;
        }
    }
    source.len()
}
