//! Several sources, one order.
//!
//! While there is something to catch up with, events are taken by time, then source name, then position; at the head,
//! as they come. A generation that is rebuilt follows the order which the live one recorded instead, because rows may
//! depend on it.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::Error;
use crate::config::BatchLimits;
use crate::log::{Chunk, EventLog};
use crate::manifest::{Manifest, Subscription};
use crate::model::{Checkpoint, ColumnSet, Columns, Position, Time};
use crate::view::{Mark, Order, Run};

/// Runs of a record that are followed in one step, so that a command never waits long for a filter.
const RUNS: usize = 50_000;

/// Reads the subscribed sources in one order.
pub(super) struct Merge {
    log: EventLog,
    /// By name, so that a source's index orders as its name does.
    cursors: Vec<Cursor>,
    /// Names of the sources by index.
    pub(super) sources: Vec<Arc<str>>,
    /// Event types by their index in batches.
    types: Vec<Arc<str>>,
    columns: ColumnSet,
    guide: Option<Guide>,
    /// The guide's record turned out to be damaged.
    lost: bool,
}

struct Cursor {
    subscription: Subscription,
    /// What is read: taken or passed over before `next`, which is a wanted event if it is not the end.
    chunk: Option<Arc<Chunk>>,
    next: usize,
    /// What the types of the chunk are in batches; None for those that are not wanted.
    types: Vec<Option<u16>>,
    /// The last event taken or passed over.
    done: Option<(Position, Time)>,
    /// The last event read.
    read: Option<(Position, Time)>,
    /// Nothing more was there when we last looked.
    exhausted: bool,
}

impl Cursor {
    fn has_event(&self) -> bool {
        self.chunk.as_ref().is_some_and(|chunk| self.next < chunk.events().len())
    }

    /// What is read; there is some of it left.
    fn ahead(&self) -> &Columns {
        self.chunk.as_ref().expect("it has an event").events()
    }

    /// Position and time of the next event.
    fn peek(&self) -> (Position, Time) {
        (self.ahead().position(self.next), self.ahead().time(self.next))
    }

    fn is_wanted(&self, i: usize) -> bool {
        self.types[usize::from(self.ahead().event_type(i))].is_some()
    }

    /// Passes over events that are not wanted. When all that was read is taken or passed over, the last of it is done.
    fn settle(&mut self) {
        while self.has_event() && !self.is_wanted(self.next) {
            self.next += 1;
        }
        if !self.has_event() {
            self.chunk = None;
            self.done = self.done.max(self.read);
        }
    }

    /// Takes as many events as are wanted one after the other and below `before`, and as there is room for.
    fn take(
        &mut self,
        source: usize,
        limits: &BatchLimits,
        batch: &mut Columns,
        before: impl Fn(Position, Time) -> bool,
    ) {
        let chunk = self.chunk.clone().expect("it has an event");
        let events = chunk.events();
        let room = limits.events - batch.len();
        let mut bytes = limits.bytes.saturating_sub(batch.bytes());
        let mut end = self.next;
        while end < events.len()
            && end - self.next < room
            && bytes > 0
            && self.is_wanted(end)
            && before(events.position(end), events.time(end))
        {
            bytes = bytes.saturating_sub(events.bytes_of(end));
            end += 1;
        }
        let taken: Range<usize> = self.next..end;
        if taken.is_empty() {
            return;
        }
        self.done = Some((events.position(end - 1), events.time(end - 1)));
        batch.extend(events, taken, source as u16, &self.types);
        self.next = end;
        self.settle();
    }
}

/// The recorded order of another generation.
struct Guide {
    order: Order,
    runs: VecDeque<Run>,
    /// A projection of one source has no record: its order is the log's.
    recorded: bool,
}

/// What one step of merging came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Go on: there are events in the batch, or some were passed over.
    More,
    /// There is nothing to take now: all sources are read to their heads.
    Head,
    /// The generation that is followed has recorded no more.
    EndOfRecord,
}

impl Merge {
    /// Begins after where each source of the manifest stands, and reads these columns.
    pub(super) fn new(
        log: &EventLog,
        manifest: &Manifest,
        done: &[Option<(Position, Time)>],
        columns: ColumnSet,
    ) -> Merge {
        let cursors = manifest.sources.iter().zip(done).map(|(subscription, &done)| Cursor {
            subscription: subscription.clone(),
            chunk: None,
            next: 0,
            types: Vec::new(),
            done,
            read: done,
            exhausted: false,
        });
        Merge {
            log: log.clone(),
            cursors: cursors.collect(),
            sources: manifest.sources.iter().map(|s| s.source.as_str().into()).collect(),
            types: Vec::new(),
            columns,
            guide: None,
            lost: false,
        }
    }

