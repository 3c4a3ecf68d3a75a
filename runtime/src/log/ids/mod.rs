//! Which positions an event of a source and an id may have: the index over the sealed part of the log.
//!
//! An LSM tree inside the log's SQLite file. A *run* holds entries, the first [`BITS`] bits of an event's hash and its
//! position, sorted by hash, in *pages*: equal stretches of the hash space, so that the page of a hash follows from the
//! hash, and the bits that follow from the page are not stored. A page is a row of the table of its run's level; the
//! rows of a level are only ever appended at its end, which keeps SQLite's pages full, and deleted.
//!
//! New entries are a run of level 0. When a level has [`FANOUT`] runs, they become one run of the next level, in steps
//! of a bounded number of entries. A merge advances through the hash space: below its frontier the entries are in the
//! new run, above it in the old ones, and no entry is ever in both. Every step leaves the index complete, so a merge
//! may stop after any of them, for ever.
//!
//! Which runs there are is one value with a checksum, and so is each page. What is damaged or missing is an error that
//! names the run, never an answer. Nothing is here that the sealed blocks do not have too: after [`Ids::clear`], adding
//! the entries of all blocks makes the index anew.
//!
//! Filters tell without a read that a run has not got a hash. They are in memory only, made from the pages when a
//! stretch of a run is asked for the second time: stored they would take a fifth of the index.
//!
//! Ten million entries in parts of 4,096 (2 cores, 2026-11-29, at a load of 2, and of 5 from other builds): 6.3 bytes an
//! entry; to add and merge a part 1.3 and 1.9 ms; a hash that is not there 0.8 and 1.7 µs, one that is 5 and 11 µs, in
//! batches 2 and 4 to 7 µs. Filters take 15 MB.

mod run;

use std::hash::Hasher as _;

use rusqlite::Connection;
use siphasher::sip::SipHasher24;

use run::{CHECK_BYTES, FILTER_SIZE, RUN_BYTES, Run};

/// The tables; the log's schema has them from the beginning.
pub(super) const SCHEMA: &str = "
    CREATE TABLE id_runs (runs BLOB NOT NULL) STRICT;
    INSERT INTO id_runs VALUES (x'00000000');
    CREATE TABLE id_level_0 (number INTEGER PRIMARY KEY, page BLOB NOT NULL) STRICT;
    CREATE TABLE id_level_1 (number INTEGER PRIMARY KEY, page BLOB NOT NULL) STRICT;
    CREATE TABLE id_level_2 (number INTEGER PRIMARY KEY, page BLOB NOT NULL) STRICT;
    CREATE TABLE id_level_3 (number INTEGER PRIMARY KEY, page BLOB NOT NULL) STRICT;
    CREATE TABLE id_level_4 (number INTEGER PRIMARY KEY, page BLOB NOT NULL) STRICT;
    CREATE TABLE id_level_5 (number INTEGER PRIMARY KEY, page BLOB NOT NULL) STRICT;
    CREATE TABLE id_level_6 (number INTEGER PRIMARY KEY, page BLOB NOT NULL) STRICT;
    CREATE TABLE id_level_7 (number INTEGER PRIMARY KEY, page BLOB NOT NULL) STRICT;";

/// Entries to merge for each entry that is added. An entry moves up at most seven times, so merges never fall behind:
/// a level has at most twice [`FANOUT`] runs.
pub(super) const MERGE_SHARE: usize = 8;

/// Memory for filters. Ten million entries need 15 MB; the runs that do not fit, the largest, cost each lookup the read
/// of a page.
const FILTER_BYTES: usize = 16 << 20;

/// The last one is never merged; one of its runs has two million parts.
const LEVELS: usize = 8;

/// Runs that are merged into one. Twice as many would save a quarter of the merging, and double the filters to ask.
const FANOUT: usize = 8;

/// Bits of a hash that are kept. Of a hundred million entries one in ten thousand new events meets a false candidate.
const BITS: u32 = 40;

/// The end of the hash space.
const END: u64 = 1 << BITS;

/// Why the index has no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The database refused.
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    /// What is there is not what was written.
    #[error("the index of ids is damaged: {what}")]
    Damage {
        /// Where.
        what: String,
    },
}

/// Hashes events as this log does.
#[derive(Clone)]
pub(super) struct Hasher(SipHasher24);

