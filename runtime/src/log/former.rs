//! The log of the former format, which had a table for each source and no order among them: all its events once, in
//! one order.
//!
//! Projections decided that order each for itself and recorded it, because rows may depend on it. The record that
//! reaches furthest is followed here, so that rows folded from the converted log are those that readers know. Its
//! events are one stream, whose key is the largest time in it so far. Every source that is not in the record is a
//! stream of its own, and those of the record are too, once that is at its end; their key is the time of their next
//! event. The next event is always that of the stream with the smallest key, then of the first source by name. The
//! same files always give the same order, so a conversion that broke off can begin anew and append what is missing.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::Utf8Error;

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Row, ffi};
use serde::Deserialize;

use super::Error;
use crate::config::limits;
use crate::model::{NewEvent, Time};

/// The format that is read here.
const FORMAT: i64 = 1;

/// Events that are read ahead may take as much memory as this, all sources together. There may be tens of thousands of
/// sources; with less, each of their tables is visited more often, at about 50 us each time.
const AHEAD_BYTES: usize = 128 << 20;

/// What one source may take of it: more would not make reading faster.
const SOURCE_AHEAD_BYTES: usize = 1 << 20;

/// Statements that stay prepared, some kilobytes each. There is one for each source.
const STATEMENTS: usize = 256;

/// Reads a log of the former format. After an error it is of no further use.
pub(super) struct Former {
    path: PathBuf,
    connection: Connection,
    identity: String,
    types: HashMap<i64, String>,
    /// By name, so that a source's index orders as its name does.
    sources: Vec<Source>,
    /// How many sources have events left.
    open: usize,
    /// The order that is followed, until its end.
    record: Option<Record>,
    /// The largest time of the record's events so far.
    latest: Option<Time>,
    /// The key of each stream and the source of its next event.
    heads: BinaryHeap<Reverse<(Option<Time>, usize)>>,
}

/// A table of the log.
struct Source {
    name: String,
    number: i64,
    /// How many events it has; positions are dense from 0.
    len: u64,
    /// The position of the next event.
    next: u64,
    /// The next event and those after it, as far as they are read.
    ahead: VecDeque<Ahead>,
}

/// An event that is read ahead: in as little memory as possible, because the more of them there are, the less often a
/// statement has to be prepared for their table.
struct Ahead {
    time: Time,
    version: i64,
    event_type: i64,
    /// Where stream, id and metadata end in the content; the payload is the rest.
    ends: [u32; 3],
    content: Box<[u8]>,
}

impl Ahead {
    fn read(row: &Row<'_>) -> rusqlite::Result<Ahead> {
        let time: i64 = row.get(1)?;
        let time = Time::from_microseconds(time).ok_or_else(|| damage(format!("{time} is not a time")))?;
        let parts = [4, 5, 6, 7].map(|column| row.get_ref(column).and_then(|value| Ok(value.as_bytes()?)));
        let [stream, id, metadata, payload] = parts;
        let parts = [stream?, id?, metadata?, payload?];
        let mut end = 0;
        let ends = [parts[0], parts[1], parts[2]].map(|part| {
            end += part.len() as u32;
            end
        });
        let content = parts.concat().into();
        Ok(Ahead { time, version: row.get(2)?, event_type: row.get(3)?, ends, content })
    }

    /// What it takes in memory, about.
    fn bytes(&self) -> usize {
        size_of::<Ahead>() + 16 + self.content.len()
    }

    fn event(&self, source: &str, types: &HashMap<i64, String>) -> rusqlite::Result<NewEvent> {
        let [stream, id, metadata] = self.ends.map(|end| end as usize);
        let text = |range: Range<usize>| Ok::<_, Utf8Error>(str::from_utf8(&self.content[range])?.to_owned());
        let event_type = types.get(&self.event_type).cloned();
        Ok(NewEvent {
            source: source.to_owned(),
            id: text(stream..id)?,
            stream: text(0..stream)?,
            version: self.version as u64,
            event_type: event_type.ok_or_else(|| damage(format!("event type {} has no name", self.event_type)))?,
            time: self.time,
            metadata: text(id..metadata)?,
            payload: self.content[metadata..].to_vec(),
        })
    }
}

