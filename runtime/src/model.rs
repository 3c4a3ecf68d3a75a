//! Positions, times, checkpoints, events and batches: the words that every other module uses.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use crate::config::limits;

/// Where an event stands in its source: strictly increasing, not always dense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Position(pub u64);

impl Position {
    /// The first position after this one that an event could have.
    pub fn next(self) -> Position {
        Position(self.0 + 1)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A point in time: microseconds since 1970-01-01T00:00:00Z. From year -9999 to 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(i64);

impl Time {
    /// 1970-01-01T00:00:00Z.
    pub const EPOCH: Time = Time(0);

    /// The time now, by this machine's clock. Plugins never see it.
    pub fn now() -> Time {
        Time(jiff::Timestamp::now().as_microsecond())
    }

    /// None outside of the years -9999 to 9999.
    pub fn from_microseconds(microseconds: i64) -> Option<Time> {
        jiff::Timestamp::from_microsecond(microseconds).ok().map(|t| Time(t.as_microsecond()))
    }

    /// Microseconds since 1970.
    pub fn microseconds(self) -> i64 {
        self.0
    }

    /// Appends `2013-01-01T10:15:00.000000Z`: always 27 characters, so that text order is time order and prefixes
    /// compare as one expects (`departs_at >= '2013-01-05'`). Plugins' timestamps begin with the year 0.
    pub fn write_sortable(self, out: &mut String) {
        let t = jiff::tz::Offset::UTC.to_datetime(self.timestamp());
        let mut digits = |number: i32, width: u32, end: char| {
            for place in (0..width).rev() {
                out.push((b'0' + (number / 10_i32.pow(place) % 10) as u8) as char);
            }
            out.push(end);
        };
        // By hand instead of `write!`: commits do this for every row.
        digits(t.year().max(0).into(), 4, '-');
        digits(t.month().into(), 2, '-');
        digits(t.day().into(), 2, 'T');
        digits(t.hour().into(), 2, ':');
        digits(t.minute().into(), 2, ':');
        digits(t.second().into(), 2, '.');
        digits(t.subsec_nanosecond() / 1_000, 6, 'Z');
    }

    fn timestamp(self) -> jiff::Timestamp {
        jiff::Timestamp::from_microsecond(self.0).expect("checked by the constructors")
    }
}

/// RFC 3339, with as many digits of the second as it has.
impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.timestamp().fmt(f)
    }
}

impl FromStr for Time {
    type Err = String;

    /// RFC 3339. Digits beyond microseconds are cut off.
    fn from_str(text: &str) -> Result<Time, String> {
        text.parse::<jiff::Timestamp>()
            .map(|t| Time(t.as_microsecond()))
            .map_err(|_| format!("{text:?} is not a time like 2013-01-01T10:15:00Z"))
    }
}

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// For each source, the position up to which (inclusive) a view is complete. A source without an entry has had
/// nothing applied yet.
///
/// Its text form is `flights=1002072,fleet=4795`; source names are percent-encoded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Checkpoint(BTreeMap<String, Position>);

/// What RFC 3986 calls unreserved, and `/` and `:`, which are common in CloudEvents sources.
const SOURCE_NAME: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/').remove(b':');

impl Checkpoint {
    /// The position that is complete in `source`, or None if nothing of it is.
    pub fn get(&self, source: &str) -> Option<Position> {
        self.0.get(source).copied()
    }

    /// Sets the position of a source, forwards or backwards.
    pub fn set(&mut self, source: &str, position: Position) {
        match self.0.get_mut(source) {
            Some(p) => *p = position,
            None => {
                self.0.insert(source.to_owned(), position);
            }
        }
    }

    /// True if everything up to `other` is complete here too. Only sources for which `relevant` answers true count.
    pub fn covers(&self, other: &Checkpoint, relevant: impl Fn(&str) -> bool) -> bool {
        other.0.iter().filter(|(s, _)| relevant(s)).all(|(source, &p)| self.get(source) >= Some(p))
    }