impl Hasher {
    /// With the log's own secret key: who knows it could choose ids that all fall into one page.
    pub(super) fn new(key: &[u8; 16]) -> Hasher {
        Hasher(SipHasher24::new_with_key(key))
    }

    /// SipHash-2-4 of the source's number in four bytes, the lowest first, and the id. A quarter of the time of SHA-256.
    pub(super) fn hash(&self, source: u32, id: &[u8]) -> u64 {
        let mut hasher = self.0;
        hasher.write(&source.to_le_bytes());
        hasher.write(id);
        hasher.finish()
    }
}

/// The index as a connection sees it, with filters. A transaction calls [`Ids::begin`] first, and so does the next one
/// after an error or a rollback, also a rollback to a savepoint.
#[derive(Default)]
pub(super) struct Ids {
    runs: Vec<Run>,
    /// The value from which `runs` is; empty if they may differ.
    stored: Vec<u8>,
}

impl Ids {
    /// Sees what this or another connection has changed; cheap if nothing has.
    pub(super) fn begin(&mut self, connection: &Connection) -> Result<(), Error> {
        let mut statement = connection.prepare_cached("SELECT runs FROM id_runs")?;
        let mut rows = statement.query([])?;
        let damage = |what: &str| Error::Damage { what: format!("the list of runs {what}") };
        let row = rows.next()?.ok_or_else(|| damage("is not there"))?;
        let stored = row.get_ref(0)?.as_blob().map_err(|_| damage("is not bytes"))?;
        if stored == self.stored {
            return Ok(());
        }
        self.stored.clear();
        let (check, fields) = stored.split_first_chunk().ok_or_else(|| damage("is too short"))?;
        if crc32fast::hash(fields).to_le_bytes() != *check || fields.len() % RUN_BYTES != 0 {
            return Err(damage("has a wrong checksum"));
        }
        let mut old = std::mem::take(&mut self.runs);
        self.runs = fields.chunks_exact(RUN_BYTES).map(Run::decode).collect();
        for run in &mut self.runs {
            // Another merge of the same runs into the same run would write the same, so its filters hold as well.
            if let Some(old) = old.iter_mut().find(|o| o.tag == run.tag) {
                run.filters = std::mem::take(&mut old.filters);
            }
        }
        self.stored.extend_from_slice(stored);
        self.share_memory();
        Ok(())
    }

    /// After an error the runs in memory are not all: what would look complete must be read anew.
    fn begin_if_unknown(&mut self, connection: &Connection) -> Result<(), Error> {
        if self.stored.is_empty() { self.begin(connection) } else { Ok(()) }
    }

    /// Adds to `found` the positions that the event of a hash may have.
    pub(super) fn find(&mut self, connection: &Connection, hash: u64, found: &mut Vec<u64>) -> Result<(), Error> {
        self.look(connection, &[hash], |_, position| found.push(position))
    }

    /// Adds to `found` each of the sorted `hashes` with each position that its event may have, sorted.
    ///
    /// Twice as fast as [`Ids::find`] for each: all of the batch asks one run before the next.
    pub(super) fn find_many(
        &mut self,
        connection: &Connection,
        hashes: &[u64],
        found: &mut Vec<(u64, u64)>,
    ) -> Result<(), Error> {
        debug_assert!(hashes.is_sorted());
        self.look(connection, hashes, |hash, position| found.push((hash, position)))?;
        found.sort_unstable();
        Ok(())
    }

    fn look(&mut self, connection: &Connection, hashes: &[u64], mut found: impl FnMut(u64, u64)) -> Result<(), Error> {
        self.begin_if_unknown(connection)?;
        for run in &mut self.runs {
            let mut statement = None;
            for &hash in hashes {
                let short = short(hash);
                if run.here.contains(&short) && run.may_have(connection, short)? {
                    run.find(connection, &mut statement, short, |position| found(hash, position))?;
                }
            }
        }
        Ok(())
    }

    /// Adds a run of (hash, position), in any order. To be followed by [`Ids::merge_step`] for [`MERGE_SHARE`] times as
    /// many entries, here or in a transaction of its own.
    pub(super) fn add(&mut self, connection: &Connection, entries: &mut Vec<(u64, u64)>) -> Result<(), Error> {
        let positions = || entries.iter().map(|e| e.1);
        let (Some(base), Some(last)) = (positions().min(), positions().max()) else { return Ok(()) };
        self.begin_if_unknown(connection)?;
        self.stored.clear();
        for (hash, _) in entries.iter_mut() {
            *hash = short(*hash);
        }
        entries.sort_unstable();
        let mut run = Run::new(connection, self.end_of(0), 0, entries.len() as u64, base..last)?;
        run.write(connection, END, entries)?;
        entries.clear();
        self.runs.push(run);
        self.store(connection)
    }

