//! Names of sources and types by number. Both are in memory for as long as a log is open, in one copy for all readers.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

use rusqlite::{Connection, OptionalExtension};

use crate::config::limits;

/// Which of the two kinds of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Source,
    Type,
}

impl Kind {
    fn table(self) -> &'static str {
        match self {
            Kind::Source => "sources",
            Kind::Type => "types",
        }
    }
}

#[derive(Default)]
struct Table {
    /// By number.
    names: Vec<Arc<str>>,
    numbers: HashMap<Arc<str>, u32>,
}

/// All names of a log that this process has met.
#[derive(Default)]
pub(super) struct Names {
    sources: RwLock<Table>,
    types: RwLock<Table>,
}

impl Names {
    fn table(&self, kind: Kind) -> &RwLock<Table> {
        match kind {
            Kind::Source => &self.sources,
            Kind::Type => &self.types,
        }
    }

    /// How many there are.
    pub(super) fn len(&self, kind: Kind) -> usize {
        self.table(kind).read().expect("no panics while it is held").names.len()
    }

    /// Whether this process has met these numbers.
    pub(super) fn knows(&self, source: u32, event_type: u32) -> bool {
        (source as usize) < self.len(Kind::Source) && (event_type as usize) < self.len(Kind::Type)
    }

    /// The number of a name that is known.
    pub(super) fn number(&self, kind: Kind, name: &str) -> Option<u32> {
        self.table(kind).read().expect("no panics while it is held").numbers.get(name).copied()
    }

    /// The names from a number on, for whoever keeps something for each.
    pub(super) fn from(&self, kind: Kind, number: usize) -> Vec<Arc<str>> {
        let table = self.table(kind).read().expect("no panics while it is held");
        table.names.get(number..).unwrap_or_default().to_vec()
    }

    /// The names of numbers that the log has used.
    pub(super) fn names(&self, kind: Kind, numbers: &[u32], log: &Connection) -> rusqlite::Result<Vec<Arc<str>>> {
        let find = || {
            let table = self.table(kind).read().expect("no panics while it is held");
            numbers.iter().map(|number| table.names.get(*number as usize).cloned()).collect::<Option<Vec<_>>>()
        };
        if let Some(names) = find() {
            return Ok(names);
        }
        self.refresh(kind, log)?;
        // A number without a name: what was read is not what was written.
        find().ok_or(rusqlite::Error::QueryReturnedNoRows)
    }

    /// Reads the names that were added since the last time.
    pub(super) fn refresh(&self, kind: Kind, log: &Connection) -> rusqlite::Result<()> {
        let mut table = self.table(kind).write().expect("no panics while it is held");
        let sql = format!("SELECT number, name FROM {} WHERE number >= ? ORDER BY number", kind.table());
        let mut statement = log.prepare_cached(&sql)?;
        let mut rows = statement.query([table.names.len() as i64])?;
        while let Some(row) = rows.next()? {
            let (number, name): (i64, String) = (row.get(0)?, row.get(1)?);
            if number != table.names.len() as i64 {
                return Err(rusqlite::Error::IntegralValueOutOfRange(0, number));
            }
            let name: Arc<str> = name.into();
            table.numbers.insert(name.clone(), number as u32);
            table.names.push(name);
        }
        Ok(())
    }
}

/// The names of one append transaction: those that are new count once it is committed.
pub(super) struct Numbering<'a> {
    log: &'a Connection,
    names: &'a Names,
    new: HashMap<(bool, String), u32>,
}

impl<'a> Numbering<'a> {
    pub(super) fn new(log: &'a Connection, names: &'a Names) -> Numbering<'a> {
        Numbering { log, names, new: HashMap::new() }
    }

    /// The number of a name, which is entered if it is new.
    pub(super) fn number(&mut self, kind: Kind, name: &str) -> Result<u32, Failed> {
        if let Some(number) = self.names.number(kind, name) {
            return Ok(number);
        }
        let key = (kind == Kind::Source, name.to_owned());
        if let Some(number) = self.new.get(&key) {
            return Ok(*number);
        }
        let table = kind.table();
        let find = format!("SELECT number FROM {table} WHERE name = ?");
        let found: Option<i64> = self.log.prepare_cached(&find)?.query_row([name], |r| r.get(0)).optional()?;
        let number = match found {
            Some(number) => number,
            None => {
                let next = format!("SELECT coalesce(max(number) + 1, 0) FROM {table}");
                let next: i64 = self.log.prepare_cached(&next)?.query_row([], |r| r.get(0))?;
                if next as usize >= limits::LOG_NAMES {
                    return Err(Failed::Names { what: table, name: name.to_owned() });
                }
                let insert = format!("INSERT INTO {table} VALUES (?, ?)");
                self.log.prepare_cached(&insert)?.execute((next, name))?;
                next
            }
        };
        self.new.insert(key, number as u32);
        Ok(number as u32)
    }

    /// Whether there were names that the others do not know yet.
    pub(super) fn has_new(&self) -> bool {
        !self.new.is_empty()
    }
}

/// Why a name has no number.
pub(super) enum Failed {
    Sqlite(rusqlite::Error),
    Names { what: &'static str, name: String },
}

impl From<rusqlite::Error> for Failed {
    fn from(error: rusqlite::Error) -> Failed {
        Failed::Sqlite(error)
    }
}
