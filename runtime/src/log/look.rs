//! Looking for events: by source, type, time, stream and id, each without reading what it can rule out.
//!
//! Blocks are ruled out by their headers (sources, types, times); a stream is looked for in the column of streams alone;
//! an id is found by the index of ids.

use std::collections::HashMap;

use globset::{Glob, GlobMatcher};
use rusqlite::params;
use serde::Serialize;

use super::chunks::Chunk;
use super::directory::header;
use super::ids::{Hasher, Ids};
use super::names::Kind;
use super::read::{Reader, Rows};
use super::{Error, EventLog};
use crate::model::{BatchColumn, ColumnSet, Event, Position, Time};

/// Blocks that are read in one call, so that whoever asks can be heard in between.
const BLOCKS: usize = 256;

/// Which events somebody looks for: those for which all that is given holds.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// A glob of sources.
    pub source: Option<String>,
    /// A glob of types.
    pub event_type: Option<String>,
    /// A stream.
    pub stream: Option<String>,
    /// An id.
    pub id: Option<String>,
    /// Events whose time is not before this.
    pub since: Option<Time>,
    /// Events whose time is before this.
    pub until: Option<Time>,
}

/// What there is in a log, and what it takes.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Events.
    pub events: u64,
    /// Sources.
    pub sources: u64,
    /// Event types.
    pub types: u64,
    /// Events that are rows; all others are in blocks.
    pub rows: u64,
    /// Blocks.
    pub blocks: u64,
    /// What the rows hold, bytes.
    pub row_bytes: u64,
    /// What the blocks take, bytes.
    pub block_bytes: u64,
    /// What is in the blocks, before it was packed, bytes.
    pub raw_bytes: u64,
    /// What the index of ids takes, bytes.
    pub index_bytes: u64,
    /// What the file takes, bytes.
    pub file_bytes: u64,
    /// When the first event was appended.
    pub first: Option<Time>,
    /// When the last one was.
    pub last: Option<Time>,
}

/// A filter that can be asked.
struct Matcher<'a> {
    filter: &'a Filter,
    globs: [Option<GlobMatcher>; 2],
    known: [HashMap<u32, bool>; 2],
}

