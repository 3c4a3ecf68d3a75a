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
