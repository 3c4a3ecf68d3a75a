use std::fmt;
use std::ops::{Add, Sub};
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

use crate::Error;

const SECOND: i64 = 1_000_000;
const HOUR: i64 = 3_600 * SECOND;
const DAY: i64 = 24 * HOUR;

/// A point in time: microseconds since 1970-01-01T00:00:00Z.
///
/// In a payload it is an RFC 3339 string such as `2013-01-01T10:15:00Z`, with any offset; digits beyond microseconds are
/// cut off. As a column it has the type `timestamp`, and it can be a key. It has no time zone, and there is no `now`: a
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
        let (day, of_day) = (self.0.div_euclid(DAY), self.0.rem_euclid(DAY));
        let (year, month, day) = date_of(day);
        let (seconds, fraction) = (of_day / SECOND, of_day % SECOND);
        // Years of more than four digits carry a sign, as in ISO 8601.
        match year {
            0..=9999 => write!(f, "{year:04}")?,
            _ => write!(f, "{year:+07}")?,
        }
        write!(f, "-{month:02}-{day:02}T{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)?;
        match fraction {
            0 => {}
            _ if fraction % 1000 == 0 => write!(f, ".{:03}", fraction / 1000)?,
            _ => write!(f, ".{fraction:06}")?,
        }
        f.write_str("Z")
    }
}

impl FromStr for Timestamp {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text.as_bytes()).ok_or_else(|| Error::msg(format_args!("`{text}` is not an RFC 3339 time")))
    }
}

/// Reads all of RFC 3339. By hand: it is called for nearly every event, and a library for time makes a plugin of 430 KB
/// one of 750 KB. A property test holds it to such a library's answers.
fn parse(text: &[u8]) -> Option<Timestamp> {
    let (head, tail) = text.split_at_checked(19)?;
    if [head[4], head[7], head[13], head[16]] != *b"--::" || !matches!(head[10], b'T' | b't' | b' ') {
        return None;
    }
    let two = |at: usize| digits(&head[at..at + 2]);
    let (year, month, day) = (digits(&head[..4])?, two(5)?, two(8)?);
    let (hour, minute, second) = (two(11)?, two(14)?, two(17)?);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i64::from(leap),
        _ => return None,
    };
    if !(1..=days).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (fraction, zone) = match tail {
        [b'.', tail @ ..] => {
            let len = tail.iter().take_while(|c| c.is_ascii_digit()).count();
            let (fraction, zone) = tail.split_at(len);
            let kept = &fraction[..len.min(6)];
            (digits(kept)? * 10_i64.pow(6 - u32::try_from(kept.len()).ok()?), (len > 0).then_some(zone)?)
        }
        zone => (0, zone),
    };
    let offset = match zone {
        b"Z" | b"z" => 0,
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (digits(&[*h1, *h2])?, digits(&[*m1, *m2])?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            (hours * 60 + minutes) * if *sign == b'+' { 60 } else { -60 }
        }
        _ => return None,
    };
    // A leap second has no place of its own among the microseconds since 1970: it counts as the second before it.
    let seconds = (hour * 60 + minute) * 60 + second.min(59) - offset;
    Some(Timestamp(days_until(year, month, day) * DAY + seconds * SECOND + fraction))
}

fn digits(text: &[u8]) -> Option<i64> {
    text.iter().try_fold(0, |n, c| c.is_ascii_digit().then(|| n * 10 + i64::from(c - b'0')))
}

// The two conversions between days since 1970 and the calendar are Howard Hinnant's, with years that begin in March, so
// that the leap day is the last one.

fn days_until(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

fn date_of(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
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
    fn parses_what_rfc_3339_allows() {
        assert_eq!(micros("1970-01-01T00:00:00Z"), 0);
        assert_eq!(micros("1969-12-31T23:59:59.999999Z"), -1);
        assert_eq!(micros("2013-01-01T10:15:00+02:00"), micros("2013-01-01T08:15:00Z"));
        assert_eq!(micros("2013-01-01t10:15:00.5z"), micros("2013-01-01T10:15:00.500Z"));
        // Too fine for a column: cut off.
        assert_eq!(micros("1969-12-31T23:59:59.9999999Z"), -1);
        assert_eq!(micros("2016-12-31T23:59:60Z"), micros("2016-12-31T23:59:59Z"));
        assert_eq!(micros("2012-02-29T00:00:00Z"), micros("2012-03-01T00:00:00Z") - DAY);
        for wrong in [
            "",
            "now",
            "2013-01-01",
            "2013-02-29T00:00:00Z",
            "2013-13-01T00:00:00Z",
            "2013-01-01T24:00:00Z",
            "2013-01-01T00:00:00",
            "2013-01-01T00:00:00.Z",
            "2013-01-01T00:00:00+0200",
            "2013-01-01T00:00:00+24:00",
            "2013-01-01T00:00:00Zulu",
            "2013-01-01T00:00:00.é",
        ] {
            assert!(wrong.parse::<Timestamp>().is_err(), "{wrong}");
        }
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
        fn reads_back_what_it_prints(micros in -62_167_219_200_000_000_i64..253_402_207_200_000_000) {
            let time = Timestamp::from_micros(micros);
            prop_assert_eq!(time.to_string().parse::<Timestamp>().unwrap(), time, "{}", time);
        }

        #[test]
        fn agrees_with_a_library(
            date in "(000|19[0-9]|20[0-9]|998)[0-9]-[01][0-9]-[0-3][0-9]",
            time in "[0-2][0-9]:[0-6][0-9]:([0-5][0-9]|60)",
            fraction in "(\\.[0-9]{1,9})?",
            zone in "Z|z|[+-][01][0-9]:[0-5][0-9]",
        ) {
            let text = format!("{date}T{time}{fraction}{zone}");
            let ours = text.parse::<Timestamp>().ok().map(Timestamp::as_micros);
            let theirs = text.parse::<jiff::Timestamp>().ok();
            let theirs = theirs.and_then(|time| i64::try_from(time.as_nanosecond().div_euclid(1000)).ok());
            prop_assert_eq!(ours, theirs, "{}", text);
        }

        #[test]
        fn any_time_prints(micros: i64) {
            prop_assert!(Timestamp::from_micros(micros).to_string().ends_with('Z'));
        }
    }
}