impl<'a> Matcher<'a> {
    fn new(filter: &'a Filter) -> Result<Matcher<'a>, Error> {
        let glob = |pattern: &Option<String>| {
            let compiled = pattern.as_ref().map(|pattern| {
                let failed =
                    |error: globset::Error| Error::Pattern { pattern: pattern.clone(), reason: error.to_string() };
                Glob::new(pattern).map(|glob| glob.compile_matcher()).map_err(failed)
            });
            compiled.transpose()
        };
        Ok(Matcher { filter, globs: [glob(&filter.source)?, glob(&filter.event_type)?], known: Default::default() })
    }

    fn takes(&mut self, kind: Kind, number: u32, name: impl FnOnce() -> Result<String, Error>) -> Result<bool, Error> {
        let i = usize::from(kind == Kind::Type);
        let Some(glob) = &self.globs[i] else { return Ok(true) };
        if let Some(known) = self.known[i].get(&number) {
            return Ok(*known);
        }
        let takes = glob.is_match(name()?);
        self.known[i].insert(number, takes);
        Ok(takes)
    }

    fn takes_time(&self, time: Time) -> bool {
        self.filter.since.is_none_or(|since| time >= since) && self.filter.until.is_none_or(|until| time < until)
    }

    fn takes_event(&self, event: &Event) -> bool {
        let glob = |i: usize, name: &str| self.globs[i].as_ref().is_none_or(|glob| glob.is_match(name));
        let Event { event: e, .. } = event;
        self.takes_time(e.time)
            && glob(0, &e.source)
            && glob(1, &e.event_type)
            && self.filter.stream.as_ref().is_none_or(|stream| *stream == e.stream)
            && self.filter.id.as_ref().is_none_or(|id| *id == e.id)
    }
}

impl EventLog {
    /// Calls `each` for the events from position `begin` on that are looked for, in order, at most `limit`. Answers the
    /// position from which to go on, which may come before so many were found; None once the head is reached.
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`] for a glob that is none, or what cannot be read.
    pub fn events(
        &self,
        filter: &Filter,
        begin: u64,
        limit: usize,
        mut each: impl FnMut(Event),
    ) -> Result<Option<u64>, Error> {
        let mut matcher = Matcher::new(filter)?;
        let key = self.inner.key;
        self.inner.chunks.with_reader(|reader| {
            if let Some(id) = &filter.id {
                let mut left = limit;
                for position in reader.find_id(id, &mut matcher, &Hasher::new(&key))? {
                    let found = reader.event(position, ColumnSet::ALL)?.map(|(event, _)| event);
                    let Some(event) = found.filter(|event| event.position.0 >= begin && matcher.takes_event(event))
                    else {
                        continue;
                    };
                    if left == 0 {
                        return Ok(Some(position.0));
                    }
                    left -= 1;
                    each(event);
                }
                return Ok(None);
            }
            reader.scan(&mut matcher, begin, limit, each)
        })
    }

    /// What there is, and what it takes: some milliseconds for a million events.
    pub fn summary(&self) -> Result<Summary, Error> {
        let head = self.head_now();
        self.inner.chunks.with_reader(|reader| reader.summary(head.next, [head.first, head.appended]))
    }
}

impl Reader {
    fn scan(
        &mut self,
        matcher: &mut Matcher<'_>,
        begin: u64,
        limit: usize,
        mut each: impl FnMut(Event),
    ) -> Result<Option<u64>, Error> {
        let mut next = begin;
        let mut left = limit;
        let mut blocks = 0;
        if limit == 0 {
            return Ok(Some(begin));
        }
        // Answers whether there is room for more.
        let mut show = |chunk: &Chunk, next: &mut u64, matcher: &Matcher<'_>| {
            while *next < chunk.end() && left > 0 {
                let event = chunk.event((*next - chunk.first()) as usize);
                *next += 1;
                if matcher.takes_event(&event) {
                    left -= 1;
                    each(event);
                }
            }
            left > 0
        };
        loop {
            if let Some((first, end)) = self.block_at(next) {
                if blocks == BLOCKS {
                    return Ok(Some(next));
                }
                if self.may_have(first, matcher)? {
                    blocks += 1;
                    let chunk = self.block(first, ColumnSet::ALL)?;
                    if !show(&chunk, &mut next, matcher) {
                        return Ok(Some(next));
                    }
                }
                next = end;
                continue;
            }
            match self.rows(next, ColumnSet::ALL)? {
                Rows::Chunk(chunk) => {
                    if !show(&chunk, &mut next, matcher) {
                        return Ok(Some(next));
                    }
                }
                Rows::Sealed => {}
                Rows::None => return Ok(None),
            }
        }
    }

    /// The first position of the block that has a position, and the one after it.
    fn block_at(&self, position: u64) -> Option<(u64, u64)> {
        let directory = &self.shared().directory;
        let index = directory.find(position)?;
        let entries = directory.entries();
        Some((entries[index].first, entries[index].end()))
    }

    /// False if nothing in the block is looked for.
    fn may_have(&mut self, first: u64, matcher: &mut Matcher<'_>) -> Result<bool, Error> {
        let shared = self.shared().clone();
        {
            let index = shared.directory.find(first).expect("it was found");
            let entries = shared.directory.entries();
            let (earliest, latest) = entries[index].times;
            if matcher.filter.since.is_some_and(|since| latest < since)
                || matcher.filter.until.is_some_and(|until| earliest >= until)
            {
                return Ok(false);
            }
            let name = |kind, number| {
                let names = shared.names.names(kind, &[number], self.log());
                names.map(|names| names[0].to_string()).map_err(|error| shared.failures.sqlite(error))
            };
            let has = entries[index].kinds(self.log(), &shared.failures, |kinds| {
                for kind in kinds {
                    if matcher.takes(Kind::Source, kind.source, || name(Kind::Source, kind.source))?
                        && matcher.takes(Kind::Type, kind.event_type, || name(Kind::Type, kind.event_type))?
                    {
                        return Ok(true);
                    }
                }
                Ok(false)
            })??;
            if !has {
                return Ok(false);
            }
        }
        let Some(stream) = &matcher.filter.stream else { return Ok(true) };
        let streams = self.decode(first, ColumnSet::from_iter([BatchColumn::Streams]))?.columns;
        Ok((0..streams.len()).any(|i| streams.get(i).stream == stream.as_bytes()))
    }

    /// Where events with this id may be, in order.
    fn find_id(&mut self, id: &str, matcher: &mut Matcher<'_>, hasher: &Hasher) -> Result<Vec<Position>, Error> {
        self.snapshot(|reader| {
            reader.refresh()?;
            reader.refresh_names()?;
            let shared = reader.shared().clone();
            let mut hashes = Vec::new();
            for (number, name) in shared.names.from(Kind::Source, 0).iter().enumerate() {
                if matcher.takes(Kind::Source, number as u32, || Ok(name.to_string()))? {
                    hashes.push(hasher.hash(number as u32, id.as_bytes()));
                }
            }
            hashes.sort_unstable();
            let mut found = Vec::new();
            let look = Ids::default().find_many(reader.log(), &hashes, &mut found);
            look.map_err(|error| super::append::ids_failed(&shared.failures, error))?;
            let mut positions: Vec<_> = found.into_iter().map(|(_, position)| Position(position)).collect();
            let mut rows = || -> rusqlite::Result<()> {
                let mut statement = reader.log().prepare_cached("SELECT position FROM events WHERE id = ?")?;
                let mut rows = statement.query(params![id])?;
                while let Some(row) = rows.next()? {
                    positions.push(Position(row.get::<_, i64>(0)? as u64));
                }
                Ok(())
            };
            rows().map_err(|error| shared.failures.sqlite(error))?;
            positions.sort_unstable();
            positions.dedup();
            Ok(positions)
        })
    }

    fn summary(&mut self, events: u64, times: [Time; 2]) -> Result<Summary, Error> {
        self.snapshot(|reader| {
            reader.refresh()?;
            let shared = reader.shared().clone();
            let number = |sql: &str| -> Result<u64, Error> {
                let read = reader.log().query_row(sql, [], |r| r.get::<_, i64>(0));
                read.map(|number| number as u64).map_err(|error| shared.failures.sqlite(error))
            };
            let sections: Vec<_> =
                super::block::Section::ALL.iter().map(|s| format!("length({})", s.column())).collect();
            let blocks = number("SELECT count(*) FROM blocks")?;
            let mut raw_bytes = 0;
            for entry in shared.directory.entries().iter() {
                raw_bytes += header(reader.log(), &shared.failures, entry.first)?.raw_bytes();
            }
            let mut ids = Ids::default();
            ids.begin(reader.log()).map_err(|error| super::append::ids_failed(&shared.failures, error))?;
            let [first, last] = times.map(|time| (events > 0).then_some(time));
            Ok(Summary {
                events,
                sources: shared.names.len(Kind::Source) as u64,
                types: shared.names.len(Kind::Type) as u64,
                rows: number("SELECT count(*) FROM events")?,
                blocks,
                row_bytes: number(
                    "SELECT coalesce(sum(length(stream) + length(id) + length(metadata) + length(payload) + 48), 0)
                     FROM events",
                )?,
                block_bytes: number(&format!(
                    "SELECT coalesce(sum(length(header) + {}), 0) FROM blocks",
                    sections.join(" + ")
                ))?,
                raw_bytes,
                index_bytes: ids.bytes(),
                file_bytes: std::fs::metadata(shared.path()).map_or(0, |m| m.len()),
                first,
                last,
            })
        })
    }
}
