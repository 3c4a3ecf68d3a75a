//! One view's rows in guest memory: the changes of the running batch, and a bounded cache of what was used lately.
//!
//! Eviction goes by generations, only between batches: an entry carries the generation in which it was last used, and
//! once half of the limit has been used in the current generation, all that was last used in an earlier one goes. That
//! costs a fraction of a hash lookup an event, keeps what is hot, and bounds what stays from batch to batch. What one
//! batch touches always fits, because the host bounds the batch.

use std::rc::Rc;

use hashbrown::HashTable;

use crate::column::value::{read_bin, write_bin, write_int, written};
use crate::key::{self, KeyHasher};
use crate::projection::Failure;
use crate::view::{View, decode};
use crate::views::{AnyTable, Store};
use crate::{Error, Result};

/// The operations of a change, as the contract numbers them.
const PUT: i64 = 0;
const DELETE: i64 = 1;

/// How much a table keeps from batch to batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Rows, and keys that are known to have none. Below 20,000 a rebuild slows down measurably (5,000 rows: by half);
    /// far above, the memory is worth more elsewhere.
    pub(crate) rows: usize,
    /// Bytes of encoded rows and keys, for rows that are large. Decoded they take two to four times as much, and the
    /// host's limit is 256 MiB an instance.
    pub(crate) bytes: usize,
}

impl Limits {
    /// The limits of each table of a projection with this many views.
    pub(crate) fn for_views(views: usize) -> Self {
        Self { rows: 32_768, bytes: (32 << 20) / views.max(1) }
    }
}

pub(crate) struct Table<V> {
    view: u32,
    store: Rc<dyn Store>,
    limits: Limits,
    /// Indices into `entries`, by the hash of the key.
    index: HashTable<u32>,
    entries: Vec<Entry<V>>,
    /// The entries that this batch has changed, in the order of their first change: the order is part of the answer,
    /// and must not depend on what the cache holds.
    changed: Vec<u32>,
    generation: u32,
    /// Entries used in the current generation, and their bytes.
    young: usize,
    young_bytes: usize,
    /// An encoded key that is needed for the moment; kept for its memory.
    key: Vec<u8>,
    /// The encoded row while changes are written; kept for its memory.
    row: Vec<u8>,
}

struct Entry<V> {
    hash: u64,
    state: State<V>,
    /// The last event of this batch that changed the row, counted from 1. 0: as the host knows it.
    changed_by: u32,
    generation: u32,
    bytes: u32,
}

/// A row holds its own key; only where there is none, the encoded key is kept.
enum State<V> {
    Row(V),
    Absent(Box<[u8]>),
}

impl<V: View> State<V> {
    /// `encoded` is memory for the key, which only an absent row needs in this form.
    #[inline]
    fn is_of(&self, key: V::Key<'_>, encoded: &mut Vec<u8>) -> bool {
        match self {
            Self::Row(row) => row.has_key(key),
            Self::Absent(absent) => {
                encoded.clear();
                V::encode_key(key, encoded);
                key::same(absent, encoded)
            }
        }
    }
}

impl<V: View> Table<V> {
    pub(crate) fn new(view: u32, store: Rc<dyn Store>, limits: Limits) -> Self {
        Self {
            view,
            store,
            limits,
            index: HashTable::new(),
            entries: Vec::new(),
            changed: Vec::new(),
            generation: 0,
            young: 0,
            young_bytes: 0,
            key: Vec::new(),
            row: Vec::new(),
        }
    }

    /// The entry of this key, read from the host if it is not cached.
    pub(crate) fn row(&mut self, key: V::Key<'_>) -> Result<usize> {
        let hash = hash::<V>(key);
        if let Some(entry) = self.find(hash, key) {
            return Ok(entry);
        }
        self.encode(key);
        let stored = self.store.get(self.view, &self.key);
        self.insert_stored(hash, stored.as_deref())
    }

