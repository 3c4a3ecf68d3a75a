//! Row changes on their way into a generation.

use std::hash::BuildHasher;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::row::Table;
use crate::config::limits;

/// Row changes that wait for their commit: the last state of each row touched, once.
///
/// What plugins return is kept as it came, and rows are found in it by offsets: a change is not copied before it is
/// bound to a statement. Bytes of rows that were changed again stay until the commit, so they count.
#[derive(Default)]
pub struct Changes {
    answers: Vec<Vec<u8>>,
    views: Vec<Rows>,
    rows: usize,
    bytes: usize,
    hasher: foldhash::fast::FixedState,
}

/// The changed rows of one view.
#[derive(Default)]
struct Rows {
    /// Indexes into `rows`, by the hash of the key.
    index: HashTable<u32>,
    rows: Vec<Change>,
}

/// Where a change lies.
#[derive(Clone, Copy)]
struct Change {
    hash: u64,
    answer: u32,
    key: Span,
    /// None: the row is deleted.
    row: Option<Span>,
}

#[derive(Clone, Copy)]
struct Span {
    begin: u32,
    end: u32,
}

impl Span {
    fn of(self, answer: &[u8]) -> &[u8] {
        &answer[self.begin as usize..self.end as usize]
    }
}

impl Change {
    fn key<'a>(&self, answers: &'a [Vec<u8>]) -> &'a [u8] {
        self.key.of(&answers[self.answer as usize])
    }

    fn row<'a>(&self, answers: &'a [Vec<u8>]) -> Option<&'a [u8]> {
        self.row.map(|row| row.of(&answers[self.answer as usize]))
    }
}

impl Changes {
    /// Takes what an `apply` returned: all of it, or, if anything in it is not valid, nothing.
    ///
    /// # Errors
    ///
    /// A sentence about what is not valid.
    pub fn absorb(&mut self, tables: &[Table], encoded: Vec<u8>) -> Result<(), String> {
        let answer = u32::try_from(self.answers.len()).expect("a commit comes long before");
        let changes = parse(tables, &encoded, answer, &self.hasher)?;
        self.views.resize_with(tables.len(), Rows::default);
        self.bytes += encoded.len() + changes.len() * size_of::<Change>();
        self.answers.push(encoded);
        let answers = &self.answers;
        for (view, change) in changes {
            let Rows { index, rows } = &mut self.views[view];
            let key = change.key(answers);
            let same = |&i: &u32| {
                let other = &rows[i as usize];
                other.hash == change.hash && other.key(answers) == key
            };
            match index.entry(change.hash, same, |&i| rows[i as usize].hash) {
                Entry::Occupied(found) => rows[*found.get() as usize] = change,
                Entry::Vacant(place) => {
                    place.insert(rows.len() as u32);
                    rows.push(change);
                    self.rows += 1;
                }
            }
        }
        Ok(())
    }

    /// How many rows wait.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// About how many bytes they take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What becomes of a row, if it is changed here: None inside if it is deleted.
    pub fn get(&self, view: u32, key: &[u8]) -> Option<Option<&[u8]>> {
        let Rows { index, rows } = self.views.get(view as usize)?;
        let found = index.find(self.hasher.hash_one(key), |&i| rows[i as usize].key(&self.answers) == key)?;
        Some(rows[*found as usize].row(&self.answers))
    }

    /// The changes of a view in the order of its tree, near enough: neighbours share pages then, 0.9 us a row instead
    /// of 1.2.
    pub(super) fn sorted(&self, view: usize) -> Vec<(&[u8], Option<&[u8]>)> {
        let rows = self.views.get(view).map_or(&[][..], |view| &view.rows);
        let mut rows: Vec<_> = rows.iter().map(|c| (c.key(&self.answers), c.row(&self.answers))).collect();
        rows.sort_unstable_by_key(|(key, _)| sort_key(key));
        rows
    }
}

/// A string's content, then the rest: SQLite's order of text, near enough for other types.
fn sort_key(key: &[u8]) -> (&[u8], &[u8]) {
    let mut rest = key;
    match rmp::decode::read_str_len(&mut rest) {
        Ok(length) => rest.split_at(length as usize),
        Err(_) => (&[], key),
    }
}

/// The fewest bytes that a change has: the headers of the array, the view, the operation, the key and the row.
const LEAST_BYTES: usize = 7;

/// Finds the changes in an answer, `[[view, op, key, row], ...]`, and checks each.
fn parse(
    tables: &[Table],
    encoded: &[u8],
    answer: u32,
    hasher: &foldhash::fast::FixedState,
) -> Result<Vec<(usize, Change)>, String> {
    let malformed = |what: String| format!("the changes are not an array of [view, op, key, row]: {what}");
    let mut rest = encoded;
    let length = rmp::decode::read_array_len(&mut rest).map_err(|e| malformed(e.to_string()))? as usize;
    if length > limits::CHANGES {
        return Err(format!("{length} changes; the limit for one batch is {}", limits::CHANGES));
    }
    // The length is what the plugin says; what it can be is bounded by what there is.
    let mut changes = Vec::with_capacity(length.min(encoded.len() / LEAST_BYTES));
    for i in 0..length {
        let broken = |e: &dyn std::fmt::Display| malformed(format!("change {i}: {e}"));
        match rmp::decode::read_array_len(&mut rest) {
            Ok(4) => {}
            Ok(n) => return Err(broken(&format!("it has {n} elements"))),
            Err(e) => return Err(broken(&e)),
        }
        let view: u32 = rmp::decode::read_int(&mut rest).map_err(|e| broken(&e))?;
        let op: u8 = rmp::decode::read_int(&mut rest).map_err(|e| broken(&e))?;
        let key = span(encoded, &mut rest).map_err(|e| broken(&e))?;
        let row = span(encoded, &mut rest).map_err(|e| broken(&e))?;
        let table = table(tables, view)?;
        table.check_key(key.of(encoded))?;
        let row = match op {
            0 => {
                table.check_row(row.of(encoded))?;
                Some(row)
            }
            1 => None,
            _ => return Err(format!("a change of view {:?} has op {op}; 0 is put, 1 is delete", table.schema.name)),
        };
        let hash = hasher.hash_one(key.of(encoded));
        changes.push((view as usize, Change { hash, answer, key, row }));
    }
    if !rest.is_empty() {
        return Err(malformed(format!("{} bytes too many", rest.len())));
    }
    Ok(changes)
}

