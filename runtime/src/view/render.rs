//! Rows as JSON and as text, the same over HTTP and on the command line.
//!
//! | column | JSON | CSV and tables |
//! | --- | --- | --- |
//! | text, uuid | string | the text |
//! | integer, real | number | the number |
//! | boolean | true, false | true, false |
//! | bytes | base64 string | base64 |
//! | timestamp | string, always 27 characters, UTC | the same |
//! | json | the value itself | its text |
//! | decimal | string: most readers of JSON would round a number | the digits |
//! | absent | null | empty |
//!
//! Results of SQL have SQLite's types only: a boolean is 0 or 1 there, a JSON column is a string.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::{self, Write};

use base64::Engine as _;
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use serde_json::value::RawValue;

use super::readers::Value;
use crate::manifest::ColumnType;

/// Writes rows as JSON objects.
pub struct JsonRows {
    /// `{"name":` of the first column, `,"name":` of the others, back to back.
    names: Vec<u8>,
    /// Where each of these ends, and the column's type.
    columns: Vec<(usize, Option<ColumnType>)>,
}

impl JsonRows {
    /// Columns by name and, for views, type. A name that comes again gets a number, as a join's `*` gives two columns
    /// of one name, and readers of JSON would drop one of them.
    pub fn new<'a>(columns: impl IntoIterator<Item = (&'a str, Option<ColumnType>)>) -> JsonRows {
        let mut rows = JsonRows { names: Vec::with_capacity(256), columns: Vec::new() };
        let mut taken: HashSet<Cow<'_, str>> = HashSet::new();
        for (name, kind) in columns {
            let mut unique = Cow::Borrowed(name);
            let mut n = 1;
            while taken.contains(&unique) {
                n += 1;
                unique = Cow::Owned(format!("{name}_{n}"));
            }
            rows.names.push(if taken.is_empty() { b'{' } else { b',' });
            serde_json::to_writer(&mut rows.names, &unique).expect("writing to memory cannot fail");
            rows.names.push(b':');
            rows.columns.push((rows.names.len(), kind));
            taken.insert(unique);
        }
        rows
    }

    /// Appends one row.
    pub fn write(&self, values: &[Value<'_>], out: &mut Vec<u8>) {
        self.write_to(values, out).expect("writing to memory cannot fail");
    }

    /// Writes one row piece by piece, as far as `out` takes them.
    pub fn write_to(&self, values: &[Value<'_>], out: &mut impl Write) -> io::Result<()> {
        if self.columns.is_empty() {
            out.write_all(b"{")?;
        }
        let mut start = 0;
        for ((end, kind), value) in self.columns.iter().zip(values) {
            out.write_all(&self.names[start..*end])?;
            write_json(*kind, *value, out)?;
            start = *end;
        }
        out.write_all(b"}")
    }
}

/// Memory that takes bytes up to a bound. What is larger than that is never built: a row can have one value a thousand
/// times.
pub struct Bounded<'a> {
    out: &'a mut Vec<u8>,
    most: usize,
}

