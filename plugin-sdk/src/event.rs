use std::borrow::Cow;

use crate::glob::matches;
use crate::{Error, Timestamp};

/// One event, as `apply` gets it.
///
/// `T` is the enum with `#[derive(Events)]`. The texts are borrowed from the batch.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Event<'a, T> {
    /// The source's name.
    pub source: &'a str,
    /// The position in the log, which is one sequence of the events of all sources: it rises from event to event, with
    /// gaps where the projection does not subscribe.
    pub position: u64,
    /// The id, unique in its source.
    pub id: &'a str,
    /// The stream, such as one order; empty if the log has none, or if its name was forgotten.
    pub stream: &'a str,
    /// The version in its stream; 0 where the log does not say.
    pub version: u64,
    /// The type's name in the log.
    pub event_type: &'a str,
    /// When it happened, as its producer says.
    pub time: Timestamp,
    /// A JSON object of the CloudEvents attributes that have no field here; empty for none.
    pub metadata: &'a str,
    /// The payload's bytes as they came, for payloads that are not JSON.
    pub payload: &'a [u8],
    /// Its content was forgotten: payload and metadata are empty. Always false unless the projection asks for such
    /// events, with `forgotten` in [`#[projection]`](macro@crate::projection).
    pub forgotten: bool,
    /// The payload, parsed.
    pub data: T,
}

/// The events that a projection subscribes to. Comes from [`#[derive(Events)]`](derive@crate::Events).
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not say which events it stands for",
    note = "the argument of Event<...> is an enum with #[derive(Events)]"
)]
pub trait Events {
    /// The same enum, with payloads that borrow for `'a`.
    type Of<'a>;

    /// One for each source and type of each variant, as written: names and globs.
    #[doc(hidden)]
    const SUBSCRIPTIONS: &'static [Subscription];

    /// Whether any of the variants is made of a payload.
    #[doc(hidden)]
    const PARSES: bool;

    /// Makes the variant with this index of a payload.
    #[doc(hidden)]
    fn parse<'a>(variant: u16, payload: Payload<'a>) -> Result<Self::Of<'a>, Error>;
}

/// A pattern of sources with a pattern of event types, and the variant that they become.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Subscription {
    /// The source's name, or a glob.
    pub source: &'static str,
    /// Whether that is a glob; the macro knows.
    pub source_glob: bool,
    /// The type's name, or a glob.
    pub event_type: &'static str,
    /// Whether that is a glob.
    pub type_glob: bool,
    /// The index of the variant.
    pub variant: u16,
}

/// An event's data, not parsed yet.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    pub(crate) event_type: &'a str,
    pub(crate) bytes: &'a [u8],
    /// The same as text, if the whole column is known to be UTF-8: `serde_json` need not look again.
    pub(crate) text: Option<&'a str>,
    /// Whether it is empty because it was forgotten.
    pub(crate) forgotten: bool,
}

impl<'a> Payload<'a> {
    #[doc(hidden)]
    pub fn json<T: serde::Deserialize<'a>>(self) -> Result<T, Error> {
        let parsed = match self.text {
            _ if self.bytes.is_empty() => serde_json::from_str("null"),
            Some(text) => serde_json::from_str(text),
            None => serde_json::from_slice(self.bytes),
        };
        parsed.map_err(|error| self.explain::<T>(error))
    }

    /// Parses a second time, keeping track of the path, which would slow down every event that fits.
    #[cold]
    #[inline(never)]
    fn explain<T: serde::Deserialize<'a>>(self, error: serde_json::Error) -> Error {
        // Of text that is no JSON, line and column say more.
        if self.forgotten || error.classify() != serde_json::error::Category::Data {
            return self.refused(None, &error);
        }
        let bytes = if self.bytes.is_empty() { b"null" } else { self.bytes };
        let again = serde_path_to_error::deserialize::<_, T>(&mut serde_json::Deserializer::from_slice(bytes)).err();
        self.refused(again.as_ref().map(|again| again.path()), &error)
    }

    fn refused(self, path: Option<&serde_path_to_error::Path>, error: &serde_json::Error) -> Error {
        let Self { event_type, forgotten, .. } = self;
        if forgotten {
            // What JSON lacks is no help: nobody left out a field.
            return Error::msg(format_args!(
                "the data of `{event_type}` was forgotten; let its variant hold an `Option`, or nothing"
            ));
        }
        let what = format_args!("the data of `{event_type}`");
        let mut message = error.to_string();
        let Some(path) = path else { return Error::msg(shortened(&message)).within(what) };
        // The path says it better, and the second is the end of an object for all that serde buffers.
        let place = format!(" at line {} column {}", error.line(), error.column());
        message.truncate(message.strip_suffix(&place).map_or(message.len(), str::len));
        match path_text(path) {
            path if path.is_empty() => Error::msg(shortened(&message)).within(what),
            path => Error::msg(format_args!("`{}`: {}", shortened(&path), shortened(&message))).within(what),
        }
    }
}

/// `lines[3].unit_price_cents`; empty for the whole.
fn path_text(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut text = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => text.push_str(&format!("[{index}]")),
            // How the text of a value is asked for is not in the payload.
            Segment::Map { key } if key.starts_with("$serde_json::private") => break,
            Segment::Map { key: name } | Segment::Enum { variant: name } => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(name);
            }
            Segment::Unknown => text.push_str(".?"),
        }
    }
    text
}

