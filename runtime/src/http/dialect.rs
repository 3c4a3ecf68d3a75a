//! PostgREST's read dialect: a URL's query becomes a [`Select`].
//!
//! - `select=a,b`, `select=name:column` to rename, `select=*` for all
//! - `column=operator.value`: eq, neq, gt, gte, lt, lte, like, ilike, in, is; each also as `not.operator`; conditions
//!   add up, also several on one column
//! - `order=a.desc,b.asc.nullslast`; nulls count as the largest values, as in Postgres; rows that are equal so far are in
//!   the order of the key
//! - `limit`, `offset`

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use crate::config::limits;
use crate::manifest::{Column, ColumnType, ViewSchema};
use crate::view::query::{Comparison, Filter, Literal, Order, Output, Select, Test};

/// All operators, for messages.
const OPERATORS: &str = "eq, neq, gt, gte, lt, lte, like, ilike, in and is, each also after not.";

/// Parts of PostgREST's dialect that are recognised in order to say that they are not there.
const UNSUPPORTED: &[&str] = &["and", "not.and", "columns", "on_conflict"];

/// Reads a URL's query. The error is a sentence that names the part and says what is possible.
pub(super) fn parse(schema: &ViewSchema, parameters: &[(String, String)], max_rows: u64) -> Result<Select, String> {
    let mut select = Select::all(schema, max_rows);
    for (name, value) in parameters {
        match name.as_str() {
            "select" => select.columns = outputs(schema, value)?,
            "order" => select.order = orders(schema, value)?,
            "limit" => select.limit = number(name, value)?.min(max_rows),
            "offset" => select.offset = number(name, value)?,
            "or" | "not.or" => {
                return Err(format!(
                    "{name:?} is not supported; for one column there is in: a=in.(1,2); else ask for each"
                ));
            }
            name if UNSUPPORTED.contains(&name) => {
                return Err(format!("{name:?} is not supported; repeat conditions to combine them: a=gt.1&b=lt.2"));
            }
            _ if select.filters.len() == limits::FILTERS => {
                return Err(format!(
                    "there are more than {} conditions; use in.(...), or ask in parts",
                    limits::FILTERS
                ));
            }
            name => select.filters.push(filter(schema, column(schema, name)?, value)?),
        }
    }
    Ok(select)
}

fn number(name: &str, value: &str) -> Result<u64, String> {
    value.parse().map_err(|_| format!("{name}={value} is not valid; {name} is a whole number from 0"))
}

fn column(schema: &ViewSchema, name: &str) -> Result<usize, String> {
    schema.column(name).ok_or_else(|| {
        let names: Vec<_> = schema.columns.iter().map(|c| c.name.as_str()).collect();
        format!("view {:?} has no column {name:?}; its columns are {}", schema.name, names.join(", "))
    })
}

fn few(name: &str, value: &str) -> Result<(), String> {
    match value.split(',').count() {
        n if n > limits::QUERY_TERMS => Err(format!("{name} has {n} terms; the limit is {}", limits::QUERY_TERMS)),
        _ => Ok(()),
    }
}

/// A value as it can stand in a URL.
fn in_url(value: &str) -> impl std::fmt::Display {
    const KEPT: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'%').add(b'&').add(b'+').add(b'<').add(b'>');
    utf8_percent_encode(value, KEPT)
}

fn outputs(schema: &ViewSchema, value: &str) -> Result<Vec<Output>, String> {
    let mut outputs: Vec<Output> = Vec::new();
    few("select", value)?;
    for term in value.split(',').map(str::trim) {
        if term == "*" {
            outputs.extend(Select::all(schema, 0).columns);
            continue;
        }
        let (name, of) = term.split_once(':').unwrap_or((term, term));
        if name.is_empty() {
            return Err(format!("select={value} has an empty name; write select=column or select=name:column"));
        }
        outputs.push(Output { name: name.to_owned(), column: column(schema, of)? });
    }
    for (i, output) in outputs.iter().enumerate() {
        if outputs[..i].iter().any(|o| o.name == output.name) {
            return Err(format!("select={value} has {:?} twice; rename one: select=name:column", output.name));
        }
    }
    Ok(outputs)
}

