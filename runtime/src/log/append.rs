//! Appending: one durable transaction for all who wait for one.
//!
//! Of those who wait one commits what has queued up meanwhile, its own events among it. An append of some thousand
//! events is packed into blocks at once: as rows first, it would be written twice.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::Thread;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use super::block::{self, Row, Section};
use super::ids::{self, Hasher, Ids};
use super::names::{Failed, Kind, Numbering};
use super::read::{Failures, Shared, all_columns, decode_block, raw};
use super::turn::Turns;
use super::{Appended, Counts, Error, Head, file};
use crate::config::limits;
use crate::fault;
use crate::model::{BatchColumn, ColumnSet, Columns, NewEvent, Position, Time};

/// Events that somebody waits for to be appended.
struct Pending {
    events: Vec<NewEvent>,
    bytes: usize,
    /// Who waits.
    thread: Thread,
    result: Mutex<Option<Result<Vec<Appended>, Error>>>,
}

impl Pending {
    fn end(&self, result: Result<Vec<Appended>, Error>) {
        *self.result.lock().expect("no panics while it is held") = Some(result);
        self.thread.unpark();
    }

    fn ended(&self) -> Option<Result<Vec<Appended>, Error>> {
        self.result.lock().expect("no panics while it is held").take()
    }
}

/// What waits for the writer.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<Arc<Pending>>,
    bytes: usize,
    /// Somebody commits.
    is_led: bool,
    /// Whoever did has panicked.
    is_broken: bool,
}

impl Queue {
    /// As much as belongs into one transaction, the first in any case.
    fn next(&mut self) -> Vec<Arc<Pending>> {
        let mut group: Vec<Arc<Pending>> = Vec::new();
        let (mut events, mut bytes) = (0, 0);
        while let Some(first) = self.waiting.front() {
            (events, bytes) = (events + first.events.len(), bytes + first.bytes);
            if !group.is_empty() && (events > limits::APPEND_EVENTS || bytes > limits::APPEND_BYTES) {
                break;
            }
            self.bytes -= first.bytes;
            group.extend(self.waiting.pop_front());
        }
        group
    }
}

/// All appends of a process to a log.
pub(super) struct Appender {
    queue: Mutex<Queue>,
    writer: Mutex<Writer>,
}

/// Commits for all who wait; dropping it lets the next one do that.
struct Lead<'a>(&'a Appender);

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.is_led = false;
        queue.is_broken |= std::thread::panicking();
        queue.waiting.iter().take(if queue.is_broken { usize::MAX } else { 1 }).for_each(|next| next.thread.unpark());
    }
}

impl Appender {
    pub(super) fn new(writer: Writer) -> Appender {
        Appender { queue: Mutex::default(), writer: Mutex::new(writer) }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("no panics while it is held")
    }

    /// Runs alone.
    pub(super) fn with_writer<T>(&self, run: impl FnOnce(&mut Writer) -> T) -> T {
        run(&mut self.writer.lock().expect("a panic would have ended the process"))
    }

