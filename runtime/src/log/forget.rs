//! Forgetting: the content of events goes for good, their places stay.
//!
//! A person asks for the events of a stream ([`EventLog::forget`]), or a source keeps content for a time only
//! ([`EventLog::retain`]). Metadata and payload are gone afterwards from rows, blocks and the write-ahead log; position,
//! source, type, times, version and id stay, so that nothing shifts, and an event that is sent again is a duplicate.
//!
//! A forgetting takes a transaction a block, beside appends. It is entered before the first of them with all that it is
//! about, and ended with the last one; one that was interrupted goes on before the next one begins. The *epoch* counts
//! both, so it is odd while one is under way. Chunks, sessions and generations carry it: what was read in another epoch is
//! read again.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use globset::{GlobBuilder, GlobSetBuilder};
use rusqlite::{Connection, OptionalExtension, Row as Record, params};
use serde::Serialize;

use super::append::Writer;
use super::block::{self, Block, Decoded, Row, Section};
use super::convert::FORMER;
use super::directory::header;
use super::names::Kind as Name;
use super::read::{Reader, decode_block, time};
use super::{Error, EventLog, turn};
use crate::config::limits;
use crate::manifest::Manifest;
use crate::model::{BatchColumn, ColumnSet, Position, RawEvent, Time};

/// What a person asks to be forgotten: the events of a stream, or one by its id, or one of a stream.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The source's name.
    pub source: String,
    /// The stream's name.
    pub stream: Option<String>,
    /// An event's id.
    pub id: Option<String>,
    /// The stream's name is forgotten, too.
    pub names: bool,
    /// Who asks.
    pub by: String,
    /// Why.
    pub reason: Option<String>,
}

/// What was forgotten, by whom and when.
#[derive(Clone, Debug, Serialize)]
pub struct Forgetting {
    /// 1, 2, ...
    pub number: u64,
    /// When it began.
    pub begun: Time,
    /// When it had ended; None while it is under way, or was interrupted.
    pub ended: Option<Time>,
    /// Who asked; `retention` if it was the configuration.
    pub by: String,
    /// Why.
    pub reason: Option<String>,
    /// The source's name; a glob if it was by retention.
    pub source: String,
    /// The stream, unless its name was forgotten.
    pub stream: Option<String>,
    /// The event's id.
    pub id: Option<String>,
    /// By retention: what was appended before this.
    pub before: Option<Time>,
    /// How many events it is about, those among them whose content was gone before.
    pub events: u64,
}

/// What the forgettings since an epoch mean for rows that were made up to a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// The epoch now.
    pub epoch: u64,
    /// The first forgetting that somebody asked for whose events may be in the rows.
    pub forgotten: Option<u64>,
    /// Before this position, events have come without their content, by retention.
    pub complete_from: Option<Position>,
}

/// The events of one source and type that a forgetting is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    events: u64,
    first: u64,
    last: u64,
}

/// By the numbers of source and type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Kinds(BTreeMap<(u32, u32), Span>);

impl Kinds {
    fn add(&mut self, row: &Row<'_>) {
        let position = row.raw.position.0;
        self.join((row.source, row.event_type), Span { events: 1, first: position, last: position });
    }

    fn join(&mut self, kind: (u32, u32), span: Span) {
        let known = self.0.entry(kind).or_insert(Span { events: 0, ..span });
        known.events += span.events;
        (known.first, known.last) = (known.first.min(span.first), known.last.max(span.last));
    }

    fn events(&self) -> u64 {
        self.0.values().map(|span| span.events).sum()
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.0.len() * 32);
        for (&(source, event_type), &Span { events, first, last }) in &self.0 {
            [source, event_type].iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
            [events, first, last].iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
        }
        out
    }

    fn decode(bytes: &[u8]) -> Kinds {
        let mut kinds = Kinds::default();
        for kind in bytes.as_chunks::<32>().0 {
            let short = |i: usize| u32::from_le_bytes(kind[i..i + 4].try_into().expect("four bytes"));
            let long = |i: usize| u64::from_le_bytes(kind[i..i + 8].try_into().expect("eight bytes"));
            kinds.join((short(0), short(4)), Span { events: long(8), first: long(16), last: long(24) });
        }
        kinds
    }
}

