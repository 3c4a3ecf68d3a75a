//! One generation of a projection: a file with its views and its checkpoint, and the only transaction that changes them.
//!
//! rusqlite instead of sqlx: a commit writes tens of thousands of rows, 1 us each through prepared statements.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};

use super::changes::{Changes, table};
use super::row::Table;
use super::{Error, Origin, dead_letters, origin};
use crate::config::limits;
use crate::fault;
use crate::manifest::Manifest;
use crate::model::{Position, Time};

/// Shadowbox's own tables stand beside the views, so that one transaction covers both.
const SCHEMA: &str = "
    CREATE TABLE _shadowbox_generation (fence INTEGER NOT NULL, module TEXT NOT NULL, manifest TEXT NOT NULL) STRICT;
    CREATE TABLE _shadowbox_checkpoint (only INTEGER PRIMARY KEY CHECK (only = 0), position INTEGER NOT NULL,
        appended INTEGER NOT NULL, fingerprint INTEGER NOT NULL, log TEXT NOT NULL) STRICT;";

/// How far a generation has come, and how to tell that it is still the same log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The last event applied or passed over.
    pub position: Position,
    /// When it was appended.
    pub appended: Time,
    /// A digest of it.
    pub fingerprint: i64,
    /// The identity of the log that it is in.
    pub log: String,
}

/// Everything that one commit writes.
pub struct Commit {
    /// How far the generation is with it; None if it has not begun.
    pub mark: Option<Mark>,
    /// The rows.
    pub changes: Arc<Changes>,
    /// The hash of the module that made the changes.
    pub module: String,
    /// Nothing follows for now.
    pub rests: bool,
    /// What becomes a dead letter, and what is none any more.
    pub letters: dead_letters::LetterChanges,
    /// What the rows are made from, if that has changed.
    pub origin: Option<Origin>,
}

/// A generation's file, opened by its one writer.
pub struct Generation {
    path: PathBuf,
    /// Device and inode of the file.
    identity: (u64, u64),
    connection: Connection,
    tables: Arc<[Table]>,
    fence: i64,
    mark: Option<Mark>,
    origin: Option<Origin>,
}

impl Generation {
    /// Makes the file with empty views.
    pub fn create(path: &Path, manifest: &Manifest) -> Result<(), Error> {
        let directory = path.parent().expect("generations are in a directory");
        std::fs::create_dir_all(directory).map_err(|error| Error::File { path: directory.to_owned(), error })?;
        let create = || {
            let mut connection = connect(path, OpenFlags::SQLITE_OPEN_CREATE)?;
            let tx = connection.transaction()?;
            tx.execute_batch(SCHEMA)?;
            tx.execute_batch(dead_letters::SCHEMA)?;
            for statement in manifest.views.iter().flat_map(|view| Table::new(view).ddl()) {
                tx.execute_batch(&statement)?;
            }
            tx.execute("INSERT INTO _shadowbox_generation VALUES (0, '', ?)", [&manifest.json])?;
            fail("generation.filled", &tx)?;
            tx.commit()
        };
        create().map_err(|error| Error::Sqlite { path: path.to_owned(), error })
    }

    /// Opens the file for writing. Whoever had it open before is behind the fence from now on. A file that is not there
    /// is an error: an empty one in its place would pass for a view without rows.
    pub fn open(path: &Path, manifest: &Manifest) -> Result<Generation, Error> {
        let tables: Arc<[Table]> = manifest.views.iter().map(Table::new).collect();
        let failed = |error| Error::Sqlite { path: path.to_owned(), error };
        let connection = connect(path, OpenFlags::empty()).map_err(failed)?;
        let sql = "UPDATE _shadowbox_generation SET fence = fence + 1 RETURNING manifest, fence";
        let (stored, fence): (String, i64) =
            connection.query_row(sql, [], |r| Ok((r.get(0)?, r.get(1)?))).map_err(failed)?;
        fail("generation.fenced", &connection).map_err(failed)?;
        let mismatch = |reason: String| Error::Mismatch { path: path.to_owned(), reason };
        let stored = Manifest::stored(&stored).map_err(|e| mismatch(e.to_string()))?;
        if stored.views != manifest.views {
            return Err(mismatch("the columns, keys or indexes differ".into()));
        }
        // Files from before events could be forgotten have no table for it.
        connection.execute_batch(origin::SCHEMA).map_err(failed)?;
        let (mark, origin) = (read_mark(path, &connection)?, origin::read(&connection).map_err(failed)?);
        let identity = identity(path).ok_or_else(|| Error::Removed { path: path.to_owned() })?;
        Ok(Generation { path: path.to_owned(), identity, connection, tables, fence, mark, origin })
    }

