//! A typed query of one view, and the SQL that it becomes. [`super::readers`] runs it.
//!
//! How values are stored is how they are compared. A filter's literal is written as the column's type wants it:
//!
//! | column | stored as | literal |
//! | --- | --- | --- |
//! | text | TEXT | anything |
//! | integer | INTEGER | a 64-bit number |
//! | real | REAL | a finite number |
//! | boolean | INTEGER 0, 1 | `true`, `false` |
//! | bytes | BLOB | base64, as answers have it; the URL-safe alphabet works too |
//! | timestamp | TEXT, as by [`Time::write_sortable`] | RFC 3339; without an offset it is UTC; a date is its midnight |
//! | uuid | TEXT, hyphenated, lower case | any usual spelling |
//! | decimal | TEXT | digits; compared as numbers, `1.50` equals `1.5` |
//! | json | TEXT | cannot be compared, only matched and tested for null |

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt::Write as _;
use std::rc::Rc;

use base64::Engine as _;
use rusqlite::ToSql;
use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::vtab::array::Array;

use super::pattern::range;
use super::readers::Error;
use super::row::{push_quoted, quote};
use crate::config::limits;
use crate::manifest::{Column, ColumnType, ViewSchema};
use crate::model::Time;

/// A value that a column is compared with.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "they are SQLite's storage classes")]
pub enum Literal {
    Integer(i64),
    Real(f64),
    Text(String),
    Blob(Vec<u8>),
}

/// A query of one view. Columns are indexes into the view's columns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Select {
    /// What the answer's rows consist of.
    pub columns: Vec<Output>,
    /// All of them must be true of a row.
    pub filters: Vec<Filter>,
    /// The order; rows that are equal in it are ordered by the key, so that pages never overlap.
    pub order: Vec<Order>,
    /// At most this many rows.
    pub limit: u64,
    /// After that many rows.
    pub offset: u64,
    /// Whether all rows that the filters select are to be counted.
    pub count: bool,
}

/// A column of the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its name in the answer.
    pub name: String,
    /// The view's column.
    pub column: usize,
}

/// A condition on one column.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Filter {
    pub column: usize,
    pub negated: bool,
    pub test: Test,
}

/// What a filter tests. As in SQL, a comparison with an absent value is neither true nor false.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Test {
    Compare(Comparison, Literal),
    /// `%` or `*` stand for any text, `_` for one character, `\` takes the next character literally. Case is that of
    /// Unicode's simple case folding.
    Like {
        pattern: String,
        ignore_case: bool,
    },
    In(Vec<Literal>),
    IsNull,
    IsNotNull,
    /// True or false, and not absent.
    Is(bool),
}

/// How a column is compared with a literal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Comparison {
    Equal,
    NotEqual,
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
}

impl Comparison {
    /// With the place for what is compared with.
    fn sql(self) -> &'static str {
        match self {
            Comparison::Equal => " = ?",
            Comparison::NotEqual => " <> ?",
            Comparison::Greater => " > ?",
            Comparison::GreaterOrEqual => " >= ?",
            Comparison::Less => " < ?",
            Comparison::LessOrEqual => " <= ?",
        }
    }
}

/// One term of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Order {
    pub column: usize,
    pub descending: bool,
    pub nulls_first: bool,
}

impl Literal {
    /// Reads a literal as a column's type wants it. The error is a sentence that names the column.
    pub fn parse(column: &Column, text: &str) -> Result<Literal, Error> {
        let literal = match column.kind {
            ColumnType::Text => Some(Literal::Text(text.to_owned())),
            ColumnType::Integer => text.parse().ok().map(Literal::Integer),
            ColumnType::Real => text.parse().ok().filter(|x: &f64| x.is_finite()).map(Literal::Real),
            ColumnType::Boolean => text.parse().ok().map(|b: bool| Literal::Integer(i64::from(b))),
            ColumnType::Bytes => bytes(text).map(Literal::Blob),
            ColumnType::Timestamp => timestamp(text).map(Literal::Text),
            ColumnType::Uuid => uuid::Uuid::parse_str(text).ok().map(|u| Literal::Text(u.hyphenated().to_string())),
            ColumnType::Decimal => is_decimal(text).then(|| Literal::Text(text.to_owned())),
            ColumnType::Json => {
                return Err(Error::Refused(format!(
                    "column {:?} is json, which cannot be compared; use is, like or ilike",
                    column.name
                )));
            }
        };
        literal.ok_or_else(|| {
            let (name, kind) = (&column.name, column.kind.name());
            let article = if kind == "integer" { "an" } else { "a" };
            let value = if kind == "bytes" { "base64".to_owned() } else { format!("{article} {kind}") };
            Error::Refused(format!("column {name:?} is {value}; {text:?} is not"))
        })
    }
}

