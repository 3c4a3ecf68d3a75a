//! Reading: stretches of a source as columns, read ahead, and once for all projections that are near each other.
//!
//! A chunk begins after any position and ends at a multiple of [`limits::CHUNK_EVENTS`], so that readers that began at
//! different positions meet after their first chunk. While one is worked on, the next ones are read by two threads.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, params};

use super::Error;
use super::sqlite::{connect, time};
use crate::config::limits;
use crate::model::{BatchColumn, ColumnSet, Columns, Event, NewEvent, Position, RawEvent, Time};

/// Consecutive events of one source; never empty.
pub struct Chunk {
    events: Columns,
    types: Vec<Arc<str>>,
    /// Whether it was ended by a limit, not by the head of the log.
    is_full: bool,
}

impl Chunk {
    /// The events; their types are indexes into [`Chunk::types`], their sources mean nothing.
    pub fn events(&self) -> &Columns {
        &self.events
    }

    /// The names of the event types.
    pub fn types(&self) -> &[Arc<str>] {
        &self.types
    }

    /// The last event.
    pub fn last(&self) -> (Position, Time) {
        let last = self.events.len() - 1;
        (self.events.position(last), self.events.time(last))
    }

    /// What it takes in memory, about.
    fn bytes(&self) -> usize {
        self.events.bytes() + 1024
    }
}

/// A source by its number, and the position after which a chunk begins, as SQLite has it: -1 for the beginning.
type Key = (i64, i64);

enum Slot {
    Loading,
    Ready(Arc<Chunk>),
}

#[derive(Default)]
struct State {
    slots: HashMap<Key, Slot>,
    /// Those that are ready, oldest first.
    order: VecDeque<Key>,
    bytes: usize,
    /// To be read ahead.
    ahead: VecDeque<(Key, ColumnSet)>,
    stopped: bool,
}

/// The chunks of one log that are in memory, and the connections that read them.
pub(super) struct Chunks {
    path: PathBuf,
    state: Mutex<State>,
    /// A chunk is loaded, or cannot be.
    loaded: Condvar,
    /// There is something to be read ahead.
    wanted: Condvar,
    readers: Mutex<Vec<Reader>>,
    sources: Mutex<HashMap<String, i64>>,
    threads: OnceLock<()>,
}

impl Chunks {
    pub(super) fn new(path: PathBuf) -> Arc<Chunks> {
        Arc::new(Chunks {
            path,
            state: Mutex::default(),
            loaded: Condvar::new(),
            wanted: Condvar::new(),
            readers: Mutex::default(),
            sources: Mutex::default(),
            threads: OnceLock::new(),
        })
    }

