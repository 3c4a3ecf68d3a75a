//! Connections to the files of live views, for reading: pools, snapshots, deadlines.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use sqlx::pool::PoolConnection;
use sqlx::sqlite::{Sqlite, SqliteConnectOptions, SqlitePool, SqlitePoolOptions, SqliteRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Decode, Row, SqliteConnection, TypeInfo, ValueRef};

use super::query::{DECIMAL, Select, compare_decimals};
use crate::config::limits;
use crate::manifest::ViewSchema;
use crate::model::{Checkpoint, Position, Time};

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The query itself is wrong: a sentence for whoever wrote it.
    #[error("{0}")]
    Refused(String),
    /// The generation's file is not there: another one was promoted in the meantime.
    #[error("the view's file cannot be opened; if a rebuild has just been promoted, ask again")]
    Gone,
    /// It took longer than [`limits::QUERY_TIME`].
    #[error("the query took longer than {} seconds; filter by the key or by an indexed column", limits::QUERY_TIME.as_secs())]
    TooSlow,
    /// The rows have more than [`limits::ANSWER_BYTES`].
    #[error("the answer has more than {} MiB; ask for fewer rows or columns", limits::ANSWER_BYTES >> 20)]
    TooLarge,
    /// All readers' connections were taken for [`limits::QUERY_TIME`].
    #[error("all {} readers of this view are busy; try again later", limits::READERS)]
    Busy,
    /// Whoever was to get the rows did not take them.
    #[error("cannot write the rows")]
    Output(#[source] std::io::Error),
    /// SQLite failed in another way.
    #[error("SQLite: {0}")]
    Database(String),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Error {
        let code = error.as_database_error().and_then(|e| e.code()).and_then(|c| c.parse::<u32>().ok());
        // The low byte of an extended code is its kind.
        match (&error, code.map(|c| c & 0xff)) {
            (sqlx::Error::PoolTimedOut, _) => Error::Busy,
            (_, Some(SQLITE_INTERRUPT)) => Error::TooSlow,
            (_, Some(SQLITE_CANTOPEN)) => Error::Gone,
            (sqlx::Error::Database(e), _) => Error::Database(e.message().to_owned()),
            _ => Error::Database(error.to_string()),
        }
    }
}

const SQLITE_INTERRUPT: u32 = 9;
const SQLITE_CANTOPEN: u32 = 14;

/// A value as SQLite has it.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(missing_docs, reason = "they are SQLite's storage classes")]
pub enum Value<'a> {
    Null,
    Integer(i64),
    Real(f64),
    Text(&'a str),
    Blob(&'a [u8]),
}

/// What was found besides the rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The position to which the rows are complete.
    pub checkpoint: Checkpoint,
    /// How many rows the filters select, if that was asked for.
    pub total: Option<u64>,
}

/// Where a live view is: a projection's generation and its file.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Place<'a> {
    pub projection: &'a str,
    pub generation: u64,
    pub file: &'a Path,
}

/// Readers' connections to the live generations' files: a pool for each, opened when it is first needed.
#[derive(Default)]
pub struct Readers {
    pools: Mutex<HashMap<(String, u64), SqlitePool>>,
}

