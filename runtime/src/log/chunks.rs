//! Chunks: stretches of the log as columns, read ahead, and once for all projections that are near each other.
//!
//! A block is a chunk. Of rows, a chunk begins at any position and ends at a multiple of [`limits::CHUNK_EVENTS`], so that
//! readers that began at different positions meet after their first one. While one is worked on, the next ones that have
//! something that is wanted are read by two threads.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use super::Error;
use super::read::{Reader, Rows, Shared, owned};
use super::select::Select;
use crate::config::limits;
use crate::model::{ColumnSet, Columns, Event, Position, Time};

/// Consecutive events of the log; never empty.
pub struct Chunk {
    events: Columns,
    sources: Vec<(u32, Arc<str>)>,
    types: Vec<(u32, Arc<str>)>,
    /// When events were appended: up to which index, and when.
    appended: Vec<(u32, Time)>,
    /// Whether it was ended by a limit, not by the head of the log.
    is_full: bool,
    epoch: u64,
}

impl Chunk {
    pub(super) fn new(
        events: Columns,
        sources: Vec<(u32, Arc<str>)>,
        types: Vec<(u32, Arc<str>)>,
        appended: Vec<(u32, Time)>,
        is_full: bool,
        epoch: u64,
    ) -> Chunk {
        Chunk { events, sources, types, appended, is_full, epoch }
    }

    /// The epoch of forgettings in which it was read.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The events; sources and types are indexes into [`Chunk::sources`] and [`Chunk::types`].
    pub fn events(&self) -> &Columns {
        &self.events
    }

    /// The sources by their numbers in the log and their names.
    pub fn sources(&self) -> &[(u32, Arc<str>)] {
        &self.sources
    }

    /// The event types by their numbers in the log and their names.
    pub fn types(&self) -> &[(u32, Arc<str>)] {
        &self.types
    }

    /// The position of the first event.
    pub fn first(&self) -> u64 {
        self.events.position(0).0
    }

    /// The position after the last event.
    pub fn end(&self) -> u64 {
        self.first() + self.events.len() as u64
    }

    /// When event `i` was appended.
    pub fn appended(&self, i: usize) -> Time {
        let run = self.appended.partition_point(|(end, _)| *end as usize <= i);
        self.appended.get(run).map_or(Time::EPOCH, |(_, time)| *time)
    }

    /// Event `i` with memory of its own; of the columns that were not asked for, nothing.
    pub fn event(&self, i: usize) -> Event {
        let (source, event_type) = (self.events.source(i), self.events.event_type(i));
        owned(self.events.get(i), &self.sources[usize::from(source)].1, &self.types[usize::from(event_type)].1)
    }

    /// The event at a position that is in it, and when it was appended.
    pub(super) fn at(&self, position: Position) -> (Event, Time) {
        let i = (position.0 - self.first()) as usize;
        (self.event(i), self.appended(i))
    }

    /// What it takes in memory, about.
    fn bytes(&self) -> usize {
        self.events.bytes() + 16 * self.appended.len() + 24 * (self.sources.len() + self.types.len()) + 1024
    }
}

/// What a chunk is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    /// The block that begins at this position.
    Block(u64),
    /// Rows from this position on.
    Rows(u64),
}

/// How often a chunk is read again because something was forgotten meanwhile.
const LOADS: u32 = 100;

/// What there is for a reader from a position on.
pub(super) enum Loaded {
    Chunk(Arc<Chunk>),
    /// The log ends here.
    None,
    /// The rows are in a block by now.
    Sealed,
}

enum Slot {
    Loading,
    Ready(Arc<Chunk>),
}

#[derive(Default)]
struct State {
    slots: HashMap<Key, Slot>,
    /// Those that are ready, oldest first.
    order: VecDeque<Key>,
    bytes: usize,
    /// The last one that was ended by the head of the log.
    partial: Option<Key>,
    /// To be read ahead.
    ahead: VecDeque<(Key, ColumnSet)>,
    stopped: bool,
}

/// The chunks of one log that are in memory, and the connections that read them.
pub(super) struct Chunks {
    shared: Arc<Shared>,
    state: Mutex<State>,
    /// A chunk is loaded, or cannot be.
    loaded: Condvar,
    /// There is something to be read ahead.
    wanted: Condvar,
    readers: Mutex<Vec<Reader>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Chunks {
    pub(super) fn new(shared: Arc<Shared>) -> Arc<Chunks> {
        Arc::new(Chunks {
            shared,
            state: Mutex::default(),
            loaded: Condvar::new(),
            wanted: Condvar::new(),
            readers: Mutex::default(),
            threads: Mutex::default(),
        })
    }

    /// Ends the threads that read ahead, and closes the connections.
    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.wanted.notify_all();
        for thread in std::mem::take(&mut *self.threads.lock().expect("no panics while it is held")) {
            // A panic in it was reported where it happened.
            let _ = thread.join();
        }
        self.readers.lock().expect("no panics while it is held").clear();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panics while it is held")
    }

