//! CloudEvents 1.0 in JSON (structured mode), to and from [`NewEvent`]; and from headers and a body (HTTP's binary mode).
//!
//! | attribute | becomes |
//! | --- | --- |
//! | `id`, `source`, `type` | the same; required, not empty |
//! | `specversion` | must be `1.0` |
//! | `time` | the time, RFC 3339, years 0000 to 9999, cut to microseconds; now, if it is absent |
//! | `subject` | the stream; empty if absent |
//! | `sequence` | the version in the stream: a whole number from 0, or a string of digits |
//! | `data` | the payload: JSON as it is written, or the text itself if `datacontenttype` is not JSON |
//! | `data_base64` | the payload's bytes |
//! | `position`, `forgotten` if true | ignored, so that what `shadowbox events` prints can be appended to another log |
//! | all others | metadata: one JSON object, in the order in which they came; names are of `a-z` and `0-9` |
//!
//! An attribute that is `null` counts as absent, as the specification wants it. Writing is the inverse: parsing what
//! [`write()`] wrote gives the same [`NewEvent`]. Only events that were appended before names and `sequence` were looked at
//! can have others: they are written as they are, and refused when they are to be appended again.
//!
//! In the binary mode an attribute is a header `ce-NAME`, whose value is text; `datacontenttype` is the header
//! `content-type`, and the body is the data: JSON if that says so, or if nothing is said and it is JSON, else its bytes.
//! The event is the same as one in JSON with these attributes.

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::config::limits;
use crate::model::{Event, NewEvent, Time};

/// Why an event is refused: a sentence that names the attribute and its value.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

macro_rules! refuse {
    ($($message:tt)+) => {
        return Err(Error(format!($($message)+)))
    };
}

/// Base64 with or without padding: producers do both.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// How much of a value an error message quotes, characters.
const QUOTED: usize = 80;

/// Reads one CloudEvent. `source` is the source of events that have none; an event with another source is refused.
pub fn parse(json: &[u8], source: Option<&str>) -> Result<NewEvent, Error> {
    let json = match std::str::from_utf8(json) {
        Ok(json) => json,
        Err(e) => refuse!("the event is not UTF-8 from byte {} on", e.valid_up_to()),
    };
    let written: Written<'_> =
        serde_json::from_str(json).map_err(|e| Error(format!("the event is not a JSON object: {e}")))?;
    written.into_event(source)
}

/// Reads one CloudEvent of HTTP's binary mode: `attributes` are the headers that began with `ce-`, without that.
pub fn parse_binary<'a>(
    attributes: impl Iterator<Item = (&'a str, &'a [u8])>,
    content_type: Option<&[u8]>,
    body: &[u8],
) -> Result<NewEvent, Error> {
    let mut texts = Vec::new();
    for (name, value) in attributes {
        if let "data" | "data_base64" | "datacontenttype" = name {
            refuse!("header \"ce-{name}\" is none of the binary mode; the data is the body, its type in content-type");
        }
        texts.push((name, header_text(name, value)?));
    }
    let mut json = None;
    if let Some(value) = content_type {
        let Ok(text) = std::str::from_utf8(value) else {
            refuse!("header \"content-type\" is {:?}, which is not text", String::from_utf8_lossy(value));
        };
        json = Some(is_json(text));
        texts.push(("datacontenttype", text.to_owned()));
    }
    let raw: Vec<_> = texts.iter().map(|(_, text)| serde_json::to_string(text).expect("a string")).collect();
    let mut written = Written::default();
    for ((name, _), raw) in texts.iter().zip(&raw) {
        written.set(Cow::Borrowed(*name), raw);
    }
    // JSON is taken as it would stand in JSON: without white space around it.
    match serde_json::from_slice::<&RawValue>(body) {
        _ if body.is_empty() || json == Some(false) => written.body = Some(body),
        Ok(value) => written.data = Some(value.get()),
        Err(e) if json == Some(true) => refuse!("the body is not JSON, as content-type says: {e}"),
        Err(_) => written.body = Some(body),
    }
    written.into_event(None)
}

