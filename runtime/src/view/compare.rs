//! A generation at rest, and what differs between two of them.
//!
//! A [`Snapshot`] is a copy of a live file as of one commit. [`compare`] reads two files side by side in the order of the
//! key, so that it needs no more memory for a million rows than for one.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use rusqlite::Row;
use rusqlite::types::ValueRef;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use super::generation::{Mark, mark, read_only};
use super::origin::{Origin, origin};
use super::readers::Value;
use super::row::{Table, quote};
use super::{Error, render};
use crate::manifest::{ColumnType, ViewSchema};
use crate::model::Position;

/// A copy of a generation's file as of one of its commits.
#[derive(Debug)]
pub struct Snapshot {
    /// The copy.
    pub file: PathBuf,
    /// How far the generation had come; None before the first event.
    pub mark: Option<Mark>,
    /// The hash of the module that made the last commit; empty if there was none.
    pub module: String,
    /// Events that are not in the rows, because they are dead letters.
    pub dead_letters: HashSet<Position>,
    /// What the rows were made from; None if no writer has said so.
    pub origin: Option<Origin>,
}

impl Snapshot {
    /// Copies `live`, which may be written meanwhile, to a file that is not there yet. Takes no lock that a writer would
    /// wait for.
    pub fn take(live: &Path, to: PathBuf) -> Result<Snapshot, Error> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| Error::Sqlite { path, error }
        };
        let target = to.to_str().ok_or_else(|| Error::File {
            path: to.clone(),
            error: std::io::Error::new(std::io::ErrorKind::InvalidInput, "the path is not UTF-8"),
        })?;
        // A file of the time before the log had one order is refused by its own name, not by that of a copy.
        mark(live)?;
        read_only(live)?.execute("VACUUM INTO ?", [target]).map_err(failed(live))?;
        let copy = read_only(&to)?;
        let read = || -> rusqlite::Result<_> {
            let module = copy.query_row("SELECT module FROM _shadowbox_generation", [], |r| r.get(0))?;
            let mut letters = copy.prepare("SELECT position FROM _shadowbox_dead_letters")?;
            let letters = letters.query_map([], |r| Ok(Position(r.get::<_, i64>(0)? as u64)))?;
            Ok((module, letters.collect::<rusqlite::Result<_>>()?))
        };
        let (module, dead_letters) = read().map_err(failed(&to))?;
        Ok(Snapshot { mark: mark(&to)?, origin: origin(&to)?, module, dead_letters, file: to })
    }

    /// The position up to which events were applied or passed over.
    pub fn checkpoint(&self) -> Option<Position> {
        self.mark.as_ref().map(|mark| mark.position)
    }
}

/// A view in a file.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Side<'a> {
    pub file: &'a Path,
    pub schema: &'a ViewSchema,
}

/// All rows of a view in one file, in short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Total {
    /// How many there are.
    pub rows: u64,
    /// A digest of them that does not depend on their order: the sum of the rows' digests.
    #[serde(serialize_with = "hexadecimal")]
    pub digest: u128,
}

fn hexadecimal<S: Serializer>(digest: &u128, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{digest:032x}"))
}

/// What differs between a view of the live generation and the same view in the shadow.
#[derive(Debug, Default, Serialize)]
pub struct Comparison {
    /// All rows of the live one; None if there is no such view.
    pub live: Option<Total>,
    /// All rows in the shadow; None if there is no such view.
    pub shadow: Option<Total>,
    /// Rows that are the same in all columns that both have.
    pub equal: u64,
    /// Rows of one key that differ in a column.
    pub changed: u64,
    /// Rows that only the shadow has.
    pub added: u64,
    /// Rows that only the live one has.
    pub removed: u64,
    /// The first ones of each kind, in the order of the key.
    pub samples: Vec<Difference>,
}

/// A row that differs.
#[derive(Debug, Serialize)]
pub struct Difference {
    /// In what way.
    pub kind: Kind,
    /// The values of the key's columns.
    pub key: Vec<(String, Box<RawValue>)>,
    /// The columns that differ; of a row that only one side has, all but the key.
    pub columns: Vec<ColumnDifference>,
    /// The key as plugins write it; None if what the file has cannot be one.
    #[serde(skip)]
    pub encoded: Option<Vec<u8>>,
}

