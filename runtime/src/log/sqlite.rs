//! The embedded log: one SQLite file with a table for each source, whose rowid is the position, dense from 0.
//!
//! A table for each source makes reading a source one scan in the order of the file, and lets positions be dense in
//! each source. rusqlite instead of sqlx: reading is the hottest loop of the runtime, and a row of sqlx costs
//! several times as much.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::Instant;

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::chunks::{Chunk, Chunks};
use super::{Appended, Error, Head, Heads};
use crate::config::limits;
use crate::fault;
use crate::model::{ColumnSet, Event, NewEvent, Position, Time};

/// The layout of the file; raised when it changes.
const FORMAT: i64 = 1;

const SCHEMA: &str = "
    CREATE TABLE log (identity TEXT NOT NULL, created_at TEXT NOT NULL) STRICT;
    CREATE TABLE sources (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
        head INTEGER, head_time INTEGER, first_time INTEGER) STRICT;
    CREATE TABLE types (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;";

/// The log of a data directory: a handle that is cheap to clone. Its methods block.
#[derive(Clone)]
pub struct EventLog {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    identity: String,
    /// Device and inode of the file.
    file: (u64, u64),
    /// Why the last look for new events failed, if it did.
    trouble: Mutex<Option<String>>,
    writer: Mutex<Connection>,
    heads: watch::Sender<Arc<Heads>>,
    poller: OnceLock<()>,
    stop: Arc<(Mutex<bool>, Condvar)>,
    chunks: Arc<Chunks>,
}

impl Inner {
    /// What is appended to a file that is not there any more, nobody would see again.
    fn check_place(&self) -> Result<(), Error> {
        if file_identity(&self.path) == Some(self.file) {
            return Ok(());
        }
        Err(Error::Removed { path: self.path.clone() })
    }
}

fn file_identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

impl Drop for Inner {
    fn drop(&mut self) {
        *self.stop.0.lock().expect("no panics while it is held") = true;
        self.stop.1.notify_all();
        self.chunks.stop();
    }
}

pub(super) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(limits::DATABASE_BUSY)?;
    connection.set_prepared_statement_cache_capacity(128);
    connection.pragma_update(None, "cache_size", -2048)?;
    Ok(connection)
}

impl EventLog {
    /// Opens the log of a data directory (`log.sqlite`); directory and file are created if they are not there.
    pub fn open(data: &Path) -> Result<EventLog, Error> {
        std::fs::create_dir_all(data).map_err(|error| Error::Directory { path: data.to_owned(), error })?;
        let path = data.join("log.sqlite");
        let failed = |error| Error::Sqlite { path: path.clone(), error };
        let mut writer = connect(&path).map_err(failed)?;
        let (format, identity) = prepare(&mut writer).map_err(failed)?;
        if format != FORMAT {
            return Err(Error::Format { path, found: format, expected: FORMAT });
        }
        let heads = read_heads(&writer).map_err(failed)?;
        let file = file_identity(&path).ok_or_else(|| Error::Removed { path: path.clone() })?;
        Ok(EventLog {
            inner: Arc::new(Inner {
                identity,
                file,
                trouble: Mutex::default(),
                writer: Mutex::new(writer),
                heads: watch::Sender::new(Arc::new(heads)),
                poller: OnceLock::new(),
                stop: Arc::default(),
                chunks: Chunks::new(path.clone()),
                path,
            }),
        })
    }

    /// What tells this log from every other: given once, when the file was created.
    pub fn identity(&self) -> &str {
        &self.inner.identity
    }

    /// Appends events in one durable transaction, in order. An event whose source and id are there already appends
    /// nothing. After an error of the database either all or none of them are there: append them again.
    pub fn append(&self, events: &[NewEvent]) -> Result<Vec<Appended>, Error> {
        events.iter().try_for_each(check_bounds)?;
        let failed = |error| Error::Sqlite { path: self.inner.path.clone(), error };
        let (appended, heads) = {
            let mut writer = self.inner.writer.lock().expect("a panic would have ended the process");
            self.inner.check_place()?;
            let done = append(&mut writer, events).map_err(failed)?;
            (done, read_heads(&writer))
        };
        // What is committed is appended, whatever comes after; the next look finds it.
        if let Ok(heads) = heads {
            publish(&self.inner.heads, heads);
        }
        Ok(appended)
    }