    /// Ends the threads that read ahead.
    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.wanted.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panics while it is held")
    }

    /// See [`super::EventLog::chunk`].
    pub(super) fn get(
        self: &Arc<Self>,
        source: &str,
        after: Option<Position>,
        columns: ColumnSet,
    ) -> Result<Option<Arc<Chunk>>, Error> {
        let Some(source) = self.source_number(source)? else { return Ok(None) };
        let key = (source, after.map_or(-1, |p| p.0 as i64));
        let chunk = self.load(key, columns)?;
        if chunk.as_ref().is_some_and(|chunk| chunk.is_full) {
            self.read_ahead(key, columns);
        }
        Ok(chunk)
    }

    /// From memory, or from the file; one of those who want the same at the same time reads it for all.
    fn load(&self, key: Key, mut columns: ColumnSet) -> Result<Option<Arc<Chunk>>, Error> {
        let mut state = self.state();
        loop {
            match state.slots.get(&key) {
                Some(Slot::Ready(chunk)) if chunk.events.set().covers(columns) => return Ok(Some(chunk.clone())),
                Some(Slot::Loading) => state = self.loaded.wait(state).expect("no panics while it is held"),
                Some(Slot::Ready(chunk)) => {
                    columns = columns.union(chunk.events.set());
                    break;
                }
                None => break,
            }
        }
        state.remove(key);
        state.slots.insert(key, Slot::Loading);
        drop(state);
        // Whatever happens, those who wait must not wait for ever.
        let mut loading = Loading { chunks: self, key, chunk: None };
        let chunk = self.with_reader(|reader| reader.chunk(key, columns))?.map(Arc::new);
        loading.chunk.clone_from(&chunk);
        Ok(chunk)
    }

    /// Has the next chunks read that are not there yet. Positions are dense, so it is known where they begin.
    fn read_ahead(self: &Arc<Self>, (source, after): Key, columns: ColumnSet) {
        self.threads.get_or_init(|| {
            for _ in 0..limits::READ_AHEAD_THREADS {
                let chunks = self.clone();
                let threads = std::thread::Builder::new().name("read-ahead".into());
                threads.spawn(move || chunks.work_ahead()).expect("a thread can be started");
            }
        });
        let mut state = self.state();
        let mut next = after;
        for _ in 0..limits::READ_AHEAD_CHUNKS {
            next = chunk_end(next);
            let key = (source, next);
            if !state.slots.contains_key(&key) && state.ahead.iter().all(|(k, _)| *k != key) {
                state.ahead.push_back((key, columns));
                self.wanted.notify_one();
            }
        }
    }

    fn work_ahead(&self) {
        let mut state = self.state();
        while !state.stopped {
            match state.ahead.pop_front() {
                // Somebody was faster.
                Some((key, _)) if state.slots.contains_key(&key) => {}
                Some((key, columns)) => {
                    drop(state);
                    // Whoever needs the chunk meets the error too and reports it.
                    let _ = self.load(key, columns);
                    state = self.state();
                }
                None => state = self.wanted.wait(state).expect("no panics while it is held"),
            }
        }
    }

    /// Borrows a connection that nobody uses, or opens one. After an error it is closed.
    pub(super) fn with_reader<T>(&self, read: impl FnOnce(&mut Reader) -> rusqlite::Result<T>) -> Result<T, Error> {
        let failed = |error| Error::Sqlite { path: self.path.clone(), error };
        let idle = self.readers.lock().expect("no panics while it is held").pop();
        let mut reader = match idle {
            Some(reader) => reader,
            None => Reader { connection: connect(&self.path).map_err(failed)?, types: HashMap::new() },
        };
        let answer = read(&mut reader).map_err(failed)?;
        let mut readers = self.readers.lock().expect("no panics while it is held");
        if readers.len() < limits::LOG_READERS {
            readers.push(reader);
        }
        Ok(answer)
    }

    /// None if the source has no events yet.
    fn source_number(&self, name: &str) -> Result<Option<i64>, Error> {
        let known = self.sources.lock().expect("no panics while it is held").get(name).copied();
        if known.is_some() {
            return Ok(known);
        }
        let found = self.with_reader(|reader| reader.source_number(name))?;
        if let Some(number) = found {
            self.sources.lock().expect("no panics while it is held").insert(name.to_owned(), number);
        }
        Ok(found)
    }
}

impl State {
    fn remove(&mut self, key: Key) {
        if let Some(Slot::Ready(chunk)) = self.slots.remove(&key) {
            self.bytes -= chunk.bytes();
            self.order.retain(|k| *k != key);
        }
    }

    fn insert(&mut self, key: Key, chunk: Arc<Chunk>) {
        self.bytes += chunk.bytes();
        self.slots.insert(key, Slot::Ready(chunk));
        self.order.push_back(key);
        while self.bytes > limits::LOG_CACHE_BYTES && self.order.len() > 1 {
            let oldest = self.order[0];
            self.remove(oldest);
        }
    }
}

/// A slot that is being loaded; dropping it ends that, whether there is a chunk or not.
struct Loading<'a> {
    chunks: &'a Chunks,
    key: Key,
    chunk: Option<Arc<Chunk>>,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let mut state = self.chunks.state();
        state.slots.remove(&self.key);
        if let Some(chunk) = self.chunk.take() {
            state.insert(self.key, chunk);
        }
        self.chunks.loaded.notify_all();
    }
}

/// The last position of the chunk that begins after `after`, unless it has too many bytes.
fn chunk_end(after: i64) -> i64 {
    let events = limits::CHUNK_EVENTS as i64;
    (after + 1) / events * events + events - 1
}

/// A connection that reads the log.
pub(super) struct Reader {
    connection: Connection,
    types: HashMap<i64, Arc<str>>,
}