    /// The sources and their positions, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Position)> {
        self.0.iter().map(|(s, &p)| (s.as_str(), p))
    }

    /// True if there is no position in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<S: Into<String>> FromIterator<(S, Position)> for Checkpoint {
    fn from_iter<I: IntoIterator<Item = (S, Position)>>(iter: I) -> Self {
        Checkpoint(iter.into_iter().map(|(s, p)| (s.into(), p)).collect())
    }
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (source, position)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}={position}", utf8_percent_encode(source, SOURCE_NAME))?;
        }
        Ok(())
    }
}

impl FromStr for Checkpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Checkpoint, String> {
        let bad = || format!("{text:?} is not a position; write it as source=number, for example orders=12");
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let mut checkpoint = Checkpoint::default();
        for part in parts {
            let (source, position) = part.rsplit_once('=').ok_or_else(bad)?;
            let source = percent_decode_str(source.trim()).decode_utf8().map_err(|_| bad())?;
            let position = position.trim().parse().map_err(|_| bad())?;
            checkpoint.set(&source, Position(position));
        }
        if checkpoint.is_empty() { Err(bad()) } else { Ok(checkpoint) }
    }
}

/// An event on its way into a log; the log gives it its position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewEvent {
    /// The service that it comes from.
    pub source: String,
    /// Unique in its source; appending it again appends nothing.
    pub id: String,
    /// The stream (aggregate, subject) it belongs to; empty for none.
    pub stream: String,
    /// Its version in the stream; 0 if the producer does not say.
    pub version: u64,
    /// The event type.
    pub event_type: String,
    /// When it happened.
    pub time: Time,
    /// A JSON object of all other attributes, or empty.
    pub metadata: String,
    /// The data: JSON unless the metadata says otherwise.
    pub payload: Vec<u8>,
}

/// An event of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Where it stands in its source.
    pub position: Position,
    /// All the rest.
    pub event: NewEvent,
}

impl Event {
    /// What names it.
    pub fn name(&self) -> EventName {
        let NewEvent { source, id, stream, event_type, time, .. } = self.event.clone();
        EventName { source, position: self.position, stream, event_type, id, time }
    }
}

/// What names an event in reports and dead letters; its content stays in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventName {
    /// The service that it comes from.
    pub source: String,
    /// Where it stands in its source.
    pub position: Position,
    /// The stream it belongs to; empty for none.
    pub stream: String,
    /// The event type.
    #[serde(rename = "type")]
    pub event_type: String,
    /// Unique in its source.
    pub id: String,
    /// When it happened.
    pub time: Time,
}

/// Why a module could not apply an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// SHA-256 of the module.
    pub module_hash: String,
    /// What the plugin said, or how it failed.
    pub message: String,
    /// Where in the plugin, if it trapped: its functions, the innermost first.
    pub backtrace: Option<String>,
    /// What it had printed in that call.
    pub output: Option<String>,
}

/// Everything that is to know of an event that could not be applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureReport {
    /// The projection.
    pub projection: String,
    /// The event.
    #[serde(flatten)]
    pub event: EventName,
    /// Why.
    #[serde(flatten)]
    pub cause: Cause,
}

/// Values of varying length, back to back: one buffer of bytes and one of end offsets. An absent column has no ends.
#[derive(Clone, Debug, Default)]
pub struct Packed {
    bytes: Vec<u8>,
    ends: Vec<u8>,
}

impl Packed {
    fn push(&mut self, value: &[u8]) {
        self.bytes.extend_from_slice(value);
        self.push_end(self.bytes.len());
    }

    fn push_end(&mut self, end: usize) {
        let end = u32::try_from(end).expect("batches are bounded far below 4 GiB");
        self.ends.extend_from_slice(&end.to_le_bytes());
    }

    /// Copies some values of another column.
    fn extend(&mut self, from: &Packed, range: Range<usize>) {
        let (begin, here) = (from.begin(range.start), self.bytes.len());
        self.bytes.extend_from_slice(&from.bytes[begin..from.begin(range.end)]);
        for end in from.ends[4 * range.start..4 * range.end].as_chunks().0 {
            self.push_end(here + u32::from_le_bytes(*end) as usize - begin);
        }
    }

    /// Where value `i` begins, which is where the one before ends.
    fn begin(&self, i: usize) -> usize {
        match i.checked_sub(1) {
            Some(i) => u32::from_le_bytes(self.ends[4 * i..4 * i + 4].try_into().expect("four bytes")) as usize,
            None => 0,
        }
    }

