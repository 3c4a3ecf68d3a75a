//! The loop: read a batch, apply it, commit; on a thread of its own for each generation that is being followed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::Error;
use super::merge::{Merge, Step, checkpoint, done};
use crate::config::{BatchLimits, limits};
use crate::log::{EventLog, Heads};
use crate::model::{Checkpoint, Columns, Position, Time};
use crate::plugin::{Failure, Instance, Module, RowError, Rows};
use crate::view::{self, Changes, Commit, CommittedRows, Committer, Generation, Mark, Run, Table};

/// What a worker follows.
#[derive(Clone, Debug)]
pub(super) enum Course {
    /// The log, for ever.
    Log,
    /// The live generation in this file, until told to finish; then, once promoted, the log.
    Generation(PathBuf),
}

/// What a worker needs.
pub(super) struct Job {
    pub(super) module: Module,
    pub(super) file: PathBuf,
    pub(super) course: Course,
    pub(super) log: EventLog,
    pub(super) limits: BatchLimits,
    pub(super) progress: Arc<watch::Sender<Arc<Progress>>>,
    pub(super) checkpoint: Arc<watch::Sender<Arc<Checkpoint>>>,
    pub(super) notices: mpsc::UnboundedSender<(u64, Notice)>,
    /// Sent along with every notice, so that late ones of a stopped worker are recognised.
    pub(super) id: u64,
    /// Whether there is a former module to go back to. Then nothing of this one is committed before a batch of it has
    /// succeeded, and a failure before that is the module's, whichever event it was.
    pub(super) proving: bool,
}

/// What the manager hears from a worker.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// The first batch of this module is committed, or it has nothing to apply.
    Proved,
    /// As far as the live generation, as of now.
    Ready,
    /// The checkpoint given with `Finish` is passed; waiting for the promotion.
    Passed,
    /// It has ended, because going on would lose or corrupt data.
    Faulted(String),
}

/// What a worker is told.
pub(super) enum Command {
    /// Commit what is applied, and end.
    Stop,
    /// The live generation has stopped at this checkpoint: pass it and wait.
    Finish(Checkpoint),
    /// This generation is live now: follow the log.
    Lead,
}

/// How far a worker has come, in memory only; the database gets checkpoints.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Where each source stands, with the time of its last event.
    pub done: Vec<(Arc<str>, Position, Time)>,
    /// Events applied a second, over the last seconds.
    pub rate: f64,
    /// When that was measured.
    pub measured: Option<Instant>,
    /// What it is doing.
    pub activity: Activity,
}

/// What a worker is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// Opening, or there is more to read.
    #[default]
    CatchingUp,
    /// Everything is applied and committed.
    AtHead,
    /// After an error of the host's it begins again at the last commit.
    Retrying(String),
}

/// A running worker. Dropping it does not stop it.
pub(super) struct Worker {
    pub(super) id: u64,
    commands: mpsc::UnboundedSender<Command>,
    ended: oneshot::Receiver<()>,
}

impl Worker {
    pub(super) fn start(job: Job) -> Worker {
        let (commands, received) = mpsc::unbounded_channel();
        let (end, ended) = oneshot::channel();
        let id = job.id;
        let name = job.module.manifest.projection.chars().take(15).collect();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new()
            .name(name)
            .spawn(move || {
                let span = tracing::info_span!("projection", name = job.module.manifest.projection, file = ?job.file);
                let _entered = span.enter();
                let (notices, id) = (job.notices.clone(), job.id);
                let work = Work {
                    heads: job.log.heads(),
                    job,
                    commands: received,
                    runtime,
                    finishing: None,
                    ready: false,
                    proved: false,
                    stopping: false,
                };
                let run = std::panic::AssertUnwindSafe(|| work.run());
                let ended = std::panic::catch_unwind(run)
                    .unwrap_or_else(|_| Some("a bug in shadowbox; report it with the log, and restart".to_owned()));
                if let Some(reason) = ended {
                    tracing::error!(%reason, "the projection is faulted");
                    // The manager is gone only when everything stops.
                    let _ = notices.send((id, Notice::Faulted(reason)));
                }
                let _ = end.send(());
            })
            .expect("a thread can be started");
        Worker { id, commands, ended }
    }

