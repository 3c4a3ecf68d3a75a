//! Text of somebody else on a terminal. A control character in it, C0 or C1, could move the cursor, change colours or
//! answer for the user; one that sets the direction of writing could show a word as another. So all that is printed for
//! people has them as Rust writes them, and JSON as JSON does.

use std::borrow::Cow;
use std::fmt::Write as _;

use tracing::field::Field;
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{Writer, debug_fn};

/// For one line.
pub(crate) fn one_line(text: &str) -> Cow<'_, str> {
    escape(text, is_hidden, |c, out| out.extend(c.escape_default()))
}

/// For several lines.
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| is_hidden(c) && c != '\n' && c != '\t', |c, out| out.extend(c.escape_default()))
}

/// For JSON, whose writer has escaped only what JSON cannot have. White space between its parts stays.
pub(crate) fn in_json(json: &str) -> Cow<'_, str> {
    let hidden = |c: char| is_hidden(c) && !c.is_ascii_whitespace();
    escape(json, hidden, |c, out| {
        // All of them are of 16 bits.
        write!(out, "\\u{:04x}", u32::from(c)).expect("writing to a string cannot fail");
    })
}

/// Fields of the log, each on one line: the usual form lets line ends pass, with which a line could be made up.
pub(crate) fn log_fields() -> impl for<'w> FormatFields<'w> + Send + Sync + 'static {
    debug_fn(|writer: &mut Writer<'_>, field: &Field, value: &dyn std::fmt::Debug| {
        let text = format!("{value:?}");
        match field.name() {
            "message" => write!(writer, "{}", one_line(&text)),
            name => write!(writer, "{name}={}", one_line(&text)),
        }
    })
    .delimited(" ")
}

fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escape(text: &str, hidden: impl Fn(char) -> bool, write: impl Fn(char, &mut String)) -> Cow<'_, str> {
    if !text.contains(&hidden) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if hidden(c) { write(c, &mut out) } else { out.push(c) }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_reach_no_terminal() {
        let text = "a\u{1b}[31m\tb\nc\u{9b}2J\u{7f}\u{202e} é\u{301}";
        assert_eq!(one_line(text), "a\\u{1b}[31m\\tb\\nc\\u{9b}2J\\u{7f}\\u{202e} é\u{301}");
        assert_eq!(lines(text), "a\\u{1b}[31m\tb\nc\\u{9b}2J\\u{7f}\\u{202e} é\u{301}");
        assert!(matches!(one_line("plain"), Cow::Borrowed("plain")));
        let json = serde_json::to_string_pretty(&[text]).unwrap();
        let shown = in_json(&json);
        assert!(!shown.contains(|c| is_hidden(c) && c != '\n'), "{shown}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&shown).unwrap(), [text]);
    }
}