    pub(crate) fn at(&self, entry: usize) -> Option<&V> {
        match &self.entries[entry].state {
            State::Row(row) => Some(row),
            State::Absent(_) => None,
        }
    }

    pub(crate) fn put(&mut self, mut row: V, event: u32) -> Result<()> {
        check(&mut row)?;
        let hash = hash::<V>(row.key());
        let entry = match self.find(hash, row.key()) {
            Some(entry) => {
                self.entries[entry].state = State::Row(row);
                entry
            }
            // What it weighs is known when it is written, at the end of the batch.
            None => self.insert(hash, State::Row(row), 0),
        };
        self.mark(entry, event);
        Ok(())
    }

    pub(crate) fn delete(&mut self, key: V::Key<'_>, event: u32) {
        let hash = hash::<V>(key);
        let found = self.find(hash, key);
        self.encode(key);
        let absent = State::Absent(self.key.as_slice().into());
        let entry = match found {
            Some(entry) => {
                self.entries[entry].state = absent;
                entry
            }
            None => self.insert(hash, absent, self.key.len()),
        };
        self.mark(entry, event);
    }

    pub(crate) fn update(&mut self, key: V::Key<'_>, event: u32, change: impl FnOnce(&mut V)) -> Result<bool> {
        let entry = self.row(key)?;
        let State::Row(row) = &mut self.entries[entry].state else { return Ok(false) };
        change_row(row, key, change)?;
        self.mark(entry, event);
        Ok(true)
    }

