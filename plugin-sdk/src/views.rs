use std::any::{Any, TypeId};
use std::rc::Rc;

use crate::cache::{Limits, Table};
use crate::projection::Failure;
use crate::view::View;
use crate::{Error, Result};

/// Where rows come from that are not cached: the host, or a test kit's memory. Keys and rows are encoded as in the
/// contract.
pub(crate) trait Store {
    fn get(&self, view: u32, key: &[u8]) -> Option<Vec<u8>>;
    /// Keys as a MessagePack array of `bin`; the answer is an array of `bin` or nil.
    fn get_many(&self, view: u32, keys: &[u8]) -> Vec<u8>;
}

/// The rows of the projection's views, as `apply` reads and changes them.
///
/// Every method is generic over the view, and takes the key as [`View::Key`] says: `&str` for one `String`, a tuple for
/// several key columns.
///
/// Rows live in a bounded cache in guest memory, and the host is asked for one only if it is not there. What changed
/// goes back to the host at the end of the batch: each changed row once, in its last state. A row that was only read is
/// not written.
///
/// **An error sticks.** [`put`](Self::put), [`upsert`](Self::upsert) and [`delete`](Self::delete) return it, but also
/// when nobody looks at it, or when a method has no way to return it, the event that `apply` is working on fails with
/// the first such error. So a mistake cannot end up in a view.
pub struct Views {
    tables: Vec<(TypeId, Box<dyn AnyTable>)>,
    /// The event at work, counted from 1: tables note it at the rows it changes.
    event: u32,
    error: Option<Error>,
}

/// What [`Views`] needs of a table without knowing its rows' type.
pub(crate) trait AnyTable: Any {
    fn name(&self) -> &'static str;
    fn changed(&self) -> usize;
    fn write_changes(&mut self, out: &mut Vec<u8>) -> Result<(), Failure>;
}

impl Views {
    /// The row with this key, as the events up to now have left it.
    ///
    /// The reference is into the cache, so it has to go before the next call: clone what you need for it.
    pub fn get<V: View>(&mut self, key: V::Key<'_>) -> Option<&V> {
        let (table, _, error) = self.table::<V>()?;
        match table.row(key) {
            Ok(entry) => table.at(entry),
            Err(problem) => {
                error.get_or_insert(problem);
                None
            }
        }
    }

    /// Inserts the row, or replaces the one with its key. The old row is not read, so this is the cheapest way to write.
    ///
    /// # Errors
    ///
    /// If a real column is not finite.
    pub fn put<V: View>(&mut self, row: V) -> Result<()> {
        self.change::<V>(|table, event| table.put(row, event))
    }

    /// Changes the row with this key; without one, does nothing and returns false.
    ///
    /// A change that gives the row another key, or a real that is not finite, fails the event.
    #[must_use = "false means that there is no such row, and that nothing has changed"]
    pub fn update<V: View>(&mut self, key: V::Key<'_>, change: impl FnOnce(&mut V)) -> bool {
        let Some((table, event, error)) = self.table::<V>() else { return false };
        match table.update(key, event, change) {
            Ok(found) => found,
            Err(problem) => {
                error.get_or_insert(problem);
                false
            }
        }
    }

    /// Changes the row with this key; without one, begins with the default row with its key set.
    ///
    /// # Errors
    ///
    /// If the change gave the row another key (put the new row and delete the old one instead), or a real that is not
    /// finite.
    pub fn upsert<V: View + Default>(&mut self, key: V::Key<'_>, change: impl FnOnce(&mut V)) -> Result<()> {
        self.change::<V>(|table, event| table.upsert(key, event, change))
    }

    /// Deletes the row with this key. It is no error if there is none.
    ///
    /// # Errors
    ///
    /// Only if `V` is not one of the projection's views.
    pub fn delete<V: View>(&mut self, key: V::Key<'_>) -> Result<()> {
        self.change::<V>(|table, event| {
            table.delete(key, event);
            Ok(())
        })
    }

    /// Reads the rows with these keys into the cache, in one call to the host for those that are not there yet.
    ///
    /// For events that touch many rows: call this first, then [`get`](Self::get) or [`update`](Self::update) each of
    /// them. The rows stay in the cache at least until the batch ends.
    pub fn load<'k, V: View>(&mut self, keys: impl IntoIterator<Item = V::Key<'k>>) {
        if let Some((table, _, error)) = self.table::<V>()
            && let Err(problem) = table.load(keys)
        {
            error.get_or_insert(problem);
        }
    }

    pub(crate) fn new(tables: Vec<(TypeId, Box<dyn AnyTable>)>) -> Self {
        Self { tables, event: 0, error: None }
    }

    /// Says which event of the batch comes next.
    pub(crate) fn begin_event(&mut self, index: u32) {
        self.event = index + 1;
    }

    /// The first error since the last call, if there was one.
    pub(crate) fn take_error(&mut self) -> Option<Error> {
        self.error.take()
    }

    /// Writes the changes of the batch, ready for the host, and makes the cache ready for the next batch.
    pub(crate) fn finish_batch(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let changed: usize = self.tables.iter().map(|(_, table)| table.changed()).sum();
        let changed = u32::try_from(changed).expect("a row has an index of 32 bits");
        crate::column::value::written(rmp::encode::write_array_len(out, changed));
        self.tables.iter_mut().try_for_each(|(_, table)| table.write_changes(out))
    }

    fn change<V: View>(&mut self, change: impl FnOnce(&mut Table<V>, u32) -> Result<()>) -> Result<()> {
        let done = match self.table::<V>() {
            Some((table, event, _)) => change(table, event),
            None => return Err(Error::msg(not_listed::<V>())),
        };
        if let Err(problem) = &done {
            self.error.get_or_insert_with(|| Error::msg(problem));
        }
        done
    }

    /// The table of `V`, with the two other fields that a call needs beside it.
    fn table<V: View>(&mut self) -> Option<(&mut Table<V>, u32, &mut Option<Error>)> {
        let Self { tables, event, error } = self;
        let wanted = TypeId::of::<V>();
        // A handful of views at most: a walk is quicker than a map.
        match tables.iter_mut().find(|(id, _)| *id == wanted) {
            Some((_, table)) => {
                let table: &mut dyn Any = table.as_mut();
                let table = table.downcast_mut().expect("a table is listed under the type of its rows");
                Some((table, *event, error))
            }
            None => {
                error.get_or_insert_with(|| Error::msg(not_listed::<V>()));
                None
            }
        }
    }
}

impl std::fmt::Debug for Views {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.tables.iter().map(|(_, table)| table.name())).finish()
    }
}

fn not_listed<V: View>() -> String {
    format!("view `{}` is not listed in views(...) of #[projection]", V::SCHEMA.name)
}

/// A table for the rows of `V`, which is the projection's view number `view`.
pub(crate) fn table<V: View>(view: u32, store: Rc<dyn Store>, limits: Limits) -> Box<dyn AnyTable> {
    Box::new(Table::<V>::new(view, store, limits))
}