    fn get(&self, i: usize) -> &[u8] {
        if self.ends.is_empty() { &[] } else { &self.bytes[self.begin(i)..self.begin(i + 1)] }
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }
}

/// One event as bytes, borrowed from wherever they lie. What is text was valid UTF-8 when it was appended; nobody
/// checks it again before the plugin does.
#[derive(Clone, Copy, Debug)]
pub struct RawEvent<'a> {
    /// Where it stands in its source.
    pub position: Position,
    /// When it happened.
    pub time: Time,
    /// Its version in the stream; 0 if unknown.
    pub version: u64,
    /// The stream it belongs to.
    pub stream: &'a [u8],
    /// Unique in its source.
    pub id: &'a [u8],
    /// A JSON object, or empty.
    pub metadata: &'a [u8],
    /// The data.
    pub payload: &'a [u8],
}

/// Events as columns, in the form that crosses the sandbox boundary (see `wit/projection.wit`): fixed-width columns are
/// little-endian bytes from the start, so that copying a stretch of events, or encoding a batch, is a handful of copies.
///
/// Sources and types are indexes into dictionaries that whoever fills the columns keeps.
#[derive(Clone, Debug)]
pub struct Columns {
    set: ColumnSet,
    positions: Vec<u8>,
    times: Vec<u8>,
    versions: Vec<u8>,
    source: Vec<u8>,
    types: Vec<u8>,
    streams: Packed,
    ids: Packed,
    payloads: Packed,
    metadata: Packed,
}

fn u64_at(column: &[u8], i: usize) -> u64 {
    u64::from_le_bytes(column[8 * i..8 * i + 8].try_into().expect("eight bytes"))
}

fn u16_at(column: &[u8], i: usize) -> u16 {
    u16::from_le_bytes(column[2 * i..2 * i + 2].try_into().expect("two bytes"))
}

impl Columns {
    /// No events yet. Of the optional columns only those in `set` are kept; the others read as empty.
    pub fn new(set: ColumnSet) -> Columns {
        Columns {
            set,
            positions: Vec::new(),
            times: Vec::new(),
            versions: Vec::new(),
            source: Vec::new(),
            types: Vec::new(),
            streams: Packed::default(),
            ids: Packed::default(),
            payloads: Packed::default(),
            metadata: Packed::default(),
        }
    }

    /// The optional columns that are kept.
    pub fn set(&self) -> ColumnSet {
        self.set
    }

