//! What a worker holds between two openings of its files: where it stands, the instance, the rows that wait; and a step
//! of the loop.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::Error;
use super::merge::{Merge, Step, checkpoint, done};
use super::shadow::Selection;
use super::worker::{Course, Job, Task};
use crate::config::{BatchLimits, limits};
use crate::log::EventLog;
use crate::model::{Checkpoint, Columns, Position, Time};
use crate::plugin::{Failure, Instance, RowError, Rows};
use crate::view::{self, Changes, Commit, CommittedRows, Committer, Generation, Mark, Run, Table};

/// What a plugin reads from: changes that wait for their commit, those that are being committed, what is committed.
struct State {
    pending: Changes,
    /// Kept until their commit has ended; before, nobody knows which of the two is stored.
    committing: Option<Arc<Changes>>,
    committed: CommittedRows,
    /// Why a row could not be read, as it was before it went through the sandbox.
    failed: Option<view::Error>,
}

impl Rows for State {
    fn get(&mut self, view: u32, key: &[u8]) -> Result<Option<Vec<u8>>, RowError> {
        let newer = self.pending.get(view, key).or_else(|| self.committing.as_ref()?.get(view, key));
        if let Some(row) = newer {
            return Ok(row.map(<[u8]>::to_vec));
        }
        match self.committed.get(view, key) {
            Ok(row) => row.map_err(RowError::Plugin),
            Err(error) => {
                let message = error.to_string();
                self.failed = Some(error);
                Err(RowError::Host(message))
            }
        }
    }
}

/// Events a second, over windows of about a second.
pub(super) struct Rate {
    since: Instant,
    events: u64,
    pub(super) events_a_second: f64,
}

impl Rate {
    fn count(&mut self, events: usize) {
        self.events += events as u64;
        let elapsed = self.since.elapsed();
        if elapsed >= Duration::from_secs(1) {
            self.events_a_second = self.events as f64 / elapsed.as_secs_f64();
            (self.since, self.events) = (Instant::now(), 0);
        } else if self.events_a_second == 0.0 && self.events > 0 {
            // The first second shows something, too.
            self.events_a_second = self.events as f64 / elapsed.as_secs_f64().max(0.001);
        }
    }
}

pub(super) type Done = Vec<Option<(Position, Time)>>;

/// What one opening of the files holds, until an error makes it void.
pub(super) struct Session {
    state: Arc<Mutex<State>>,
    committer: Committer,
    tables: Arc<[Table]>,
    pub(super) merge: Merge,
    /// The generation whose course is followed was built from another log.
    pub(super) foreign: bool,
    instance: Option<Instance>,
    batch: Columns,
    /// In which order the sources were taken since the last commit began.
    runs: Vec<Run>,
    /// Where each source stands after the last apply: the pending changes are complete to here.
    pub(super) applied: Done,
    /// To where the commit that began last is complete, and whether events are in it.
    committing: Option<(Done, bool)>,
    pub(super) committed: Done,
    last_commit: Instant,
    /// Whether events, not only positions, wait for the commit.
    has_applied: bool,
    /// Events in the next batch, at most.
    size: usize,
    /// Events in the largest batch since the last rest.
    largest: usize,
    /// How many of the next events were in a batch that failed: the bad one is among them.
    pub(super) suspect: usize,
    pub(super) rate: Rate,
    /// Events applied since this was opened.
    pub(super) events: u64,
    /// Set where not all events are wanted.
    pub(super) selection: Option<Selection>,
}

impl Session {
    pub(super) fn open(job: &Job) -> Result<Session, Error> {
        let generation = Generation::open(&job.file, &job.module.manifest)?;
        let tables = generation.tables().clone();
        let done = done(&job.module.manifest, generation.marks());
        let columns = job.module.manifest.batch;
        let mut merge = Merge::new(&job.log, &job.module.manifest, &done, columns);
        check_log(&job.log, &job.file, generation.marks())?;
        let foreign = follow(job, &mut merge)?;
        let committed = generation.rows()?;
        Ok(Session {
            state: Arc::new(Mutex::new(State {
                pending: Changes::default(),
                committing: None,
                committed,
                failed: None,
            })),
            committer: Committer::new(generation),
            tables,
            merge,
            foreign,
            instance: None,
            batch: Columns::new(columns),
            runs: Vec::new(),
            applied: done.clone(),
            committing: None,
            committed: done,
            last_commit: Instant::now(),
            has_applied: false,
            size: job.limits.events,
            largest: 0,
            suspect: 0,
            rate: Rate { since: Instant::now(), events: 0, events_a_second: 0.0 },
            events: 0,
            selection: None,
        })
    }

    /// The next batch has at most so many events, unless a bad one is being looked for.
    pub(super) fn limit(&mut self, events: usize) {
        if self.suspect == 0 {
            self.size = events;
        }
    }

    /// Drops the instance; the next batch gets a fresh one.
    pub(super) fn forget(&mut self) {
        self.instance = None;
    }

    /// Bytes of linear memory that the instance has.
    pub(super) fn memory(&self) -> usize {
        self.instance.as_ref().map_or(0, Instance::memory)
    }