/// A message's beginning and end, if it is long: what was found stands first and may be a megabyte of text; what was
/// expected stands last.
fn shortened(message: &str) -> Cow<'_, str> {
    const CHARS: usize = 150;
    let end_of_head = message.char_indices().nth(CHARS).map(|(at, _)| at);
    let start_of_tail = message.char_indices().nth_back(CHARS - 1).map(|(at, _)| at);
    match (end_of_head, start_of_tail) {
        (Some(head), Some(tail)) if head < tail => Cow::Owned(format!("{}…{}", &message[..head], &message[tail..])),
        _ => Cow::Borrowed(message),
    }
}

/// The variant for events of this source and type, or None if the projection does not subscribe to them. A source's
/// exact name wins over globs, then a type's exact name does, then whichever stands first.
pub(crate) fn variant_for(subscriptions: &[Subscription], source: &str, event_type: &str) -> Option<u16> {
    // A name is a glob that matches itself alone.
    let matching = subscriptions.iter().filter(|s| matches(s.source, source) && matches(s.event_type, event_type));
    matching.min_by_key(|s| (s.source_glob, s.type_glob)).map(|s| s.variant)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_that_does_not_fit_says_where_and_what() {
        #[derive(Debug, serde::Deserialize)]
        struct Order<'a> {
            _id: &'a str,
            _at: Option<Timestamp>,
            #[serde(default)]
            _lines: Vec<Line>,
            #[serde(default)]
            _notes: std::collections::BTreeMap<String, Kind>,
        }
        #[derive(Debug, serde::Deserialize)]
        struct Line {
            _unit_price_cents: i64,
        }
        #[derive(Debug, serde::Deserialize)]
        #[expect(dead_code, reason = "only made")]
        enum Kind {
            #[serde(rename = "text")]
            _Text(String),
        }
        let refused = |json: &str| {
            let bytes = json.as_bytes();
            let payload = |text| Payload { event_type: "Placed", bytes, text, forgotten: false };
            let refused = payload(Some(json)).json::<Order<'_>>().unwrap_err().to_string();
            assert_eq!(refused, payload(None).json::<Order<'_>>().unwrap_err().to_string());
            refused
        };
        let long = "é".repeat(100_000);
        for (json, expected) in [
            (
                r#"{"_id":"1","_lines":[{"_unit_price_cents":1},{"_unit_price_cents":"abc"}]}"#,
                r#"`_lines[1]._unit_price_cents`: invalid type: string "abc", expected i64"#,
            ),
            (r#"{"_id":"1","_lines":[{}]}"#, "`_lines[0]`: missing field `_unit_price_cents`"),
            (r#"{"_id":5}"#, "`_id`: invalid type: integer `5`, expected a borrowed string"),
            ("{}", "missing field `_id`"),
            ("", "invalid type: null, expected struct Order"),
            (
                r#"{"_id":"1","_notes":{"a b":{"text":[1]}}}"#,
                "`_notes.a b.text`: invalid type: sequence, expected a string",
            ),
            (
                r#"{"_id":"1","_at":"noon"}"#,
                "`_at`: `noon` is not a time of RFC 3339 like 2013-01-01T10:15:00Z, in the years 0000 to 9999",
            ),
            // No JSON: there the place is what helps.
            (r#"{"_id":"1",}"#, "trailing comma at line 1 column 12"),
            (r#"{"_id":"#, "EOF while parsing a value at line 1 column 7"),
        ] {
            assert_eq!(refused(json), format!("the data of `Placed`: {expected}"), "{json}");
        }
        let cut = refused(&format!(r#"{{"_id":"1","_lines":[{{"_unit_price_cents":"{long}"}}]}}"#));
        assert!(
            cut.starts_with("the data of `Placed`: `_lines[0]._unit_price_cents`: invalid type: string \"éé"),
            "{cut}"
        );
        assert!(cut.ends_with("éé\", expected i64") && cut.chars().count() < 500, "{cut}");
        let cut = refused(&format!(r#"{{"_id":"1","_notes":{{"{long}":1}}}}"#));
        assert!(cut.chars().count() < 700, "{cut}");
    }

    #[cfg(feature = "decimal")]
    #[test]
    fn the_path_ends_at_the_value() {
        let bytes = br#"{"a":[0.12345678901234567890123456789]}"#;
        let payload = Payload { event_type: "T", bytes, text: None, forgotten: false };
        let refused =
            payload.json::<std::collections::BTreeMap<String, Vec<crate::Decimal>>>().unwrap_err().to_string();
        assert!(
            refused.starts_with("the data of `T`: `a[0]`: `0.12345678901234567890123456789` cannot be"),
            "{refused}"
        );
    }

    #[test]
    fn an_exact_source_wins_then_an_exact_type_then_what_stands_first() {
        let subscription = |source, event_type: &'static str, variant| Subscription {
            source,
            source_glob: "*{".chars().any(|c| source.contains(c)),
            event_type,
            type_glob: event_type.contains('*'),
            variant,
        };
        let all = [
            subscription("*", "Order*", 0),
            subscription("{orders,carts}", "*", 1),
            subscription("*", "OrderPlaced", 2),
            subscription("orders", "Order*", 3),
            subscription("orders", "O*", 4),
            subscription("orders", "OrderPaid", 5),
            subscription("odd\\*", "Odd", 6),
        ];
        for (source, event_type, variant) in [
            ("orders", "OrderPaid", Some(5)),
            ("orders", "OrderPlaced", Some(3)),
            ("orders", "Opened", Some(4)),
            ("orders", "Cancelled", Some(1)),
            ("carts", "OrderPlaced", Some(2)),
            ("carts", "OrderPaid", Some(0)),
            ("carts", "Filled", Some(1)),
            ("users", "OrderPaid", Some(0)),
            ("users", "Registered", None),
            ("odd*", "Odd", Some(6)),
            ("odd-", "Odd", None),
        ] {
            assert_eq!(variant_for(&all, source, event_type), variant, "{source} {event_type}");
        }
    }
}