/// In what way a row differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "they are described in Comparison")]
pub enum Kind {
    Changed,
    Added,
    Removed,
}

/// A value of a row on both sides; None where there is no row.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct ColumnDifference {
    pub column: String,
    pub live: Option<Box<RawValue>>,
    pub shadow: Option<Box<RawValue>>,
}

impl Comparison {
    /// True if no row differs.
    pub fn is_equal(&self) -> bool {
        self.changed + self.added + self.removed == 0
    }
}

/// True if rows of both can be told to be the same by their key.
pub fn comparable(live: &ViewSchema, shadow: &ViewSchema) -> bool {
    let key = |s: &ViewSchema| s.key_columns().iter().map(|&i| s.columns[i].kind).collect::<Vec<_>>();
    live.key == shadow.key && key(live) == key(shadow)
}

/// Compares a view on two sides, or counts the rows where there is one side only. Columns that only one side has, or
/// that have another type there, are left out; views that are not [`comparable`] are counted, each for itself. `samples`
/// rows of each kind are answered. `go_on` is asked for each row; None is answered if it says no.
pub fn compare(
    live: Option<Side<'_>>,
    shadow: Option<Side<'_>>,
    samples: u64,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Option<Comparison>, Error> {
    let (left, right) = match (live, shadow) {
        (None, None) => return Ok(Some(Comparison::default())),
        (Some(l), Some(r)) if !comparable(l.schema, r.schema) => {
            let Some(removed) = compare(live, None, samples, go_on)? else { return Ok(None) };
            let Some(mut found) = compare(None, shadow, samples, go_on)? else { return Ok(None) };
            (found.live, found.removed) = (removed.live, removed.removed);
            found.samples.extend(removed.samples);
            return Ok(Some(found));
        }
        (Some(l), None) => (Reading::open(l)?, Reading::empty(l.schema)),
        (None, Some(r)) => (Reading::empty(r.schema), Reading::open(r)?),
        (Some(l), Some(r)) => (Reading::open(l)?, Reading::open(r)?),
    };
    let failed = |error| Error::Sqlite { path: live.or(shadow).expect("one is there").file.to_owned(), error };
    let found = merge(&left, &right, samples, go_on).map_err(failed)?;
    Ok(found.map(|found| Comparison {
        live: found.live.filter(|_| live.is_some()),
        shadow: found.shadow.filter(|_| shadow.is_some()),
        ..found
    }))
}

/// A view that is read in the order of its key.
struct Reading {
    connection: rusqlite::Connection,
    sql: String,
    table: Table,
}

impl Reading {
    fn open(side: Side<'_>) -> Result<Reading, Error> {
        Ok(Reading::new(read_only(side.file)?, Table::new(side.schema)))
    }

    /// A side without rows.
    fn empty(schema: &ViewSchema) -> Reading {
        let connection = rusqlite::Connection::open_in_memory().expect("memory can be had");
        let table = Table::new(schema);
        table.ddl().iter().for_each(|sql| connection.execute_batch(sql).expect("it makes tables of valid schemas"));
        Reading::new(connection, table)
    }

    fn new(connection: rusqlite::Connection, table: Table) -> Reading {
        let list = |names: Vec<&str>| names.into_iter().map(quote).collect::<Vec<_>>().join(", ");
        let columns = list(table.schema.columns.iter().map(|c| c.name.as_str()).collect());
        let key = list(table.schema.key.iter().map(String::as_str).collect());
        let sql = format!("SELECT {columns} FROM {} ORDER BY {key}", quote(&table.schema.name));
        Reading { connection, sql, table }
    }

    fn json(&self, row: &Row<'_>, column: usize) -> rusqlite::Result<Box<RawValue>> {
        Ok(json(self.table.schema.columns[column].kind, row.get_ref(column)?))
    }

    fn key(&self, row: &Row<'_>) -> rusqlite::Result<Vec<(String, Box<RawValue>)>> {
        let name = |i: usize| self.table.schema.columns[i].name.clone();
        self.table.key.iter().map(|&i| Ok((name(i), self.json(row, i)?))).collect()
    }

    /// A row that the other side does not have.
    fn alone(&self, row: &Row<'_>, kind: Kind) -> rusqlite::Result<Difference> {
        let mut columns = Vec::new();
        for &i in &self.table.values {
            let (column, value) = (self.table.schema.columns[i].name.clone(), Some(self.json(row, i)?));
            columns.push(match kind {
                Kind::Added => ColumnDifference { column, live: None, shadow: value },
                Kind::Removed | Kind::Changed => ColumnDifference { column, live: value, shadow: None },
            });
        }
        Ok(Difference { kind, key: self.key(row)?, columns, encoded: self.table.encode_key(row)? })
    }
}

/// Reads both sides once; neither is ahead of the other by more than one row.
fn merge(
    left: &Reading,
    right: &Reading,
    samples: u64,
    go_on: &mut dyn FnMut() -> bool,
) -> rusqlite::Result<Option<Comparison>> {
    let (mut live, mut shadow) = (Total::default(), Total::default());
    let mut found = Comparison::default();
    let common: Vec<(usize, usize)> = (left.table.values.iter())
        .filter_map(|&l| {
            let column = &left.table.schema.columns[l];
            let r = right.table.schema.column(&column.name)?;
            (right.table.schema.columns[r].kind == column.kind).then_some((l, r))
        })
        .collect();
    let (mut left_rows, mut right_rows) = (left.connection.prepare(&left.sql)?, right.connection.prepare(&right.sql)?);
    let (mut left_rows, mut right_rows) = (left_rows.raw_query(), right_rows.raw_query());
    let (mut l, mut r) = (left_rows.next()?, right_rows.next()?);
    loop {
        if !go_on() {
            return Ok(None);
        }
        let order = match (l, r) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(l), Some(r)) => compare_keys(left, l, right, r)?,
        };
        if let Some(row) = l.filter(|_| order.is_le()) {
            live.add(row)?;
        }
        if let Some(row) = r.filter(|_| order.is_ge()) {
            shadow.add(row)?;
        }
        match (order, l, r) {
            (Ordering::Less, Some(row), _) => {
                found.removed += 1;
                if found.removed <= samples {
                    found.samples.push(left.alone(row, Kind::Removed)?);
                }
            }
            (Ordering::Greater, _, Some(row)) => {
                found.added += 1;
                if found.added <= samples {
                    found.samples.push(right.alone(row, Kind::Added)?);
                }
            }
            (_, Some(l), Some(r)) => {
                let mut columns = Vec::new();
                for &(i, j) in &common {
                    let (a, b) = (l.get_ref(i)?, r.get_ref(j)?);
                    if !same(a, b) {
                        let column = &left.table.schema.columns[i];
                        let value = |v| Some(json(column.kind, v));
                        columns.push(ColumnDifference {
                            column: column.name.clone(),
                            live: value(a),
                            shadow: value(b),
                        });
                    }
                }
                found.equal += u64::from(columns.is_empty());
                found.changed += u64::from(!columns.is_empty());
                if !columns.is_empty() && found.changed <= samples {
                    let (key, encoded) = (left.key(l)?, left.table.encode_key(l)?);
                    found.samples.push(Difference { kind: Kind::Changed, key, columns, encoded });
                }
            }
            _ => unreachable!("the order says which of them are there"),
        }
        if order.is_le() {
            l = left_rows.next()?;
        }
        if order.is_ge() {
            r = right_rows.next()?;
        }
    }
    (found.live, found.shadow) = (Some(live), Some(shadow));
    Ok(Some(found))
}

