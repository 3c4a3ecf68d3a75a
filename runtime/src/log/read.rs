//! Reading the file: stretches of rows, blocks, single events, and what is in a part of the log.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension};
use tokio::sync::watch;

use super::append::Stretch;
use super::block::{self, Decoded, Section};
use super::chunks::Chunk;
use super::directory::{Directory, Entry, header};
use super::file::connect;
use super::names::{Kind, Names};
use super::{Counts, Error, Head};
use crate::config::limits;
use crate::model::{BatchColumn, ColumnSet, Columns, Event, NewEvent, Position, RawEvent, Time};

/// Makes errors of what happens to a log's file.
#[derive(Clone)]
pub(super) struct Failures(pub(super) PathBuf);

impl Failures {
    pub(super) fn sqlite(&self, error: rusqlite::Error) -> Error {
        Error::Sqlite { path: self.0.clone(), error }
    }

    /// A block cannot be read. `last` is its last position, if that is known.
    pub(super) fn damaged(&self, first: u64, last: Option<u64>, what: String) -> Error {
        Error::Damaged { path: self.0.clone(), first: Position(first), last: last.map(Position), what }
    }
}

/// What all readers of a log share.
pub(super) struct Shared {
    pub(super) failures: Failures,
    pub(super) names: Names,
    pub(super) directory: Directory,
    /// How many forgettings have begun and ended, as far as this process knows.
    pub(super) epoch: watch::Sender<u64>,
}

impl Shared {
    pub(super) fn path(&self) -> &Path {
        &self.failures.0
    }
}

/// What there is from a position on that no block has.
pub(super) enum Rows {
    Chunk(Arc<Chunk>),
    /// Nothing yet.
    None,
    /// They are in a block by now.
    Sealed,
}

/// A connection that reads the log.
pub(super) struct Reader {
    connection: Connection,
    shared: Arc<Shared>,
}

/// Columns of `events` in the order in which [`raw`] takes them.
fn columns(set: ColumnSet) -> String {
    let column = |column, name| if set.contains(column) { name } else { "NULL" };
    format!(
        "position, appended, time, source, type, {}, {}, {}, {}, {}, forgotten",
        column(BatchColumn::Versions, "version"),
        column(BatchColumn::Streams, "stream"),
        column(BatchColumn::Ids, "id"),
        column(BatchColumn::Metadata, "metadata"),
        column(BatchColumn::Payloads, "payload"),
    )
}

/// A row of `events`, and when it was appended, its source, and its type.
pub(super) fn raw<'a>(row: &'a rusqlite::Row<'_>) -> rusqlite::Result<(RawEvent<'a>, Time, u32, u32)> {
    let integer = |i| row.get_ref(i).map(|value| value.as_i64().unwrap_or(0));
    let event = RawEvent {
        position: Position(integer(0)? as u64),
        time: time(integer(2)?),
        version: integer(5)? as u64,
        stream: bytes(row.get_ref(6)?),
        id: bytes(row.get_ref(7)?),
        metadata: bytes(row.get_ref(8)?),
        payload: bytes(row.get_ref(9)?),
        forgotten: integer(10)? != 0,
    };
    Ok((event, time(integer(1)?), integer(3)? as u32, integer(4)? as u32))
}

/// All columns of rows, as [`raw`] takes them.
pub(super) fn all_columns() -> String {
    columns(ColumnSet::ALL)
}

pub(super) fn time(microseconds: i64) -> Time {
    Time::from_microseconds(microseconds).unwrap_or(Time::EPOCH)
}

fn bytes(value: ValueRef<'_>) -> &[u8] {
    match value {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes,
        // A column that was not asked for; the tables are strict and their columns not null.
        ValueRef::Null | ValueRef::Integer(_) | ValueRef::Real(_) => &[],
    }
}

/// Numbers that events have in common, each once, in the order in which they came.
#[derive(Default)]
struct Dictionary {
    numbers: Vec<u32>,
    indexes: HashMap<u32, u16>,
}

impl Dictionary {
    fn index(&mut self, number: u32) -> u16 {
        // Most events are of the same source and type as the one before.
        if let Some(last) = self.numbers.last().filter(|last| **last == number) {
            return self.indexes[last];
        }
        *self.indexes.entry(number).or_insert_with(|| {
            self.numbers.push(number);
            (self.numbers.len() - 1) as u16
        })
    }
}

impl Reader {
    pub(super) fn open(shared: Arc<Shared>) -> Result<Reader, Error> {
        let connection = connect(shared.path()).map_err(|error| shared.failures.sqlite(error))?;
        Ok(Reader { connection, shared })
    }