    /// Merges some `budget` entries if there is something to merge; true if more remains.
    ///
    /// Some 0.1 to 0.2 µs an entry: 65,536 hold the write lock for some 20 ms.
    pub(super) fn merge_step(&mut self, connection: &Connection, budget: usize) -> Result<bool, Error> {
        self.begin_if_unknown(connection)?;
        let mut budget = budget as u64;
        if self.due().is_none() {
            return Ok(false);
        }
        self.stored.clear();
        while let Some(level) = self.due().filter(|_| budget > 0) {
            let merged = self.merge(connection, level, budget)?;
            budget = budget.saturating_sub(merged.max(1));
        }
        self.store(connection)?;
        Ok(self.due().is_some())
    }

    /// What the index takes in the file, estimated.
    pub(super) fn bytes(&self) -> u64 {
        // A row has 11 bytes of SQLite's; half a row at the end of each of SQLite's pages is empty.
        let bytes = |r: &Run| r.entries * u64::from(r.width()) / 8 + r.pages() * (11 + CHECK_BYTES as u64);
        self.runs.iter().filter(|r| r.here.start == 0).map(bytes).sum::<u64>() * 21 / 20
    }

    /// Empties the index, whatever state it is in.
    pub(super) fn clear(&mut self, connection: &Connection) -> Result<(), Error> {
        self.stored.clear();
        self.runs.clear();
        for level in 0..LEVELS {
            connection.execute(&format!("DELETE FROM id_level_{level}"), [])?;
        }
        connection.execute_batch("DELETE FROM id_runs; INSERT INTO id_runs VALUES (x'')")?;
        self.store(connection)
    }

    /// The lowest level that has something to merge: small merges must not wait for large ones.
    fn due(&self) -> Option<usize> {
        (0..LEVELS - 1).find(|&level| {
            let grows = self.runs.iter().any(|r| r.level == level + 1 && r.grows());
            grows || self.runs.iter().filter(|r| r.level == level && r.waits()).count() >= FANOUT
        })
    }

    /// Moves some `budget` entries from the runs of a level to one of the next level, and says how many they were.
    fn merge(&mut self, connection: &Connection, level: usize, budget: u64) -> Result<u64, Error> {
        let end = self.end_of(level + 1);
        let begun = self.runs.iter().any(|r| r.level == level + 1 && r.grows());
        let feeds = |r: &Run| r.level == level && if begun { r.here.start > 0 } else { r.waits() };
        let (mut feeding, mut others): (Vec<Run>, Vec<Run>) = self.runs.drain(..).partition(|r| feeds(r));
        let mut target = match others.iter().position(|r| r.level == level + 1 && r.grows()) {
            Some(place) => others.remove(place),
            None => {
                let base = feeding.iter().map(|r| r.base).min().unwrap_or(0);
                let last = feeding.iter().map(|r| r.last).max().unwrap_or(0);
                let entries = feeding.iter().map(|r| r.entries).sum();
                Run::new(connection, end, level + 1, entries, base..last)?
            }
        };
        let from = target.here.end;
        let pages = (u128::from(budget) * u128::from(target.pages()) / u128::from(target.entries)).max(1);
        let until = (u128::from(from) + (pages << target.shift)).min(u128::from(END)) as u64;
        let mut entries = Vec::new();
        for run in &mut feeding {
            run.read(connection, from >> run.shift..((until - 1) >> run.shift) + 1, |hash, position| {
                if (from..until).contains(&hash) {
                    entries.push((hash, position));
                }
            })?;
            let gone = run.first + (from >> run.shift)..run.first + (until >> run.shift);
            connection
                .prepare_cached(&format!("DELETE FROM id_level_{level} WHERE number >= ? AND number < ?"))?
                .execute([gone.start as i64, gone.end as i64])?;
            run.here.start = until;
        }
        // A stable sort finds that these are a few sorted stretches.
        entries.sort();
        target.write(connection, until, &entries)?;
        feeding.retain(|r| r.here.start < END);
        self.runs = others;
        self.runs.extend(feeding);
        self.runs.push(target);
        Ok(entries.len() as u64)
    }

