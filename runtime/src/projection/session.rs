//! What a worker holds between two openings of its files: where it stands, the instance, the rows that wait; and a step
//! of the loop.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::Error;
use super::cursor::{Batch, Cursor, Done, Step};
use super::failure::Park;
use super::shadow::Selection;
use super::worker::{Job, Task};
use crate::config::{BatchLimits, limits};
use crate::log::{EventLog, Following};
use crate::manifest::Manifest;
use crate::model::{BatchColumn, ColumnSet, Position, Time};
use crate::plugin::{Failure, Instance, RowError, Rows};
use crate::view::{
    self, Changes, Commit, CommittedRows, Committer, Generation, GenerationRecord, LetterChanges, LetterState, Mark,
    Origin, Table,
};

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

/// What one opening of the files holds, until an error makes it void.
pub(super) struct Session {
    state: Arc<Mutex<State>>,
    committer: Committer,
    tables: Arc<[Table]>,
    cursor: Cursor,
    /// Hears of new events, and tells others how far this is.
    pub(super) following: Following,
    pub(super) instance: Option<Instance>,
    /// Whether the last batch was the first one of its instance.
    pub(super) was_fresh: bool,
    pub(super) batch: Batch,
    /// How far the last apply went: the pending changes are complete to here.
    pub(super) applied: Done,
    /// To where the commit that began last is complete, and whether events are in it.
    committing: Option<(Done, Time, bool)>,
    committed: Done,
    /// When the event at the committed checkpoint was appended.
    pub(super) appended: Option<Time>,
    last_commit: Instant,
    /// Whether events, not only positions, wait for the commit.
    pub(super) has_applied: bool,
    /// What is left out.
    pub(super) park: Park,
    /// Changes of the dead letters that wait for the commit.
    pub(super) letters: LetterChanges,
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
    /// What the rows are made from, with what is applied.
    pub(super) origin: Origin,
    /// Whether that is to be committed, too.
    origin_changed: bool,
}

