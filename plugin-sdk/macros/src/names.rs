//! The contract's rules for names and globs.

use syn::spanned::Spanned;
use syn::{Error, LitStr, Result};

/// Checks the name of a view or a column.
pub(crate) fn check_column(name: &str, span: &impl Spanned) -> Result<()> {
    check(name, "_", span)
}

/// Checks the name of a projection.
pub(crate) fn check_projection(name: &LitStr) -> Result<()> {
    check(&name.value(), "-_", name)
}

fn check(name: &str, others: &str, span: &impl Spanned) -> Result<()> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || others.contains(c);
    if (1..=63).contains(&name.len()) && name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(allowed)
    {
        return Ok(());
    }
    let others = others.chars().map(|c| format!(", `{c}`")).collect::<String>();
    let rule = format!("a name is 1 to 63 of a-z, 0-9{others}, and begins with a letter");
    Err(Error::new(span.span(), format!("`{name}` cannot be a name here: {rule}")))
}

/// Whether a source or an event type, as `what` says, is a glob; a name with escapes is none. Refuses globs whose meaning
/// is more than the contract names, so that the plugin and the host cannot read one in two ways.
pub(crate) fn is_glob(pattern: &LitStr, what: &str) -> Result<bool> {
    let text = pattern.value();
    let refuse = |why: &str| Err(Error::new(pattern.span(), format!("`{text}` is not {what} or a glob: {why}")));
    if text.is_empty() {
        return refuse("it is empty");
    }
    if !text.contains(['*', '?', '[', ']', '{', '}', '\\']) {
        return Ok(false);
    }
    let (mut depth, mut empty, mut glob) = (0_usize, false, false);
    let mut rest = text.as_str();
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        glob |= "*?[{".contains(c);
        match c {
            '\\' => {
                let mut behind = rest.chars();
                if behind.next().is_none() {
                    return refuse("a `\\` stands before the character that is to be itself; there is none");
                }
                (rest, empty) = (behind.as_str(), false);
            }
            '*' if rest.starts_with('*') => return refuse("write `*`, which matches any characters"),
            '[' => {
                let Some((class, behind)) = rest.split_once(']') else { return refuse("a `[` is not closed") };
                let class = class.strip_prefix(['!', '^']).unwrap_or(class);
                let simple = |c: char| c.is_ascii_alphanumeric() || "-_.:/ ".contains(c);
                if class.is_empty() || !class.chars().all(simple) || !ranges_rise(class) {
                    return refuse("a class is like `[ab]`, `[!ab]` or `[a-z]`");
                }
                (rest, empty) = (behind, false);
            }
            ']' => return refuse("a `]` was not opened"),
            '{' => {
                depth += 1;
                empty = true;
            }
            ',' | '}' if depth > 0 => {
                if empty {
                    return refuse("an alternative is empty");
                }
                depth -= usize::from(c == '}');
                empty = c == ',';
            }
            '}' => return refuse("a `}` was not opened"),
            _ => empty = false,
        }
    }
    if depth > 0 { refuse("a `{` is not closed") } else { Ok(glob) }
}

/// Whether a `-` stands between two characters in rising order wherever it stands. At an edge it would be itself, which
/// matchers do not agree on.
fn ranges_rise(class: &str) -> bool {
    let mut rest = class.as_bytes();
    while let Some((low, tail)) = rest.split_first() {
        rest = match tail {
            [b'-', high, tail @ ..] if *low != b'-' && *high != b'-' && low <= high => tail,
            _ if *low == b'-' => return false,
            [b'-', ..] => return false,
            _ => tail,
        };
    }
    true
}

/// `OrderPlaced` to `order_placed`.
pub(crate) fn snake_case(name: &str) -> String {
    let mut snake = String::new();
    let mut before = None::<char>;
    let mut chars = name.chars().peekable();
    while let Some(c) = chars.next() {
        // A word begins at an upper-case letter behind a lower-case one, and at the last of several (`HTTPError`).
        let begins = c.is_uppercase()
            && before.is_some_and(|before| {
                !before.is_uppercase() && before != '_' || chars.peek().is_some_and(|next| next.is_lowercase())
            });
        if begins && before != Some('_') {
            snake.push('_');
        }
        snake.extend(c.to_lowercase());
        before = Some(c);
    }
    snake
}

#[cfg(test)]
mod tests {
    use super::*;

    fn glob(text: &str) -> Option<bool> {
        is_glob(&LitStr::new(text, proc_macro2::Span::call_site()), "an event type").ok()
    }

    #[test]
    fn globs_are_told_from_names_and_checked() {
        for name in ["OrderPlaced", "com.acme/order,placed", "Bestellung-aufgegeben", "a\\*\\*", "\\{", "\\é"] {
            assert_eq!(glob(name), Some(false), "{name}");
        }
        for pattern in
            ["*", "Order*", "V?", "[AB]x", "[!a-z]", "{A,B{C,D}}E", "{A,[B]}", "sensors/*", "\\**", "{\\},A}"]
        {
            assert_eq!(glob(pattern), Some(true), "{pattern}");
        }
        for wrong in
            ["", "a**", "a\\", "[", "[]", "[!]", "]", "[z-a]", "[-a]", "[a-]", "[é]", "{A", "A}", "{}", "{A,}", "{,A}"]
        {
            assert_eq!(glob(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn names_become_snake_case() {
        for (name, snake) in [
            ("Open", "open"),
            ("OrderPlaced", "order_placed"),
            ("HTTPError", "http_error"),
            ("V2", "v2"),
            ("A", "a"),
            ("ABTest", "ab_test"),
        ] {
            assert_eq!(snake_case(name), snake);
        }
    }
}