/// The text of a header, as the specification has it decoded: quotes, which former versions allowed, then percent signs.
fn header_text(name: &str, value: &[u8]) -> Result<String, Error> {
    let quoted = value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\""));
    let unquoted = quoted.map(|inside| {
        let mut bytes = inside.iter();
        let taken = || bytes.next().and_then(|b| if *b == b'\\' { bytes.next() } else { Some(b) });
        std::iter::from_fn(taken).copied().collect::<Vec<_>>()
    });
    let decoded: Vec<u8> = percent_encoding::percent_decode(unquoted.as_deref().unwrap_or(value)).collect();
    String::from_utf8(decoded).map_err(|_| {
        let value = String::from_utf8_lossy(value);
        Error(format!("header \"ce-{name}\" is {:?}; decoded, it is not UTF-8", quote(&value)))
    })
}

/// The values of a JSON array, which [`parse`] takes one by one.
pub fn split_batch(json: &[u8]) -> Result<Vec<&RawValue>, Error> {
    serde_json::from_slice(json).map_err(|e| Error(format!("the batch is not a JSON array: {e}")))
}

/// Appends the event as a JSON object on one line, without a line end; its position becomes an extension attribute, and
/// that its content is forgotten, if it is.
pub fn write(event: &Event, out: &mut Vec<u8>) {
    let Event { position, event, forgotten } = event;
    let text = |out: &mut Vec<u8>, name: &str, value: &str| {
        out.extend_from_slice(name.as_bytes());
        serde_json::to_writer(&mut *out, value).expect("writing to memory cannot fail");
    };
    text(out, "{\"specversion\":\"1.0\",\"id\":", &event.id);
    text(out, ",\"source\":", &event.source);
    text(out, ",\"type\":", &event.event_type);
    if !event.stream.is_empty() {
        text(out, ",\"subject\":", &event.stream);
    }
    if event.version > 0 {
        out.extend_from_slice(format!(",\"sequence\":{}", event.version).as_bytes());
    }
    out.extend_from_slice(format!(",\"position\":{position}").as_bytes());
    if *forgotten {
        out.extend_from_slice(b",\"forgotten\":true");
    }
    out.extend_from_slice(format!(",\"time\":\"{}\"", event.time).as_bytes());
    let attributes = event.metadata.strip_prefix('{').and_then(|m| m.strip_suffix('}')).unwrap_or_default();
    if !attributes.is_empty() {
        out.push(b',');
        out.extend_from_slice(attributes.as_bytes());
    }
    if !event.payload.is_empty() {
        write_data(event, out);
    }
    out.push(b'}');
}

fn write_data(event: &NewEvent, out: &mut Vec<u8>) {
    let as_text = std::str::from_utf8(&event.payload).ok();
    match as_text {
        Some(text) if !content_is_json(&event.metadata) => {
            out.extend_from_slice(b",\"data\":");
            serde_json::to_writer(&mut *out, text).expect("writing to memory cannot fail");
        }
        // White space around the value would not come back, and a line break would break the line in two.
        Some(text)
            if !text.contains(['\n', '\r'])
                && serde_json::from_str::<&RawValue>(text).is_ok_and(|raw| raw.get().len() == text.len()) =>
        {
            out.extend_from_slice(b",\"data\":");
            out.extend_from_slice(text.as_bytes());
        }
        _ => {
            out.extend_from_slice(b",\"data_base64\":\"");
            out.extend_from_slice(STANDARD.encode(&event.payload).as_bytes());
            out.push(b'"');
        }
    }
}