    /// Moves everything that is in the write-ahead log into the file itself, so that the file alone is all of the log.
    /// Readers may be in the way; then some of it stays where it is, which is no loss.
    pub fn tidy(&self) {
        let writer = self.inner.writer.lock().expect("a panic would have ended the process");
        let _ = writer.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
    }

    /// Follows the heads. Appends of this process show at once, those of others after [`limits::LOG_POLL`].
    pub fn heads(&self) -> watch::Receiver<Arc<Heads>> {
        self.inner.poller.get_or_init(|| {
            let inner = Arc::downgrade(&self.inner);
            let stop = self.inner.stop.clone();
            std::thread::Builder::new()
                .name("log-poller".into())
                .spawn(move || poll(&inner, &stop))
                .expect("a thread can be started");
        });
        self.inner.heads.subscribe()
    }

    /// The heads as of the last look; after an append of this process they include it.
    pub fn heads_now(&self) -> Arc<Heads> {
        self.inner.heads.borrow().clone()
    }

    /// Why nobody can tell at present whether there are new events; None while all is well, and before the first look.
    pub fn trouble(&self) -> Option<String> {
        self.inner.trouble.lock().expect("no panics while it is held").clone()
    }

    /// The events of a source after a position: as many as one chunk has, or None if there are none yet.
    ///
    /// Readers of a stretch share what is read for the first of them, and what comes next is read meanwhile. At least
    /// the `columns` asked for are there.
    pub fn chunk(
        &self,
        source: &str,
        after: Option<Position>,
        columns: ColumnSet,
    ) -> Result<Option<Arc<Chunk>>, Error> {
        self.inner.chunks.get(source, after, columns)
    }

    /// Calls `each` for at most `limit` events of a source after a position, in order; answers how many there were.
    pub fn events(
        &self,
        source: &str,
        after: Option<Position>,
        limit: usize,
        each: impl FnMut(Event),
    ) -> Result<usize, Error> {
        self.inner.chunks.with_reader(|reader| reader.events(source, after, limit, each))
    }

    /// A digest of the event at a position and its time, or None if there is no such event. A checkpoint keeps it, so
    /// that a log which was replaced or rolled back is noticed.
    pub fn fingerprint(&self, source: &str, position: Position) -> Result<Option<(i64, Time)>, Error> {
        let mut found = None;
        // Positions begin at 0, and None reads from there.
        let after = position.0.checked_sub(1).map(Position);
        self.events(source, after, 1, |event| found = Some(event))?;
        Ok(found.filter(|e| e.position == position).map(|Event { event: e, .. }| {
            let mut hash = Sha256::new();
            for part in [e.id.as_bytes(), e.event_type.as_bytes(), e.stream.as_bytes(), &e.payload] {
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part);
            }
            hash.update(e.time.microseconds().to_le_bytes());
            let digest = hash.finalize();
            (i64::from_le_bytes(digest[..8].try_into().expect("eight bytes")), e.time)
        }))
    }
}

