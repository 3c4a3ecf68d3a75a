//! How Shadowbox reads and takes apart times. The host and its plugins share these functions, so that both take the same
//! texts for the same microseconds.
//!
//! By hand: a plugin reads a time for nearly every event, and a library for time makes a module of 430 KB one of 750 KB.
//! A property test holds the functions to such a library's answers.

const SECOND: i64 = 1_000_000;
const DAY: i64 = 86_400 * SECOND;

/// 0000-01-01T00:00:00Z, microseconds since 1970-01-01T00:00:00Z: the first time that [`parse`] answers.
pub const FIRST: i64 = -62_167_219_200_000_000;

/// 9999-12-31T23:59:59.999999Z, microseconds since 1970-01-01T00:00:00Z: the last time that [`parse`] answers.
pub const LAST: i64 = 253_402_300_799_999_999;

/// Reads a time of RFC 3339, and nothing else: microseconds since 1970-01-01T00:00:00Z. None if it is not one.
///
/// - `T` and `Z` are taken in either case. An offset is `+` or `-` and 00:00 to 23:59.
/// - The second has a fraction of any number of digits, at least one. What is finer than a microsecond is cut off, which
///   is towards the past, also before 1970.
/// - A leap second (`:60`) is taken where there can be one: at the end of a month, UTC. It has no microseconds of its own
///   since 1970, and counts as the second before it.
/// - The years are 0000 to 9999, also once the offset is taken off: [`FIRST`] to [`LAST`].
///
/// ```
/// assert_eq!(shadowbox_time::parse("1970-01-01T01:00:00.0000019+01:00"), Some(1));
/// assert_eq!(shadowbox_time::parse("9999-12-31T23:59:59.999999Z"), Some(shadowbox_time::LAST));
/// assert_eq!(shadowbox_time::parse("2013-01-01"), None);
/// ```
pub fn parse(text: &str) -> Option<i64> {
    let (head, tail) = text.as_bytes().split_at_checked(19)?;
    if [head[4], head[7], head[13], head[16]] != *b"--::" || !matches!(head[10], b'T' | b't') {
        return None;
    }
    let two = |at: usize| digits(&head[at..at + 2]);
    let (year, month, day) = (digits(&head[..4])?, two(5)?, two(8)?);
    let (hour, minute, second) = (two(11)?, two(14)?, two(17)?);
    let leap_year = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i64::from(leap_year),
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
    let seconds = (hour * 60 + minute) * 60 + second.min(59) - offset;
    let micros = days_until(year, month, day) * DAY + seconds * SECOND + fraction;
    if second == 60 {
        let next = micros - fraction + SECOND;
        if next % DAY != 0 || date_of(next / DAY).2 != 1 {
            return None;
        }
    }
    (FIRST..=LAST).contains(&micros).then_some(micros)
}

fn digits(text: &[u8]) -> Option<i64> {
    text.iter().try_fold(0, |n, c| c.is_ascii_digit().then(|| n * 10 + i64::from(c - b'0')))
}

/// A time, UTC, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Civil {
    /// The year; 0 is the one before year 1.
    pub year: i64,
    /// 1 to 12.
    pub month: i64,
    /// 1 to 31.
    pub day: i64,
    /// 0 to 23.
    pub hour: i64,
    /// 0 to 59.
    pub minute: i64,
    /// 0 to 59.
    pub second: i64,
    /// 0 to 999,999.
    pub microsecond: i64,
}