    /// Follows the order of another generation from now on, if it has the same sources; otherwise that order says
    /// nothing about ours, and we go by time.
    pub(super) fn follow(&mut self, generation: &Path) -> Result<(), Error> {
        let order = Order::open(generation)?;
        let same = order.sources()?.iter().map(String::as_str).eq(self.sources.iter().map(|s| &**s));
        self.guide = same.then(|| Guide { order, runs: VecDeque::new(), recorded: self.sources.len() > 1 });
        Ok(())
    }

    /// Goes by time from now on.
    pub(super) fn lead(&mut self) {
        if self.guide.take().is_some() {
            self.refresh();
        }
    }

    /// True if there was an order to follow, and it cannot be read any more: from there on we go by time.
    pub(super) fn has_lost_its_guide(&self) -> bool {
        self.lost
    }

    /// The log has moved: look again.
    pub(super) fn refresh(&mut self) {
        self.cursors.iter_mut().for_each(|c| c.exhausted = false);
    }

    /// Where each source stands after everything taken so far, by index.
    pub(super) fn done(&self) -> Vec<Option<(Position, Time)>> {
        self.cursors.iter().map(|c| c.done).collect()
    }

    /// Event types by their index in batches.
    pub(super) fn types(&self) -> &[Arc<str>] {
        &self.types
    }

    /// Takes the next events into `batch`, up to the limits, and appends to `runs` in which order. The step may also
    /// pass over unwanted events only; that is in `runs` as well.
    pub(super) fn next(
        &mut self,
        limits: &BatchLimits,
        batch: &mut Columns,
        runs: &mut Vec<Run>,
    ) -> Result<Step, Error> {
        if self.guide.is_none() {
            return self.by_time(limits, batch, runs);
        }
        match self.follow_record(limits, batch, runs) {
            Err(Error::View(error)) if !error.is_transient() => {
                // A rebuild is what mends a damaged generation, so it must not need it.
                tracing::warn!(%error, "the recorded order ends here; going on by time");
                self.lost = true;
                self.lead();
                Ok(Step::More)
            }
            step => step,
        }
    }

    fn by_time(&mut self, limits: &BatchLimits, batch: &mut Columns, runs: &mut Vec<Run>) -> Result<Step, Error> {
        let mut moved = false;
        loop {
            for i in 0..self.cursors.len() {
                if !self.cursors[i].has_event() && !self.cursors[i].exhausted {
                    // What comes next in this source is not known yet, so nothing of the others may be taken.
                    let before = self.cursors[i].done;
                    self.fill(i)?;
                    let cursor = &self.cursors[i];
                    if cursor.done > before {
                        moved = true;
                        record(runs, i, cursor);
                    }
                    if !cursor.has_event() && !cursor.exhausted {
                        return Ok(Step::More);
                    }
                }
            }
            let with_event = self.cursors.iter().enumerate().filter(|(_, c)| c.has_event());
            let (mut first, mut second) = (None, None);
            for key in with_event.map(|(i, c)| (c.peek().1, i)) {
                if first.is_none_or(|first| key < first) {
                    second = first.replace(key);
                } else if second.is_none_or(|second| key < second) {
                    second = Some(key);
                }
            }
            let Some((_, first)) = first else {
                return Ok(if moved || !batch.is_empty() { Step::More } else { Step::Head });
            };
            if is_full(batch, limits) {
                return Ok(Step::More);
            }
            let cursor = &mut self.cursors[first];
            cursor.take(first, limits, batch, |_, time| second.is_none_or(|second| (time, first) < second));
            record(runs, first, cursor);
            if is_full(batch, limits) {
                return Ok(Step::More);
            }
        }
    }