    /// Nothing happens if the worker has ended; its last notice says why.
    pub(super) fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// Returns when the worker has committed what it had applied, and ended.
    pub(super) async fn stop(self) {
        self.tell(Command::Stop);
        // An error means that it ended without a word, so it has ended.
        let _ = self.ended.await;
    }
}

/// Why the loop wakes.
enum Wake {
    /// None: the manager is gone, and wants nothing any more.
    Command(Option<Command>),
    Log,
    Timer,
}

/// Why the loop is left.
enum Leave {
    Stopped,
    Failed(Error),
}

impl<E: Into<Error>> From<E> for Leave {
    fn from(error: E) -> Leave {
        Leave::Failed(error.into())
    }
}

struct Work {
    job: Job,
    commands: mpsc::UnboundedReceiver<Command>,
    heads: watch::Receiver<Arc<Heads>>,
    runtime: tokio::runtime::Handle,
    /// Where the live generation has stopped, once it has.
    finishing: Option<Checkpoint>,
    /// Whether the manager has been told that this is as far as the live generation.
    ready: bool,
    proved: bool,
    /// `Stop` has come: whatever happens now, do not begin again.
    stopping: bool,
}

/// How often a builder that has come as far as the live generation looks whether that has gone on.
const FOLLOW_POLL: Duration = Duration::from_millis(10);

/// At the head, nothing but the log and commands wakes the loop; this is only for the type.
const FOREVER: Duration = Duration::from_secs(86_400);

impl Work {
    /// Runs until stopped (None) or faulted (why).
    fn run(mut self) -> Option<String> {
        let mut retries = 0;
        loop {
            let before = self.job.checkpoint.borrow().clone();
            let error = match self.attempt() {
                Leave::Stopped => return None,
                Leave::Failed(error) => error,
            };
            // Progress resets the budget: only a host that does not recover uses it up.
            if *before != **self.job.checkpoint.borrow() {
                retries = 0;
            }
            if self.stopping {
                // What was not committed is applied again after the next start.
                tracing::warn!(%error, "stopped without the last commit");
                return None;
            }
            let wait = limits::RETRY_FIRST * 2_u32.pow(retries);
            retries += 1;
            if !is_transient(&error) || retries > limits::RETRIES {
                return Some(error.to_string());
            }
            tracing::warn!(%error, ?wait, "going back to the last commit");
            self.publish(|p| p.activity = Activity::Retrying(error.to_string()));
            if let Wake::Command(command) = self.wait(wait)
                && !self.obey(command)
            {
                return None;
            }
        }
    }

    /// Opens everything anew and goes on from the checkpoint that is stored.
    fn attempt(&mut self) -> Leave {
        let mut session = match Session::open(&self.job) {
            Ok(session) => session,
            Err(error) => return Leave::Failed(error),
        };
        self.report(&session, false);
        loop {
            if let Err(leave) = self.turn(&mut session) {
                // What was committed on the way to an error counts.
                self.report(&session, false);
                return leave;
            }
        }
    }

    /// One turn of the loop: commands, a batch, perhaps a commit, perhaps a rest.
    fn turn(&mut self, session: &mut Session) -> Result<(), Leave> {
        while let Ok(command) = self.commands.try_recv() {
            if !self.obey(Some(command)) {
                return self.finish(session);
            }
        }
        if matches!(self.job.course, Course::Log) {
            session.merge.lead();
        }
        if self.heads.has_changed().unwrap_or(false) {
            self.heads.borrow_and_update();
            session.merge.refresh();
        }
        let step = session.step(&self.job)?;
        let at_rest = step != Step::More;
        if session.suspect > 0 {
            // Commits were made on the way to the bad event.
            self.report(session, false);
        }
        let due = session.should_commit(&self.job.limits) || (at_rest && session.has_uncommitted());
        if due || session.is_committing() {
            self.commit(session, due, at_rest)?;
        }
        if !at_rest {
            return Ok(());
        }
        self.publish(|p| p.activity = Activity::AtHead);
        if let Wake::Command(command) = self.rest(session, step)?
            && !self.obey(command)
        {
            return self.finish(session);
        }
        Ok(())
    }

