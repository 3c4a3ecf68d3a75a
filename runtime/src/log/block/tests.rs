use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::model::Position;

/// An event that owns its bytes.
#[derive(Clone, Debug)]
struct Owned {
    appended: i64,
    source: u32,
    event_type: u32,
    forgotten: bool,
    time: i64,
    version: u64,
    stream: Vec<u8>,
    id: Vec<u8>,
    metadata: Vec<u8>,
    payload: Vec<u8>,
}

fn time(microseconds: i64) -> Time {
    Time::from_microseconds(microseconds).unwrap()
}

fn row(position: u64, event: &Owned) -> Row<'_> {
    let Owned { appended, source, event_type, forgotten, version, .. } = *event;
    let (stream, id, metadata, payload) = (&*event.stream, &*event.id, &*event.metadata, &*event.payload);
    let raw = RawEvent {
        position: Position(position),
        time: time(event.time),
        version,
        stream,
        id,
        metadata,
        payload,
        forgotten,
    };
    Row { appended: time(appended), source, event_type, raw }
}

fn rows(first: u64, events: &[Owned]) -> Vec<Row<'_>> {
    (first..).zip(events).map(|(position, event)| row(position, event)).collect()
}

/// Decodes, and asserts that only the sections that are needed are read.
fn unpack(block: &Block, set: ColumnSet) -> Result<Decoded, Damage> {
    decode(&Header::decode(&block.header)?, set, |section| {
        let wanted = match section {
            Section::Fixed => true,
            Section::Versions => set.contains(BatchColumn::Versions),
            Section::Streams => set.contains(BatchColumn::Streams) || set.contains(BatchColumn::Ids),
            Section::Ids => set.contains(BatchColumn::Ids),
            Section::Metadata => set.contains(BatchColumn::Metadata),
            Section::Payloads => set.contains(BatchColumn::Payloads),
        };
        assert!(wanted, "{section:?} is not needed");
        Ok(&block.sections[section as usize])
    })
}