    /// How many events there are.
    pub fn len(&self) -> usize {
        self.positions.len() / 8
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// About how many bytes the events take.
    pub fn bytes(&self) -> usize {
        let packed = [&self.streams, &self.ids, &self.payloads, &self.metadata];
        self.len() * 44 + packed.iter().map(|p| p.bytes.len()).sum::<usize>()
    }

    /// About how many bytes event `i` takes.
    pub fn bytes_of(&self, i: usize) -> usize {
        let packed = [&self.streams, &self.ids, &self.payloads, &self.metadata];
        44 + packed.iter().map(|p| p.get(i).len()).sum::<usize>()
    }

    /// Forgets the events and keeps the memory.
    pub fn clear(&mut self) {
        for column in [&mut self.positions, &mut self.times, &mut self.versions, &mut self.source, &mut self.types] {
            column.clear();
        }
        for packed in [&mut self.streams, &mut self.ids, &mut self.payloads, &mut self.metadata] {
            packed.clear();
        }
    }

    /// Adds one event.
    pub fn push(&mut self, source: u16, event_type: u16, e: RawEvent<'_>) {
        self.positions.extend_from_slice(&e.position.0.to_le_bytes());
        self.times.extend_from_slice(&e.time.0.to_le_bytes());
        self.source.extend_from_slice(&source.to_le_bytes());
        self.types.extend_from_slice(&event_type.to_le_bytes());
        if self.set.contains(BatchColumn::Versions) {
            self.versions.extend_from_slice(&e.version.to_le_bytes());
        }
        let values = [e.stream, e.id, e.payload, e.metadata];
        for ((_, column), value) in self.packed().into_iter().zip(values).filter(|((kept, _), _)| *kept) {
            column.push(value);
        }
    }

    /// The columns of varying length, and whether they are kept.
    fn packed(&mut self) -> [(bool, &mut Packed); 4] {
        use BatchColumn::{Ids, Metadata, Payloads, Streams};
        let set = self.set;
        [
            (set.contains(Streams), &mut self.streams),
            (set.contains(Ids), &mut self.ids),
            (set.contains(Payloads), &mut self.payloads),
            (set.contains(Metadata), &mut self.metadata),
        ]
    }

    /// Adds a stretch of events of one source. `types` says for each type in `from` what it is here; it must know all
    /// types in the stretch, and `from` must keep all columns that are kept here.
    pub fn extend(&mut self, from: &Columns, range: Range<usize>, source: u16, types: &[Option<u16>]) {
        assert!(from.set.covers(self.set), "columns that were not read cannot be copied");
        self.positions.extend_from_slice(&from.positions[8 * range.start..8 * range.end]);
        self.times.extend_from_slice(&from.times[8 * range.start..8 * range.end]);
        for event_type in from.types[2 * range.start..2 * range.end].as_chunks().0 {
            let here = types[usize::from(u16::from_le_bytes(*event_type))].expect("a type that is wanted");
            self.types.extend_from_slice(&here.to_le_bytes());
            self.source.extend_from_slice(&source.to_le_bytes());
        }
        if self.set.contains(BatchColumn::Versions) {
            self.versions.extend_from_slice(&from.versions[8 * range.start..8 * range.end]);
        }
        let others = [&from.streams, &from.ids, &from.payloads, &from.metadata];
        for ((_, column), other) in self.packed().into_iter().zip(others).filter(|((kept, _), _)| *kept) {
            column.extend(other, range.clone());
        }
    }

    /// Keeps the events whose index is answered with true. Copies those that are kept.
    pub fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let mut kept = Columns::new(self.set);
        for i in (0..self.len()).filter(|&i| keep(i)) {
            kept.push(self.source(i), self.event_type(i), self.get(i));
        }
        *self = kept;
    }

    /// The position of event `i`.
    pub fn position(&self, i: usize) -> Position {
        Position(u64_at(&self.positions, i))
    }

    /// The time of event `i`.
    pub fn time(&self, i: usize) -> Time {
        Time(u64_at(&self.times, i) as i64)
    }

    /// The dictionary index of the source of event `i`.
    pub fn source(&self, i: usize) -> u16 {
        u16_at(&self.source, i)
    }

    /// The dictionary index of the type of event `i`.
    pub fn event_type(&self, i: usize) -> u16 {
        u16_at(&self.types, i)
    }

    /// Event `i`. Columns that are not kept are empty.
    pub fn get(&self, i: usize) -> RawEvent<'_> {
        RawEvent {
            position: self.position(i),
            time: self.time(i),
            version: if self.versions.is_empty() { 0 } else { u64_at(&self.versions, i) },
            stream: self.streams.get(i),
            id: self.ids.get(i),
            metadata: self.metadata.get(i),
            payload: self.payloads.get(i),
        }
    }

    /// The batch as a plugin gets it: one MessagePack map with those optional columns that are in `wanted`.
    pub fn encode(&self, sources: &[Arc<str>], types: &[Arc<str>], wanted: ColumnSet) -> Vec<u8> {
        use serde_bytes::Bytes;
        assert!(self.set.covers(wanted), "columns that are not kept cannot be encoded");
        let column = |c, bytes| wanted.contains(c).then_some(Bytes::new(bytes));
        let wire = Wire {
            positions: Bytes::new(&self.positions),
            times: Bytes::new(&self.times),
            versions: column(BatchColumn::Versions, &self.versions),
            sources: sources.iter().map(|s| &**s).collect(),
            source: Bytes::new(&self.source),
            types: types.iter().map(|s| &**s).collect(),
            r#type: Bytes::new(&self.types),
            streams: column(BatchColumn::Streams, &self.streams.bytes),
            stream_ends: column(BatchColumn::Streams, &self.streams.ends),
            ids: column(BatchColumn::Ids, &self.ids.bytes),
            id_ends: column(BatchColumn::Ids, &self.ids.ends),
            payloads: column(BatchColumn::Payloads, &self.payloads.bytes),
            payload_ends: column(BatchColumn::Payloads, &self.payloads.ends),
            metadata: column(BatchColumn::Metadata, &self.metadata.bytes),
            metadata_ends: column(BatchColumn::Metadata, &self.metadata.ends),
        };
        let mut out = Vec::with_capacity(self.bytes() + 4096);
        wire.serialize(&mut rmp_serde::Serializer::new(&mut out).with_struct_map())
            .expect("writing to memory cannot fail");
        out
    }
}

