//! The header of a block: what is in the block, and how much of it to believe.

use super::values::Reader;
use super::{Damage, MAX_EVENTS, MAX_SECTION_BYTES, SECTIONS, Section};
use crate::model::{Position, Time};

/// The first byte of a header: the format of it and of the sections.
const FORMAT: u8 = 1;

/// How many events of a block have this source and this type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::log) struct Kind {
    /// The number of the source.
    pub(in crate::log) source: u32,
    /// The number of the type.
    pub(in crate::log) event_type: u32,
    /// How many events.
    pub(in crate::log) count: u32,
}

/// How a stretch of bytes is stored: compressed, unless both lengths are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) stored: u32,
    pub(super) raw: u32,
}

/// A section has two extents, back to back: numbers, then the bytes of values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extents {
    pub(super) numbers: Extent,
    pub(super) bytes: Extent,
    /// Of the section as it is stored.
    pub(super) checksum: u32,
}

/// What is known of a block without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::log) struct Header {
    pub(super) first: Position,
    pub(super) count: u32,
    pub(super) times: (Time, Time),
    pub(super) appended: (Time, Time),
    pub(super) kinds: Vec<Kind>,
    pub(super) sections: [Extents; SECTIONS],
}

impl Header {
    /// The position of the first event; the others follow without a gap.
    pub(in crate::log) fn first(&self) -> Position {
        self.first
    }

    /// The position of the last event.
    pub(in crate::log) fn last(&self) -> Position {
        Position(self.first.0 + u64::from(self.count) - 1)
    }

    /// How many events there are; at least one.
    pub(in crate::log) fn count(&self) -> usize {
        self.count as usize
    }

    /// The earliest and the latest time at which an event happened.
    pub(in crate::log) fn times(&self) -> (Time, Time) {
        self.times
    }

    /// When the first and the last event were appended.
    pub(in crate::log) fn appended(&self) -> (Time, Time) {
        self.appended
    }

    /// Which sources and types there are, in the order in which they first come.
    pub(in crate::log) fn kinds(&self) -> &[Kind] {
        &self.kinds
    }

    /// How many bytes a section has where it is stored.
    pub(in crate::log) fn stored(&self, section: Section) -> u64 {
        let extents = self.sections[section as usize];
        u64::from(extents.numbers.stored) + u64::from(extents.bytes.stored)
    }

    /// How many bytes all sections have once they are unpacked.
    pub(in crate::log) fn raw_bytes(&self) -> u64 {
        self.sections.iter().map(|s| u64::from(s.numbers.raw) + u64::from(s.bytes.raw)).sum()
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        out.extend_from_slice(&self.first.0.to_le_bytes());
        for time in [self.times.0, self.times.1, self.appended.0, self.appended.1] {
            out.extend_from_slice(&time.microseconds().to_le_bytes());
        }
        let mut put = |number: u32| out.extend_from_slice(&number.to_le_bytes());
        put(self.count);
        put(self.kinds.len() as u32);
        for kind in &self.kinds {
            [kind.source, kind.event_type, kind.count].into_iter().for_each(&mut put);
        }
        for Extents { numbers, bytes, checksum } in &self.sections {
            [numbers.stored, numbers.raw, bytes.stored, bytes.raw, *checksum].into_iter().for_each(&mut put);
        }
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Reads a header and checks all that can be checked without the block.
    pub(in crate::log) fn decode(bytes: &[u8]) -> Result<Header, Damage> {
        let damage = |what| Damage { what: format!("the header {what}") };
        let (content, checksum) = bytes.split_last_chunk().ok_or_else(|| damage("is too short"))?;
        if crc32fast::hash(content) != u32::from_le_bytes(*checksum) {
            return Err(damage("does not match its checksum"));
        }
        let mut reader = Reader::new("the header", content);
        let format = reader.u8()?;
        reader.check(format == FORMAT, "has an unknown format")?;
        let first = Position(reader.u64()?);
        let times = (reader.time()?, reader.time()?);
        let appended = (reader.time()?, reader.time()?);
        reader.check(times.0 <= times.1 && appended.0 <= appended.1, "has times that go back")?;
        let count = reader.u32()?;
        reader.check((1..=MAX_EVENTS).contains(&(count as usize)), "has an impossible number of events")?;
        reader.check(first.0.checked_add(u64::from(count)).is_some(), "has positions without end")?;
        let distinct = reader.u32()?;
        reader.check(distinct <= count, "has more kinds than events")?;
        let mut kinds = Vec::with_capacity(distinct as usize);
        for _ in 0..distinct {
            kinds.push(Kind { source: reader.u32()?, event_type: reader.u32()?, count: reader.u32()? });
        }
        let events = kinds.iter().map(|k| u64::from(k.count)).sum::<u64>();
        reader.check(events == u64::from(count), "has kinds that do not add up")?;
        let mut sections = [Extents::default(); SECTIONS];
        for section in &mut sections {
            for extent in [&mut section.numbers, &mut section.bytes] {
                *extent = Extent { stored: reader.u32()?, raw: reader.u32()? };
                reader.check(extent.stored <= extent.raw, "has a section that grew")?;
                reader.check(extent.raw as usize <= MAX_SECTION_BYTES, "has a section beyond the limit")?;
            }
            section.checksum = reader.u32()?;
        }
        reader.end()?;
        Ok(Header { first, count, times, appended, kinds, sections })
    }
}