impl Reader {
    fn chunk(&mut self, (source, after): Key, set: ColumnSet) -> rusqlite::Result<Option<Chunk>> {
        let column = |column, name| if set.contains(column) { name } else { "NULL" };
        let sql = format!(
            "SELECT position, time, type, {}, {}, {}, {}, {} FROM source_{source}
             WHERE position > ?1 AND position <= ?2 ORDER BY position",
            column(BatchColumn::Versions, "version"),
            column(BatchColumn::Streams, "stream"),
            column(BatchColumn::Ids, "id"),
            column(BatchColumn::Metadata, "metadata"),
            column(BatchColumn::Payloads, "payload"),
        );
        let end = chunk_end(after);
        let mut chunk = Chunk { events: Columns::new(set), types: Vec::new(), is_full: false };
        // The numbers of the chunk's types; there are few.
        let mut numbers: Vec<i64> = Vec::new();
        let mut statement = self.connection.prepare_cached(&sql)?;
        let mut rows = statement.query([after, end])?;
        while let Some(row) = rows.next()? {
            let integer = |i| row.get_ref(i).map(|value| value.as_i64().unwrap_or(0));
            let (position, number) = (integer(0)?, integer(2)?);
            let event_type = match numbers.iter().position(|n| *n == number) {
                Some(index) => index,
                None => {
                    chunk.types.push(type_name(&self.connection, &mut self.types, number)?);
                    numbers.push(number);
                    numbers.len() - 1
                }
            };
            let event = RawEvent {
                position: Position(position as u64),
                time: time(integer(1)?),
                version: integer(3)? as u64,
                stream: bytes(row.get_ref(4)?),
                id: bytes(row.get_ref(5)?),
                metadata: bytes(row.get_ref(6)?),
                payload: bytes(row.get_ref(7)?),
            };
            chunk.events.push(0, event_type as u16, event);
            chunk.is_full = position == end || chunk.events.bytes() >= limits::CHUNK_BYTES;
            if chunk.is_full {
                break;
            }
        }
        Ok(if chunk.events.is_empty() { None } else { Some(chunk) })
    }

    /// See [`super::EventLog::events`].
    pub(super) fn events(
        &mut self,
        source: &str,
        after: Option<Position>,
        limit: usize,
        mut each: impl FnMut(Event),
    ) -> rusqlite::Result<usize> {
        let Some(number) = self.source_number(source)? else { return Ok(0) };
        let sql = format!(
            "SELECT position, time, version, type, stream, id, metadata, payload FROM source_{number}
             WHERE position > ? ORDER BY position LIMIT ?"
        );
        let mut statement = self.connection.prepare_cached(&sql)?;
        let mut rows = statement.query(params![after.map_or(-1, |p| p.0 as i64), limit as i64])?;
        let mut count = 0;
        while let Some(row) = rows.next()? {
            let event = NewEvent {
                source: source.to_owned(),
                id: row.get(5)?,
                stream: row.get(4)?,
                version: row.get::<_, i64>(2)? as u64,
                event_type: type_name(&self.connection, &mut self.types, row.get(3)?)?.to_string(),
                time: time(row.get(1)?),
                metadata: row.get(6)?,
                payload: row.get(7)?,
            };
            each(Event { position: Position(row.get::<_, i64>(0)? as u64), event });
            count += 1;
        }
        Ok(count)
    }

    fn source_number(&self, name: &str) -> rusqlite::Result<Option<i64>> {
        let sql = "SELECT number FROM sources WHERE name = ? AND head IS NOT NULL";
        self.connection.prepare_cached(sql)?.query_row([name], |r| r.get(0)).optional()
    }
}

fn type_name(connection: &Connection, known: &mut HashMap<i64, Arc<str>>, number: i64) -> rusqlite::Result<Arc<str>> {
    if let Some(name) = known.get(&number) {
        return Ok(name.clone());
    }
    let name: String =
        connection.prepare_cached("SELECT name FROM types WHERE number = ?")?.query_row([number], |r| r.get(0))?;
    let name: Arc<str> = name.into();
    known.insert(number, name.clone());
    Ok(name)
}