impl Former {
    /// Opens a log. Each of `orders` is the file of a generation of the former format; the record of the one that
    /// has recorded the most events is followed, the first of several. One that cannot be read or does not fit the log
    /// is passed over with a warning.
    pub(super) fn open(path: &Path, orders: &[PathBuf]) -> Result<Former, Error> {
        let failed = |error| Error::Sqlite { path: path.to_owned(), error };
        let connection = connect(path).map_err(failed)?;
        let found = connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(failed)?;
        if found != FORMAT {
            return Err(Error::Format { path: path.to_owned(), found, expected: FORMAT });
        }
        let (identity, types, sources) = read_tables(&connection).map_err(failed)?;
        let mut former = Former {
            path: path.to_owned(),
            connection,
            open: sources.len(),
            identity,
            types,
            sources,
            record: None,
            latest: None,
            heads: BinaryHeap::new(),
        };
        let mut most = 0;
        for path in orders {
            match Record::open(path, &former.identity, &former.sources) {
                Ok(Some((record, events))) if events > most => (most, former.record) = (events, Some(record)),
                Ok(_) => {}
                Err(error) => tracing::warn!(?path, %error, "the order recorded there is passed over"),
            }
        }
        for i in 0..former.sources.len() {
            if !former.is_recorded(i) {
                former.push(i, None)?;
            }
        }
        former.follow()?;
        Ok(former)
    }

    /// What tells the log from every other.
    pub(super) fn identity(&self) -> &str {
        &self.identity
    }

    /// How many events the log has.
    pub(super) fn len(&self) -> u64 {
        self.sources.iter().map(|source| source.len).sum()
    }

    /// The next events: one at least, and no more once there are `max_events` or `max_bytes` of them. None after the
    /// last one.
    pub(super) fn next_batch(&mut self, max_events: usize, max_bytes: usize) -> Result<Option<Vec<NewEvent>>, Error> {
        let (mut events, mut bytes) = (Vec::new(), 0);
        while events.is_empty() || (events.len() < max_events && bytes < max_bytes) {
            let Some(Reverse((_, i))) = self.heads.pop() else { break };
            let event = self.take(i)?;
            bytes += event.payload.len() + event.metadata.len() + event.stream.len() + event.id.len();
            events.push(event);
            if self.is_recorded(i) {
                self.follow()?;
            } else {
                self.push(i, None)?;
            }
        }
        Ok((!events.is_empty()).then_some(events))
    }

    /// True if a source's next event is up to the record.
    fn is_recorded(&self, i: usize) -> bool {
        self.record.as_ref().is_some_and(|record| record.indexes.contains(&Some(i)))
    }