impl From<&Literal> for Value {
    fn from(literal: &Literal) -> Value {
        match literal {
            Literal::Integer(value) => Value::Integer(*value),
            Literal::Real(value) => Value::Real(*value),
            Literal::Text(value) => Value::Text(value.clone()),
            Literal::Blob(value) => Value::Blob(value.clone()),
        }
    }
}

impl ToSql for Literal {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Literal::Integer(value) => ToSqlOutput::Owned(Value::Integer(*value)),
            Literal::Real(value) => ToSqlOutput::Owned(Value::Real(*value)),
            Literal::Text(value) => ToSqlOutput::Borrowed(ValueRef::Text(value.as_bytes())),
            Literal::Blob(value) => ToSqlOutput::Borrowed(ValueRef::Blob(value)),
        })
    }
}

/// The values for the question marks of a statement, in their order.
pub(super) type Arguments<'a> = Vec<Argument<'a>>;

/// What a question mark stands for.
pub(super) enum Argument<'a> {
    One(Cow<'a, Literal>),
    /// However many there are, the statement is the same.
    List(Array),
}

impl ToSql for Argument<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        match self {
            Argument::One(literal) => literal.to_sql(),
            Argument::List(literals) => literals.to_sql(),
        }
    }
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    // A plus sign in a URL arrives as a space unless it is escaped.
    let standard: String = text
        .trim_end_matches('=')
        .chars()
        .map(|c| match c {
            '-' | ' ' => '+',
            '_' => '/',
            c => c,
        })
        .collect();
    base64::engine::general_purpose::STANDARD_NO_PAD.decode(standard).ok()
}

fn timestamp(text: &str) -> Option<String> {
    // A plus sign in a URL arrives as a space unless it is escaped.
    let text = if text.contains('T') { text.replace(' ', "+") } else { text.to_owned() };
    // Less than RFC 3339 wants, as people write it: no offset, no seconds, no time of day.
    let time = [text.clone(), format!("{text}Z"), format!("{text}:00Z"), format!("{text}T00:00:00Z")];
    let time: Time = time.iter().find_map(|t| t.parse().ok())?;
    let mut sortable = String::with_capacity(27);
    time.write_sortable(&mut sortable);
    Some(sortable)
}