    /// What has become of a row since the last commit began.
    pub(super) fn pending(&self, view: u32, key: &[u8]) -> Option<Option<Vec<u8>>> {
        self.state().pending.get(view, key).map(|row| row.map(<[u8]>::to_vec))
    }

    /// The event of the last batch, if it was one.
    pub(super) fn only_event(&self) -> Option<(Arc<str>, Position)> {
        let source = || self.merge.sources[usize::from(self.batch.source(0))].clone();
        (self.batch.len() == 1).then(|| (source(), self.batch.position(0)))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("a panic would have ended this thread")
    }

    /// The committed one.
    pub(super) fn checkpoint(&self) -> Checkpoint {
        checkpoint(&self.merge.sources, &self.committed)
    }

    /// True if something waits for a commit that has not begun.
    pub(super) fn has_uncommitted(&self) -> bool {
        self.applied != *self.committing.as_ref().map_or(&self.committed, |(done, _)| done)
    }

    pub(super) fn is_committing(&self) -> bool {
        self.committing.is_some()
    }

    pub(super) fn should_commit(&self, limits: &BatchLimits) -> bool {
        let state = self.state();
        state.pending.rows() >= limits.commit_rows
            || state.pending.bytes() >= limits.commit_bytes
            || self.runs.len() >= limits.commit_rows
            || (self.has_uncommitted() && self.last_commit.elapsed() >= limits.commit_interval)
    }

    /// There is nothing to do for now. What only a large batch needed is given back: with hundreds of projections at
    /// rest, each would hold some ten megabytes.
    pub(super) fn relax(&mut self) {
        if std::mem::take(&mut self.largest) > limits::SMALL_BATCH {
            self.instance = None;
            self.batch = Columns::new(self.batch.set());
            self.state().committed.shrink();
        }
    }

    /// Reads and applies one batch. After a failure, everything before the batch is committed, and the next batch is
    /// smaller, until the event that fails is alone.
    pub(super) fn step(&mut self, job: &Job) -> Result<Step, Error> {
        self.batch.clear();
        let limits = BatchLimits { events: self.size, ..job.limits };
        let mut runs = Vec::new();
        let step = self.merge.next(&limits, &mut self.batch, &mut runs)?;
        if let Some(selection) = &self.selection {
            self.batch = self.batch.select(|source, position| selection.takes(source, position));
        }
        self.foreign |= self.merge.has_lost_its_guide();
        if !self.batch.is_empty() {
            if let Err(failure) = self.apply(job) {
                self.isolate(job, failure)?;
                return Ok(Step::More);
            }
            self.succeeded(job.limits.events);
        }
        self.applied = self.merge.done();
        if self.merge.sources.len() > 1 {
            self.runs.extend(runs);
        }
        Ok(step)
    }

    fn apply(&mut self, job: &Job) -> Result<(), Failure> {
        let encoded = self.batch.encode(&self.merge.sources, self.merge.types(), job.module.manifest.batch);
        let instance = match &mut self.instance {
            Some(instance) => instance,
            none => none.insert(job.module.instantiate(self.state.clone())?),
        };
        job.doing(Task::Applying {
            events: self.batch.len(),
            source: self.merge.sources[usize::from(self.batch.source(0))].clone(),
            position: self.batch.position(0),
        });
        let changes = instance.apply(&encoded);
        let tables = self.tables.clone();
        let mut state = self.state();
        if let Err(error) = state.committed.release() {
            let message = error.to_string();
            state.failed = Some(error);
            return Err(Failure::Host(message));
        }
        state.pending.absorb(&tables, changes?).map_err(|message| Failure::Invalid { message })
    }

    fn succeeded(&mut self, most: usize) {
        let events = self.batch.len();
        self.largest = self.largest.max(events);
        self.has_applied = true;
        self.events += events as u64;
        self.rate.count(events);
        self.suspect = self.suspect.saturating_sub(events);
        self.size = if self.suspect > 0 { (self.suspect / 2).max(1) } else { (self.size * 2).min(most) };
    }

    /// Finds the one event that fails by halving, on fresh instances.
    fn isolate(&mut self, job: &Job, failure: Failure) -> Result<(), Error> {
        let events = self.batch.len();
        let first_bad = match failure {
            Failure::Host(message) => {
                let failed = self.state().failed.take();
                return Err(failed.map_or(Error::Host(message), Error::View));
            }
            Failure::Refused { event, .. } => Some(event as usize).filter(|&i| i < events),
            _ => None,
        };
        if job.proving {
            return Err(match first_bad {
                Some(i) => self.describe_event(job, i, &failure)?,
                None => Error::FirstBatch {
                    events,
                    source_name: self.merge.sources[usize::from(self.batch.source(0))].to_string(),
                    position: self.batch.position(0),
                    reason: failure.to_string(),
                },
            });
        }
        // Before the commit, which needs the merge as it was when the pending changes were made.
        let alone = events == 1 || first_bad == Some(0);
        let culprit = alone.then(|| self.describe_event(job, 0, &failure)).transpose()?;
        self.end_commit(true)?;
        self.begin_commit(job, false)?;
        self.end_commit(true)?;
        if let Some(culprit) = culprit {
            return Err(culprit);
        }
        tracing::warn!(%failure, events, "a batch failed; looking for the event");
        self.instance = None;
        self.suspect = events;
        self.size = first_bad.unwrap_or(events / 2).max(1);
        self.merge = Merge::new(&job.log, &job.module.manifest, &self.applied, self.batch.set());
        self.foreign = follow(job, &mut self.merge)?;
        Ok(())
    }

