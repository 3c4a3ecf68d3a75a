//! Values of rows: as plugins write them (MessagePack), and as SQLite stores them.
//!
//! | column type | MessagePack | SQLite |
//! | --- | --- | --- |
//! | text, json, decimal | str | TEXT |
//! | integer | int | INTEGER |
//! | real | float 64 | REAL |
//! | boolean | bool | INTEGER, 0 or 1 |
//! | bytes | bin | BLOB |
//! | timestamp | int, microseconds | TEXT, [`Time::write_sortable`] |
//! | uuid | bin of 16 bytes | TEXT, hyphenated |
//!
//! Timestamps and uuids are text in SQLite because people read these files with any SQLite tool.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rmp::Marker;
use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Row, ToSql};

use crate::config::limits;
use crate::manifest::{Column, ColumnType, ViewSchema};
use crate::model::Time;

/// A view's schema with everything that is derived from it once.
#[derive(Debug)]
pub struct Table {
    pub(super) schema: ViewSchema,
    pub(super) key: Vec<usize>,
    pub(super) values: Vec<usize>,
    pub(super) upsert: String,
    pub(super) delete: String,
    pub(super) select: String,
}

/// Quotes a name for SQL. Names are validated, but some of them are keywords.
pub(super) fn quote(name: &str) -> String {
    let mut quoted = String::with_capacity(name.len() + 2);
    push_quoted(&mut quoted, name);
    quoted
}

/// The same, at the end of a statement that is being written.
pub(super) fn push_quoted(sql: &mut String, name: &str) {
    sql.push('"');
    for (i, part) in name.split('"').enumerate() {
        sql.push_str(if i == 0 { "" } else { "\"\"" });
        sql.push_str(part);
    }
    sql.push('"');
}

impl Table {
    /// Prepares the statements of a view.
    pub fn new(schema: &ViewSchema) -> Table {
        let (key, values) = (schema.key_columns(), schema.value_columns());
        let name = |&i: &usize| quote(&schema.columns[i].name);
        let list = |columns: &[usize]| columns.iter().map(name).collect::<Vec<_>>().join(", ");
        let view = quote(&schema.name);
        let all = [key.clone(), values.clone()].concat();
        let marks = vec!["?"; all.len()].join(", ");
        let set: Vec<_> = values.iter().map(|i| format!("{0} = excluded.{0}", name(i))).collect();
        let update = if set.is_empty() { "DO NOTHING".to_owned() } else { format!("DO UPDATE SET {}", set.join(", ")) };
        let by_key = key.iter().map(|i| format!("{} = ?", name(i))).collect::<Vec<_>>().join(" AND ");
        let selected = if values.is_empty() { "1".to_owned() } else { list(&values) };
        Table {
            upsert: format!(
                "INSERT INTO {view} ({}) VALUES ({marks}) ON CONFLICT ({}) {update}",
                list(&all),
                list(&key)
            ),
            delete: format!("DELETE FROM {view} WHERE {by_key}"),
            select: format!("SELECT {selected} FROM {view} WHERE {by_key}"),
            schema: schema.clone(),
            key,
            values,
        }
    }

    /// The statements that create the view.
    pub(super) fn ddl(&self) -> Vec<String> {
        let view = quote(&self.schema.name);
        let columns: Vec<_> = self
            .schema
            .columns
            .iter()
            .map(|c| {
                let null = if c.nullable { "" } else { " NOT NULL" };
                format!("{} {}{null}", quote(&c.name), sqlite_type(c.kind))
            })
            .collect();
        let list = |names: &[String]| names.iter().map(|n| quote(n)).collect::<Vec<_>>().join(", ");
        // Clustered by key: one tree instead of a table and an index.
        let table = format!(
            "CREATE TABLE {view} ({}, PRIMARY KEY ({})) STRICT, WITHOUT ROWID",
            columns.join(", "),
            list(&self.schema.key)
        );
        let indexes = self.schema.indexes.iter().enumerate().map(|(i, columns)| {
            // No view can be called so: tables and indexes share their names.
            let name = quote(&format!("{}.{i}", self.schema.name));
            format!("CREATE INDEX {name} ON {view} ({})", list(columns))
        });
        std::iter::once(table).chain(indexes).collect()
    }

    /// Checks that `key` is exactly one key of this view.
    pub(super) fn check_key(&self, key: &[u8]) -> Result<(), String> {
        if key.len() > limits::KEY_BYTES {
            return Err(self.invalid(format!("a key of {} bytes; the limit is {}", key.len(), limits::KEY_BYTES)));
        }
        self.check(&self.key, key)
    }

