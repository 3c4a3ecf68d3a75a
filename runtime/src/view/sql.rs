//! SQL over all live views: an in-memory database to which the files of the views that a statement names are attached,
//! read-only. Views of several projections can be joined; each is read as of its own last commit. It works on the files
//! themselves, whether or not a runtime runs.

use std::collections::BTreeSet;
use std::path::Path;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, Column, Connection, Executor, SqlSafeStr, SqliteConnection, Statement};

use super::GenerationRecord;
use super::readers::{Error, Value, each_row, with_collations};
use super::row::quote;
use crate::config::limits;

/// What of a path can stand in an SQLite URI as it is.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_');

/// A part of an answer.
pub enum Part<'a> {
    /// The names of the columns; comes once and before any row, also if there are no rows.
    Columns(Vec<&'a str>),
    /// The values of a row.
    Row(&'a [Value<'a>]),
}

/// Runs one read-only statement. `each` gets the answer part by part; its first error ends the query.
pub async fn query(
    live: &[GenerationRecord],
    sql: &str,
    mut each: impl FnMut(Part<'_>) -> Result<(), Error> + Send,
) -> Result<(), Error> {
    let names = identifiers(sql)?;
    let used: Vec<_> = live.iter().filter(|l| uses(&names, l)).collect();
    if used.len() > limits::ATTACHED {
        let projections: Vec<_> = used.iter().map(|l| l.projection.as_str()).collect();
        return Err(Error::Refused(format!(
            "the statement names views of {} projections ({}); one statement can read {}, so split it",
            used.len(),
            projections.join(", "),
            limits::ATTACHED
        )));
    }
    let options = with_collations(SqliteConnectOptions::new().in_memory(true).create_if_missing(true));
    let mut connection = SqliteConnection::connect_with(&options).await?;
    for generation in used {
        attach(&mut connection, generation).await?;
    }
    // The files are attached read-only anyway; this is for the in-memory database, where a table would vanish unseen.
    connection.execute("PRAGMA query_only = ON").await?;
    let statement = (&mut connection)
        .prepare(AssertSqlSafe(sql).into_sql_str())
        .await
        .map_err(|error| explain(Error::from(error), live))?;
    each(Part::Columns(statement.columns().iter().map(|c| c.name()).collect()))?;
    let rows = sqlx::query(AssertSqlSafe(sql)).persistent(false).fetch(&mut connection);
    each_row(rows, &mut |row: &[Value<'_>]| each(Part::Row(row))).await.map_err(|error| explain(error, live))
}

async fn attach(connection: &mut SqliteConnection, generation: &GenerationRecord) -> Result<(), Error> {
    let alias = match generation.projection.as_str() {
        // SQLite's own names.
        name @ ("main" | "temp") => format!("projection_{name}"),
        name => name.to_owned(),
    };
    sqlx::query(AssertSqlSafe(format!("ATTACH DATABASE ? AS {}", quote(&alias))))
        .bind(uri(&generation.file)?)
        .execute(connection)
        .await?;
    Ok(())
}

fn uri(file: &Path) -> Result<String, Error> {
    let path = file.to_str().ok_or_else(|| Error::Database(format!("the path {file:?} is not UTF-8")))?;
    Ok(format!("file:{}?mode=ro", utf8_percent_encode(path, PATH)))
}

/// True if the statement names the projection or one of its views. SQL's names ignore case.
fn uses(names: &BTreeSet<String>, generation: &GenerationRecord) -> bool {
    names.contains(&generation.projection) || generation.manifest.views.iter().any(|v| names.contains(&v.name))
}

/// SQLite's errors in the words of views.
fn explain(error: Error, live: &[GenerationRecord]) -> Error {
    match error {
        Error::Database(message) => {
            if let Some(table) = message.split("no such table: ").nth(1) {
                return Error::Refused(format!("there is no view {table:?}; {}", list(live)));
            }
            if message.contains("readonly database") {
                return Error::Refused("queries are read-only; views change only by events".into());
            }
            Error::Refused(message)
        }
        other => other,
    }
}

fn list(live: &[GenerationRecord]) -> String {
    let mut views: Vec<_> = live.iter().flat_map(|l| &l.manifest.views).map(|v| v.name.as_str()).collect();
    views.sort_unstable();
    match views.is_empty() {
        true => "there are no views yet".into(),
        false => format!("the views are {}", views.join(", ")),
    }
}

/// All words of a statement that could be names, in lower case: also keywords, but no strings and no comments. Refuses
/// a second statement, whose rows would have other columns.
fn identifiers(sql: &str) -> Result<BTreeSet<String>, Error> {
    let mut names = BTreeSet::new();
    let mut rest = sql;
    let mut ended = false;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '-' if rest.starts_with("--") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => rest[2..].find("*/").map_or(rest.len(), |end| end + 4),
            '\'' | '"' | '`' => quoted_length(rest, c),
            '[' => rest.find(']').map_or(rest.len(), |end| end + 1),
            c if is_word(c) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            c => c.len_utf8(),
        };
        let (token, after) = rest.split_at(length);
        let comment = token.starts_with("--") || token.starts_with("/*");
        if ended && !comment && !c.is_whitespace() && c != ';' {
            return Err(Error::Refused("only one statement can be run at a time".into()));
        }
        match c {
            ';' => ended = true,
            '"' | '`' | '[' => _ = names.insert(token[1..].trim_end_matches(['"', '`', ']']).to_lowercase()),
            c if is_word(c) => _ = names.insert(token.to_lowercase()),
            _ => {}
        }
        rest = after;
    }
    Ok(names)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '$'
}

/// The length of a quoted token with both quotes; a doubled quote inside is part of it. Without an end it goes to the
/// end, which SQLite then complains about.
fn quoted_length(text: &str, quote: char) -> usize {
    let mut end = 1;
    loop {
        match text[end..].find(quote) {
            None => return text.len(),
            Some(at) if text[end + at + 1..].starts_with(quote) => end += at + 2,
            Some(at) => return end + at + 1,
        }
    }
}
