//! Column types: how a Rust value becomes one value of a row, and back.

use std::cmp::Ordering;
use std::fmt;
use std::ops::{Deref, DerefMut};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::key::{self, KeyHasher};
use crate::{Error, Timestamp};

/// The type of a column in the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ColumnType {
    /// A string.
    Text,
    /// A signed integer of 64 bits.
    Integer,
    /// A finite float of 64 bits.
    Real,
    /// True or false.
    Boolean,
    /// A string of bytes.
    Bytes,
    /// Microseconds since 1970, UTC.
    Timestamp,
    /// Any JSON value.
    Json,
    /// 16 bytes.
    Uuid,
    /// An exact decimal number.
    Decimal,
}

/// A Rust type that can be a column. Implemented for:
///
/// | Rust | column |
/// | --- | --- |
/// | `String`, enums with [`#[derive(TextEnum)]`](derive@crate::TextEnum) | text |
/// | `i64`, `i32`, `i16`, `u32`, `u16`, `u8` | integer |
/// | `f64`, `f32`; a value that is not finite fails the event | real |
/// | `bool` | boolean |
/// | `Vec<u8>` | bytes |
/// | [`Timestamp`] | timestamp |
/// | [`Json<T>`](Json), `serde_json::Value` | json |
/// | `uuid::Uuid`, with the feature `uuid` | uuid |
/// | `rust_decimal::Decimal`, with the feature `decimal` | decimal |
/// | `Option` of each | the same, nullable |
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be a column",
    label = "not a column type",
    note = "column types are String, i64, i32, i16, u32, u16, u8, f64, f32, bool, Vec<u8>, Timestamp, serde_json::Value, Json<T>, enums with #[derive(TextEnum)], uuid::Uuid (feature `uuid`), rust_decimal::Decimal (feature `decimal`), and Option of each",
    note = "an integer column is signed and has 64 bits: for u64 and usize use i64",
    note = "anything that serde can serialize fits into a Json<T>"
)]
pub trait Column: Sized + 'static {
    /// Its type in the manifest.
    const TYPE: ColumnType;
    /// Whether it may be absent.
    const NULLABLE: bool = false;

    /// Whether the value can be stored. Cheap: it runs at every change, so that a bad value fails the event that made
    /// it, no matter what later events do to the row.
    #[doc(hidden)]
    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Gives a value the form in which it comes back from the host, so that a row in the cache and the same row read
    /// anew cannot be told apart: the database has no negative zero.
    #[doc(hidden)]
    fn normalize(&mut self) {}

    #[doc(hidden)]
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error>;

    #[doc(hidden)]
    fn decode(input: &mut &[u8]) -> Result<Self, Error>;
}

/// A column type that can be part of a key: text, integer, boolean, bytes, timestamp and uuid, never nullable.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be part of a key",
    label = "not a key type",
    note = "key types are String, i64, i32, i16, u32, u16, u8, bool, Vec<u8>, Timestamp, enums with #[derive(TextEnum)] and uuid::Uuid (feature `uuid`); a key is never absent, so Option is none of them"
)]
pub trait KeyColumn: Column {
    /// How the key is written in calls such as [`Views::get`](crate::Views::get): `&str` for a `String`, `&[u8]` for a
    /// `Vec<u8>`, and the type itself for all others.
    type Key<'k>: Copy;

    #[doc(hidden)]
    fn as_key(&self) -> Self::Key<'_>;