/// What `datacontenttype` in an event's metadata says; JSON if there is none.
fn content_is_json(metadata: &str) -> bool {
    #[derive(serde::Deserialize)]
    struct ContentType<'a> {
        #[serde(borrow)]
        datacontenttype: Option<Cow<'a, str>>,
    }
    // Most events have no metadata or none of this kind, so that parsing it would be wasted.
    if !metadata.contains("datacontenttype") {
        return true;
    }
    let parsed: Option<ContentType<'_>> = serde_json::from_str(metadata).ok();
    parsed.and_then(|m| m.datacontenttype).is_none_or(|c| is_json(&c))
}

/// True for `application/json`, `text/json` and everything that ends in `+json`, whatever the parameters.
fn is_json(content_type: &str) -> bool {
    let media = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let subtype = media.split_once('/').map(|(_, subtype)| subtype).unwrap_or_default();
    media == "application/json" || media == "text/json" || subtype.ends_with("+json")
}

/// An event's attributes as they stand in the text. Values are kept raw: most strings have no escapes and can be
/// borrowed, and an error can quote what was written.
#[derive(Default)]
struct Written<'a> {
    id: Option<&'a str>,
    source: Option<&'a str>,
    event_type: Option<&'a str>,
    specversion: Option<&'a str>,
    time: Option<&'a str>,
    subject: Option<&'a str>,
    sequence: Option<&'a str>,
    content_type: Option<&'a str>,
    data: Option<&'a str>,
    data_base64: Option<&'a str>,
    /// In the binary mode, data that is not JSON.
    body: Option<&'a [u8]>,
    others: Vec<(Cow<'a, str>, &'a str)>,
    /// The first attribute that came a second time. Which of the two is meant, nobody can know.
    twice: Option<String>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Written<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Attributes;
        impl<'de> Visitor<'de> for Attributes {
            type Value = Written<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with the attributes of a CloudEvent")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut written = Written::default();
                while let Some(Name(name)) = map.next_key()? {
                    let value = map.next_value::<&'de RawValue>()?.get();
                    written.set(name, value);
                }
                Ok(written)
            }
        }
        deserializer.deserialize_map(Attributes)
    }
}

/// An attribute's name, borrowed if it has no escapes.
struct Name<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Name<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an attribute's name")
            }

            fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Borrowed(name)))
            }

            fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

impl<'a> Written<'a> {
    fn set(&mut self, name: Cow<'a, str>, value: &'a str) {
        let place = match &*name {
            "id" => &mut self.id,
            "source" => &mut self.source,
            "type" => &mut self.event_type,
            "specversion" => &mut self.specversion,
            "time" => &mut self.time,
            "subject" => &mut self.subject,
            "sequence" => &mut self.sequence,
            "datacontenttype" => &mut self.content_type,
            "data" => &mut self.data,
            "data_base64" => &mut self.data_base64,
            "position" => return,
            "forgotten" if value == "true" => return,
            _ => {
                if self.others.iter().any(|(other, _)| *other == name) {
                    self.twice.get_or_insert(name.into_owned());
                } else if value != "null" {
                    self.others.push((name, value));
                }
                return;
            }
        };
        if place.is_some() {
            self.twice.get_or_insert(name.into_owned());
        } else if value != "null" || name == "data" {
            // Data that is null is a value; an attribute that is null is none.
            *place = Some(value);
        }
    }

