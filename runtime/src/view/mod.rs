//! Views: rows, the files that hold them, and the only transaction that changes them.
//!
//! Each generation of a projection is one SQLite file with its views, its checkpoint, what it was made from, and its dead
//! letters ([`Generation`], [`Origin`], [`DeadLetters`]). The [`Catalogue`] says which generation is live. Reading is apart: [`query`]
//! is a typed query of one view, [`readers`] runs it, [`sql`] runs SQL over all of them, [`render`] shows rows,
//! [`compare`] tells generations apart.

mod catalogue;
mod changes;
pub mod compare;
mod dead_letters;
mod generation;
mod origin;
mod pattern;
pub mod query;
pub mod readers;
pub mod render;
mod row;
mod scratch;
pub mod sql;

use std::path::PathBuf;

pub use catalogue::{Catalogue, GenerationRecord, ProjectionRecord, Role};
pub use changes::Changes;
pub use dead_letters::{DeadLetter, DeadLetters, LetterChanges, LetterCounts, LetterState, Selector};
pub use generation::{Commit, CommittedRows, Committer, Generation, Mark, mark};
pub use origin::{Origin, origin};
pub use row::Table;
pub use scratch::Scratch;

/// What can go wrong with stored views.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database of a generation refused.
    #[error("the view file {path:?}: {error}{}", if is_damage(error) { "; it is damaged, rebuild the projection" } else { "" })]
    Sqlite {
        /// The generation's file.
        path: PathBuf,
        /// What SQLite said.
        error: rusqlite::Error,
    },
    /// The catalogue refused.
    #[error("the catalogue {path:?}: {error}")]
    Catalogue {
        /// The catalogue's file.
        path: PathBuf,
        /// What SQLite said.
        error: sqlx::Error,
    },
    /// A directory or a file cannot be made or removed.
    #[error("{path:?}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The file is not where it was opened: what is committed to it, nobody would see.
    #[error("the view file {path:?} was removed or replaced while it was written; rebuild the projection")]
    Removed {
        /// The generation's file.
        path: PathBuf,
    },
    /// The catalogue is gone, but not what it is about.
    #[error(
        "the catalogue {catalogue:?} is missing, but there are generations in {views:?}; restore it, or remove that \
         directory, and all views are built anew"
    )]
    NoCatalogue {
        /// Where it should be.
        catalogue: PathBuf,
        /// Where generations are.
        views: PathBuf,
    },
    /// Somebody else committed to this generation in between: this writer is behind the fence and must stop.
    #[error("another writer has taken over {path:?}: its checkpoint is {found}, this writer expected {expected}")]
    Fenced {
        /// The generation's file.
        path: PathBuf,
        /// The checkpoint that the writer had.
        expected: String,
        /// The checkpoint that is stored.
        found: String,
    },
    /// The file is of the time before the log had one order: its checkpoint means nothing now.
    #[error("the rows of {path:?} were made before the log had one order; they are rebuilt")]
    Former {
        /// The generation's file.
        path: PathBuf,
    },
    /// The file holds other views than the module declares, or is not one of ours.
    #[error("{path:?} does not hold the views of this module: {reason}; rebuild the projection")]
    Mismatch {
        /// The generation's file.
        path: PathBuf,
        /// What differs.
        reason: String,
    },
}

impl Error {
    /// True for what may go away by itself or by an operator's hand: a lock, a full disk, a missing permission. Being
    /// fenced off, a damaged file, or one that holds something else do not.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Sqlite { error, .. } => !is_damage(error),
            Error::File { .. } => true,
            _ => false,
        }
    }
}

/// True if SQLite says that the file is not what it was, or what it holds cannot be read as what was stored.
fn is_damage(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    error.sqlite_error_code().is_none_or(|code| matches!(code, DatabaseCorrupt | NotADatabase))
}