impl Total {
    fn add(&mut self, row: &Row<'_>) -> rusqlite::Result<()> {
        let mut hash = Sha256::new();
        for i in 0..row.as_ref().column_count() {
            // Each value with its type and length, so that no two rows are spelt alike.
            match row.get_ref(i)? {
                ValueRef::Null => hash.update([0]),
                ValueRef::Integer(number) => {
                    hash.update([1]);
                    hash.update(number.to_le_bytes());
                }
                ValueRef::Real(number) => {
                    hash.update([2]);
                    hash.update(number.to_bits().to_le_bytes());
                }
                ValueRef::Text(bytes) | ValueRef::Blob(bytes) => {
                    hash.update([3]);
                    hash.update((bytes.len() as u64).to_le_bytes());
                    hash.update(bytes);
                }
            }
        }
        let digest = u128::from_le_bytes(hash.finalize()[..16].try_into().expect("sixteen bytes"));
        self.rows += 1;
        self.digest = self.digest.wrapping_add(digest);
        Ok(())
    }
}

fn compare_keys(left: &Reading, l: &Row<'_>, right: &Reading, r: &Row<'_>) -> rusqlite::Result<Ordering> {
    for (&i, &j) in left.table.key.iter().zip(&right.table.key) {
        // SQLite's order of what a key's column can hold: numbers by value, text and blobs by their bytes.
        let order = match (l.get_ref(i)?, r.get_ref(j)?) {
            (ValueRef::Integer(a), ValueRef::Integer(b)) => a.cmp(&b),
            (ValueRef::Text(a) | ValueRef::Blob(a), ValueRef::Text(b) | ValueRef::Blob(b)) => a.cmp(b),
            (a, b) => unreachable!("a strict table has {a:?} and {b:?} in one column of a key"),
        };
        if order.is_ne() {
            return Ok(order);
        }
    }
    Ok(Ordering::Equal)
}

