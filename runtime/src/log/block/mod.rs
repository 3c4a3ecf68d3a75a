//! Packed blocks: a stretch of the log as compressed columns.
//!
//! A block is a [`Header`], which is read without the rest, and six sections, of which a reader takes those whose columns
//! it wants. All numbers are little-endian. A section has two parts, each compressed if that makes it smaller: numbers
//! (kinds, times, versions, lengths, indexes), and the bytes of values, which become a column's as they are.
//!
//! A checksum covers each section and the header; what is read is checked again for sense, so that even a forged block is
//! an error, [`Damage`], and neither a panic nor an allocation beyond twice [`MAX_SECTION_BYTES`].

mod header;
#[cfg(test)]
mod tests;
mod values;

use std::cell::RefCell;
use std::collections::HashMap;

use crate::model::{BatchColumn, ColumnSet, Columns, Packed, RawEvent, Time};
use header::{Extent, Extents};
use values::{Reader, gather, put_numbers, put_times, put_values};

pub(super) use header::{Header, Kind};

/// Events in a block, at most: kinds are indexes of two bytes, and the log seals far fewer at once.
pub(super) const MAX_EVENTS: usize = 1 << 16;

/// Bytes in one part of a section before compression, at most. The log seals some 4 MiB at once, and one event more.
pub(super) const MAX_SECTION_BYTES: usize = 64 << 20;

/// zstd's fastest. Every 16th block's payloads of a year of flights, sizes scaled to the year's 128 MB (2026-11-29, two
/// cores of a Xeon VM that others used too): level 1 17.5 MB, packed in 0.33 us an event, unpacked in 0.117; level 3
/// 17.5, 0.45, 0.110; level 9 14.2, 2.2, 0.096; lz4 31.0, unpacked in 0.086: too large with what else a block has.
const LEVEL: i32 = 1;

/// What is stored by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    /// Sources, types, times, append times, and which events are forgotten.
    Fixed,
    /// One optional column each.
    Versions,
    Streams,
    Ids,
    Metadata,
    Payloads,
}

/// How many sections there are.
pub(super) const SECTIONS: usize = 6;

impl Section {
    /// All of them, in the order of [`Block::sections`].
    pub(super) const ALL: [Section; SECTIONS] =
        [Section::Fixed, Section::Versions, Section::Streams, Section::Ids, Section::Metadata, Section::Payloads];

    /// The column of the table of blocks that has it.
    pub(super) fn column(self) -> &'static str {
        match self {
            Section::Fixed => "fixed",
            Section::Versions => "versions",
            Section::Streams => "streams",
            Section::Ids => "ids",
            Section::Metadata => "metadata",
            Section::Payloads => "payloads",
        }
    }

    /// For messages.
    fn name(self) -> &'static str {
        match self {
            Section::Fixed => "the section of times and types",
            Section::Versions => "the section of versions",
            Section::Streams => "the section of streams",
            Section::Ids => "the section of ids",
            Section::Metadata => "the section of metadata",
            Section::Payloads => "the section of payloads",
        }
    }
}

/// A block that is not as it was written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a block is damaged: {what}")]
pub(super) struct Damage {
    /// What is wrong where.
    pub(super) what: String,
}

/// An event on its way into a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'a> {
    /// When it was appended.
    pub(super) appended: Time,
    /// The number of its source.
    pub(super) source: u32,
    /// The number of its type.
    pub(super) event_type: u32,
    /// The rest.
    pub(super) raw: RawEvent<'a>,
}

/// A block, ready to be stored.
#[derive(Debug)]
pub(super) struct Block {
    /// See [`Header::decode`].
    pub(super) header: Vec<u8>,
    /// In the order of [`Section::ALL`].
    pub(super) sections: [Vec<u8>; SECTIONS],
}