/// Asserts that a block has these events, and of the columns that were not asked for, nothing.
fn check(block: &Block, rows: &[Row<'_>], set: ColumnSet) {
    let header = Header::decode(&block.header).unwrap();
    let times = rows.iter().map(|row| row.raw.time);
    assert_eq!((header.first(), header.count()), (rows[0].raw.position, rows.len()));
    assert_eq!(header.last(), rows[rows.len() - 1].raw.position);
    assert_eq!(header.times(), (times.clone().min().unwrap(), times.max().unwrap()));
    assert_eq!(header.appended(), (rows[0].appended, rows[rows.len() - 1].appended));
    for section in Section::ALL {
        assert_eq!(header.stored(section), block.sections[section as usize].len() as u64);
    }
    let decoded = unpack(block, set).unwrap();
    let columns = &decoded.columns;
    assert_eq!((columns.set(), columns.len()), (set, rows.len()));
    let mut counts = vec![0; header.kinds().len()];
    for (i, row) in rows.iter().enumerate() {
        let (got, expected) = (columns.get(i), row.raw);
        assert_eq!((got.position, got.time), (expected.position, expected.time));
        let has = |column, value| if set.contains(column) { value } else { &b""[..] };
        assert_eq!(got.version, if set.contains(BatchColumn::Versions) { expected.version } else { 0 });
        assert_eq!(got.stream, has(BatchColumn::Streams, expected.stream));
        assert_eq!(got.id, has(BatchColumn::Ids, expected.id));
        assert_eq!(got.metadata, has(BatchColumn::Metadata, expected.metadata));
        assert_eq!(got.payload, has(BatchColumn::Payloads, expected.payload));
        assert_eq!(decoded.sources[usize::from(columns.source(i))], row.source);
        assert_eq!(decoded.types[usize::from(columns.event_type(i))], row.event_type);
        let run = decoded.appended.partition_point(|(end, _)| *end as usize <= i);
        assert_eq!(decoded.appended[run].1, row.appended);
        assert_eq!(decoded.columns.is_forgotten(i), row.raw.forgotten);
        let kind = header.kinds().iter().position(|k| (k.source, k.event_type) == (row.source, row.event_type));
        counts[kind.unwrap()] += 1;
    }
    assert_eq!(header.kinds().iter().map(|kind| kind.count).collect::<Vec<_>>(), counts);
}

/// Some events like those that services write: streams, ids that begin with them, JSON.
fn ordinary(count: u64) -> Vec<Owned> {
    let event = |n: u64| Owned {
        appended: 1_700_000_000_000_000 + (n / 3) as i64 * 1_234,
        source: (n % 2) as u32 + 1,
        event_type: (n * n % 5) as u32,
        forgotten: n % 11 == 4,
        time: 1_600_000_000_000_000 + (n * n % 7) as i64 * 1_000_000,
        version: n / 7,
        stream: format!("order-{}", n % 7).into(),
        id: if n % 5 == 3 { format!("{n}") } else { format!("order-{}/{n}", n % 7) }.into(),
        metadata: if n.is_multiple_of(3) { Vec::new() } else { br#"{"tenant":"a"}"#.to_vec() },
        payload: if n % 11 == 4 { Vec::new() } else { format!(r#"{{"amount":{n},"currency":"EUR"}}"#).into() },
    };
    (0..count).map(event).collect()
}

fn sets() -> impl Strategy<Value = ColumnSet> {
    use BatchColumn::{Ids, Metadata, Payloads, Streams, Versions};
    vec(proptest::sample::select(vec![Versions, Streams, Ids, Payloads, Metadata]), 0..6).prop_map(ColumnSet::from_iter)
}

/// Any bytes, or few values, so that they repeat.
fn values() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![vec(any::<u8>(), 0..40), vec(0_u8..2, 0..3), Just(b"a longer value that comes again".to_vec())]
}

/// Times that are anywhere, or near to each other.
fn times() -> impl Strategy<Value = i64> {
    let year: i64 = 31_556_952_000_000;
    prop_oneof![-9_998 * year..7_000 * year, (0_i64..100).prop_map(|seconds| seconds * 1_000_000)]
}

fn event() -> impl Strategy<Value = Owned> {
    let numbers =
        (times(), times(), prop_oneof![0_u32..3, any::<u32>()], 0_u32..3, prop_oneof![0_u64..9, any::<u64>()]);
    let bytes = (values(), values(), any::<bool>(), values(), values());
    let all = (numbers, bytes, proptest::bool::weighted(0.1));
    all.prop_map(
        |((appended, time, source, event_type, version), (stream, id, after, metadata, payload), forgotten)| {
            let id = if after { [&*stream, &*id].concat() } else { id };
            let (metadata, payload) = if forgotten { Default::default() } else { (metadata, payload) };
            Owned { appended, source, event_type, forgotten, time, version, stream, id, metadata, payload }
        },
    )
}

proptest! {
    #[test]
    fn what_was_packed_comes_out(first in 0..u64::MAX >> 1, mut events in vec(event(), 1..80), set in sets()) {
        events.sort_by_key(|event| event.appended);
        let rows = rows(first, &events);
        let block = encode(&rows);
        check(&block, &rows, set);
        check(&block, &rows, ColumnSet::ALL);
    }

    /// Whatever a section has, if its checksum is right: damage or events, but no panic.
    #[test]
    fn forged_sections_are_survived(
        events in 1_u64..60,
        section in proptest::sample::select(Section::ALL.to_vec()),
        changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        cut in proptest::option::of(any::<proptest::sample::Index>()),
    ) {
        let events = ordinary(events);
        let rows = rows(7, &events);
        let (mut numbers, bytes) = raw(section, &rows, &kinds(&rows).1);
        for (index, byte) in changes {
            let index = index.index(numbers.len());
            numbers[index] = byte;
        }
        numbers.truncate(cut.map_or(usize::MAX, |cut| cut.index(numbers.len())));
        let mut block = encode(&rows);
        let mut header = Header::decode(&block.header).unwrap();
        let stored = [numbers.clone(), bytes.clone()].concat();
        let extent = |part: &[u8]| Extent { stored: part.len() as u32, raw: part.len() as u32 };
        header.sections[section as usize] =
            Extents { numbers: extent(&numbers), bytes: extent(&bytes), checksum: crc32fast::hash(&stored) };
        block.header = header.encode();
        block.sections[section as usize] = stored;
        let _ = unpack(&block, ColumnSet::ALL);
    }

    /// The same for a header. Numbers that are near to the limits are the worst.
    #[test]
    fn forged_headers_are_survived(changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4)) {
        let events = ordinary(20);
        let mut block = encode(&rows(7, &events));
        for (index, byte) in changes {
            let index = index.index(block.header.len());
            block.header[index] = byte;
        }
        forge(&mut block.header);
        let _ = unpack(&block, ColumnSet::ALL);
    }
}

/// Makes the checksum of a header right.
fn forge(header: &mut [u8]) {
    let (content, checksum) = header.split_last_chunk_mut().unwrap();
    *checksum = crc32fast::hash(content).to_le_bytes();
}

#[test]
fn every_flipped_bit_and_every_missing_byte_is_noticed() {
    let events = ordinary(23);
    let mut block = encode(&rows(1 << 40, &events));
    unpack(&block, ColumnSet::ALL).unwrap();
    for part in 0..=SECTIONS {
        fn of(block: &mut Block, part: usize) -> &mut Vec<u8> {
            if part == SECTIONS { &mut block.header } else { &mut block.sections[part] }
        }
        for bit in 0..8 * of(&mut block, part).len() {
            of(&mut block, part)[bit / 8] ^= 1 << (bit % 8);
            assert!(unpack(&block, ColumnSet::ALL).is_err(), "bit {bit} of part {part}");
            of(&mut block, part)[bit / 8] ^= 1 << (bit % 8);
        }
        let whole = of(&mut block, part).clone();
        for length in 0..whole.len() {
            of(&mut block, part).truncate(length);
            assert!(unpack(&block, ColumnSet::ALL).is_err(), "{length} bytes of part {part}");
            of(&mut block, part).clone_from(&whole);
        }
        of(&mut block, part).push(0);
        assert!(unpack(&block, ColumnSet::ALL).is_err(), "a byte more of part {part}");
        of(&mut block, part).pop();
    }
}

#[test]
fn hostile_numbers_in_a_header_are_refused_before_anything_is_allocated() {
    let events = ordinary(20);
    let block = encode(&rows(7, &events));
    let good = Header::decode(&block.header).unwrap();
    let refused = |change: &dyn Fn(&mut Header), message: &str| {
        let mut header = good.clone();
        change(&mut header);
        let damage = Header::decode(&header.encode()).unwrap_err();
        assert_eq!(damage.what, format!("the header {message}"));
    };
    refused(&|h| h.count = 0, "has an impossible number of events");
    refused(&|h| h.count = u32::MAX, "has an impossible number of events");
    refused(&|h| h.first = Position(u64::MAX), "has positions without end");
    refused(&|h| h.times.1 = time(0), "has times that go back");
    refused(&|h| h.kinds[0].count = u32::MAX, "has kinds that do not add up");
    refused(&|h| h.sections[5].bytes.raw = u32::MAX, "has a section beyond the limit");
    refused(&|h| h.sections[5].bytes.stored = 1 << 30, "has a section that grew");
    // The number of kinds, which follows 37 bytes and the number of events.
    let mut header = block.header;
    header[45..49].copy_from_slice(&u32::MAX.to_le_bytes());
    forge(&mut header);
    assert_eq!(Header::decode(&header).unwrap_err().what, "the header has more kinds than events");
}

#[test]
fn a_dictionary_cannot_stand_for_more_than_the_limit() {
    let events = ordinary(1_000);
    let rows = rows(0, &events);
    let mut block = encode(&rows);
    let mut header = Header::decode(&block.header).unwrap();
    // One value of a megabyte, a thousand times.
    let (mut numbers, mut bytes, mut stored) = (Vec::new(), Vec::new(), Vec::new());
    let value = vec![b'x'; 1 << 20];
    put_values(&mut numbers, &mut bytes, &[&value, &value], true);
    numbers.truncate(numbers.len() - 9);
    put_numbers(&mut numbers, &vec![0; rows.len()]);
    let mut compressor = zstd::bulk::Compressor::new(LEVEL).unwrap();
    let numbers = put_part(&mut stored, &mut compressor, &numbers);
    let bytes = put_part(&mut stored, &mut compressor, &bytes);
    header.sections[Section::Metadata as usize] = Extents { numbers, bytes, checksum: crc32fast::hash(&stored) };
    block.header = header.encode();
    block.sections[Section::Metadata as usize] = stored;
    let damage = unpack(&block, ColumnSet::ALL).unwrap_err();
    assert_eq!(damage.what, "the section of metadata has values beyond the limit");
}

#[test]
fn extremes_come_back() {
    let ends = [-377_705_023_200_000_000, 253_402_207_200_000_000];
    let mut events = ordinary(4);
    for (i, event) in events.iter_mut().enumerate() {
        event.time = ends[i % 2];
        event.appended = ends[i / 2];
        event.version = if i == 0 { u64::MAX } else { 0 };
        event.payload = (0..3 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        event.forgotten = false;
    }
    let rows_of_it = rows(u64::MAX - 4, &events);
    check(&encode(&rows_of_it), &rows_of_it, ColumnSet::ALL);
    let most = ordinary(MAX_EVENTS as u64);
    let rows_of_it = rows(0, &most);
    check(&encode(&rows_of_it), &rows_of_it, ColumnSet::ALL);
}