impl<'a> Bounded<'a> {
    /// Appends to `out` until that has `most` bytes.
    pub fn new(out: &'a mut Vec<u8>, most: usize) -> Bounded<'a> {
        Bounded { out, most }
    }
}

impl Write for Bounded<'_> {
    /// Takes all of the bytes or none.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.most.saturating_sub(self.out.len()) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.out.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A value of a view's column as JSON.
pub(super) fn json(kind: ColumnType, value: Value<'_>) -> Box<RawValue> {
    let mut out = Vec::new();
    write_json(Some(kind), value, &mut out).expect("writing to memory cannot fail");
    let text = String::from_utf8(out).expect("JSON is UTF-8");
    RawValue::from_string(text).expect("it was written as JSON")
}

fn write_json(kind: Option<ColumnType>, value: Value<'_>, out: &mut impl Write) -> io::Result<()> {
    match (kind, value) {
        (_, Value::Null) => out.write_all(b"null")?,
        (Some(ColumnType::Boolean), Value::Integer(i)) => out.write_all(if i != 0 { b"true" } else { b"false" })?,
        // Anyone may have changed the file; one bad value must not make the whole answer unreadable.
        (Some(ColumnType::Json), Value::Text(text)) if serde_json::from_str::<&RawValue>(text).is_ok() => {
            out.write_all(text.as_bytes())?;
        }
        (_, Value::Integer(i)) => serde_json::to_writer(out, &i)?,
        // Not a number and the infinities, which only SQL can compute, become null.
        (_, Value::Real(x)) => serde_json::to_writer(out, &x)?,
        (_, Value::Text(text)) => serde_json::to_writer(out, text)?,
        (_, Value::Blob(bytes)) => write!(out, "\"{}\"", Base64Display::new(bytes, &STANDARD))?,
    }
    Ok(())
}

/// A value as CSV and tables show it.
pub fn text(kind: Option<ColumnType>, value: Value<'_>) -> Cow<'_, str> {
    match (kind, value) {
        (_, Value::Null) => Cow::Borrowed(""),
        (Some(ColumnType::Boolean), Value::Integer(i)) => Cow::Borrowed(if i != 0 { "true" } else { "false" }),
        (_, Value::Integer(i)) => Cow::Owned(i.to_string()),
        (_, Value::Real(x)) => {
            let mut out = String::new();
            // As in JSON: 1.0 stays visibly a real.
            write!(out, "{x:?}").expect("writing to a string cannot fail");
            Cow::Owned(out)
        }
        (_, Value::Text(text)) => Cow::Borrowed(text),
        (_, Value::Blob(bytes)) => Cow::Owned(STANDARD.encode(bytes)),
    }
}

/// Appends one line of CSV. Values are quoted where they must be; lines end with a line feed.
pub fn write_csv<T: AsRef<str>>(values: impl IntoIterator<Item = T>, out: &mut Vec<u8>) {
    write_csv_to(values, out).expect("writing to memory cannot fail");
}

/// Writes one line of CSV piece by piece, as far as `out` takes them.
pub fn write_csv_to<T: AsRef<str>>(values: impl IntoIterator<Item = T>, out: &mut impl Write) -> io::Result<()> {
    let mut writer = csv::WriterBuilder::new().from_writer(out);
    for value in values {
        writer.write_field(value.as_ref())?;
    }
    writer.write_record(None::<&[u8]>)?;
    writer.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_by_column_type() {
        use ColumnType::*;
        for (kind, value, json, csv) in [
            (Some(Text), Value::Null, "null", ""),
            (Some(Text), Value::Text("a\"b,c\n"), r#""a\"b,c\n""#, "a\"b,c\n"),
            (Some(Integer), Value::Integer(i64::MIN), "-9223372036854775808", "-9223372036854775808"),
            (Some(Real), Value::Real(1.0), "1.0", "1.0"),
            (None, Value::Real(f64::INFINITY), "null", "inf"),
            (Some(Boolean), Value::Integer(1), "true", "true"),
            (None, Value::Integer(1), "1", "1"),
            (Some(Bytes), Value::Blob(b"hi"), "\"aGk=\"", "aGk="),
            (Some(Json), Value::Text("{\"a\":1}"), "{\"a\":1}", "{\"a\":1}"),
            (Some(Json), Value::Text("{"), "\"{\"", "{"),
            (Some(Decimal), Value::Text("1.50"), "\"1.50\"", "1.50"),
        ] {
            let mut out = Vec::new();
            write_json(kind, value, &mut out).unwrap();
            assert_eq!(String::from_utf8(out).unwrap(), json);
            assert_eq!(text(kind, value), csv);
        }
    }

    #[test]
    fn rows() {
        let mut out = Vec::new();
        JsonRows::new([("a", None), ("b\"", None)]).write(&[Value::Integer(1), Value::Null], &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), r#"{"a":1,"b\"":null}"#);
        let mut out = Vec::new();
        JsonRows::new(["a", "a_2", "a"].map(|name| (name, None))).write(&[Value::Integer(0); 3], &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), r#"{"a":0,"a_2":0,"a_3":0}"#);
        let mut out = Vec::new();
        write_csv(["a", "b,\"c\"", ""], &mut out);
        write_csv([""], &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), "a,\"b,\"\"c\"\"\",\n\"\"\n");
    }

    #[test]
    fn a_row_is_not_built_beyond_the_bound() {
        const MOST: usize = 3 << 20;
        let large = ["x".repeat(1 << 20), "\u{1}\"".repeat(1 << 19)];
        let blob = vec![7; 1 << 20];
        let names: Vec<_> = (0..1_999).map(|n| format!("c{n}")).collect();
        for value in [Value::Text(&large[0]), Value::Text(&large[1]), Value::Blob(&blob)] {
            let values = vec![value; names.len()];
            let rows = JsonRows::new(names.iter().map(|name| (name.as_str(), None)));
            let mut out = Vec::new();
            assert!(rows.write_to(&values, &mut Bounded::new(&mut out, MOST)).is_err());
            assert!((MOST / 2..=MOST).contains(&out.len()) && out.capacity() <= 2 * MOST, "{}", out.capacity());
            let mut out = Vec::new();
            let fields = values.iter().map(|value| text(None, *value));
            assert!(write_csv_to(fields, &mut Bounded::new(&mut out, MOST)).is_err());
            assert!((MOST / 2..=MOST).contains(&out.len()) && out.capacity() <= 2 * MOST, "{}", out.capacity());
        }
        let mut out = b"[".to_vec();
        let row = JsonRows::new([("a", None)]);
        assert!(row.write_to(&[Value::Integer(1)], &mut Bounded::new(&mut out, 8)).is_ok());
        assert_eq!(out, b"[{\"a\":1}");
        assert!(row.write_to(&[], &mut Bounded::new(&mut out, 8)).is_err());
    }
}