fn orders(schema: &ViewSchema, value: &str) -> Result<Vec<Order>, String> {
    let mut orders = Vec::new();
    few("order", value)?;
    for term in value.split(',').map(str::trim) {
        let mut words = term.split('.');
        let column = column(schema, words.next().unwrap_or_default())?;
        let (mut descending, mut nulls_first) = (false, None);
        for word in words {
            match word {
                "asc" => descending = false,
                "desc" => descending = true,
                "nullsfirst" => nulls_first = Some(true),
                "nullslast" => nulls_first = Some(false),
                _ => {
                    return Err(format!(
                        "order={term} has the unknown word {word:?}; there are asc, desc, nullsfirst and nullslast"
                    ));
                }
            }
        }
        orders.push(Order { column, descending, nulls_first: nulls_first.unwrap_or(descending) });
    }
    Ok(orders)
}

fn filter(schema: &ViewSchema, index: usize, value: &str) -> Result<Filter, String> {
    let column = &schema.columns[index];
    let (negated, condition) = match value.strip_prefix("not.") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let Some((operator, operand)) = condition.split_once('.') else {
        return Err(format!(
            "{0}={value} has no operator; write {0}=eq.{1}. The operators are {OPERATORS}",
            column.name,
            in_url(value)
        ));
    };
    Ok(Filter { column: index, negated, test: test(column, operator, operand)? })
}

fn test(column: &Column, operator: &str, operand: &str) -> Result<Test, String> {
    let literal = |text: &str| {
        let text = if column.kind == ColumnType::Boolean { boolean(text).unwrap_or(text) } else { text };
        Literal::parse(column, text).map_err(|e| e.to_string())
    };
    let comparison = match operator {
        "eq" => Comparison::Equal,
        "neq" => Comparison::NotEqual,
        "gt" => Comparison::Greater,
        "gte" => Comparison::GreaterOrEqual,
        "lt" => Comparison::Less,
        "lte" => Comparison::LessOrEqual,
        "in" => {
            let items = list(operand)
                .ok_or_else(|| format!("{}=in.{operand} is not a list; write {0}=in.(a,b,%22c,d%22)", column.name))?;
            return items.iter().map(|item| literal(item)).collect::<Result<_, _>>().map(Test::In);
        }
        "like" | "ilike" => {
            if matches!(column.kind, ColumnType::Integer | ColumnType::Real | ColumnType::Boolean | ColumnType::Bytes) {
                return Err(format!("column {:?} is {}; {operator} works on text", column.name, column.kind.name()));
            }
            if operand.len() > limits::PATTERN_BYTES {
                let (length, limit) = (operand.len(), limits::PATTERN_BYTES);
                return Err(format!("the pattern for {:?} has {length} bytes; the limit is {limit}", column.name));
            }
            return Ok(Test::Like { pattern: operand.to_owned(), ignore_case: operator == "ilike" });
        }
        "is" => return is(column, operand),
        _ => {
            return Err(format!(
                "{}={operator}.{operand}: there is no operator {operator:?}; there are {OPERATORS}",
                column.name
            ));
        }
    };
    literal(operand).map(|literal| Test::Compare(comparison, literal))
}

/// Postgres's spellings of a boolean: a word or what it begins with, as long as that says which.
fn boolean(text: &str) -> Option<&'static str> {
    let text = text.trim().to_ascii_lowercase();
    let begins = |word: &str, least: usize| text.len() >= least && word.starts_with(&text);
    match text.as_str() {
        "1" | "on" => Some("true"),
        "0" => Some("false"),
        _ if begins("true", 1) || begins("yes", 1) => Some("true"),
        _ if begins("false", 1) || begins("no", 1) || begins("off", 2) => Some("false"),
        _ => None,
    }
}