fn is_decimal(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    [whole, fraction].iter().all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

/// The names under which the functions of [`super::pattern`] are registered on every reader's connection.
pub(super) const LIKE: &str = "text_like";
pub(super) const ILIKE: &str = "text_ilike";

/// The name under which [`compare_decimals`] is registered on every reader's connection.
pub(super) const DECIMAL: &str = "decimal";

/// Orders decimals of any length as numbers. Whatever is no decimal comes after all decimals, as text, so that the
/// order is total.
pub(super) fn compare_decimals(a: &str, b: &str) -> Ordering {
    match (is_decimal(a), is_decimal(b)) {
        (true, true) => {}
        (false, false) => return a.cmp(b),
        (a_is, _) => {
            return if a_is { Ordering::Less } else { Ordering::Greater };
        }
    }
    let parts = |text| {
        let digits = str::trim_start_matches(text, '-').trim_start_matches('0');
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        (whole, fraction.trim_end_matches('0'))
    };
    let ((a_whole, a_fraction), (b_whole, b_fraction)) = (parts(a), parts(b));
    let negative =
        |text: &str, whole: &str, fraction: &str| text.starts_with('-') && !(whole.is_empty() && fraction.is_empty());
    let magnitude = || {
        (a_whole.len().cmp(&b_whole.len())).then_with(|| a_whole.cmp(b_whole)).then_with(|| a_fraction.cmp(b_fraction))
    };
    match (negative(a, a_whole, a_fraction), negative(b, b_whole, b_fraction)) {
        (false, false) => magnitude(),
        (true, true) => magnitude().reverse(),
        (true, false) => Ordering::Less,
        (false, true) => Ordering::Greater,
    }
}

impl Select {
    /// Everything in a view, in the order of the key.
    pub fn all(schema: &ViewSchema, limit: u64) -> Select {
        let columns =
            schema.columns.iter().enumerate().map(|(column, c)| Output { name: c.name.clone(), column }).collect();
        Select { columns, limit, ..Select::default() }
    }

    /// Refuses what would cost more than an answer is worth.
    pub(super) fn check(&self, schema: &ViewSchema) -> Result<(), Error> {
        if self.filters.len() > limits::FILTERS {
            return Err(Error::Refused(format!(
                "the query has {} conditions; the limit is {}, a list like in.(a,b) is one",
                self.filters.len(),
                limits::FILTERS
            )));
        }
        for filter in &self.filters {
            if let Test::Like { pattern, .. } = &filter.test
                && pattern.len() > limits::PATTERN_BYTES
            {
                return Err(Error::Refused(format!(
                    "the pattern for column {:?} has {} bytes; the limit is {}",
                    schema.columns[filter.column].name,
                    pattern.len(),
                    limits::PATTERN_BYTES
                )));
            }
        }
        Ok(())
    }

    /// The types of the answer's columns.
    pub fn kinds(&self, schema: &ViewSchema) -> Vec<ColumnType> {
        self.columns.iter().map(|o| schema.columns[o.column].kind).collect()
    }

    /// The columns that the statement reads, each of them once: SQLite would have the value of one that is selected a
    /// thousand times in memory a thousand times. And, for each output, which of them it is.
    pub(super) fn sources(&self) -> (Vec<usize>, Vec<usize>) {
        let mut columns = Vec::new();
        let source = |output: &Output| {
            columns.iter().position(|column| *column == output.column).unwrap_or_else(|| {
                columns.push(output.column);
                columns.len() - 1
            })
        };
        let sources = self.columns.iter().map(source).collect();
        (columns, sources)
    }

    /// True if it asks for the row of one key: then what it costs has a bound, which is low.
    pub(super) fn is_of_one_key(&self, schema: &ViewSchema) -> bool {
        let equal = |f: &Filter| !f.negated && matches!(f.test, Test::Compare(Comparison::Equal, _));
        // Decimals are compared by a collation that the key's index does not have.
        let found = |key: &usize| {
            schema.columns[*key].kind != ColumnType::Decimal && self.filters.iter().any(|f| f.column == *key)
        };
        self.filters.iter().all(equal) && schema.key_columns().iter().all(found)
    }

    /// The statement and its arguments. Values are arguments, so that there are few statements to be prepared; but not
    /// the limit: SQLite plans by it, and would prepare a statement again each time that it is given one.
    pub(super) fn rows_sql(&self, schema: &ViewSchema) -> (String, Arguments<'_>) {
        let (mut sql, mut arguments) = (String::with_capacity(512), Arguments::new());
        for (i, column) in self.sources().0.into_iter().enumerate() {
            sql.push_str(if i == 0 { "SELECT " } else { ", " });
            push_quoted(&mut sql, &schema.columns[column].name);
        }
        sql.push_str(" FROM ");
        push_quoted(&mut sql, &schema.name);
        self.push_where(schema, &mut sql, &mut arguments);
        sql.push_str(" ORDER BY ");
        self.push_order(schema, &mut sql);
        // SQLite's limits are signed, and a negative one means none.
        let [limit, offset] = [self.limit, self.offset].map(|n| i64::try_from(n).unwrap_or(i64::MAX));
        write!(sql, " LIMIT {limit} OFFSET ?").expect("writing to a string cannot fail");
        arguments.push(Argument::One(Cow::Owned(Literal::Integer(offset))));
        (sql, arguments)
    }

    pub(super) fn count_sql(&self, schema: &ViewSchema) -> (String, Arguments<'_>) {
        let (mut sql, mut arguments) = (String::from("SELECT count(*) FROM "), Arguments::new());
        push_quoted(&mut sql, &schema.name);
        self.push_where(schema, &mut sql, &mut arguments);
        (sql, arguments)
    }

    fn push_where<'a>(&'a self, schema: &ViewSchema, sql: &mut String, arguments: &mut Arguments<'a>) {
        for (i, filter) in self.filters.iter().enumerate() {
            sql.push_str(if i == 0 { " WHERE " } else { " AND " });
            filter.push(schema, sql, arguments);
        }
    }

    fn push_order(&self, schema: &ViewSchema, sql: &mut String) {
        // The key goes in the direction of the last term, so that an index (whose entries end with the key) can be
        // read forwards or backwards instead of sorting.
        let descending = self.order.last().is_some_and(|o| o.descending);
        let ordered = |column: &usize| self.order.iter().any(|o| o.column == *column);
        let rest = schema.key_columns().into_iter().filter(|column| !ordered(column));
        let rest = rest.map(|column| Order { column, descending, nulls_first: false });
        // What a column has ordered once, it does not order again.
        let first = |(i, order): &(usize, Order)| self.order[..*i].iter().all(|o| o.column != order.column);
        let orders = self.order.iter().copied().enumerate().filter(first).map(|(_, order)| order);
        for (i, order) in orders.chain(rest).enumerate() {
            if i > 0 {
                sql.push_str(", ");
            }
            order.push(&schema.columns[order.column], sql);
        }
    }
}

