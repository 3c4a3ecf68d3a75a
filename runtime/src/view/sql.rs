//! SQL over all live views: an in-memory database to which the files of the views that a statement names are attached,
//! read-only. Views of several projections can be joined; each is read as of its own last commit. It works on the files
//! themselves, whether or not a runtime runs.

use std::collections::BTreeSet;
use std::path::Path;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rusqlite::Connection;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};

use super::GenerationRecord;
use super::query::Arguments;
use super::readers::{Error, Value, each_row, prepare};
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
pub fn query(
    live: &[GenerationRecord],
    sql: &str,
    mut each: impl FnMut(Part<'_>) -> Result<(), Error>,
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
    let connection = prepare(Connection::open_in_memory()?)?;
    for generation in used {
        attach(&connection, generation)?;
    }
    // The files are attached read-only anyway; this is for the in-memory database, where a table would vanish unseen.
    connection.pragma_update(None, "query_only", true)?;
    connection.authorizer(Some(authorize))?;
    let mut statement = connection.prepare(sql).map_err(|error| explain(Error::from(error), live))?;
    each(Part::Columns(statement.column_names()))?;
    let rows = each_row(&mut statement, Arguments::new(), &mut |row| each(Part::Row(row)));
    rows.map_err(|error| explain(error, live))
}

/// A query reads, and nothing else: `attach` and `vacuum into` would make files whatever is read-only.
fn authorize(context: AuthContext<'_>) -> Authorization {
    match context.action {
        AuthAction::Select | AuthAction::Read { .. } | AuthAction::Function { .. } | AuthAction::Recursive => {
            Authorization::Allow
        }
        // What pragma_table_info('view') and the like ask; without a value they change nothing.
        AuthAction::Pragma { pragma_name, .. } if TELLING.contains(&pragma_name) => Authorization::Allow,
        // A virtual table of SQLite's own, as these pragmas are: declaring it is making a table.
        _ => Authorization::Deny,
    }
}

/// Pragmas that tell about tables.
const TELLING: &[&str] =
    &["table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "database_list"];

fn attach(connection: &Connection, generation: &GenerationRecord) -> Result<(), Error> {
    let alias = match generation.projection.as_str() {
        // SQLite's own names.
        name @ ("main" | "temp") => format!("projection_{name}"),
        name => name.to_owned(),
    };
    connection.execute(&format!("ATTACH DATABASE ? AS {}", quote(&alias)), [uri(&generation.file)?])?;
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
            if message.contains("readonly database")
                || message.contains("not authorized")
                || message.contains("authorization denied")
            {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{CONTRACT, Manifest};
    use crate::view::Role;

    /// A live generation with the view `view (k, n)` and one row for each pair.
    fn live(folder: &Path, projection: &str, view: &str, rows: &str) -> GenerationRecord {
        let file = folder.join(format!("{projection}?.sqlite"));
        let writer = rusqlite::Connection::open(&file).unwrap();
        writer
            .execute_batch(&format!(
                "PRAGMA journal_mode = WAL; CREATE TABLE {view} (k TEXT PRIMARY KEY, n INTEGER) STRICT, WITHOUT ROWID;
                 INSERT INTO {view} VALUES {rows};"
            ))
            .unwrap();
        let manifest = serde_json::json!({
            "contract": CONTRACT, "projection": projection, "version": 1, "sources": [{"source": "s"}],
            "views": [{"name": view, "key": ["k"],
                "columns": [{"name": "k", "type": "text"}, {"name": "n", "type": "integer"}]}],
        });
        let manifest = Manifest::parse(&manifest.to_string()).unwrap();
        GenerationRecord {
            projection: projection.into(),
            number: 1,
            role: Role::Live,
            module: String::new(),
            manifest,
            file,
            promoted: None,
        }
    }

    fn run(live: &[GenerationRecord], sql: &str) -> Result<String, String> {
        let mut out = String::new();
        let result = query(live, sql, |part| {
            match part {
                Part::Columns(names) => out = names.join(","),
                Part::Row(values) => out += &format!(" {values:?}"),
            }
            Ok(())
        });
        result.map(|()| out).map_err(|e| e.to_string())
    }

    #[test]
    fn views_of_several_projections_are_joined() {
        let folder = tempfile::tempdir().unwrap();
        let generations = [
            live(folder.path(), "main", "flights", "('UA', 3), ('AA', 1)"),
            live(folder.path(), "carrier-names", "names", "('UA', 0)"),
        ];
        for (sql, expected) in [
            ("select f.n from Flights f join \"names\" using (k)", "n [Integer(3)]"),
            ("select k from flights where n > 5", "k"),
            ("select count(*) as n from flights; -- the end", "n [Integer(2)]"),
            ("select * from \"carrier-names\".names", "k,n [Text(\"UA\"), Integer(0)]"),
            ("select '10' > '9' as t, max('10' collate decimal, '9') as m", "t,m [Integer(0), Text(\"10\")]"),
        ] {
            assert_eq!(run(&generations, sql).as_deref(), Ok(expected), "{sql}");
        }
        for (sql, expected) in [
            ("select * from orders", "there is no view \"orders\"; the views are flights, names"),
            ("select x from flights", "no such column: x"),
            ("delete from flights", "queries are read-only"),
            ("create table t (x)", "queries are read-only"),
            ("create temp table t (x)", "queries are read-only"),
            ("pragma query_only = off", "queries are read-only"),
            ("pragma user_version = 1", "queries are read-only"),
            ("begin immediate", "queries are read-only"),
            ("select 1; select 2", "only one statement"),
            ("selec", "syntax error"),
        ] {
            let error = run(&generations, sql).unwrap_err();
            assert!(error.contains(expected), "{sql}: {error}");
        }
        assert!(run(&[], "select * from x").unwrap_err().contains("there are no views yet"));
    }

    #[test]
    fn no_statement_makes_a_file_and_tables_can_be_told_about() {
        let folder = tempfile::tempdir().unwrap();
        let generations = [live(folder.path(), "main", "flights", "('UA', 3)")];
        let file = folder.path().join("made.sqlite");
        let file = file.to_str().unwrap();
        for sql in [
            format!("attach '{file}' as made"),
            format!("attach database ('{file}') as made"),
            format!("attach 'file:{file}?mode=rwc' as made"),
            format!("vacuum into '{file}'"),
            format!("vacuum main into '{file}'"),
            "detach main".into(),
        ] {
            let error = run(&generations, &sql).unwrap_err();
            assert!(error.contains("queries are read-only"), "{sql}: {error}");
            assert!(!Path::new(file).exists(), "{sql}");
        }
        for (sql, expected) in [
            ("select name from pragma_table_info('flights') where 'flights' <> ''", "name"),
            (
                "with recursive n(i) as (select 1 union all select i + 1 from n limit 2) select i from n",
                "i [Integer(1)]",
            ),
            ("select k from (values (1)), flights group by k having count(*) > 0 order by k", "k [Text(\"UA\")]"),
            ("select value from json_each('[7]')", "value [Integer(7)]"),
            ("explain query plan select * from flights", "id,"),
            ("pragma database_list", "seq,"),
        ] {
            let found = run(&generations, sql);
            assert!(found.as_ref().is_ok_and(|found| found.starts_with(expected)), "{sql}: {found:?}");
        }
    }

    #[test]
    fn only_so_many_projections_in_one_statement() {
        let folder = tempfile::tempdir().unwrap();
        let generations: Vec<_> = (0..=limits::ATTACHED)
            .map(|i| live(folder.path(), &format!("p{i}"), &format!("v{i}"), "('a', 1)"))
            .collect();
        let union = |n: usize| (0..n).map(|i| format!("select n from v{i}")).collect::<Vec<_>>().join(" union all ");
        assert!(run(&generations, &union(limits::ATTACHED)).is_ok());
        let error = run(&generations, &union(limits::ATTACHED + 1)).unwrap_err();
        assert!(error.contains("views of 11 projections"), "{error}");
    }

    #[test]
    fn names_in_a_statement() {
        let sql = "SELECT a.\"b\"\"c\", [d e], `f`, 'g' -- h\n FROM i /* j */ WHERE k = 'l''m' AND é_1 > 2.5";
        let names = identifiers(sql).unwrap();
        for name in ["a", "d e", "f", "i", "k", "é_1"] {
            assert!(names.contains(name), "{name}: {names:?}");
        }
        for name in ["g", "h", "j", "l", "m"] {
            assert!(!names.contains(name), "{name}: {names:?}");
        }
    }
}