/// Takes a time apart. `micros` is any number of microseconds since 1970-01-01T00:00:00Z.
pub fn civil(micros: i64) -> Civil {
    let (days, of_day) = (micros.div_euclid(DAY), micros.rem_euclid(DAY));
    let (year, month, day) = date_of(days);
    let (seconds, microsecond) = (of_day / SECOND, of_day % SECOND);
    Civil { year, month, day, hour: seconds / 3_600, minute: seconds / 60 % 60, second: seconds % 60, microsecond }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn micros(text: &str) -> i64 {
        parse(text).unwrap_or_else(|| panic!("{text} is a time"))
    }

    #[test]
    fn takes_all_of_rfc_3339() {
        assert_eq!(micros("1970-01-01T00:00:00Z"), 0);
        assert_eq!(micros("1969-12-31T23:59:59.999999Z"), -1);
        assert_eq!(micros("2013-01-01T10:15:00+02:00"), micros("2013-01-01T08:15:00Z"));
        assert_eq!(micros("2013-01-01T10:15:00-00:00"), micros("2013-01-01T10:15:00Z"));
        assert_eq!(micros("2013-01-01t10:15:00.5z"), micros("2013-01-01T10:15:00.500Z"));
        assert_eq!(micros("2012-02-29T00:00:00Z"), micros("2012-03-01T00:00:00Z") - DAY);
    }

    #[test]
    fn cuts_what_is_finer_than_a_microsecond_towards_the_past() {
        assert_eq!(micros("1969-12-31T23:59:59.9999999Z"), -1);
        assert_eq!(micros("1970-01-01T00:00:00.0000009Z"), 0);
        let fine = format!("2024-01-01T00:00:00.{}Z", "1234567891".repeat(100));
        assert_eq!(micros(&fine), micros("2024-01-01T00:00:00.123456Z"));
    }

    #[test]
    fn takes_the_years_0_to_9999_whole() {
        assert_eq!((micros("0000-01-01T00:00:00Z"), micros("9999-12-31T23:59:59.999999999Z")), (FIRST, LAST));
        assert_eq!(micros("9999-12-31T23:59:59.999999+23:59"), LAST - (23 * 60 + 59) * 60 * SECOND);
        for beyond in ["9999-12-31T23:59:59-00:01", "0000-01-01T00:00:00+00:01", "-0001-01-01T00:00:00Z"] {
            assert_eq!(parse(beyond), None, "{beyond}");
        }
    }

    #[test]
    fn takes_a_leap_second_where_there_can_be_one() {
        assert_eq!(micros("2016-12-31T23:59:60.25Z"), micros("2016-12-31T23:59:59.25Z"));
        assert_eq!(micros("2015-07-01T01:59:60+02:00"), micros("2015-06-30T23:59:59Z"));
        for wrong in
            ["2016-12-30T23:59:60Z", "2016-12-31T23:58:60Z", "2016-12-31T23:59:60+01:00", "2016-12-31T23:59:61Z"]
        {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn takes_nothing_else() {
        for wrong in [
            "",
            "now",
            "2013-01-01",
            "2013-02-29T00:00:00Z",
            "2013-13-01T00:00:00Z",
            "2013-01-01T24:00:00Z",
            "2013-01-01T00:00Z",
            "2013-01-01T00:00:00",
            "2013-01-01 00:00:00Z",
            "2013-01-01T00:00:00.Z",
            "2013-01-01T00:00:00,5Z",
            "2013-01-01T00:00:00+0200",
            "2013-01-01T00:00:00+02",
            "2013-01-01T00:00:00+24:00",
            "2013-01-01T00:00:00Zulu",
            "2013-01-01T00:00:00Z[UTC]",
            "2013-01-01T00:00:00.é",
            "20130101T000000Z",
            "+002013-01-01T00:00:00Z",
            " 2013-01-01T00:00:00Z",
            "２013-01-01T00:00:00Z",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_library(
            date in "(000|19[0-9]|20[0-9]|998)[0-9]-[01][0-9]-[0-3][0-9]",
            time in "[0-2][0-9]:[0-6][0-9]:[0-5][0-9]",
            fraction in "(\\.[0-9]{1,9})?",
            zone in "Z|z|[+-][01][0-9]:[0-5][0-9]",
        ) {
            let text = format!("{date}T{time}{fraction}{zone}");
            let theirs = text.parse::<jiff::Timestamp>().ok();
            let theirs = theirs.and_then(|time| i64::try_from(time.as_nanosecond().div_euclid(1000)).ok());
            prop_assert_eq!(parse(&text), theirs.filter(|time| (FIRST..=LAST).contains(time)), "{}", text);
        }

        #[test]
        fn takes_apart_as_a_library_does(micros in FIRST..=LAST - DAY) {
            let ours = civil(micros);
            let theirs = jiff::Timestamp::from_microsecond(micros).unwrap().to_zoned(jiff::tz::TimeZone::UTC);
            prop_assert_eq!(
                (ours.year, ours.month, ours.day),
                (theirs.year().into(), theirs.month().into(), theirs.day().into())
            );
            prop_assert_eq!(
                (ours.hour, ours.minute, ours.second, ours.microsecond),
                (
                    theirs.hour().into(),
                    theirs.minute().into(),
                    theirs.second().into(),
                    (theirs.subsec_nanosecond() / 1_000).into()
                )
            );
        }

        #[test]
        fn any_number_can_be_taken_apart(micros: i64) {
            let Civil { month, day, .. } = civil(micros);
            prop_assert!((1..=12).contains(&month) && (1..=31).contains(&day));
        }
    }
}
