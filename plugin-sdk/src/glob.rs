//! Which sources and event types a pattern matches.
//!
//! The host matches subscriptions with `globset`; a guest needs the same answer to tell the variants of an enum apart.
//! `globset` would more than double a plugin (it brings a regex engine, and compiles its patterns at every start), so
//! this is the small part of it that the contract names: `*`, `?`, `[ab]`, `[!ab]`, `[a-z]`, `{a,b}`, and `\` before a
//! character that is itself. The derive macro refuses every other construct, and a property test holds this file to
//! `globset`'s answers.

/// Whether `text` matches `pattern` from beginning to end.
///
/// `?` and a class stand for one byte, as they do in `globset`. The pattern has been checked by the derive macro; one
/// that is not well formed matches nothing. The time is bounded by the product of the lengths: whoever writes events
/// names their sources and types, and must not be able to stall a plugin by a name that makes it guess.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    // Most patterns are names, or a beginning and a `*`: neither needs the table below.
    let plain = pattern.iter().zip(text).take_while(|(p, t)| p == t && !b"*?[{\\".contains(p)).count();
    let (pattern, text) = (&pattern[plain..], &text[plain..]);
    match pattern {
        [] => text.is_empty(),
        [b'*'] => true,
        [first, ..] if !b"*?[{\\".contains(first) => false,
        _ => {
            let mut reached = vec![false; text.len() + 1];
            reached[0] = true;
            advance(pattern, text, &mut reached).is_some() && reached[text.len()]
        }
    }
}

/// How far the matching can have come: from the offsets of `text` that are `reached`, to those where the pattern ends
/// then. None for a pattern that is not well formed.
fn advance(mut pattern: &[u8], text: &[u8], reached: &mut [bool]) -> Option<()> {
    while let Some((&first, tail)) = pattern.split_first() {
        let len = match first {
            b'*' => {
                let least = reached.iter().position(|reached| *reached).unwrap_or(reached.len());
                reached[least..].fill(true);
                0
            }
            b'{' => {
                let (ways, len) = alternatives(tail)?;
                let from = reached.to_vec();
                reached.fill(false);
                for way in ways {
                    let mut to = from.clone();
                    advance(way, text, &mut to)?;
                    reached.iter_mut().zip(to).for_each(|(all, one)| *all |= one);
                }
                len
            }
            b'[' => {
                let (class, len) = class(tail)?;
                step(text, reached, |byte| class.contains(byte));
                len
            }
            b'?' => {
                step(text, reached, |_| true);
                0
            }
            b'\\' => {
                let escaped = *tail.first()?;
                step(text, reached, |byte| byte == escaped);
                1
            }
            _ => {
                step(text, reached, |byte| byte == first);
                0
            }
        };
        pattern = &tail[len..];
    }
    Some(())
}

/// Goes one byte on from each offset, where that byte will do.
fn step(text: &[u8], reached: &mut [bool], takes: impl Fn(u8) -> bool) {
    for i in (0..text.len()).rev() {
        reached[i + 1] = reached[i] && takes(text[i]);
    }
    reached[0] = false;
}

struct Class<'a> {
    negated: bool,
    members: &'a [u8],
}

impl Class<'_> {
    fn contains(&self, byte: u8) -> bool {
        let mut members = self.members;
        let mut found = false;
        while let Some((&low, tail)) = members.split_first() {
            members = match tail {
                [b'-', high, tail @ ..] => {
                    found |= (low..=*high).contains(&byte);
                    tail
                }
                _ => {
                    found |= low == byte;
                    tail
                }
            };
        }
        found != self.negated
    }
}

/// The class whose `[` has been read, and how many bytes it takes with its `]`.
fn class(text: &[u8]) -> Option<(Class<'_>, usize)> {
    let negated = matches!(text.first(), Some(b'!' | b'^'));
    let begin = usize::from(negated);
    let end = text.iter().position(|byte| *byte == b']')?;
    let members = text.get(begin..end)?;
    Some((Class { negated, members }, end + 1))
}

/// The alternatives whose `{` has been read, and how many bytes they take with their `}`. They may be nested.
fn alternatives(text: &[u8]) -> Option<(Vec<&[u8]>, usize)> {
    let (mut ways, mut begin, mut depth, mut in_class) = (Vec::new(), 0, 0, false);
    let mut bytes = text.iter().enumerate();
    while let Some((i, byte)) = bytes.next() {
        match byte {
            b'[' => in_class = true,
            b']' => in_class = false,
            _ if in_class => {}
            b'\\' => {
                bytes.next();
            }
            b'{' => depth += 1,
            b'}' if depth > 0 => depth -= 1,
            b'}' => {
                ways.push(&text[begin..i]);
                return Some((ways, i + 1));
            }
            b',' if depth == 0 => {
                ways.push(&text[begin..i]);
                begin = i + 1;
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            4 => "[ABab./]{1,3}",
            1 => "\\\\[*?{},\\[\\]\\\\Aé]",
            1 => Just("*".to_owned()),
            1 => Just("?".to_owned()),
            1 => "\\[[!^]?[ABab]{1,2}\\]",
            1 => Just("[A-B.]".to_owned()),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 1..3).prop_map(|parts| parts.concat()),
                prop::collection::vec(inner, 1..4).prop_map(|ways| format!("{{{}}}", ways.join(","))),
            ]
        })
        // `**` has a meaning of its own beside a `/`; the derive macro refuses it.
        .prop_filter("no **", |pattern| !pattern.contains("**"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn agrees_with_the_hosts_matcher(
            pattern in pattern(),
            texts in prop::collection::vec("[ABab./é*?{},\\[\\]\\\\]{0,6}", 1..20),
        ) {
            let host = globset::GlobBuilder::new(&pattern).backslash_escape(true).build().unwrap().compile_matcher();
            for text in texts {
                prop_assert_eq!(matches(&pattern, &text), host.is_match(&text), "{} on {:?}", pattern, text);
            }
        }
    }

    #[test]
    fn examples() {
        for (pattern, text, expected) in [
            ("Order*", "OrderPlaced", true),
            ("Order*", "Reorder", false),
            ("*", "", true),
            ("com.acme.{Order,Cart}*", "com.acme.CartFilled", true),
            ("V[0-9]", "V7", true),
            ("V[!0-9]", "V7", false),
            ("{A,{B,C}D}E", "CDE", true),
            ("a*b*c", "aXbYbZc", true),
            ("sensors/*", "sensors/north/7", true),
            ("sensors/*", "sensors/", true),
            ("sensors/*", "sensors", false),
            ("sensors", "sensors/7", false),
            ("what\\?", "what?", true),
            ("what\\?", "whats", false),
            ("{a\\,b,c\\}}", "c}", true),
            ("{a", "a", false),
            ("a\\", "a", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} on {text}");
        }
    }

    #[test]
    fn a_name_cannot_make_a_pattern_guess() {
        // Each `*` that tries all ways anew would make this 1,000 to the power of 20.
        assert!(!matches(&format!("{}b", "*a".repeat(20)), &"a".repeat(1_000)));
        assert!(!matches(&format!("{}b", "{a,aa}".repeat(100)), &"a".repeat(1_000)));
    }
}