/// Which events are to be forgotten.
#[derive(Default)]
struct Selection {
    /// The numbers of their sources; by retention, with the time before which they were appended.
    sources: HashMap<u32, Option<Time>>,
    stream: Option<String>,
    id: Option<String>,
    names: bool,
}

impl Selection {
    /// Whether the event is meant, be its content still there or not.
    fn means(&self, row: &Row<'_>) -> bool {
        let is = |wanted: &Option<String>, bytes: &[u8]| wanted.as_ref().is_none_or(|w| w.as_bytes() == bytes);
        self.sources.get(&row.source).is_some_and(|before| before.is_none_or(|before| row.appended < before))
            && is(&self.stream, row.raw.stream)
            && is(&self.id, row.raw.id)
    }

    /// Whether there is something left of it.
    fn takes(&self, row: &Row<'_>) -> bool {
        self.means(row) && (!row.raw.forgotten || (self.names && !row.raw.stream.is_empty()))
    }

    fn is_retention(&self) -> bool {
        self.sources.values().any(Option::is_some)
    }

    /// The time before which blocks are looked at whole; None for all.
    fn before(&self) -> Option<Time> {
        self.sources.values().copied().max().flatten()
    }

    fn has(&self, kinds: &[super::block::Kind]) -> bool {
        kinds.iter().any(|kind| self.sources.contains_key(&kind.source))
    }

    /// The columns that it looks at.
    fn columns(&self) -> ColumnSet {
        let streams = self.stream.is_some().then_some(BatchColumn::Streams);
        let ids = (self.id.is_some() || self.names).then_some(BatchColumn::Ids);
        streams.into_iter().chain(ids).collect()
    }

    /// A row as it is afterwards.
    fn forgotten<'a>(&self, row: Row<'a>) -> Row<'a> {
        let stream: &[u8] = if self.names { &[] } else { row.raw.stream };
        Row { raw: RawEvent { stream, metadata: &[], payload: &[], forgotten: true, ..row.raw }, ..row }
    }

    /// A block as it is afterwards; None if nothing of it is taken. All columns must be there.
    fn rewrite(&self, block: &Decoded) -> Option<Block> {
        if !block.rows().any(|row| self.takes(&row)) {
            return None;
        }
        let rows = block.rows().map(|row| if self.takes(&row) { self.forgotten(row) } else { row });
        Some(block::encode(&rows.collect::<Vec<_>>()))
    }
}

/// What there is to be done.
#[derive(Default)]
struct Found {
    /// Blocks to be written anew, by their first positions.
    blocks: Vec<u64>,
    /// The position after the last block that was looked at.
    end: u64,
    /// Everything that is meant: of what is forgotten already, somebody may have taken the content before.
    kinds: Kinds,
    /// Events of which something is left.
    left: u64,
    /// An id with the name of the stream in it.
    named: Option<String>,
}

impl Found {
    fn see(&mut self, selection: &Selection, row: &Row<'_>) {
        if !selection.means(row) {
            return;
        }
        let takes = selection.takes(row);
        self.left += u64::from(takes);
        // By retention nobody has to be told again of what has gone before.
        if takes || !selection.is_retention() {
            self.kinds.add(row);
        }
        let has = |id: &[u8], name: &str| String::from_utf8_lossy(id).contains(name);
        if selection.names && self.named.is_none() && selection.stream.as_ref().is_some_and(|s| has(row.raw.id, s)) {
            self.named = Some(String::from_utf8_lossy(row.raw.id).into_owned());
        }
    }

    fn see_block(&mut self, selection: &Selection, first: u64, block: &Decoded) {
        let left = self.left;
        block.rows().for_each(|row| self.see(selection, &row));
        if self.left > left {
            self.blocks.push(first);
        }
    }
}

const COLUMNS: &str = "number, begun, ended, requester, reason, source, stream, id, before, events";