    /// Checks that `row` is exactly the other values of one row of this view.
    pub(super) fn check_row(&self, row: &[u8]) -> Result<(), String> {
        if row.len() > limits::ROW_BYTES {
            return Err(self.invalid(format!("a row of {} bytes; the limit is {}", row.len(), limits::ROW_BYTES)));
        }
        self.check(&self.values, row)
    }

    fn check(&self, columns: &[usize], mut bytes: &[u8]) -> Result<(), String> {
        for &i in columns {
            let column = &self.schema.columns[i];
            decode(column, &mut bytes).map_err(|e| self.invalid(format!("column {:?}: {e}", column.name)))?;
        }
        if bytes.is_empty() { Ok(()) } else { Err(self.invalid(format!("{} bytes too many", bytes.len()))) }
    }

    fn invalid(&self, what: String) -> String {
        format!("a row of view {:?} is not valid: {what}", self.schema.name)
    }

    /// Binds the values of `columns`, which were checked, from parameter `first` on.
    pub(super) fn bind(
        &self,
        statement: &mut rusqlite::Statement<'_>,
        columns: &[usize],
        mut bytes: &[u8],
        first: usize,
    ) -> rusqlite::Result<()> {
        for (n, &i) in columns.iter().enumerate() {
            let value = decode(&self.schema.columns[i], &mut bytes).expect("checked when it came");
            statement.raw_bind_parameter(first + n, value)?;
        }
        Ok(())
    }

    /// A checked key and row as JSON by column: `{"view", "key", "row"}`. Values look as they do in answers to queries.
    pub fn json(&self, key: &[u8], row: Option<&[u8]>) -> serde_json::Value {
        let object = |columns: &[usize], mut bytes: &[u8]| {
            let pair = |&i: &usize| {
                let column = &self.schema.columns[i];
                (column.name.clone(), decode(column, &mut bytes).expect("checked when it came").json(column.kind))
            };
            serde_json::Value::Object(columns.iter().map(pair).collect())
        };
        let row = row.map(|row| object(&self.values, row));
        serde_json::json!({"view": self.schema.name, "key": object(&self.key, key), "row": row})
    }

    /// A stored row in the form that plugins get. Its columns are those of `select`.
    pub(super) fn encode(&self, row: &Row<'_>) -> rusqlite::Result<Vec<u8>> {
        let mut out = Vec::with_capacity(16 * self.values.len());
        for (n, &i) in self.values.iter().enumerate() {
            let column = &self.schema.columns[i];
            encode(column, row.get_ref(n)?, &mut out).ok_or_else(|| {
                // What was checked before it was stored reads back, unless the file was damaged where SQLite cannot see it.
                let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
                let what = format!("column {:?} of view {:?} holds what it cannot hold", column.name, self.schema.name);
                rusqlite::Error::SqliteFailure(code, Some(what))
            })?;
        }
        Ok(out)
    }

    /// The key of a stored row, all of whose columns were selected in order, as plugins write it. None if a column has
    /// something that no plugin could have written.
    pub(super) fn encode_key(&self, row: &Row<'_>) -> rusqlite::Result<Option<Vec<u8>>> {
        let mut out = Vec::new();
        for &i in &self.key {
            if encode(&self.schema.columns[i], row.get_ref(i)?, &mut out).is_none() {
                return Ok(None);
            }
        }
        Ok(Some(out))
    }
}

fn sqlite_type(kind: ColumnType) -> &'static str {
    match kind {
        ColumnType::Integer | ColumnType::Boolean => "INTEGER",
        ColumnType::Real => "REAL",
        ColumnType::Bytes => "BLOB",
        ColumnType::Text | ColumnType::Timestamp | ColumnType::Json | ColumnType::Uuid | ColumnType::Decimal => "TEXT",
    }
}

/// One value, borrowed from what a plugin returned.
#[derive(Debug, PartialEq)]
enum Value<'a> {
    Null,
    Text(&'a str),
    Integer(i64),
    Real(f64),
    Boolean(bool),
    Bytes(&'a [u8]),
    Timestamp(Time),
    Uuid(uuid::Uuid),
}

impl ToSql for Value<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Value::Null => ToSqlOutput::Borrowed(ValueRef::Null),
            Value::Text(text) => ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())),
            Value::Integer(i) => ToSqlOutput::Borrowed(ValueRef::Integer(*i)),
            Value::Real(r) => ToSqlOutput::Borrowed(ValueRef::Real(*r)),
            Value::Boolean(b) => ToSqlOutput::Borrowed(ValueRef::Integer((*b).into())),
            Value::Bytes(bytes) => ToSqlOutput::Borrowed(ValueRef::Blob(bytes)),
            Value::Timestamp(time) => {
                let mut text = String::with_capacity(27);
                time.write_sortable(&mut text);
                ToSqlOutput::from(text)
            }
            Value::Uuid(uuid) => ToSqlOutput::from(uuid.hyphenated().to_string()),
        })
    }
}

