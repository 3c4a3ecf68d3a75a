//! Projections: where plugins, views and the log meet.
//!
//! [`Manager`] is the handle on one projection. What runs behind it (`running.rs`) keeps a [`lifecycle`] (a pure state
//! machine that says what to do), and a worker (`worker.rs`) for each generation that is being followed: the loop read, apply, commit. What it holds meanwhile is a
//! session (`session.rs`, and `failure.rs` for events that cannot be applied); a cursor (`cursor.rs`) takes the events that
//! are wanted. [`Reached`] says to readers how far a generation is, and [`Stalls`] notices who has lag and does not move.

mod cursor;
mod failure;
pub mod lifecycle;
mod manager;
mod reached;
mod replay;
mod running;
mod session;
mod shadow;
mod stalls;
mod worker;

pub use failure::{Outcome, Refusal, Treatment};
pub use manager::{LiveView, Manager, Shared, Snapshot, SnapshotGeneration, at_rest, module_id};
pub use reached::Reached;
pub use replay::{Replay, replay};
pub use session::{check_file, made_from, origin_now};
pub use shadow::{Applied, Fold, Shadow};
pub use stalls::Stalls;
pub use worker::{Activity, Progress, Task};

use std::path::PathBuf;

use crate::model::{EventName, FailureReport, Position};
use crate::{log, plugin, view};

/// Why a projection stopped, or could not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See [`log::Error`].
    #[error(transparent)]
    Log(#[from] log::Error),
    /// See [`view::Error`].
    #[error(transparent)]
    View(#[from] view::Error),
    /// See [`plugin::Error`].
    #[error(transparent)]
    Plugin(#[from] plugin::Error),
    /// The plugin could not apply this event. Everything before it is committed.
    #[error(
        "event {id:?} ({event_type}) of source {source_name:?} at position {position} could not be applied: {reason}",
        id = _0.event.id,
        event_type = _0.event.event_type,
        position = _0.event.position,
        source_name = _0.event.source,
        reason = _0.cause.message
    )]
    Event(Box<FailureReport>),
    /// An event would have to be set aside, and there is no room. Everything before it is committed.
    #[error(
        "event {id:?} ({event_type}) of source {source_name:?} at position {position} would be set aside, but there are \
         {max} dead letters already, as many as failures.max_dead_letters allows; retry or discard some",
        id = event.id,
        event_type = event.event_type,
        position = event.position,
        source_name = event.source
    )]
    Full {
        /// The event that there is no room for.
        event: Box<EventName>,
        /// How many there may be.
        max: u64,
    },
    /// A module that was to take over failed before a batch of it was committed. Which of the events it was is not
    /// looked for: nothing of the module is kept.
    #[error("its first batch failed, {events} events from position {position} on: {reason}")]
    FirstBatch {
        /// How many events were in the batch.
        events: usize,
        /// The first event's position.
        position: Position,
        /// What the plugin said, or how it failed.
        reason: String,
    },
    /// The log does not have the events that the view was built from.
    #[error(
        "the log is not the one that {file:?} was built from: the view is complete to position {position}, \
         where log {expected} had event {fingerprint:016x}; {found}; restore that log, or rebuild the projection"
    )]
    LogReplaced {
        /// The generation's file.
        file: PathBuf,
        /// The checkpoint in it.
        position: Position,
        /// The identity of the log that the view knows.
        expected: String,
        /// The digest of the event that the view knows.
        fingerprint: i64,
        /// What the log here has instead.
        found: String,
    },
    /// A view belongs to another projection.
    #[error(
        "view {view:?} belongs to projection {owner:?} now; rename it there, or take that module away and its view"
    )]
    Taken {
        /// Its name.
        view: String,
        /// Whose it is.
        owner: String,
    },
    /// Something was forgotten since the session began: what was read before is to be read again.
    #[error("events were forgotten meanwhile; what was read of the log is read again")]
    Epoch,
    /// The log does not have an event that it had.
    #[error("the log has no event at position {position} any more; restore it from a copy")]
    Missing {
        /// Where.
        position: Position,
    },
    /// A batch could not be handed over for a reason of the host's.
    #[error("{0}")]
    Host(String),
}
