//! The loop: read a batch, apply it, commit; on a thread of its own for each generation that is being followed.

use std::collections::VecDeque;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::Error;
use super::cursor::Step;
use super::failure::{Outcome, Request, Retry, Treatment, retry_wait};
use super::reached::Reached;
use super::session::{Session, check_file};
use crate::config::{BatchLimits, Policy, limits};
use crate::log::EventLog;
use crate::model::{FailureReport, Position, Time};
use crate::plugin::Module;
use crate::view::LetterCounts;

/// The live generation that another one is to take the place of.
#[derive(Clone)]
pub(super) struct Before {
    pub(super) file: PathBuf,
    pub(super) reached: Reached,
}

/// What a worker needs.
pub(super) struct Job {
    pub(super) module: Module,
    pub(super) file: PathBuf,
    /// The generation to catch up with; None for the live one.
    pub(super) live: Option<Before>,
    pub(super) log: EventLog,
    pub(super) limits: BatchLimits,
    pub(super) progress: Arc<watch::Sender<Arc<Progress>>>,
    pub(super) reached: Reached,
    pub(super) notices: mpsc::UnboundedSender<(u64, Notice)>,
    /// Sent along with every notice, so that late ones of a stopped worker are recognised.
    pub(super) id: u64,
    /// Whether there is a former module to go back to. Then nothing of this one is committed before a batch of it has
    /// succeeded, and a failure before that is the module's, whichever event it was.
    pub(super) proving: bool,
    /// What to do about an event that cannot be applied.
    pub(super) policy: watch::Receiver<Policy>,
    pub(super) max_dead_letters: u64,
}

/// Why a worker has ended by itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) reason: String,
    /// The event at which it stands, if it is an event's fault.
    pub(super) report: Option<Box<FailureReport>>,
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
    /// There may be something in the rows that is forgotten.
    Forgotten,
    /// It has ended, because going on would lose or corrupt data.
    Faulted(Fault),
}

/// What a worker is told.
pub(super) enum Command {
    /// Commit what is applied, and end.
    Stop,
    /// The live generation has stopped, complete to this position: pass it and wait.
    Finish(Option<Position>),
    /// This generation is live now: follow the log.
    Lead,
    /// Do something about dead letters, between two batches.
    Treat(Request),
}

/// How far a worker has come, in memory only; the database gets checkpoints.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// When the event at the checkpoint was appended.
    pub appended: Option<Time>,
    /// Events applied a second, over the last seconds.
    pub rate: f64,
    /// When that was measured.
    pub measured: Option<Instant>,
    /// Events that it has left out, as of the last commit.
    pub dead_letters: LetterCounts,
    /// What it is doing.
    pub activity: Activity,
    /// What it is in the middle of, and since when; None before it began.
    pub task: Option<(Task, Instant)>,
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

/// What a worker can be in the middle of. If it makes no progress, this is what it waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Opening the generation's file, and comparing the log with it.
    Opening,
    /// Reading the log.
    Reading,
    /// A call of the plugin.
    Applying {
        /// How many events it was given.
        events: usize,
        /// The first one's position.
        position: Position,
    },
    /// Writing rows and checkpoint.
    Committing,
    /// Nothing: it waits for events, or to be told.
    Resting,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Task::Opening => f.write_str("opening the view file and the log"),
            Task::Reading => f.write_str("reading the log"),
            Task::Applying { events: 1, position } => write!(f, "a plugin call for the event at position {position}"),
            Task::Applying { events, position } => {
                write!(f, "a plugin call for {events} events from position {position} on")
            }
            Task::Committing => f.write_str("a commit to the view file"),
            Task::Resting => f.write_str("waiting for events, although there are some"),
        }
    }
}

