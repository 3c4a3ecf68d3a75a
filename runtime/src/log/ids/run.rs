//! One run: its pages in the database, its filters in memory.

use std::ops::Range;

use rusqlite::{CachedStatement, Connection, params};

use super::{BITS, END, Error};

/// Most entries that a page has on average; at least half as many, unless the run has only one. Smaller pages cost more
/// of SQLite's bytes for each, larger ones leave more of SQLite's pages empty.
const PAGE_ENTRIES: u64 = 96;

/// Pages for each filter, as a power of two.
const FILTER_PAGES: u32 = 5;

/// Cache lines of a filter: 12 bits for each entry if a page has 64 on average, as it has after full parts and merges.
const FILTER_LINES: usize = 48;

/// Memory for a filter, bytes.
pub(super) const FILTER_SIZE: usize = size_of::<[Line; FILTER_LINES]>();

#[repr(align(64))]
pub(super) struct Line([u64; 8]);

/// A Bloom filter for a stretch of a run, each hash within one cache line.
#[derive(Default)]
pub(super) enum Filter {
    #[default]
    Unasked,
    /// Once. A process that appends one event must not read a stretch of every run for it.
    Asked,
    Made(Box<[Line; FILTER_LINES]>),
}

/// The line and the bits of a hash in the filter for `1 << bits` hashes. The line follows the order of hashes, so that
/// sorted lookups meet neighbours.
fn places(hash: u64, bits: u32) -> (usize, impl Iterator<Item = (usize, u64)>) {
    let line = ((hash & ((1 << bits) - 1)) * FILTER_LINES as u64) >> bits;
    let mixed = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bit = move |i: u32| (mixed >> (64 - 9 * i)) & 511;
    (line as usize, (1..=6).map(move |i| ((bit(i) >> 6) as usize, 1 << (bit(i) & 63))))
}

pub(super) const CHECK_BYTES: usize = 4;
pub(super) const RUN_BYTES: usize = 9 * 8;

pub(super) struct Run {
    /// Random: a run that was rolled back and the one that took its place differ.
    pub(super) tag: i64,
    pub(super) level: usize,
    /// The number of the first page.
    pub(super) first: u64,
    /// Bits of a hash that do not follow from the page.
    pub(super) shift: u32,
    /// Of the whole run, when it is complete.
    pub(super) entries: u64,
    pub(super) base: u64,
    pub(super) last: u64,
    /// The hashes whose entries are here: less than all while a merge fills or empties the run.
    pub(super) here: Range<u64>,
    pub(super) filters: Vec<Filter>,
    /// Which of the filters may be in memory.
    pub(super) filtered: Range<usize>,
}

impl Run {
    pub(super) fn new(
        connection: &Connection,
        first: u64,
        level: usize,
        entries: u64,
        positions: Range<u64>,
    ) -> Result<Run, Error> {
        let tag = connection.prepare_cached("SELECT random()")?.query_row([], |r| r.get(0))?;
        Ok(Run {
            tag,
            level,
            first,
            shift: BITS - entries.div_ceil(PAGE_ENTRIES).next_power_of_two().ilog2(),
            entries,
            base: positions.start,
            last: positions.end,
            here: 0..0,
            filters: Vec::new(),
            filtered: 0..0,
        })
    }

    pub(super) fn encode(&self) -> [u8; RUN_BYTES] {
        let Range { start, end } = self.here;
        let (tag, level, shift) = (self.tag as u64, self.level as u64, u64::from(self.shift));
        let fields = [tag, level, self.first, shift, self.entries, self.base, self.last, start, end];
        std::array::from_fn(|i| fields[i / 8].to_le_bytes()[i % 8])
    }