fn forgetting(record: &Record<'_>) -> rusqlite::Result<Forgetting> {
    Ok(Forgetting {
        number: record.get::<_, i64>(0)? as u64,
        begun: time(record.get(1)?),
        ended: record.get::<_, Option<i64>>(2)?.map(time),
        by: record.get(3)?,
        reason: record.get(4)?,
        source: record.get(5)?,
        stream: record.get(6)?,
        id: record.get(7)?,
        before: record.get::<_, Option<i64>>(8)?.map(time),
        events: record.get::<_, i64>(9)? as u64,
    })
}

/// The epoch: how many forgettings have begun and ended.
pub(super) fn epoch(log: &Connection) -> rusqlite::Result<u64> {
    let sql = "SELECT number, ended IS NOT NULL FROM forgettings ORDER BY number DESC LIMIT 1";
    let last =
        log.prepare_cached(sql)?.query_row([], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, bool>(1)?))).optional()?;
    Ok(last.map_or(0, |(number, ended)| 2 * number as u64 - u64::from(!ended)))
}

/// Before, in, and after each transaction of a forgetting.
const FORGET: [&str; 3] = ["forget.begun", "forget.written", "forget.committed"];

/// Who asks where the configuration does.
const RETENTION: &str = "retention";

impl EventLog {
    /// Forgets what a person asks for, also in the log's free pages and its write-ahead log. None if there is no such
    /// event of which anybody could still have the content.
    ///
    /// # Errors
    ///
    /// [`Error::Request`] if it cannot be done as it was asked for; then nothing is changed. After any other error it may
    /// have begun: it goes on when it is asked for again, or anything else is, or the runtime starts.
    pub fn forget(&self, request: &Request) -> Result<Option<Forgetting>, Error> {
        let refuse = |reason: String| Err(Error::Request { reason });
        if request.stream.is_none() && request.id.is_none() {
            return refuse(
                "neither a stream nor an id is given; a whole source is not forgotten by one request".into(),
            );
        }
        if request.names && request.stream.is_none() {
            return refuse("the stream whose name is to be forgotten is not given".into());
        }
        if request.stream.as_deref() == Some("") || request.id.as_deref() == Some("") {
            return refuse("the stream or the id is empty, which would mean all events that have none".into());
        }
        for (what, text) in [("who asks", Some(&request.by)), ("the reason", request.reason.as_ref())] {
            if let Some(bytes) = text.map(String::len).filter(|bytes| *bytes > limits::EVENT_NAME_BYTES) {
                return refuse(format!("{what} has {bytes} bytes; the limit is {}", limits::EVENT_NAME_BYTES));
            }
        }
        let former = self.inner.data.join(FORMER);
        if former.exists() {
            return refuse(format!(
                "{former:?} has all events as they were before the log was converted, and nothing needs it any more; \
                 delete it, then forget"
            ));
        }
        let _lock = self.forgetting_lock()?;
        let resumed = self.resume()?;
        let Some(source) = self.inner.shared.names.number(Name::Source, &request.source) else {
            return refuse(format!("the log has no source {:?}; shadowbox events shows what it has", request.source));
        };
        let selection = Selection {
            sources: HashMap::from([(source, None)]),
            stream: request.stream.clone(),
            id: request.id.clone(),
            names: request.names,
        };
        let found = self.find(&selection, None)?;
        if let Some(id) = &found.named {
            return refuse(format!(
                "the id {id:?} has the name of the stream in it, and ids stay, so that an event which is sent again is \
                 known; forget the content alone, without --stream-name"
            ));
        }
        let done = if found.left == 0 && self.is_known(request, &found)? {
            let is_this =
                |f: &Forgetting| (&f.source, &f.stream, &f.id) == (&request.source, &request.stream, &request.id);
            resumed.filter(is_this)
        } else {
            let number = self.begin(&selection, &found, &request.by, request.reason.as_deref(), &request.source)?;
            Some(self.carry_out(number, &selection, found)?)
        };
        self.clear()?;
        Ok(done)
    }

