//! Which columns of a batch a projection's function can use, told from its tokens.
//!
//! The host leaves out what the manifest does not ask for, and an absent column must not pass for an empty one. So the
//! answer has to hold whatever the function does: it is given only where every mention of the event is `event.field`,
//! and nothing in sight could make a mention out of other tokens. In all other cases the function gets all columns.

use proc_macro2::{Delimiter, Span, TokenStream, TokenTree};
use quote::quote;
use syn::ext::IdentExt;
use syn::{FnArg, Ident, ItemFn, Lit, Pat};

/// The fields of `Event` that are columns which may be absent, with the columns' names in the contract.
const OPTIONAL: [(&str, &str); 5] =
    [("version", "versions"), ("stream", "streams"), ("id", "ids"), ("payload", "payloads"), ("metadata", "metadata")];

/// The fields of `Event` that need no column of these. `data` is made of the payload, which the enum of events asks for
/// itself; the column of `forgotten` comes with such events, for which the projection asks by its argument.
const ALWAYS: [&str; 6] = ["source", "position", "event_type", "time", FORGOTTEN, "data"];

const FORGOTTEN: &str = "forgotten";

/// Macros whose expansion is known to name nothing but what they are given. Any other could name the event by itself.
const MACROS: [&str; 23] = [
    "assert",
    "assert_eq",
    "assert_ne",
    "bail",
    "concat",
    "dbg",
    "debug_assert",
    "debug_assert_eq",
    "debug_assert_ne",
    "ensure",
    "eprintln",
    "format",
    "format_args",
    "json",
    "matches",
    "panic",
    "println",
    "stringify",
    "todo",
    "unimplemented",
    "unreachable",
    "vec",
    "write",
];

/// Attributes that add nothing to the function's tokens.
const ATTRIBUTES: [&str; 12] =
    ["allow", "cfg", "cold", "deny", "derive", "doc", "expect", "forbid", "inline", "must_use", "track_caller", "warn"];

/// What the function can use of an event; None if it may use anything.
pub(crate) struct Wanted {
    /// The columns, of those that may be absent.
    pub(crate) columns: Vec<&'static str>,
    /// The first `event.forgotten`.
    pub(crate) forgotten: Option<Span>,
}

