//! A failure that was saved from a running host, as the beginning of a test.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::{TestEvent, TestKit};
use crate::column::ColumnType;
use crate::column::value::{write_bin, write_int, write_str, written};
use crate::view::{ColumnSchema, Schema};
use crate::{Error, Projection, Result, Timestamp};

impl<P: Projection> TestKit<P> {
    /// Loads what `shadowbox dead-letters show PROJECTION NUMBER --save DIR` wrote: the rows that the projection asked
    /// for become the rows of this kit, and the event waits for [`given_saved`](Self::given_saved). A relative path
    /// begins at the folder of the crate, as in every test.
    ///
    /// # Panics
    ///
    /// If something was applied before; if a file cannot be read, is of another projection, or has rows that do not fit
    /// the views.
    #[must_use]
    #[track_caller]
    pub fn load(mut self, directory: impl AsRef<Path>) -> Self {
        let directory = directory.as_ref();
        if let Err(error) = self.try_load(directory) {
            panic!("cannot load {}: {error}", directory.display());
        }
        self
    }

    /// Applies the event that was loaded, with the position, the id and the time that it had.
    ///
    /// # Panics
    ///
    /// If the projection fails, or if nothing was loaded.
    #[must_use]
    #[track_caller]
    pub fn given_saved(mut self) -> Self {
        let saved = self.take_saved();
        self.given_all(saved)
    }

    /// Gives the event that was loaded, which the projection must refuse with an error that contains `message`.
    ///
    /// # Panics
    ///
    /// If the projection applies it, or refuses it with another message, or if nothing was loaded.
    #[must_use]
    #[track_caller]
    pub fn given_saved_failing(mut self, message: &str) -> Self {
        let saved = self.take_saved();
        self.expect_failure(saved, "the saved event", message);
        self
    }

    #[track_caller]
    fn take_saved(&mut self) -> Vec<TestEvent> {
        assert!(!self.saved.is_empty(), "no event is waiting: load a saved one first, and give it once");
        std::mem::take(&mut self.saved)
    }

    fn try_load(&mut self, directory: &Path) -> Result<()> {
        if !self.applied.is_empty() {
            return Err(Error::msg("events were applied before; load first"));
        }
        let read = |name: &str| {
            let read = std::fs::read_to_string(directory.join(name));
            read.map_err(|error| Error::msg(error).within(format_args!("`{name}`")))
        };
        let manifest: Value = serde_json::from_str(&read("manifest.json")?)?;
        if manifest["projection"] != P::NAME {
            return Err(Error::msg(format_args!("it is of projection {}, not `{}`", manifest["projection"], P::NAME)));
        }
        for line in read("rows.jsonl")?.lines() {
            let row: SavedRow = serde_json::from_str(line)?;
            // A row that was asked for and not there is not there now either.
            let Some(values) = &row.row else { continue };
            let found = self.definition.views.iter().position(|view| view.schema.name == row.view);
            let Some(view) = found else {
                return Err(Error::msg(format_args!("the projection has no view `{}` any more", row.view)));
            };
            let encoded = encode(&self.definition.views[view].schema, &row.key, values);
            let (key, row) = encoded.map_err(|error| error.within(format_args!("a row of `{}`", row.view)))?;
            self.start[view].insert(key, row);
        }
        *self.store.rows.borrow_mut() = self.start.clone();
        self.instance = None;
        self.saved = read("events.jsonl")?.lines().map(TestEvent::from_cloud_event).collect::<Result<_>>()?;
        Ok(())
    }
}

#[derive(Deserialize)]
struct SavedRow {
    view: String,
    key: Map<String, Value>,
    row: Option<Map<String, Value>>,
}

/// A key and a row as the host encodes them.
pub(super) fn encode(
    schema: &Schema,
    key: &Map<String, Value>,
    row: &Map<String, Value>,
) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut encoded = (Vec::new(), Vec::new());
    for name in schema.key {
        let column = schema.columns.iter().find(|column| column.name == *name).expect("the macro checks it");
        encode_value(column, key.get(*name), &mut encoded.0)?;
    }
    for column in schema.columns.iter().filter(|column| !schema.key.contains(&column.name)) {
        encode_value(column, row.get(column.name), &mut encoded.1)?;
    }
    Ok(encoded)
}