    fn follow_record(&mut self, limits: &BatchLimits, batch: &mut Columns, runs: &mut Vec<Run>) -> Result<Step, Error> {
        for _ in 0..RUNS {
            if is_full(batch, limits) {
                return Ok(Step::More);
            }
            let Some(run) = self.next_run()? else {
                return Ok(if batch.is_empty() { Step::EndOfRecord } else { Step::More });
            };
            let i = usize::from(run.source);
            if !self.cursors[i].has_event() && self.cursors[i].read.map(|(p, _)| p) < Some(run.to) {
                self.cursors[i].exhausted = false;
                self.fill(i)?;
                if self.cursors[i].exhausted {
                    let source_name = self.sources[i].to_string();
                    return Err(Error::Record { source_name, position: run.to });
                }
            }
            let cursor = &mut self.cursors[i];
            if cursor.has_event() {
                cursor.take(i, limits, batch, |position, _| position <= run.to);
            }
            let next_is_beyond = cursor.has_event() && cursor.peek().0 > run.to;
            let all_scanned = !cursor.has_event() && cursor.read.map(|(p, _)| p) >= Some(run.to);
            if next_is_beyond || all_scanned {
                let time = cursor.done.map_or(Time::EPOCH, |(_, time)| time);
                if cursor.done.map(|(p, _)| p) < Some(run.to) {
                    cursor.done = Some((run.to, time));
                }
                self.guide.as_mut().expect("we follow").runs.pop_front();
            }
            record(runs, i, cursor);
        }
        // However many runs there were without a wanted event, a command does not wait longer than this.
        Ok(Step::More)
    }

    /// The run to go on with: not finished yet, and still at the front of the queue.
    fn next_run(&mut self) -> Result<Option<Run>, Error> {
        let guide = self.guide.as_mut().expect("only called while following");
        loop {
            while let Some(run) = guide.runs.front() {
                // After a restart the record is read from its beginning; what is done is dropped here.
                if self.cursors[usize::from(run.source)].done.map(|(p, _)| p) < Some(run.to) {
                    return Ok(Some(*run));
                }
                guide.runs.pop_front();
            }
            if guide.recorded {
                match guide.order.next_runs()? {
                    Some(runs) => guide.runs.extend(runs),
                    None => return Ok(None),
                }
            } else {
                let to = guide.order.checkpoint()?.get(&self.sources[0]);
                match to.filter(|&to| self.cursors[0].done.map(|(p, _)| p) < Some(to)) {
                    Some(to) => guide.runs.push_back(Run { source: 0, to }),
                    None => return Ok(None),
                }
            }
        }
    }

    /// Reads on in one source of which everything is taken.
    fn fill(&mut self, i: usize) -> Result<(), Error> {
        let cursor = &mut self.cursors[i];
        let after = cursor.read.map(|(position, _)| position);
        let Some(chunk) = self.log.chunk(&cursor.subscription.source, after, self.columns)? else {
            cursor.exhausted = true;
            return Ok(());
        };
        cursor.types.clear();
        for name in chunk.types() {
            let wanted = cursor.subscription.wants(name).then(|| number(&mut self.types, name)).transpose()?;
            cursor.types.push(wanted);
        }
        cursor.read = Some(chunk.last());
        cursor.chunk = Some(chunk);
        cursor.next = 0;
        cursor.settle();
        Ok(())
    }
}

/// The index of an event type in batches.
fn number(types: &mut Vec<Arc<str>>, name: &Arc<str>) -> Result<u16, Error> {
    let index = types.iter().position(|t| t == name).unwrap_or_else(|| {
        types.push(name.clone());
        types.len() - 1
    });
    u16::try_from(index).map_err(|_| Error::Types)
}

fn is_full(batch: &Columns, limits: &BatchLimits) -> bool {
    batch.len() >= limits.events || batch.bytes() >= limits.bytes
}

fn record(runs: &mut Vec<Run>, source: usize, cursor: &Cursor) {
    let Some((to, _)) = cursor.done else { return };
    let source = source as u16;
    match runs.last_mut() {
        Some(run) if run.source == source => run.to = to,
        _ => runs.push(Run { source, to }),
    }
}

/// Marks by index of the manifest's sources.
pub(super) fn done(manifest: &Manifest, marks: &[(Arc<str>, Mark)]) -> Vec<Option<(Position, Time)>> {
    let of = |source: &str| marks.iter().find(|(s, _)| **s == *source).map(|(_, mark)| (mark.position, mark.time));
    manifest.sources.iter().map(|subscription| of(&subscription.source)).collect()
}

/// The checkpoint of positions by index.
pub(super) fn checkpoint(sources: &[Arc<str>], done: &[Option<(Position, Time)>]) -> Checkpoint {
    let pairs = sources.iter().zip(done);
    pairs.filter_map(|(source, done)| done.map(|(position, _)| (&**source, position))).collect()
}
