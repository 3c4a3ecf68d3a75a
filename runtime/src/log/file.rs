//! The file: `log.sqlite`, its tables, and where it ends.
//!
//! rusqlite instead of sqlx: reading is the hottest loop of the runtime, and a row of sqlx costs several times as much.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::block::{Header, Section};
use super::ids;
use super::read::time;
use crate::config::limits;
use crate::fault;
use crate::model::Time;

/// The layout of the file; raised when it changes.
pub(super) const FORMAT: i64 = 3;

/// The format before events could be forgotten: it becomes [`FORMAT`] by [`FORGOTTEN`] and [`FORGETTINGS`].
const UNFORGETTING: i64 = 2;

const SCHEMA: &str = "
    CREATE TABLE log (identity TEXT NOT NULL, created_at TEXT NOT NULL, key BLOB NOT NULL) STRICT;
    CREATE TABLE sources (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
    CREATE TABLE types (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;";

/// The newest events are rows of `events`; all before them are in blocks.
const EVENTS: &str = "
    CREATE TABLE events (position INTEGER PRIMARY KEY, appended INTEGER NOT NULL, time INTEGER NOT NULL,
        source INTEGER NOT NULL, type INTEGER NOT NULL, version INTEGER NOT NULL, stream TEXT NOT NULL, id TEXT NOT NULL,
        metadata TEXT NOT NULL, payload BLOB NOT NULL) STRICT;
    CREATE UNIQUE INDEX events_id ON events (id, source);";

/// Whether the content of a row is gone.
const FORGOTTEN: &str = "ALTER TABLE events ADD COLUMN forgotten INTEGER NOT NULL DEFAULT 0;";

/// What was forgotten, by whom and when. `kinds` are [`super::forget::Kinds`].
const FORGETTINGS: &str = "
    CREATE TABLE forgettings (number INTEGER PRIMARY KEY, begun INTEGER NOT NULL, ended INTEGER, requester TEXT NOT NULL,
        reason TEXT, source TEXT NOT NULL, stream TEXT, id TEXT, names INTEGER NOT NULL, before INTEGER,
        events INTEGER NOT NULL, kinds BLOB NOT NULL) STRICT;";

/// What tells a log from every other, and the key of its index of ids.
pub(super) struct Identity {
    pub(super) identity: String,
    pub(super) key: [u8; 16],
}

pub(super) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(limits::DATABASE_BUSY)?;
    connection.set_prepared_statement_cache_capacity(128);
    connection.pragma_update(None, "cache_size", -2048)?;
    Ok(connection)
}

/// Prepares a connection for writing.
pub(super) fn connect_writer(path: &Path) -> rusqlite::Result<Connection> {
    let connection = connect(path)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    // An acknowledged append survives a power cut; views may lose their last commits then, and apply them again.
    connection.pragma_update(None, "synchronous", "full")?;
    // After a long reader the write-ahead log shrinks again.
    connection.pragma_update(None, "journal_size_limit", limits::LOG_JOURNAL_BYTES as i64)?;
    // What a block holds is nowhere else in the file, so that there is one place where an event can be forgotten.
    connection.pragma_update(None, "secure_delete", true)?;
    Ok(connection)
}

/// Makes the tables of a file that is new. Answers the format of the file, and its identity if that is [`FORMAT`].
pub(super) fn prepare(connection: &mut Connection) -> rusqlite::Result<(i64, Option<Identity>)> {
    let version = |log: &Connection| log.pragma_query_value(None, "user_version", |r| r.get::<_, i64>(0));
    let is_made = version(connection)? == FORMAT;
    // A log that is there is not locked for whoever only opens it.
    let behavior = if is_made { TransactionBehavior::Deferred } else { TransactionBehavior::Immediate };
    let tx = connection.transaction_with_behavior(behavior)?;
    let empty: bool = tx.query_row("SELECT count(*) = 0 FROM sqlite_schema", [], |r| r.get(0))?;
    if empty {
        tx.execute_batch(&[SCHEMA, EVENTS, FORGOTTEN, FORGETTINGS].concat())?;
        let sections: Vec<_> = Section::ALL.iter().map(|s| format!("{} BLOB NOT NULL", s.column())).collect();
        tx.execute_batch(&format!(
            "CREATE TABLE blocks (first INTEGER PRIMARY KEY, header BLOB NOT NULL, {}) STRICT;",
            sections.join(", ")
        ))?;
        tx.execute_batch(ids::SCHEMA)?;
        let identity = uuid::Uuid::new_v4().to_string();
        let key = uuid::Uuid::new_v4().into_bytes();
        tx.execute("INSERT INTO log VALUES (?, ?, ?)", params![identity, Time::now().to_string(), key])?;
        tx.pragma_update(None, "user_version", FORMAT)?;
        fault::point("log.made", tx.path().unwrap_or_default());
    }
    if version(&tx)? == UNFORGETTING {
        tx.execute_batch(&[FORGOTTEN, FORGETTINGS].concat())?;
        tx.pragma_update(None, "user_version", FORMAT)?;
    }
    let format = version(&tx)?;
    let identity = match format {
        FORMAT => {
            let read = |r: &rusqlite::Row<'_>| Ok(Identity { identity: r.get(0)?, key: r.get(1)? });
            Some(tx.query_row("SELECT identity, key FROM log", [], read)?)
        }
        _ => None,
    };
    tx.commit()?;
    Ok((format, identity))
}

/// Writes all rows anew. SQLite overwrites what is deleted, but not what it had moved to another page before: copies of
/// rows can be left in the gaps of pages, until these are freed.
pub(super) fn rewrite_rows(log: &Connection) -> rusqlite::Result<()> {
    log.execute_batch(&format!(
        "ALTER TABLE events RENAME TO events_before; DROP INDEX events_id; {EVENTS} {FORGOTTEN}
         INSERT INTO events SELECT * FROM events_before ORDER BY position; DROP TABLE events_before;"
    ))
}

/// The position after the last block.
pub(super) fn sealed(log: &Connection) -> rusqlite::Result<(u64, Time)> {
    let sql = "SELECT first, header FROM blocks ORDER BY first DESC LIMIT 1";
    let last =
        log.prepare_cached(sql)?.query_row([], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, Vec<u8>>(1)?))).optional()?;
    let Some((first, header)) = last else { return Ok((0, Time::EPOCH)) };
    let header = Header::decode(&header).map_err(|damage| {
        let what = format!("the block of position {first} is damaged: {}", damage.what);
        rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Blob, what.into())
    })?;
    Ok((first as u64 + header.count() as u64, header.appended().1))
}

/// How far the log goes: the position of the next event, and when the newest one was appended.
pub(super) fn head(log: &Connection) -> rusqlite::Result<(u64, Time)> {
    let sql = "SELECT position, appended FROM events ORDER BY position DESC LIMIT 1";
    let last = log.prepare_cached(sql)?.query_row([], |r| Ok((r.get::<_, i64>(0)?, r.get(1)?))).optional()?;
    last.map_or_else(|| sealed(log), |(position, appended)| Ok((position as u64 + 1, time(appended))))
}
