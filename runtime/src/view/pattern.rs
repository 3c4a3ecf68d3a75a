//! Patterns of `like` and `ilike`, matched in a time that has a bound.
//!
//! SQLite's own operators end a text at its first NUL, know the case of ASCII letters only, and try again for each place
//! where a `%` could end: a pattern of some thousand characters takes minutes on one text, in which nothing interrupts
//! them. Here all places are tried at once: a set of states says how many of the pattern's characters the text so far can
//! have been, one bit for each number, and a character of the text moves the whole set (Shift-And, Baeza-Yates and Gonnet
//! 1992). A text of n characters takes n steps of one machine word for each 64 characters of the pattern.

use crate::config::limits;

/// A part of a pattern.
enum Part {
    Any,
    One,
    Character(char),
}

fn parts(pattern: &str) -> impl Iterator<Item = Part> {
    let mut characters = pattern.chars();
    std::iter::from_fn(move || {
        Some(match characters.next()? {
            '%' | '*' => Part::Any,
            '_' => Part::One,
            '\\' => Part::Character(characters.next().unwrap_or('\\')),
            c => Part::Character(c),
        })
    })
}

/// The texts that begin as a pattern does: from the first up to, but not, the second. What is before a pattern's first
/// wildcard can be found in an index, which is ordered so. None if nothing is, or nothing is after it.
pub(super) fn range(pattern: &str) -> Option<(String, String)> {
    let literal = |part| if let Part::Character(c) = part { Some(c) } else { None };
    let first: String = parts(pattern).map_while(literal).collect();
    let mut next: Vec<char> = first.chars().collect();
    while let Some(last) = next.pop() {
        // UTF-8 is in the order of the characters. Between these two there are none.
        let after = if last == '\u{d7ff}' { Some('\u{e000}') } else { char::from_u32(last as u32 + 1) };
        if after.is_some() {
            next.extend(after);
            return Some((first, next.into_iter().collect()));
        }
    }
    None
}

/// The case of a character taken away: Unicode's simple case folding, which has one character for each. Two characters
/// are the same but for their case if they are the same in upper case; the lower case of that is what stands for them.
fn fold(c: char) -> char {
    if c.is_ascii() {
        return c.to_ascii_lowercase();
    }
    match c {
        // The dotless i is a letter of its own, although its upper case is an I.
        'ı' => 'ı',
        // Three pairs of one letter, which have several in upper case.
        '\u{1fd3}' => '\u{390}',
        '\u{1fe3}' => '\u{3b0}',
        '\u{fb06}' => '\u{fb05}',
        c => {
            let upper = single(c, c.to_uppercase());
            single(upper, upper.to_lowercase())
        }
    }
}

/// Leaves a character alone that becomes several ones.
fn single(c: char, mut mapped: impl ExactSizeIterator<Item = char>) -> char {
    if mapped.len() == 1 { mapped.next().unwrap_or(c) } else { c }
}

/// A bit for each character of the longest pattern, and one for its end.
const WORDS: usize = limits::PATTERN_BYTES / 64 + 1;

/// Characters of a text between two looks at the clock: a millisecond at most.
const LOOK: usize = 4096;

/// A pattern that is ready to be matched.
pub(super) struct Pattern {
    ignore_case: bool,
    /// The state in which the whole pattern has been found.
    end: usize,
    words: usize,
    /// The states that any character leaves as they are, because there is a `%`.
    stay: Vec<u64>,
    /// For each ASCII character, the states that it leads on from; [`Pattern::words`] for each.
    ascii: Vec<u64>,
    /// The same for the pattern's other characters, in their order.
    others: Vec<(char, Vec<u64>)>,
    /// The same for a character that is not in the pattern.
    rest: Vec<u64>,
}