    fn describe_event(&self, job: &Job, i: usize, failure: &Failure) -> Result<Error, Error> {
        let position = self.batch.position(i);
        let source_name = self.merge.sources[usize::from(self.batch.source(i))].to_string();
        // The batch has only what the plugin reads of an event.
        let mut id = String::new();
        job.log.events(&source_name, position.0.checked_sub(1).map(Position), 1, |event| id = event.event.id)?;
        let event_type = self.merge.types()[usize::from(self.batch.event_type(i))].to_string();
        Ok(Error::Event { source_name, position, event_type, id, reason: failure.to_string() })
    }

    /// Begins a commit if `due`; if `wait`, all have ended. Answers, of those that have, whether events were in one.
    pub(super) fn commit(&mut self, job: &Job, due: bool, wait: bool) -> Result<Option<bool>, Error> {
        let mut ended = self.end_commit(due || wait)?;
        if due {
            self.begin_commit(job, wait)?;
            if let Some(had_applied) = self.end_commit(wait)? {
                ended = Some(had_applied || ended == Some(true));
            }
        }
        Ok(ended)
    }

    /// Begins to commit what was applied. The commit before must have ended. `rests`: nothing follows for now. An error
    /// makes the session void.
    fn begin_commit(&mut self, job: &Job, rests: bool) -> Result<(), Error> {
        let mut marks = Vec::new();
        for (i, applied) in self.applied.iter().enumerate() {
            let Some((position, time)) = applied.filter(|_| *applied != self.committed[i]) else { continue };
            let source = self.merge.sources[i].clone();
            let Some((fingerprint, _)) = job.log.fingerprint(&source, position)? else {
                return Err(Error::Record { source_name: source.to_string(), position });
            };
            marks.push((source, Mark { position, time, fingerprint, log: job.log.identity().to_owned() }));
        }
        let changes = {
            let mut state = self.state();
            let changes = Arc::new(std::mem::take(&mut state.pending));
            state.committing = Some(changes.clone());
            changes
        };
        let runs = std::mem::take(&mut self.runs);
        self.committing = Some((self.applied.clone(), std::mem::take(&mut self.has_applied)));
        self.last_commit = Instant::now();
        self.committer.begin(Commit { marks, changes, runs, module: job.module.hash.clone(), rests });
        Ok(())
    }

    /// Hears of a commit that has ended, or waits for its end; answers whether there were events in it. An error makes
    /// the session void.
    fn end_commit(&mut self, wait: bool) -> Result<Option<bool>, Error> {
        if !self.committer.ended(wait)? {
            return Ok(None);
        }
        self.state().committing = None;
        let (done, had_applied) = self.committing.take().expect("it was begun");
        self.committed = done;
        Ok(Some(had_applied))
    }
}

/// Takes the order of the live generation, if that is what the job says. Answers true if that order is of no use: the
/// generation was built from another log, or cannot be read. A rebuild is what gets its projection going again then.
fn follow(job: &Job, merge: &mut Merge) -> Result<bool, Error> {
    let Course::Generation(live) = &job.course else { return Ok(false) };
    let marks = view::Order::open(live).and_then(|order| order.marks());
    match marks.map_err(Error::from).and_then(|marks| check_log(&job.log, live, &marks)) {
        Ok(()) => merge.follow(live).map(|()| false),
        Err(error @ (Error::LogReplaced { .. } | Error::View(_))) => {
            tracing::warn!(%error, "rebuilding without regard to the live generation");
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// Refuses a generation that was built from another log than this one.
///
/// # Errors
///
/// [`Error::LogReplaced`] with both facts, or what cannot be read.
pub fn check_file(log: &EventLog, file: &Path) -> Result<(), Error> {
    check_log(log, file, &view::Order::open(file)?.marks()?)
}

/// A log that was replaced or rolled back is refused with both facts, never followed.
fn check_log(log: &EventLog, file: &Path, marks: &[(Arc<str>, Mark)]) -> Result<(), Error> {
    let identity = log.identity();
    for (source, mark) in marks {
        let here = log.fingerprint(source, mark.position)?;
        if mark.log == identity && here.is_some_and(|(fingerprint, _)| fingerprint == mark.fingerprint) {
            continue;
        }
        let found = match here {
            Some((fingerprint, _)) => format!("log {identity} has event {fingerprint:016x} there"),
            None => format!("log {identity} has no event there"),
        };
        return Err(Error::LogReplaced {
            file: file.to_owned(),
            source_name: source.to_string(),
            position: mark.position,
            expected: mark.log.clone(),
            fingerprint: mark.fingerprint,
            found,
        });
    }
    Ok(())
}