    /// All that `read` reads is from one moment.
    pub(super) fn snapshot<T>(&mut self, read: impl FnOnce(&mut Reader) -> Result<T, Error>) -> Result<T, Error> {
        self.sql(|log| log.prepare_cached("BEGIN")?.execute([]))?;
        let read = read(self);
        let ended = self.sql(|log| log.prepare_cached("COMMIT")?.execute([]));
        let read = read?;
        ended.map(|_| read)
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn log(&self) -> &Connection {
        &self.connection
    }

    fn sql<T>(&self, run: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, Error> {
        run(&self.connection).map_err(|error| self.shared.failures.sqlite(error))
    }

    /// Looks for blocks of other processes.
    pub(super) fn refresh(&self) -> Result<u64, Error> {
        self.shared.directory.refresh(&self.connection, &self.shared.failures)
    }

    /// How far the log goes.
    pub(super) fn head(&self) -> Result<Head, Error> {
        let (next, appended) = self.sql(super::file::head)?;
        let first = match self.shared.directory.entries().first() {
            Some(entry) => match header(&self.connection, &self.shared.failures, entry.first) {
                Err(Error::Damaged { .. }) if self.shared.directory.skips() => Time::EPOCH,
                header => header?.appended().0,
            },
            None => self.sql(|log| {
                let sql = "SELECT appended FROM events WHERE position = 0";
                let first = log.prepare_cached(sql)?.query_row([], |row| row.get(0)).optional()?;
                Ok(first.map_or(Time::EPOCH, time))
            })?,
        };
        Ok(Head { next, first, appended })
    }

    /// See [`Stretch::oldest`].
    pub(super) fn oldest_rows(&mut self, keep: u64) -> Result<Option<Stretch>, Error> {
        self.snapshot(|reader| {
            let sealed = reader.refresh()?;
            reader.sql(|log| Stretch::oldest(log, sealed, keep))
        })
    }

    /// A number that changes with every commit of another connection.
    pub(super) fn data_version(&self) -> Result<i64, Error> {
        self.sql(|log| log.prepare_cached("PRAGMA data_version")?.query_row([], |row| row.get(0)))
    }

    /// Rows from a position to the end of the stretch that it is in, or to the head.
    pub(super) fn rows(&mut self, begin: u64, set: ColumnSet) -> Result<Rows, Error> {
        self.snapshot(|reader| {
            let chunk = reader.sql(|log| reader.read_rows(log, begin, set))?;
            match chunk {
                Some(chunk) if chunk.first() == begin => Ok(Rows::Chunk(Arc::new(chunk))),
                found => {
                    reader.refresh()?;
                    let sealed = reader.shared.directory.end() > begin;
                    if found.is_some() && !sealed {
                        let what = "it is not there, but later ones are".to_owned();
                        return Err(reader.shared.failures.damaged(begin, None, what));
                    }
                    Ok(if sealed { Rows::Sealed } else { Rows::None })
                }
            }
        })
    }

    fn read_rows(&self, log: &Connection, begin: u64, set: ColumnSet) -> rusqlite::Result<Option<Chunk>> {
        let sql = format!("SELECT {} FROM events WHERE position >= ? AND position < ? ORDER BY position", columns(set));
        let end = begin / limits::CHUNK_EVENTS as u64 * limits::CHUNK_EVENTS as u64 + limits::CHUNK_EVENTS as u64;
        let mut statement = log.prepare_cached(&sql)?;
        let mut rows = statement.query([begin as i64, end as i64])?;
        let mut events = Columns::new(set);
        let (mut sources, mut types) = (Dictionary::default(), Dictionary::default());
        let mut appended: Vec<(u32, Time)> = Vec::new();
        let mut is_full = false;
        while let Some(row) = rows.next()? {
            let (event, when, source, event_type) = raw(row)?;
            if !events.is_empty() && event.position.0 != begin + events.len() as u64 {
                // What is missing shows when the next chunk is asked for.
                break;
            }
            events.push(sources.index(source), types.index(event_type), event);
            match appended.last_mut() {
                Some((end, time)) if *time == when => *end += 1,
                _ => appended.push((events.len() as u32, when)),
            }
            is_full = event.position.0 + 1 == end || events.bytes() >= limits::CHUNK_BYTES;
            if is_full {
                break;
            }
        }
        if events.is_empty() {
            return Ok(None);
        }
        let epoch = super::forget::epoch(log)?;
        self.chunk(log, events, [sources.numbers, types.numbers], appended, is_full, epoch).map(Some)
    }

    fn chunk(
        &self,
        log: &Connection,
        events: Columns,
        [sources, types]: [Vec<u32>; 2],
        appended: Vec<(u32, Time)>,
        is_full: bool,
        epoch: u64,
    ) -> rusqlite::Result<Chunk> {
        let names = &self.shared.names;
        let named = |kind, numbers: Vec<u32>| -> rusqlite::Result<Vec<(u32, Arc<str>)>> {
            let names = names.names(kind, &numbers, log)?;
            Ok(numbers.into_iter().zip(names).collect())
        };
        Ok(Chunk::new(events, named(Kind::Source, sources)?, named(Kind::Type, types)?, appended, is_full, epoch))
    }

    /// The block that begins at a position.
    pub(super) fn block(&mut self, first: u64, set: ColumnSet) -> Result<Chunk, Error> {
        let read = self.snapshot(|reader| Ok((reader.decode_here(first, set)?, reader.epoch()?)));
        let (decoded, epoch) = read.map_err(|error| self.to_the_end(error))?;
        let Decoded { columns, sources, types, appended } = decoded;
        let chunk = self.chunk(&self.connection, columns, [sources, types], appended, true, epoch);
        chunk.map_err(|error| match error {
            rusqlite::Error::QueryReturnedNoRows => self.to_the_end(self.shared.failures.damaged(
                first,
                None,
                "it names a source or a type that the log does not have".into(),
            )),
            error => self.shared.failures.sqlite(error),
        })
    }

    /// Damage of a block whose header does not say where it ends.
    fn to_the_end(&self, mut error: Error) -> Error {
        if let Error::Damaged { first, last: last @ None, .. } = &mut error {
            let directory = &self.shared.directory;
            *last = directory.find(first.0).map(|i| Position(directory.entries()[i].end() - 1));
        }
        error
    }

    /// The columns of the block that begins at a position.
    pub(super) fn decode(&mut self, first: u64, set: ColumnSet) -> Result<Decoded, Error> {
        self.snapshot(|reader| reader.decode_here(first, set))
    }

    /// The same in the transaction that is open: header and sections must be of one moment.
    pub(super) fn decode_here(&self, first: u64, set: ColumnSet) -> Result<Decoded, Error> {
        decode_block(&self.connection, &self.shared.failures, first, set)
    }

    /// The sources and types between two positions, the second one excluded.
    pub(super) fn counts(&mut self, begin: u64, end: u64) -> Result<Counts, Error> {
        let mut counts = Counts::default();
        if begin >= end {
            return Ok(counts);
        }
        self.snapshot(|reader| {
            // The first look of the transaction: it sees the blocks before this, and the rows after it.
            let sealed = reader.refresh()?;
            let shared = reader.shared.clone();
            let mut partial = Vec::new();
            {
                let entries = shared.directory.entries();
                let from = entries.partition_point(|entry| entry.end() <= begin);
                for entry in entries[from..].iter().take_while(|entry| entry.first < end.min(sealed)) {
                    if entry.first < begin || entry.end() > end {
                        partial.push(entry.first);
                        continue;
                    }
                    reader.count_all(entry, &mut counts)?;
                }
            }
            for first in partial {
                let decoded = match reader.decode_here(first, ColumnSet::default()) {
                    // Whoever passes over it counts as much.
                    Err(Error::Damaged { .. }) if shared.directory.skips() => {
                        let entries = shared.directory.entries();
                        let at = entries.partition_point(|entry| entry.first < first);
                        reader.count_all(&entries[at], &mut counts)?;
                        continue;
                    }
                    decoded => decoded?,
                };
                for i in 0..decoded.columns.len() {
                    if (begin..end).contains(&decoded.columns.position(i).0) {
                        let source = decoded.sources[usize::from(decoded.columns.source(i))];
                        let event_type = decoded.types[usize::from(decoded.columns.event_type(i))];
                        *counts.entry((source, event_type)).or_default() += 1;
                    }
                }
            }
            reader.sql(|log| {
                let sql = "SELECT source, type FROM events WHERE position >= ? AND position < ?";
                let mut statement = log.prepare_cached(sql)?;
                let mut rows = statement.query([begin as i64, end as i64])?;
                while let Some(row) = rows.next()? {
                    *counts.entry((row.get(0)?, row.get(1)?)).or_default() += 1;
                }
                // Whoever is told of a source or a type finds its name in memory.
                let known = |kind, number| (number as usize) < shared.names.len(kind);
                if counts.keys().any(|(source, _)| !known(Kind::Source, *source)) {
                    shared.names.refresh(Kind::Source, log)?;
                }
                if counts.keys().any(|(_, event_type)| !known(Kind::Type, *event_type)) {
                    shared.names.refresh(Kind::Type, log)?;
                }
                Ok(())
            })
        })?;
        Ok(counts)
    }

    /// Adds all of a block; of one whose header cannot be read, and that is passed over, nothing.
    fn count_all(&self, entry: &Entry, counts: &mut Counts) -> Result<(), Error> {
        let counted = entry.kinds(&self.connection, &self.shared.failures, |kinds| {
            for kind in kinds {
                *counts.entry((kind.source, kind.event_type)).or_default() += u64::from(kind.count);
            }
        });
        match counted {
            Err(Error::Damaged { .. }) if self.shared.directory.skips() => Ok(()),
            counted => counted,
        }
    }

    /// The first position from `begin` on whose block has something that is wanted; that of the rows, if no block has.
    pub(super) fn next_wanted(&self, begin: u64, wants: &mut dyn FnMut(u32, u32) -> bool) -> Result<u64, Error> {
        let entries = self.shared.directory.entries();
        let from = entries.partition_point(|entry| entry.end() <= begin);
        for entry in &entries[from..] {
            let wanted = entry.kinds(&self.connection, &self.shared.failures, |kinds| {
                kinds.iter().any(|kind| wants(kind.source, kind.event_type))
            });
            // Nobody knows what is in a block whose header cannot be read, so everybody is to hear of it.
            let skips = self.shared.directory.skips();
            if matches!(wanted, Err(Error::Damaged { .. })) && skips || wanted? {
                return Ok(entry.first.max(begin));
            }
        }
        Ok(entries.last().map_or(0, Entry::end).max(begin))
    }

    /// Reads the names that were added since the last time.
    pub(super) fn refresh_names(&self) -> Result<(), Error> {
        let names = &self.shared.names;
        self.sql(|log| names.refresh(Kind::Source, log).and_then(|()| names.refresh(Kind::Type, log)))
    }

    /// The event at a position with these columns, if there is one, and when it was appended.
    pub(super) fn event(&mut self, position: Position, set: ColumnSet) -> Result<Option<(Event, Time)>, Error> {
        let sql = format!("SELECT {} FROM events WHERE position = ?", columns(set));
        let found = self.snapshot(|reader| {
            reader.sql(|log| {
                let mut statement = log.prepare_cached(&sql)?;
                let mut rows = statement.query([position.0 as i64])?;
                let Some(row) = rows.next()? else { return Ok(None) };
                let (event, appended, source, event_type) = raw(row)?;
                let names = &reader.shared.names;
                let source = names.names(Kind::Source, &[source], log)?.remove(0);
                let event_type = names.names(Kind::Type, &[event_type], log)?.remove(0);
                Ok(Some((owned(event, &source, &event_type), appended)))
            })
        })?;
        if found.is_some() {
            return Ok(found);
        }
        // What is in a block stays there, so this need not be the same moment.
        self.refresh()?;
        let directory = &self.shared.directory;
        let Some(first) = directory.find(position.0).map(|i| directory.entries()[i].first) else { return Ok(None) };
        let chunk = self.block(first, set)?;
        Ok(Some(chunk.at(position)))
    }
}

/// An event with memory of its own. What is not text in it, was not when it was appended.
pub(super) fn owned(event: RawEvent<'_>, source: &str, event_type: &str) -> Event {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let new = NewEvent {
        source: source.to_owned(),
        id: text(event.id),
        stream: text(event.stream),
        version: event.version,
        event_type: event_type.to_owned(),
        time: event.time,
        metadata: text(event.metadata),
        payload: event.payload.to_vec(),
    };
    Event { position: event.position, event: new, forgotten: event.forgotten }
}

/// Decodes what is asked for of the block that begins at a position.
pub(super) fn decode_block(
    log: &Connection,
    failures: &Failures,
    first: u64,
    set: ColumnSet,
) -> Result<Decoded, Error> {
    enum Failed {
        Sqlite(rusqlite::Error),
        Damage(String),
    }
    impl From<block::Damage> for Failed {
        fn from(damage: block::Damage) -> Failed {
            Failed::Damage(damage.what)
        }
    }
    let header = header(log, failures, first)?;
    let decoded = block::decode(&header, set, |section: Section| {
        let sql = format!("SELECT {} FROM blocks WHERE first = ?", section.column());
        let read = log.prepare_cached(&sql).and_then(|mut s| s.query_row([first as i64], |r| r.get::<_, Vec<u8>>(0)));
        read.map_err(Failed::Sqlite)
    });
    decoded.map_err(|failed| match failed {
        // A page of this block alone.
        Failed::Sqlite(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseCorrupt) => {
            failures.damaged(first, Some(header.last().0), error.to_string())
        }
        Failed::Sqlite(error) => failures.sqlite(error),
        Failed::Damage(what) => failures.damaged(first, Some(header.last().0), what),
    })
}