fn bytes(value: ValueRef<'_>) -> &[u8] {
    match value {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes,
        // A column that was not asked for; the tables are strict and their columns not null.
        ValueRef::Null | ValueRef::Integer(_) | ValueRef::Real(_) => &[],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::EventLog;
    use super::*;

    fn event(n: u64) -> NewEvent {
        NewEvent {
            source: "s".into(),
            id: format!("id{n}"),
            stream: format!("stream{}", n % 7),
            version: n,
            event_type: format!("Type{}", n * n % 5),
            time: Time::from_microseconds(n as i64).expect("a time"),
            metadata: if n.is_multiple_of(3) { String::new() } else { format!("{{\"n\":{n}}}") },
            payload: vec![b'1'; (n % 50) as usize],
        }
    }

    /// What chunks say, event by event; of the columns that were not asked for, nothing.
    fn by_chunks(log: &EventLog, after: Option<Position>, set: ColumnSet) -> Vec<Event> {
        let mut events = Vec::new();
        let mut after = after;
        while let Some(chunk) = log.chunk("s", after, set).unwrap() {
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            for i in 0..chunk.events().len() {
                let raw = chunk.events().get(i);
                let has = |column| set.contains(column);
                let event = NewEvent {
                    source: "s".into(),
                    id: if has(BatchColumn::Ids) { text(raw.id) } else { String::new() },
                    stream: if has(BatchColumn::Streams) { text(raw.stream) } else { String::new() },
                    version: if has(BatchColumn::Versions) { raw.version } else { 0 },
                    event_type: chunk.types()[usize::from(chunk.events().event_type(i))].to_string(),
                    time: raw.time,
                    metadata: if has(BatchColumn::Metadata) { text(raw.metadata) } else { String::new() },
                    payload: if has(BatchColumn::Payloads) { raw.payload.to_vec() } else { Vec::new() },
                };
                events.push(Event { position: raw.position, event });
            }
            after = Some(chunk.last().0);
        }
        events
    }

    /// The same from the plain query.
    fn by_rows(log: &EventLog, after: Option<Position>, set: ColumnSet) -> Vec<Event> {
        let mut events = Vec::new();
        log.events("s", after, usize::MAX >> 1, |e| events.push(e)).unwrap();
        for Event { event, .. } in &mut events {
            let clear = |column, text: &mut String| {
                if !set.contains(column) {
                    text.clear();
                }
            };
            clear(BatchColumn::Ids, &mut event.id);
            clear(BatchColumn::Streams, &mut event.stream);
            clear(BatchColumn::Metadata, &mut event.metadata);
            if !set.contains(BatchColumn::Versions) {
                event.version = 0;
            }
            if !set.contains(BatchColumn::Payloads) {
                event.payload.clear();
            }
        }
        events
    }

    fn sets() -> impl Strategy<Value = ColumnSet> {
        use BatchColumn::{Ids, Metadata, Payloads, Streams, Versions};
        proptest::collection::vec(proptest::sample::select(vec![Versions, Streams, Ids, Payloads, Metadata]), 0..5)
            .prop_map(ColumnSet::from_iter)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

        /// Readers that begin anywhere, want different columns and come at once, while the log grows.
        #[test]
        fn chunks_have_what_the_log_has(
            looks in proptest::collection::vec((proptest::option::of(0_u64..9_500), sets()), 1..5),
            sizes in proptest::collection::vec(1_u64..6_000, 1..3),
        ) {
            let directory = tempfile::tempdir().unwrap();
            let log = EventLog::open(directory.path()).unwrap();
            let mut n = 0;
            for size in sizes {
                let events: Vec<_> = (n..n + size).map(event).collect();
                log.append(&events).unwrap();
                n += size;
                std::thread::scope(|scope| {
                    for (after, set) in &looks {
                        let log = &log;
                        let after = after.map(Position);
                        scope.spawn(move || assert_eq!(by_chunks(log, after, *set), by_rows(log, after, *set)));
                    }
                });
            }
        }
    }

    #[test]
    fn what_is_kept_in_memory_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let log = EventLog::open(directory.path()).unwrap();
        let large = |n: u64| NewEvent { payload: vec![b'1'; 1_000_000], ..event(n) };
        for n in 0..6 {
            log.append(&(10 * n..10 * n + 10).map(large).collect::<Vec<_>>()).unwrap();
        }
        let chunks = Chunks::new(directory.path().join("log.sqlite"));
        let mut after = None;
        let mut events = 0;
        while let Some(chunk) = chunks.get("s", after, ColumnSet::ALL).unwrap() {
            assert!(chunk.bytes() <= limits::CHUNK_BYTES + (2 << 20), "{}", chunk.bytes());
            let state = chunks.state();
            assert!(state.bytes <= limits::LOG_CACHE_BYTES, "{}", state.bytes);
            drop(state);
            events += chunk.events().len();
            after = Some(chunk.last().0);
        }
        assert_eq!(events, 60);
        chunks.stop();
    }
}