    #[doc(hidden)]
    fn from_key(key: Self::Key<'_>) -> Self;

    #[doc(hidden)]
    fn is_key(&self, key: Self::Key<'_>) -> bool;

    #[doc(hidden)]
    fn hash_key(key: Self::Key<'_>, hasher: &mut KeyHasher);

    #[doc(hidden)]
    fn encode_key(key: Self::Key<'_>, out: &mut Vec<u8>);

    /// The order of the encoded values as the host's database has it.
    #[doc(hidden)]
    fn order(&self, other: &Self) -> Ordering;
}

/// An enum whose variants are stored as text. Comes from [`#[derive(TextEnum)]`](derive@crate::TextEnum), which makes it
/// a column type and a key type.
pub trait TextEnum: Copy + 'static {
    /// The text of this variant.
    fn as_text(self) -> &'static str;

    /// The variant with this text.
    fn from_text(text: &str) -> Option<Self>;
}

/// Any value that serde can turn into JSON, as a column of type json.
///
/// ```
/// use shadowbox_plugin::prelude::*;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct Item {
///     sku: String,
///     quantity: i64,
/// }
///
/// #[derive(View, Default)]
/// #[view(name = "baskets")]
/// struct Basket {
///     #[view(key)]
///     basket_id: String,
///     items: Json<Vec<Item>>,
/// }
///
/// let mut basket = Basket::default();
/// basket.items.push(Item { sku: "tea".into(), quantity: 2 });
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Json<T>(
    /// The value.
    pub T,
);

impl<T> Deref for Json<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Json<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> From<T> for Json<T> {
    fn from(value: T) -> Self {
        Self(value)
    }
}

impl<T: fmt::Display> fmt::Display for Json<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The encoding of single values, as the contract has it: MessagePack in its shortest form.
pub(crate) mod value {
    use super::Error;

    /// Unwraps what `rmp` says about writing to memory, which cannot fail.
    pub(crate) fn written<T, E: std::fmt::Debug>(result: Result<T, E>) {
        result.expect("writing to memory cannot fail");
    }

    // By hand, where `rmp` takes several calls for a value: this is most of what a batch's changes cost to write. A
    // property test compares.

    #[inline]
    pub(crate) fn write_str(out: &mut Vec<u8>, text: &str) {
        match text.len() {
            n @ 0..32 => out.push(0xa0 | n as u8),
            n => write_len(out, [0xd9, 0xda, 0xdb], n),
        }
        out.extend_from_slice(text.as_bytes());
    }

    #[inline]
    pub(crate) fn write_bin(out: &mut Vec<u8>, bytes: &[u8]) {
        write_len(out, [0xc4, 0xc5, 0xc6], bytes.len());
        out.extend_from_slice(bytes);
    }

    #[inline]
    fn write_len(out: &mut Vec<u8>, markers: [u8; 3], n: usize) {
        if let Ok(n) = u8::try_from(n) {
            out.extend_from_slice(&[markers[0], n]);
        } else if let Ok(n) = u16::try_from(n) {
            out.push(markers[1]);
            out.extend_from_slice(&n.to_be_bytes());
        } else {
            out.push(markers[2]);
            out.extend_from_slice(&(n as u32).to_be_bytes());
        }
    }

    #[inline]
    pub(crate) fn write_int(out: &mut Vec<u8>, n: i64) {
        // A small number is its own byte, or that of its complement.
        match n {
            -32..128 => out.push(n as u8),
            128..0x100 => out.extend_from_slice(&[0xcc, n as u8]),
            -0x80..-32 => out.extend_from_slice(&[0xd0, n as u8]),
            _ => written(rmp::encode::write_sint(out, n)),
        }
    }

    pub(crate) fn read_str<'a>(input: &mut &'a [u8]) -> Result<&'a str, Error> {
        let len = rmp::decode::read_str_len(input).map_err(|_| Error::msg("expected text"))?;
        Ok(std::str::from_utf8(take(input, len)?)?)
    }

    pub(crate) fn read_bin<'a>(input: &mut &'a [u8]) -> Result<&'a [u8], Error> {
        let len = rmp::decode::read_bin_len(input).map_err(|_| Error::msg("expected bytes"))?;
        take(input, len)
    }

    pub(crate) fn read_int(input: &mut &[u8]) -> Result<i64, Error> {
        rmp::decode::read_int(input).map_err(|_| Error::msg("expected an integer"))
    }

    fn take<'a>(input: &mut &'a [u8], len: u32) -> Result<&'a [u8], Error> {
        let (head, tail) = input.split_at_checked(len as usize).ok_or_else(|| Error::msg("a value is cut off"))?;
        *input = tail;
        Ok(head)
    }
}

impl Column for String {
    const TYPE: ColumnType = ColumnType::Text;
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        value::write_str(out, self);
        Ok(())
    }
    fn decode(input: &mut &[u8]) -> Result<Self, Error> {
        value::read_str(input).map(str::to_owned)
    }
}