pub(crate) fn wanted(function: &ItemFn) -> Option<Wanted> {
    let Some(FnArg::Typed(argument)) = function.sig.inputs.first() else { return None };
    let Pat::Ident(name) = &*argument.pat else { return None };
    if name.subpat.is_some() {
        return None;
    }
    let wanted = Wanted { columns: Vec::new(), forgotten: None };
    let mut mentions = Mentions { event: name.ident.unraw(), wanted };
    let (attributes, body) = (&function.attrs, &function.block);
    mentions.read(quote!(#(#attributes)* #body))?;
    Some(mentions.wanted)
}

struct Mentions {
    /// The parameter's name.
    event: Ident,
    wanted: Wanted,
}

impl Mentions {
    /// Takes note of what these tokens use. None: there is a mention which could be of anything.
    fn read(&mut self, tokens: TokenStream) -> Option<()> {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        for (i, token) in tokens.iter().enumerate() {
            match token {
                TokenTree::Ident(name) if self.is_event(name) => self.field(&tokens[..i], &tokens[i + 1..])?,
                TokenTree::Ident(_) | TokenTree::Literal(_) => {}
                TokenTree::Punct(hash) if hash.as_char() == '#' => attribute(&tokens[i + 1..])?,
                TokenTree::Punct(bang) if bang.as_char() == '!' => self.call(&tokens[..i], &tokens[i + 1..])?,
                TokenTree::Punct(_) => {}
                TokenTree::Group(group) => self.read(group.stream())?,
            }
        }
        Some(())
    }

    fn is_event(&self, name: &Ident) -> bool {
        name.unraw() == self.event
    }

    /// What follows a mention has to be `.field`, and not the call of a method with the name of a field.
    fn field(&mut self, before: &[TokenTree], after: &[TokenTree]) -> Option<()> {
        let [TokenTree::Punct(dot), TokenTree::Ident(field), rest @ ..] = after else { return None };
        let is_call = match rest {
            [TokenTree::Group(arguments), ..] => arguments.delimiter() == Delimiter::Parenthesis,
            [TokenTree::Punct(colon), TokenTree::Punct(_), ..] => colon.as_char() == ':',
            _ => false,
        };
        if dot.as_char() != '.' || is_call {
            return None;
        }
        // Behind a dot it is a field of something else, of which nothing is known.
        if field == FORGOTTEN && !matches!(before.last(), Some(TokenTree::Punct(dot)) if dot.as_char() == '.') {
            self.wanted.forgotten.get_or_insert(field.span());
        }
        let field = field.to_string();
        if let Some((_, column)) = OPTIONAL.iter().find(|(name, _)| field == *name) {
            if !self.wanted.columns.contains(column) {
                self.wanted.columns.push(column);
            }
            return Some(());
        }
        ALWAYS.contains(&field.as_str()).then_some(())
    }

    /// A macro may take `event.time` apart and name another field. So it has to be a known one, and even then it must
    /// not be given the event, neither as a token nor in the text of a format.
    fn call(&self, before: &[TokenTree], after: &[TokenTree]) -> Option<()> {
        let name = match before.last() {
            Some(TokenTree::Ident(name)) => name,
            // It may hold a name, put there by the macro that wrote the function.
            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::None => return None,
            _ => return Some(()),
        };
        match after {
            // `a != b`, or a negation behind a keyword, such as `return !(a && b)`.
            [TokenTree::Punct(_), ..] => Some(()),
            [TokenTree::Group(_), ..] if is_keyword(name) => Some(()),
            [TokenTree::Group(arguments), ..] => {
                let known = MACROS.iter().any(|known| name == known);
                (known && !self.is_named_in(arguments.stream())).then_some(())
            }
            // `macro_rules! name`, or a negation behind a keyword.
            _ => is_keyword(name).then_some(()),
        }
    }

    fn is_named_in(&self, tokens: TokenStream) -> bool {
        tokens.into_iter().any(|token| match token {
            TokenTree::Ident(name) => self.is_event(&name),
            TokenTree::Punct(_) => false,
            TokenTree::Group(group) => self.is_named_in(group.stream()),
            TokenTree::Literal(literal) => match Lit::new(literal) {
                Lit::Str(text) => {
                    let event = self.event.to_string();
                    text.value().split('{').skip(1).any(|part| part.trim_start().starts_with(&event))
                }
                _ => false,
            },
        })
    }
}

/// What follows a `#`.
fn attribute(tokens: &[TokenTree]) -> Option<()> {
    let tokens = match tokens {
        [TokenTree::Punct(bang), tokens @ ..] if bang.as_char() == '!' => tokens,
        tokens => tokens,
    };
    let Some(TokenTree::Group(group)) = tokens.first() else { return None };
    let Some(TokenTree::Ident(name)) = group.stream().into_iter().next() else { return None };
    ATTRIBUTES.iter().any(|known| name == known).then_some(())
}

/// Words behind which `!` is a negation. `name!` is a macro's call behind all others.
fn is_keyword(name: &Ident) -> bool {
    ["break", "else", "if", "in", "match", "return", "while"].iter().any(|keyword| name == keyword)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a function with this body gets, its columns separated by spaces.
    fn of(body: &str) -> Option<String> {
        of_function(&format!("fn f(event: Event<Fact>, views: &mut Views) -> Result {{ {body} }}"))
    }

    fn of_function(function: &str) -> Option<String> {
        let Wanted { mut columns, forgotten } = wanted(&syn::parse_str(function).expect(function))?;
        columns.extend(forgotten.map(|_| "(forgotten)"));
        Some(columns.join(" "))
    }

    #[test]
    fn fields_name_their_columns() {
        for (body, columns) in [
            ("", ""),
            ("match event.data { Fact::A(e) => views.put(e), Fact::B => Ok(()) }", ""),
            ("let at = event.time; views.upsert::<V>(event.source, |v| v.at = at)", ""),
            ("views.upsert::<V>(event.stream, |v| v.last = event.position + event.version)", "streams versions"),
            ("if !event.id.is_empty() && event.id != event.metadata { g(event.payload) }", "ids metadata payloads"),
            ("let all = || (&event.id, [event . version; 2]);", "ids versions"),
            ("if event.forgotten { event.id } else { f(!event.forgotten) }", "ids (forgotten)"),
            ("views.get::<V>(1).map(|row| row.event.forgotten)", ""),
            ("return !(a && b)", ""),
            ("if !(event.id == x) {} else if !x {}", "ids"),
            ("let r#event = event.time;", "-"),
            (r#"ensure!(n > 0, "an event of {event_type} {{event}} at {}: {n}", n + 1); Ok(())"#, "-"),
            (r#"ensure!(n > 0, "an event at {}: {n}, {{}}", n + 1); Ok(())"#, ""),
            (r##"#[allow(unused)] let n = matches!(x, "event" | r#"{"events": 1}"#);"##, ""),
            ("f(\"{event}\")", ""),
        ] {
            assert_eq!(of(body).unwrap_or("-".into()), columns, "{body}");
        }
    }

    #[test]
    fn whatever_else_is_done_with_the_event_takes_all_columns() {
        for body in [
            "apply(event, views)",
            "apply(&event, views)",
            "let e = event; Ok(())",
            "let Event { id, .. } = event; Ok(())",
            "Wrapper { event }",
            "Event { data: (), ..event }",
            "(event).id",
            "event.clone().id",
            "event.id()",
            "event.id::<X>()",
            "event.unheard_of",
            "event..",
            "|e| e == event",
            "{ { [event] } }",
            "r#event",
            // Macros can see what they are given, and look into texts; some make names up.
            "println!(\"{event:?}\")",
            "println!(\"{ event}\")",
            "bail!(\"\\x7bev\\u{65}nt:?}\")",
            "dbg!(event.time)",
            "format!(\"{}\", vec![event.time])",
            "unheard_of!()",
            "some::unheard_of! { }",
            "format!(\"{}\", unheard_of!())",
            "macro_rules! m { ($e:ident) => { $e.id } } Ok(())",
            "#[unheard_of] fn inner() {}",
        ] {
            assert_eq!(of(body), None, "{body}");
        }
        for function in [
            "fn f(Event { data, .. }: Event<Fact>, views: &mut Views) -> Result { Ok(()) }",
            "fn f(event @ Event { .. }: Event<Fact>, views: &mut Views) -> Result { Ok(()) }",
            "#[instrument] fn f(event: Event<Fact>, views: &mut Views) -> Result { Ok(()) }",
            "#[rewritten::by] fn f(event: Event<Fact>, views: &mut Views) -> Result { Ok(()) }",
        ] {
            assert_eq!(of_function(function), None, "{function}");
        }
        let other_name = "#[inline] fn f(mut e: Event<Fact>, event: &mut Views) -> Result { event.put(e.id) }";
        assert_eq!(of_function(other_name).as_deref(), Some("ids"));
    }
}