    /// Where the numbers of the pages of a level end.
    fn end_of(&self, level: usize) -> u64 {
        self.runs.iter().filter(|r| r.level == level).map(Run::end).max().unwrap_or(0)
    }

    fn store(&mut self, connection: &Connection) -> Result<(), Error> {
        self.share_memory();
        let fields: Vec<u8> = self.runs.iter().flat_map(Run::encode).collect();
        let stored = [&crc32fast::hash(&fields).to_le_bytes(), &fields[..]].concat();
        connection.prepare_cached("UPDATE id_runs SET runs = ?")?.execute([&stored])?;
        self.stored = stored;
        Ok(())
    }

    /// Gives filters to the smallest runs first: each lookup asks all runs, and small ones save it most for their size.
    fn share_memory(&mut self) {
        let mut left = FILTER_BYTES / FILTER_SIZE;
        let mut runs: Vec<&mut Run> = self.runs.iter_mut().collect();
        runs.sort_by_key(|r| r.entries);
        for run in runs {
            let bits = run.filter_bits();
            let here = (run.here.start >> bits) as usize..run.here.end.div_ceil(1 << bits) as usize;
            run.filtered = here.start..here.end.min(here.start + left);
            left -= run.filtered.len();
            run.forget_filters();
        }
    }
}