/// Packs events: at least one, at most [`MAX_EVENTS`], with dense positions and append times that never go back.
pub(super) fn encode(rows: &[Row<'_>]) -> Block {
    assert!((1..=MAX_EVENTS).contains(&rows.len()), "a block of {} events", rows.len());
    let first = rows[0].raw.position;
    assert!(rows.iter().zip(first.0..).all(|(row, position)| row.raw.position.0 == position), "positions are dense");
    assert!(rows.is_sorted_by_key(|row| row.appended), "append times never go back");
    let (kinds, indexes) = kinds(rows);
    let mut compressor = zstd::bulk::Compressor::new(LEVEL).expect("a level that zstd has");
    let mut extents = [Extents::default(); SECTIONS];
    let sections = Section::ALL.map(|section| {
        let (numbers, bytes) = raw(section, rows, &indexes);
        let mut out = Vec::new();
        let numbers = put_part(&mut out, &mut compressor, &numbers);
        let bytes = put_part(&mut out, &mut compressor, &bytes);
        extents[section as usize] = Extents { numbers, bytes, checksum: crc32fast::hash(&out) };
        out
    });
    let times = rows.iter().map(|row| row.raw.time);
    let header = Header {
        first,
        count: rows.len() as u32,
        times: (times.clone().min().expect("at least one"), times.max().expect("at least one")),
        appended: (rows[0].appended, rows[rows.len() - 1].appended),
        kinds,
        sections: extents,
    };
    Block { header: header.encode(), sections }
}

/// The kinds in the order in which they first come, and for each event the index of its own.
fn kinds(rows: &[Row<'_>]) -> (Vec<Kind>, Vec<u64>) {
    let mut known: HashMap<(u32, u32), usize, foldhash::fast::RandomState> = HashMap::default();
    let mut kinds: Vec<Kind> = Vec::new();
    let index = |row: &Row<'_>| {
        let index = *known.entry((row.source, row.event_type)).or_insert_with(|| {
            kinds.push(Kind { source: row.source, event_type: row.event_type, count: 0 });
            kinds.len() - 1
        });
        kinds[index].count += 1;
        index as u64
    };
    let indexes = rows.iter().map(index).collect();
    (kinds, indexes)
}

/// The two parts of a section before compression: numbers, and the bytes of values.
fn raw(section: Section, rows: &[Row<'_>], kinds: &[u64]) -> (Vec<u8>, Vec<u8>) {
    let (mut numbers, mut bytes) = (Vec::new(), Vec::new());
    match section {
        Section::Fixed => {
            put_numbers(&mut numbers, kinds);
            put_times(&mut numbers, &rows.iter().map(|row| row.raw.time).collect::<Vec<_>>());
            let runs: Vec<_> = rows.chunk_by(|a, b| a.appended == b.appended).collect();
            numbers.extend_from_slice(&(runs.len() as u32).to_le_bytes());
            put_numbers(&mut numbers, &runs.iter().map(|run| run.len() as u64).collect::<Vec<_>>());
            put_times(&mut numbers, &runs.iter().map(|run| run[0].appended).collect::<Vec<_>>());
            let forgotten: Vec<_> = (0..).zip(rows).filter(|(_, row)| row.raw.forgotten).map(|(i, _)| i).collect();
            numbers.extend_from_slice(&(forgotten.len() as u32).to_le_bytes());
            put_numbers(&mut numbers, &forgotten);
        }
        Section::Versions => put_numbers(&mut numbers, &rows.iter().map(|row| row.raw.version).collect::<Vec<_>>()),
        Section::Streams => {
            let streams: Vec<_> = rows.iter().map(|row| row.raw.stream).collect();
            put_values(&mut numbers, &mut bytes, &streams, true);
        }
        Section::Ids => {
            // Ids that begin with their stream, `order-7/2`, are common; repeating it doubles the time to read them.
            let rests: Vec<_> = rows.iter().map(|row| after_stream(&row.raw)).collect();
            put_numbers(&mut numbers, &rests.iter().map(|rest| rest.is_some().into()).collect::<Vec<_>>());
            let ids: Vec<_> = rests.into_iter().zip(rows).map(|(rest, row)| rest.unwrap_or(row.raw.id)).collect();
            put_values(&mut numbers, &mut bytes, &ids, false);
        }
        Section::Metadata => {
            let metadata: Vec<_> = rows.iter().map(|row| row.raw.metadata).collect();
            put_values(&mut numbers, &mut bytes, &metadata, true);
        }
        Section::Payloads => {
            let payloads: Vec<_> = rows.iter().map(|row| row.raw.payload).collect();
            put_values(&mut numbers, &mut bytes, &payloads, false);
        }
    }
    (numbers, bytes)
}

/// What an id has after its event's stream, if it begins with it.
fn after_stream<'a>(event: &RawEvent<'a>) -> Option<&'a [u8]> {
    event.id.strip_prefix(event.stream).filter(|_| !event.stream.is_empty())
}