impl Pattern {
    /// Reads a pattern that is not longer than [`limits::PATTERN_BYTES`]; of one that is, what is beyond does not count.
    pub(super) fn new(pattern: &str, ignore_case: bool) -> Pattern {
        let set = |states: &mut [u64], state: usize| states[state / 64] |= 1 << (state % 64);
        // A state for each character: `None` takes all of them.
        let mut steps: Vec<Option<char>> = Vec::new();
        let mut stay = vec![0; WORDS];
        for part in parts(pattern).take(limits::PATTERN_BYTES) {
            match part {
                Part::Any => set(&mut stay, steps.len()),
                Part::One => steps.push(None),
                Part::Character(c) => steps.push(Some(if ignore_case { fold(c) } else { c })),
            }
        }
        let end = steps.len();
        let words = end / 64 + 1;
        stay.truncate(words);
        let mut rest = vec![0; words];
        for (state, _) in steps.iter().enumerate().filter(|(_, c)| c.is_none()) {
            set(&mut rest, state);
        }
        let mut ascii = rest.repeat(128);
        let mut others: Vec<(char, Vec<u64>)> = Vec::new();
        let mut characters: Vec<char> = steps.iter().filter_map(|c| *c).filter(|c| !c.is_ascii()).collect();
        characters.sort_unstable();
        characters.dedup();
        others.extend(characters.into_iter().map(|c| (c, rest.clone())));
        for (state, c) in steps.into_iter().enumerate() {
            match c {
                None => {}
                Some(c) if c.is_ascii() => set(&mut ascii[c as usize * words..], state),
                Some(c) => {
                    let at = others.binary_search_by_key(&c, |(c, _)| *c).expect("it was put there");
                    set(&mut others[at].1, state);
                }
            }
        }
        Pattern { ignore_case, end, words, stay, ascii, others, rest }
    }

    fn steps(&self, c: char) -> &[u64] {
        if c.is_ascii() {
            return &self.ascii[c as usize * self.words..][..self.words];
        }
        match self.others.binary_search_by_key(&c, |(c, _)| *c) {
            Ok(at) => &self.others[at].1,
            Err(_) => &self.rest,
        }
    }

    /// True if the pattern is of all of the text; None if it is `over` before that is known.
    pub(super) fn matches(&self, text: &str, over: impl Fn() -> bool) -> Option<bool> {
        let (end, bit) = (self.end / 64, 1 << (self.end % 64));
        let mut states = [0; WORDS];
        let states = &mut states[..self.words];
        states[0] = 1;
        for (n, c) in text.chars().enumerate() {
            if n % LOOK == LOOK - 1 && over() {
                return None;
            }
            let steps = self.steps(if self.ignore_case { fold(c) } else { c });
            let (mut carry, mut any) = (0, 0);
            for ((state, step), stay) in states.iter_mut().zip(steps).zip(&self.stay) {
                let moved = *state & step;
                *state = moved << 1 | carry | *state & stay;
                carry = moved >> 63;
                any |= *state;
            }
            if any == 0 {
                return Some(false);
            }
            // Nothing that follows can change it.
            if states[end] & self.stay[end] & bit != 0 {
                return Some(true);
            }
        }
        Some(states[end] & bit != 0)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, text: &str, ignore_case: bool) -> bool {
        Pattern::new(pattern, ignore_case).matches(text, || false).unwrap()
    }

    /// By its definition, and exponential.
    fn naive(pattern: &[char], text: &[char], same: &dyn Fn(char, char) -> bool) -> bool {
        match (pattern, text) {
            ([], text) => text.is_empty(),
            (['%' | '*', rest @ ..], text) => (0..=text.len()).any(|n| naive(rest, &text[n..], same)),
            (['_', rest @ ..], [_, text @ ..]) => naive(rest, text, same),
            (['\\', c, rest @ ..], [t, text @ ..]) => same(*c, *t) && naive(rest, text, same),
            (['\\', _, ..], []) => false,
            ([c, rest @ ..], [t, text @ ..]) => same(*c, *t) && naive(rest, text, same),
            (_, []) => false,
        }
    }