    /// Forgets what is older than its source keeps it, by the time when it was appended: whole blocks, and rows. A rule is a
    /// glob of sources and how long they keep content, or None for ever. Of the rules that match a source its
    /// own name goes before globs, and a longer glob before a shorter one.
    pub fn retain(&self, rules: &[(String, Option<Duration>)]) -> Result<Option<Forgetting>, Error> {
        let _lock = self.forgetting_lock()?;
        self.resume()?;
        let selection = self.expired(rules)?;
        let mut done_before = self.inner.retained.lock().expect("no panics while it is held");
        let after = selection.sources.keys().map(|source| done_before.get(source).copied()).min().flatten();
        let found = self.find(&selection, after)?;
        let done = match found.left {
            0 => None,
            _ => {
                let used = rules.iter().filter(|(_, keep)| keep.is_some());
                let globs = used.map(|(glob, _)| glob.as_str()).collect::<Vec<_>>().join(", ");
                let number = self.begin(&selection, &found, RETENTION, None, &globs)?;
                Some(self.carry_out(number, &selection, found)?)
            }
        };
        done_before.extend(selection.sources.iter().filter_map(|(source, before)| Some((*source, (*before)?))));
        if done.is_some() {
            // It is given up, not kept secret.
            let _ = self.clear();
        }
        Ok(done)
    }

    /// Ends a forgetting that was interrupted, if there is one, and has nothing of it be left in the write-ahead log.
    pub fn resume_forgetting(&self) -> Result<(), Error> {
        if self.look_for_epoch()? == 0 {
            return Ok(());
        }
        let _lock = self.forgetting_lock()?;
        self.resume()?;
        self.clear()
    }

    /// The newest forgettings, the last one first.
    pub fn forgettings(&self, limit: usize) -> Result<Vec<Forgetting>, Error> {
        let sql = format!("SELECT {COLUMNS} FROM forgettings ORDER BY number DESC LIMIT ?");
        self.inner.chunks.with_reader(|reader| {
            let read = || -> rusqlite::Result<Vec<Forgetting>> {
                reader.log().prepare_cached(&sql)?.query_map([limit as i64], forgetting)?.collect()
            };
            read().map_err(|error| reader.shared().failures.sqlite(error))
        })
    }

    /// What the forgettings since an epoch mean for the rows of a projection, which were made up to a checkpoint.
    pub fn effect(&self, manifest: &Manifest, since: u64, checkpoint: Option<Position>) -> Result<Effect, Error> {
        let (epoch, since, records) = self.inner.chunks.with_reader(|reader| {
            reader.refresh_names()?;
            reader.snapshot(|reader| {
                let failures = reader.shared().failures.clone();
                let read = || -> rusqlite::Result<_> {
                    let epoch = epoch(reader.log())?;
                    // The log may have been restored from a copy that knows nothing of the last ones.
                    let since = if since > epoch { 0 } else { since };
                    let sql = "SELECT number, ended IS NOT NULL, before IS NOT NULL, kinds FROM forgettings
                               WHERE 2 * number > ? ORDER BY number";
                    let mut statement = reader.log().prepare_cached(sql)?;
                    let records = statement.query_map([since as i64], |r| {
                        Ok((r.get::<_, i64>(0)? as u64, r.get::<_, bool>(1)?, r.get::<_, bool>(2)?, r.get(3)?))
                    })?;
                    let records: Vec<(u64, bool, bool, Vec<u8>)> = records.collect::<rusqlite::Result<_>>()?;
                    Ok((epoch, since, records))
                };
                read().map_err(|error| failures.sqlite(error))
            })
        })?;
        self.inner.chunks.saw(epoch);
        let names = &self.inner.shared.names;
        let (sources, types) = (names.from(Name::Source, 0), names.from(Name::Type, 0));
        let mut effect = Effect { epoch, ..Effect::default() };
        for (number, ended, retention, kinds) in records {
            let kinds = Kinds::decode(&kinds).0;
            let wanted = kinds.iter().filter(|((source, event_type), _)| {
                let name = |names: &[std::sync::Arc<str>], n: u32| names.get(n as usize).cloned();
                let pair = name(&sources, *source).zip(name(&types, *event_type));
                pair.is_some_and(|(source, event_type)| manifest.wants(&source, &event_type))
            });
            let passed = |position: u64| checkpoint.is_some_and(|checkpoint| checkpoint.0 >= position);
            if retention && 2 * number - 1 > since {
                // From the beginning of it on, nobody can tell with which content an event was read.
                let last = wanted.map(|(_, span)| span.last).max().filter(|last| !passed(*last));
                effect.complete_from = effect.complete_from.max(last.map(|last| Position(last + 1)));
            } else if !retention && ended && wanted.into_iter().any(|(_, span)| passed(span.first)) {
                effect.forgotten = effect.forgotten.or(Some(number));
            }
        }
        Ok(effect)
    }