impl KeyColumn for String {
    type Key<'k> = &'k str;
    fn as_key(&self) -> &str {
        self
    }
    fn from_key(key: &str) -> Self {
        key.to_owned()
    }
    #[inline]
    fn is_key(&self, key: &str) -> bool {
        key::same(self.as_bytes(), key.as_bytes())
    }
    #[inline]
    fn hash_key(key: &str, hasher: &mut KeyHasher) {
        hasher.bytes(key.as_bytes());
    }
    fn encode_key(key: &str, out: &mut Vec<u8>) {
        value::write_str(out, key);
    }
    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

impl Column for Vec<u8> {
    const TYPE: ColumnType = ColumnType::Bytes;
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        value::write_bin(out, self);
        Ok(())
    }
    fn decode(input: &mut &[u8]) -> Result<Self, Error> {
        value::read_bin(input).map(<[u8]>::to_vec)
    }
}

impl KeyColumn for Vec<u8> {
    type Key<'k> = &'k [u8];
    fn as_key(&self) -> &[u8] {
        self
    }
    fn from_key(key: &[u8]) -> Self {
        key.to_vec()
    }
    #[inline]
    fn is_key(&self, key: &[u8]) -> bool {
        key::same(self, key)
    }
    #[inline]
    fn hash_key(key: &[u8], hasher: &mut KeyHasher) {
        hasher.bytes(key);
    }
    fn encode_key(key: &[u8], out: &mut Vec<u8>) {
        value::write_bin(out, key);
    }
    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

/// Column and key types that are small, are passed by value, and encode without failing.
macro_rules! copy_columns {
    ($($(#[$attribute:meta])* $type:ty => $column:ident, $hash:expr, $write:expr, $read:expr;)*) => {$(
        $(#[$attribute])*
        impl Column for $type {
            const TYPE: ColumnType = ColumnType::$column;
            fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
                <Self as KeyColumn>::encode_key(*self, out);
                Ok(())
            }
            fn decode(input: &mut &[u8]) -> Result<Self, Error> {
                let read: fn(&mut &[u8]) -> Result<Self, Error> = $read;
                read(input)
            }
        }

        $(#[$attribute])*
        impl KeyColumn for $type {
            type Key<'k> = Self;
            fn as_key(&self) -> Self {
                *self
            }
            fn from_key(key: Self) -> Self {
                key
            }
            #[inline]
            fn is_key(&self, key: Self) -> bool {
                *self == key
            }
            #[inline]
            fn hash_key(key: Self, hasher: &mut KeyHasher) {
                let hash: fn(&mut KeyHasher, Self) = $hash;
                hash(hasher, key);
            }
            fn encode_key(key: Self, out: &mut Vec<u8>) {
                let write: fn(&mut Vec<u8>, Self) = $write;
                write(out, key);
            }
            fn order(&self, other: &Self) -> Ordering {
                self.cmp(other)
            }
        }
    )*};
}

/// An integer narrower than the column: a row from a time when the field was wider may not fit.
fn narrow<T: TryFrom<i64>>(input: &mut &[u8]) -> Result<T, Error> {
    let n = value::read_int(input)?;
    T::try_from(n).map_err(|_| Error::msg(format_args!("{n} does not fit into a {}", std::any::type_name::<T>())))
}

copy_columns! {
    i64 => Integer, |hasher, n| hasher.number(n as u64), |out, n| value::write_int(out, n), value::read_int;
    i32 => Integer, |hasher, n| hasher.number(n as u64), |out, n| value::write_int(out, n.into()), narrow;
    i16 => Integer, |hasher, n| hasher.number(n as u64), |out, n| value::write_int(out, n.into()), narrow;
    u32 => Integer, |hasher, n| hasher.number(n as u64), |out, n| value::write_int(out, n.into()), narrow;
    u16 => Integer, |hasher, n| hasher.number(n as u64), |out, n| value::write_int(out, n.into()), narrow;
    u8 => Integer, |hasher, n| hasher.number(n as u64), |out, n| value::write_int(out, n.into()), narrow;
    bool => Boolean, |hasher, b| hasher.number(b.into()), |out, b| value::written(rmp::encode::write_bool(out, b)),
        |input| rmp::decode::read_bool(input).map_err(|_| Error::msg("expected a boolean"));
    Timestamp => Timestamp, |hasher, time| hasher.number(time.as_micros() as u64), |out, time| value::write_int(out, time.as_micros()),
        |input| value::read_int(input).map(Timestamp::from_micros);
    #[cfg(feature = "uuid")]
    uuid::Uuid => Uuid, |hasher, uuid| hasher.bytes(uuid.as_bytes()), |out, uuid| value::write_bin(out, uuid.as_bytes()),
        |input| Ok(uuid::Uuid::from_slice(value::read_bin(input)?)?);
}

impl Column for f64 {
    const TYPE: ColumnType = ColumnType::Real;
    fn check(&self) -> Result<(), Error> {
        if self.is_finite() { Ok(()) } else { Err(Error::msg(format_args!("{self} is not a finite number"))) }
    }
    fn normalize(&mut self) {
        // -0.0 + 0.0 is 0.0; no other number changes.
        *self += 0.0;
    }
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        value::written(rmp::encode::write_f64(out, *self));
        Ok(())
    }
    fn decode(input: &mut &[u8]) -> Result<Self, Error> {
        rmp::decode::read_f64(input).map_err(|_| Error::msg("expected a real"))
    }
}

impl Column for f32 {
    const TYPE: ColumnType = ColumnType::Real;
    fn check(&self) -> Result<(), Error> {
        f64::from(*self).check()
    }
    fn normalize(&mut self) {
        *self += 0.0;
    }
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        f64::from(*self).encode(out)
    }
    fn decode(input: &mut &[u8]) -> Result<Self, Error> {
        f64::decode(input).map(|real| real as f32)
    }
}

impl Column for serde_json::Value {
    const TYPE: ColumnType = ColumnType::Json;
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        value::write_str(out, &self.to_string());
        Ok(())
    }
    fn decode(input: &mut &[u8]) -> Result<Self, Error> {
        Ok(serde_json::from_str(value::read_str(input)?)?)
    }
}