    pub(crate) fn upsert(&mut self, key: V::Key<'_>, event: u32, change: impl FnOnce(&mut V)) -> Result<()>
    where
        V: Default,
    {
        let entry = self.row(key)?;
        match &mut self.entries[entry].state {
            State::Row(row) => change_row(row, key, change)?,
            absent => {
                let mut row = V::default();
                row.set_key(key);
                change_row(&mut row, key, change)?;
                *absent = State::Row(row);
            }
        }
        self.mark(entry, event);
        Ok(())
    }

    pub(crate) fn load<'k>(&mut self, keys: impl IntoIterator<Item = V::Key<'k>>) -> Result<()> {
        let mut missing: Vec<V::Key<'k>> = Vec::new();
        let mut request = Vec::new();
        for key in keys {
            if self.find(hash::<V>(key), key).is_none() {
                self.encode(key);
                missing.push(key);
                write_bin(&mut request, &self.key);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let mut header = Vec::with_capacity(request.len() + 5);
        written(rmp::encode::write_array_len(&mut header, missing.len() as u32));
        header.append(&mut request);
        let answer = self.store.get_many(self.view, &header);
        let mut answer = answer.as_slice();
        if rmp::decode::read_array_len(&mut answer)? as usize != missing.len() {
            return Err(Error::msg("the host answered another number of rows than were asked for"));
        }
        for key in missing {
            let stored = match answer {
                [0xc0, tail @ ..] => {
                    answer = tail;
                    None
                }
                _ => Some(read_bin(&mut answer)?),
            };
            let hash = hash::<V>(key);
            // A key that was named twice is there by now.
            if self.find(hash, key).is_none() {
                self.encode(key);
                self.insert_stored(hash, stored)?;
            }
        }
        Ok(())
    }

    /// Encodes the key into `self.key`.
    fn encode(&mut self, key: V::Key<'_>) {
        self.key.clear();
        V::encode_key(key, &mut self.key);
    }

    /// The entry of the key, from now on of the current generation.
    fn find(&mut self, hash: u64, key: V::Key<'_>) -> Option<usize> {
        let Self { index, entries, key: encoded, generation, young, young_bytes, .. } = self;
        let entry = *index.find(hash, |&entry| {
            let entry = &entries[entry as usize];
            entry.hash == hash && entry.state.is_of(key, encoded)
        })? as usize;
        let found = &mut entries[entry];
        if found.generation != *generation {
            found.generation = *generation;
            *young += 1;
            *young_bytes += found.bytes as usize;
        }
        Some(entry)
    }

    /// A new entry for the key in `self.key`, as the host has it.
    fn insert_stored(&mut self, hash: u64, stored: Option<&[u8]>) -> Result<usize> {
        let state = match stored {
            Some(row) => State::Row(decode(&self.key, row)?),
            None => State::Absent(self.key.as_slice().into()),
        };
        Ok(self.insert(hash, state, self.key.len() + stored.map_or(0, <[u8]>::len)))
    }

    /// A new entry. `bytes` is what its key and its row take, encoded.
    fn insert(&mut self, hash: u64, state: State<V>, bytes: usize) -> usize {
        let bytes = bytes as u32;
        let entry = self.entries.len();
        self.entries.push(Entry { hash, state, changed_by: 0, generation: self.generation, bytes });
        let entries = &self.entries;
        self.index.insert_unique(hash, entry as u32, |&entry| entries[entry as usize].hash);
        self.young += 1;
        self.young_bytes += bytes as usize;
        entry
    }

    fn mark(&mut self, entry: usize, event: u32) {
        if self.entries[entry].changed_by == 0 {
            self.changed.push(entry as u32);
        }
        self.entries[entry].changed_by = event;
    }

    /// Lets go of what was not used lately, if it is time.
    fn evict(&mut self) {
        if self.young < self.limits.rows / 2 && self.young_bytes < self.limits.bytes / 2 {
            return;
        }
        let generation = self.generation;
        self.entries.retain(|entry| entry.generation == generation);
        // Room for as much again, and no more: one batch may have needed far more than is to stay.
        self.entries.shrink_to(self.limits.rows);
        self.index.clear();
        self.index.shrink_to(self.limits.rows, |_| 0);
        let entries = &self.entries;
        for (i, entry) in entries.iter().enumerate() {
            self.index.insert_unique(entry.hash, i as u32, |&entry| entries[entry as usize].hash);
        }
        self.generation = generation.wrapping_add(1);
        self.young = 0;
        self.young_bytes = 0;
    }
}

impl<V: View> AnyTable for Table<V> {
    fn name(&self) -> &'static str {
        V::SCHEMA.name
    }

    fn changed(&self) -> usize {
        self.changed.len()
    }

    fn write_changes(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let Self { view, entries, changed, key, row: encoded, young_bytes, .. } = self;
        for entry in changed.drain(..) {
            let entry = &mut entries[entry as usize];
            encoded.clear();
            let (op, key) = match &entry.state {
                State::Row(row) => {
                    row.encode_row(encoded)
                        .map_err(|error| Failure { event: entry.changed_by - 1, message: error.to_string() })?;
                    key.clear();
                    V::encode_key(row.key(), key);
                    (PUT, key.as_slice())
                }
                State::Absent(key) => (DELETE, &**key),
            };
            written(rmp::encode::write_array_len(out, 4));
            write_int(out, i64::from(*view));
            write_int(out, op);
            write_bin(out, key);
            write_bin(out, encoded);
            entry.changed_by = 0;
            let bytes = (key.len() + encoded.len()) as u32;
            *young_bytes = *young_bytes + bytes as usize - entry.bytes as usize;
            entry.bytes = bytes;
        }
        self.evict();
        Ok(())
    }
}

/// Runs the author's change on a row, and refuses what would corrupt the view.
fn change_row<V: View>(row: &mut V, key: V::Key<'_>, change: impl FnOnce(&mut V)) -> Result<()> {
    change(row);
    if !row.has_key(key) {
        return Err(Error::msg(format_args!("a change to a row of `{}` gave it another key", V::SCHEMA.name)));
    }
    check(row)
}

#[inline]
fn hash<V: View>(key: V::Key<'_>) -> u64 {
    let mut hasher = KeyHasher::default();
    V::hash_key(key, &mut hasher);
    hasher.finish()
}

#[inline]
fn check<V: View>(row: &mut V) -> Result<()> {
    row.normalize();
    row.check().map_err(|error| error.within(format_args!("a row of `{}`", V::SCHEMA.name)))
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use super::*;
    use crate::view::Schema;

    /// A view written by hand: a number and nothing else.
    struct Number(i64);

    impl View for Number {
        const SCHEMA: Schema = Schema { name: "numbers", columns: &[], key: &["n"], indexes: &[] };
        type Key<'k> = i64;
        fn key(&self) -> i64 {
            self.0
        }
        fn set_key(&mut self, key: i64) {
            self.0 = key;
        }
        fn has_key(&self, key: i64) -> bool {
            self.0 == key
        }
        fn hash_key(key: i64, hasher: &mut KeyHasher) {
            hasher.number(key as u64);
        }
        fn encode_key(key: i64, out: &mut Vec<u8>) {
            out.extend(key.to_le_bytes());
        }
        fn compare_keys(&self, other: &Self) -> Ordering {
            self.0.cmp(&other.0)
        }
        fn normalize(&mut self) {}
        fn check(&self) -> Result<(), Error> {
            Ok(())
        }
        fn encode_row(&self, out: &mut Vec<u8>) -> Result<(), Error> {
            out.extend([0; 100]);
            Ok(())
        }
        fn decode(key: &mut &[u8], row: &mut &[u8]) -> Result<Self, Error> {
            let number = i64::from_le_bytes((*key).try_into()?);
            (*key, *row) = (&[], &[]);
            Ok(Self(number))
        }
    }

    /// A host without rows.
    struct Empty;

    impl Store for Empty {
        fn get(&self, _: u32, _: &[u8]) -> Option<Vec<u8>> {
            None
        }
        fn get_many(&self, _: u32, _: &[u8]) -> Vec<u8> {
            unreachable!("no test loads")
        }
    }

    fn table(limits: Limits) -> Table<Number> {
        Table::new(0, Rc::new(Empty), limits)
    }

    #[test]
    fn what_stays_is_bounded_in_rows_and_in_bytes() {
        for limits in [Limits { rows: 100, bytes: usize::MAX }, Limits { rows: usize::MAX, bytes: 100 * 108 }] {
            let mut table = table(limits);
            for n in 0..10_000 {
                // One row is written, another looked up in vain.
                table.put(Number(n), 1).unwrap();
                table.row(-n - 1).unwrap();
                table.write_changes(&mut Vec::new()).map_err(|failure| failure.message).unwrap();
                let bytes: usize = table.entries.iter().map(|entry| entry.bytes as usize).sum();
                assert!(table.entries.len() <= limits.rows.saturating_add(2), "{} entries", table.entries.len());
                assert!(bytes <= limits.bytes.saturating_add(2 * 108), "{bytes} bytes");
            }
        }
    }

    #[test]
    fn what_is_used_all_the_time_stays() {
        let mut table = table(Limits { rows: 10, bytes: usize::MAX });
        table.put(Number(-1), 1).unwrap();
        for n in 0..1_000 {
            table.put(Number(n), 1).unwrap();
            let hot = table.row(-1).unwrap();
            assert!(table.at(hot).is_some(), "the row was evicted, and the host does not have it");
            table.write_changes(&mut Vec::new()).map_err(|failure| failure.message).unwrap();
        }
    }

    #[test]
    fn a_batch_keeps_all_that_it_touches() {
        let mut table = table(Limits { rows: 4, bytes: 64 });
        for n in 0..1_000 {
            table.put(Number(n), 1).unwrap();
        }
        assert_eq!(table.changed(), 1_000);
        for n in 0..1_000 {
            let entry = table.row(n).unwrap();
            assert!(table.at(entry).is_some());
        }
    }
}