    /// The events that sources keep no longer.
    fn expired(&self, rules: &[(String, Option<Duration>)]) -> Result<Selection, Error> {
        let now = Time::now().microseconds();
        let mut globs = Vec::new();
        for (glob, keep) in rules {
            let keep = keep.map(|keep| i64::try_from(keep.as_micros()).unwrap_or(i64::MAX));
            let before = keep.and_then(|keep| Time::from_microseconds(now.saturating_sub(keep)));
            let pattern = |error: globset::Error| Error::Pattern { pattern: glob.clone(), reason: error.to_string() };
            // A set even for one glob: the other matcher panics where a glob is too large to compile.
            let one = GlobBuilder::new(glob).backslash_escape(true).build().map_err(pattern)?;
            globs.push((glob, GlobSetBuilder::new().add(one).build().map_err(pattern)?, before));
        }
        let mut sources = HashMap::new();
        for (number, name) in (0..).zip(self.inner.shared.names.from(Name::Source, 0)) {
            let matching = globs.iter().filter(|(_, glob, _)| glob.is_match(&*name));
            let rule = matching.max_by_key(|(glob, ..)| (**glob == *name, glob.len()));
            if let Some((_, _, before @ Some(_))) = rule {
                sources.insert(number, *before);
            }
        }
        Ok(Selection { sources, ..Selection::default() })
    }

    /// Whether all that is meant has been forgotten at the request of a person before: whoever had taken it then, has been
    /// told.
    fn is_known(&self, request: &Request, found: &Found) -> Result<bool, Error> {
        let sql = "SELECT coalesce(max(events), 0) FROM forgettings
                   WHERE source = ? AND stream IS ? AND id IS ? AND before IS NULL AND ended IS NOT NULL";
        let told = self.inner.chunks.with_reader(|reader| {
            let parameters = params![request.source, request.stream, request.id];
            let told = reader.log().query_row(sql, parameters, |r| r.get::<_, i64>(0));
            told.map_err(|error| reader.shared().failures.sqlite(error))
        })?;
        Ok(told as u64 >= found.kinds.events())
    }

