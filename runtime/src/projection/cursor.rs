//! A projection's place in the log: takes the events that it wants, in the log's order, and passes over the others.

use std::collections::HashMap;
use std::sync::Arc;

use super::Error;
use crate::config::BatchLimits;
use crate::log::{self, Chunk, EventLog, Reading};
use crate::manifest::Manifest;
use crate::model::{ColumnSet, Columns, Position};

/// Chunks that are passed over in one step, so that a command never waits long for a filter.
const CHUNKS: usize = 64;

/// Events for one call of a plugin, with the names that are in them.
pub(super) struct Batch {
    pub(super) events: Columns,
    pub(super) sources: Names,
    pub(super) types: Names,
}

/// Names by their index in a batch. No batch has more events than an index can tell apart.
#[derive(Default)]
pub(super) struct Names {
    pub(super) names: Vec<Arc<str>>,
    /// By the name's number in the log.
    indexes: HashMap<u32, u16>,
}

impl Names {
    fn index(&mut self, (number, name): &(u32, Arc<str>)) -> u16 {
        *self.indexes.entry(*number).or_insert_with(|| {
            self.names.push(name.clone());
            (self.names.len() - 1) as u16
        })
    }

    fn clear(&mut self) {
        self.names.clear();
        self.indexes.clear();
    }
}

impl Batch {
    pub(super) fn new(columns: ColumnSet) -> Batch {
        Batch { events: Columns::new(columns), sources: Names::default(), types: Names::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.events.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.events.clear();
        self.sources.clear();
        self.types.clear();
    }

    /// As a plugin gets it.
    pub(super) fn encode(&self, manifest: &Manifest) -> Vec<u8> {
        self.events.encode(&self.sources.names, &self.types.names, manifest.batch, manifest.forgotten)
    }
}

/// How far a projection is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Done {
    /// The last event taken or passed over.
    pub(super) position: Option<Position>,
    /// How many were taken since the session began, those among them whose content is forgotten.
    pub(super) taken: u64,
}

impl Done {
    fn next(self) -> u64 {
        self.position.map_or(0, |p| p.0 + 1)
    }
}

/// What one step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Go on: there are events in the batch, or some were passed over.
    More,
    /// There is nothing to take now.
    Head,
}

/// Reads what a projection wants.
pub(super) struct Cursor {
    reading: Reading,
    /// Of forgettings: what was read in another one does not belong to the same rows.
    pub(super) epoch: u64,
    /// Whether events whose content is forgotten are wanted, too.
    forgotten: bool,
    /// What is read: taken or passed over before `next`.
    chunk: Option<Arc<Chunk>>,
    next: usize,
    /// Of the chunk's names, which subscriptions they match, and what they are in the batch.
    source_masks: Vec<u64>,
    type_masks: Vec<u64>,
    sources: Vec<Option<u16>>,
    types: Vec<Option<u16>>,
    done: Done,
    /// Stretches that could not be read and were passed over.
    pub(super) damaged: Vec<(Position, Position)>,
}

impl Cursor {
    /// Goes on after `done`, and reads these columns as they are in an epoch.
    pub(super) fn new(log: &EventLog, manifest: &Manifest, done: Done, columns: ColumnSet, epoch: u64) -> Cursor {
        Cursor {
            reading: log.reading(manifest, columns),
            epoch,
            forgotten: manifest.forgotten,
            chunk: None,
            next: 0,
            source_masks: Vec::new(),
            type_masks: Vec::new(),
            sources: Vec::new(),
            types: Vec::new(),
            done,
            damaged: Vec::new(),
        }
    }

    /// After everything taken so far.
    pub(super) fn done(&self) -> Done {
        self.done
    }