fn short(hash: u64) -> u64 {
    hash >> (u64::BITS - BITS)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use proptest::prelude::*;
    use rusqlite::params;

    use super::run::Filter;
    use super::*;

    fn connect(path: &Path) -> Connection {
        let connection = Connection::open(path).expect("opens");
        connection.pragma_update(None, "journal_mode", "wal").expect("a file can have it");
        connection.pragma_update(None, "synchronous", "off").expect("always");
        connection
    }

    fn new(path: &Path) -> Connection {
        let connection = connect(path);
        connection.execute_batch(SCHEMA).expect("an empty database");
        connection
    }

    fn entries(from: u64, count: u64) -> Vec<(u64, u64)> {
        let hasher = Hasher::new(&[7; 16]);
        (from..from + count).map(|p| (hasher.hash(3, format!("id-{p}").as_bytes()), p)).collect()
    }

    /// Adds parts and merges as the log does.
    fn filled(connection: &Connection, parts: u64, count: u64) -> Ids {
        let mut ids = Ids::default();
        ids.begin(connection).expect("begins");
        for part in 0..parts {
            ids.add(connection, &mut entries(part * count, count)).expect("adds");
            ids.merge_step(connection, count as usize * MERGE_SHARE).expect("merges");
            assert!(ids.runs.len() <= LEVELS * 2 * FANOUT);
        }
        ids
    }

    /// Which of the entries are not found. Each is asked for more than once: the first time there is no filter.
    fn lost(ids: &mut Ids, connection: &Connection, entries: &[(u64, u64)]) -> Result<usize, Error> {
        let mut sorted: Vec<_> = entries.iter().map(|e| e.0).collect();
        sorted.sort_unstable();
        let mut many = Vec::new();
        ids.find_many(connection, &sorted, &mut many)?;
        let mut lost = 0;
        for entry in entries {
            for _ in 0..2 {
                let mut found = Vec::new();
                ids.find(connection, entry.0, &mut found)?;
                lost += usize::from(!found.contains(&entry.1));
            }
            lost += usize::from(many.binary_search(entry).is_err());
        }
        Ok(lost)
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add { count: u64, gap: u64 },
        Merge(usize),
        Find,
        Reopen,
        Rollback(Vec<Step>),
        Other,
        Clear,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let leaf = prop_oneof![
            8 => (prop_oneof![1..4_u64, 1..300_u64], prop_oneof![Just(0_u64), 0..1_u64 << 40])
                .prop_map(|(count, gap)| Step::Add { count, gap }),
            6 => (1..800_usize).prop_map(Step::Merge),
            1 => Just(Step::Find),
            1 => Just(Step::Reopen),
            3 => Just(Step::Other),
        ];
        let rollback = prop::collection::vec(leaf.clone(), 1..12).prop_map(Step::Rollback);
        prop::collection::vec(prop_oneof![20 => leaf, 2 => rollback, 1 => Just(Step::Clear)], 1..120)
    }

    /// Two connections, each with its own view, take turns; a rollback undoes what the model did as well.
    struct World<'a> {
        path: &'a Path,
        sides: [(Connection, Ids); 2],
        turn: usize,
        model: BTreeMap<u64, u64>,
        next: u64,
    }

    impl World<'_> {
        fn take(&mut self, step: &Step, inside: bool) {
            if let (Step::Other, false) = (step, inside) {
                self.turn = 1 - self.turn;
                return;
            }
            if let (Step::Reopen, false) = (step, inside) {
                self.sides[self.turn] = (connect(self.path), Ids::default());
                return;
            }
            let (connection, ids) = &mut self.sides[self.turn];
            if !inside {
                connection.execute_batch("BEGIN IMMEDIATE").expect("begins");
                ids.begin(connection).expect("begins");
            }
            match step {
                Step::Add { count, gap } => {
                    let first = self.next + gap;
                    let mut new: Vec<(u64, u64)> = entries(first, *count);
                    // Neighbours in the hash space, and hashes that differ only in bits that are not kept.
                    new[0].0 = new.last().map_or(0, |e| e.0 ^ 1);
                    self.next = first + count;
                    self.model.extend(new.iter().map(|e| (e.1, e.0)));
                    ids.add(connection, &mut new).expect("adds");
                }
                Step::Merge(budget) => {
                    ids.merge_step(connection, *budget).expect("merges");
                }
                Step::Clear => {
                    ids.clear(connection).expect("clears");
                    self.model.clear();
                }
                Step::Rollback(steps) => {
                    let before = (self.model.clone(), self.next);
                    steps.iter().for_each(|step| self.take(step, true));
                    (self.model, self.next) = before;
                    self.sides[self.turn].0.execute_batch("ROLLBACK").expect("rolls back");
                    return;
                }
                Step::Find | Step::Reopen | Step::Other => self.check(),
            }
            if !inside {
                self.sides[self.turn].0.execute_batch("COMMIT").expect("commits");
            }
        }

        fn check(&mut self) {
            let (connection, ids) = &mut self.sides[self.turn];
            let all: Vec<_> = self.model.iter().map(|(&position, &hash)| (hash, position)).collect();
            assert_eq!(lost(ids, connection, &all).expect("no damage"), 0);
            // Nothing is twice, and nothing was made up.
            let mut sorted: Vec<_> = all.iter().map(|e| e.0).collect();
            sorted.sort_unstable();
            sorted.dedup();
            let mut found = Vec::new();
            ids.find_many(connection, &sorted, &mut found).expect("no damage");
            let mut of: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
            all.iter().for_each(|&(hash, position)| of.entry(short(hash)).or_default().push(position));
            let with = |hash: u64| of[&short(hash)].iter().map(move |&position| (hash, position));
            let mut expected: Vec<_> = sorted.iter().flat_map(|&hash| with(hash)).collect();
            expected.sort_unstable();
            assert_eq!(found, expected);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn answers_like_a_map(steps in steps()) {
            let directory = tempfile::tempdir().expect("a directory");
            let path = directory.path().join("log.sqlite");
            let sides = [new(&path), connect(&path)].map(|c| (c, Ids::default()));
            let mut world = World { path: &path, sides, turn: 0, model: BTreeMap::new(), next: 0 };
            for step in &steps {
                world.take(step, false);
            }
            world.take(&Step::Find, false);
            world.turn = 1 - world.turn;
            world.take(&Step::Find, false);
        }
    }

    #[test]
    fn many_parts_in_every_state_of_merging() {
        let directory = tempfile::tempdir().expect("a directory");
        let connection = new(&directory.path().join("log.sqlite"));
        let mut ids = filled(&connection, 700, 20);
        assert_eq!(lost(&mut ids, &connection, &entries(0, 14_000)).expect("no damage"), 0);
        let absent: Vec<_> = entries(1 << 40, 5_000);
        assert_eq!(lost(&mut ids, &connection, &absent).expect("no damage"), 15_000);
        while ids.merge_step(&connection, 2_000).expect("merges") {
            ids.begin(&connection).expect("begins");
            assert_eq!(lost(&mut ids, &connection, &entries(0, 1_000)).expect("no damage"), 0);
        }
        assert!(ids.runs.iter().all(Run::waits));
        assert_eq!(ids.runs.iter().map(|r| r.entries).sum::<u64>(), 14_000);
    }

    #[test]
    fn lookups_without_memory_for_filters_find_all() {
        let directory = tempfile::tempdir().expect("a directory");
        let connection = new(&directory.path().join("log.sqlite"));
        let mut ids = filled(&connection, 20, 1_024);
        ids.runs.iter_mut().for_each(|r| r.filtered = 0..1);
        assert_eq!(lost(&mut ids, &connection, &entries(0, 20_480)).expect("no damage"), 0);
        let made = |r: &Run| r.filters.iter().filter(|f| matches!(f, Filter::Made(_))).count();
        assert!(ids.runs.iter().all(|r| made(r) <= 1));
    }

    #[test]
    fn every_flipped_bit_is_an_error_or_changes_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let connection = new(&directory.path().join("log.sqlite"));
        let (parts, count) = (11, 16);
        let mut ids = filled(&connection, parts, count);
        // A merge in the middle.
        ids.add(&connection, &mut entries(parts * count, count)).expect("adds");
        while ids.runs.iter().filter(|r| r.level == 0).count() < FANOUT {
            let from = ids.runs.iter().map(|r| r.last + 1).max().unwrap_or(0);
            ids.add(&connection, &mut entries(from, count)).expect("adds");
        }
        ids.merge_step(&connection, 30).expect("merges");
        assert!(ids.runs.iter().any(Run::grows));
        let all = entries(0, ids.runs.iter().map(|r| r.last + 1).max().unwrap_or(0));
        let look = || {
            let mut ids = Ids::default();
            ids.begin(&connection)?;
            lost(&mut ids, &connection, &all)
        };
        assert_eq!(look().expect("no damage"), 0);
        for (table, column) in [("id_runs", "runs"), ("id_level_0", "page"), ("id_level_1", "page")] {
            let rows: Vec<(i64, Vec<u8>)> = connection
                .prepare(&format!("SELECT rowid, {column} FROM {table}"))
                .and_then(|mut s| s.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?.collect())
                .expect("reads");
            assert!(!rows.is_empty());
            let set = format!("UPDATE {table} SET {column} = ?2 WHERE rowid = ?1");
            for (rowid, good) in &rows {
                for bit in (0..good.len() * 8).step_by(if good.len() > 80 { 7 } else { 1 }) {
                    let mut bad = good.clone();
                    bad[bit / 8] ^= 1 << (bit % 8);
                    connection.execute(&set, params![rowid, bad]).expect("writes");
                    assert!(matches!(look(), Err(Error::Damage { .. })), "{table} {rowid} bit {bit}");
                }
                connection.execute(&set, params![rowid, &good[..good.len() - 1]]).expect("writes");
                assert!(matches!(look(), Err(Error::Damage { .. })));
                connection.execute(&set, params![rowid, good]).expect("writes");
            }
            let (rowid, good) = &rows[0];
            connection.execute(&format!("DELETE FROM {table} WHERE rowid = ?"), [rowid]).expect("deletes");
            assert!(matches!(look(), Err(Error::Damage { .. })));
            connection
                .execute(&format!("INSERT INTO {table} (rowid, {column}) VALUES (?, ?)"), params![rowid, good])
                .expect("writes");
        }
        assert_eq!(look().expect("no damage"), 0);
        // A damaged page stops the merge as well, and clearing does not need the index to be sound.
        connection.execute("UPDATE id_level_0 SET page = x'00'", []).expect("writes");
        ids.begin(&connection).expect("begins");
        assert!(matches!(ids.merge_step(&connection, 100_000), Err(Error::Damage { .. })));
        // Nobody has begun anew, and still nothing is said not to be there.
        assert!(matches!(lost(&mut ids, &connection, &all), Err(Error::Damage { .. })));
        connection.execute("DELETE FROM id_runs", []).expect("deletes");
        ids.clear(&connection).expect("clears");
        ids.add(&connection, &mut entries(0, 100)).expect("adds");
        assert_eq!(lost(&mut ids, &connection, &entries(0, 100)).expect("no damage"), 0);
    }

    #[test]
    fn hashes_stay_as_they_are() {
        let key: [u8; 16] = std::array::from_fn(|i| i as u8);
        // The reference vector of SipHash-2-4 for the bytes 0 to 14.
        let rest: Vec<u8> = (4..15).collect();
        assert_eq!(Hasher::new(&key).hash(0x0302_0100, &rest), 0xa129_ca61_49be_45e5);
    }
}
