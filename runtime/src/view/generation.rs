//! One generation of a projection: a file with its views, its checkpoint and its merge record, and the only
//! transaction that changes them.
//!
//! rusqlite instead of sqlx: a commit writes tens of thousands of rows, 1 us each through prepared statements.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use rusqlite::{Connection, OpenFlags, OptionalExtension, TransactionBehavior, params};

use super::changes::{Changes, table};
use super::row::Table;
use super::{Error, dead_letters};
use crate::config::limits;
use crate::fault;
use crate::manifest::{Manifest, hex};
use crate::model::{Checkpoint, Position, Time};

/// Shadowbox's own tables stand beside the views, so that one transaction covers both.
const SCHEMA: &str = "
    CREATE TABLE _shadowbox_generation (fence INTEGER NOT NULL, module TEXT NOT NULL, manifest TEXT NOT NULL) STRICT;
    CREATE TABLE _shadowbox_checkpoint (source TEXT PRIMARY KEY, position INTEGER NOT NULL, time INTEGER NOT NULL,
        fingerprint INTEGER NOT NULL, log TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE _shadowbox_order (number INTEGER PRIMARY KEY, runs BLOB NOT NULL) STRICT;";

/// How far a generation has come in one source, and how to tell that it is still the same log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The last event applied or passed over.
    pub position: Position,
    /// Its time.
    pub time: Time,
    /// A digest of it.
    pub fingerprint: i64,
    /// The identity of the log that it is in.
    pub log: String,
}

/// Consecutive events taken from one source: those after the run before, up to and including `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The source's number: its place among the manifest's sources, which are in order of their names.
    pub source: u16,
    /// The last position of the run.
    pub to: Position,
}

/// Everything that one commit writes.
pub struct Commit {
    /// Where each source that moved stands now.
    pub marks: Vec<(Arc<str>, Mark)>,
    /// The rows.
    pub changes: Arc<Changes>,
    /// The order in which the sources were taken; empty for a projection of one source.
    pub runs: Vec<Run>,
    /// The hash of the module that made the changes.
    pub module: String,
    /// Nothing follows for now.
    pub rests: bool,
    /// What becomes a dead letter, and what is none any more.
    pub letters: dead_letters::LetterChanges,
}

