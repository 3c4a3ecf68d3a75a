//! Positions, times, checkpoints, events and batches: the words that every other module uses.

mod columns;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use shadowbox_time::Civil;

use crate::config::limits;

pub use columns::{BatchColumn, ColumnSet, Columns, Packed, RawEvent};

/// Where an event stands in the log, which is one sequence of the events of all sources: 0, 1, 2, ... in the order of
/// their commits. "Complete to a position" means that this event and everything before it is applied or not wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Position(pub u64);

impl Position {
    /// The position after this one.
    pub fn next(self) -> Position {
        Position(self.0 + 1)
    }
}

impl FromStr for Position {
    type Err = String;

    fn from_str(text: &str) -> Result<Position, String> {
        // SQLite's integers end there.
        let number = text.trim().parse().ok().filter(|number| *number <= i64::MAX as u64);
        number
            .map(Position)
            .ok_or_else(|| format!("{text:?} is not a position; write it as one number, for example 12"))
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A point in time: microseconds since 1970-01-01T00:00:00Z. From year -9999 to 9999; only logs that were written by an
/// early version hold times before year 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(i64);

/// -9999-01-01T00:00:00Z in microseconds.
const YEAR_MINUS_9999: i64 = -377_705_116_800_000_000;

impl Time {
    /// 1970-01-01T00:00:00Z.
    pub const EPOCH: Time = Time(0);

    /// The time now, by this machine's clock. Plugins never see it.
    pub fn now() -> Time {
        Time(jiff::Timestamp::now().as_microsecond())
    }

    /// None outside of the years -9999 to 9999.
    pub fn from_microseconds(microseconds: i64) -> Option<Time> {
        (YEAR_MINUS_9999..=shadowbox_time::LAST).contains(&microseconds).then_some(Time(microseconds))
    }

    /// Microseconds since 1970.
    pub fn microseconds(self) -> i64 {
        self.0
    }

    /// Appends `2013-01-01T10:15:00.000000Z`: always 27 characters, so that text order is time order and prefixes
    /// compare as one expects (`departs_at >= '2013-01-05'`). Plugins' timestamps begin with the year 0.
    pub fn write_sortable(self, out: &mut String) {
        let t = shadowbox_time::civil(self.0);
        let mut digits = |number: i64, width: u32, end: char| {
            for place in (0..width).rev() {
                out.push((b'0' + (number / 10_i64.pow(place) % 10) as u8) as char);
            }
            out.push(end);
        };
        // By hand instead of `write!`: commits do this for every row.
        digits(t.year.max(0), 4, '-');
        digits(t.month, 2, '-');
        digits(t.day, 2, 'T');
        digits(t.hour, 2, ':');
        digits(t.minute, 2, ':');
        digits(t.second, 2, '.');
        digits(t.microsecond, 6, 'Z');
    }
}

/// RFC 3339, with as many digits of the second as it has. A year before 0 has a sign and six digits.
impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Civil { year, month, day, hour, minute, second, microsecond } = shadowbox_time::civil(self.0);
        match year {
            0.. => write!(f, "{year:04}")?,
            _ => write!(f, "{year:+07}")?,
        }
        write!(f, "-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")?;
        if microsecond > 0 {
            write!(f, ".{}", format!("{microsecond:06}").trim_end_matches('0'))?;
        }
        f.write_str("Z")
    }
}

impl FromStr for Time {
    type Err = String;

    /// RFC 3339 and nothing else, in the years 0000 to 9999, as plugins read it: see [`shadowbox_time::parse`]. What is
    /// finer than a microsecond is cut off, towards the past.
    fn from_str(text: &str) -> Result<Time, String> {
        shadowbox_time::parse(text).map(Time).ok_or_else(|| {
            // It may be a megabyte of text.
            let quoted = text.char_indices().nth(80).map_or(text.into(), |(end, _)| format!("{}…", &text[..end]));
            format!(
                "{quoted:?} is not a time like 2013-01-01T10:15:00Z (RFC 3339, with Z or an offset, years 0000 to 9999)"
            )
        })
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
    /// Where it stands in the log.
    pub position: Position,
    /// All the rest.
    pub event: NewEvent,
    /// Metadata and payload are gone for good, and empty.
    pub forgotten: bool,
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
    /// Where it stands in the log.
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
    fn a_position_is_one_number() {
        assert_eq!(" 12".parse(), Ok(Position(12)));
        for bad in ["", "orders=1", "-1", "1,2", "9223372036854775808"] {
            assert!(bad.parse::<Position>().unwrap_err().contains("one number"), "{bad}");
        }
    }

    #[test]
    fn times_are_those_of_plugins() {
        for (text, shown) in [
            ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"),
            ("0000-01-01T00:00:00Z", "0000-01-01T00:00:00Z"),
            ("1969-12-31T23:59:59.9999999Z", "1969-12-31T23:59:59.999999Z"),
            ("2024-01-01T00:00:00.1234567891Z", "2024-01-01T00:00:00.123456Z"),
            ("2024-01-01t02:00:00.500+02:00", "2024-01-01T00:00:00.5Z"),
        ] {
            let time: Time = text.parse().unwrap();
            assert_eq!(time.to_string(), shown);
            assert_eq!(Time::from_microseconds(time.microseconds()), Some(time));
        }
        for text in ["2024-01-01 00:00:00Z", "2024-01-01T00:00Z", "20240101T000000Z", "2024-01-01T00:00:00Z[UTC]"] {
            assert!(text.parse::<Time>().unwrap_err().contains("RFC 3339"), "{text}");
        }
        assert!("x".repeat(5_000).parse::<Time>().unwrap_err().len() < 300);
        // Early logs may hold these.
        assert_eq!(Time::from_microseconds(YEAR_MINUS_9999).unwrap().to_string(), "-009999-01-01T00:00:00Z");
        assert_eq!(Time::from_microseconds(shadowbox_time::LAST + 1), None);
        assert_eq!(Time::from_microseconds(YEAR_MINUS_9999 - 1), None);
    }

    #[test]
    fn sortable_times_sort_as_text() {
        let mut last = String::new();
        for text in
            ["1969-12-31T23:59:59.5Z", "2013-01-01T10:15:00Z", "2013-01-01T10:15:00.000001Z", "9999-12-31T23:59:59.9Z"]
        {
            let mut sortable = String::new();
            text.parse::<Time>().unwrap().write_sortable(&mut sortable);
            assert!(last < sortable, "{last} < {sortable}");
            assert_eq!(sortable.len(), 27);
            last = sortable;
        }
    }
}