impl Value<'_> {
    fn json(&self, kind: ColumnType) -> serde_json::Value {
        match self {
            Value::Null => serde_json::Value::Null,
            Value::Text(text) if kind == ColumnType::Json => serde_json::from_str(text).expect("checked when it came"),
            Value::Text(text) => (*text).into(),
            Value::Integer(i) => (*i).into(),
            Value::Real(r) => (*r).into(),
            Value::Boolean(b) => (*b).into(),
            Value::Bytes(bytes) => STANDARD.encode(bytes).into(),
            Value::Timestamp(time) => {
                let mut text = String::with_capacity(27);
                time.write_sortable(&mut text);
                text.into()
            }
            Value::Uuid(uuid) => uuid.hyphenated().to_string().into(),
        }
    }
}

/// Takes one value of a column off `bytes`. Only the shortest form is taken: rows are found by the bytes of their keys.
fn decode<'a>(column: &Column, bytes: &mut &'a [u8]) -> Result<Value<'a>, String> {
    let Some((&first, rest)) = bytes.split_first() else { return Err("it is missing".into()) };
    let marker = Marker::from_u8(first);
    if marker == Marker::Null {
        *bytes = rest;
        return if column.nullable { Ok(Value::Null) } else { Err("it is nil, but not nullable".into()) };
    }
    let value = match column.kind {
        ColumnType::Text => Value::Text(string(bytes)?),
        ColumnType::Json => {
            let text = string(bytes)?;
            serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(|e| format!("it is not JSON: {e}"))?;
            Value::Text(text)
        }
        ColumnType::Decimal => {
            let text = string(bytes)?;
            if !is_decimal(text) {
                return Err(format!("{:?} is not a decimal like -12.50", text.chars().take(64).collect::<String>()));
            }
            Value::Text(text)
        }
        ColumnType::Integer => Value::Integer(integer(bytes)?),
        ColumnType::Timestamp => {
            let time = Time::from_microseconds(integer(bytes)?).filter(|t| t.microseconds() >= YEAR_0);
            Value::Timestamp(time.ok_or("it is a timestamp outside of the years 0 to 9999")?)
        }
        ColumnType::Real => match marker {
            Marker::F64 if rest.len() >= 8 => {
                let (number, rest) = rest.split_at(8);
                *bytes = rest;
                let number = f64::from_be_bytes(number.try_into().expect("eight bytes"));
                if !number.is_finite() {
                    return Err(format!("it is {number}, which is not a number that can be stored"));
                }
                Value::Real(number)
            }
            _ => return Err(wrong(column, marker)),
        },
        ColumnType::Boolean => match marker {
            Marker::True | Marker::False => {
                *bytes = rest;
                Value::Boolean(marker == Marker::True)
            }
            _ => return Err(wrong(column, marker)),
        },
        ColumnType::Bytes => Value::Bytes(binary(bytes)?),
        ColumnType::Uuid => {
            let uuid = binary(bytes)?;
            Value::Uuid(uuid::Uuid::from_slice(uuid).map_err(|_| "it is not a uuid of 16 bytes".to_owned())?)
        }
    };
    Ok(value)
}

/// 0000-01-01T00:00:00Z in microseconds.
const YEAR_0: i64 = -62_167_219_200_000_000;

fn wrong(column: &Column, found: Marker) -> String {
    format!("it is {found:?}, not of type {}", column.kind.name())
}

fn is_decimal(text: &str) -> bool {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let unsigned = text.strip_prefix('-').unwrap_or(text);
    match unsigned.split_once('.') {
        Some((whole, fraction)) => digits(whole) && digits(fraction),
        None => digits(unsigned),
    }
}

fn integer(bytes: &mut &[u8]) -> Result<i64, String> {
    let before = *bytes;
    let number: i64 = rmp::decode::read_int(bytes).map_err(|e| format!("it is not an integer of 64 bits: {e}"))?;
    let shortest = match number {
        -32..=127 => 1,
        -128..=255 => 2,
        -32_768..=65_535 => 3,
        -2_147_483_648..=4_294_967_295 => 5,
        _ => 9,
    };
    if before.len() - bytes.len() != shortest {
        return Err("it is not in its shortest form".into());
    }
    // From 128 on, the signed forms are as short as the unsigned ones; a key has one form.
    if number >= 0 && matches!(before.first(), Some(0xd0..=0xd3)) {
        return Err("it is not negative, but in a signed form".into());
    }
    Ok(number)
}