    /// Nobody else packs or forgets while it is held.
    fn forgetting_lock(&self) -> Result<File, Error> {
        let path = self.inner.data.join("log.seal");
        let open = File::options().write(true).create(true).truncate(false).open(&path);
        let lock = open.and_then(|file| match turn::lock(&file, Instant::now() + limits::DATABASE_BUSY) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                let message = "events are being packed or forgotten; nothing has begun, ask again in a while";
                Err(io::Error::new(error.kind(), message))
            }
            locked => locked.map(|()| file),
        });
        lock.map_err(|error| Error::File { path, error })
    }

    /// The epoch as it is in the file.
    fn look_for_epoch(&self) -> Result<u64, Error> {
        let now = self.inner.chunks.with_reader(|reader| reader.epoch())?;
        self.inner.chunks.saw(now);
        Ok(now)
    }

    /// Ends a forgetting that was interrupted. The lock is held.
    fn resume(&self) -> Result<Option<Forgetting>, Error> {
        self.inner.chunks.with_reader(|reader| reader.refresh_names())?;
        if self.look_for_epoch()?.is_multiple_of(2) {
            return Ok(None);
        }
        let sql = format!("SELECT {COLUMNS}, names FROM forgettings WHERE ended IS NULL");
        let (open, names) = self.inner.chunks.with_reader(|reader| {
            let read = reader
                .log()
                .prepare_cached(&sql)
                .and_then(|mut s| s.query_row([], |record| Ok((forgetting(record)?, record.get::<_, bool>(10)?))));
            read.map_err(|error| reader.shared().failures.sqlite(error))
        })?;
        tracing::info!(number = open.number, "going on with a forgetting that was interrupted");
        let selection = match open.before {
            // What was not done is for the next look.
            Some(_) => Selection::default(),
            None => Selection {
                sources: self
                    .inner
                    .shared
                    .names
                    .number(Name::Source, &open.source)
                    .map(|n| (n, None))
                    .into_iter()
                    .collect(),
                stream: open.stream,
                id: open.id,
                names,
            },
        };
        let found = self.find(&selection, None)?;
        self.carry_out(open.number, &selection, found).map(Some)
    }

    /// Looks for what is to be forgotten. Of blocks whose events were all appended before `after`, nothing is.
    fn find(&self, selection: &Selection, after: Option<Time>) -> Result<Found, Error> {
        self.inner.chunks.with_reader(|reader| {
            let mut found = Found { end: reader.refresh()?, ..Found::default() };
            for first in reader.candidates(selection, after, found.end)? {
                let block = match reader.decode(first, selection.columns()) {
                    // It cannot be given up, and is no loss to anybody.
                    Err(error @ Error::Damaged { .. }) if selection.is_retention() => {
                        tracing::warn!(%error, "cannot give up what is kept no longer");
                        continue;
                    }
                    block => block?,
                };
                found.see_block(selection, first, &block);
            }
            // The rest as of one moment: what was packed meanwhile, and rows.
            reader.snapshot(|reader| {
                let sealed = reader.refresh()?;
                let packed = reader.shared().directory.firsts(found.end..sealed);
                for first in packed {
                    let block = reader.decode_here(first, selection.columns())?;
                    found.see_block(selection, first, &block);
                }
                found.end = sealed;
                let rows = each_row(reader.log(), sealed, &mut |row| found.see(selection, row));
                rows.map_err(|error| reader.shared().failures.sqlite(error))
            })?;
            Ok(found)
        })
    }

    /// Enters a forgetting: from here on it is to be ended, whatever happens.
    fn begin(
        &self,
        selection: &Selection,
        found: &Found,
        by: &str,
        reason: Option<&str>,
        source: &str,
    ) -> Result<u64, Error> {
        let number = self.inner.appender.with_writer(|writer| {
            writer.transaction(FORGET, |open| {
                let enter = || -> rusqlite::Result<i64> {
                    let sql =
                        "INSERT INTO forgettings (begun, requester, reason, source, stream, id, names, before, events,
                               kinds) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING number";
                    open.tx.query_row(
                        sql,
                        params![
                            Time::now().microseconds(),
                            by,
                            reason,
                            source,
                            selection.stream,
                            selection.id,
                            selection.names,
                            selection.before().map(Time::microseconds),
                            found.kinds.events() as i64,
                            found.kinds.encode(),
                        ],
                        |r| r.get(0),
                    )
                };
                open.sql(enter())
            })
        })?;
        self.inner.chunks.saw(2 * number as u64 - 1);
        Ok(number as u64)
    }

    /// Does what was entered, and ends it.
    fn carry_out(&self, number: u64, selection: &Selection, mut found: Found) -> Result<Forgetting, Error> {
        loop {
            for first in std::mem::take(&mut found.blocks) {
                self.inner.check_place()?;
                let block = self.inner.chunks.with_reader(|reader| reader.decode(first, ColumnSet::ALL))?;
                // Appends go on meanwhile. Nobody else changes blocks while the lock is held.
                let Some(block) = selection.rewrite(&block) else { continue };
                self.inner.appender.with_writer(|writer| writer.rewrite(first, &block))?;
            }
            // What was packed meanwhile, so that little is left for the last transaction.
            let packed = self.inner.chunks.with_reader(|reader| {
                let sealed = reader.refresh()?;
                Ok(reader.shared().directory.firsts(found.end..sealed))
            })?;
            if packed.len() <= LAST {
                break;
            }
            for first in packed {
                let block = self.inner.chunks.with_reader(|reader| reader.decode(first, selection.columns()))?;
                found.see_block(selection, first, &block);
                found.end = block.columns.position(block.columns.len() - 1).0 + 1;
            }
        }
        let done = self.inner.appender.with_writer(|writer| writer.end(number, selection, &found))?;
        self.inner.chunks.saw(2 * number);
        Ok(done)
    }

    /// Has nothing of what was overwritten be left in the write-ahead log. Readers may be in the way for a moment.
    fn clear(&self) -> Result<(), Error> {
        for _ in 0..CLEARINGS {
            if self.inner.appender.with_writer(|writer| writer.clear())? {
                return Ok(());
            }
        }
        Err(Error::Uncleared { path: self.inner.shared.path().to_owned() })
    }
}