// `check` does not try to serialize: that would double the cost of every change for types that hardly ever refuse. A
// refusal fails the last event of the batch that touched the row.
impl<T: Serialize + DeserializeOwned + 'static> Column for Json<T> {
    const TYPE: ColumnType = ColumnType::Json;
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        value::write_str(out, &serde_json::to_string(&self.0)?);
        Ok(())
    }
    fn decode(input: &mut &[u8]) -> Result<Self, Error> {
        Ok(Self(serde_json::from_str(value::read_str(input)?)?))
    }
}

#[cfg(feature = "decimal")]
impl Column for rust_decimal::Decimal {
    const TYPE: ColumnType = ColumnType::Decimal;
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        value::write_str(out, &self.to_string());
        Ok(())
    }
    fn decode(input: &mut &[u8]) -> Result<Self, Error> {
        Ok(value::read_str(input)?.parse()?)
    }
}

/// The MessagePack byte for an absent value.
const NIL: u8 = 0xc0;

impl<T: Column> Column for Option<T> {
    const TYPE: ColumnType = T::TYPE;
    const NULLABLE: bool = {
        assert!(!T::NULLABLE, "a column can be absent in one way only: use one Option");
        true
    };
    fn check(&self) -> Result<(), Error> {
        self.as_ref().map_or(Ok(()), T::check)
    }
    fn normalize(&mut self) {
        if let Some(value) = self {
            value.normalize();
        }
    }
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        match self {
            Some(value) => value.encode(out),
            None => {
                out.push(NIL);
                Ok(())
            }
        }
    }
    fn decode(input: &mut &[u8]) -> Result<Self, Error> {
        if let [NIL, tail @ ..] = input {
            *input = tail;
            return Ok(None);
        }
        T::decode(input).map(Some)
    }
}

/// The column of an enum with `#[derive(TextEnum)]`. The macro implements the traits, not a blanket `impl` over
/// [`TextEnum`]: with one, the compiler would explain an unsupported type by `TextEnum` alone.
#[doc(hidden)]
pub mod text_enum {
    use super::{Error, TextEnum, value};

    #[doc(hidden)]
    pub fn encode(value: impl TextEnum, out: &mut Vec<u8>) {
        value::write_str(out, value.as_text());
    }

    #[doc(hidden)]
    pub fn decode<T: TextEnum>(input: &mut &[u8]) -> Result<T, Error> {
        let text = value::read_str(input)?;
        T::from_text(text).ok_or_else(|| {
            let name = std::any::type_name::<T>();
            Error::msg(format_args!("`{text}` is not a {}", name.rsplit("::").next().unwrap_or(name)))
        })
    }
}