    fn into_event(self, default_source: Option<&str>) -> Result<NewEvent, Error> {
        if let Some(name) = &self.twice {
            refuse!("attribute {name:?} is there twice");
        }
        match self.specversion {
            Some("\"1.0\"") => {}
            Some(other) => refuse!("specversion is {}; only \"1.0\" is understood", quote(other)),
            None => refuse!("attribute \"specversion\" is missing; write \"specversion\":\"1.0\""),
        }
        let is_name = |name: &str| !name.is_empty() && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9'));
        if let Some((name, _)) = self.others.iter().find(|(name, _)| !is_name(name)) {
            refuse!("attribute {:?} has a name that is not valid; names are of a-z and 0-9 alone", quote(name));
        }
        let id = required("id", self.id)?;
        let event_type = required("type", self.event_type)?;
        let source = match (self.source, default_source) {
            (None, Some(default)) => default.to_owned(),
            (written, default) => {
                let source = required("source", written)?;
                if let Some(default) = default.filter(|d| *d != source) {
                    refuse!("the event's source is {source:?}, but only events of {default:?} are to be appended");
                }
                source.into_owned()
            }
        };
        let time = match self.time {
            None => Time::now(),
            Some(raw) => string("time", raw)?.parse().map_err(|e| Error(format!("attribute \"time\": {e}")))?,
        };
        let stream = self.subject.map(|raw| string("subject", raw)).transpose()?.unwrap_or_default();
        let version = match self.sequence.map(|raw| (raw, whole_number(raw))) {
            None => 0,
            Some((_, Some(version))) => version,
            Some((raw, None)) => {
                refuse!("attribute \"sequence\" is {}; it must be a whole number from 0, below 2^64", quote(raw))
            }
        };
        let content_type = self.content_type.map(|raw| string("datacontenttype", raw)).transpose()?;
        let json = content_type.is_none_or(|c| is_json(&c));
        let event = NewEvent {
            metadata: metadata(self.content_type, &self.others),
            payload: match self.body {
                Some(body) => body.to_vec(),
                None => payload(self.data, self.data_base64, json)?,
            },
            source,
            id: id.into_owned(),
            stream: stream.into_owned(),
            version,
            event_type: event_type.into_owned(),
            time,
        };
        check_sizes(&event)?;
        Ok(event)
    }
}

/// The log's own limits, checked here so that the message can name the event.
fn check_sizes(event: &NewEvent) -> Result<(), Error> {
    let names = [("id", &event.id), ("source", &event.source), ("type", &event.event_type), ("subject", &event.stream)];
    for (name, value) in names {
        if value.len() > limits::EVENT_NAME_BYTES {
            refuse!("attribute {name:?} has {} bytes; the limit is {}", value.len(), limits::EVENT_NAME_BYTES);
        }
    }
    let size = event.payload.len() + event.metadata.len();
    if size > limits::EVENT_BYTES {
        refuse!("data and extension attributes have {size} bytes; the limit is {}", limits::EVENT_BYTES);
    }
    Ok(())
}

fn required<'a>(name: &str, raw: Option<&'a str>) -> Result<Cow<'a, str>, Error> {
    let Some(raw) = raw else { refuse!("attribute {name:?} is missing") };
    let value = string(name, raw)?;
    if value.is_empty() {
        refuse!("attribute {name:?} is empty");
    }
    Ok(value)
}

/// The text of a JSON string.
fn string<'a>(name: &str, raw: &'a str) -> Result<Cow<'a, str>, Error> {
    let inside = raw.strip_prefix('"').and_then(|r| r.strip_suffix('"'));
    let Some(inside) = inside else { refuse!("attribute {name:?} is {}; it must be a string", quote(raw)) };
    if !inside.contains('\\') {
        return Ok(Cow::Borrowed(inside));
    }
    // Valid JSON can still hold half a surrogate pair, which is not text.
    match serde_json::from_str(raw) {
        Ok(text) => Ok(Cow::Owned(text)),
        Err(e) => refuse!("attribute {name:?} is not valid text: {e}"),
    }
}