/// Blocks that were packed meanwhile and are rewritten in the last transaction, at most: some milliseconds each.
const LAST: usize = 4;

/// How often the write-ahead log is tried to be emptied, and how long each try waits for readers. No append of another
/// process can begin meanwhile.
const CLEARINGS: u32 = 20;
const CLEARING: Duration = Duration::from_millis(250);

/// Shows all rows from a position on, without metadata and payload.
fn each_row(log: &Connection, from: u64, see: &mut dyn FnMut(&Row<'_>)) -> rusqlite::Result<()> {
    let sql = "SELECT position, appended, source, type, stream, id, forgotten FROM events WHERE position >= ?
               ORDER BY position";
    let mut statement = log.prepare_cached(sql)?;
    let mut records = statement.query([from as i64])?;
    while let Some(record) = records.next()? {
        see(&Row {
            appended: time(record.get(1)?),
            source: record.get(2)?,
            event_type: record.get(3)?,
            raw: RawEvent {
                position: Position(record.get::<_, i64>(0)? as u64),
                time: Time::EPOCH,
                version: 0,
                stream: record.get_ref(4)?.as_bytes()?,
                id: record.get_ref(5)?.as_bytes()?,
                metadata: &[],
                payload: &[],
                forgotten: record.get(6)?,
            },
        });
    }
    Ok(())
}

impl Reader {
    /// The epoch as it is in the file.
    pub(super) fn epoch(&mut self) -> Result<u64, Error> {
        epoch(self.log()).map_err(|error| self.shared().failures.sqlite(error))
    }

    /// The blocks before a position that may have something that is meant.
    fn candidates(&self, selection: &Selection, after: Option<Time>, end: u64) -> Result<Vec<u64>, Error> {
        let failures = &self.shared().failures;
        let appended = |first| header(self.log(), failures, first).map(|header| header.appended());
        // Appends wait for whoever holds the directory, so what is to be read is read without it.
        let firsts = self.shared().directory.firsts(0..end);
        let mut from = 0;
        if let Some(after) = after {
            // Append times never go back.
            let mut to = firsts.len();
            while from < to {
                let middle = from + (to - from) / 2;
                let done = appended(firsts[middle])?.1 < after;
                *if done { &mut from } else { &mut to } = if done { middle + 1 } else { middle };
            }
        }
        let before = selection.before();
        let mut candidates = Vec::new();
        for &first in &firsts[from..] {
            let header = match header(self.log(), failures, first) {
                Err(Error::Damaged { .. }) if selection.is_retention() => continue,
                header => header?,
            };
            if before.is_some_and(|before| header.appended().1 >= before) {
                break;
            }
            if selection.has(header.kinds()) {
                candidates.push(first);
            }
        }
        Ok(candidates)
    }
}

impl Writer {
    /// Puts another block in the place of one.
    fn rewrite(&mut self, first: u64, block: &Block) -> Result<(), Error> {
        self.transaction(FORGET, |open| {
            let written = put(open.tx, first, block);
            open.sql(written)
        })
    }

    /// Forgets what is in rows, and in blocks that were packed since they were looked at; then the forgetting has ended.
    fn end(&mut self, number: u64, selection: &Selection, found: &Found) -> Result<Forgetting, Error> {
        let shared = self.shared().clone();
        self.transaction(FORGET, |open| {
            let sql = "SELECT kinds FROM forgettings WHERE number = ?";
            let known = open.tx.query_row(sql, [number as i64], |r| r.get::<_, Vec<u8>>(0));
            let mut kinds = Kinds::decode(&open.sql(known)?);
            // What was there when it began is counted already.
            let counted = kinds.0.values().map(|span| span.last).max();
            let mut last = Found::default();
            for first in shared.directory.firsts(found.end..shared.directory.end()) {
                if !selection.has(header(open.tx, &shared.failures, first)?.kinds()) {
                    continue;
                }
                let block = decode_block(open.tx, &shared.failures, first, ColumnSet::ALL)?;
                last.see_block(selection, first, &block);
                if let Some(block) = selection.rewrite(&block) {
                    open.sql(put(open.tx, first, &block))?;
                }
            }
            let mut positions = Vec::new();
            open.sql(each_row(open.tx, shared.directory.end(), &mut |row| {
                last.see(selection, row);
                if selection.takes(row) {
                    positions.push(row.raw.position.0 as i64);
                }
            }))?;
            for (kind, span) in found.kinds.0.iter().chain(&last.kinds.0) {
                let is_new = Some(span.first) > counted;
                kinds.join(*kind, Span { events: if is_new { span.events } else { 0 }, ..*span });
            }
            let finish = || -> rusqlite::Result<Forgetting> {
                let stream = if selection.names { ", stream = ''" } else { "" };
                let sql =
                    format!("UPDATE events SET metadata = '', payload = x'', forgotten = 1{stream} WHERE position = ?");
                let mut update = open.tx.prepare_cached(&sql)?;
                for position in positions {
                    update.execute([position])?;
                }
                drop(update);
                if !selection.is_retention() {
                    super::file::rewrite_rows(open.tx)?;
                }
                if selection.names {
                    // An earlier forgetting of its content has the name, too.
                    let sql = "UPDATE forgettings SET stream = NULL WHERE source = ? AND stream = ?";
                    let source = "SELECT source FROM forgettings WHERE number = ?";
                    let source: String = open.tx.query_row(source, [number as i64], |r| r.get(0))?;
                    open.tx.execute(sql, params![source, selection.stream])?;
                }
                let sql = format!(
                    "UPDATE forgettings SET ended = ?, events = ?, kinds = ?, stream = iif(names, NULL, stream)
                     WHERE number = ? RETURNING {COLUMNS}"
                );
                let now = Time::now().microseconds();
                let values = params![now, kinds.events() as i64, kinds.encode(), number as i64];
                open.tx.query_row(&sql, values, forgetting)
            };
            open.sql(finish())
        })
    }

    /// Tries to empty the write-ahead log; false if readers were in the way.
    fn clear(&mut self) -> Result<bool, Error> {
        let failures = self.shared().failures.clone();
        let clear = || -> rusqlite::Result<bool> {
            let log = self.connection();
            // As much as can be without waiting for anybody.
            log.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))?;
            log.busy_timeout(CLEARING)?;
            let cleared = log.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |r| r.get::<_, bool>(0));
            log.busy_timeout(limits::DATABASE_BUSY)?;
            match cleared {
                Ok(busy) => Ok(!busy),
                Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) => Ok(false),
                Err(error) => Err(error),
            }
        };
        clear().map_err(|error| failures.sqlite(error))
    }
}

fn put(log: &Connection, first: u64, block: &Block) -> rusqlite::Result<()> {
    let sections: Vec<_> = Section::ALL.iter().map(|section| format!("{} = ?", section.column())).collect();
    let sql = format!("UPDATE blocks SET header = ?, {} WHERE first = ?", sections.join(", "));
    let mut statement = log.prepare_cached(&sql)?;
    statement.raw_bind_parameter(1, &block.header[..])?;
    for (i, section) in block.sections.iter().enumerate() {
        statement.raw_bind_parameter(2 + i, &section[..])?;
    }
    statement.raw_bind_parameter(2 + block.sections.len(), first as i64)?;
    statement.raw_execute().map(drop)
}