/// Looks for appends of other processes until the log is dropped.
fn poll(inner: &Weak<Inner>, stop: &(Mutex<bool>, Condvar)) {
    let mut connection = None;
    let mut seen = -1;
    let mut moved = Instant::now();
    loop {
        {
            let Some(inner) = inner.upgrade() else { return };
            let look = |connection: &Connection, seen: &mut i64| -> rusqlite::Result<Option<Heads>> {
                let version = connection.prepare_cached("PRAGMA data_version")?.query_row([], |row| row.get(0))?;
                let moved = std::mem::replace(seen, version) != version;
                moved.then(|| read_heads(connection)).transpose()
            };
            let failed = |error| Error::Sqlite { path: inner.path.clone(), error };
            let result = inner.check_place().and_then(|()| match &connection {
                Some(c) => look(c, &mut seen).map_err(failed),
                None => connect(&inner.path).map_err(failed).and_then(|c| {
                    let heads = look(&c, &mut seen).map_err(failed);
                    connection = Some(c);
                    heads
                }),
            });
            let trouble = result.as_ref().err().map(Error::to_string);
            match result {
                Ok(Some(heads)) => {
                    moved = Instant::now();
                    publish(&inner.heads, heads);
                }
                Ok(None) => {}
                Err(_) => (connection, seen) = (None, -1),
            }
            let mut known = inner.trouble.lock().expect("no panics while it is held");
            if *known != trouble {
                // Once, not at each of the looks that go on until it is over.
                match &trouble {
                    Some(error) => tracing::warn!(error, "cannot look for new events"),
                    None => tracing::info!("new events can be seen again"),
                }
                *known = trouble;
            }
        }
        let guard = stop.0.lock().expect("no panics while it is held");
        let rest = if moved.elapsed() < limits::LOG_QUIET { limits::LOG_POLL } else { limits::LOG_POLL_QUIET };
        let (stopped, _) = stop.1.wait_timeout(guard, rest).expect("no panics while it is held");
        if *stopped {
            return;
        }
    }
}

/// Heads only move forward here, whichever of two looks arrives last.
fn publish(sender: &watch::Sender<Arc<Heads>>, new: Heads) {
    sender.send_if_modified(|heads| {
        let newer = |(source, head): (&Arc<str>, &Head)| heads.get(source).is_none_or(|h| h.position < head.position);
        if !new.iter().any(newer) {
            return false;
        }
        let merged = Arc::make_mut(heads);
        for (source, head) in new {
            if merged.get(&source).is_none_or(|h| h.position < head.position) {
                merged.insert(source, head);
            }
        }
        true
    });
}

fn prepare(connection: &mut Connection) -> rusqlite::Result<(i64, String)> {
    connection.pragma_update(None, "journal_mode", "wal")?;
    // An acknowledged append survives a power cut; views may lose their last commits then, and apply them again.
    connection.pragma_update(None, "synchronous", "full")?;
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let empty: bool = tx.query_row("SELECT count(*) = 0 FROM sqlite_schema", [], |r| r.get(0))?;
    if empty {
        tx.execute_batch(SCHEMA)?;
        tx.execute(
            "INSERT INTO log VALUES (?, ?)",
            params![uuid::Uuid::new_v4().to_string(), Time::now().to_string()],
        )?;
        tx.pragma_update(None, "user_version", FORMAT)?;
        fault::point("log.made", tx.path().unwrap_or_default());
    }
    let format = tx.pragma_query_value(None, "user_version", |r| r.get(0))?;
    let identity =
        if format == FORMAT { tx.query_row("SELECT identity FROM log", [], |r| r.get(0))? } else { String::new() };
    tx.commit()?;
    Ok((format, identity))
}

fn read_heads(connection: &Connection) -> rusqlite::Result<Heads> {
    let sql = "SELECT name, head, head_time, first_time FROM sources WHERE head IS NOT NULL";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map([], |row| {
        let head = Head {
            position: Position(row.get::<_, i64>(1)? as u64),
            time: time(row.get(2)?),
            first_time: time(row.get(3)?),
        };
        Ok((Arc::from(row.get::<_, String>(0)?), head))
    })?;
    rows.collect()
}

pub(super) fn time(microseconds: i64) -> Time {
    Time::from_microseconds(microseconds).unwrap_or(Time::EPOCH)
}

fn check_bounds(event: &NewEvent) -> Result<(), Error> {
    let parts = [
        ("the source", event.source.len(), limits::EVENT_NAME_BYTES),
        ("the id", event.id.len(), limits::EVENT_NAME_BYTES),
        ("the type", event.event_type.len(), limits::EVENT_NAME_BYTES),
        ("the subject", event.stream.len(), limits::EVENT_NAME_BYTES),
        ("data and attributes together", event.payload.len() + event.metadata.len(), limits::EVENT_BYTES),
    ];
    for (what, bytes, limit) in parts {
        if bytes > limit {
            return Err(Error::TooLarge { id: event.id.chars().take(64).collect(), what, bytes, limit });
        }
    }
    Ok(())
}

