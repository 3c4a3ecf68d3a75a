//! Dead letters: events that a projection could not apply, or that came after such a one in its stream. They are rows
//! in the file of a generation, and [`super::Generation::commit`] writes them together with its rows and checkpoint.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, Row, params};
use serde::{Deserialize, Serialize};

use super::Error;
use super::generation::read_only;
use crate::model::{Cause, EventName, Position, Time};

/// Numbers are never given out twice: a number that somebody wrote down never means another event. The content of an
/// event stays in the log. Only letters whose event was tried have a cause.
pub(super) const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS _shadowbox_dead_letters (number INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL,
        position INTEGER NOT NULL, stream TEXT NOT NULL, type TEXT NOT NULL, id TEXT NOT NULL, time INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('parked', 'skipped')), module TEXT, message TEXT, backtrace TEXT,
        output TEXT, UNIQUE (source, position)) STRICT;
    CREATE INDEX IF NOT EXISTS _shadowbox_dead_letters_stream ON _shadowbox_dead_letters (stream, source, number);";

/// Why an event is a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LetterState {
    /// It, or an earlier event of its stream, could not be applied. Its stream waits.
    Parked,
    /// It could not be applied, and its stream went on without it.
    Skipped,
}

impl LetterState {
    /// As it is stored and shown.
    pub fn name(self) -> &'static str {
        match self {
            LetterState::Parked => "parked",
            LetterState::Skipped => "skipped",
        }
    }
}

/// A dead letter as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// In the order in which they came; never used again in a generation.
    pub number: u64,
    /// Parked or skipped.
    pub state: LetterState,
    /// The event.
    #[serde(flatten)]
    pub event: EventName,
    /// Why it could not be applied; None if it only waits for an earlier one of its stream.
    #[serde(flatten)]
    pub cause: Option<Cause>,
}

/// What a commit does to the dead letters.
#[derive(Debug, Default)]
pub struct LetterChanges {
    /// New ones, in order.
    pub add: Vec<(EventName, LetterState, Option<Cause>)>,
    /// Those that failed again, and why.
    pub explain: Vec<(u64, Cause)>,
    /// Those that are applied now, or given up.
    pub remove: Vec<u64>,
}

/// How many dead letters a generation has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LetterCounts {
    /// Waiting, stream by stream.
    pub parked: u64,
    /// Left out.
    pub skipped: u64,
}

impl LetterCounts {
    /// Both.
    pub fn all(self) -> u64 {
        self.parked + self.skipped
    }

    /// The one for a state.
    pub fn of(&mut self, state: LetterState) -> &mut u64 {
        match state {
            LetterState::Parked => &mut self.parked,
            LetterState::Skipped => &mut self.skipped,
        }
    }
}

/// Which dead letters are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// All of them.
    All,
    /// Those of a stream. The source can be left out if there is only one with such a stream among them.
    Stream {
        /// The source.
        source: Option<String>,
        /// The stream.
        stream: String,
    },
    /// One.
    Number(u64),
}

/// What was selected, or a sentence about why it cannot be.
type Selected = Result<Vec<DeadLetter>, String>;

pub(super) fn write(connection: &Connection, changes: &LetterChanges) -> rusqlite::Result<()> {
    for (event, state, cause) in &changes.add {
        connection
            .prepare_cached(
                "INSERT INTO _shadowbox_dead_letters
                 (source, position, stream, type, id, time, state, module, message, backtrace, output)
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            )?
            .execute(params![
                event.source,
                event.position.0 as i64,
                event.stream,
                event.event_type,
                event.id,
                event.time.microseconds(),
                state.name(),
                cause.as_ref().map(|c| &c.module_hash),
                cause.as_ref().map(|c| &c.message),
                cause.as_ref().and_then(|c| c.backtrace.as_ref()),
                cause.as_ref().and_then(|c| c.output.as_ref()),
            ])?;
    }
    for (number, cause) in &changes.explain {
        connection
            .prepare_cached(
                "UPDATE _shadowbox_dead_letters SET module = ?, message = ?, backtrace = ?, output = ? WHERE number = ?",
            )?
            .execute(params![cause.module_hash, cause.message, cause.backtrace, cause.output, *number as i64])?;
    }
    for number in &changes.remove {
        connection.prepare_cached("DELETE FROM _shadowbox_dead_letters WHERE number = ?")?.execute([*number as i64])?;
    }
    Ok(())
}

/// Reads the dead letters of a generation, while its worker runs or not.
pub struct DeadLetters {
    path: PathBuf,
    connection: Connection,
    /// False for a file from before there were dead letters, which nobody has written to since.
    exist: bool,
}

const COLUMNS: &str = "number, state, source, position, stream, type, id, time, module, message, backtrace, output";

impl DeadLetters {
    /// Opens the file of a generation for reading.
    pub fn open(file: &Path) -> Result<DeadLetters, Error> {
        let connection = read_only(file)?;
        let sql = "SELECT count(*) FROM sqlite_schema WHERE name = '_shadowbox_dead_letters'";
        let exist = connection.query_row(sql, [], |r| r.get::<_, i64>(0));
        let exist = exist.map_err(|error| Error::Sqlite { path: file.to_owned(), error })? > 0;
        Ok(DeadLetters { path: file.to_owned(), connection, exist })
    }

