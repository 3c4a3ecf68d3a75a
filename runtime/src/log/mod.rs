//! Event logs: where events come from, in order, with positions.
//!
//! Today there is one kind, the embedded log ([`EventLog`], one SQLite file). What holds for it, and must hold for
//! every other kind: positions of a source strictly increase in commit order; an event that was read once is read
//! again, the same, at the same position; a log has an identity, so that a view can tell when it was replaced.

mod chunks;
pub mod cloudevents;
mod sqlite;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::model::{Position, Time};

pub use chunks::Chunk;
pub use sqlite::EventLog;

/// What can go wrong with a log.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database refused: full disk, no permission, held by somebody else for too long.
    #[error("the event log {path:?}: {error}{}", if is_damage(error) { "; it is damaged, restore it from a copy" } else { "" })]
    Sqlite {
        /// The log's file.
        path: PathBuf,
        /// What SQLite said.
        error: rusqlite::Error,
    },
    /// The file is not where it was opened: what is appended to it, nobody would see again.
    #[error("the event log {path:?} was removed or replaced while it was open; put it back, and restart shadowbox")]
    Removed {
        /// The log's file.
        path: PathBuf,
    },
    /// The directory of the log cannot be made.
    #[error("cannot create the directory {path:?}: {error}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The file is an SQLite database, but not a log that this version can read.
    #[error("{path:?} is not an event log of this version of shadowbox (format {found}, expected {expected})")]
    Format {
        /// The file.
        path: PathBuf,
        /// The format number in it.
        found: i64,
        /// The format number that this version writes.
        expected: i64,
    },
    /// An event is beyond a limit; nothing of its batch was appended.
    #[error("event {id:?}: {what} has {bytes} bytes; the limit is {limit}")]
    TooLarge {
        /// The event's id, shortened.
        id: String,
        /// Which part of it.
        what: &'static str,
        /// The part's size.
        bytes: usize,
        /// The limit, see [`crate::config::limits`].
        limit: usize,
    },
}

impl Error {
    /// True for what may go away by itself or by an operator's hand: a lock, a full disk, a missing permission.
    pub fn is_transient(&self) -> bool {
        matches!(self, Error::Sqlite { error, .. } if !is_damage(error)) || matches!(self, Error::Directory { .. })
    }
}

/// True if SQLite says that the file is not what it was, or what it holds cannot be read as what was stored.
fn is_damage(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    error.sqlite_error_code().is_none_or(|code| matches!(code, DatabaseCorrupt | NotADatabase))
}

/// The newest event of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its position.
    pub position: Position,
    /// Its time.
    pub time: Time,
    /// The time of the source's first event; with it, lag can be told in seconds before anything was applied.
    pub first_time: Time,
}

/// The sources that have events, and their heads.
pub type Heads = BTreeMap<Arc<str>, Head>;

/// What an append did with one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The event's source.
    pub source: String,
    /// Where it stands.
    pub position: Position,
    /// False if the log had an event of this source and id already; then nothing was appended.
    pub new: bool,
}