    /// The events from `begin` on as a chunk, which may begin before, and where they begin: blocks without anything that
    /// is wanted are passed over. At the head there is no chunk.
    pub(super) fn get(
        self: &Arc<Self>,
        begin: u64,
        columns: ColumnSet,
        select: &mut Select,
    ) -> Result<(u64, Option<Arc<Chunk>>), Error> {
        let mut begin = begin;
        loop {
            let blocks = self.wanted_blocks(begin, select)?;
            begin = blocks.begin;
            let key = blocks.keys.first().copied().unwrap_or(Key::Rows(begin));
            match self.load(key, columns)? {
                Loaded::Chunk(chunk) => {
                    if chunk.is_full {
                        let ahead = if blocks.keys.is_empty() { vec![Key::Rows(chunk.end())] } else { blocks.keys };
                        self.read_ahead(&ahead, columns);
                    }
                    return Ok((begin, Some(chunk)));
                }
                Loaded::None => return Ok((begin, None)),
                Loaded::Sealed => {}
            }
        }
    }

    /// The block that has a position, from memory if it is there: whoever wants one event of it wants others.
    pub(super) fn block_at(&self, position: Position) -> Result<Option<Arc<Chunk>>, Error> {
        let directory = &self.shared.directory;
        let Some(first) = directory.find(position.0).map(|i| directory.entries()[i].first) else { return Ok(None) };
        match self.load(Key::Block(first), ColumnSet::ALL)? {
            Loaded::Chunk(chunk) => Ok(Some(chunk)),
            Loaded::None | Loaded::Sealed => Ok(None),
        }
    }

    /// The next blocks that have something that is wanted.
    fn wanted_blocks(&self, begin: u64, select: &mut Select) -> Result<Blocks, Error> {
        if self.shared.directory.end() <= begin {
            return Ok(Blocks { begin, keys: Vec::new() });
        }
        let shared = &self.shared;
        self.with_reader(|reader| {
            // Names that another process has added are known once the block is read.
            let mut wants = |source, event_type| {
                !shared.names.knows(source, event_type) || select.wants(source, event_type, &shared.names)
            };
            let first = reader.next_wanted(begin, &mut wants)?;
            let mut keys = Vec::new();
            let mut next = first;
            while let Some(i) = shared.directory.find(next) {
                let (first, end) = {
                    let entries = shared.directory.entries();
                    (entries[i].first, entries[i].end())
                };
                keys.push(Key::Block(first));
                if keys.len() > limits::READ_AHEAD_CHUNKS {
                    break;
                }
                next = reader.next_wanted(end, &mut wants)?;
            }
            Ok(Blocks { begin: first, keys })
        })
    }

    /// From memory, or from the file; one of those who want the same at the same time reads it for all.
    fn load(&self, key: Key, columns: ColumnSet) -> Result<Loaded, Error> {
        for _ in 0..LOADS {
            if let Some(loaded) = self.try_load(key, columns)? {
                return Ok(loaded);
            }
        }
        // The file has forgotten less than it had: it is not the one that was opened.
        Err(Error::Removed { path: self.shared.path().to_owned() })
    }

    /// None if something was forgotten just when it was read.
    fn try_load(&self, key: Key, mut columns: ColumnSet) -> Result<Option<Loaded>, Error> {
        let mut state = self.state();
        loop {
            match state.slots.get(&key) {
                Some(Slot::Ready(chunk)) if chunk.events.set().covers(columns) => {
                    return Ok(Some(Loaded::Chunk(chunk.clone())));
                }
                Some(Slot::Loading) => state = self.loaded.wait(state).expect("no panics while it is held"),
                Some(Slot::Ready(chunk)) => {
                    columns = columns.union(chunk.events.set());
                    break;
                }
                None => break,
            }
        }
        state.remove(key);
        state.slots.insert(key, Slot::Loading);
        drop(state);
        // Whatever happens, those who wait must not wait for ever.
        let mut loading = Loading { chunks: self, key, chunk: None };
        let read = self.with_reader(|reader| match key {
            Key::Block(first) => reader.block(first, columns).map(|chunk| Rows::Chunk(Arc::new(chunk))),
            Key::Rows(begin) => reader.rows(begin, columns),
        });
        match read? {
            Rows::Chunk(chunk) => {
                self.saw(chunk.epoch);
                if chunk.epoch < *self.shared.epoch.borrow() {
                    return Ok(None);
                }
                loading.chunk = Some(chunk.clone());
                Ok(Some(Loaded::Chunk(chunk)))
            }
            Rows::None => Ok(Some(Loaded::None)),
            Rows::Sealed => Ok(Some(Loaded::Sealed)),
        }
    }

