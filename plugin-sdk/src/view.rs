//! What a view is, beyond its columns.

use std::cmp::Ordering;

use crate::Error;
use crate::column::{Column, ColumnType};
use crate::key::KeyHasher;

/// One table that a projection maintains, as the type of its rows. Comes from [`#[derive(View)]`](derive@crate::View).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a view",
    note = "a view is a struct with #[derive(View)] and #[view(name = \"...\")]"
)]
pub trait View: Sized + 'static {
    /// The view's name, its columns, its key and its indexes.
    const SCHEMA: Schema;

    /// The key as calls such as [`Views::get`](crate::Views::get) take it: `&str` for one `String`, a tuple such as
    /// `(&str, i64)` for several key columns, in the order of the fields.
    type Key<'k>: Copy;

    /// The row's key.
    fn key(&self) -> Self::Key<'_>;

    #[doc(hidden)]
    fn set_key(&mut self, key: Self::Key<'_>);

    #[doc(hidden)]
    fn has_key(&self, key: Self::Key<'_>) -> bool;

    #[doc(hidden)]
    fn hash_key(key: Self::Key<'_>, hasher: &mut KeyHasher);

    #[doc(hidden)]
    fn encode_key(key: Self::Key<'_>, out: &mut Vec<u8>);

    #[doc(hidden)]
    fn compare_keys(&self, other: &Self) -> Ordering;

    #[doc(hidden)]
    fn normalize(&mut self);

    #[doc(hidden)]
    fn check(&self) -> Result<(), Error>;

    #[doc(hidden)]
    fn encode_row(&self, out: &mut Vec<u8>) -> Result<(), Error>;

    #[doc(hidden)]
    fn decode(key: &mut &[u8], row: &mut &[u8]) -> Result<Self, Error>;
}

/// What the manifest says about a view.
#[derive(Clone, Copy, Debug)]
pub struct Schema {
    /// The table's name.
    pub name: &'static str,
    /// The columns in the order of the fields.
    pub columns: &'static [ColumnSchema],
    /// The names of the key columns.
    pub key: &'static [&'static str],
    /// Each index as the names of its columns.
    pub indexes: &'static [&'static [&'static str]],
}

/// What the manifest says about a column.
#[derive(Clone, Copy, Debug)]
pub struct ColumnSchema {
    /// The column's name.
    pub name: &'static str,
    /// Its type.
    pub column_type: ColumnType,
    /// Whether it may be absent.
    pub nullable: bool,
}

impl ColumnSchema {
    #[doc(hidden)]
    pub const fn of<T: Column>(name: &'static str) -> Self {
        Self { name, column_type: T::TYPE, nullable: T::NULLABLE }
    }
}

/// Reads a row that the host stored, and nothing but this row.
pub(crate) fn decode<V: View>(mut key: &[u8], mut row: &[u8]) -> Result<V, Error> {
    let within =
        |error: Error| error.within(format_args!("a stored row of `{}` does not fit its type", V::SCHEMA.name));
    let decoded = V::decode(&mut key, &mut row).map_err(within)?;
    if !key.is_empty() || !row.is_empty() {
        return Err(within(Error::msg("it has more columns")));
    }
    Ok(decoded)
}