/// A generation's file, opened by its one writer.
pub struct Generation {
    path: PathBuf,
    /// Device and inode of the file.
    identity: (u64, u64),
    connection: Connection,
    tables: Arc<[Table]>,
    fence: i64,
    marks: Vec<(Arc<str>, Mark)>,
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
        let stored = Manifest::parse(&stored).map_err(|e| mismatch(e.to_string()))?;
        if stored.views != manifest.views {
            return Err(mismatch("the columns, keys or indexes differ".into()));
        }
        // Files from before there were dead letters have no table for them.
        connection.execute_batch(dead_letters::SCHEMA).map_err(failed)?;
        let marks = read_marks(&connection).map_err(failed)?;
        let identity = identity(path).ok_or_else(|| Error::Removed { path: path.to_owned() })?;
        Ok(Generation { path: path.to_owned(), identity, connection, tables, fence, marks })
    }

    /// The views' tables.
    pub fn tables(&self) -> &Arc<[Table]> {
        &self.tables
    }

    /// How far this generation has come, by source.
    pub fn marks(&self) -> &[(Arc<str>, Mark)] {
        &self.marks
    }

    /// The same as a checkpoint.
    pub fn checkpoint(&self) -> Checkpoint {
        checkpoint(&self.marks)
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
            return Err(Error::Fenced { path: self.path.clone(), expected: self.checkpoint(), found });
        }
        for (source, mark) in &commit.marks {
            match self.marks.iter_mut().find(|(s, _)| s == source) {
                Some((_, old)) => *old = mark.clone(),
                None => self.marks.push((source.clone(), mark.clone())),
            }
        }
        Ok(())
    }

    /// Answers the stored checkpoint if it is not the expected one; then nothing was written.
    fn try_commit(&mut self, commit: &Commit) -> rusqlite::Result<Option<Checkpoint>> {
        let tx = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let fence: i64 = tx.prepare_cached("SELECT fence FROM _shadowbox_generation")?.query_row([], |r| r.get(0))?;
        let found = checkpoint(&read_marks(&tx)?);
        if fence != self.fence || found != checkpoint(&self.marks) {
            return Ok(Some(found));
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
        let mut upsert = tx.prepare_cached(
            "INSERT INTO _shadowbox_checkpoint VALUES (?, ?, ?, ?, ?) ON CONFLICT (source) DO UPDATE SET
             position = excluded.position, time = excluded.time, fingerprint = excluded.fingerprint, log = excluded.log",
        )?;
        for (source, mark) in &commit.marks {
            upsert.execute(params![
                &**source,
                mark.position.0 as i64,
                mark.time.microseconds(),
                mark.fingerprint,
                mark.log
            ])?;
        }
        drop(upsert);
        if !commit.runs.is_empty() {
            let runs: Vec<(u16, u64)> = commit.runs.iter().map(|run| (run.source, run.to.0)).collect();
            let runs = rmp_serde::to_vec(&runs).expect("writing to memory cannot fail");
            tx.prepare_cached("INSERT INTO _shadowbox_order (runs) VALUES (?)")?.execute([runs])?;
        }
        dead_letters::write(&tx, &commit.letters)?;
        tx.prepare_cached("UPDATE _shadowbox_generation SET module = ?1 WHERE module <> ?1")?
            .execute([&commit.module])?;
        fail("commit.checkpoint", &tx)?;
        tx.commit()?;
        fail("commit.done", &self.connection)?;
        Ok(None)
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
            // So that the file alone is the whole view, for whoever copies it. Readers may be in the way.
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

pub(super) fn checkpoint(marks: &[(Arc<str>, Mark)]) -> Checkpoint {
    marks.iter().map(|(source, mark)| (&**source, mark.position)).collect()
}

pub(super) fn read_marks(connection: &Connection) -> rusqlite::Result<Vec<(Arc<str>, Mark)>> {
    let sql = "SELECT source, position, time, fingerprint, log FROM _shadowbox_checkpoint";
    let mut statement = connection.prepare_cached(sql)?;
    let marks = statement.query_map([], |row| {
        let mark = Mark {
            position: Position(row.get::<_, i64>(1)? as u64),
            time: Time::from_microseconds(row.get(2)?).unwrap_or(Time::EPOCH),
            fingerprint: row.get(3)?,
            log: row.get(4)?,
        };
        Ok((row.get::<_, String>(0)?.into(), mark))
    })?;
    marks.collect()
}

/// Reads the order in which another generation took its sources, and follows it while it grows.
pub struct Order {
    path: PathBuf,
    connection: Connection,
    next: i64,
}

impl Order {
    /// Opens the file of a generation for reading.
    pub fn open(path: &Path) -> Result<Order, Error> {
        Ok(Order { path: path.to_owned(), connection: read_only(path)?, next: 0 })
    }

    /// How far that generation has come, by source.
    pub fn marks(&self) -> Result<Vec<(Arc<str>, Mark)>, Error> {
        read_marks(&self.connection).map_err(|error| self.failed(error))
    }

    /// The same as a checkpoint.
    pub fn checkpoint(&self) -> Result<Checkpoint, Error> {
        self.marks().map(|marks| checkpoint(&marks))
    }

    /// The sources of that generation, in the order by which runs number them.
    pub fn sources(&self) -> Result<Vec<String>, Error> {
        let sql = "SELECT manifest FROM _shadowbox_generation";
        let manifest: String = self.connection.query_row(sql, [], |r| r.get(0)).map_err(|error| self.failed(error))?;
        let manifest = Manifest::parse(&manifest)
            .map_err(|e| Error::Mismatch { path: self.path.clone(), reason: e.to_string() })?;
        Ok(manifest.sources.into_iter().map(|s| s.source).collect())
    }

    /// The runs of the next recorded commit, or None if there is none yet.
    pub fn next_runs(&mut self) -> Result<Option<Vec<Run>>, Error> {
        let sql = "SELECT number, runs FROM _shadowbox_order WHERE number > ? ORDER BY number LIMIT 1";
        let row: Option<(i64, Vec<u8>)> = self
            .connection
            .prepare_cached(sql)
            .and_then(|mut s| s.query_row([self.next], |r| Ok((r.get(0)?, r.get(1)?))).optional())
            .map_err(|error| self.failed(error))?;
        let Some((number, bytes)) = row else { return Ok(None) };
        let runs: Vec<(u16, u64)> = rmp_serde::from_slice(&bytes).map_err(|error| Error::Mismatch {
            path: self.path.clone(),
            reason: format!("its merge record {number} ({}) cannot be read: {error}", hex(&bytes)),
        })?;
        self.next = number;
        Ok(Some(runs.into_iter().map(|(source, to)| Run { source, to: Position(to) }).collect()))
    }

    fn failed(&self, error: rusqlite::Error) -> Error {
        Error::Sqlite { path: self.path.clone(), error }
    }
}
