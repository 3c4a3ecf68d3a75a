use std::fmt;
use std::ops::{Add, Sub};
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

use shadowbox_time::Civil;

use crate::Error;
use crate::error::quoted;

const SECOND: i64 = 1_000_000;
const HOUR: i64 = 3_600 * SECOND;
const DAY: i64 = 24 * HOUR;

/// A point in time: microseconds since 1970-01-01T00:00:00Z.
///
/// In a payload it is an RFC 3339 string such as `2013-01-01T10:15:00Z`, with any offset, in the years 0000 to 9999;
/// what is finer than a microsecond is cut off, towards the past. As a column it has the type `timestamp`, and it can be a key. It has no time zone, and there is no `now`: a
/// projection that asked for the time would give other rows when it is rebuilt.
///
/// ```
/// use shadowbox_plugin::Timestamp;
///
/// let departs: Timestamp = "2013-01-01T10:15:00Z".parse()?;
/// assert_eq!(departs.start_of_hour().to_string(), "2013-01-01T10:00:00Z");
/// assert_eq!(departs.seconds_since(departs.start_of_day()), 36_900);
/// # Ok::<(), shadowbox_plugin::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The time this many microseconds after 1970-01-01T00:00:00Z, or before if negative.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since 1970-01-01T00:00:00Z.
    pub const fn as_micros(self) -> i64 {
        self.0
    }

    /// The beginning of this time's hour, UTC.
    pub const fn start_of_hour(self) -> Self {
        self.truncated_to(HOUR)
    }

    /// The beginning of this time's day, UTC.
    pub const fn start_of_day(self) -> Self {
        self.truncated_to(DAY)
    }

    /// Microseconds from `earlier` to this time; negative if `earlier` is later.
    pub const fn micros_since(self, earlier: Self) -> i64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Whole seconds from `earlier` to this time, rounded towards zero; negative if `earlier` is later.
    pub const fn seconds_since(self, earlier: Self) -> i64 {
        self.micros_since(earlier) / SECOND
    }

    // Rounds towards the past, also before 1970. Saturating: the first hour that an i64 can name is not a whole one.
    const fn truncated_to(self, unit: i64) -> Self {
        Self(self.0.saturating_sub(self.0.rem_euclid(unit)))
    }
}

/// A later time; the last one there is if it would be out of range.
impl Add<Duration> for Timestamp {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add_unsigned(micros(duration)))
    }
}

/// An earlier time; the first one there is if it would be out of range.
impl Sub<Duration> for Timestamp {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub_unsigned(micros(duration)))
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// RFC 3339 in UTC, with as many digits of the second as needed: none, three or six.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Civil { year, month, day, hour, minute, second, microsecond } = shadowbox_time::civil(self.0);
        // Years of more than four digits carry a sign, as in ISO 8601.
        match year {
            0..=9999 => write!(f, "{year:04}")?,
            _ => write!(f, "{year:+07}")?,
        }
        write!(f, "-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")?;
        match microsecond {
            0 => {}
            _ if microsecond % 1000 == 0 => write!(f, ".{:03}", microsecond / 1000)?,
            _ => write!(f, ".{microsecond:06}")?,
        }
        f.write_str("Z")
    }
}

/// RFC 3339, and nothing else: `T` and `Z` in either case, any offset, the years 0000 to 9999 (UTC). What is finer than a
/// microsecond is cut off, towards the past. A leap second (`:60` at the end of a month, UTC) counts as the second before
/// it. The host reads the times of events and of filters with the same function.
impl FromStr for Timestamp {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        shadowbox_time::parse(text).map(Self).ok_or_else(|| {
            Error::msg(format_args!(
                "`{}` is not a time of RFC 3339 like 2013-01-01T10:15:00Z, in the years 0000 to 9999",
                quoted(text)
            ))
        })
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Timestamp;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an RFC 3339 time")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Timestamp, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn micros(text: &str) -> i64 {
        text.parse::<Timestamp>().unwrap().as_micros()
    }

    #[test]
    fn reads_what_the_host_reads_and_quotes_what_it_refuses() {
        assert_eq!(micros("9999-12-31T23:59:59.9999999Z"), 253_402_300_799_999_999);
        assert_eq!(micros("1969-12-31T23:59:59.9999999Z"), -1);
        let refused = "x".repeat(5_000).parse::<Timestamp>().unwrap_err().to_string();
        assert!(refused.starts_with("`xxxx") && refused.contains("RFC 3339") && refused.len() < 300, "{refused}");
    }

    #[test]
    fn truncates_towards_the_past() {
        let time = Timestamp::from_micros(-1);
        assert_eq!(time.start_of_hour().to_string(), "1969-12-31T23:00:00Z");
        assert_eq!(time.start_of_day().to_string(), "1969-12-31T00:00:00Z");
        assert_eq!(Timestamp::from_micros(i64::MIN).start_of_day().as_micros(), i64::MIN);
        assert_eq!((time + Duration::from_micros(1)).as_micros(), 0);
        assert_eq!((time - Duration::MAX).as_micros(), i64::MIN);
    }

    proptest! {
        #[test]
        fn reads_back_what_it_prints(micros in shadowbox_time::FIRST..=shadowbox_time::LAST) {
            let time = Timestamp::from_micros(micros);
            prop_assert_eq!(time.to_string().parse::<Timestamp>().unwrap(), time, "{}", time);
        }

        #[test]
        fn any_time_prints(micros: i64) {
            prop_assert!(Timestamp::from_micros(micros).to_string().ends_with('Z'));
        }
    }
}