impl Order {
    fn push(self, column: &Column, sql: &mut String) {
        push_quoted(sql, &column.name);
        sql.push_str(collate(column.kind));
        sql.push_str(if self.descending { " DESC" } else { "" });
        // Saying nothing about nulls lets SQLite use an index.
        sql.push_str(match (column.nullable, self.nulls_first) {
            (false, _) => "",
            (true, true) => " NULLS FIRST",
            (true, false) => " NULLS LAST",
        });
    }
}

fn collate(kind: ColumnType) -> &'static str {
    if kind == ColumnType::Decimal { " COLLATE decimal" } else { "" }
}

impl Filter {
    fn push<'a>(&'a self, schema: &ViewSchema, sql: &mut String, arguments: &mut Arguments<'a>) {
        let column = &schema.columns[self.column];
        sql.push_str(if self.negated { "NOT (" } else { "" });
        if let Test::Like { pattern, ignore_case } = &self.test {
            self.push_like(column, pattern, *ignore_case, sql, arguments);
        } else {
            self.push_test(column, sql, arguments);
        }
        sql.push_str(if self.negated { ")" } else { "" });
    }

    /// The text's beginning is compared first, so that an index can be used, and few texts are matched.
    fn push_like(
        &self,
        column: &Column,
        pattern: &str,
        ignore_case: bool,
        sql: &mut String,
        arguments: &mut Arguments<'_>,
    ) {
        let (name, function) = (quote(&column.name), if ignore_case { ILIKE } else { LIKE });
        let range = range(pattern).filter(|_| !ignore_case);
        let condition = match range {
            Some(_) => format!("({name} >= ? AND {name} < ? AND {function}({name}, ?))"),
            None => format!("{function}({name}, ?)"),
        };
        sql.push_str(&condition);
        let texts = range.into_iter().flat_map(|(first, next)| [first, next]).chain([pattern.to_owned()]);
        arguments.extend(texts.map(|text| Argument::One(Cow::Owned(Literal::Text(text)))));
    }

    fn push_test<'a>(&'a self, column: &Column, sql: &mut String, arguments: &mut Arguments<'a>) {
        push_quoted(sql, &column.name);
        sql.push_str(collate(column.kind));
        match &self.test {
            Test::Compare(comparison, literal) => {
                sql.push_str(comparison.sql());
                arguments.push(Argument::One(Cow::Borrowed(literal)));
            }
            Test::In(literals) => {
                sql.push_str(" IN (SELECT value FROM rarray(?))");
                arguments.push(Argument::List(Rc::new(literals.iter().map(Value::from).collect())));
            }
            Test::Like { .. } => unreachable!("it is written by `push_like`"),
            Test::IsNull => sql.push_str(" IS NULL"),
            Test::IsNotNull => sql.push_str(" IS NOT NULL"),
            Test::Is(true) => sql.push_str(" IS 1"),
            Test::Is(false) => sql.push_str(" IS 0"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_is_all_of_it_and_by_equality() {
        let column = |name: &str, kind| Column { name: name.into(), kind, nullable: false };
        let schema = |kind| ViewSchema {
            name: "v".into(),
            columns: vec![column("a", ColumnType::Text), column("b", kind), column("c", ColumnType::Text)],
            key: vec!["a".into(), "b".into()],
            indexes: Vec::new(),
        };
        let is = |kind, filters: &[(usize, bool, Comparison)]| {
            let filter = |&(column, negated, comparison)| Filter {
                column,
                negated,
                test: Test::Compare(comparison, Literal::Integer(1)),
            };
            let select = Select { filters: filters.iter().map(filter).collect(), ..Select::default() };
            select.is_of_one_key(&schema(kind))
        };
        use Comparison::*;
        let (a, b) = ((0, false, Equal), (1, false, Equal));
        assert!(is(ColumnType::Integer, &[a, b]));
        assert!(is(ColumnType::Integer, &[b, (2, false, Equal), a]));
        assert!(!is(ColumnType::Integer, &[a]));
        assert!(!is(ColumnType::Integer, &[]));
        assert!(!is(ColumnType::Integer, &[a, (1, true, Equal)]));
        assert!(!is(ColumnType::Integer, &[a, (1, false, GreaterOrEqual)]));
        assert!(!is(ColumnType::Integer, &[a, b, (2, false, NotEqual)]));
        assert!(!is(ColumnType::Decimal, &[a, b]), "the index is in the order of the text");
    }

    #[test]
    fn a_column_is_read_and_orders_once() {
        let column = |name: &str| Column { name: name.into(), kind: ColumnType::Text, nullable: false };
        let schema = ViewSchema {
            name: "v".into(),
            columns: vec![column("a"), column("b")],
            key: vec!["a".into()],
            indexes: Vec::new(),
        };
        let output = |n: usize| Output { name: format!("c{n}"), column: usize::from(!n.is_multiple_of(3)) };
        let order = |n: usize| Order { column: 1, descending: n.is_multiple_of(2), nulls_first: false };
        let select = Select {
            columns: (0..3_000).map(output).collect(),
            order: (0..3_000).map(order).collect(),
            ..Select::all(&schema, 1)
        };
        assert_eq!(select.sources().1[..4], [0, 1, 1, 0]);
        let sql = r#"SELECT "a", "b" FROM "v" ORDER BY "b" DESC, "a" LIMIT 1 OFFSET ?"#;
        assert_eq!(select.rows_sql(&schema).0, sql);
    }

    #[test]
    fn literals_by_column_type() {
        use ColumnType::*;
        let text = |text: &str| Some(Literal::Text(text.into()));
        for (kind, written, expected) in [
            (Text, "", text("")),
            (Integer, "-9223372036854775808", Some(Literal::Integer(i64::MIN))),
            (Integer, "1.0", None),
            (Real, "1e3", Some(Literal::Real(1000.0))),
            (Real, "inf", None),
            (Boolean, "true", Some(Literal::Integer(1))),
            (Boolean, "yes", None),
            (Bytes, "_-8=", Some(Literal::Blob(vec![255, 239]))),
            (Bytes, "a", None),
            (Timestamp, "2013-01-01T10:15:00.5+02:00", text("2013-01-01T08:15:00.500000Z")),
            (Timestamp, "2013-01-01", text("2013-01-01T00:00:00.000000Z")),
            (Timestamp, "2013-01-01T10:15", text("2013-01-01T10:15:00.000000Z")),
            (Timestamp, "9999-12-31", text("9999-12-31T00:00:00.000000Z")),
            (Timestamp, "yesterday", None),
            (Uuid, "67E5504410B1426F9247BB680E5FE0C8", text("67e55044-10b1-426f-9247-bb680e5fe0c8")),
            (Uuid, "67e5", None),
            (Decimal, "-12.50", text("-12.50")),
            (Decimal, "1e3", None),
            (Decimal, "1.", None),
            (Json, "{}", None),
        ] {
            let column = Column { name: "c".into(), kind, nullable: true };
            let parsed = Literal::parse(&column, written);
            let error = parsed.as_ref().err().map(ToString::to_string);
            assert!(error.is_none_or(|e| e.contains("column \"c\" is")), "{kind:?} {written}");
            assert_eq!(parsed.ok(), expected, "{kind:?} {written}");
        }
    }

    #[test]
    fn decimals_are_ordered_as_numbers() {
        let ascending =
            ["-100", "-12.50", "-1.001", "-1", "0", "0.05", "0.5", "1", "1.5", "2", "10", "1000000000000000000000000"];
        for (i, a) in ascending.iter().enumerate() {
            for (j, b) in ascending.iter().enumerate() {
                assert_eq!(compare_decimals(a, b), i.cmp(&j), "{a} {b}");
            }
        }
        for (a, b) in [("1.50", "1.5"), ("007", "7"), ("-0.0", "0"), ("-01.10", "-1.1")] {
            assert_eq!(compare_decimals(a, b), Ordering::Equal, "{a} {b}");
        }
        assert_eq!(compare_decimals("99", "n/a"), Ordering::Less);
        assert_eq!(compare_decimals("n/a", "99"), Ordering::Greater);
    }
}