    /// Appends, and calls `committed` after each transaction before anybody hears of it.
    pub(super) fn append(&self, events: Vec<NewEvent>, committed: impl Fn(&Done)) -> Result<Vec<Appended>, Error> {
        let bytes = events.iter().map(size).sum();
        let mine = Arc::new(Pending { events, bytes, thread: std::thread::current(), result: Mutex::default() });
        {
            let mut queue = self.queue();
            if !queue.waiting.is_empty() && queue.bytes + bytes > limits::APPEND_QUEUE_BYTES {
                return Err(Error::Busy { bytes: queue.bytes });
            }
            queue.bytes += bytes;
            queue.waiting.push_back(mine.clone());
        }
        loop {
            if let Some(result) = mine.ended() {
                return result;
            }
            let group = {
                let mut queue = self.queue();
                assert!(!queue.is_broken, "whoever appended these events has panicked");
                if queue.is_led || queue.waiting.is_empty() {
                    drop(queue);
                    // Whoever leads says when these are committed, or it is this thread's turn. Nobody waits for the
                    // writer itself: a thread that comes back at once would be faster than those who have to wake.
                    std::thread::park();
                    continue;
                }
                queue.is_led = true;
                queue.next()
            };
            let _lead = Lead(self);
            let mut writer = self.writer.lock().expect("a panic would have ended the process");
            match writer.append(&group.iter().map(|pending| &pending.events[..]).collect::<Vec<_>>()) {
                Ok((done, appended)) => {
                    committed(&done);
                    group.iter().zip(appended).for_each(|(pending, appended)| pending.end(Ok(appended)));
                }
                // Whose fault it was is not known, so each is tried alone; what was appended all the same, is a duplicate.
                Err(_) if group.len() > 1 => {
                    for pending in group {
                        let alone = writer.append(&[&pending.events]).map(|(done, mut appended)| {
                            committed(&done);
                            appended.remove(0)
                        });
                        pending.end(alone);
                    }
                }
                Err(error) => group[0].end(Err(error)),
            }
        }
    }
}

/// About what an event takes in memory.
fn size(event: &NewEvent) -> usize {
    let NewEvent { source, id, stream, event_type, metadata, payload, .. } = event;
    source.len() + id.len() + stream.len() + event_type.len() + metadata.len() + payload.len() + 160
}

/// What one transaction has come to.
pub(super) struct Done {
    /// Where the log ended before it, and ends after it.
    pub(super) before: u64,
    pub(super) head: Head,
    /// The sources and types of its events.
    pub(super) counts: Counts,
    /// The events that are rows, at most.
    pub(super) rows: u64,
}

/// An event that the log does not have yet.
struct New<'a> {
    event: &'a NewEvent,
    source: u32,
    event_type: u32,
}

const APPEND: [&str; 3] = ["append.begun", "append.written", "append.committed"];
const SEAL: [&str; 3] = ["seal.begun", "seal.written", "seal.committed"];

/// The one connection of a process that writes to the log.
pub(super) struct Writer {
    shared: Arc<Shared>,
    connection: Connection,
    turns: Turns,
    hasher: Hasher,
    ids: Ids,
    /// The ids of blocks that duplicates were looked for in, the last one first.
    looked: VecDeque<(u64, Arc<block::Decoded>)>,
}

