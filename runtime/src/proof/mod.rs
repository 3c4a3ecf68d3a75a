//! Proof: whether what is live is right, and what would become of it. Both fold the log in the shadow, in the process
//! that asks and beside a running runtime; they need no lock, promote nothing, and leave nothing behind.
//!
//! [`verify()`] compares the live generation with the fold of the log, [`plan()`] with what another module would make of
//! it.

mod plan;
mod schema;
mod verify;

use std::path::PathBuf;

use serde::Serialize;

pub use plan::{Action, Failed, Live, Planned, Request as PlanRequest, Run, View as PlannedView, plan};
pub use schema::Change;
pub use verify::{Differing, Request as VerifyRequest, Verified, View as VerifiedView, verify};

use crate::config::Config;
use crate::log::{self, EventLog};
use crate::manifest::Manifest;
use crate::model::Position;
use crate::plugin::{self, Engine, Module};
use crate::projection;
use crate::view::compare::Snapshot;
use crate::view::{self, Catalogue, GenerationRecord, ProjectionRecord, Role, Scratch};

/// Why nothing can be proved.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Error {
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error(transparent)]
    View(#[from] view::Error),
    #[error(transparent)]
    Plugin(#[from] plugin::Error),
    #[error(transparent)]
    Projection(projection::Error),
    #[error("there is no projection {name:?}; {known}")]
    UnknownProjection { name: String, known: String },
    #[error("generation {generation} of {name:?} is at {here}, not at {at}{waited}")]
    NotYet { name: String, generation: u64, here: String, at: Position, waited: String },
    #[error("the module {hash} that made the last commit cannot be run: {error}; put it back into {path:?}")]
    Module { hash: String, path: PathBuf, error: plugin::Error },
    #[error(
        "generation {generation} of {name:?} may have what was forgotten since its rows were made (forgetting {number}); \
         nobody can tell before it is rebuilt, see shadowbox status"
    )]
    Forgotten { name: String, generation: u64, number: u64 },
    #[error(
        "before position {before} the log has lost content that the rows of generation {generation} of {name:?} were made \
         from, since its source keeps it no longer; only generations that were begun later can be replayed"
    )]
    NotKept { name: String, generation: u64, before: Position },
    #[error(
        "the rows of generation {generation} of {name:?} were made without the events {first} to {last}, which could not be \
         read; rebuild it once the log is restored"
    )]
    Damaged { name: String, generation: u64, first: Position, last: Position },
    #[error("events were forgotten meanwhile, or are about to be; ask again, and if it stays so, see shadowbox log")]
    UnderWay,
    #[error("interrupted; nothing was changed")]
    Interrupted,
    #[error("{0}")]
    Other(String),
}

impl From<projection::Error> for Error {
    fn from(error: projection::Error) -> Error {
        match error {
            projection::Error::Epoch => Error::UnderWay,
            error => Error::Projection(error),
        }
    }
}

/// How far a proof has come: what it is doing, how much of it is done, and of how much.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Progress {
    pub doing: &'static str,
    pub done: u64,
    pub of: u64,
}

/// Hears of progress; ends the proof by answering false.
pub type Tell = Box<dyn FnMut(Progress) -> bool + Send>;

/// Rows between two looks whether somebody wants the proof to end.
const LOOK: u64 = 1_000;

/// What a comparison asks for each row, as progress of one view.
fn rows(tell: &mut Tell, doing: &'static str) -> impl FnMut() -> bool {
    let mut done = 0;
    move || {
        done += 1;
        done % LOOK != 0 || tell(Progress { doing, done, of: 0 })
    }
}

/// What a fold took.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// Events applied.
    pub events: u64,
    /// Wall time.
    pub seconds: f64,
    /// The largest linear memory of an instance, bytes.
    pub sandbox_memory: usize,
    /// The largest resident memory of this process so far, bytes; None where the system does not say.
    pub process_memory: Option<u64>,
}

/// `VmHWM` of Linux.
fn process_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

/// All that the catalogue has.
async fn catalogue(config: &Config) -> Result<Vec<ProjectionRecord>, Error> {
    match Catalogue::open_read_only(&config.data).await? {
        Some(catalogue) => {
            let projections = catalogue.projections().await?;
            catalogue.close().await;
            Ok(projections)
        }
        None => Ok(Vec::new()),
    }
}

/// The live generation of a projection.
async fn live(config: &Config, name: &str) -> Result<GenerationRecord, Error> {
    let all = catalogue(config).await?;
    if let Some(live) = all.iter().find(|p| p.name == name).and_then(|p| p.role(Role::Live)) {
        return Ok(live.clone());
    }
    let names: Vec<_> = all.into_iter().map(|p| p.name).collect();
    let known = if names.is_empty() { "there are none yet".into() } else { format!("there are: {}", names.join(", ")) };
    Err(Error::UnknownProjection { name: name.to_owned(), known })
}

/// How often a live generation is looked up whose file is gone when it is to be copied: another one was promoted.
const TRIES: usize = 5;

/// Copies the live generation of a projection.
async fn snapshot(config: &Config, name: &str, scratch: &Scratch) -> Result<(GenerationRecord, Snapshot), Error> {
    let mut record = live(config, name).await?;
    for _ in 1..TRIES {
        let (file, to) = (record.file.clone(), scratch.file("live.sqlite"));
        let error = match blocking(move || Ok(Snapshot::take(&file, to))).await? {
            Ok(snapshot) => return Ok((record, snapshot)),
            Err(error) => error,
        };
        let before = record.number;
        record = live(config, name).await?;
        if record.number == before {
            return Err(error.into());
        }
        // What there is of the copy is of no use.
        let _ = std::fs::remove_file(scratch.file("live.sqlite"));
    }
    Err(Error::Other(format!("projection {name:?} gets one generation after the other; ask again when it has settled")))
}

/// To where rows with a checkpoint are complete: to the head of the log, or else to `at`, if nothing that is wanted comes
/// between. A checkpoint is not moved for each event that is passed over.
fn complete(
    log: &EventLog,
    manifest: &Manifest,
    checkpoint: Option<Position>,
    at: Option<Position>,
) -> Result<Option<Position>, Error> {
    let head = log.head_now().last();
    let begin = checkpoint.map_or(0, |p| p.0 + 1);
    for to in [head, at.min(head)].into_iter().flatten().filter(|to| to.0 >= begin) {
        if log.count(manifest, begin, to.0 + 1)? == 0 {
            return Ok(Some(to));
        }
    }
    Ok(checkpoint)
}

/// Runs what blocks on a thread that may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|ended| match ended.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(_) => Err(Error::Interrupted),
    })
}

/// A sandbox like the runtime's, with its cache of compiled code.
fn engine(config: &Config) -> Result<Engine, Error> {
    Ok(Engine::new(Some(&config.data.join("cache")), config.sandbox)?)
}

/// A module from where the runtime has stored it.
fn stored(config: &Config, engine: &Engine, hash: &str) -> Result<Module, Error> {
    let path = config.data.join("modules").join(format!("{hash}.wasm"));
    let module = plugin::read(&path).and_then(|bytes| engine.admit(&bytes));
    module.map_err(|error| Error::Module { hash: hash.to_owned(), path, error })
}

/// The module that a snapshot was made by: that of its last commit, or, before the first one, the catalogue's.
fn module_of(config: &Config, engine: &Engine, record: &GenerationRecord, live: &Snapshot) -> Result<Module, Error> {
    let hash = if live.module.is_empty() { &record.module } else { &live.module };
    stored(config, engine, hash)
}