    #[test]
    fn wildcards_escapes_and_case() {
        for (pattern, text, same, ignoring_case) in [
            ("", "", true, true),
            ("", "a", false, false),
            ("%", "", true, true),
            ("a%b*c_d", "aXbcYd", true, true),
            ("a%b*c_d", "AXBCYD", false, true),
            (r"\%\*\_\\", r"%*_\", true, true),
            ("end\\", "end\\", true, true),
            ("[?]", "[?]", true, true),
            ("a_", "aä", true, true),
            // A NUL is a character as any other.
            ("%b", "a\0b", true, true),
            ("a_b", "a\0b", true, true),
            ("a", "a\0b", false, false),
            ("a\0B", "a\0b", false, true),
            ("%Äpfel%", "zwei äpfel", false, true),
            ("σ_ς", "ΣaΣ", false, true),
            ("straße", "STRAẞE", false, true),
            // One character stays one, and letters that only look alike stay apart.
            ("straße", "STRASSE", false, false),
            ("ı", "i", false, false),
            ("İ", "i", false, false),
            ("k", "\u{212a}", false, true),
            ("\u{fb05}_", "\u{fb06}\u{fb06}", false, true),
        ] {
            assert_eq!(matches(pattern, text, false), same, "{pattern:?} {text:?}");
            assert_eq!(matches(pattern, text, true), ignoring_case, "{pattern:?} {text:?}, case ignored");
        }
    }

    #[test]
    fn where_an_index_is_read() {
        let range = |pattern| range(pattern).map(|(first, next)| format!("{first} {next}"));
        assert_eq!(range("abc%d").as_deref(), Some("abc abd"));
        assert_eq!(range(r"a\%_").as_deref(), Some("a% a&"));
        assert_eq!(range("a\u{d7ff}*").as_deref(), Some("a\u{d7ff} a\u{e000}"));
        assert_eq!(range("a\u{10ffff}%").as_deref(), Some("a\u{10ffff} b"));
        assert_eq!((range("%a"), range(""), range("\u{10ffff}%")), (None, None, None));
    }

    #[test]
    fn the_longest_pattern_has_a_bound_and_the_clock_is_looked_at() {
        // Each of its characters can be anywhere in the text: what SQLite tries one after another.
        let pattern = Pattern::new(&format!("{}b", "a%".repeat(limits::PATTERN_BYTES / 2 - 1)), true);
        let text = "a".repeat(1 << 20);
        let began = Instant::now();
        assert_eq!(pattern.matches(&text, || false), Some(false));
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        let looks = Cell::new(0);
        let over = || looks.replace(looks.get() + 1) == 2;
        assert_eq!(pattern.matches(&text, over), None);
        assert_eq!(looks.get(), 3);
        assert!(matches(&"_".repeat(limits::PATTERN_BYTES), &"ä".repeat(limits::PATTERN_BYTES), true));
    }

    proptest! {
        #[test]
        fn as_by_definition(pattern in r"[ab%_\\*ÄäßΣς\x00]{0,9}", text in r"[aAbÄäßẞΣσς\x00]{0,12}", ignore_case: bool) {
            let characters = |text: &str| text.chars().collect::<Vec<_>>();
            let same = |a: char, b: char| a == b || ignore_case && fold(a) == fold(b);
            let expected = naive(&characters(&pattern), &characters(&text), &same);
            prop_assert_eq!(matches(&pattern, &text, ignore_case), expected);
        }

        #[test]
        fn as_by_definition_over_several_words(
            (before, after) in ("[ab]{0,70}", "[ab]{0,70}"),
            pattern in "[ab_]{0,30}(%[ab_]{60,70})?%?[ab]{0,3}",
            cut in 0_usize..200,
        ) {
            // A text that is the pattern's own, so that some match.
            let text: String = format!("{before}{}{after}", pattern.replace(['%', '_'], "a")).chars().skip(cut).collect();
            let characters = |text: &str| text.chars().collect::<Vec<_>>();
            let expected = naive(&characters(&pattern), &characters(&text), &|a, b| a == b);
            prop_assert_eq!(matches(&pattern, &text, false), expected);
        }

        #[test]
        fn what_matches_is_in_the_range(pattern in r"[ab\x{d7ff}\x{10ffff}%_]{0,5}", text in r"[abc\x{e000}\x{d7ff}\x{10ffff}]{0,5}") {
            if matches(&pattern, &text, false) && let Some((first, next)) = range(&pattern) {
                prop_assert!(first <= text && text < next);
            }
        }
    }
}