    fn finish(&mut self, session: &mut Session) -> Result<(), Leave> {
        let due = session.has_uncommitted();
        self.commit(session, due, true)?;
        Err(Leave::Stopped)
    }

    /// False: stop.
    fn obey(&mut self, command: Option<Command>) -> bool {
        match command {
            None | Some(Command::Stop) => {
                self.stopping = true;
                return false;
            }
            Some(Command::Finish(target)) => self.finishing = Some(target),
            Some(Command::Lead) => {
                self.job.course = Course::Log;
                self.finishing = None;
            }
        }
        true
    }

    /// Begins a commit if `due`, and tells everybody of those that have ended; if `wait`, all have.
    fn commit(&mut self, session: &mut Session, due: bool, wait: bool) -> Result<(), Leave> {
        let mut ended = session.end_commit(due || wait)?;
        if due {
            session.begin_commit(&self.job)?;
            if let Some(had_applied) = session.end_commit(wait)? {
                ended = Some(had_applied || ended == Some(true));
            }
        }
        let Some(had_applied) = ended else { return Ok(()) };
        self.report(session, wait);
        if had_applied && !self.proved {
            self.proved = true;
            self.job.proving = false;
            self.notify(Notice::Proved);
        }
        Ok(())
    }

    /// There is nothing to apply: says so to the manager if it waits for that, and waits.
    fn rest(&mut self, session: &mut Session, step: Step) -> Result<Wake, Leave> {
        let Course::Generation(live) = &self.job.course else { return Ok(self.wait(FOREVER)) };
        let reached = session.checkpoint();
        let ours = |source: &str| session.merge.sources.iter().any(|s| **s == *source);
        // What a generation of another log has reached says nothing here; then the head of this log is all there is.
        let passed = |target: &Checkpoint| session.foreign || reached.covers(target, ours);
        match &self.finishing {
            Some(target) if passed(target) => {
                self.notify(Notice::Passed);
                // Nothing may be applied before the promotion: it belongs to this very position.
                return Ok(Wake::Command(self.runtime.block_on(self.commands.recv())));
            }
            None if !self.ready => {
                let reached = || Ok::<_, Leave>(passed(&view::Order::open(live)?.checkpoint()?));
                if session.foreign || step == Step::EndOfRecord || reached()? {
                    self.ready = true;
                    self.notify(Notice::Ready);
                }
            }
            _ => {}
        }
        Ok(self.wait(FOLLOW_POLL))
    }

    /// The one place that waits.
    fn wait(&mut self, longest: Duration) -> Wake {
        let wake = self.runtime.block_on(async {
            tokio::select! {
                command = self.commands.recv() => Wake::Command(command),
                Ok(()) = self.heads.changed() => Wake::Log,
                () = tokio::time::sleep(longest) => Wake::Timer,
            }
        });
        if let Wake::Log = wake {
            // Whoever waited looks at the heads next, in `turn`, and there it must show that they have changed.
            self.heads.mark_changed();
        }
        wake
    }

    fn notify(&self, notice: Notice) {
        // The manager is gone only when everything stops.
        let _ = self.job.notices.send((self.job.id, notice));
    }

    /// Tells readers and the status what is committed.
    fn report(&self, session: &Session, at_rest: bool) {
        self.job.checkpoint.send_replace(Arc::new(session.checkpoint()));
        let done = session.merge.sources.iter().zip(&session.committed);
        let done = done.filter_map(|(source, done)| done.map(|(p, t)| (source.clone(), p, t))).collect();
        self.publish(|progress| {
            progress.done = done;
            progress.rate = session.rate.events_a_second;
            progress.measured = Some(Instant::now());
            progress.activity = if at_rest { Activity::AtHead } else { Activity::CatchingUp };
        });
    }

    fn publish(&self, change: impl FnOnce(&mut Progress)) {
        self.job.progress.send_modify(|progress| change(Arc::make_mut(progress)));
    }
}

/// Errors that may go away by themselves. Being fenced off, a foreign log, or an event that cannot be applied do not.
fn is_transient(error: &Error) -> bool {
    match error {
        Error::Log(_) | Error::Host(_) | Error::View(view::Error::Sqlite { .. } | view::Error::File { .. }) => true,
        Error::FirstBatch { .. } => false,
        Error::View(_) | Error::Plugin(_) | Error::Event { .. } | Error::LogReplaced { .. } | Error::Record { .. } => {
            false
        }
    }
}