    pub(super) fn decode(bytes: &[u8]) -> Run {
        let field = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| bytes[i * 8 + b]));
        Run {
            tag: field(0) as i64,
            level: field(1) as usize,
            first: field(2),
            shift: field(3) as u32,
            entries: field(4),
            base: field(5),
            last: field(6),
            here: field(7)..field(8),
            filters: Vec::new(),
            filtered: 0..0,
        }
    }

    pub(super) fn grows(&self) -> bool {
        self.here.end < END
    }

    pub(super) fn waits(&self) -> bool {
        self.here == (0..END)
    }

    pub(super) fn pages(&self) -> u64 {
        END >> self.shift
    }

    /// The number after that of the last page.
    pub(super) fn end(&self) -> u64 {
        self.first + self.pages()
    }

    fn position_bits(&self) -> u32 {
        u64::BITS - (self.last - self.base).leading_zeros()
    }

    /// Bits of an entry.
    pub(super) fn width(&self) -> u32 {
        self.shift + self.position_bits()
    }

    /// Bits of a hash that do not follow from the filter.
    pub(super) fn filter_bits(&self) -> u32 {
        (self.shift + FILTER_PAGES).min(BITS)
    }

    /// Gives back the filters that may not be in memory.
    pub(super) fn forget_filters(&mut self) {
        let count = (END >> self.filter_bits()) as usize;
        self.filters.resize_with(count, Filter::default);
        for place in (0..count).filter(|place| !self.filtered.contains(place)) {
            self.filters[place] = Filter::default();
        }
    }

    fn damage(&self, page: u64, what: &str) -> Error {
        let Run { tag, level, .. } = self;
        Error::Damage { what: format!("run {tag:x} of level {level}: page {page} {what}") }
    }

    /// Covers where the page belongs as well.
    fn check(&self, page: u64, data: &[u8]) -> [u8; CHECK_BYTES] {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.tag.to_le_bytes());
        hasher.update(&page.to_le_bytes());
        hasher.update(data);
        hasher.finalize().to_le_bytes()
    }

    /// Appends the pages from where the run ends to a hash, with these entries.
    pub(super) fn write(
        &mut self,
        connection: &Connection,
        until: u64,
        mut entries: &[(u64, u64)],
    ) -> Result<(), Error> {
        let mut insert = connection.prepare_cached(&format!("INSERT INTO id_level_{} VALUES (?, ?)", self.level))?;
        let (width, position_bits) = (self.width(), self.position_bits());
        let mut bytes = Vec::new();
        for page in self.here.end >> self.shift..until >> self.shift {
            let count = entries.partition_point(|(hash, _)| hash >> self.shift <= page);
            let (these, rest) = entries.split_at(count);
            entries = rest;
            bytes.clear();
            let (mut bits, mut held) = (0_u128, 0);
            for &(hash, position) in these {
                let low = u128::from(hash & ((1 << self.shift) - 1));
                bits |= (low << position_bits | u128::from(position - self.base)) << held;
                held += width;
                let whole = (held / 8) as usize;
                bytes.extend_from_slice(&bits.to_le_bytes()[..whole]);
                bits >>= whole * 8;
                held %= 8;
            }
            if held > 0 {
                bytes.push(bits as u8);
            }
            let check = self.check(page, &bytes);
            bytes.extend_from_slice(&check);
            insert.execute(params![(self.first + page) as i64, bytes])?;
        }
        self.here.end = until;
        Ok(())
    }

    /// The entries of a page, once it is what was written.
    fn page<'a>(&self, page: u64, row: &'a rusqlite::Row) -> Result<Page<'a>, Error> {
        let bytes = row.get_ref(0)?.as_blob().map_err(|_| self.damage(page, "is not bytes"))?;
        let (data, check) = bytes.split_last_chunk().ok_or_else(|| self.damage(page, "is too short"))?;
        if self.check(page, data) != *check {
            return Err(self.damage(page, "has a wrong checksum"));
        }
        Ok(Page {
            data,
            width: self.width(),
            position_bits: self.position_bits(),
            low: page << self.shift,
            base: self.base,
        })
    }

    /// Calls `each` for the entries of some pages, in order of their hashes.
    pub(super) fn read(
        &self,
        connection: &Connection,
        mut pages: Range<u64>,
        mut each: impl FnMut(u64, u64),
    ) -> Result<(), Error> {
        let sql = format!(
            "SELECT page, number FROM id_level_{} WHERE number >= ? AND number < ? ORDER BY number",
            self.level
        );
        let mut statement = connection.prepare_cached(&sql)?;
        let mut rows = statement.query([(self.first + pages.start) as i64, (self.first + pages.end) as i64])?;
        while let Some(row) = rows.next()? {
            let expected =
                pages.next().filter(|n| row.get_ref(1).is_ok_and(|r| r.as_i64() == Ok((self.first + n) as i64)));
            let number = expected.ok_or_else(|| self.damage(pages.start, "follows a gap"))?;
            let page = self.page(number, row)?;
            (0..page.len()).map(|i| page.get(i)).for_each(|(hash, position)| each(hash, position));
        }
        if pages.is_empty() { Ok(()) } else { Err(self.damage(pages.start, "is not there")) }
    }

    /// False if the run certainly has not got a hash.
    pub(super) fn may_have(&mut self, connection: &Connection, hash: u64) -> Result<bool, Error> {
        let bits = self.filter_bits();
        let number = (hash >> bits) as usize;
        let filter = match &self.filters[number] {
            Filter::Made(filter) => filter,
            Filter::Unasked => {
                self.filters[number] = Filter::Asked;
                return Ok(true);
            }
            Filter::Asked => {
                let (start, end) = ((number as u64) << bits, (number as u64 + 1) << bits);
                if !self.filtered.contains(&number) || start < self.here.start || end > self.here.end {
                    return Ok(true);
                }
                let mut filter = Box::new([const { Line([0; 8]) }; FILTER_LINES]);
                self.read(connection, start >> self.shift..end >> self.shift, |hash, _| {
                    let (line, bits) = places(hash, bits);
                    bits.for_each(|(word, bit)| filter[line].0[word] |= bit);
                })?;
                self.filters[number] = Filter::Made(filter);
                let Filter::Made(filter) = &self.filters[number] else { return Ok(true) };
                filter
            }
        };
        let (line, mut bits) = places(hash, bits);
        Ok(bits.all(|(word, bit)| filter[line].0[word] & bit != 0))
    }

    pub(super) fn find<'c>(
        &self,
        connection: &'c Connection,
        statement: &mut Option<CachedStatement<'c>>,
        hash: u64,
        mut found: impl FnMut(u64),
    ) -> Result<(), Error> {
        if statement.is_none() {
            let sql = format!("SELECT page FROM id_level_{} WHERE number = ?", self.level);
            *statement = Some(connection.prepare_cached(&sql)?);
        }
        let Some(statement) = statement else { return Ok(()) };
        let number = hash >> self.shift;
        let mut rows = statement.query([(self.first + number) as i64])?;
        let page = match rows.next()? {
            Some(row) => self.page(number, row)?,
            None => return Err(self.damage(number, "is not there")),
        };
        let (mut low, mut high) = (0, page.len());
        while low < high {
            let middle = (low + high) / 2;
            if page.get(middle).0 < hash { low = middle + 1 } else { high = middle }
        }
        (low..page.len()).map(|i| page.get(i)).take_while(|e| e.0 == hash).for_each(|e| found(e.1));
        Ok(())
    }
}

struct Page<'a> {
    data: &'a [u8],
    width: u32,
    position_bits: u32,
    /// The first hash of the page.
    low: u64,
    base: u64,
}

impl Page<'_> {
    /// An entry has more bits than a byte, so what is left at the end is none.
    fn len(&self) -> usize {
        self.data.len() * 8 / self.width as usize
    }

    fn get(&self, index: usize) -> (u64, u64) {
        let bit = index * self.width as usize;
        let rest = &self.data[bit / 8..];
        let bytes = rest.first_chunk().copied().unwrap_or_else(|| {
            let mut bytes = [0; 16];
            bytes[..rest.len()].copy_from_slice(rest);
            bytes
        });
        let entry = (u128::from_le_bytes(bytes) >> (bit % 8)) & ((1 << self.width) - 1);
        let position = entry & ((1 << self.position_bits) - 1);
        (self.low + (entry >> self.position_bits) as u64, self.base + position as u64)
    }
}