/// The batch columns that a plugin may do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "they are named after the columns in wit/projection.wit")]
pub enum BatchColumn {
    Versions,
    Streams,
    Ids,
    Payloads,
    Metadata,
}

/// Some of the optional batch columns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ColumnSet(u8);

impl ColumnSet {
    /// All of them.
    pub const ALL: ColumnSet = ColumnSet(0b1_1111);

    /// True if this column is in the set.
    pub fn contains(self, column: BatchColumn) -> bool {
        self.0 & (1 << column as u8) != 0
    }

    /// True if all columns of `other` are in this set.
    pub fn covers(self, other: ColumnSet) -> bool {
        self.0 | other.0 == self.0
    }

    /// What is in one of the sets or in both.
    #[must_use]
    pub fn union(self, other: ColumnSet) -> ColumnSet {
        ColumnSet(self.0 | other.0)
    }
}

impl FromIterator<BatchColumn> for ColumnSet {
    fn from_iter<I: IntoIterator<Item = BatchColumn>>(columns: I) -> ColumnSet {
        ColumnSet(columns.into_iter().fold(0, |set, column| set | 1 << column as u8))
    }
}

#[derive(Serialize)]
struct Wire<'a> {
    positions: &'a serde_bytes::Bytes,
    times: &'a serde_bytes::Bytes,
    #[serde(skip_serializing_if = "Option::is_none")]
    versions: Option<&'a serde_bytes::Bytes>,
    sources: Vec<&'a str>,
    source: &'a serde_bytes::Bytes,
    types: Vec<&'a str>,
    r#type: &'a serde_bytes::Bytes,
    #[serde(skip_serializing_if = "Option::is_none")]
    streams: Option<&'a serde_bytes::Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_ends: Option<&'a serde_bytes::Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ids: Option<&'a serde_bytes::Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id_ends: Option<&'a serde_bytes::Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payloads: Option<&'a serde_bytes::Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_ends: Option<&'a serde_bytes::Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a serde_bytes::Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata_ends: Option<&'a serde_bytes::Bytes>,
}

/// A message that a plugin has a hand in, as long as a person reads: it goes into logs, answers and the status.
pub(crate) fn cut(mut message: String) -> String {
    if message.len() > limits::MESSAGE_BYTES {
        let dropped = message.len() - limits::MESSAGE_BYTES;
        message.truncate(message.floor_char_boundary(limits::MESSAGE_BYTES));
        message.push_str(&format!(" [and {dropped} more bytes]"));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_reads_what_it_writes() {
        let checkpoint: Checkpoint =
            [("orders", Position(12)), ("https://x.example/a=b,c", Position(0))].into_iter().collect();
        let text = checkpoint.to_string();
        assert_eq!(text, "https://x.example/a%3Db%2Cc=0,orders=12");
        assert_eq!(text.parse(), Ok(checkpoint));
        for bad in ["", "orders", "orders=x", "orders=-1"] {
            assert!(bad.parse::<Checkpoint>().unwrap_err().contains("source=number"), "{bad}");
        }
    }

    #[test]
    fn sortable_times_sort_as_text() {
        let mut last = String::new();
        for text in ["1969-12-31T23:59:59.5Z", "2013-01-01T10:15:00Z", "2013-01-01T10:15:00.000001Z"] {
            let mut sortable = String::new();
            text.parse::<Time>().unwrap().write_sortable(&mut sortable);
            assert!(last < sortable, "{last} < {sortable}");
            assert_eq!(sortable.len(), 27);
            last = sortable;
        }
    }
}