    /// Goes on to the record's next event; at its end, to what its sources have beyond.
    fn follow(&mut self) -> Result<(), Error> {
        while let Some(record) = &mut self.record {
            let run = record.run().map_err(|error| Error::Sqlite { path: record.path.clone(), error })?;
            match run {
                Some((i, to)) if self.sources[i].next <= to => {
                    self.latest = self.push(i, self.latest)?;
                    return Ok(());
                }
                // Runs that went no further than the one before are recorded too.
                Some(_) => drop(record.runs.pop_front()),
                None => {
                    let sources = std::mem::take(&mut record.indexes);
                    self.record = None;
                    for i in sources.into_iter().flatten() {
                        self.push(i, None)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes a source's next event the head of a stream, if there is one; answers its key, its time or `least`.
    fn push(&mut self, i: usize, least: Option<Time>) -> Result<Option<Time>, Error> {
        let source = &self.sources[i];
        if source.next == source.len {
            return Ok(least);
        }
        let time = match source.ahead.front() {
            Some(event) => event.time,
            None => self.read(i, 0, SOURCE_AHEAD_BYTES.min(AHEAD_BYTES / self.open))?,
        };
        let key = least.max(Some(time));
        self.heads.push(Reverse((key, i)));
        Ok(key)
    }

    fn take(&mut self, i: usize) -> Result<NewEvent, Error> {
        if self.sources[i].ahead.is_empty() {
            // It was too large to be kept.
            self.read(i, 1, 0)?;
        }
        let source = &mut self.sources[i];
        let ahead = source.ahead.pop_front().expect("just read");
        let event = ahead.event(&source.name, &self.types);
        let event = event.map_err(|error| source.failed(&self.path, error))?;
        source.next += 1;
        self.open -= usize::from(source.next == source.len);
        Ok(event)
    }

    /// Reads ahead in a source that has events left but none in memory: `least` events or, if that is more, as many as
    /// `bytes` of memory hold. Answers the time of the next event.
    fn read(&mut self, i: usize, least: usize, bytes: usize) -> Result<Time, Error> {
        let source = &mut self.sources[i];
        read_ahead(&self.connection, source, least, bytes).map_err(|error| source.failed(&self.path, error))
    }
}

impl Source {
    fn failed(&self, path: &Path, error: rusqlite::Error) -> Error {
        let code = match error {
            rusqlite::Error::SqliteFailure(code, _) if code.code != ErrorCode::Unknown => code,
            // The table is not there, or its values are not what was written.
            _ => ffi::Error::new(ffi::SQLITE_CORRUPT),
        };
        let what = format!("source {:?} of the former format: {error}", self.name);
        Error::Sqlite { path: path.to_owned(), error: rusqlite::Error::SqliteFailure(code, Some(what)) }
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(limits::DATABASE_BUSY)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    connection.pragma_update(None, "cache_size", -16_384)?;
    // All reads see one state of the file, and do without a lock each.
    connection.execute_batch("BEGIN")?;
    Ok(connection)
}

/// The identity, the types by number, and the sources that have events by name.
fn read_tables(connection: &Connection) -> rusqlite::Result<(String, HashMap<i64, String>, Vec<Source>)> {
    let identity = connection.query_row("SELECT identity FROM log", [], |row| row.get(0))?;
    let mut types = connection.prepare("SELECT number, name FROM types")?;
    let types = types.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
    let mut sources = connection.prepare("SELECT number, name, head FROM sources WHERE head IS NOT NULL")?;
    let sources = sources.query_map([], |row| {
        let (name, number): (String, i64) = (row.get(1)?, row.get(0)?);
        let len = u64::try_from(row.get::<_, i64>(2)?).map_err(|_| damage(format!("the head of source {name:?}")))? + 1;
        Ok(Source { name, number, len, next: 0, ahead: VecDeque::new() })
    })?;
    let mut sources = sources.collect::<Result<Vec<_>, _>>()?;
    sources.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok((identity, types, sources))
}

fn read_ahead(connection: &Connection, source: &mut Source, least: usize, bytes: usize) -> rusqlite::Result<Time> {
    let sql = format!(
        "SELECT position, time, version, type, stream, id, metadata, payload FROM source_{}
         WHERE position >= ? ORDER BY position",
        source.number
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query([source.next as i64])?;
    let (mut first, mut position, mut room) = (None, source.next, bytes);
    while let Some(row) = rows.next()? {
        if position == source.len {
            return Err(damage(format!("there are events after the last one, {}", position - 1)));
        }
        if row.get::<_, i64>(0)? as u64 != position {
            break;
        }
        let event = Ahead::read(row)?;
        first.get_or_insert(event.time);
        if source.ahead.len() >= least && event.bytes() > room {
            return Ok(first.expect("at least this one"));
        }
        room = room.saturating_sub(event.bytes());
        source.ahead.push_back(event);
        position += 1;
    }
    match first {
        Some(time) if position == source.len => Ok(time),
        _ => Err(damage(format!("event {position} is missing"))),
    }
}

/// What SQLite does not notice by itself.
fn damage(what: String) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_CORRUPT), Some(what))
}

/// The order in which a generation took its sources.
struct Record {
    path: PathBuf,
    connection: Connection,
    /// For the sources of the generation, by name as the record numbers them: which of the log's they are. None if the
    /// log has no events of it.
    indexes: Vec<Option<usize>>,
    /// How many events each of them has.
    lens: Vec<u64>,
    /// The last row that was read.
    number: i64,
    /// What is left of that row: sources as the record numbers them, and the last position of the run.
    runs: VecDeque<(u16, u64)>,
}

/// What a manifest says of sources.
#[derive(Deserialize)]
struct Subscriptions {
    sources: Vec<Subscription>,
}

#[derive(Deserialize)]
struct Subscription {
    source: String,
}

impl Record {
    /// Opens a generation's file and reads all of its record; answers how many events that covers. None if the
    /// generation has one source only, which it follows as it is, without a record.
    fn open(path: &Path, log: &str, sources: &[Source]) -> rusqlite::Result<Option<(Record, u64)>> {
        let connection = connect(path)?;
        let manifest: String =
            connection.query_row("SELECT manifest FROM _shadowbox_generation", [], |row| row.get(0))?;
        let manifest: Result<Subscriptions, _> = serde_json::from_str(&manifest);
        let mut manifest = manifest.map_err(|error| damage(format!("the manifest is not valid: {error}")))?.sources;
        if manifest.len() < 2 {
            return Ok(None);
        }
        let sql = "SELECT log FROM _shadowbox_checkpoint WHERE log <> ? LIMIT 1";
        let other: Option<String> = connection.query_row(sql, [log], |row| row.get(0)).optional()?;
        if let Some(other) = other {
            return Err(damage(format!("it belongs to another log, {other}")));
        }
        manifest.sort_by(|a, b| a.source.cmp(&b.source));
        if manifest.windows(2).any(|pair| pair[0].source == pair[1].source) {
            return Err(damage("the manifest names a source twice".into()));
        }
        let find = |s: &Subscription| sources.binary_search_by(|source| source.name.cmp(&s.source)).ok();
        let indexes: Vec<_> = manifest.iter().map(find).collect();
        let lens = indexes.iter().map(|index| index.map_or(0, |i| sources[i].len)).collect();
        let path = path.to_owned();
        let mut record = Record { path, connection, indexes, lens, number: 0, runs: VecDeque::new() };
        // A record is of use whole or not at all, so it is read before anything is taken in its order.
        let mut covered: HashMap<usize, u64> = HashMap::new();
        while let Some((i, to)) = record.run()? {
            let end = covered.entry(i).or_default();
            *end = (*end).max(to + 1);
            record.runs.pop_front();
        }
        record.number = 0;
        Ok(Some((record, covered.values().sum())))
    }

    /// The run at the front, which stays there: a source of the log and the last position. None at the end.
    fn run(&mut self) -> rusqlite::Result<Option<(usize, u64)>> {
        while self.runs.is_empty() {
            let sql = "SELECT number, runs FROM _shadowbox_order WHERE number > ? ORDER BY number LIMIT 1";
            let mut statement = self.connection.prepare_cached(sql)?;
            let row: Option<(i64, Vec<u8>)> =
                statement.query_row([self.number], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
            let Some((number, runs)) = row else { return Ok(None) };
            if number != self.number + 1 {
                return Err(damage(format!("row {} of the record is missing", self.number + 1)));
            }
            self.number = number;
            let runs: Result<Vec<_>, _> = rmp_serde::from_slice(&runs);
            self.runs = runs.map_err(|error| damage(format!("row {number} of the record: {error}")))?.into();
        }
        let (source, to) = self.runs[0];
        let source = usize::from(source);
        match self.indexes.get(source) {
            Some(&Some(i)) if to < self.lens[source] => Ok(Some((i, to))),
            _ => Err(damage(format!(
                "row {} of the record goes to position {to} of its source {source}, which the log does not have",
                self.number
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use rusqlite::params;

    use super::*;

    const LOG: &str = "
        CREATE TABLE log (identity TEXT NOT NULL, created_at TEXT NOT NULL) STRICT;
        CREATE TABLE sources (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
            head INTEGER, head_time INTEGER, first_time INTEGER) STRICT;
        CREATE TABLE types (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
        INSERT INTO log VALUES ('the log', '');
        INSERT INTO types VALUES (1, 'A'), (2, 'B');
        PRAGMA user_version = 1;
        PRAGMA journal_mode = wal;";

    const GENERATION: &str = "
        CREATE TABLE _shadowbox_generation (fence INTEGER NOT NULL, module TEXT NOT NULL,
            manifest TEXT NOT NULL) STRICT;
        CREATE TABLE _shadowbox_checkpoint (source TEXT PRIMARY KEY, position INTEGER NOT NULL, time INTEGER NOT NULL,
            fingerprint INTEGER NOT NULL, log TEXT NOT NULL) STRICT, WITHOUT ROWID;
        CREATE TABLE _shadowbox_order (number INTEGER PRIMARY KEY, runs BLOB NOT NULL) STRICT;";

    /// By source: the times of its events and the sizes of their data.
    type Events = BTreeMap<String, Vec<(i64, usize)>>;

    fn event(source: &str, position: usize, (time, size): (i64, usize)) -> NewEvent {
        NewEvent {
            source: source.into(),
            id: format!("{source}-{position}"),
            stream: format!("stream{}", position % 3),
            version: position as u64,
            event_type: if position.is_multiple_of(2) { "A" } else { "B" }.into(),
            time: Time::from_microseconds(time).unwrap(),
            metadata: if position.is_multiple_of(3) { String::new() } else { format!("{{\"n\":{position}}}") },
            payload: vec![b'1'; size],
        }
    }

    fn all(events: &Events) -> Vec<NewEvent> {
        let of = |(source, events): (&String, &Vec<_>)| {
            events.iter().enumerate().map(|(position, &e)| event(source, position, e)).collect::<Vec<_>>()
        };
        events.iter().flat_map(of).collect()
    }

    /// A directory with a log. Numbers of sources are not in the order of their names.
    fn log(events: &Events) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.sqlite");
        let mut file = Connection::open(&path).unwrap();
        file.execute_batch(LOG).unwrap();
        let tx = file.transaction().unwrap();
        for (i, (source, events)) in events.iter().rev().enumerate() {
            let number = i + 1;
            let head = events.len().checked_sub(1).map(|head| head as i64);
            tx.execute("INSERT INTO sources VALUES (?, ?, ?, 0, 0)", params![number as i64, source, head]).unwrap();
            tx.execute_batch(&format!(
                "CREATE TABLE source_{number} (position INTEGER PRIMARY KEY, time INTEGER NOT NULL,
                    version INTEGER NOT NULL, type INTEGER NOT NULL, stream TEXT NOT NULL, id TEXT NOT NULL UNIQUE,
                    metadata TEXT NOT NULL, payload BLOB NOT NULL) STRICT"
            ))
            .unwrap();
            let sql = format!("INSERT INTO source_{number} VALUES (?, ?, ?, ?, ?, ?, ?, ?)");
            let mut insert = tx.prepare(&sql).unwrap();
            for (position, &e) in events.iter().enumerate() {
                let event_type = 1 + position as i64 % 2;
                let NewEvent { id, stream, metadata, payload, .. } = event(source, position, e);
                let position = position as i64;
                insert.execute(params![position, e.0, position, event_type, stream, id, metadata, payload]).unwrap();
            }
        }
        tx.commit().unwrap();
        (directory, path)
    }

    /// The file of a generation that has recorded these runs, so many in each row.
    fn generation(
        directory: &Path,
        name: &str,
        sources: &[&str],
        identity: &str,
        runs: &[(u16, u64)],
        row: usize,
    ) -> PathBuf {
        let path = directory.join(name);
        let mut file = Connection::open(&path).unwrap();
        file.execute_batch(GENERATION).unwrap();
        let tx = file.transaction().unwrap();
        // As a plugin may have written it, in any order and with more than is read here.
        let written: Vec<_> = sources.iter().rev().map(|s| serde_json::json!({"source": s, "types": ["*"]})).collect();
        let manifest = serde_json::json!({"contract": "0.1.0", "sources": written, "views": []}).to_string();
        tx.execute("INSERT INTO _shadowbox_generation VALUES (0, '', ?)", [manifest]).unwrap();
        tx.execute("INSERT INTO _shadowbox_checkpoint VALUES (?, 0, 0, 0, ?)", [sources[0], identity]).unwrap();
        for runs in runs.chunks(row) {
            let runs = rmp_serde::to_vec(runs).unwrap();
            tx.execute("INSERT INTO _shadowbox_order (runs) VALUES (?)", [runs]).unwrap();
        }
        tx.commit().unwrap();
        path
    }

    fn read(path: &Path, orders: &[PathBuf], max_events: usize, max_bytes: usize) -> Result<Vec<NewEvent>, Error> {
        let mut former = Former::open(path, orders)?;
        assert_eq!(former.identity(), "the log");
        let (len, mut events) = (former.len(), Vec::new());
        while let Some(batch) = former.next_batch(max_events, max_bytes)? {
            assert!((1..=max_events).contains(&batch.len()));
            events.extend(batch);
        }
        assert_eq!(events.len() as u64, len);
        Ok(events)
    }

    fn ids(events: &[NewEvent]) -> Vec<&str> {
        events.iter().map(|event| event.id.as_str()).collect()
    }

    /// Two sources whose times say a-0 b-0 a-1 b-1 ..., and one between them in the alphabet that comes last.
    fn two_and_one() -> Events {
        let times = |first: i64| (0..4).map(|n| (first + 10 * n, 5)).collect();
        [("a".to_owned(), times(0)), ("ab".to_owned(), times(100)), ("b".to_owned(), times(5))].into()
    }

    const BY_TIME: [&str; 12] =
        ["a-0", "b-0", "a-1", "b-1", "a-2", "b-2", "a-3", "b-3", "ab-0", "ab-1", "ab-2", "ab-3"];

    #[test]
    fn without_a_record_time_decides() {
        let (_directory, path) = log(&two_and_one());
        assert_eq!(ids(&read(&path, &[], 5, 1 << 20).unwrap()), BY_TIME);
    }

    #[test]
    fn of_equal_times_the_first_source_by_name_is_first() {
        let events = [("b".to_owned(), vec![(7, 0); 2]), ("a".to_owned(), vec![(7, 0); 2])].into();
        let (_directory, path) = log(&events);
        assert_eq!(ids(&read(&path, &[], 5, 1 << 20).unwrap()), ["a-0", "a-1", "b-0", "b-1"]);
    }

    #[test]
    fn what_is_recorded_comes_first_and_the_rest_by_time() {
        let (directory, path) = log(&two_and_one());
        // The third run says nothing new, as after a restart.
        let runs = [(1, 2), (0, 1), (0, 1)];
        let order = generation(directory.path(), "1.sqlite", &["a", "b"], "the log", &runs, 2);
        let expected = ["b-0", "b-1", "b-2", "a-0", "a-1", "a-2", "a-3", "b-3", "ab-0", "ab-1", "ab-2", "ab-3"];
        assert_eq!(ids(&read(&path, &[order], 1, 1 << 20).unwrap()), expected);
    }

    #[test]
    fn the_longest_record_is_followed_and_one_source_is_none() {
        let (directory, path) = log(&two_and_one());
        let order = |name, sources: &[&str], runs: &[(u16, u64)]| {
            generation(directory.path(), name, sources, "the log", runs, 9)
        };
        let short = order("1.sqlite", &["a", "b"], &[(1, 2), (0, 0)]);
        let long = order("2.sqlite", &["a", "ab", "b", "unknown"], &[(1, 3), (2, 3)]);
        let single = order("3.sqlite", &["a"], &[]);
        let expected = ["ab-0", "ab-1", "ab-2", "ab-3", "b-0", "b-1", "b-2", "b-3", "a-0", "a-1", "a-2", "a-3"];
        assert_eq!(ids(&read(&path, &[single, short, long], 99, 1).unwrap()), expected);
    }

    #[test]
    fn a_record_that_is_damaged_or_does_not_fit_is_passed_over() {
        let (directory, path) = log(&two_and_one());
        let order = |name: &str, sources: &[&str], identity: &str, runs: &[(u16, u64)]| {
            generation(directory.path(), name, sources, identity, runs, 1)
        };
        let good = [(1, 2), (0, 1), (1, 3), (0, 3)];
        let both = ["a", "b"];
        let change = |name: &str, sql: &str| {
            let path = order(name, &both, "the log", &good);
            Connection::open(&path).unwrap().execute_batch(sql).unwrap();
            path
        };
        let noise = directory.path().join("noise.sqlite");
        std::fs::write(&noise, [b'x'; 5000]).unwrap();
        let torn = order("torn.sqlite", &both, "the log", &good);
        let bytes = std::fs::read(&torn).unwrap();
        std::fs::write(&torn, &bytes[..bytes.len() / 2]).unwrap();
        let bad = [
            directory.path().join("none.sqlite"),
            noise,
            torn,
            order("other.sqlite", &both, "another log", &good),
            order("beyond.sqlite", &both, "the log", &[(1, 2), (0, 4)]),
            order("source.sqlite", &both, "the log", &[(1, 2), (2, 1)]),
            order("unknown.sqlite", &["a", "b", "c"], "the log", &[(1, 2), (2, 0)]),
            change("runs.sqlite", "UPDATE _shadowbox_order SET runs = x'c1' WHERE number = 4"),
            change("gap.sqlite", "DELETE FROM _shadowbox_order WHERE number = 2"),
            order("twice.sqlite", &["a", "b", "b"], "the log", &good),
            change("manifest.sqlite", "UPDATE _shadowbox_generation SET manifest = '{}'"),
            change("table.sqlite", "DROP TABLE _shadowbox_order"),
        ];
        for bad in &bad {
            let events = read(&path, std::slice::from_ref(bad), 5, 1 << 20).unwrap();
            assert_eq!(ids(&events), BY_TIME, "{bad:?}");
        }
        let next_best = order("good.sqlite", &both, "the log", &[(1, 0)]);
        let orders: Vec<_> = bad.into_iter().chain([next_best]).collect();
        let events = read(&path, &orders, 5, 1 << 20).unwrap();
        assert_eq!(ids(&events)[..3], ["b-0", "a-0", "a-1"]);
    }

    #[test]
    fn damage_is_an_error_that_names_file_and_source() {
        for (sql, what) in [
            ("DELETE FROM source_1 WHERE position = 0", "event 0 is missing"),
            ("DELETE FROM source_1 WHERE position = 2", "event 2 is missing"),
            ("DELETE FROM source_1 WHERE position = 3", "event 3 is missing"),
            ("UPDATE sources SET head = 2 WHERE number = 1", "after the last one, 2"),
            ("UPDATE source_1 SET type = 3", "event type 3 has no name"),
            ("UPDATE source_1 SET time = 9223372036854775807", "is not a time"),
            ("UPDATE source_1 SET stream = CAST(x'ff' AS TEXT)", "utf-8"),
            ("DROP TABLE source_1", "no such table: source_1"),
        ] {
            let (_directory, path) = log(&two_and_one());
            Connection::open(&path).unwrap().execute_batch(sql).unwrap();
            let error = read(&path, &[], 5, 1 << 20).unwrap_err();
            let message = error.to_string();
            assert!(message.contains(what) && message.contains("source \"b\""), "{sql}: {message}");
            assert!(message.contains("log.sqlite"), "{message}");
            let Error::Sqlite { error, .. } = error else { panic!("{error}") };
            assert_eq!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt), "{sql}");
        }
    }

    #[test]
    fn another_format_and_no_file_are_errors() {
        let (directory, path) = log(&two_and_one());
        Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 2").unwrap();
        assert!(matches!(Former::open(&path, &[]), Err(Error::Format { found: 2, expected: 1, .. })));
        let none = directory.path().join("none.sqlite");
        assert!(matches!(Former::open(&none, &[]), Err(Error::Sqlite { .. })));
        assert!(!none.exists());
    }

    /// The same order as one would say it, with everything in memory.
    fn model(events: &Events, sources: &[&str], runs: &[(u16, u64)]) -> Vec<String> {
        let mut next: BTreeMap<&str, usize> = events.keys().map(|source| (source.as_str(), 0)).collect();
        let mut runs = VecDeque::from(runs.to_vec());
        let (mut latest, mut order) = (i64::MIN, Vec::new());
        loop {
            while runs.front().is_some_and(|&(source, to)| next[sources[usize::from(source)]] as u64 > to) {
                runs.pop_front();
            }
            let front = runs.front().map(|&(source, _)| sources[usize::from(source)]);
            let heads = next.iter().filter(|(source, next)| **next < events[**source].len());
            let keys = heads.filter_map(|(&source, &next)| {
                let time = events[source][next].0;
                match front {
                    Some(front) if front == source => Some((time.max(latest), source)),
                    Some(_) if sources.contains(&source) => None,
                    _ => Some((time, source)),
                }
            });
            let Some((key, source)) = keys.min() else { return order };
            if front == Some(source) {
                latest = key;
            }
            order.push(format!("{source}-{}", next[source]));
            *next.get_mut(source).unwrap() += 1;
        }
    }

    /// Some are too large to be read ahead, and a few of some are as much as is read ahead.
    fn sizes() -> impl Strategy<Value = usize> {
        prop_oneof![60 => 0..50_usize, 1 => Just(400_000), 1 => Just(1_200_000)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_event_comes_once_in_the_recorded_order(
            events in prop::collection::btree_map("[a-e]{1,2}",
                prop::collection::vec((-20..20_i64, sizes()), 0..12), 1..8),
            recorded in any::<u8>(),
            picks in prop::collection::vec((any::<prop::sample::Index>(), 0..4_usize), 0..20),
            row in 1..5_usize,
            max_events in 1..7_usize,
        ) {
            let (directory, path) = log(&events);
            let chosen: Vec<&str> = events.keys().enumerate().filter(|(i, _)| recorded >> i & 1 == 1)
                .map(|(_, source)| source.as_str()).collect();
            let mut orders = Vec::new();
            // What is recorded, event by event.
            let (mut runs, mut flat) = (Vec::new(), Vec::new());
            if chosen.len() > 1 {
                let mut done = vec![0; chosen.len()];
                for (pick, count) in picks {
                    let i = pick.index(chosen.len());
                    let end = events[chosen[i]].len().min(done[i] + count);
                    flat.extend((done[i]..end).map(|position| format!("{}-{position}", chosen[i])));
                    done[i] = end;
                    if end > 0 {
                        runs.push((i as u16, end as u64 - 1));
                    }
                }
                orders.push(generation(directory.path(), "1.sqlite", &chosen, "the log", &runs, row));
            }
            let read_all = || read(&path, &orders, max_events, 2000).unwrap();
            let found = read_all();
            prop_assert_eq!(ids(&found), model(&events, &chosen, &runs));
            prop_assert!(found == read_all(), "another order");
            let of_recorded = found.iter().filter(|event| chosen.contains(&event.source.as_str()));
            let of_recorded: Vec<_> = of_recorded.map(|event| event.id.as_str()).take(flat.len()).collect();
            prop_assert_eq!(of_recorded, flat);
            let mut sorted = found;
            // Stable: each source's order is kept.
            sorted.sort_by(|a, b| a.source.cmp(&b.source));
            prop_assert!(sorted == all(&events), "not the same events");
        }
    }
}