    /// How many there are.
    pub fn counts(&self) -> Result<LetterCounts, Error> {
        let sql = "SELECT state, count(*) FROM _shadowbox_dead_letters GROUP BY state";
        let mut counts = LetterCounts::default();
        for (state, count) in self.rows(sql, [], |r| Ok((state(r, 0)?, r.get::<_, i64>(1)? as u64)))? {
            *counts.of(state) = count;
        }
        Ok(counts)
    }

    /// The streams that wait, as sources and streams. Events without a stream wait alone, so they are none.
    pub fn parked_streams(&self) -> Result<Vec<(String, String)>, Error> {
        let sql = "SELECT DISTINCT source, stream FROM _shadowbox_dead_letters WHERE state = 'parked' AND stream <> ''";
        self.rows(sql, [], |r| Ok((r.get(0)?, r.get(1)?)))
    }

    /// At most `limit` letters with numbers above `after`, in order.
    pub fn list(&self, after: u64, limit: u64) -> Result<Vec<DeadLetter>, Error> {
        let sql = format!("SELECT {COLUMNS} FROM _shadowbox_dead_letters WHERE number > ? ORDER BY number LIMIT ?");
        self.rows(&sql, [after as i64, limit as i64], letter)
    }

    /// One letter.
    pub fn get(&self, number: u64) -> Result<Option<DeadLetter>, Error> {
        Ok(self.list(number.saturating_sub(1), 1)?.into_iter().find(|letter| letter.number == number))
    }

    /// The letters that are meant, in order, or a sentence about why that cannot be told. There is at least one, unless
    /// all are meant.
    pub fn select(&self, selector: &Selector) -> Result<Selected, Error> {
        match selector {
            Selector::All => self.list(0, i64::MAX as u64).map(Ok),
            Selector::Number(number) => {
                let none = || format!("there is no dead letter {number}; see shadowbox dead-letters list");
                Ok(self.get(*number)?.map(|letter| vec![letter]).ok_or_else(none))
            }
            Selector::Stream { source, stream } => {
                let sql = format!(
                    "SELECT {COLUMNS} FROM _shadowbox_dead_letters WHERE stream = ?1 AND (?2 IS NULL OR source = ?2)
                     ORDER BY number"
                );
                let letters = self.rows(&sql, params![stream, source], letter)?;
                let Some(first) = letters.first() else {
                    return Ok(Err(format!(
                        "there are no dead letters of stream {stream:?}; see shadowbox dead-letters list"
                    )));
                };
                match letters.iter().find(|letter| letter.event.source != first.event.source) {
                    Some(other) => Ok(Err(format!(
                        "stream {stream:?} has dead letters of the sources {:?} and {:?}; say which, with --source",
                        first.event.source, other.event.source
                    ))),
                    None => Ok(Ok(letters)),
                }
            }
        }
    }

    /// The number of the first parked letter of the same stream, if it is an earlier one: that one is to be dealt with
    /// before.
    pub fn waits_for(&self, letter: &DeadLetter) -> Result<Option<u64>, Error> {
        if letter.state == LetterState::Skipped || letter.event.stream.is_empty() {
            return Ok(None);
        }
        let sql = "SELECT number FROM _shadowbox_dead_letters
                   WHERE stream = ? AND source = ? AND state = 'parked' AND number < ? ORDER BY number LIMIT 1";
        let (stream, source) = (&letter.event.stream, &letter.event.source);
        let first =
            self.rows(sql, params![stream, source, letter.number as i64], |r| Ok(r.get::<_, i64>(0)? as u64))?;
        Ok(first.first().copied())
    }

    fn rows<T>(
        &self,
        sql: &str,
        parameters: impl rusqlite::Params,
        each: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, Error> {
        if !self.exist {
            return Ok(Vec::new());
        }
        let read = || {
            let mut statement = self.connection.prepare_cached(sql)?;
            statement.query_map(parameters, each)?.collect::<rusqlite::Result<Vec<T>>>()
        };
        read().map_err(|error| Error::Sqlite { path: self.path.clone(), error })
    }
}

fn state(row: &Row<'_>, column: usize) -> rusqlite::Result<LetterState> {
    // The table's check allows no third.
    Ok(if row.get_ref(column)?.as_str()? == "skipped" { LetterState::Skipped } else { LetterState::Parked })
}

fn letter(row: &Row<'_>) -> rusqlite::Result<DeadLetter> {
    let module: Option<String> = row.get(8)?;
    let cause = match module {
        Some(module_hash) => Some(Cause {
            module_hash,
            message: row.get::<_, Option<String>>(9)?.unwrap_or_default(),
            backtrace: row.get(10)?,
            output: row.get(11)?,
        }),
        None => None,
    };
    Ok(DeadLetter {
        number: row.get::<_, i64>(0)? as u64,
        state: state(row, 1)?,
        event: EventName {
            source: row.get(2)?,
            position: Position(row.get::<_, i64>(3)? as u64),
            stream: row.get(4)?,
            event_type: row.get(5)?,
            id: row.get(6)?,
            time: Time::from_microseconds(row.get(7)?).unwrap_or(Time::EPOCH),
        },
        cause,
    })
}
