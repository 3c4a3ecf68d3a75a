//! The fold of the log by a module into a file of its own, up to a checkpoint, while nobody follows for it: what a proof
//! compares the live generation with. It is the worker's own session, driven by whoever wants to know.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::Error;
use super::cursor::Step;
use super::reached::Reached;
use super::session::{Session, mark};
use super::worker::Job;
use crate::config::{BatchLimits, Policy};
use crate::log::EventLog;
use crate::model::Position;
use crate::plugin::Module;
use crate::view::{Commit, Generation, LetterChanges, Origin};

/// Which events are folded by which module.
#[derive(Clone)]
pub struct Fold<'a> {
    /// The module.
    pub module: &'a Module,
    /// The log.
    pub log: &'a EventLog,
    /// Batches and commits.
    pub limits: BatchLimits,
    /// Events up to here are left out; None for none.
    pub after: Option<Position>,
    /// Events after this are left out; None for all.
    pub until: Option<Position>,
    /// These, too.
    pub without: &'a HashSet<Position>,
}

/// Which of the events that are read a session applies; the others are passed over.
pub(super) struct Selection {
    until: Option<Position>,
    without: HashSet<Position>,
}

impl Selection {
    pub(super) fn takes(&self, position: Position) -> bool {
        Some(position) <= self.until && !self.without.contains(&position)
    }
}

/// A fold under way.
pub struct Shadow {
    job: Job,
    session: Session,
    after: Option<Position>,
    until: Option<Position>,
    memory: usize,
}

impl Shadow {
    /// Makes `file`, which is not there yet, with empty views.
    pub fn begin(fold: &Fold<'_>, file: PathBuf) -> Result<Shadow, Error> {
        Generation::create(&file, &fold.module.manifest)?;
        Shadow::go_on(fold, file)
    }

    /// Goes on in `file`, which another fold has made up to where this one begins, by a module that may do so.
    pub fn go_on(fold: &Fold<'_>, file: PathBuf) -> Result<Shadow, Error> {
        begin_after(fold, &file)?;
        let job = Job {
            module: fold.module.clone(),
            file,
            live: None,
            log: fold.log.clone(),
            limits: fold.limits,
            // Nobody listens: whoever drives it asks.
            progress: Arc::new(watch::Sender::new(Arc::default())),
            reached: Reached::new(fold.after, Origin::default()),
            notices: mpsc::unbounded_channel().0,
            id: 0,
            proving: false,
            // An event that cannot be applied is what a proof is to show.
            policy: watch::channel(Policy::Pause).1,
            max_dead_letters: 0,
        };
        let mut session = Session::open(&job)?;
        session.selection = Some(Selection { until: fold.until, without: fold.without.clone() });
        Ok(Shadow { job, session, after: fold.after, until: fold.until, memory: 0 })
    }

    /// Applies the next events, at most so many in one batch, and shows them before anything is committed. False once
    /// everything is applied and committed.
    ///
    /// # Errors
    ///
    /// [`Error::Event`] for an event that the module cannot apply; everything before it is committed. After an error this
    /// must be dropped.
    pub fn step(&mut self, events: usize, see: impl FnOnce(&Applied<'_>)) -> Result<bool, Error> {
        self.session.limit(events);
        let step = self.session.step(&self.job)?;
        see(&Applied(&self.session));
        self.memory = self.memory.max(self.session.memory());
        let ended = step != Step::More || self.session.applied.position >= self.until;
        let due = self.session.should_commit(&self.job.limits) || (ended && self.session.has_uncommitted());
        if due || self.session.is_committing() {
            self.session.commit(&self.job, due, ended)?;
        }
        Ok(!ended)
    }

    /// Drops the instance. The next batch gets a fresh one, which knows nothing but the rows.
    pub fn forget(&mut self) {
        self.session.forget();
    }

    /// The committed checkpoint.
    pub fn checkpoint(&self) -> Option<Position> {
        self.session.checkpoint()
    }

    /// Events applied so far.
    pub fn events(&self) -> u64 {
        self.session.events
    }

    /// The largest linear memory that an instance had, bytes.
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// Positions that are done and to be done, for a progress bar.
    pub fn progress(&self) -> (u64, u64) {
        let count = |p: Option<Position>| p.map_or(0, |p| p.0 + 1);
        let (begin, end) = (count(self.after), count(self.until));
        (count(self.session.applied.position).clamp(begin, end.max(begin)) - begin, end.saturating_sub(begin))
    }
}

/// A batch that was applied and is not committed.
pub struct Applied<'a>(&'a Session);

impl Applied<'_> {
    /// What has become of a row since the last commit began, if it was touched: None inside if it is deleted.
    pub fn row(&self, view: u32, key: &[u8]) -> Option<Option<Vec<u8>>> {
        self.0.pending(view, key)
    }

    /// The position of the batch's event, if it was one.
    pub fn event(&self) -> Option<Position> {
        self.0.only_event()
    }
}

/// Enters where to begin as the checkpoint of the empty file, so that the session goes on from there.
fn begin_after(fold: &Fold<'_>, file: &Path) -> Result<(), Error> {
    let Some(position) = fold.after else { return Ok(()) };
    let mark = Some(mark(fold.log, position)?);
    let module = fold.module.hash.clone();
    let commit =
        Commit { mark, changes: Arc::default(), module, letters: LetterChanges::default(), origin: None, rests: false };
    Ok(Generation::open(file, &fold.module.manifest)?.commit(&commit)?)
}