fn is(column: &Column, operand: &str) -> Result<Test, String> {
    match operand.to_ascii_lowercase().as_str() {
        "null" => Ok(Test::IsNull),
        "not_null" => Ok(Test::IsNotNull),
        word @ ("true" | "false") if column.kind == ColumnType::Boolean => Ok(Test::Is(word == "true")),
        "unknown" if column.kind == ColumnType::Boolean => Ok(Test::IsNull),
        "true" | "false" | "unknown" => {
            Err(format!("column {:?} is {}; is.{operand} works on boolean", column.name, column.kind.name()))
        }
        _ => Err(format!("{}=is.{operand}: is works with null, not_null, true, false and unknown", column.name)),
    }
}

/// The items of `(a,b,"c,d")`. In quotes, a backslash takes the next character literally.
fn list(text: &str) -> Option<Vec<String>> {
    let inside = text.strip_prefix('(')?.strip_suffix(')')?;
    let mut items = Vec::new();
    if inside.is_empty() {
        return Some(items);
    }
    let mut rest = inside;
    loop {
        let (item, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted_item(quoted)?,
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                (rest[..end].to_owned(), &rest[end..])
            }
        };
        items.push(item);
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None => return after.is_empty().then_some(items),
        }
    }
}

/// The item up to its closing quote, and what follows.
fn quoted_item(text: &str) -> Option<(String, &str)> {
    let mut item = String::new();
    let mut characters = text.char_indices();
    loop {
        match characters.next()? {
            (at, '"') => return Some((item, &text[at + 1..])),
            (_, '\\') => item.push(characters.next()?.1),
            (_, c) => item.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Comparison::*;

    fn schema() -> ViewSchema {
        let column = |name: &str, kind, nullable| Column { name: name.into(), kind, nullable };
        ViewSchema {
            name: "v".into(),
            columns: vec![
                column("k", ColumnType::Text, false),
                column("n", ColumnType::Integer, true),
                column("b", ColumnType::Boolean, true),
                column("t", ColumnType::Timestamp, true),
                column("j", ColumnType::Json, true),
            ],
            key: vec!["k".into()],
            indexes: Vec::new(),
        }
    }

    fn check(query: &str) -> Result<Select, String> {
        let pairs: Vec<_> = (query.split('&').filter(|p| !p.is_empty()))
            .map(|pair| pair.split_once('=').unwrap())
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        parse(&schema(), &pairs, 100)
    }

    #[test]
    fn conditions() {
        let text = |text: &str| Literal::Text(text.into());
        for (query, column, negated, test) in [
            ("k=eq.a.b", 0, false, Test::Compare(Equal, text("a.b"))),
            ("k=eq.", 0, false, Test::Compare(Equal, text(""))),
            ("n=not.gte.-5", 1, true, Test::Compare(GreaterOrEqual, Literal::Integer(-5))),
            ("b=neq.true", 2, false, Test::Compare(NotEqual, Literal::Integer(1))),
            ("t=lt.2013-01-05", 3, false, Test::Compare(Less, text("2013-01-05T00:00:00.000000Z"))),
            ("t=gt.2013-01-05T10:00:00", 3, false, Test::Compare(Greater, text("2013-01-05T10:00:00.000000Z"))),
            (
                "t=lte.2013-01-05T10:00:00 02:00",
                3,
                false,
                Test::Compare(LessOrEqual, text("2013-01-05T08:00:00.000000Z")),
            ),
            ("k=like.A*", 0, false, Test::Like { pattern: "A*".into(), ignore_case: false }),
            ("j=not.ilike.%a%", 4, true, Test::Like { pattern: "%a%".into(), ignore_case: true }),
            ("k=in.(a,\"b,c\",\"d\\\"e\",)", 0, false, Test::In(["a", "b,c", "d\"e", ""].map(text).into())),
            ("n=in.()", 1, false, Test::In(Vec::new())),
            ("n=is.null", 1, false, Test::IsNull),
            ("n=not.is.not_null", 1, true, Test::IsNotNull),
            ("b=is.FALSE", 2, false, Test::Is(false)),
            ("b=is.unknown", 2, false, Test::IsNull),
            ("b=not.is.UNKNOWN", 2, true, Test::IsNull),
        ] {
            assert_eq!(check(query).unwrap().filters, [Filter { column, negated, test }], "{query}");
        }
        assert_eq!(check("n=gt.1&n=lt.5").unwrap().filters.len(), 2);
    }

    #[test]
    fn booleans_as_postgres_takes_them() {
        let test = |value: i64| Test::Compare(Equal, Literal::Integer(value));
        for (words, value) in
            [(["true", "TRUE", "t", "Yes", "y", "on", "1"], 1), (["false", "F", "fal", "no", "n", "OFF", "0"], 0)]
        {
            for word in words {
                assert_eq!(check(&format!("b=eq.{word}")).unwrap().filters[0].test, test(value), "{word}");
            }
        }
    }

    #[test]
    fn what_sqlite_has_no_room_for_is_refused_with_the_limit() {
        let conditions = |n: usize| vec!["n=not.eq.1"; n].join("&");
        let order = |n: usize| format!("order={}", vec!["n"; n].join(","));
        let select = |n: usize| format!("select={}", (0..n).map(|i| format!("a{i}:n")).collect::<Vec<_>>().join(","));
        let pattern = |n: usize| format!("k=like.{}", "a".repeat(n));
        for (query, limit) in [
            (&conditions as &dyn Fn(usize) -> String, limits::FILTERS),
            (&order, limits::QUERY_TERMS),
            (&select, limits::QUERY_TERMS),
            (&pattern, limits::PATTERN_BYTES),
        ] {
            assert!(check(&query(limit)).is_ok());
            let error = check(&query(limit + 1)).unwrap_err();
            assert!(error.contains(&limit.to_string()), "{error}");
        }
    }

    #[test]
    fn columns_order_and_pages() {
        let select = check("select=n,key:k&order=n.desc,k&limit=7&offset=3").unwrap();
        let names: Vec<_> = select.columns.iter().map(|o| (o.name.as_str(), o.column)).collect();
        assert_eq!(names, [("n", 1), ("key", 0)]);
        assert_eq!((select.limit, select.offset), (7, 3));
        let order = |column, descending, nulls_first| Order { column, descending, nulls_first };
        assert_eq!(select.order, [order(1, true, true), order(0, false, false)]);
        assert_eq!(
            check("order=n.nullsfirst,t.desc.nullslast").unwrap().order,
            [order(1, false, true), order(3, true, false)]
        );
        assert_eq!(check("select=*").unwrap().columns.len(), 5);
        assert_eq!(check("limit=1000").unwrap().limit, 100);
        assert_eq!(check("").unwrap().limit, 100);
    }

    #[test]
    fn each_refusal_says_what_is_possible() {
        for (query, expected) in [
            ("x=eq.1", "no column \"x\"; its columns are k, n, b, t, j"),
            ("select=k,x", "no column \"x\""),
            ("select=k,n:k,k", "\"k\" twice"),
            ("select=", "empty name"),
            ("order=x", "no column \"x\""),
            ("order=k.up", "unknown word \"up\"; there are asc"),
            ("limit=-1", "limit=-1 is not valid"),
            ("offset=x", "offset=x is not valid"),
            ("n=5", "write n=eq.5"),
            ("n=foo.5", "no operator \"foo\"; there are eq, neq"),
            ("n=eq.x", "column \"n\" is an integer; \"x\" is not"),
            ("b=eq.2", "column \"b\" is a boolean; \"2\" is not"),
            ("b=eq.o", "\"o\" is not"),
            ("b=eq.", "\"\" is not"),
            ("n=is.unknown", "is.unknown works on boolean"),
            ("k=<\">", "write k=eq.%3C%22%3E"),
            ("not.or=(a.eq.1)", "\"not.or\" is not supported; for one column"),
            ("t=eq.noon", "column \"t\" is a timestamp; \"noon\" is not"),
            ("j=eq.1", "column \"j\" is json"),
            ("n=like.1*", "column \"n\" is integer; like works on text"),
            ("n=is.true", "is.true works on boolean"),
            ("n=is.5", "is works with null"),
            ("n=in.1,2", "write n=in.(a,b,%22c,d%22)"),
            ("k=in.(\"a)", "not a list"),
            ("or=(a.eq.1)", "\"or\" is not supported"),
        ] {
            let error = check(query).unwrap_err();
            assert!(error.contains(expected), "{query}: {error}");
        }
    }
}
