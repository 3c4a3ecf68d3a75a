//! The fold of the log by a module into a file of its own, up to a checkpoint, while nobody follows for it: what a proof
//! compares the live generation with. It is the worker's own session, driven by whoever wants to know.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::Error;
use super::merge::Step;
use super::session::Session;
use super::worker::{Course, Job};
use crate::config::{BatchLimits, Policy};
use crate::log::EventLog;
use crate::model::{Checkpoint, Position};
use crate::plugin::Module;
use crate::view::{Commit, Generation, LetterChanges, Mark};

/// Which events are folded by which module.
#[derive(Clone)]
pub struct Fold<'a> {
    /// The module.
    pub module: &'a Module,
    /// The log.
    pub log: &'a EventLog,
    /// Batches and commits.
    pub limits: BatchLimits,
    /// A file with the order in which the sources are taken, if the module has the same ones; else they are merged.
    pub order: Option<&'a Path>,
    /// Events up to here are left out; empty for none.
    pub after: &'a Checkpoint,
    /// Events after this are left out; so are sources that are not in it.
    pub until: &'a Checkpoint,
    /// These, too.
    pub without: &'a HashSet<(String, Position)>,
}

/// Which of the events that are read a session applies; the others are passed over.
pub(super) struct Selection {
    /// By source.
    until: Vec<Option<Position>>,
    without: HashSet<(u16, Position)>,
}

impl Selection {
    pub(super) fn takes(&self, source: u16, position: Position) -> bool {
        Some(position) <= self.until[usize::from(source)] && !self.without.contains(&(source, position))
    }
}

/// A fold under way.
pub struct Shadow {
    job: Job,
    session: Session,
    after: Vec<Option<Position>>,
    until: Vec<Option<Position>>,
    memory: usize,
}

impl Shadow {
    /// Makes `file`, which is not there yet, with empty views.
    pub fn begin(fold: &Fold<'_>, file: PathBuf) -> Result<Shadow, Error> {
        let manifest = &fold.module.manifest;
        Generation::create(&file, manifest)?;
        begin_after(fold, &file)?;
        let by_source = |checkpoint: &Checkpoint| -> Vec<_> {
            manifest.sources.iter().map(|s| checkpoint.get(&s.source)).collect()
        };
        let (after, until) = (by_source(fold.after), by_source(fold.until));
        let without = fold.without.iter().filter_map(|(source, position)| {
            let index = manifest.sources.iter().position(|s| s.source == *source)?;
            Some((index as u16, *position))
        });
        let job = Job {
            module: fold.module.clone(),
            file,
            course: fold.order.map_or(Course::Log, |file| Course::Generation(file.to_owned())),
            log: fold.log.clone(),
            limits: fold.limits,
            // Nobody listens: whoever drives it asks.
            progress: Arc::new(watch::Sender::new(Arc::default())),
            checkpoint: Arc::new(watch::Sender::new(Arc::default())),
            notices: mpsc::unbounded_channel().0,
            id: 0,
            proving: false,
            // An event that cannot be applied is what a proof is to show.
            policy: watch::channel(Policy::Pause).1,
            max_dead_letters: 0,
        };
        let mut session = Session::open(&job)?;
        session.selection = Some(Selection { until: until.clone(), without: without.collect() });
        Ok(Shadow { job, session, after, until, memory: 0 })
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
        let passed = |(done, until): (&Option<(Position, _)>, &Option<Position>)| done.map(|(p, _)| p) >= *until;
        let ended = step != Step::More || self.session.applied.iter().zip(&self.until).all(passed);
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
    pub fn checkpoint(&self) -> Checkpoint {
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
        let (mut done, mut all) = (0, 0);
        for ((after, until), applied) in self.after.iter().zip(&self.until).zip(&self.session.applied) {
            let (begin, end) = (count(*after), count(*until));
            all += end.saturating_sub(begin);
            done += count(applied.map(|(p, _)| p)).clamp(begin, end.max(begin)) - begin;
        }
        (done, all)
    }
}

/// A batch that was applied and is not committed.
pub struct Applied<'a>(&'a Session);

impl Applied<'_> {
    /// What has become of a row since the last commit began, if it was touched: None inside if it is deleted.
    pub fn row(&self, view: u32, key: &[u8]) -> Option<Option<Vec<u8>>> {
        self.0.pending(view, key)
    }

    /// The event of the batch by its source and position, if it was one.
    pub fn event(&self) -> Option<(Arc<str>, Position)> {
        self.0.only_event()
    }
}

/// Enters where to begin as the checkpoint of the empty file, so that the session goes on from there.
fn begin_after(fold: &Fold<'_>, file: &Path) -> Result<(), Error> {
    let mut marks = Vec::new();
    for (source, position) in fold.after.iter().filter(|(s, _)| fold.module.manifest.subscription(s).is_some()) {
        let Some((fingerprint, time)) = fold.log.fingerprint(source, position)? else {
            return Err(Error::Record { source_name: source.to_owned(), position });
        };
        let log = fold.log.identity().to_owned();
        marks.push((Arc::from(source), Mark { position, time, fingerprint, log }));
    }
    if marks.is_empty() {
        return Ok(());
    }
    let module = fold.module.hash.clone();
    let (changes, letters) = (Arc::default(), LetterChanges::default());
    let commit = Commit { marks, changes, runs: Vec::new(), module, letters, rests: false };
    Ok(Generation::open(file, &fold.module.manifest)?.commit(&commit)?)
}