/// Takes one `bin` off `rest`, which is the end of `encoded`.
fn span(encoded: &[u8], rest: &mut &[u8]) -> Result<Span, String> {
    let length = rmp::decode::read_bin_len(rest).map_err(|e| e.to_string())? as usize;
    let begin = encoded.len() - rest.len();
    *rest = rest.get(length..).ok_or("it ends too early")?;
    Ok(Span { begin: begin as u32, end: (begin + length) as u32 })
}

pub(super) fn table(tables: &[Table], view: u32) -> Result<&Table, String> {
    tables.get(view as usize).ok_or_else(|| format!("view {view} does not exist; the manifest has {}", tables.len()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::manifest::Manifest;

    fn tables() -> Vec<Table> {
        let manifest = r#"{ "contract": "0.1.0", "projection": "p", "version": 1, "sources": [{ "source": "s" }],
            "views": [
                { "name": "a", "columns": [{ "name": "k", "type": "text" }, { "name": "v", "type": "integer" }], "key": ["k"] },
                { "name": "b", "columns": [{ "name": "k", "type": "integer" }], "key": ["k"] }] }"#;
        Manifest::parse(manifest).unwrap().views.iter().map(Table::new).collect()
    }

    fn text(n: u8) -> Vec<u8> {
        let mut key = Vec::new();
        rmp::encode::write_str(&mut key, &"x".repeat(usize::from(n))).unwrap();
        key
    }

    fn answer(changes: &[(u32, u8, Vec<u8>, Vec<u8>)]) -> Vec<u8> {
        let changes: Vec<_> = changes
            .iter()
            .map(|(view, op, key, row)| (view, op, serde_bytes::Bytes::new(key), serde_bytes::Bytes::new(row)))
            .collect();
        rmp_serde::to_vec(&changes).unwrap()
    }

    proptest! {
        /// Against a plain map: the last state of each row, whatever came before it and in which answer.
        #[test]
        fn the_last_change_of_each_row_is_what_counts(
            answers in proptest::collection::vec(
                proptest::collection::vec((0_u32..2, any::<bool>(), 0_u8..12, 0_u8..100), 0..20), 0..6)
        ) {
            let tables = tables();
            let (mut changes, mut plain) = (Changes::default(), BTreeMap::new());
            for one in answers {
                let one: Vec<_> = one.into_iter().map(|(view, delete, key, value)| {
                    let key = if view == 0 { text(key) } else { vec![key] };
                    let row = if delete || view == 1 { vec![] } else { vec![value] };
                    (view, u8::from(delete), key, row)
                }).collect();
                changes.absorb(&tables, answer(&one)).unwrap();
                plain.extend(one.into_iter().map(|(view, op, key, row)| ((view, key), (op == 0).then_some(row))));
            }
            prop_assert_eq!(changes.rows(), plain.len());
            for ((view, key), row) in &plain {
                prop_assert_eq!(changes.get(*view, key), Some(row.as_deref()));
            }
            let sorted: usize = (0..2).map(|view| {
                let rows = changes.sorted(view);
                assert!(rows.is_sorted_by_key(|(key, _)| sort_key(key)));
                assert!(rows.iter().all(|(key, row)| plain[&(view as u32, key.to_vec())].as_deref() == *row));
                rows.len()
            }).sum();
            prop_assert_eq!(sorted, plain.len());
        }
    }

    #[test]
    fn an_answer_is_taken_as_a_whole_or_not_at_all() {
        let good = (0, 0, text(1), vec![1]);
        for (bad, expected) in [
            ((2, 0, text(1), vec![1]), "view 2 does not exist"),
            ((0, 2, text(1), vec![1]), "op 2"),
            ((0, 0, vec![1], vec![1]), "not a string"),
            ((0, 0, text(1), text(1)), "not an integer"),
            ((0, 0, text(1), vec![1, 1]), "1 bytes too many"),
        ] {
            let mut changes = Changes::default();
            let error = changes.absorb(&tables(), answer(&[good.clone(), bad])).unwrap_err();
            assert!(error.contains(expected), "{error}");
            assert_eq!((changes.rows(), changes.bytes()), (0, 0));
        }
        for (bytes, expected) in [
            (&[][..], "array"),
            (&[0xdd, 0xff, 0xff, 0xff, 0xff], "4294967295 changes; the limit"),
            (&[0xdd, 0, 0, 0xff, 0xff], "change 0"),
            (&[0x91, 0x93, 0, 0, 0], "3 elements"),
            (&[0x90, 0], "1 bytes too many"),
            (&[0x91, 0x94, 0, 0, 0xc4, 9, 0], "too early"),
        ] {
            let error = Changes::default().absorb(&tables(), bytes.to_vec()).unwrap_err();
            assert!(error.contains(expected), "{bytes:x?}: {error}");
        }
    }
}