/// Blocks whose ids are kept for the next duplicates: whoever sends events again sends them in order.
const LOOKED: usize = 8;

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        connection: Connection,
        data: &Path,
        key: [u8; 16],
    ) -> Result<Writer, Error> {
        let failed = |error| Error::File { path: data.to_owned(), error };
        let turns = Turns::open(data).map_err(failed)?;
        Ok(Writer {
            shared,
            connection,
            turns,
            hasher: Hasher::new(&key),
            ids: Ids::default(),
            looked: VecDeque::new(),
        })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Moves everything that is in the write-ahead log into the file itself. Readers may be in the way; then some of it
    /// stays where it is, which is no loss, and nobody waits for them.
    pub(super) fn tidy(&self) {
        let _ = self.connection.busy_timeout(Duration::ZERO);
        let _ = self.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
        let _ = self.connection.busy_timeout(limits::DATABASE_BUSY);
    }

    /// Runs a transaction when it is this writer's turn. `steps` are the fault points before, in, and after it.
    pub(super) fn transaction<T>(
        &mut self,
        steps: [&'static str; 3],
        run: impl FnOnce(&mut Open<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let failures = self.shared.failures.clone();
        let turn = self.turns.take().map_err(|error| Error::File { path: failures.0.clone(), error })?;
        let begin = self.connection.transaction_with_behavior(TransactionBehavior::Immediate);
        let tx = begin.map_err(|error| failures.sqlite(error))?;
        let path = tx.path().unwrap_or_default().to_owned();
        fault::fail(steps[0], &path).map_err(|error| failures.sqlite(full(error)))?;
        self.ids.begin(&tx).map_err(|failed| ids_failed(&failures, failed))?;
        self.shared.directory.refresh(&tx, &failures)?;
        let mut open = Open {
            shared: &self.shared,
            tx: &tx,
            hasher: &self.hasher,
            ids: &mut self.ids,
            looked: &mut self.looked,
            candidates: None,
            expected: 0,
        };
        let done = run(&mut open)?;
        fault::fail(steps[1], &path).map_err(|error| failures.sqlite(full(error)))?;
        tx.commit().map_err(|error| failures.sqlite(error))?;
        fault::point(steps[2], &path);
        drop(turn);
        Ok(done)
    }

    fn append(&mut self, groups: &[&[NewEvent]]) -> Result<(Done, Vec<Vec<Appended>>), Error> {
        let shared = self.shared.clone();
        let appended = match self.transaction(APPEND, |open| open.append(groups)) {
            Err(error @ Error::Index { .. }) => {
                tracing::error!(%error, "making the index of ids anew from the blocks");
                self.index_anew()?;
                self.transaction(APPEND, |open| open.append(groups))
            }
            appended => appended,
        };
        let (done, appended, has_new_names) = appended?;
        if has_new_names {
            // They are committed; who needs one that could not be read looks for it again.
            let refresh = |kind| shared.names.refresh(kind, &self.connection);
            let _ = refresh(Kind::Source).and_then(|()| refresh(Kind::Type));
        }
        Ok((done, appended))
    }

    /// Makes the index of ids from the blocks, which have everything that is in it: some seconds for ten million events.
    fn index_anew(&mut self) -> Result<(), Error> {
        let failures = self.shared.failures.clone();
        let indexed = |result: Result<_, ids::Error>| result.map_err(|failed| ids_failed(&failures, failed));
        let turn = self.turns.take().map_err(|error| Error::File { path: failures.0.clone(), error })?;
        let begin = self.connection.transaction_with_behavior(TransactionBehavior::Immediate);
        let tx = begin.map_err(|error| failures.sqlite(error))?;
        self.shared.directory.refresh(&tx, &failures)?;
        indexed(self.ids.clear(&tx))?;
        let blocks: Vec<u64> = self.shared.directory.entries().iter().map(|entry| entry.first).collect();
        for first in blocks {
            let block = decode_block(&tx, &failures, first, ColumnSet::from_iter([BatchColumn::Ids]))?;
            let entry = |i: usize| {
                let source = block.sources[usize::from(block.columns.source(i))];
                (self.hasher.hash(source, block.columns.get(i).id), first + i as u64)
            };
            let mut entries: Vec<_> = (0..block.columns.len()).map(entry).collect();
            let budget = entries.len() * ids::MERGE_SHARE;
            indexed(self.ids.add(&tx, &mut entries).and_then(|()| self.ids.merge_step(&tx, budget)).map(drop))?;
        }
        tx.commit().map_err(|error| failures.sqlite(error))?;
        drop(turn);
        Ok(())
    }

    /// Enters a packed stretch. Answers false if the blocks do not end any more where it begins.
    pub(super) fn seal(&mut self, stretch: &Stretch, blocks: &[(u64, block::Block)]) -> Result<bool, Error> {
        let shared = self.shared.clone();
        let rows = stretch.rows();
        let sealed = self.transaction(SEAL, |open| {
            if open.shared.directory.end() != rows[0].raw.position.0 {
                return Ok(false);
            }
            open.store(&rows, blocks)?;
            open.unrow(rows[0].raw.position.0 + rows.len() as u64)?;
            Ok(true)
        })?;
        shared.directory.refresh(&self.connection, &shared.failures)?;
        Ok(sealed)
    }
}

pub(super) fn ids_failed(failures: &Failures, failed: ids::Error) -> Error {
    match failed {
        ids::Error::Sqlite(error) => failures.sqlite(error),
        ids::Error::Damage { what } => Error::Index { path: failures.0.clone(), what },
    }
}

/// A transaction that is open.
pub(super) struct Open<'a> {
    shared: &'a Shared,
    pub(super) tx: &'a Transaction<'a>,
    hasher: &'a Hasher,
    ids: &'a mut Ids,
    looked: &'a mut VecDeque<(u64, Arc<block::Decoded>)>,
    /// Where events of these hashes may be, if that was asked for all of them at once.
    candidates: Option<HashMap<u64, Vec<u64>>>,
    /// The position after the last duplicate: whoever sends events again sends them in order.
    expected: u64,
}

impl Open<'_> {
    pub(super) fn sql<T>(&self, result: rusqlite::Result<T>) -> Result<T, Error> {
        result.map_err(|error| self.shared.failures.sqlite(error))
    }

    fn append<'a>(&mut self, groups: &[&'a [NewEvent]]) -> Result<(Done, Vec<Vec<Appended>>, bool), Error> {
        let (begin, before) = self.sql(file::head(self.tx))?;
        let sealed = self.shared.directory.end();
        // The clock may have been set back; the order of the log may not.
        let now = Time::now().max(before);
        let mut numbering = Numbering::new(self.tx, &self.shared.names);
        let shared = self.shared;
        // Most events are of the same source and type as one of the last.
        let mut last: [Option<(&str, u32)>; 2] = [None; 2];
        let mut number = |kind: Kind, name: &'a str| {
            let last = &mut last[usize::from(kind == Kind::Type)];
            if let Some((_, number)) = last.filter(|(last, _)| *last == name) {
                return Ok(number);
            }
            let number = numbering.number(kind, name).map_err(|failed| match failed {
                Failed::Sqlite(error) => shared.failures.sqlite(error),
                Failed::Names { what, name } => Error::Names { what, name, limit: limits::LOG_NAMES },
            })?;
            *last = Some((name, number));
            Ok(number)
        };
        if groups.iter().map(|events| events.len()).sum::<usize>() >= limits::CHUNK_EVENTS {
            self.look_for_all(groups, &mut number)?;
        }
        let mut next = begin;
        let mut seen: HashMap<(u32, &str), u64, foldhash::quality::RandomState> = HashMap::default();
        let mut new: Vec<New<'_>> = Vec::new();
        let mut counts = Counts::default();
        let mut appended = Vec::with_capacity(groups.len());
        for events in groups {
            let mut answers = Vec::with_capacity(events.len());
            for event in *events {
                let source = number(Kind::Source, &event.source)?;
                let key = (source, event.id.as_str());
                let known = match seen.get(&key) {
                    Some(position) => Some(*position),
                    None => self.find(source, &event.id, begin > sealed)?,
                };
                if let Some(position) = known {
                    answers.push(Appended { position: Position(position), new: false });
                    continue;
                }
                let event_type = number(Kind::Type, &event.event_type)?;
                seen.insert(key, next);
                *counts.entry((source, event_type)).or_default() += 1;
                new.push(New { event, source, event_type });
                answers.push(Appended { position: Position(next), new: true });
                next += 1;
            }
            appended.push(answers);
        }
        let has_new_names = numbering.has_new();
        if new.len() >= limits::CHUNK_EVENTS && self.are_few(sealed, begin)? {
            self.pack(sealed, begin, now, &new)?;
        } else {
            self.insert(begin, now, &new)?;
        }
        let head = Head { next, first: now, appended: if new.is_empty() { before } else { now } };
        let done = Done { before: begin, head, counts, rows: next - self.shared.directory.end().min(next) };
        Ok((done, appended, has_new_names))
    }

    /// The position of an event that is in the log.
    fn find(&mut self, source: u32, id: &str, has_rows: bool) -> Result<Option<u64>, Error> {
        if has_rows {
            let row = self
                .tx
                .prepare_cached("SELECT position FROM events WHERE id = ? AND source = ?")
                .and_then(|mut s| s.query_row(params![id, source], |r| r.get::<_, i64>(0)).optional());
            if let Some(position) = self.sql(row)? {
                return Ok(Some(position as u64));
            }
        }
        if self.expected > 0 && self.is_at(self.expected, source, id).unwrap_or(false) {
            self.expected += 1;
            return Ok(Some(self.expected - 1));
        }
        let hash = self.hasher.hash(source, id.as_bytes());
        let candidates = match &self.candidates {
            Some(candidates) => candidates.get(&hash).cloned().unwrap_or_default(),
            None => {
                let mut candidates = Vec::new();
                let found = self.ids.find(self.tx, hash, &mut candidates);
                found.map_err(|failed| ids_failed(&self.shared.failures, failed))?;
                candidates
            }
        };
        for position in candidates {
            let found = match self.is_at(position, source, id) {
                // It has the hash of the id. That cannot be looked at, but there is no other one like it.
                Err(Error::Damaged { .. }) if self.shared.directory.skips() => true,
                found => found?,
            };
            if found {
                self.expected = position + 1;
                return Ok(Some(position));
            }
        }
        Ok(None)
    }

    /// Asks the index for all events at once, which takes half the time.
    fn look_for_all<'a>(
        &mut self,
        groups: &[&'a [NewEvent]],
        number: &mut impl FnMut(Kind, &'a str) -> Result<u32, Error>,
    ) -> Result<(), Error> {
        let mut hashes = Vec::new();
        for event in groups.iter().copied().flatten() {
            hashes.push(self.hasher.hash(number(Kind::Source, &event.source)?, event.id.as_bytes()));
        }
        hashes.sort_unstable();
        hashes.dedup();
        let mut found = Vec::new();
        let looked = self.ids.find_many(self.tx, &hashes, &mut found);
        looked.map_err(|failed| ids_failed(&self.shared.failures, failed))?;
        let mut candidates: HashMap<u64, Vec<u64>> = HashMap::new();
        for (hash, position) in found {
            candidates.entry(hash).or_default().push(position);
        }
        self.candidates = Some(candidates);
        Ok(())
    }

    /// Whether the event of a source and an id is in a block at this position.
    fn is_at(&mut self, position: u64, source: u32, id: &str) -> Result<bool, Error> {
        let Some(index) = self.shared.directory.find(position) else { return Ok(false) };
        let first = self.shared.directory.entries()[index].first;
        let block = self.ids_of(first)?;
        let i = (position - first) as usize;
        let here = block.sources[usize::from(block.columns.source(i))];
        Ok(here == source && block.columns.get(i).id == id.as_bytes())
    }

    fn ids_of(&mut self, first: u64) -> Result<Arc<block::Decoded>, Error> {
        if let Some(at) = self.looked.iter().position(|(f, _)| *f == first) {
            let known = self.looked.remove(at).expect("just found");
            let block = known.1.clone();
            self.looked.push_front(known);
            return Ok(block);
        }
        let ids = ColumnSet::from_iter([BatchColumn::Ids]);
        let block = Arc::new(decode_block(self.tx, &self.shared.failures, first, ids)?);
        self.looked.truncate(LOOKED - 1);
        self.looked.push_front((first, block.clone()));
        Ok(block)
    }

    fn insert(&self, first: u64, now: Time, new: &[New<'_>]) -> Result<(), Error> {
        let insert = || -> rusqlite::Result<()> {
            let sql = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)";
            let mut statement = self.tx.prepare_cached(sql)?;
            for (position, New { event, source, event_type }) in (first..).zip(new) {
                statement.execute(params![
                    position as i64,
                    now.microseconds(),
                    event.time.microseconds(),
                    source,
                    event_type,
                    event.version as i64,
                    event.stream,
                    event.id,
                    event.metadata,
                    event.payload
                ])?;
            }
            Ok(())
        };
        self.sql(insert())
    }

    /// Whether the rows between two positions can be packed together with what is appended.
    fn are_few(&self, begin: u64, end: u64) -> Result<bool, Error> {
        if end - begin > limits::SEAL_ROWS {
            return Ok(false);
        }
        let sql = "SELECT coalesce(sum(length(payload) + length(metadata)), 0) FROM events";
        let bytes = self.tx.prepare_cached(sql).and_then(|mut s| s.query_row([], |r| r.get::<_, i64>(0)));
        Ok(self.sql(bytes)? <= limits::APPEND_BYTES as i64)
    }

    /// Packs new events into blocks, and the rows before them, if there are any. What is left for less than a block is
    /// rows again.
    fn pack(&mut self, sealed: u64, first: u64, now: Time, new: &[New<'_>]) -> Result<(), Error> {
        let before = self.sql(Stretch::read(self.tx, sealed, first, usize::MAX))?;
        before.check(&self.shared.failures)?;
        let mut rows = before.rows();
        rows.extend((first..).zip(new).map(|(position, new)| Row {
            appended: now,
            source: new.source,
            event_type: new.event_type,
            raw: crate::model::RawEvent {
                position: Position(position),
                time: new.event.time,
                version: new.event.version,
                stream: new.event.stream.as_bytes(),
                id: new.event.id.as_bytes(),
                metadata: new.event.metadata.as_bytes(),
                payload: &new.event.payload,
                forgotten: false,
            },
        }));
        // Up to the last multiple of a block's size that is reached; there is one, because there are as many new ones.
        let size = limits::CHUNK_EVENTS as u64;
        let end = (first + new.len() as u64) / size * size;
        let packed = (end - sealed) as usize;
        let blocks = pack(&rows[..packed]);
        self.store(&rows[..packed], &blocks)?;
        self.unrow(end)?;
        let left = end.saturating_sub(first) as usize;
        self.insert(first + left as u64, now, &new[left..])
    }

    /// Enters blocks, and the ids of their events.
    fn store(&mut self, rows: &[Row<'_>], blocks: &[(u64, block::Block)]) -> Result<(), Error> {
        let store = || -> rusqlite::Result<()> {
            let names: Vec<_> = Section::ALL.iter().map(|section| section.column()).collect();
            let places = vec!["?"; names.len() + 2].join(", ");
            let sql = format!("INSERT INTO blocks (first, header, {}) VALUES ({places})", names.join(", "));
            let mut statement = self.tx.prepare_cached(&sql)?;
            for (first, block) in blocks {
                statement.raw_bind_parameter(1, *first as i64)?;
                statement.raw_bind_parameter(2, &block.header[..])?;
                for (i, section) in block.sections.iter().enumerate() {
                    statement.raw_bind_parameter(3 + i, &section[..])?;
                }
                statement.raw_execute()?;
            }
            Ok(())
        };
        self.sql(store())?;
        let hash = |row: &Row<'_>| (self.hasher.hash(row.source, row.raw.id), row.raw.position.0);
        let mut entries: Vec<_> = rows.iter().map(hash).collect();
        let budget = (entries.len() * ids::MERGE_SHARE).min(limits::MERGE_IDS);
        let added = self.ids.add(self.tx, &mut entries).and_then(|()| self.ids.merge_step(self.tx, budget));
        added.map(drop).map_err(|failed| ids_failed(&self.shared.failures, failed))
    }

    /// Removes rows that are in a block.
    fn unrow(&self, end: u64) -> Result<(), Error> {
        let delete = self.tx.prepare_cached("DELETE FROM events WHERE position < ?");
        self.sql(delete.and_then(|mut s| s.execute([end as i64]))).map(drop)
    }
}

/// Packs events into blocks; answers where each begins.
fn pack(rows: &[Row<'_>]) -> Vec<(u64, block::Block)> {
    let mut blocks = Vec::new();
    let mut rest = rows;
    while let Some(row) = rest.first() {
        let first = row.raw.position.0;
        let size = limits::CHUNK_EVENTS as u64;
        let most = ((first / size + 1) * size - first) as usize;
        let mut bytes = 0;
        let fits = rest.iter().take(most).take_while(|row| {
            let is_first = bytes == 0;
            bytes += 64 + row.raw.payload.len() + row.raw.metadata.len() + row.raw.id.len() + row.raw.stream.len();
            is_first || bytes <= limits::CHUNK_BYTES
        });
        let (these, others) = rest.split_at(fits.count());
        blocks.push((first, block::encode(these)));
        rest = others;
    }
    blocks
}

/// Rows of the log, as they were read.
pub(super) struct Stretch {
    /// Where it begins, and where it would end if it were all read.
    begin: u64,
    end: u64,
    events: Columns,
    /// When each was appended, its source, and its type.
    others: Vec<(Time, u32, u32)>,
}

impl Stretch {
    /// The oldest rows, as many as belong into a block or as fit into one, if more than `keep` are left then.
    pub(super) fn oldest(log: &Connection, sealed: u64, keep: u64) -> rusqlite::Result<Option<Stretch>> {
        let size = limits::CHUNK_EVENTS as u64;
        let end = (sealed / size + 1) * size;
        if file::head(log)?.0 < end + keep {
            Ok(None)
        } else {
            Stretch::read(log, sealed, end, limits::CHUNK_BYTES).map(Some)
        }
    }

    /// Refuses a stretch that does not begin where it should, or has gaps: what is packed, is never looked at again.
    pub(super) fn check(&self, failures: &Failures) -> Result<(), Error> {
        let at = |i: usize| self.begin + i as u64;
        let missing = (0..self.events.len()).find(|&i| self.events.position(i).0 != at(i));
        // One that ought to be there is not.
        let missing = missing.or(self.events.is_empty().then_some(0).filter(|_| self.begin < self.end));
        missing.map_or(Ok(()), |i| Err(failures.damaged(at(i), None, "it is not there".into())))
    }

    /// As blocks.
    pub(super) fn pack(&self) -> Vec<(u64, block::Block)> {
        pack(&self.rows())
    }

    fn read(log: &Connection, begin: u64, end: u64, most: usize) -> rusqlite::Result<Stretch> {
        let sql =
            format!("SELECT {} FROM events WHERE position >= ? AND position < ? ORDER BY position", all_columns());
        let mut stretch = Stretch { begin, end, events: Columns::new(ColumnSet::ALL), others: Vec::new() };
        let mut statement = log.prepare_cached(&sql)?;
        let mut rows = statement.query([begin as i64, end as i64])?;
        while stretch.events.bytes() < most
            && let Some(row) = rows.next()?
        {
            let (event, appended, source, event_type) = raw(row)?;
            stretch.events.push(0, 0, event);
            stretch.others.push((appended, source, event_type));
        }
        Ok(stretch)
    }

    fn rows(&self) -> Vec<Row<'_>> {
        let row = |(i, &(appended, source, event_type)): (usize, &(Time, u32, u32))| Row {
            appended,
            source,
            event_type,
            raw: self.events.get(i),
        };
        self.others.iter().enumerate().map(row).collect()
    }
}

/// What a fault point stands for.
fn full(error: std::io::Error) -> rusqlite::Error {
    let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL);
    rusqlite::Error::SqliteFailure(code, Some(error.to_string()))
}

/// Refuses events beyond the limits.
pub(super) fn check_bounds(event: &NewEvent) -> Result<(), Error> {
    let parts = [
        ("the source", event.source.len(), limits::EVENT_NAME_BYTES),
        ("the id", event.id.len(), limits::EVENT_NAME_BYTES),
        ("the type", event.event_type.len(), limits::EVENT_NAME_BYTES),
        ("the subject", event.stream.len(), limits::EVENT_NAME_BYTES),
        ("data and attributes together", event.payload.len() + event.metadata.len(), limits::EVENT_BYTES),
    ];
    for (what, bytes, limit) in parts {
        if bytes > limit {
            return Err(Error::TooLarge { id: event.id.chars().take(64).collect(), what, bytes, limit });
        }
    }
    Ok(())
}