    /// This many forgettings have begun and ended: what was read before is not kept.
    pub(super) fn saw(&self, epoch: u64) {
        let is_new = self.shared.epoch.send_if_modified(|known| {
            let is_new = *known < epoch;
            *known = epoch.max(*known);
            is_new
        });
        if is_new {
            let mut state = self.state();
            for key in state.order.clone() {
                state.remove(key);
            }
            state.partial = None;
        }
    }

    /// Has the next chunks read that are not there yet.
    fn read_ahead(self: &Arc<Self>, keys: &[Key], columns: ColumnSet) {
        let mut state = self.state();
        if state.stopped {
            return;
        }
        for &key in keys {
            if !state.slots.contains_key(&key) && state.ahead.iter().all(|(k, _)| *k != key) {
                state.ahead.push_back((key, columns));
                self.wanted.notify_one();
            }
        }
        drop(state);
        let mut threads = self.threads.lock().expect("no panics while it is held");
        while threads.len() < limits::READ_AHEAD_THREADS {
            let chunks = self.clone();
            let thread = std::thread::Builder::new().name("read-ahead".into());
            threads.push(thread.spawn(move || chunks.work_ahead()).expect("a thread can be started"));
        }
    }

    fn work_ahead(&self) {
        let mut state = self.state();
        while !state.stopped {
            match state.ahead.pop_front() {
                // Somebody was faster.
                Some((key, _)) if state.slots.contains_key(&key) => {}
                Some((key, columns)) => {
                    drop(state);
                    // Whoever needs the chunk meets the error too and reports it.
                    let _ = self.load(key, columns);
                    state = self.state();
                }
                None => state = self.wanted.wait(state).expect("no panics while it is held"),
            }
        }
    }

    /// Borrows a connection that nobody uses, or opens one. After an error it is closed.
    pub(super) fn with_reader<T>(&self, read: impl FnOnce(&mut Reader) -> Result<T, Error>) -> Result<T, Error> {
        let idle = self.readers.lock().expect("no panics while it is held").pop();
        let mut reader = match idle {
            Some(reader) => reader,
            None => Reader::open(self.shared.clone())?,
        };
        let answer = read(&mut reader)?;
        let mut readers = self.readers.lock().expect("no panics while it is held");
        if readers.len() < limits::LOG_READERS {
            readers.push(reader);
        }
        Ok(answer)
    }
}

/// Where a reader goes on, and the blocks from there on that it wants; none if it is past all blocks.
struct Blocks {
    begin: u64,
    keys: Vec<Key>,
}

impl State {
    fn remove(&mut self, key: Key) {
        if let Some(Slot::Ready(chunk)) = self.slots.remove(&key) {
            self.bytes -= chunk.bytes();
            self.order.retain(|k| *k != key);
        }
    }

    fn insert(&mut self, key: Key, chunk: Arc<Chunk>) {
        // Rows at the head get more: what ends there is of use only to those who look at the same moment.
        if !chunk.is_full
            && let Some(old) = self.partial.replace(key).filter(|old| *old != key)
        {
            self.remove(old);
        }
        self.bytes += chunk.bytes();
        self.slots.insert(key, Slot::Ready(chunk));
        self.order.push_back(key);
        while self.bytes > limits::LOG_CACHE_BYTES && self.order.len() > 1 {
            let oldest = self.order[0];
            self.remove(oldest);
        }
    }
}

/// A slot that is being loaded; dropping it ends that, whether there is a chunk or not.
struct Loading<'a> {
    chunks: &'a Chunks,
    key: Key,
    chunk: Option<Arc<Chunk>>,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let mut state = self.chunks.state();
        state.slots.remove(&self.key);
        if let Some(chunk) = self.chunk.take().filter(|chunk| chunk.epoch == *self.chunks.shared.epoch.borrow()) {
            state.insert(self.key, chunk);
        }
        self.chunks.loaded.notify_all();
    }
}