impl Job {
    /// Says what the worker is in the middle of from now on. Nobody is woken by it: whoever asks, looks.
    pub(super) fn doing(&self, task: Task) {
        self.progress.send_if_modified(|progress| {
            Arc::make_mut(progress).task = Some((task, Instant::now()));
            false
        });
    }
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
                let (notices, id, reached) = (job.notices.clone(), job.id, job.reached.clone());
                let work = Work {
                    job,
                    commands: received,
                    runtime,
                    finishing: None,
                    foreign: false,
                    ready: false,
                    proved: false,
                    stopping: false,
                    requests: VecDeque::new(),
                    retry: None,
                };
                let run = std::panic::AssertUnwindSafe(|| work.run());
                let ended = std::panic::catch_unwind(run);
                reached.end();
                let ended = ended.unwrap_or_else(|_| {
                    let reason = "a bug in shadowbox; report it with the log, and restart".to_owned();
                    Some(Fault { reason, report: None })
                });
                if let Some(fault) = ended {
                    let cause = fault.report.as_ref().map(|report| &report.cause);
                    let backtrace = cause.and_then(|cause| cause.backtrace.as_deref());
                    let output = cause.and_then(|cause| cause.output.as_deref());
                    tracing::error!(reason = fault.reason, backtrace, output, "the projection is faulted");
                    // The manager is gone only when everything stops.
                    let _ = notices.send((id, Notice::Faulted(fault)));
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
    runtime: tokio::runtime::Handle,
    /// Where the live generation has stopped, once it has.
    finishing: Option<Option<Position>>,
    /// The live generation was built from another log, or cannot be read: where that stands says nothing here.
    foreign: bool,
    /// Whether the manager has been told that this is as far as the live generation.
    ready: bool,
    proved: bool,
    /// `Stop` has come: whatever happens now, do not begin again.
    stopping: bool,
    /// What is to be done about dead letters.
    requests: VecDeque<Request>,
    /// The request that is being carried out.
    retry: Option<Retry>,
}

impl Work {
    /// Runs until stopped (None) or faulted (why).
    fn run(mut self) -> Option<Fault> {
        let mut retries = 0;
        let mut epoch = None;
        loop {
            let before = self.job.reached.checkpoint();
            let error = match self.attempt() {
                Leave::Stopped => return None,
                Leave::Failed(error) => error,
            };
            let now = *self.job.log.epoch().borrow();
            let is_new = epoch.replace(now) != Some(now);
            if matches!(error, Error::Epoch) && is_new && !self.stopping && self.retry.is_none() {
                tracing::info!("reading anew what events were forgotten in");
                continue;
            }
            if let Some(retry) = self.retry.take() {
                retry.fail(&error.to_string());
            }
            // Progress resets the budget: only a host that does not recover uses it up.
            if before != self.job.reached.checkpoint() {
                retries = 0;
            }
            if self.stopping {
                // What was not committed is applied again after the next start.
                tracing::warn!(%error, "stopped without the last commit");
                return None;
            }
            if !is_transient(&error) {
                let reason = error.to_string();
                let report = if let Error::Event(report) = error { Some(report) } else { None };
                return Some(Fault { reason, report });
            }
            if retries == limits::RETRIES {
                return Some(Fault { reason: format!("{error} (tried {} times)", retries + 1), report: None });
            }
            let wait = retry_wait(&self.job.module.manifest.projection, retries);
            retries += 1;
            tracing::warn!(%error, ?wait, "going back to the last commit");
            self.publish(|p| p.activity = Activity::Retrying(error.to_string()));
            if !self.pause(wait) {
                return None;
            }
        }
    }

    /// Waits all of the time, whatever comes meanwhile; only to stop is done at once. False: stop.
    fn pause(&mut self, time: Duration) -> bool {
        let end = Instant::now() + time;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let command = self.runtime.block_on(async {
                tokio::select! {
                    command = self.commands.recv() => Some(command),
                    () = tokio::time::sleep(left) => None,
                }
            });
            let Some(command) = command else { return true };
            if !self.obey(command) {
                return false;
            }
        }
    }

    /// Opens everything anew and goes on from the checkpoint that is stored.
    fn attempt(&mut self) -> Leave {
        self.job.doing(Task::Opening);
        let mut session = match Session::open(&self.job) {
            Ok(session) => session,
            Err(error) => return Leave::Failed(error),
        };
        self.foreign = match &self.job.live {
            None => false,
            Some(live) => match check_file(&self.job.log, &live.file) {
                Ok(()) => false,
                Err(error @ (Error::LogReplaced { .. } | Error::View(_))) => {
                    tracing::warn!(%error, "rebuilding without regard to the live generation");
                    true
                }
                Err(error) => return Leave::Failed(error),
            },
        };
        self.job.reached.made_from(session.origin.clone());
        self.job.reached.begin(session.following.seen());
        if session.origin.forgotten.is_some() {
            self.notify(Notice::Forgotten);
        }
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
        session.check_epoch(&self.job)?;
        if self.treat(session)? {
            return Ok(());
        }
        // What comes from now on wakes.
        session.following.has_changed();
        self.job.doing(Task::Reading);
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
        if at_rest {
            self.publish(|p| p.activity = Activity::AtHead);
            session.relax();
        }
        let wake = match self.pass(session, at_rest)? {
            Some(command) => Wake::Command(command),
            None if at_rest => self.wait(session),
            None => return Ok(()),
        };
        if let Wake::Command(command) = wake
            && !self.obey(command)
        {
            return self.finish(session);
        }
        Ok(())
    }

