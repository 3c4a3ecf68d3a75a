//! What the rows of a generation were made from, where that is not the whole log as it was appended.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension, params};

use super::Error;
use super::generation::read_only;
use crate::config::limits;
use crate::model::Position;

/// One row, as soon as a writer has opened the file.
pub(super) const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS _shadowbox_origin (only INTEGER PRIMARY KEY CHECK (only = 0), began INTEGER NOT NULL,
        epoch INTEGER NOT NULL, forgotten INTEGER, complete_from INTEGER, damaged TEXT NOT NULL, modules TEXT NOT NULL) STRICT;";

/// What the rows of a generation were made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The log's epoch of forgettings when the generation began.
    pub began: u64,
    /// The epoch as of which the rest is known.
    pub epoch: u64,
    /// The first forgetting whose events may be in the rows.
    pub forgotten: Option<u64>,
    /// Before this position events have come without their content, by retention.
    pub complete_from: Option<Position>,
    /// First and last positions of stretches that could not be read, and were passed over.
    pub damaged: Vec<(Position, Position)>,
    /// The hashes of the modules that have made the rows, one after the other, each with the checkpoint after which it began.
    /// Empty for rows from before this was kept.
    pub modules: Vec<(Option<Position>, String)>,
}

impl Origin {
    /// A module goes on with the rows, after a checkpoint. False if it is the one that made them so far.
    pub fn goes_on(&mut self, after: Option<Position>, module: &str) -> bool {
        if self.modules.last().is_some_and(|(_, last)| last == module) {
            return false;
        }
        if self.modules.is_empty() && after.is_some() {
            // What was before it, nobody has kept.
            return false;
        }
        if self.modules.len() == limits::MODULES_KEPT {
            self.modules.clear();
        } else {
            self.modules.push((after, module.to_owned()));
        }
        true
    }

    /// True if the rows were made from something that those of the other generation lack.
    pub fn is_fuller_than(&self, other: &Origin) -> bool {
        self.complete_from < other.complete_from || other.damaged.iter().any(|stretch| !self.damaged.contains(stretch))
    }
}

/// What the rows in a file were made from; None if no writer has opened it yet.
pub fn origin(path: &Path) -> Result<Option<Origin>, Error> {
    read(&read_only(path)?).map_err(|error| Error::Sqlite { path: path.to_owned(), error })
}

pub(super) fn read(connection: &Connection) -> rusqlite::Result<Option<Origin>> {
    let exists = "SELECT count(*) > 0 FROM sqlite_schema WHERE name = '_shadowbox_origin'";
    if !connection.query_row(exists, [], |r| r.get(0))? {
        return Ok(None);
    }
    let sql = "SELECT began, epoch, forgotten, complete_from, damaged, modules FROM _shadowbox_origin";
    let read = |row: &rusqlite::Row<'_>| {
        let number = |i| row.get::<_, Option<i64>>(i).map(|number| number.map(|number| number as u64));
        Ok(Origin {
            began: number(0)?.unwrap_or(0),
            epoch: number(1)?.unwrap_or(0),
            forgotten: number(2)?,
            complete_from: number(3)?.map(Position),
            damaged: list(row, 4)?,
            modules: list(row, 5)?,
        })
    };
    connection.query_row(sql, [], read).optional()
}

fn list<T: serde::de::DeserializeOwned>(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<T> {
    serde_json::from_str(row.get_ref(column)?.as_str()?)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, error.into()))
}

pub(super) fn write(connection: &Connection, origin: &Origin) -> rusqlite::Result<()> {
    let Origin { began, epoch, forgotten, complete_from, damaged, modules } = origin;
    let number = |number: Option<u64>| number.map(|number| number as i64);
    let damaged = serde_json::to_string(damaged).expect("plain data");
    let modules = serde_json::to_string(modules).expect("plain data");
    connection
        .prepare_cached("INSERT OR REPLACE INTO _shadowbox_origin VALUES (0, ?, ?, ?, ?, ?, ?)")?
        .execute(params![
            *began as i64,
            *epoch as i64,
            number(*forgotten),
            number(complete_from.map(|position| position.0)),
            damaged,
            modules
        ])
        .map(drop)
}