/// To the last bit: -0.0 is not 0.0.
fn same(a: ValueRef<'_>, b: ValueRef<'_>) -> bool {
    match (a, b) {
        (ValueRef::Real(a), ValueRef::Real(b)) => a.to_bits() == b.to_bits(),
        (a, b) => a == b,
    }
}

fn json(kind: ColumnType, value: ValueRef<'_>) -> Box<RawValue> {
    let text = |bytes| String::from_utf8_lossy(bytes);
    let text = match value {
        ValueRef::Text(bytes) => text(bytes),
        _ => Default::default(),
    };
    let value = match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => Value::Integer(number),
        ValueRef::Real(number) => Value::Real(number),
        ValueRef::Text(_) => Value::Text(&text),
        ValueRef::Blob(bytes) => Value::Blob(bytes),
    };
    render::json(kind, value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Column;

    fn schema(columns: &[(&str, ColumnType)]) -> ViewSchema {
        let column = |&(name, kind): &(&str, ColumnType)| Column { name: name.into(), kind, nullable: true };
        ViewSchema {
            name: "v".into(),
            columns: columns.iter().map(column).collect(),
            key: vec!["k".into()],
            indexes: Vec::new(),
        }
    }

    fn file(folder: &Path, name: &str, schema: &ViewSchema, rows: &str) -> PathBuf {
        let path = folder.join(name);
        let connection = rusqlite::Connection::open(&path).unwrap();
        Table::new(schema).ddl().iter().for_each(|sql| connection.execute_batch(sql).unwrap());
        if !rows.is_empty() {
            connection.execute_batch(&format!("INSERT INTO v VALUES {rows}")).unwrap();
        }
        path
    }

    /// Counts (equal, changed, added, removed), whether the digests are the same, and the samples in short.
    fn check(live: (&ViewSchema, &str), shadow: (&ViewSchema, &str)) -> ([u64; 4], bool, String) {
        let folder = tempfile::tempdir().unwrap();
        let files = (file(folder.path(), "live", live.0, live.1), file(folder.path(), "shadow", shadow.0, shadow.1));
        let sides = (Side { file: &files.0, schema: live.0 }, Side { file: &files.1, schema: shadow.0 });
        let found = compare(Some(sides.0), Some(sides.1), 2, &mut || true).unwrap().unwrap();
        let samples = found.samples.iter().map(|d| {
            let columns = d.columns.iter().map(|c| {
                let value = |v: &Option<Box<RawValue>>| v.as_ref().map_or("-".into(), |v| v.get().to_owned());
                format!("{} {} {}", c.column, value(&c.live), value(&c.shadow))
            });
            format!("{:?} {}: {}", d.kind, d.key[0].1, columns.collect::<Vec<_>>().join(", "))
        });
        let samples = samples.collect::<Vec<_>>().join("; ");
        ([found.equal, found.changed, found.added, found.removed], found.live == found.shadow, samples)
    }

    #[test]
    fn rows_are_told_apart_by_key_and_column() {
        use ColumnType::*;
        let two = schema(&[("k", Text), ("n", Integer)]);
        assert_eq!(check((&two, "('b', 1), ('a', 2)"), (&two, "('a', 2), ('b', 1)")), ([2, 0, 0, 0], true, "".into()));
        let (counts, same, samples) =
            check((&two, "('a', 1), ('b', 2), ('d', 4)"), (&two, "('b', NULL), ('c', 3), ('d', 4)"));
        assert_eq!((counts, same), ([1, 1, 1, 1], false));
        assert_eq!(samples, "Removed \"a\": n 1 -; Changed \"b\": n 2 null; Added \"c\": n - 3");
        // More than are shown are counted.
        assert_eq!(check((&two, "('a', 1)"), (&two, "('b', 1), ('c', 1), ('d', 1)")).0, [0, 0, 3, 1]);
        // Two rows that change places do not cancel out.
        assert!(!check((&two, "('a', 1), ('b', 2)"), (&two, "('a', 2), ('b', 1)")).1);
    }

    #[test]
    fn only_columns_of_both_sides_are_compared() {
        use ColumnType::*;
        let two = schema(&[("k", Text), ("n", Integer), ("gone", Text)]);
        let more = schema(&[("new", Real), ("k", Text), ("n", Integer)]);
        assert_eq!(check((&two, "('a', 1, 'x')"), (&more, "(0.5, 'a', 1)")).0, [1, 0, 0, 0]);
        // The same name, but another type.
        let other = schema(&[("k", Text), ("n", Text)]);
        assert_eq!(check((&two, "('a', 1, 'x')"), (&other, "('a', '1')")).0, [1, 0, 0, 0]);
        // Rows of another key are other rows.
        let key = schema(&[("k", Integer), ("n", Integer)]);
        assert_eq!(check((&two, "('a', 1, 'x')"), (&key, "(1, 1), (2, 2)")).0, [0, 0, 2, 1]);
    }

    #[test]
    fn a_snapshot_is_one_commit() {
        let folder = tempfile::tempdir().unwrap();
        let live = folder.path().join("live.sqlite");
        let manifest = serde_json::json!({
            "contract": crate::manifest::CONTRACT, "projection": "p", "version": 1, "sources": [{"source": "s"}],
            "views": [{"name": "v", "key": ["k"], "columns": [{"name": "k", "type": "text"}]}],
        });
        let manifest = crate::manifest::Manifest::parse(&manifest.to_string()).unwrap();
        super::super::Generation::create(&live, &manifest).unwrap();
        let writer = rusqlite::Connection::open(&live).unwrap();
        let commit = "INSERT INTO v VALUES ('a'); INSERT INTO _shadowbox_checkpoint VALUES (0, 3, 0, 9, 'log');
                      UPDATE _shadowbox_generation SET module = 'm';";
        writer.execute_batch(commit).unwrap();
        // Not committed, so nobody sees it; and nobody waits for it.
        writer.execute_batch("BEGIN IMMEDIATE; INSERT INTO v VALUES ('b');").unwrap();
        let snapshot = Snapshot::take(&live, folder.path().join("copy's.sqlite")).unwrap();
        assert_eq!((snapshot.checkpoint(), snapshot.module.as_str()), (Some(Position(3)), "m"));
        assert!(snapshot.dead_letters.is_empty());
        let side = Side { file: &snapshot.file, schema: &manifest.views[0] };
        assert_eq!(compare(Some(side), None, 9, &mut || true).unwrap().unwrap().live.unwrap().rows, 1);
        writer
            .execute_batch(
                "INSERT INTO _shadowbox_dead_letters (source, position, stream, type, id, time, state)
                 VALUES ('s', 2, '', 'T', 'i', 0, 'skipped'); COMMIT;",
            )
            .unwrap();
        let snapshot = Snapshot::take(&live, folder.path().join("second.sqlite")).unwrap();
        assert_eq!(snapshot.dead_letters, HashSet::from([Position(2)]));
        assert!(Snapshot::take(&folder.path().join("gone"), folder.path().join("third.sqlite")).is_err());
    }
}
