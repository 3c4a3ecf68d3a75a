//! Logs of the former format, in which each source had a table and positions of its own, become one sequence.
//!
//! All events are appended to a new file, in the order in which projections took them; then the files change their names.
//! A conversion that was interrupted goes on where it stood: what is in the new file already is appended again as a
//! duplicate. The former file stays as `log.former.sqlite`, for whoever wants to go back; nothing reads it any more.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::former::Former;
use super::read::Failures;
use super::{Error, EventLog, FILE};
use crate::config::limits;
use crate::fault;

const NEW: &str = "log.new.sqlite";
pub(super) const FORMER: &str = "log.former.sqlite";

/// How often a conversion says how far it is.
const SAY: Duration = Duration::from_secs(2);

/// The format in which each source had positions of its own.
pub(super) const FORMER_FORMAT: i64 = 1;

/// Held while a log is opened or converted. The lock is the operating system's: it goes with the process.
pub(super) fn lock(data: &Path) -> Result<fs::File, Error> {
    let path = data.join("log.convert");
    let lock = fs::File::options().write(true).create(true).truncate(false).open(&path);
    let locked = lock.and_then(|lock| lock.lock().map(|()| lock));
    locked.map_err(|error| Error::File { path, error })
}

/// Ends a conversion that was interrupted between its last two steps.
pub(super) fn resume(data: &Path) -> Result<(), Error> {
    if !data.join(FILE).exists() && data.join(FORMER).exists() && data.join(NEW).exists() {
        rename(data, NEW, FILE)?;
    }
    Ok(())
}

/// Converts the log of a directory, which is of the former format. Nobody else may have it open; [`lock`] is held.
pub(super) fn convert(data: &Path) -> Result<(), Error> {
    let path = data.join(FILE);
    let mut former = Former::open(&path, &generations(data))?;
    let events = former.len();
    tracing::info!(
        events,
        identity = former.identity(),
        "the log is of the former format; its events are put into one order"
    );
    let log = EventLog::open_file(data, NEW, false)?;
    let (mut done, mut said) = (0, Instant::now());
    while let Some(batch) = former.next_batch(limits::APPEND_EVENTS, limits::APPEND_BYTES)? {
        done += batch.len() as u64;
        log.append(batch)?;
        log.seal(0)?;
        fault::point("convert.appended", &path.to_string_lossy());
        if said.elapsed() >= SAY {
            said = Instant::now();
            tracing::info!(done, events, "converting the log");
        }
    }
    drop(former);
    if log.head_now().next != events {
        let what = format!("{} of its {events} events have been converted", log.head_now().next);
        return Err(Error::Conversion { path, what });
    }
    log.tidy();
    drop(log);
    close(&data.join(FILE))?;
    close(&data.join(NEW))?;
    rename(data, FILE, FORMER)?;
    fault::point("convert.moved", &path.to_string_lossy());
    rename(data, NEW, FILE)?;
    fault::point("convert.done", &path.to_string_lossy());
    tracing::info!(events, former = FORMER, "the log is converted; the former file is not needed any more");
    Ok(())
}

/// The files of the live generations, whose records say in which order the sources were taken. Without a catalogue that
/// can be read there are no live generations either.
fn generations(data: &Path) -> Vec<PathBuf> {
    let live = || -> rusqlite::Result<Vec<PathBuf>> {
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE;
        let catalogue = Connection::open_with_flags(data.join("catalogue.sqlite"), flags)?;
        let sql = "SELECT projection, number FROM generations WHERE role = 'live' ORDER BY projection";
        let mut statement = catalogue.prepare(sql)?;
        let file = |row: &rusqlite::Row<'_>| {
            let (projection, number): (String, i64) = (row.get(0)?, row.get(1)?);
            Ok(data.join("views").join(projection).join(format!("{number}.sqlite")))
        };
        statement.query_map([], file)?.collect()
    };
    live().unwrap_or_default()
}

/// Has the file alone be all of the database.
fn close(path: &Path) -> Result<(), Error> {
    let close = || -> rusqlite::Result<()> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(limits::DATABASE_BUSY)?;
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
        connection.pragma_update_and_check(None, "journal_mode", "delete", |_| Ok(()))
    };
    close().map_err(|error| Failures(path.to_owned()).sqlite(error))
}

/// A name that is changed is changed for good only once the directory is on the disk.
fn rename(data: &Path, from: &str, to: &str) -> Result<(), Error> {
    let rename = || {
        fs::rename(data.join(from), data.join(to))?;
        fs::File::open(data)?.sync_all()
    };
    rename().map_err(|error| Error::File { path: data.join(from), error })
}