/// Appends a part as it is stored.
fn put_part(out: &mut Vec<u8>, compressor: &mut zstd::bulk::Compressor<'_>, raw: &[u8]) -> Extent {
    let compressed = compressor.compress(raw).expect("there is memory enough, and nothing else can fail");
    let stored = if compressed.len() < raw.len() { &compressed } else { raw };
    out.extend_from_slice(stored);
    Extent { stored: stored.len() as u32, raw: raw.len() as u32 }
}

/// Events as they come out of a block.
#[derive(Debug)]
pub(super) struct Decoded {
    /// Their columns; source and type are indexes into what follows.
    pub(super) columns: Columns,
    /// The numbers of the sources, in the order in which they first come.
    pub(super) sources: Vec<u32>,
    /// The numbers of the types, in the order in which they first come.
    pub(super) types: Vec<u32>,
    /// When they were appended: the index after the last event of a run, and the time of all events in it.
    pub(super) appended: Vec<(u32, Time)>,
}

impl Decoded {
    /// The events, with the numbers of their sources and types. Columns that were not unpacked are empty.
    pub(super) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        let mut run = 0;
        (0..self.columns.len()).map(move |i| {
            while self.appended[run].0 as usize <= i {
                run += 1;
            }
            Row {
                appended: self.appended[run].1,
                source: self.sources[usize::from(self.columns.source(i))],
                event_type: self.types[usize::from(self.columns.event_type(i))],
                raw: self.columns.get(i),
            }
        })
    }
}

/// Unpacks the columns in `set`; `section` reads a section where it is stored, and is asked for no others.
///
/// Ids may need the section of streams too.
pub(super) fn decode<S: AsRef<[u8]>, E: From<Damage>>(
    header: &Header,
    set: ColumnSet,
    mut section: impl FnMut(Section) -> Result<S, E>,
) -> Result<Decoded, E> {
    thread_local! {
        // One has tables of some 100 KB.
        static DECOMPRESSOR: RefCell<zstd::bulk::Decompressor<'static>> =
            RefCell::new(zstd::bulk::Decompressor::new().expect("there is memory enough"));
    }
    let mut parts = |which: Section| -> Result<_, E> {
        let stored = section(which)?;
        Ok(DECOMPRESSOR.with_borrow_mut(|decompressor| parts(header, which, stored.as_ref(), decompressor))?)
    };
    let count = header.count();
    let mut decoded = fixed(header, &parts(Section::Fixed)?.0)?;
    let columns = &mut decoded.columns;
    if set.contains(BatchColumn::Versions) {
        let (numbers, _) = parts(Section::Versions)?;
        let mut reader = Reader::new(Section::Versions.name(), &numbers);
        columns.set_versions(reader.numbers(count)?.into_iter());
        reader.end()?;
    }
    let mut streams = None;
    if set.contains(BatchColumn::Streams) {
        streams = Some(values(Section::Streams, count, parts(Section::Streams)?)?);
    }
    if set.contains(BatchColumn::Ids) {
        let (numbers, bytes) = parts(Section::Ids)?;
        let mut reader = Reader::new(Section::Ids.name(), &numbers);
        let after_stream = reader.numbers(count)?;
        let mut ids = reader.values(count, bytes)?;
        if after_stream.iter().any(|after| *after != 0) {
            let streams = match &streams {
                Some(streams) => streams,
                None => &values(Section::Streams, count, parts(Section::Streams)?)?,
            };
            let both = |(i, after): (usize, &u64)| [if *after == 0 { &[] } else { streams.get(i) }, ids.get(i)];
            ids = gather(streams.bytes() + ids.bytes(), after_stream.iter().enumerate().map(both));
        }
        reader.end()?;
        columns.set_packed(BatchColumn::Ids, ids);
    }
    for (column, section) in [(BatchColumn::Metadata, Section::Metadata), (BatchColumn::Payloads, Section::Payloads)] {
        if set.contains(column) {
            columns.set_packed(column, values(section, count, parts(section)?)?);
        }
    }
    if let Some(streams) = streams {
        columns.set_packed(BatchColumn::Streams, streams);
    }
    Ok(decoded)
}

