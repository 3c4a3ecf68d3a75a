//! Which event types a pattern matches.
//!
//! The host matches subscriptions with `globset`; a guest needs the same answer to tell the variants of an enum apart.
//! `globset` would more than double a plugin (it brings a regex engine, and compiles its patterns at every start), so
//! this is the small part of it that the contract names: `*`, `?`, `[ab]`, `[!ab]`, `[a-z]` and `{a,b}`. The derive
//! macro refuses every other construct, and a property test holds this file to `globset`'s answers.

/// Whether `text` matches `pattern` from beginning to end.
///
/// `?` and a class stand for one byte, as they do in `globset`. The pattern has been checked by the derive macro; one
/// that is not well formed matches nothing.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    bytes_match(pattern.as_bytes(), text.as_bytes())
}

fn bytes_match(mut pattern: &[u8], mut text: &[u8]) -> bool {
    while let Some((&first, tail)) = pattern.split_first() {
        let len = match first {
            b'*' => return (0..=text.len()).any(|skip| bytes_match(tail, &text[skip..])),
            b'{' => {
                let Some((ways, len)) = alternatives(tail) else { return false };
                return ways.iter().any(|way| bytes_match(&[*way, &tail[len..]].concat(), text));
            }
            b'[' => match (class(tail), text.first()) {
                (Some((class, len)), Some(byte)) if class.contains(*byte) => len,
                _ => return false,
            },
            b'?' if !text.is_empty() => 0,
            _ if text.first() == Some(&first) && first != b'?' => 0,
            _ => return false,
        };
        (pattern, text) = (&tail[len..], &text[1..]);
    }
    text.is_empty()
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
    for (i, byte) in text.iter().enumerate() {
        match byte {
            b'[' => in_class = true,
            b']' => in_class = false,
            _ if in_class => {}
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
            4 => "[ABab.]{1,3}",
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
        fn agrees_with_the_hosts_matcher(pattern in pattern(), texts in prop::collection::vec("[ABab./é]{0,6}", 1..20)) {
            let host = globset::GlobBuilder::new(&pattern).build().unwrap().compile_matcher();
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
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} on {text}");
        }
    }
}