/// What a plugin reads from: changes that wait for their commit, those that are being committed, what is committed.
struct State {
    pending: Changes,
    /// Kept until their commit has ended; before, nobody knows which of the two is stored.
    committing: Option<Arc<Changes>>,
    committed: CommittedRows,
}

impl Rows for State {
    fn get(&mut self, view: u32, key: &[u8]) -> Result<Option<Vec<u8>>, RowError> {
        let newer = self.pending.get(view, key).or_else(|| self.committing.as_ref()?.get(view, key));
        if let Some(row) = newer {
            return Ok(row.map(<[u8]>::to_vec));
        }
        match self.committed.get(view, key) {
            Ok(row) => row.map_err(RowError::Plugin),
            Err(error) => Err(RowError::Host(error.to_string())),
        }
    }
}

/// Events a second, over windows of about a second.
struct Rate {
    since: Instant,
    events: u64,
    events_a_second: f64,
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

type Done = Vec<Option<(Position, Time)>>;

/// What one opening of the files holds, until an error makes it void.
struct Session {
    state: Arc<Mutex<State>>,
    committer: Committer,
    tables: Arc<[Table]>,
    merge: Merge,
    /// The generation whose course is followed was built from another log.
    foreign: bool,
    instance: Option<Instance>,
    batch: Columns,
    /// In which order the sources were taken since the last commit began.
    runs: Vec<Run>,
    /// Where each source stands after the last apply: the pending changes are complete to here.
    applied: Done,
    /// To where the commit that began last is complete, and whether events are in it.
    committing: Option<(Done, bool)>,
    committed: Done,
    last_commit: Instant,
    /// Whether events, not only positions, wait for the commit.
    has_applied: bool,
    /// Events in the next batch, at most.
    size: usize,
    /// How many of the next events were in a batch that failed: the bad one is among them.
    suspect: usize,
    rate: Rate,
}

impl Session {
    fn open(job: &Job) -> Result<Session, Error> {
        let generation = Generation::open(&job.file, &job.module.manifest)?;
        let tables = generation.tables().clone();
        let done = done(&job.module.manifest, generation.marks());
        let mut merge = Merge::new(&job.log, &job.module.manifest, &done)?;
        check_log(job, &job.file, &mut merge, generation.marks())?;
        let foreign = follow(job, &mut merge)?;
        let committed = generation.rows()?;
        Ok(Session {
            state: Arc::new(Mutex::new(State { pending: Changes::default(), committing: None, committed })),
            committer: Committer::new(generation),
            tables,
            merge,
            foreign,
            instance: None,
            batch: Columns::default(),
            runs: Vec::new(),
            applied: done.clone(),
            committing: None,
            committed: done,
            last_commit: Instant::now(),
            has_applied: false,
            size: job.limits.events,
            suspect: 0,
            rate: Rate { since: Instant::now(), events: 0, events_a_second: 0.0 },
        })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("a panic would have ended this thread")
    }

    /// The committed one.
    fn checkpoint(&self) -> Checkpoint {
        checkpoint(&self.merge.sources, &self.committed)
    }

    /// True if something waits for a commit that has not begun.
    fn has_uncommitted(&self) -> bool {
        self.applied != *self.committing.as_ref().map_or(&self.committed, |(done, _)| done)
    }

    fn is_committing(&self) -> bool {
        self.committing.is_some()
    }

    fn should_commit(&self, limits: &BatchLimits) -> bool {
        let state = self.state();
        state.pending.rows() >= limits.commit_rows
            || state.pending.bytes() >= limits.commit_bytes
            || self.runs.len() >= limits.commit_rows
            || (self.has_uncommitted() && self.last_commit.elapsed() >= limits.commit_interval)
    }