    /// The views' tables.
    pub fn tables(&self) -> &Arc<[Table]> {
        &self.tables
    }

    /// How far this generation has come; None before the first event.
    pub fn mark(&self) -> Option<&Mark> {
        self.mark.as_ref()
    }

    /// What the rows are made from; None if nobody has said so yet.
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// Says what the rows are made from.
    ///
    /// # Errors
    ///
    /// As [`Generation::commit`].
    pub fn set_origin(&mut self, origin: Origin) -> Result<(), Error> {
        let write = || -> rusqlite::Result<bool> {
            let tx = Transaction::new_unchecked(&self.connection, TransactionBehavior::Immediate)?;
            if !self.is_in_front(&tx)? {
                return Ok(false);
            }
            origin::write(&tx, &origin)?;
            fail("generation.origin", &tx)?;
            tx.commit().map(|()| true)
        };
        if !write().map_err(|error| self.failed(error))? {
            return Err(self.fenced(self.mark.as_ref().map(|mark| mark.position)));
        }
        self.origin = Some(origin);
        Ok(())
    }

    /// Reads committed rows through a connection of its own.
    pub fn rows(&self) -> Result<CommittedRows, Error> {
        CommittedRows::open(&self.path, self.tables.clone())
    }

    /// Writes rows and checkpoint in one transaction, if the stored checkpoint is still the one that this writer knows
    /// and nobody has opened the file after it.
    ///
    /// # Errors
    ///
    /// After an error nobody knows whether the transaction happened. It must not be tried again: open the generation
    /// anew and go on from the checkpoint that is found there.
    pub fn commit(&mut self, commit: &Commit) -> Result<(), Error> {
        if identity(&self.path) != Some(self.identity) {
            return Err(Error::Removed { path: self.path.clone() });
        }
        let found = self.try_commit(commit).map_err(|error| self.failed(error))?;
        if let Some(found) = found {
            return Err(self.fenced(found));
        }
        self.mark.clone_from(&commit.mark);
        self.origin = commit.origin.clone().or(self.origin.take());
        Ok(())
    }

    /// Answers the stored checkpoint if it is not the expected one; then nothing was written.
    fn try_commit(&self, commit: &Commit) -> rusqlite::Result<Option<Option<Position>>> {
        let tx = Transaction::new_unchecked(&self.connection, TransactionBehavior::Immediate)?;
        if !self.is_in_front(&tx)? {
            return Ok(Some(select_mark(&tx)?.map(|mark| mark.position)));
        }
        fail("commit.begun", &tx)?;
        for (view, table) in self.tables.iter().enumerate() {
            let mut upsert = tx.prepare_cached(&table.upsert)?;
            let mut delete = tx.prepare_cached(&table.delete)?;
            for (key, row) in commit.changes.sorted(view) {
                match row {
                    Some(row) => {
                        table.bind(&mut upsert, &table.key, key, 1)?;
                        table.bind(&mut upsert, &table.values, row, 1 + table.key.len())?;
                        upsert.raw_execute()?;
                    }
                    None => {
                        table.bind(&mut delete, &table.key, key, 1)?;
                        delete.raw_execute()?;
                    }
                }
            }
        }
        fail("commit.rows", &tx)?;
        if let Some(mark) = &commit.mark {
            tx.prepare_cached("INSERT OR REPLACE INTO _shadowbox_checkpoint VALUES (0, ?, ?, ?, ?)")?
                .execute(params![mark.position.0 as i64, mark.appended.microseconds(), mark.fingerprint, mark.log])?;
        }
        dead_letters::write(&tx, &commit.letters)?;
        if let Some(origin) = &commit.origin {
            origin::write(&tx, origin)?;
        }
        tx.prepare_cached("UPDATE _shadowbox_generation SET module = ?1 WHERE module <> ?1")?
            .execute([&commit.module])?;
        fail("commit.checkpoint", &tx)?;
        tx.commit()?;
        fail("commit.done", &self.connection)?;
        Ok(None)
    }

