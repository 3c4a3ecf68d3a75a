//! Several sources, one order.
//!
//! While there is something to catch up with, events are taken by time, then source name, then position; at the head,
//! as they come. A generation that is rebuilt follows the order which the live one recorded instead, because rows may
//! depend on it.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::Error;
use crate::config::BatchLimits;
use crate::log::{EventLog, ReadLimits, Reader, SourceReader};
use crate::manifest::Manifest;
use crate::model::{Checkpoint, Columns, Position, Time};
use crate::view::{Mark, Order, Run};

/// Events that are looked at in one read, wanted or not, so that a command never waits long for a filter.
const SCAN: usize = 50_000;

/// Reads the subscribed sources in one order.
pub(super) struct Merge {
    reader: Reader,
    /// By name, so that a source's index orders as its name does.
    cursors: Vec<Cursor>,
    /// Names of the sources by index.
    pub(super) sources: Vec<Arc<str>>,
    types: Arc<Mutex<Vec<Arc<str>>>>,
    guide: Option<Guide>,
}

struct Cursor {
    reader: SourceReader,
    /// Read, but not taken: from `next` on.
    ahead: Columns,
    next: usize,
    /// The last event taken or passed over.
    done: Option<(Position, Time)>,
    /// Nothing more was there when we last looked.
    exhausted: bool,
}

impl Cursor {
    fn has_event(&self) -> bool {
        self.next < self.ahead.len()
    }

    /// Once everything that was read is taken, the events that were passed over on the way are done too.
    fn settle(&mut self) {
        if !self.has_event() && self.reader.scanned() > self.done {
            self.done = self.reader.scanned();
        }
    }

    fn take_into(&mut self, out: &mut Columns) {
        let event = self.ahead.get(self.next);
        out.push(self.ahead.source(self.next), self.ahead.event_type(self.next), event);
        self.done = Some((event.position, event.time));
        self.next += 1;
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
    /// Begins after where each source of the manifest stands.
    pub(super) fn new(log: &EventLog, manifest: &Manifest, done: &[Option<(Position, Time)>]) -> Result<Merge, Error> {
        let types = Arc::new(Mutex::new(Vec::new()));
        let cursors = manifest.sources.iter().zip(done).enumerate().map(|(index, (subscription, &done))| {
            let reader = SourceReader::new(subscription.clone(), index as u16, types.clone(), done);
            Cursor { reader, ahead: Columns::default(), next: 0, done, exhausted: false }
        });
        Ok(Merge {
            reader: log.reader()?,
            cursors: cursors.collect(),
            sources: manifest.sources.iter().map(|s| s.source.as_str().into()).collect(),
            types,
            guide: None,
        })
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

    /// The log has moved: look again.
    pub(super) fn refresh(&mut self) {
        self.cursors.iter_mut().for_each(|c| c.exhausted = false);
    }

    /// Where each source stands after everything taken so far, by index.
    pub(super) fn done(&self) -> Vec<Option<(Position, Time)>> {
        self.cursors.iter().map(|c| c.done).collect()
    }

    /// Event types by their index in batches.
    pub(super) fn types(&self) -> Vec<Arc<str>> {
        self.types.lock().expect("no panics while it is held").clone()
    }

    /// A digest of an event, to tell later whether it is still there.
    pub(super) fn fingerprint(&mut self, source: &str, position: Position) -> Result<Option<(i64, Time)>, Error> {
        Ok(self.reader.fingerprint(source, position)?)
    }

    /// Takes the next events into `batch`, up to the limits, and appends to `runs` in which order. The step may also
    /// pass over unwanted events only; that is in `runs` as well.
    pub(super) fn next(
        &mut self,
        limits: &BatchLimits,
        batch: &mut Columns,
        runs: &mut Vec<Run>,
    ) -> Result<Step, Error> {
        if self.guide.is_some() { self.follow_record(limits, batch, runs) } else { self.by_time(limits, batch, runs) }
    }

    fn by_time(&mut self, limits: &BatchLimits, batch: &mut Columns, runs: &mut Vec<Run>) -> Result<Step, Error> {
        let mut moved = false;
        loop {
            for i in 0..self.cursors.len() {
                if !self.cursors[i].has_event() && !self.cursors[i].exhausted {
                    // What comes next in this source is not known yet, so nothing of the others may be taken.
                    self.fill(i, limits)?;
                    let cursor = &mut self.cursors[i];
                    let before = cursor.done;
                    cursor.settle();
                    if cursor.done > before {
                        moved = true;
                        record(runs, i, cursor);
                    }
                    if !cursor.has_event() && !cursor.exhausted {
                        return Ok(Step::More);
                    }
                }
            }
            let key = |c: &Cursor, i: usize| (c.ahead.time(c.next), i);
            let mut keys: Vec<_> =
                self.cursors.iter().enumerate().filter(|(_, c)| c.has_event()).map(|(i, c)| key(c, i)).collect();
            keys.sort_unstable();
            let Some(&(_, first)) = keys.first() else {
                return Ok(if moved || !batch.is_empty() { Step::More } else { Step::Head });
            };
            let second = keys.get(1).copied();
            let cursor = &mut self.cursors[first];
            while cursor.has_event() && second.is_none_or(|s| key(cursor, first) < s) {
                if is_full(batch, limits) {
                    record(runs, first, cursor);
                    return Ok(Step::More);
                }
                cursor.take_into(batch);
            }
            cursor.settle();
            record(runs, first, cursor);
            if is_full(batch, limits) {
                return Ok(Step::More);
            }
        }
    }

    fn follow_record(&mut self, limits: &BatchLimits, batch: &mut Columns, runs: &mut Vec<Run>) -> Result<Step, Error> {
        for _ in 0..SCAN {
            if is_full(batch, limits) {
                return Ok(Step::More);
            }
            let Some(run) = self.next_run()? else {
                return Ok(if batch.is_empty() { Step::EndOfRecord } else { Step::More });
            };
            let i = usize::from(run.source);
            if !self.cursors[i].has_event() && self.cursors[i].reader.scanned().map(|(p, _)| p) < Some(run.to) {
                self.cursors[i].exhausted = false;
                self.fill(i, limits)?;
                let cursor = &self.cursors[i];
                if cursor.exhausted && cursor.reader.scanned().map(|(p, _)| p) < Some(run.to) {
                    let source_name = self.sources[i].to_string();
                    return Err(Error::Record { source_name, position: run.to });
                }
            }
            let cursor = &mut self.cursors[i];
            while cursor.has_event() && cursor.ahead.position(cursor.next) <= run.to && !is_full(batch, limits) {
                cursor.take_into(batch);
            }
            let next_is_beyond = cursor.has_event() && cursor.ahead.position(cursor.next) > run.to;
            let all_scanned = !cursor.has_event() && cursor.reader.scanned().map(|(p, _)| p) >= Some(run.to);
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
    fn fill(&mut self, i: usize, limits: &BatchLimits) -> Result<(), Error> {
        let cursor = &mut self.cursors[i];
        cursor.ahead.clear();
        cursor.next = 0;
        let read = ReadLimits { events: limits.events, bytes: limits.bytes, scan: SCAN };
        cursor.exhausted = self.reader.read(&mut cursor.reader, read, &mut cursor.ahead)?;
        Ok(())
    }
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
