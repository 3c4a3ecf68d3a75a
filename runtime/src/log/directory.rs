//! What is known of each block without reading it.

use std::ops::Range;
use std::sync::{RwLock, RwLockReadGuard};

use rusqlite::Connection;

use super::Error;
use super::block::{Header, Kind};
use super::read::Failures;
use crate::model::Time;

/// Pairs of source and type in a block that are kept in memory, 12 bytes each. A block with more, as only a log with
/// thousands of sources has them, is asked for its header: some 50 us.
const KINDS: usize = 64;

/// A block in the directory.
pub(super) struct Entry {
    /// The position of its first event.
    pub(super) first: u64,
    /// How many it has.
    pub(super) count: u64,
    /// The earliest and the latest time in it.
    pub(super) times: (Time, Time),
    kinds: Option<Box<[Kind]>>,
    /// Its header cannot be read, and nobody knows what is in it.
    damaged: bool,
}

impl Entry {
    pub(super) fn end(&self) -> u64 {
        self.first + self.count
    }

    /// Its sources and types.
    pub(super) fn kinds<T>(
        &self,
        log: &Connection,
        failures: &Failures,
        see: impl FnOnce(&[Kind]) -> T,
    ) -> Result<T, Error> {
        match &self.kinds {
            _ if self.damaged => Err(failures.damaged(self.first, Some(self.end() - 1), "its header".into())),
            Some(kinds) => Ok(see(kinds)),
            None => header(log, failures, self.first).map(|header| see(header.kinds())),
        }
    }
}

/// Reads the header of a block.
pub(super) fn header(log: &Connection, failures: &Failures, first: u64) -> Result<Header, Error> {
    let read = || -> rusqlite::Result<Vec<u8>> {
        log.prepare_cached("SELECT header FROM blocks WHERE first = ?")?.query_row([first as i64], |r| r.get(0))
    };
    let bytes = read().map_err(|error| failures.sqlite(error))?;
    decode(&bytes, first).map_err(|what| failures.damaged(first, None, what))
}

fn decode(bytes: &[u8], first: u64) -> Result<Header, String> {
    let header = Header::decode(bytes).map_err(|damage| damage.what)?;
    if header.first().0 == first { Ok(header) } else { Err(format!("it is the block of position {}", header.first())) }
}

/// The blocks of a log that this process has heard of, in order and without gaps.
pub(super) struct Directory {
    entries: RwLock<Vec<Entry>>,
    /// Whether blocks whose headers cannot be read are entered all the same.
    skips: bool,
}

impl Directory {
    /// Without `skips` a header that cannot be read is an error.
    pub(super) fn new(skips: bool) -> Directory {
        Directory { entries: RwLock::default(), skips }
    }

    /// Whether damage is passed over.
    pub(super) fn skips(&self) -> bool {
        self.skips
    }

    pub(super) fn entries(&self) -> RwLockReadGuard<'_, Vec<Entry>> {
        self.entries.read().expect("no panics while it is held")
    }

    /// Where the blocks begin that begin between two positions.
    pub(super) fn firsts(&self, positions: Range<u64>) -> Vec<u64> {
        let entries = self.entries();
        let from = entries.partition_point(|entry| entry.first < positions.start);
        entries[from..].iter().map(|entry| entry.first).take_while(|first| *first < positions.end).collect()
    }

    /// The position after the last block.
    pub(super) fn end(&self) -> u64 {
        self.entries().last().map_or(0, Entry::end)
    }

    /// The index of the block that has a position.
    pub(super) fn find(&self, position: u64) -> Option<usize> {
        let entries = self.entries();
        let index = entries.partition_point(|entry| entry.end() <= position);
        (index < entries.len()).then_some(index)
    }

    /// Reads of the blocks that were added since the last time. Answers the position after the last block: others may add
    /// more at any moment, which a transaction that began before does not see.
    pub(super) fn refresh(&self, log: &Connection, failures: &Failures) -> Result<u64, Error> {
        let mut entries = self.entries.write().expect("no panics while it is held");
        // What cannot be read: the first position of it, the last one if that is known, and why.
        let mut read = || -> rusqlite::Result<Option<(u64, Option<u64>, String)>> {
            let mut end = entries.last().map_or(0, Entry::end);
            let mut statement =
                log.prepare_cached("SELECT first, header FROM blocks WHERE first >= ? ORDER BY first")?;
            let mut rows = statement.query([end as i64])?;
            while let Some(row) = rows.next()? {
                let first = row.get::<_, i64>(0)? as u64;
                let header = match decode(row.get_ref(1)?.as_blob()?, first) {
                    Ok(header) if first == end => header,
                    Ok(_) => {
                        return Ok(Some((end, Some(first - 1), format!("the next block begins at position {first}"))));
                    }
                    Err(what) => match after(log, first)? {
                        Some(after) if self.skips && first == end => {
                            entries.push(Entry {
                                first,
                                count: after - first,
                                times: (Time::EPOCH, Time::EPOCH),
                                kinds: None,
                                damaged: true,
                            });
                            end = after;
                            continue;
                        }
                        after => return Ok(Some((first, after.map(|after| after - 1), what))),
                    },
                };
                let (count, kinds) = (header.count() as u64, header.kinds());
                entries.push(Entry {
                    first,
                    count,
                    times: header.times(),
                    kinds: (kinds.len() <= KINDS).then(|| kinds.into()),
                    damaged: false,
                });
                end = first + count;
            }
            Ok(None)
        };
        match read() {
            Ok(None) => Ok(entries.last().map_or(0, Entry::end)),
            Ok(Some((first, last, what))) => Err(failures.damaged(first, last, what)),
            Err(error) => Err(failures.sqlite(error)),
        }
    }
}

/// Where the events after a block begin, which its header would say; None if nothing comes after it.
fn after(log: &Connection, first: u64) -> rusqlite::Result<Option<u64>> {
    let sql = "SELECT coalesce((SELECT min(first) FROM blocks WHERE first > ?), (SELECT min(position) FROM events))";
    let after: Option<i64> = log.prepare_cached(sql)?.query_row([first as i64], |r| r.get(0))?;
    Ok(after.map(|after| after as u64).filter(|after| *after > first))
}
