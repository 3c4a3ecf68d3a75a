//! Events as columns: the form in which they are read, shared, and handed to plugins.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Position, Time};

/// Values of varying length, back to back: one buffer of bytes and one of end offsets. An absent column has no ends.
#[derive(Clone, Debug, Default)]
pub struct Packed {
    bytes: Vec<u8>,
    ends: Vec<u8>,
}

impl Packed {
    /// Values from their bytes, which are taken as they are, and their lengths. None if these do not add up.
    pub fn new(bytes: Vec<u8>, lengths: &[u64]) -> Option<Packed> {
        let mut end = 0_u64;
        let ends = lengths.iter().map(|length| {
            end = end.saturating_add(*length);
            (end as u32).to_le_bytes()
        });
        let ends = little_endian(ends);
        (end == bytes.len() as u64 && u32::try_from(end).is_ok()).then_some(Packed { bytes, ends })
    }

    /// How many bytes the values have in all.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

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

    /// Value `i`; empty if the column is absent.
    pub fn get(&self, i: usize) -> &[u8] {
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
    /// Where it stands in the log.
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
    /// Metadata and payload are gone for good, and empty.
    pub forgotten: bool,
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
    /// The indexes of the events whose content is gone, rising: there are few as a rule.
    forgotten: Vec<u32>,
}

/// A fixed-width column.
fn little_endian<const N: usize>(values: impl ExactSizeIterator<Item = [u8; N]>) -> Vec<u8> {
    let mut column = vec![0; N * values.len()];
    // Not `flat_map`, which goes byte by byte.
    for (place, value) in column.as_chunks_mut().0.iter_mut().zip(values) {
        *place = value;
    }
    column
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
            forgotten: Vec::new(),
        }
    }

    /// Events at dense positions, as many as there are times, and none of the optional columns yet. The times are
    /// microseconds that a [`Time`] can have.
    pub fn dense(
        first: Position,
        times: impl ExactSizeIterator<Item = i64>,
        source: impl ExactSizeIterator<Item = u16>,
        types: impl ExactSizeIterator<Item = u16>,
    ) -> Columns {
        let count = times.len();
        assert!(source.len() == count && types.len() == count, "columns of the same events");
        let mut columns = Columns::new(ColumnSet::default());
        columns.positions = little_endian((0..count).map(|i| (first.0 + i as u64).to_le_bytes()));
        columns.times = little_endian(times.map(i64::to_le_bytes));
        columns.source = little_endian(source.map(u16::to_le_bytes));
        columns.types = little_endian(types.map(u16::to_le_bytes));
        columns
    }

    /// Adds the versions of all events.
    pub fn set_versions(&mut self, versions: impl ExactSizeIterator<Item = u64>) {
        assert_eq!(versions.len(), self.len(), "columns of the same events");
        self.versions = little_endian(versions.map(u64::to_le_bytes));
        self.set = self.set.union(ColumnSet::from_iter([BatchColumn::Versions]));
    }

    /// Says which events' content is gone, by their indexes, rising.
    pub fn set_forgotten(&mut self, indexes: Vec<u32>) {
        assert!(indexes.last().is_none_or(|last| (*last as usize) < self.len()), "indexes of these events");
        self.forgotten = indexes;
    }

    /// Adds a column of varying length for all events.
    pub fn set_packed(&mut self, column: BatchColumn, values: Packed) {
        assert_eq!(values.ends.len() / 4, self.len(), "columns of the same events");
        self.set = self.set.union(ColumnSet::from_iter([column]));
        match column {
            BatchColumn::Versions => panic!("versions are not of varying length"),
            BatchColumn::Streams => self.streams = values,
            BatchColumn::Ids => self.ids = values,
            BatchColumn::Payloads => self.payloads = values,
            BatchColumn::Metadata => self.metadata = values,
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
        self.forgotten.clear();
    }

    /// Adds one event.
    pub fn push(&mut self, source: u16, event_type: u16, e: RawEvent<'_>) {
        if e.forgotten {
            self.forgotten.push(self.len() as u32);
        }
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

    /// Adds a stretch of events. `sources` and `types` say for each name in `from` what it is here; they must know all
    /// names in the stretch, and `from` must keep all columns that are kept here.
    pub fn extend(&mut self, from: &Columns, range: Range<usize>, sources: &[Option<u16>], types: &[Option<u16>]) {
        assert!(from.set.covers(self.set), "columns that were not read cannot be copied");
        if !from.forgotten.is_empty() {
            let begin = from.forgotten.partition_point(|i| (*i as usize) < range.start);
            let here = from.forgotten[begin..].iter().take_while(|i| (**i as usize) < range.end);
            let offset = self.len();
            self.forgotten.extend(here.map(|i| (*i as usize - range.start + offset) as u32));
        }
        self.positions.extend_from_slice(&from.positions[8 * range.start..8 * range.end]);
        self.times.extend_from_slice(&from.times[8 * range.start..8 * range.end]);
        let stretch = 2 * range.start..2 * range.end;
        let names = [(&mut self.source, &from.source, sources), (&mut self.types, &from.types, types)];
        for (column, there, numbers) in names {
            for number in there[stretch.clone()].as_chunks().0 {
                let here = numbers[usize::from(u16::from_le_bytes(*number))].expect("a name that is wanted");
                column.extend_from_slice(&here.to_le_bytes());
            }
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

    /// Whether the content of event `i` is gone.
    pub fn is_forgotten(&self, i: usize) -> bool {
        !self.forgotten.is_empty() && self.forgotten.binary_search(&(i as u32)).is_ok()
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
            forgotten: self.is_forgotten(i),
        }
    }

    /// The batch as a plugin gets it: one MessagePack map with those optional columns that are in `wanted`, and the column
    /// `forgotten` if the plugin asks for such events.
    pub fn encode(&self, sources: &[Arc<str>], types: &[Arc<str>], wanted: ColumnSet, forgotten: bool) -> Vec<u8> {
        use serde_bytes::Bytes;
        assert!(self.set.covers(wanted), "columns that are not kept cannot be encoded");
        let column = |c, bytes| wanted.contains(c).then_some(Bytes::new(bytes));
        let flags: Option<Vec<u8>> =
            forgotten.then(|| (0..self.len()).map(|i| u8::from(self.is_forgotten(i))).collect());
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
            forgotten: flags.as_deref().map(Bytes::new),
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
    #[serde(skip_serializing_if = "Option::is_none")]
    forgotten: Option<&'a serde_bytes::Bytes>,
}