fn encode_value(column: &ColumnSchema, value: Option<&Value>, out: &mut Vec<u8>) -> Result<()> {
    let wrong = || match value {
        Some(value) => Error::msg(format_args!("`{}` is {value}, which does not fit its column", column.name)),
        None => Error::msg(format_args!("it has no `{}`; the view has changed since it was saved", column.name)),
    };
    if column.nullable && value.is_none_or(Value::is_null) {
        written(rmp::encode::write_nil(out));
        return Ok(());
    }
    let value = value.ok_or_else(wrong)?;
    let text = || value.as_str().ok_or_else(wrong);
    match column.column_type {
        ColumnType::Text | ColumnType::Decimal => write_str(out, text()?),
        ColumnType::Json => write_str(out, &value.to_string()),
        ColumnType::Integer => write_int(out, value.as_i64().ok_or_else(wrong)?),
        ColumnType::Timestamp => write_int(out, text()?.parse::<Timestamp>()?.as_micros()),
        ColumnType::Real => written(rmp::encode::write_f64(out, value.as_f64().ok_or_else(wrong)?)),
        ColumnType::Boolean => written(rmp::encode::write_bool(out, value.as_bool().ok_or_else(wrong)?)),
        ColumnType::Bytes => write_bin(out, &base64(text()?).ok_or_else(wrong)?),
        ColumnType::Uuid => {
            let digits: String = text()?.chars().filter(|c| *c != '-').collect();
            let uuid = u128::from_str_radix(&digits, 16).map_err(|_| wrong())?;
            write_bin(out, &uuid.to_be_bytes());
        }
    }
    Ok(())
}

/// Base64 with or without padding. None if it is not that.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let digit = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        (bits, count) = (bits << 6 | u32::from(digit), count + 6);
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

/// Reads a CloudEvent. The payload stays as it is written, down to its escapes and white space: that may be what the
/// failure is about.
pub(super) fn read_event(json: &str) -> Result<TestEvent> {
    let mut attributes: BTreeMap<String, Box<RawValue>> = serde_json::from_str(json)?;
    attributes.remove("specversion");
    let data = attributes.remove("data");
    attributes.retain(|_, raw| raw.get() != "null");
    let text = |raw: &RawValue| serde_json::from_str::<String>(raw.get());
    let mut required = |name: &str| match attributes.remove(name) {
        Some(raw) => text(&raw).map_err(|error| Error::msg(error).within(format_args!("`{name}`"))),
        None => Err(Error::msg(format_args!("the event has no `{name}`"))),
    };
    let mut read = TestEvent::new(&required("source")?, &required("type")?, ()).id(&required("id")?);
    if let Some(raw) = attributes.remove("subject") {
        read.stream = text(&raw)?;
    }
    if let Some(raw) = attributes.remove("time") {
        read.time = Some(text(&raw)?.parse()?);
    }
    if let Some(raw) = attributes.remove("position") {
        read.position = Some(serde_json::from_str(raw.get())?);
    }
    // A producer's attribute of this name may hold anything else.
    if attributes.get("forgotten").is_some_and(|raw| raw.get() == "true") {
        read.forgotten = true;
        attributes.remove("forgotten");
    }
    let whole_number = |raw: &RawValue| raw.get().trim_matches('"').parse::<u64>().ok();
    if let Some(version) = attributes.get("sequence").and_then(|raw| whole_number(raw)) {
        read.version = version;
        attributes.remove("sequence");
    }
    let content_type = attributes.get("datacontenttype").and_then(|raw| text(raw).ok());
    let is_json = content_type.is_none_or(|content_type| content_type.contains("json"));
    read.payload = match (data, attributes.remove("data_base64")) {
        (None, None) => Vec::new(),
        (Some(raw), _) if !is_json && raw.get().starts_with('"') => text(&raw)?.into_bytes(),
        (Some(raw), _) => raw.get().as_bytes().to_vec(),
        (None, Some(raw)) => base64(&text(&raw)?).ok_or_else(|| Error::msg("`data_base64` is not base64"))?,
    };
    if !attributes.is_empty() {
        read.metadata = serde_json::to_string(&attributes)?;
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_with_and_without_padding() {
        for (text, bytes) in
            [("", &b""[..]), ("AP8=", &[0, 255]), ("AP8", &[0, 255]), ("aGV5", b"hey"), ("+/==", &[251])]
        {
            assert_eq!(base64(text).as_deref(), Some(bytes), "{text}");
        }
        assert_eq!(base64("a b"), None);
    }

    #[test]
    fn a_payload_is_kept_to_the_letter() {
        let read = |data: &str| {
            let json = format!(r#"{{"specversion":"1.0","id":"1","source":"s","type":"T","position":7,{data}}}"#);
            let event = read_event(&json).unwrap();
            assert_eq!(event.position, Some(7));
            (String::from_utf8(event.payload).unwrap(), event.metadata)
        };
        assert_eq!(read(r#""data": {"b": "\u00e9", "a":1.0}"#).0, r#"{"b": "\u00e9", "a":1.0}"#);
        assert_eq!(read(r#""data_base64": "aGV5""#).0, "hey");
        let (payload, metadata) = read(r#""datacontenttype":"text/plain","data":"a\nb""#);
        assert_eq!((payload.as_str(), metadata.as_str()), ("a\nb", r#"{"datacontenttype":"text/plain"}"#));
        assert_eq!(read(r#""sequence":"x7","subject":null"#), (String::new(), r#"{"sequence":"x7"}"#.to_owned()));
    }
}