    /// Takes the next events into a batch, up to the limits. The step may also pass over events only. After
    /// [`Error::Epoch`] it may go on with what is in the batch, if the epoch is the one of what comes next.
    pub(super) fn next(&mut self, limits: &BatchLimits, batch: &mut Batch) -> Result<Step, Error> {
        self.forget_names();
        let before = self.done;
        for _ in 0..CHUNKS {
            if self.chunk.is_none() && !self.fill()? {
                let moved = self.done != before;
                return Ok(if moved { Step::More } else { Step::Head });
            }
            self.take(limits, batch);
            if batch.len() >= limits.events || batch.events.bytes() >= limits.bytes {
                break;
            }
        }
        Ok(Step::More)
    }

    /// Each batch has names of its own.
    fn forget_names(&mut self) {
        self.sources.fill(None);
        self.types.fill(None);
    }

    /// Reads on. False: the log ends here.
    fn fill(&mut self) -> Result<bool, Error> {
        let (begin, chunk) = loop {
            match self.reading.chunk(self.done.next()) {
                Ok(found) => break found,
                Err(error) => self.pass_over(error)?,
            }
        };
        if begin > self.done.next() {
            self.done.position = Some(Position(begin - 1));
        }
        let Some(chunk) = chunk else { return Ok(false) };
        if chunk.epoch() != self.epoch {
            return Err(Error::Epoch);
        }
        self.reading.masks(&chunk, &mut self.source_masks, &mut self.type_masks);
        for (indexes, names) in [(&mut self.sources, chunk.sources()), (&mut self.types, chunk.types())] {
            indexes.clear();
            indexes.resize(names.len(), None);
        }
        self.next = (begin - chunk.first()) as usize;
        self.chunk = Some(chunk);
        Ok(true)
    }

    /// Passes over a block that cannot be read, if somebody has said that this is to be done.
    fn pass_over(&mut self, error: log::Error) -> Result<(), Error> {
        let log::Error::Damaged { first, last: Some(last), .. } = &error else { return Err(error.into()) };
        let begin = first.0.max(self.done.next());
        let Some(wanted) = self.reading.passes_over(begin, last.0 + 1)? else { return Err(error.into()) };
        tracing::error!(%error, "passing over it");
        self.damaged.push((Position(begin), *last));
        self.done = Done { position: Some(*last), taken: self.done.taken + wanted };
        Ok(())
    }

    /// Takes what is wanted of the chunk and as there is room for.
    fn take(&mut self, limits: &BatchLimits, batch: &mut Batch) {
        let chunk = self.chunk.clone().expect("it is filled");
        let events = chunk.events();
        let mut bytes = limits.bytes.saturating_sub(batch.events.bytes());
        let mut room = limits.events - batch.len();
        // Events before this are in the batch or not wanted.
        let mut from = self.next;
        let mut i = self.next;
        while i < events.len() && room > 0 && bytes > 0 {
            let (source, event_type) = (usize::from(events.source(i)), usize::from(events.event_type(i)));
            if self.source_masks[source] & self.type_masks[event_type] == 0 {
                self.copy(events, from..i, batch);
                from = i + 1;
            } else if events.is_forgotten(i) && !self.forgotten {
                self.copy(events, from..i, batch);
                from = i + 1;
                // It was wanted, and is dealt with.
                self.done.taken += 1;
            } else {
                self.sources[source].get_or_insert_with(|| batch.sources.index(&chunk.sources()[source]));
                self.types[event_type].get_or_insert_with(|| batch.types.index(&chunk.types()[event_type]));
                bytes = bytes.saturating_sub(events.bytes_of(i));
                room -= 1;
            }
            i += 1;
        }
        self.copy(events, from..i, batch);
        if i > self.next {
            self.done.position = Some(events.position(i - 1));
        }
        self.next = i;
        if i == events.len() {
            self.chunk = None;
        }
    }

    fn copy(&mut self, events: &Columns, range: std::ops::Range<usize>, batch: &mut Batch) {
        if !range.is_empty() {
            self.done.taken += range.len() as u64;
            batch.events.extend(events, range, &self.sources, &self.types);
        }
    }
}