fn string<'a>(bytes: &mut &'a [u8]) -> Result<&'a str, String> {
    let before = *bytes;
    let length = rmp::decode::read_str_len(bytes).map_err(|e| format!("it is not a string: {e}"))? as usize;
    let shortest = match length {
        0..=31 => 1,
        32..=255 => 2,
        256..=65_535 => 3,
        _ => 5,
    };
    let text = take(before, bytes, length, shortest)?;
    std::str::from_utf8(text).map_err(|e| format!("it is not UTF-8: {e}"))
}

fn binary<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], String> {
    let before = *bytes;
    let length = rmp::decode::read_bin_len(bytes).map_err(|e| format!("it is not binary: {e}"))? as usize;
    let shortest = match length {
        0..=255 => 2,
        256..=65_535 => 3,
        _ => 5,
    };
    take(before, bytes, length, shortest)
}

fn take<'a>(before: &[u8], bytes: &mut &'a [u8], length: usize, shortest: usize) -> Result<&'a [u8], String> {
    if before.len() - bytes.len() != shortest {
        return Err("its length is not in its shortest form".into());
    }
    let (value, rest) = bytes.split_at_checked(length).ok_or("it ends too early")?;
    *bytes = rest;
    Ok(value)
}

/// The inverse of binding: what SQLite stores of a checked value becomes the same bytes again. None for what no checked
/// value becomes.
fn encode(column: &Column, value: ValueRef<'_>, out: &mut Vec<u8>) -> Option<()> {
    use rmp::encode::*;
    let text = |bytes| std::str::from_utf8(bytes).ok();
    match (column.kind, value) {
        (_, ValueRef::Null) => write_nil(out).ok(),
        (ColumnType::Integer, ValueRef::Integer(i)) => write_sint(out, i).map(drop).ok(),
        (ColumnType::Boolean, ValueRef::Integer(i)) => write_bool(out, i != 0).ok(),
        (ColumnType::Real, ValueRef::Real(r)) => write_f64(out, r).ok(),
        (ColumnType::Bytes, ValueRef::Blob(b)) => write_bin(out, b).ok(),
        (ColumnType::Timestamp, ValueRef::Text(t)) => {
            let time: Time = text(t)?.parse().ok()?;
            write_sint(out, time.microseconds()).map(drop).ok()
        }
        (ColumnType::Uuid, ValueRef::Text(t)) => {
            let uuid = uuid::Uuid::try_parse(text(t)?).ok()?;
            write_bin(out, uuid.as_bytes()).ok()
        }
        (ColumnType::Text | ColumnType::Json | ColumnType::Decimal, ValueRef::Text(t)) => write_str(out, text(t)?).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(kind: ColumnType) -> Column {
        Column { name: "c".into(), kind, nullable: false }
    }

    fn check(kind: ColumnType, bytes: &[u8]) -> Result<(), String> {
        let mut rest = bytes;
        decode(&column(kind), &mut rest)?;
        if rest.is_empty() { Ok(()) } else { Err("rest".into()) }
    }

    #[test]
    fn only_the_shortest_form_of_the_right_type_is_taken() {
        use ColumnType::*;
        assert_eq!(check(Integer, &[0x7f]), Ok(()));
        assert_eq!(check(Integer, &[0xcc, 0x80]), Ok(()));
        assert_eq!(check(Text, b"\xa1x"), Ok(()));
        let nan = [&[0xcb][..], &f64::NAN.to_be_bytes()].concat();
        for (kind, bytes, expected) in [
            (Integer, &[0xcc, 0x7f][..], "shortest"),
            (Integer, &[0xcf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], "64 bits"),
            (Integer, &[0xd1, 0x7f, 0xff], "signed form"),
            (Integer, b"\xa1x", "not an integer"),
            (Integer, &[], "missing"),
            (Integer, &[0xc0], "not nullable"),
            (Text, b"\xd9\x01x", "shortest"),
            (Text, b"\xa2x", "too early"),
            (Text, b"\xa1\xff", "UTF-8"),
            (Real, &nan, "NaN"),
            (Real, &[0x01], "not of type real"),
            (Boolean, &[0x01], "not of type boolean"),
            (Uuid, &[0xc4, 1, 0], "16 bytes"),
            (Decimal, b"\xa31e5", "\"1e5\""),
            (Json, b"\xa1{", "not JSON"),
            (Timestamp, &[0xd3, 0x80, 0, 0, 0, 0, 0, 0, 0], "years"),
        ] {
            let error = check(kind, bytes).unwrap_err();
            assert!(error.contains(expected), "{kind:?} {bytes:x?}: {error}");
        }
    }
}