impl Readers {
    /// Runs a query. `row` gets each row; the first error that it returns ends the query. Only the queries of a live
    /// generation should be asked for: `live` says which pools may stay open when a new one is opened.
    pub async fn select(
        &self,
        place: Place<'_>,
        schema: &ViewSchema,
        select: &Select,
        live: impl Fn(&str, u64) -> bool + Send,
        mut row: impl FnMut(&[Value<'_>]) -> Result<(), Error> + Send,
    ) -> Result<Found, Error> {
        let pool = self.pool(place, live);
        let mut connection = pool.acquire().await?;
        set_deadline(&mut connection, limits::QUERY_TIME).await?;
        // Deferred: SQLite takes its snapshot with the first read, which is the checkpoint's.
        let mut transaction = connection.begin().await?;
        let checkpoint = checkpoint(&mut transaction).await?;
        let mut total = None;
        if select.count {
            let (sql, arguments) = select.count_sql(schema);
            let count: i64 =
                sqlx::query_scalar_with(AssertSqlSafe(sql), arguments).fetch_one(&mut *transaction).await?;
            total = Some(count.unsigned_abs());
        }
        let (sql, arguments) = select.rows_sql(schema);
        each_row(sqlx::query_with(AssertSqlSafe(sql), arguments).fetch(&mut *transaction), &mut row).await?;
        transaction.rollback().await?;
        Ok(Found { checkpoint, total })
    }

    fn pool(&self, place: Place<'_>, live: impl Fn(&str, u64) -> bool) -> SqlitePool {
        let mut pools = self.pools.lock().expect("nothing panics while holding it");
        let key = (place.projection.to_owned(), place.generation);
        if let Some(pool) = pools.get(&key) {
            return pool.clone();
        }
        pools.retain(|(projection, generation), _| live(projection, *generation));
        let pool = SqlitePoolOptions::new()
            .max_connections(limits::READERS)
            .acquire_timeout(limits::QUERY_TIME)
            // An idle pool of a generation that was dropped would keep its file's disk space.
            .idle_timeout(Duration::from_secs(30))
            .connect_lazy_with(read_only(place.file));
        pools.insert(key, pool.clone());
        pool
    }
}

/// How far a generation's file has come: source, position, and the time of the event there.
pub async fn read_marks(file: &Path) -> Result<Vec<(String, Position, Time)>, Error> {
    let mut connection = SqliteConnection::connect_with(&read_only(file)).await?;
    let rows: Vec<(String, i64, i64)> =
        sqlx::query_as("SELECT source, position, time FROM _shadowbox_checkpoint").fetch_all(&mut connection).await?;
    connection.close().await?;
    let mark = |(source, position, time): (String, i64, i64)| {
        (source, Position(position as u64), Time::from_microseconds(time).unwrap_or(Time::EPOCH))
    };
    Ok(rows.into_iter().map(mark).collect())
}

async fn checkpoint(connection: &mut SqliteConnection) -> Result<Checkpoint, Error> {
    let rows: Vec<(String, i64)> =
        sqlx::query_as("SELECT source, position FROM _shadowbox_checkpoint").fetch_all(connection).await?;
    // Positions are stored as SQLite's signed integers, bit for bit.
    Ok(rows.into_iter().map(|(source, position)| (source, Position(position as u64))).collect())
}

/// Calls `row` for each row, with values by their storage class.
pub(super) async fn each_row(
    mut rows: impl futures_util::Stream<Item = Result<SqliteRow, sqlx::Error>> + Unpin,
    row: &mut (impl FnMut(&[Value<'_>]) -> Result<(), Error> + Send),
) -> Result<(), Error> {
    while let Some(found) = rows.try_next().await? {
        let mut values = Vec::with_capacity(found.len());
        for i in 0..found.len() {
            values.push(value(&found, i)?);
        }
        row(&values)?;
    }
    Ok(())
}

fn value(row: &SqliteRow, i: usize) -> Result<Value<'_>, Error> {
    let raw = row.try_get_raw(i)?;
    if raw.is_null() {
        return Ok(Value::Null);
    }
    let kind = raw.type_info().into_owned();
    let decoded = match kind.name() {
        "INTEGER" => Decode::<Sqlite>::decode(raw).map(Value::Integer),
        "REAL" => Decode::<Sqlite>::decode(raw).map(Value::Real),
        "TEXT" => Decode::<Sqlite>::decode(raw).map(Value::Text),
        _ => Decode::<Sqlite>::decode(raw).map(Value::Blob),
    };
    decoded.map_err(|e| Error::Database(e.to_string()))
}

/// Options of every connection that reads views.
pub(super) fn read_only(file: &Path) -> SqliteConnectOptions {
    with_collations(SqliteConnectOptions::new().filename(file).read_only(true))
}

/// Slow statements are the reader's own affair, which has its deadline; sqlx would log each of them.
pub(super) fn with_collations(options: SqliteConnectOptions) -> SqliteConnectOptions {
    let options = options.disable_statement_logging();
    options.busy_timeout(limits::DATABASE_BUSY).collation(DECIMAL, compare_decimals)
}

/// Interrupts whatever runs on the connection after that time. The next call replaces the deadline.
async fn set_deadline(connection: &mut PoolConnection<Sqlite>, time: Duration) -> Result<(), Error> {
    /// SQLite's virtual instructions between two looks at the clock: some tens of microseconds.
    const INSTRUCTIONS: i32 = 10_000;
    let deadline = Instant::now() + time;
    connection.lock_handle().await?.set_progress_handler(INSTRUCTIONS, move || Instant::now() < deadline);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Column, ColumnType};
    use crate::view::query::{Comparison, Filter, Literal, Order, Test};

    fn schema() -> ViewSchema {
        let column = |name: &str, kind, nullable| Column { name: name.into(), kind, nullable };
        ViewSchema {
            // Keywords, because names are only checked for their characters.
            name: "order".into(),
            columns: vec![
                column("group", ColumnType::Text, false),
                column("n", ColumnType::Integer, true),
                column("price", ColumnType::Decimal, true),
            ],
            key: vec!["group".into()],
            indexes: Vec::new(),
        }
    }

    /// A generation's file with a few rows; the folder goes when it is dropped.
    fn generation() -> (tempfile::TempDir, std::path::PathBuf, rusqlite::Connection) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a view?#%.sqlite");
        let writer = rusqlite::Connection::open(&file).unwrap();
        writer
            .execute_batch(
                "PRAGMA journal_mode = WAL;
                 CREATE TABLE _shadowbox_checkpoint (source TEXT PRIMARY KEY, position INTEGER NOT NULL, time INTEGER NOT NULL);
                 INSERT INTO _shadowbox_checkpoint VALUES ('s', 7, 1000000);
                 CREATE TABLE \"order\" (\"group\" TEXT NOT NULL, n INTEGER, price TEXT, PRIMARY KEY (\"group\")) STRICT, WITHOUT ROWID;
                 INSERT INTO \"order\" VALUES ('a', 1, '10.5'), ('b', 2, '9'), ('B*', NULL, NULL), ('c', 2, '10.50');",
            )
            .unwrap();
        (folder, file, writer)
    }

    async fn select(readers: &Readers, file: &Path, select: &Select) -> Result<(Vec<String>, Found), Error> {
        let schema = schema();
        let mut keys = Vec::new();
        let place = Place { projection: "p", generation: 1, file };
        let found = readers.select(
            place,
            &schema,
            select,
            |_, _| true,
            |row| {
                let Value::Text(key) = row[0] else { panic!("{row:?}") };
                keys.push(key.to_owned());
                Ok(())
            },
        );
        let found = found.await?;
        Ok((keys, found))
    }

    /// Checks the keys of the rows that filters and an order give.
    async fn check(filters: &[(usize, bool, Test)], order: &[Order], expected: &[&str]) {
        let (_folder, file, _writer) = generation();
        let filters = filters.iter().cloned().map(|(column, negated, test)| Filter { column, negated, test });
        let query =
            Select { filters: filters.collect(), order: order.to_vec(), count: true, ..Select::all(&schema(), 100) };
        let (keys, found) = select(&Readers::default(), &file, &query).await.unwrap();
        assert_eq!(keys, expected, "{query:?}");
        assert_eq!(found.total, Some(expected.len() as u64));
        assert_eq!(found.checkpoint.to_string(), "s=7");
    }

    fn order(column: usize, descending: bool, nulls_first: bool) -> Order {
        Order { column, descending, nulls_first }
    }

    #[tokio::test]
    async fn filters() {
        let text = |text: &str| Literal::Text(text.into());
        let like = |pattern: &str, ignore_case| Test::Like { pattern: pattern.into(), ignore_case };
        let all = ["B*", "a", "b", "c"];
        check(&[], &[], &all).await;
        check(&[(1, false, Test::Compare(Comparison::Equal, Literal::Integer(2)))], &[], &["b", "c"]).await;
        // As in SQL, what is absent is neither equal nor different.
        check(&[(1, false, Test::Compare(Comparison::NotEqual, Literal::Integer(2)))], &[], &["a"]).await;
        check(&[(1, true, Test::Compare(Comparison::Equal, Literal::Integer(2)))], &[], &["a"]).await;
        check(&[(1, false, Test::IsNull)], &[], &["B*"]).await;
        check(&[(1, true, Test::IsNull)], &[], &["a", "b", "c"]).await;
        check(&[(1, false, Test::IsNotNull)], &[], &["a", "b", "c"]).await;
        check(&[(2, false, Test::Compare(Comparison::Equal, text("10.50")))], &[], &["a", "c"]).await;
        check(&[(2, false, Test::Compare(Comparison::Greater, text("9")))], &[], &["a", "c"]).await;
        check(&[(2, false, Test::In(vec![text("9.00"), text("1")]))], &[], &["b"]).await;
        check(&[(0, false, Test::In(Vec::new()))], &[], &[]).await;
        check(&[(0, true, Test::In(Vec::new()))], &[], &all).await;
        check(&[(0, false, like("b%", false))], &[], &["b"]).await;
        check(&[(0, false, like("b%", true))], &[], &["B*", "b"]).await;
        check(&[(0, false, like("%\\*", false))], &[], &["B*"]).await;
    }

    #[tokio::test]
    async fn orders_end_with_the_key() {
        check(&[], &[order(1, false, false)], &["a", "b", "c", "B*"]).await;
        check(&[], &[order(1, true, true)], &["B*", "c", "b", "a"]).await;
        check(&[], &[order(2, false, true)], &["B*", "b", "a", "c"]).await;
        check(&[], &[order(2, true, false), order(0, false, false)], &["a", "c", "b", "B*"]).await;
    }

    #[tokio::test]
    async fn pages_and_what_is_there() {
        let (_folder, file, writer) = generation();
        let readers = Readers::default();
        let page = Select { offset: 1, limit: 2, count: true, ..Select::all(&schema(), 2) };
        let (keys, found) = select(&readers, &file, &page).await.unwrap();
        assert_eq!((keys, found.total), (vec!["a".to_owned(), "b".to_owned()], Some(4)));

        writer.execute_batch("BEGIN; DELETE FROM \"order\"; UPDATE _shadowbox_checkpoint SET position = 8;").unwrap();
        let (keys, found) = select(&readers, &file, &page).await.unwrap();
        assert_eq!((keys.len(), found.checkpoint.to_string().as_str()), (2, "s=7"), "nothing is committed yet");
        writer.execute_batch("COMMIT").unwrap();
        let (keys, found) = select(&readers, &file, &page).await.unwrap();
        assert_eq!((keys.len(), found.checkpoint.to_string().as_str()), (0, "s=8"));
        assert_eq!(
            read_marks(&file).await.unwrap(),
            [("s".to_owned(), Position(8), Time::from_microseconds(1_000_000).unwrap())]
        );
    }

    #[tokio::test]
    async fn errors_have_types() {
        let (folder, file, _writer) = generation();
        let readers = Readers::default();
        let all = Select::all(&schema(), 10);
        let gone = select(&readers, &folder.path().join("gone.sqlite"), &all).await;
        assert!(matches!(gone, Err(Error::Gone)), "{gone:?}");
        let place = Place { projection: "q", generation: 1, file: &file };
        let ended = readers.select(place, &schema(), &all, |_, _| true, |_| Err(Error::TooLarge)).await;
        assert!(matches!(ended, Err(Error::TooLarge)), "{ended:?}");

        let pool = readers.pool(place, |_, _| true);
        let mut connection = pool.acquire().await.unwrap();
        set_deadline(&mut connection, Duration::ZERO).await.unwrap();
        let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";
        let slow = sqlx::query(endless).fetch_one(&mut *connection).await.map(drop).map_err(Error::from);
        assert!(matches!(slow, Err(Error::TooSlow)), "{slow:?}");
    }

    #[tokio::test]
    async fn pools_of_former_generations_are_dropped() {
        let (_folder, file, _writer) = generation();
        let readers = Readers::default();
        for generation in 1..=3 {
            readers.pool(Place { projection: "p", generation, file: &file }, |_, g| g >= 2);
        }
        let mut open: Vec<_> = readers.pools.lock().unwrap().keys().map(|(_, g)| *g).collect();
        open.sort_unstable();
        assert_eq!(open, [2, 3]);
    }
}