/// What a section of values has.
fn values(section: Section, count: usize, (numbers, bytes): (Vec<u8>, Vec<u8>)) -> Result<Packed, Damage> {
    let mut reader = Reader::new(section.name(), &numbers);
    let values = reader.values(count, bytes)?;
    reader.end()?;
    Ok(values)
}

/// Checks a section and decompresses its two parts.
fn parts(
    header: &Header,
    section: Section,
    stored: &[u8],
    decompressor: &mut zstd::bulk::Decompressor<'_>,
) -> Result<(Vec<u8>, Vec<u8>), Damage> {
    let damage = |what| Damage { what: format!("{} {what}", section.name()) };
    let Extents { numbers, bytes, checksum } = header.sections[section as usize];
    if stored.len() as u64 != header.stored(section) {
        return Err(damage("has another length than the header says"));
    }
    if crc32fast::hash(stored) != checksum {
        return Err(damage("does not match its checksum"));
    }
    let mut part = |stored: &[u8], raw: u32| {
        if stored.len() == raw as usize {
            return Ok(stored.to_vec());
        }
        match decompressor.decompress(stored, raw as usize) {
            Ok(bytes) if bytes.len() == raw as usize => Ok(bytes),
            _ => Err(damage("cannot be decompressed")),
        }
    };
    let (first, second) = stored.split_at(numbers.stored as usize);
    Ok((part(first, numbers.raw)?, part(second, bytes.raw)?))
}

/// What the first section has.
fn fixed(header: &Header, numbers: &[u8]) -> Result<Decoded, Damage> {
    let count = header.count();
    let mut reader = Reader::new(Section::Fixed.name(), numbers);
    let indexes = reader.numbers(count)?;
    reader.check(indexes.iter().all(|i| *i < header.kinds.len() as u64), "has an event of an unknown kind")?;
    let times = reader.times(count, header.times)?;

    let runs = reader.u32()? as usize;
    reader.check((1..=count).contains(&runs), "has an impossible number of append times")?;
    let lengths = reader.numbers(runs)?;
    let appended = reader.times(runs, header.appended)?;
    let mut end = 0_u64;
    let run = |(length, microseconds): (u64, i64)| {
        end = end.saturating_add(length);
        (end as u32, Time::from_microseconds(microseconds).expect("between the header's"))
    };
    let appended = lengths.into_iter().zip(appended).map(run).collect();
    reader.check(end == count as u64, "has append times for another number of events")?;

    let forgotten = reader.u32()? as usize;
    reader.check(forgotten <= count, "has too many forgotten events")?;
    let forgotten = reader.numbers(forgotten)?;
    let rising = forgotten.is_sorted_by(|a, b| a < b) && forgotten.last().is_none_or(|last| *last < count as u64);
    reader.check(rising, "has forgotten events that are not there")?;
    reader.end()?;

    let (sources, source_of) = dictionary(header.kinds.iter().map(|kind| kind.source));
    let (types, type_of) = dictionary(header.kinds.iter().map(|kind| kind.event_type));
    let kinds = || indexes.iter().map(|i| *i as usize);
    let (source, event_type) = (kinds().map(|i| source_of[i]), kinds().map(|i| type_of[i]));
    let mut columns = Columns::dense(header.first, times.into_iter(), source, event_type);
    columns.set_forgotten(forgotten.into_iter().map(|i| i as u32).collect());
    Ok(Decoded { columns, sources, types, appended })
}

/// The distinct numbers in the order in which they first come, and the index in there of each.
fn dictionary(numbers: impl Iterator<Item = u32>) -> (Vec<u32>, Vec<u16>) {
    let mut known: HashMap<u32, u16, foldhash::fast::RandomState> = HashMap::default();
    let mut distinct = Vec::new();
    let index = |number| {
        *known.entry(number).or_insert_with(|| {
            distinct.push(number);
            (distinct.len() - 1) as u16
        })
    };
    let indexes = numbers.map(index).collect();
    (distinct, indexes)
}