    /// Does the next part of what is to be done about dead letters. False: there is nothing to do.
    fn treat(&mut self, session: &mut Session) -> Result<bool, Leave> {
        if let Some(mut retry) = self.retry.take() {
            let done = session.retry(&self.job, &mut retry);
            let is_done = retry.is_done();
            // Before anything that can fail, so that whoever waits hears of it.
            self.retry = Some(retry);
            if done? {
                self.commit_now(session)?;
            }
            if is_done {
                session.load_park(&self.job)?;
                self.report(session, false);
                self.retry.take().expect("it was just put back").finish(session.park.counts);
            }
            return Ok(true);
        }
        let Some(request) = self.requests.pop_front() else { return Ok(false) };
        // What was set aside since the last commit must be in the file.
        if session.has_uncommitted() || session.is_committing() {
            self.commit_now(session)?;
        }
        match request.treatment {
            Treatment::Retry => self.retry = session.select(&self.job, request)?,
            Treatment::Discard => {
                let answer = match session.discard(&self.job, &request.selector)? {
                    Err(refusal) => Err(refusal),
                    Ok(discarded) => {
                        self.commit_now(session)?;
                        session.load_park(&self.job)?;
                        self.report(session, false);
                        Ok(Outcome { discarded, left: session.park.counts, ..Outcome::default() })
                    }
                };
                // Whoever asked may have gone away.
                let _ = request.reply.send(answer);
            }
        }
        Ok(true)
    }

    /// Returns when everything is committed; more follows.
    fn commit_now(&mut self, session: &mut Session) -> Result<(), Leave> {
        self.commit(session, true, false)?;
        self.commit(session, false, true)
    }

    fn finish(&mut self, session: &mut Session) -> Result<(), Leave> {
        // What was passed over is noted, too: nobody else knows it when this is gone.
        let due = session.has_uncommitted() || session.complete() > session.checkpoint();
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
            Some(Command::Treat(request)) => self.requests.push_back(request),
            Some(Command::Finish(target)) => self.finishing = Some(target),
            Some(Command::Lead) => {
                self.job.live = None;
                self.finishing = None;
            }
        }
        true
    }

    /// Begins a commit if `due`, and tells everybody of those that have ended; if `wait`, all have.
    fn commit(&mut self, session: &mut Session, due: bool, wait: bool) -> Result<(), Leave> {
        self.job.doing(Task::Committing);
        let Some(had_applied) = session.commit(&self.job, due, wait)? else { return Ok(()) };
        self.job.reached.made_from(session.origin.clone());
        self.report(session, wait);
        if had_applied && !self.proved {
            self.proved = true;
            self.job.proving = false;
            self.notify(Notice::Proved);
        }
        Ok(())
    }

    /// Says to the manager if this is as far as the live generation, or has passed where that has stopped; then waits for
    /// the promotion, and answers what comes instead.
    fn pass(&mut self, session: &mut Session, at_rest: bool) -> Result<Option<Option<Command>>, Leave> {
        let Some(live) = &self.job.live else { return Ok(None) };
        let live = live.reached.clone();
        match self.finishing {
            None if !self.ready && (at_rest || (!self.foreign && session.complete() >= live.checkpoint())) => {
                self.ready = true;
                // What it lacks is to be known before it is looked at.
                self.job.reached.made_from(session.origin.clone());
                self.notify(Notice::Ready);
            }
            // What a generation of another log has reached says nothing here; then the head of this log is all there is.
            Some(_) if self.foreign && !at_rest => {}
            Some(target) if self.foreign || session.applied.position >= target => {
                if session.has_uncommitted() || session.is_committing() {
                    self.commit_now(session)?;
                }
                self.report(session, at_rest);
                self.notify(Notice::Passed);
                // Nothing may be applied before the promotion: it belongs to this very position.
                return Ok(Some(self.runtime.block_on(self.commands.recv())));
            }
            _ => {}
        }
        Ok(None)
    }

    /// The one place that waits.
    fn wait(&mut self, session: &mut Session) -> Wake {
        self.job.doing(Task::Resting);
        let mut epoch = self.job.log.epoch();
        if *epoch.borrow_and_update() != session.origin.epoch {
            return Wake::Log;
        }
        self.runtime.block_on(async {
            tokio::select! {
                command = self.commands.recv() => Wake::Command(command),
                () = session.following.changed() => Wake::Log,
                // The sender lives as long as the log.
                _ = epoch.changed() => Wake::Log,
            }
        })
    }

    fn notify(&self, notice: Notice) {
        // The manager is gone only when everything stops.
        let _ = self.job.notices.send((self.job.id, notice));
    }

    /// Tells readers and the status what is committed.
    fn report(&self, session: &Session, at_rest: bool) {
        self.job.reached.commit(session.complete());
        self.publish(|progress| {
            progress.appended = session.appended;
            progress.dead_letters = session.park.counts;
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
        Error::Log(error) => error.is_transient(),
        Error::View(error) => error.is_transient(),
        Error::Host(_) | Error::Epoch => true,
        Error::FirstBatch { .. } | Error::Missing { .. } | Error::Taken { .. } => false,
        Error::Plugin(_) | Error::Event(_) | Error::Full { .. } | Error::LogReplaced { .. } => false,
    }
}