impl Session {
    pub(super) fn open(job: &Job) -> Result<Session, Error> {
        let mut generation = Generation::open(&job.file, &job.module.manifest)?;
        let tables = generation.tables().clone();
        let mark = generation.mark().cloned();
        if let Some(mark) = &mark {
            check_mark(&job.log, &job.file, mark)?;
        }
        // Before anything is read: whoever had the file before cannot commit any more.
        let origin = origin_now(&job.log, &job.module.manifest, mark.as_ref(), generation.origin())?;
        if generation.origin() != Some(&origin) {
            generation.set_origin(origin.clone())?;
        }
        let done = Done { position: mark.as_ref().map(|mark| mark.position), taken: 0 };
        let park = Park::load(job)?;
        let columns = columns(job, &park);
        let cursor = Cursor::new(&job.log, &job.module.manifest, done, columns, origin.epoch);
        let following = job.log.follow(&job.module.manifest, done.position)?;
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
            cursor,
            following,
            instance: None,
            was_fresh: true,
            batch: Batch::new(columns),
            applied: done,
            committing: None,
            committed: done,
            appended: mark.map(|mark| mark.appended),
            last_commit: Instant::now(),
            has_applied: false,
            park,
            letters: LetterChanges::default(),
            size: job.limits.events,
            largest: 0,
            suspect: 0,
            rate: Rate { since: Instant::now(), events: 0, events_a_second: 0.0 },
            events: 0,
            selection: None,
            origin,
            origin_changed: false,
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
    pub(super) fn only_event(&self) -> Option<Position> {
        (self.batch.len() == 1).then(|| self.batch.events.position(0))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("a panic would have ended this thread")
    }

    /// The committed one.
    pub(super) fn checkpoint(&self) -> Option<Position> {
        self.committed.position
    }

    /// To where the committed rows are complete: beyond the checkpoint, if nothing that is wanted comes after it.
    pub(super) fn complete(&self) -> Option<Position> {
        if self.applied.taken == self.committed.taken { self.applied.position } else { self.committed.position }
    }

    /// True if something waits for a commit that has not begun: rows, or so long a way without any that it should not be
    /// gone again.
    pub(super) fn has_uncommitted(&self) -> bool {
        let begun = self.committing.as_ref().map_or(self.committed, |(done, ..)| *done);
        let passed = |done: Done| done.position.map_or(0, |p| p.0 + 1);
        self.applied.taken != begun.taken
            || self.origin_changed
            || passed(self.applied) - passed(begun) >= limits::PASSED_EVENTS
    }

    pub(super) fn is_committing(&self) -> bool {
        self.committing.is_some()
    }

    pub(super) fn should_commit(&self, limits: &BatchLimits) -> bool {
        let state = self.state();
        state.pending.rows() >= limits.commit_rows
            || state.pending.bytes() >= limits.commit_bytes
            || (self.has_uncommitted() && self.last_commit.elapsed() >= limits.commit_interval)
    }

    /// There is nothing to do for now. What only a large batch needed is given back: with hundreds of projections at
    /// rest, each would hold some ten megabytes.
    pub(super) fn relax(&mut self) {
        if std::mem::take(&mut self.largest) > limits::SMALL_BATCH {
            self.instance = None;
            self.batch = Batch::new(self.batch.events.set());
            self.state().committed.shrink();
        }
    }

    /// Reads and applies one batch, without the events of parked streams. After a failure, everything before the batch
    /// is committed, and the next batch is smaller, until the event that fails is alone.
    pub(super) fn step(&mut self, job: &Job) -> Result<Step, Error> {
        self.batch.clear();
        let limits = BatchLimits { events: self.size, ..job.limits };
        let step = loop {
            match self.cursor.next(&limits, &mut self.batch) {
                Err(Error::Epoch) => self.check_epoch(job)?,
                step => break step?,
            }
        };
        for stretch in std::mem::take(&mut self.cursor.damaged) {
            // What is read again is noted once.
            if !self.origin.damaged.contains(&stretch) {
                self.origin.damaged.push(stretch);
                self.origin_changed = true;
            }
        }
        let read = self.batch.len();
        if read > 0 {
            let parked = match self.take_parked(job.max_dead_letters) {
                Ok(parked) => parked,
                Err(first) => return self.stop_before(job, first).map(|()| Step::More),
            };
            let waiting = parked.iter().map(|&i| self.event_name(job, i)).collect::<Result<Vec<_>, _>>()?;
            let left_out = match &self.selection {
                Some(selection) => {
                    let takes = |&i: &usize| selection.takes(self.batch.events.position(i));
                    (0..read).filter(|i| !takes(i)).collect()
                }
                None => parked,
            };
            if !left_out.is_empty() {
                self.batch.events.retain(|i| left_out.binary_search(&i).is_err());
            }
            if !self.batch.is_empty() {
                if let Err(failure) = self.apply(job) {
                    return self.isolate(job, failure, read, &left_out).map(|()| Step::More);
                }
                self.has_applied = true;
                self.events += self.batch.len() as u64;
            }
            waiting.into_iter().for_each(|event| self.set_aside(event, LetterState::Parked, None));
            self.passed(read, job.limits.events);
        }
        self.applied = self.cursor.done();
        Ok(step)
    }

    fn apply(&mut self, job: &Job) -> Result<(), Failure> {
        let encoded = self.batch.encode(&job.module.manifest);
        let task = Task::Applying { events: self.batch.len(), position: self.batch.events.position(0) };
        self.apply_encoded(job, task, &encoded)
    }

    pub(super) fn apply_encoded(&mut self, job: &Job, task: Task, batch: &[u8]) -> Result<(), Failure> {
        self.was_fresh = self.instance.is_none();
        let instance = match &mut self.instance {
            Some(instance) => instance,
            none => {
                // It could be made when the module was admitted, so the module is not to blame, and no event is.
                let made = job.module.instantiate(self.state.clone());
                none.insert(made.map_err(|failure| Failure::Host(failure.to_string()))?)
            }
        };
        job.doing(task);
        let changes = instance.apply(batch);
        let tables = self.tables.clone();
        let mut state = self.state();
        if let Err(error) = state.committed.release() {
            let message = error.to_string();
            state.failed = Some(error);
            return Err(Failure::Host(message));
        }
        state.pending.absorb(&tables, changes?).map_err(|message| Failure::Invalid { message })
    }

    /// A failure of the host's as it was, if it was one of the files'.
    pub(super) fn host_error(&self, message: String) -> Error {
        let failed = self.state().failed.take();
        failed.map_or(Error::Host(message), Error::View)
    }

    /// `events` are dealt with; the next batch may be larger, unless the bad one is still to be found.
    pub(super) fn passed(&mut self, events: usize, most: usize) {
        self.largest = self.largest.max(events);
        self.rate.count(events);
        self.suspect = self.suspect.saturating_sub(events);
        self.size = if self.suspect > 0 { (self.suspect / 2).max(1) } else { (self.size * 2).min(most) };
    }

    /// Goes back to what is applied, to read the next `suspect` events in batches of at most `size` at first.
    pub(super) fn rewind(&mut self, job: &Job, suspect: usize, size: usize) -> Result<(), Error> {
        self.suspect = suspect;
        self.size = size.max(1);
        self.read_anew(job)
    }

    /// Reads from what is applied on: what the plugin reads, and the streams while some are parked.
    pub(super) fn read_anew(&mut self, job: &Job) -> Result<(), Error> {
        let columns = columns(job, &self.park);
        self.batch = Batch::new(columns);
        self.cursor = Cursor::new(&job.log, &job.module.manifest, self.applied, columns, self.origin.epoch);
        Ok(())
    }

    /// Everything read so far is dealt with.
    pub(super) fn advance(&mut self) {
        self.applied = self.cursor.done();
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
    pub(super) fn begin_commit(&mut self, job: &Job, rests: bool) -> Result<(), Error> {
        self.check_epoch(job)?;
        let mark = match self.applied.position {
            None => None,
            Some(position) => Some(mark(&job.log, position)?),
        };
        let changes = {
            let mut state = self.state();
            let changes = Arc::new(std::mem::take(&mut state.pending));
            state.committing = Some(changes.clone());
            changes
        };
        let letters = std::mem::take(&mut self.letters);
        self.origin_changed |= self.origin.goes_on(self.committed.position, &job.module.hash);
        let origin = std::mem::take(&mut self.origin_changed).then(|| self.origin.clone());
        let appended = mark.as_ref().map_or(Time::EPOCH, |mark| mark.appended);
        self.committing = Some((self.applied, appended, std::mem::take(&mut self.has_applied)));
        self.last_commit = Instant::now();
        self.committer.begin(Commit { mark, changes, module: job.module.hash.clone(), letters, origin, rests });
        Ok(())
    }

    /// Refuses to go on with what was read before something was forgotten, unless it was nothing that is wanted. What is
    /// committed already, in whichever order the two happened, the next opening of the file finds by its checkpoint.
    pub(super) fn check_epoch(&mut self, job: &Job) -> Result<(), Error> {
        if *job.log.epoch().borrow() == self.origin.epoch {
            return Ok(());
        }
        let manifest = &job.module.manifest;
        let taken = job.log.effect(manifest, self.origin.epoch, Some(Position(u64::MAX)))?;
        let to_come = job.log.effect(manifest, self.origin.epoch, None)?;
        // What one that is under way turns out to be about, shows in the next epoch.
        let goes_on = taken.epoch == to_come.epoch && taken.epoch > self.origin.epoch;
        if !goes_on || taken.forgotten.is_some() || to_come.complete_from.is_some() {
            return Err(Error::Epoch);
        }
        self.origin.epoch = taken.epoch;
        self.cursor.epoch = taken.epoch;
        Ok(())
    }

    /// Hears of a commit that has ended, or waits for its end; answers whether there were events in it. An error makes
    /// the session void.
    pub(super) fn end_commit(&mut self, wait: bool) -> Result<Option<bool>, Error> {
        if !self.committer.ended(wait)? {
            return Ok(None);
        }
        self.state().committing = None;
        let (done, appended, had_applied) = self.committing.take().expect("it was begun");
        let taken = done.taken - self.committed.taken;
        self.committed = done;
        self.following.took(taken, self.complete());
        self.appended = done.position.map(|_| appended);
        Ok(Some(had_applied))
    }
}

/// What is read of each event.
pub(super) fn columns(job: &Job, park: &Park) -> ColumnSet {
    let batch = job.module.manifest.batch;
    if park.is_empty() { batch } else { batch.union(ColumnSet::from_iter([BatchColumn::Streams])) }
}

/// What a commit that is complete to a position keeps of the event there.
pub(super) fn mark(log: &EventLog, position: Position) -> Result<Mark, Error> {
    let Some(event) = log.fingerprint(position)? else { return Err(Error::Missing { position }) };
    Ok(Mark { position, appended: event.appended, fingerprint: event.digest, log: log.identity().to_owned() })
}

/// What the rows of a generation are made from, as of now; `stored` is what was known when that was last looked at.
pub fn origin_now(
    log: &EventLog,
    manifest: &Manifest,
    mark: Option<&Mark>,
    stored: Option<&Origin>,
) -> Result<Origin, Error> {
    let checkpoint = mark.map(|mark| mark.position);
    let mut origin = stored.cloned().unwrap_or_default();
    let effect = log.effect(manifest, origin.epoch, checkpoint)?;
    if stored.is_none() && checkpoint.is_none() {
        // One that is under way has not ended for what is read of it.
        origin.began = effect.epoch - effect.epoch % 2;
    }
    origin.epoch = effect.epoch;
    origin.forgotten = origin.forgotten.or(effect.forgotten);
    origin.complete_from = origin.complete_from.max(effect.complete_from);
    Ok(origin)
}

/// What the rows of a generation at rest, or of one that somebody follows for, are made from as of now.
pub fn made_from(log: &EventLog, record: &GenerationRecord) -> Result<Origin, Error> {
    let mark = match view::mark(&record.file) {
        Err(view::Error::Former { .. }) => {
            // Its position means nothing, so anything may be in it.
            let forgotten = log.effect(&record.manifest, 0, Some(Position(u64::MAX)))?.forgotten;
            return Ok(Origin { forgotten, ..Origin::default() });
        }
        mark => mark?,
    };
    origin_now(log, &record.manifest, mark.as_ref(), view::origin(&record.file)?.as_ref())
}

/// Refuses a generation that was built from another log than this one.
///
/// # Errors
///
/// [`Error::LogReplaced`] with both facts, or what cannot be read.
pub fn check_file(log: &EventLog, file: &Path) -> Result<(), Error> {
    view::mark(file)?.map_or(Ok(()), |mark| check_mark(log, file, &mark))
}

/// A log that was replaced or rolled back is refused with both facts, never followed.
fn check_mark(log: &EventLog, file: &Path, mark: &Mark) -> Result<(), Error> {
    let identity = log.identity();
    let here = log.fingerprint(mark.position)?;
    if mark.log == identity && here.is_some_and(|event| event.is_of(mark.fingerprint)) {
        return Ok(());
    }
    let found = match here {
        Some(event) => format!("log {identity} has event {:016x} there", event.digest),
        None => format!("log {identity} has no event there"),
    };
    Err(Error::LogReplaced {
        file: file.to_owned(),
        position: mark.position,
        expected: mark.log.clone(),
        fingerprint: mark.fingerprint,
        found,
    })
}