    /// False if somebody has opened the file after this writer, or has committed to it.
    fn is_in_front(&self, tx: &Transaction<'_>) -> rusqlite::Result<bool> {
        let fence: i64 = tx.prepare_cached("SELECT fence FROM _shadowbox_generation")?.query_row([], |r| r.get(0))?;
        Ok(fence == self.fence && select_mark(tx)? == self.mark)
    }

    fn fenced(&self, found: Option<Position>) -> Error {
        let expected = self.mark.as_ref().map(|mark| mark.position);
        Error::Fenced { path: self.path.clone(), expected: show(expected), found: show(found) }
    }

    fn failed(&self, error: rusqlite::Error) -> Error {
        Error::Sqlite { path: self.path.clone(), error }
    }
}

/// Reads the rows of a generation as they are committed.
pub struct CommittedRows {
    path: PathBuf,
    connection: Connection,
    tables: Arc<[Table]>,
    /// Whether a transaction is open: reads share one, which costs half as much as one each.
    reading: bool,
}

impl CommittedRows {
    /// Reads in the file of a generation with these tables.
    pub fn open(path: &Path, tables: Arc<[Table]>) -> Result<CommittedRows, Error> {
        let connection = read_only(path)?;
        connection.set_prepared_statement_cache_capacity(2 * limits::VIEWS);
        Ok(CommittedRows { path: path.to_owned(), connection, tables, reading: false })
    }

    /// A row in its encoded form. The inner error is a sentence about what was asked for: no such view, no such key.
    pub fn get(&mut self, view: u32, key: &[u8]) -> Result<Result<Option<Vec<u8>>, String>, Error> {
        let table = match table(&self.tables, view).and_then(|table| table.check_key(key).map(|()| table)) {
            Ok(table) => table,
            Err(reason) => return Ok(Err(reason)),
        };
        let mut read = || -> rusqlite::Result<Option<Vec<u8>>> {
            if !self.reading {
                self.connection.prepare_cached("BEGIN")?.execute([])?;
                self.reading = true;
            }
            let mut statement = self.connection.prepare_cached(&table.select)?;
            table.bind(&mut statement, &table.key, key, 1)?;
            let mut rows = statement.raw_query();
            rows.next()?.map(|row| table.encode(row)).transpose()
        };
        read().map(Ok).map_err(|error| Error::Sqlite { path: self.path.clone(), error })
    }

    /// Ends the transaction of the reads so far: later ones see later commits, and the write-ahead log is not kept from
    /// being reset.
    pub fn release(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.reading) {
            let ended = self.connection.prepare_cached("COMMIT").and_then(|mut end| end.execute([]));
            ended.map_err(|error| Error::Sqlite { path: self.path.clone(), error })?;
        }
        Ok(())
    }

    /// Gives memory back that reading again would fill.
    pub fn shrink(&mut self) {
        // Best effort: the cache is bounded anyway.
        let _ = self.connection.execute_batch("PRAGMA shrink_memory");
    }
}

/// Commits on a thread of its own, one commit after the other, so that its owner can go on applying meanwhile. Dropping
/// it waits for the commit that is under way: no write outlives its owner.
pub struct Committer {
    commits: Option<SyncSender<Commit>>,
    results: Receiver<Result<(), Error>>,
    under_way: bool,
    thread: Option<JoinHandle<()>>,
}

impl Committer {
    /// Takes over the writing of a generation.
    pub fn new(mut generation: Generation) -> Committer {
        let (commits, received) = sync_channel::<Commit>(1);
        let (done, results) = sync_channel(1);
        let commit_all = move || {
            for commit in received {
                let result = generation.commit(&commit);
                if commit.rests && commit.changes.rows() > limits::SMALL_COMMIT {
                    // Best effort: the cache is bounded anyway.
                    let _ = generation.connection.execute_batch("PRAGMA shrink_memory");
                }
                // Rows are freed here, beside the applying; the result must find them gone.
                drop(commit);
                if done.send(result).is_err() {
                    break;
                }
            }
            // So that the file alone is the whole view, for whoever copies it. Readers may be in the way; a swap, a promotion
            // or a stop waits for this, and not for them.
            let _ = generation.connection.busy_timeout(Duration::ZERO);
            let _ = generation.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
            fault::point("commit.tidied", generation.connection.path().unwrap_or_default());
        };
        let thread =
            std::thread::Builder::new().name("commit".into()).spawn(commit_all).expect("a thread can be started");
        Committer { commits: Some(commits), results, under_way: false, thread: Some(thread) }
    }