/// A JSON number or a JSON string of digits, within 64 bits.
fn whole_number(raw: &str) -> Option<u64> {
    let digits = raw.strip_prefix('"').and_then(|r| r.strip_suffix('"')).unwrap_or(raw);
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

fn payload(data: Option<&str>, base64: Option<&str>, json: bool) -> Result<Vec<u8>, Error> {
    match (data, base64) {
        (None, None) => Ok(Vec::new()),
        (Some(_), Some(_)) => {
            refuse!("\"data\" and \"data_base64\" are both there; only one can be")
        }
        (None, Some(raw)) => {
            let text = string("data_base64", raw)?;
            BASE64.decode(text.as_bytes()).map_err(|e| Error(format!("attribute \"data_base64\" is not base64: {e}")))
        }
        (Some(raw), None) if !json && raw.starts_with('"') => Ok(string("data", raw)?.into_owned().into_bytes()),
        // Payloads are printed one a line, so they have no line breaks.
        (Some(raw), None) if raw.contains(['\n', '\r']) => Ok(compact(raw).into_bytes()),
        (Some(raw), None) => Ok(raw.as_bytes().to_vec()),
    }
}

fn metadata(content_type: Option<&str>, others: &[(Cow<'_, str>, &str)]) -> String {
    let mut out = String::new();
    let mut add = |name: &str, raw: &str| {
        out.push(if out.is_empty() { '{' } else { ',' });
        out.push_str(&serde_json::to_string(name).expect("a string"));
        out.push(':');
        out.push_str(&compact(raw));
    };
    if let Some(raw) = content_type {
        add("datacontenttype", raw);
    }
    for (name, raw) in others {
        add(name, raw);
    }
    if !out.is_empty() {
        out.push('}');
    }
    out
}

/// JSON without the white space between its parts. Everything else stays as it is written: numbers keep their digits.
fn compact(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let (mut in_string, mut escaped) = (false, false);
    for c in json.chars() {
        if in_string {
            in_string = escaped || c != '"';
            escaped = !escaped && c == '\\';
        } else if c.is_ascii_whitespace() {
            continue;
        } else {
            in_string = c == '"';
        }
        out.push(c);
    }
    out
}

/// A value for an error message.
fn quote(raw: &str) -> Cow<'_, str> {
    match raw.char_indices().nth(QUOTED) {
        Some((end, _)) => Cow::Owned(format!("{}…", &raw[..end])),
        None => Cow::Borrowed(raw),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Position;
    use proptest::prelude::*;

    /// `extra` is added to the required attributes.
    fn check(extra: &str) -> Result<NewEvent, String> {
        let comma = if extra.is_empty() { "" } else { "," };
        let json = format!(
            r#"{{"specversion":"1.0","id":"1","source":"s","type":"T","time":"2013-01-01T10:15:00Z"{comma}{extra}}}"#
        );
        parse(json.as_bytes(), None).map_err(|e| e.to_string())
    }

    #[test]
    fn attributes_go_where_they_belong() {
        let event = check(r#""subject":"o\"1","sequence":7,"data": {"a": 1},"position":9,"dataschema":null"#).unwrap();
        assert_eq!((event.stream.as_str(), event.version, event.metadata.as_str()), ("o\"1", 7, ""));
        assert_eq!(event.payload, br#"{"a": 1}"#);
        assert_eq!(event.time.to_string(), "2013-01-01T10:15:00Z");

        for (extra, version, metadata, payload) in [
            ("", 0, "", ""),
            (r#""sequence":"0042""#, 42, "", ""),
            (r#""data":null"#, 0, "", "null"),
            (r#""data":"x""#, 0, "", "\"x\""),
            ("\"data\":{\"a\":\n \"b \\\" c\"}", 0, "", r#"{"a":"b \" c"}"#),
            (
                r#""datacontenttype":"application/x+json; v=1","data":"x""#,
                0,
                r#"{"datacontenttype":"application/x+json; v=1"}"#,
                "\"x\"",
            ),
            (r#""datacontenttype":"text/plain","data":"a\nb""#, 0, r#"{"datacontenttype":"text/plain"}"#, "a\nb"),
            (
                r#""datacontenttype":"text/plain","data":{"a":1}"#,
                0,
                r#"{"datacontenttype":"text/plain"}"#,
                r#"{"a":1}"#,
            ),
            (r#""data_base64":"aGk=""#, 0, "", "hi"),
            (r#""data_base64":"aGk""#, 0, "", "hi"),
            (r#""traceparent":"00-1", "n" : { "x" : 1.50 }"#, 0, r#"{"traceparent":"00-1","n":{"x":1.50}}"#, ""),
        ] {
            let event = check(extra).unwrap();
            assert_eq!((event.version, event.metadata.as_str()), (version, metadata), "{extra}");
            assert_eq!(String::from_utf8(event.payload).unwrap(), payload, "{extra}");
        }
    }

    #[test]
    fn refusals_name_the_attribute_and_the_value() {
        for (json, expected) in [
            (r#"{"id":"1"}"#, "\"specversion\" is missing"),
            (r#"{"specversion":"0.3"}"#, "specversion is \"0.3\""),
            (r#"{"specversion":"1.0","source":"s","type":"T"}"#, "\"id\" is missing"),
            (r#"{"specversion":"1.0","id":"","source":"s","type":"T"}"#, "\"id\" is empty"),
            (r#"{"specversion":"1.0","id":5,"source":"s","type":"T"}"#, "\"id\" is 5; it must be a string"),
            (r#"{"specversion":"1.0","id":"1","id":"2"}"#, "\"id\" is there twice"),
            (r#"{"specversion":"1.0","id":"1","x":1,"x":1}"#, "\"x\" is there twice"),
            (r#"{"specversion":"1.0","id":"\ud800","source":"s","type":"T"}"#, "\"id\" is not valid text"),
            ("[1]", "not a JSON object"),
            ("{", "not a JSON object"),
        ] {
            let error = parse(json.as_bytes(), None).unwrap_err().to_string();
            assert!(error.contains(expected), "{json}: {error}");
        }
        for (extra, expected) in [
            (r#""data":1,"data_base64":"""#, "both there"),
            (r#""data_base64":"%""#, "\"data_base64\" is not base64"),
            (r#""datacontenttype":1"#, "\"datacontenttype\" is 1"),
            (r#""sequence":-1"#, "\"sequence\" is -1; it must be a whole number"),
            (r#""sequence":1.5"#, "\"sequence\" is 1.5"),
            (r#""sequence":"x""#, "\"sequence\" is \"x\""),
            (r#""sequence":"""#, "\"sequence\" is \"\""),
            (r#""sequence":true"#, "\"sequence\" is true"),
            (r#""sequence":18446744073709551616"#, "\"sequence\" is 18446744073709551616"),
            (r#""traceParent":"x""#, "\"traceParent\" has a name that is not valid; names are of a-z"),
            (r#""Subject":"x""#, "\"Subject\" has a name"),
            (r#""trace-parent":"x""#, "\"trace-parent\" has a name"),
            (r#""":"x""#, "\"\" has a name"),
        ] {
            let error = check(extra).unwrap_err();
            assert!(error.contains(expected), "{extra}: {error}");
        }
        let time = br#"{"specversion":"1.0","id":"1","source":"s","type":"T","time":"noon"}"#;
        assert!(parse(time, None).unwrap_err().to_string().contains("\"time\": \"noon\" is not a time"));
        let long = format!("\"data\":\"{}\"", "x".repeat(limits::EVENT_BYTES));
        assert!(check(&long).unwrap_err().contains("the limit is 1048576"));
    }

    #[test]
    fn a_default_source_fills_in_and_forbids() {
        let without = br#"{"specversion":"1.0","id":"1","type":"T"}"#;
        assert_eq!(parse(without, Some("orders")).unwrap().source, "orders");
        assert!(parse(without, None).unwrap_err().to_string().contains("\"source\" is missing"));
        let with = br#"{"specversion":"1.0","id":"1","type":"T","source":"users"}"#;
        assert_eq!(parse(with, Some("users")).unwrap().source, "users");
        assert!(parse(with, Some("orders")).unwrap_err().to_string().contains("source is \"users\""));
    }

    /// `headers` beside the required ones, `name: value`.
    fn binary(content_type: Option<&str>, headers: &[&str], body: &[u8]) -> Result<NewEvent, String> {
        let required = ["specversion: 1.0", "id: 1", "source: s", "type: T", "time: 2013-01-01T10:15:00Z"];
        let headers = required.iter().chain(headers).map(|header| header.split_once(": ").unwrap());
        let headers = headers.map(|(name, value)| (name, value.as_bytes()));
        parse_binary(headers, content_type.map(str::as_bytes), body).map_err(|e| e.to_string())
    }

    #[test]
    fn headers_and_body_are_an_event() {
        let json = Some("application/json; charset=utf-8");
        let headers = [r#"subject: "o \"1%22""#, "sequence: 7", "traceparent: %c3%A9%20%2541"];
        let event = binary(json, &headers, b" {\"a\" :\n 1} ").unwrap();
        assert_eq!((event.stream.as_str(), event.version), ("o \"1\"", 7));
        let metadata = r#"{"datacontenttype":"application/json; charset=utf-8","traceparent":"é %41"}"#;
        assert_eq!(event.metadata, metadata);
        assert_eq!(event.payload, br#"{"a":1}"#);
        for (content_type, body, payload) in [
            (json, &b""[..], &b""[..]),
            (Some("application/x+json"), b"\"x\"", b"\"x\""),
            (Some("text/plain"), b"a\nb", b"a\nb"),
            (Some("text/plain"), b"{}", b"{}"),
            (Some("image/png"), b"\xff\0", b"\xff\0"),
            (Some("application/xml"), b"", b""),
            (None, b"[1,\n2]", b"[1,2]"),
            (None, b"\xff\n", b"\xff\n"),
        ] {
            assert_eq!(binary(content_type, &[], body).unwrap().payload, payload, "{content_type:?}");
        }
        for (headers, body, expected) in [
            (&["id: 2"][..], &b"1"[..], "\"id\" is there twice"),
            (&["sequence: -1"], b"1", "\"sequence\" is \"-1\""),
            (&["trace-parent: x"], b"1", "\"trace-parent\" has a name"),
            (&["subject: %ff"], b"1", "\"ce-subject\" is \"%ff\"; decoded, it is not UTF-8"),
            (&["data_base64: x"], b"1", "\"ce-data_base64\" is none"),
            (&[], b"{", "the body is not JSON"),
            (&[], b"\"\xff\"", "the body is not JSON"),
        ] {
            let error = binary(json, headers, body).unwrap_err();
            assert!(error.contains(expected), "{headers:?}: {error}");
        }
        let none = parse_binary([("id", &b"1"[..])].into_iter(), None, b"").unwrap_err();
        assert!(none.to_string().contains("\"specversion\" is missing"), "{none}");
    }

    /// What a header has of a text, as the specification has it encoded.
    fn encoded(text: &str) -> String {
        let byte = |b| match b {
            b'!' | b'#' | b'$' | b'&'..=b'~' => char::from(b).to_string(),
            b => format!("%{b:02X}"),
        };
        text.bytes().map(byte).collect()
    }

    /// A content type, data as a member of JSON, and the same as a body.
    fn data() -> impl Strategy<Value = (Option<&'static str>, String, Vec<u8>)> {
        let json = prop_oneof![
            any::<String>().prop_map(|s| serde_json::to_string(&s).unwrap()),
            any::<i64>().prop_map(|n| n.to_string()),
            Just("{\"a\" : [1,\n2.50,null]}".to_owned()),
            Just("null".to_owned()),
        ];
        let json_type = prop_oneof![Just(None), Just(Some("application/json")), Just(Some("text/x+json; v=\"1\""))];
        let other_type = || prop_oneof![Just(Some("text/plain")), Just(Some("image/png"))];
        prop_oneof![
            (json_type, json).prop_map(|(t, json)| (t, format!("\"data\":{json}"), json.into_bytes())),
            (other_type(), any::<String>()).prop_map(|(t, text)| {
                (t, format!("\"data\":{}", serde_json::to_string(&text).unwrap()), text.into_bytes())
            }),
            (other_type(), any::<Vec<u8>>()).prop_map(|(t, bytes)| (
                t,
                format!("\"data_base64\":\"{}\"", STANDARD.encode(&bytes)),
                bytes
            )),
        ]
    }

    fn payloads() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            Just(Vec::new()),
            proptest::collection::vec(any::<u8>(), 0..40),
            any::<String>().prop_map(String::into_bytes),
            any::<String>().prop_map(|s| serde_json::to_vec(&s).unwrap()),
            Just(b" {\"a\" : [1,2.50,null]} ".to_vec()),
            Just(b"{\"a\" : [1,2.50,null]}".to_vec()),
        ]
    }

    fn metadata_texts() -> impl Strategy<Value = String> {
        let others = proptest::collection::btree_map("x[a-z]{5,12}", any::<String>(), 0..3);
        let content_type =
            proptest::option::of(prop_oneof![Just("text/plain"), Just("application/json"), Just("image/png")]);
        (content_type, others).prop_map(|(content_type, others)| {
            let mut object = Vec::new();
            object.extend(content_type.map(|c| format!("\"datacontenttype\":\"{c}\"")));
            for (name, value) in others {
                object.push(format!("\"{name}\":{}", serde_json::to_string(&value).unwrap()));
            }
            if object.is_empty() { String::new() } else { format!("{{{}}}", object.join(",")) }
        })
    }

    proptest! {
        #[test]
        fn an_event_is_the_same_in_both_modes(
            names in (".+", ".+", ".+", ".*"),
            sequence in any::<u64>(),
            extensions in proptest::collection::btree_map("x[a-z0-9]{5,12}", any::<String>(), 0..3),
            (content_type, member, body) in data(),
        ) {
            let (id, source, event_type, stream) = names;
            let sequence = sequence.to_string();
            let fixed = [
                ("specversion", "1.0"), ("id", &id), ("source", &source), ("type", &event_type), ("subject", &stream),
                ("time", "2013-01-01T10:15:00Z"), ("sequence", &sequence),
            ];
            let attributes: Vec<_> =
                fixed.into_iter().chain(extensions.iter().map(|(name, value)| (name.as_str(), value.as_str()))).collect();
            let headers: Vec<_> = attributes.iter().map(|(name, text)| (*name, encoded(text))).collect();
            let headers = headers.iter().map(|(name, value)| (*name, value.as_bytes()));
            let in_headers = parse_binary(headers, content_type.map(str::as_bytes), &body).unwrap();
            let mut json = String::from("{");
            for (name, text) in attributes.into_iter().chain(content_type.map(|t| ("datacontenttype", t))) {
                json += &format!("\"{name}\":{},", serde_json::to_string(text).unwrap());
            }
            json += &format!("{member}}}");
            prop_assert_eq!(in_headers, parse(json.as_bytes(), None).unwrap());
        }

        #[test]
        fn parsing_what_was_written_gives_the_same_event(
            names in (".+", ".+", ".+", ".*"),
            version in prop_oneof![Just(0), any::<u64>()],
            microseconds in shadowbox_time::FIRST..=shadowbox_time::LAST,
            metadata in metadata_texts(),
            payload in payloads(),
            position in any::<u64>().prop_map(Position),
            forgotten in any::<bool>(),
        ) {
            let (id, source, event_type, stream) = names;
            let time = Time::from_microseconds(microseconds).unwrap();
            let event = NewEvent { source, id, stream, version, event_type, time, metadata, payload };
            let event = Event { position, event, forgotten };
            let mut json = Vec::new();
            write(&event, &mut json);
            prop_assert!(!json.contains(&b'\n'));
            prop_assert_eq!(parse(&json, None).unwrap(), event.event);
        }
    }
}