/// What an append knows of a source while it runs.
struct Open {
    number: i64,
    insert: String,
    find: String,
    before: i64,
    next: i64,
    first_time: Option<i64>,
    last_time: i64,
}

fn append(connection: &mut Connection, events: &[NewEvent]) -> rusqlite::Result<Vec<Appended>> {
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let path = tx.path().unwrap_or_default();
    fault::fail("append.begun", path).map_err(full)?;
    let mut sources: HashMap<&str, Open> = HashMap::new();
    let mut types: HashMap<&str, i64> = HashMap::new();
    let mut appended = Vec::with_capacity(events.len());
    for event in events {
        if !sources.contains_key(event.source.as_str()) {
            sources.insert(&event.source, open_source(&tx, &event.source)?);
        }
        let source = sources.get_mut(event.source.as_str()).expect("just inserted");
        let event_type = match types.get(event.event_type.as_str()) {
            Some(&number) => number,
            None => {
                let number = number_of(&tx, "types", &event.event_type)?;
                types.insert(&event.event_type, number);
                number
            }
        };
        let inserted = tx.prepare_cached(&source.insert)?.execute(params![
            source.next,
            event.time.microseconds(),
            event.version as i64,
            event_type,
            event.stream,
            event.id,
            event.metadata,
            event.payload
        ])?;
        let position = if inserted == 1 {
            source.next += 1;
            source.first_time.get_or_insert(event.time.microseconds());
            source.last_time = event.time.microseconds();
            source.next - 1
        } else {
            tx.prepare_cached(&source.find)?.query_row([&event.id], |r| r.get(0))?
        };
        appended.push(Appended {
            source: event.source.clone(),
            position: Position(position as u64),
            new: inserted == 1,
        });
    }
    for source in sources.values().filter(|s| s.next > s.before) {
        tx.execute(
            "UPDATE sources SET head = ?, head_time = ?, first_time = ? WHERE number = ?",
            params![source.next - 1, source.last_time, source.first_time, source.number],
        )?;
    }
    fault::fail("append.written", path).map_err(full)?;
    tx.commit()?;
    fault::point("append.committed", connection.path().unwrap_or_default());
    Ok(appended)
}

/// What a fault point stands for.
fn full(error: std::io::Error) -> rusqlite::Error {
    let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL);
    rusqlite::Error::SqliteFailure(code, Some(error.to_string()))
}

fn number_of(connection: &Connection, table: &str, name: &str) -> rusqlite::Result<i64> {
    let found = connection
        .prepare_cached(&format!("SELECT number FROM {table} WHERE name = ?"))?
        .query_row([name], |r| r.get(0))
        .optional()?;
    match found {
        Some(number) => Ok(number),
        None => {
            connection.execute(&format!("INSERT INTO {table} (name) VALUES (?)"), [name])?;
            Ok(connection.last_insert_rowid())
        }
    }
}

fn open_source(connection: &Connection, name: &str) -> rusqlite::Result<Open> {
    let number = number_of(connection, "sources", name)?;
    connection.execute_batch(&format!(
        "CREATE TABLE IF NOT EXISTS source_{number} (position INTEGER PRIMARY KEY, time INTEGER NOT NULL,
            version INTEGER NOT NULL, type INTEGER NOT NULL, stream TEXT NOT NULL, id TEXT NOT NULL UNIQUE,
            metadata TEXT NOT NULL, payload BLOB NOT NULL) STRICT"
    ))?;
    let sql = "SELECT head, first_time FROM sources WHERE number = ?";
    let (head, first_time): (Option<i64>, Option<i64>) =
        connection.query_row(sql, [number], |r| Ok((r.get(0)?, r.get(1)?)))?;
    let next = head.map_or(0, |h| h + 1);
    Ok(Open {
        number,
        insert: format!("INSERT INTO source_{number} VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"),
        find: format!("SELECT position FROM source_{number} WHERE id = ?"),
        before: next,
        next,
        first_time,
        last_time: 0,
    })
}