    /// Begins a commit.
    ///
    /// # Panics
    ///
    /// If another one is under way: [`Committer::ended`] has to be heard of it first.
    pub fn begin(&mut self, commit: Commit) {
        assert!(!self.under_way, "one commit at a time");
        self.under_way = true;
        self.commits.as_ref().expect("there until it is dropped").send(commit).expect("the thread waits for it");
    }

    /// True if a commit under way has ended; waits for that if `wait` is true.
    ///
    /// # Errors
    ///
    /// Those of [`Generation::commit`]. Nothing may be committed after one.
    pub fn ended(&mut self, wait: bool) -> Result<bool, Error> {
        if !self.under_way {
            return Ok(false);
        }
        let result = if wait {
            self.results.recv().expect("the thread answers")
        } else {
            match self.results.try_recv() {
                Ok(result) => result,
                Err(_) => return Ok(false),
            }
        };
        self.under_way = false;
        result.map(|()| true)
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        drop(self.commits.take());
        if let Some(thread) = self.thread.take() {
            // A panic in it was reported where it happened.
            let _ = thread.join();
        }
    }
}

fn fail(point: &'static str, connection: &Connection) -> rusqlite::Result<()> {
    fault::fail(point, connection.path().unwrap_or_default()).map_err(|error| {
        let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL);
        rusqlite::Error::SqliteFailure(code, Some(error.to_string()))
    })
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

fn connect(path: &Path, create: OpenFlags) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | create;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(limits::DATABASE_BUSY)?;
    connection.set_prepared_statement_cache_capacity(512);
    connection.pragma_update(None, "journal_mode", "wal")?;
    // A power cut may take the last commits, rows and checkpoint together; the log still has their events.
    connection.pragma_update(None, "synchronous", "normal")?;
    connection.pragma_update(None, "cache_size", -16_384)?;
    connection.pragma_update(None, "journal_size_limit", 64 << 20)?;
    Ok(connection)
}

pub(super) fn read_only(path: &Path) -> Result<Connection, Error> {
    let open = || {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(limits::DATABASE_BUSY)?;
        connection.pragma_update(None, "cache_size", -4096)?;
        Ok(connection)
    };
    open().map_err(|error| Error::Sqlite { path: path.to_owned(), error })
}

fn show(position: Option<Position>) -> String {
    position.map_or_else(|| "none".to_owned(), |position| position.to_string())
}

pub(super) fn select_mark(connection: &Connection) -> rusqlite::Result<Option<Mark>> {
    let sql = "SELECT position, appended, fingerprint, log FROM _shadowbox_checkpoint";
    let read = |row: &rusqlite::Row<'_>| {
        Ok(Mark {
            position: Position(row.get::<_, i64>(0)? as u64),
            appended: Time::from_microseconds(row.get(1)?).unwrap_or(Time::EPOCH),
            fingerprint: row.get(2)?,
            log: row.get(3)?,
        })
    };
    connection.prepare_cached(sql)?.query_row([], read).optional()
}

/// The table of checkpoints had a row for each source when each source had positions of its own.
fn is_former(connection: &Connection) -> rusqlite::Result<bool> {
    let sql = "SELECT count(*) FROM pragma_table_info('_shadowbox_checkpoint') WHERE name = 'source'";
    connection.prepare_cached(sql)?.query_row([], |row| row.get::<_, i64>(0)).map(|count| count > 0)
}

fn read_mark(path: &Path, connection: &Connection) -> Result<Option<Mark>, Error> {
    let failed = |error| Error::Sqlite { path: path.to_owned(), error };
    if is_former(connection).map_err(failed)? {
        return Err(Error::Former { path: path.to_owned() });
    }
    select_mark(connection).map_err(failed)
}

/// How far the generation in a file has come, while somebody writes it or not.
pub fn mark(path: &Path) -> Result<Option<Mark>, Error> {
    read_mark(path, &read_only(path)?)
}

/// The checkpoint that is stored; none in a file of the former kind.
pub(super) fn stored_checkpoint(connection: &Connection) -> rusqlite::Result<Option<Position>> {
    match select_mark(connection) {
        Ok(mark) => Ok(mark.map(|mark| mark.position)),
        Err(_) if is_former(connection)? => Ok(None),
        Err(error) => Err(error),
    }
}