    /// Reads and applies one batch. After a failure, everything before the batch is committed, and the next batch is
    /// smaller, until the event that fails is alone.
    fn step(&mut self, job: &Job) -> Result<Step, Error> {
        self.batch.clear();
        let limits = BatchLimits { events: self.size, ..job.limits };
        let mut runs = Vec::new();
        let step = self.merge.next(&limits, &mut self.batch, &mut runs)?;
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
        let manifest = &job.module.manifest;
        let wanted = |column| manifest.batch.contains(&column);
        let encoded = self.batch.encode(&self.merge.sources, &self.merge.types(), wanted);
        let instance = match &mut self.instance {
            Some(instance) => instance,
            none => none.insert(job.module.instantiate(self.state.clone())?),
        };
        let changes = instance.apply(&encoded)?;
        let tables = self.tables.clone();
        let absorbed = self.state().pending.absorb(&tables, &changes);
        absorbed.map_err(|message| Failure::Trap { message })
    }

    fn succeeded(&mut self, most: usize) {
        let events = self.batch.len();
        self.has_applied = true;
        self.rate.count(events);
        self.suspect = self.suspect.saturating_sub(events);
        self.size = if self.suspect > 0 { (self.suspect / 2).max(1) } else { (self.size * 2).min(most) };
    }

    /// Finds the one event that fails by halving, on fresh instances.
    fn isolate(&mut self, job: &Job, failure: Failure) -> Result<(), Error> {
        let events = self.batch.len();
        let first_bad = match failure {
            Failure::Host(message) => return Err(Error::Host(message)),
            Failure::Refused { event, .. } => Some(event as usize).filter(|&i| i < events),
            _ => None,
        };
        if job.proving {
            return Err(match first_bad {
                Some(i) => self.describe_event(i, &failure),
                None => Error::FirstBatch {
                    events,
                    source_name: self.merge.sources[usize::from(self.batch.source(0))].to_string(),
                    position: self.batch.position(0),
                    reason: failure.to_string(),
                },
            });
        }
        // Before the commit, which needs the merge as it was when the pending changes were made.
        let culprit = (events == 1 || first_bad == Some(0)).then(|| self.describe_event(0, &failure));
        self.end_commit(true)?;
        self.begin_commit(job)?;
        self.end_commit(true)?;
        if let Some(culprit) = culprit {
            return Err(culprit);
        }
        tracing::warn!(%failure, events, "a batch failed; looking for the event");
        self.instance = None;
        self.suspect = events;
        self.size = first_bad.unwrap_or(events / 2).max(1);
        self.merge = Merge::new(&job.log, &job.module.manifest, &self.applied)?;
        self.foreign = follow(job, &mut self.merge)?;
        Ok(())
    }

    fn describe_event(&self, i: usize, failure: &Failure) -> Error {
        let event = self.batch.get(i);
        let types = self.merge.types();
        Error::Event {
            source_name: self.merge.sources[usize::from(self.batch.source(i))].to_string(),
            position: event.position,
            event_type: types[usize::from(self.batch.event_type(i))].to_string(),
            id: String::from_utf8_lossy(event.id).into_owned(),
            reason: failure.to_string(),
        }
    }

    /// Begins to commit what was applied. The commit before must have ended. An error makes the session void.
    fn begin_commit(&mut self, job: &Job) -> Result<(), Error> {
        let mut marks = Vec::new();
        for (i, applied) in self.applied.iter().enumerate() {
            let Some((position, time)) = applied.filter(|_| *applied != self.committed[i]) else { continue };
            let source = self.merge.sources[i].clone();
            let Some((fingerprint, _)) = self.merge.fingerprint(&source, position)? else {
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
        self.committer.begin(Commit { marks, changes, runs, module: job.module.hash.clone() });
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
    match marks.map_err(Error::from).and_then(|marks| check_log(job, live, merge, &marks)) {
        Ok(()) => merge.follow(live).map(|()| false),
        Err(error @ (Error::LogReplaced { .. } | Error::View(_))) => {
            tracing::warn!(%error, "rebuilding without regard to the live generation");
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// A log that was replaced or rolled back is refused with both facts, never followed.
fn check_log(job: &Job, file: &Path, merge: &mut Merge, marks: &[(Arc<str>, Mark)]) -> Result<(), Error> {
    let identity = job.log.identity();
    for (source, mark) in marks {
        let here = merge.fingerprint(source, mark.position)?;
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
