//! Connections to the files of live views, for reading: pools, snapshots, deadlines.
//!
//! rusqlite instead of a pool of sqlx: there, each step of a query (begin, checkpoint, rows, end) is a message to another
//! thread and back, which costs several times what looking up a row does. Here a query is one function. It runs where
//! blocking is allowed; the row of one key is looked up at once, because even waking another thread costs more.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use rusqlite::functions::{Context, FunctionFlags};
use rusqlite::types::ValueRef;
use rusqlite::vtab::array;
use rusqlite::{CachedStatement, Connection, ErrorCode, OpenFlags, StatementStatus, ffi, params_from_iter};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::generation::stored_checkpoint;
use super::pattern::Pattern;
use super::query::{Arguments, DECIMAL, ILIKE, LIKE, Select, compare_decimals};
use crate::config::limits;
use crate::manifest::ViewSchema;
use crate::model::Position;

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
    /// All places for such a query were taken for [`limits::QUERY_TIME`].
    #[error(
        "this view is busy: {} queries run, {} of them may take long; try again later",
        limits::READERS,
        limits::READERS_LONG
    )]
    Busy,
    /// Whoever was to get the rows did not take them.
    #[error("cannot write the rows")]
    Output(#[source] std::io::Error),
    /// The generation's file is not what was written.
    #[error("the view's file is damaged ({0}); rebuild the projection")]
    Damaged(String),
    /// SQLite failed in another way.
    #[error("SQLite: {0}")]
    Database(String),
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Error {
        match (error.sqlite_error_code(), error) {
            (Some(ErrorCode::OperationInterrupted), _) => Error::TooSlow,
            (Some(ErrorCode::CannotOpen), _) => Error::Gone,
            (Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase), error) => Error::Damaged(error.to_string()),
            (_, rusqlite::Error::SqliteFailure(_, Some(message))) => Error::Database(message),
            (_, rusqlite::Error::SqlInputError { msg, .. }) => Error::Database(msg),
            (_, error) => Error::Database(error.to_string()),
        }
    }
}

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
    /// The checkpoint of the rows; None before the first event, and for rows of the time before the log had one order.
    pub checkpoint: Option<Position>,
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
    pools: Mutex<HashMap<PathBuf, Arc<Pool>>>,
}

impl Readers {
    /// Runs a query. `row` is called for each row and puts it `into` what is returned; its first error ends the query.
    /// What has to wait in the middle begins anew, with another copy of `into`. Only the queries of a live generation
    /// should be asked for: `live` says which pools may stay open when a new one is opened. A caller that goes away ends
    /// the query, too.
    ///
    /// # Panics
    ///
    /// If `row` does.
    pub async fn select<T: Clone + Send + 'static>(
        &self,
        place: Place<'_>,
        schema: &Arc<ViewSchema>,
        select: Select,
        live: impl Fn(&str, u64) -> bool,
        mut into: T,
        mut row: impl FnMut(&mut T, &[Value<'_>]) -> Result<(), Error> + Send + 'static,
    ) -> Result<(Found, T), Error> {
        select.check(schema)?;
        let pool = self.pool(place, live);
        let keyed = select.is_of_one_key(schema);
        let mut lease = pool.lease(if keyed { &pool.keyed } else { &pool.places }).await?;
        let caller = Caller::default();
        if keyed && lease.reader.is_some() {
            let run = Run::new(caller.0.clone(), None);
            let found = lease.select(schema, &select, run, &mut |values| row(&mut into, values))?;
            return Ok((found.expect("it needs no turn"), into));
        }
        let select = Arc::new(select);
        let mut turn = None;
        loop {
            let quick = if keyed || turn.is_some() { None } else { Some((pool.quick, pool.long.clone())) };
            let run = Run::new(caller.0.clone(), quick);
            let (schema, select, mut rows) = (schema.clone(), select.clone(), into.clone());
            let query = tokio::task::spawn_blocking(move || {
                let found = lease.select(&schema, &select, run, &mut |values| row(&mut rows, values));
                (found.map(|found| found.map(|found| (found, rows))), row)
            });
            let answer = match query.await {
                Ok((answer, again)) => {
                    row = again;
                    answer?
                }
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_) => return Err(Error::Database("the runtime is stopping".into())),
                },
            };
            if let Some(answer) = answer {
                return Ok(answer);
            }
            turn = Some(acquire(&pool.long).await?);
            lease = pool.lease(&pool.places).await?;
        }
    }

    fn pool(&self, place: Place<'_>, live: impl Fn(&str, u64) -> bool) -> Arc<Pool> {
        let mut pools = self.pools.lock().expect("nothing panics while holding it");
        if let Some(pool) = pools.get(place.file) {
            return pool.clone();
        }
        pools.retain(|_, pool| live(&pool.projection, pool.generation));
        let pool = Arc::new(Pool::new(place, limits::QUICK_QUERY));
        tokio::spawn(close_idle(Arc::downgrade(&pool)));
        pools.insert(place.file.to_owned(), pool.clone());
        pool
    }
}

/// Tells a query, by being dropped, that nobody waits for it any more.
#[derive(Default)]
struct Caller(Arc<AtomicBool>);

impl Drop for Caller {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// The connections to one file.
struct Pool {
    projection: String,
    generation: u64,
    file: PathBuf,
    /// For reads by the whole key: nothing that takes long is before them.
    keyed: Arc<Semaphore>,
    /// For everything else.
    places: Arc<Semaphore>,
    /// Who has taken longer than `quick` needs one of these as well, or leaves its place and waits for one.
    long: Arc<Semaphore>,
    quick: Duration,
    /// With the time since when; the last one is taken first.
    idle: Mutex<Vec<(Reader, Instant)>>,
}

/// A connection that is not used for so long is closed: one to a generation that was dropped keeps its file's disk space.
const IDLE: Duration = Duration::from_secs(30);

/// Closes connections that are not used, as long as the pool is there.
async fn close_idle(pool: Weak<Pool>) {
    loop {
        tokio::time::sleep(IDLE).await;
        let Some(pool) = pool.upgrade() else { return };
        pool.idle.lock().expect("nothing panics while holding it").retain(|(_, since)| since.elapsed() < IDLE);
    }
}

/// Waits for a permit, as long as a query may take.
async fn acquire(permits: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Error> {
    if let Ok(permit) = permits.clone().try_acquire_owned() {
        return Ok(permit);
    }
    let permit = tokio::time::timeout(limits::QUERY_TIME, permits.clone().acquire_owned());
    Ok(permit.await.map_err(|_| Error::Busy)?.expect("it is never closed"))
}

impl Pool {
    fn new(place: Place<'_>, quick: Duration) -> Pool {
        Pool {
            projection: place.projection.to_owned(),
            generation: place.generation,
            file: place.file.to_owned(),
            keyed: Arc::new(Semaphore::new(limits::READERS_KEYED)),
            places: Arc::new(Semaphore::new(limits::READERS)),
            long: Arc::new(Semaphore::new(limits::READERS_LONG)),
            quick,
            idle: Mutex::default(),
        }
    }

    async fn lease(self: &Arc<Pool>, places: &Arc<Semaphore>) -> Result<Lease, Error> {
        let place = acquire(places).await?;
        let idle = self.idle.lock().expect("nothing panics while holding it").pop();
        Ok(Lease { reader: idle.map(|(reader, _)| reader), pool: self.clone(), _place: place })
    }
}

/// The right to use one connection of a pool.
struct Lease {
    /// None before the first use.
    reader: Option<Reader>,
    pool: Arc<Pool>,
    _place: OwnedSemaphorePermit,
}

impl Lease {
    /// None if the query has to wait for a turn among those that take long.
    fn select(
        &mut self,
        schema: &ViewSchema,
        select: &Select,
        run: Run,
        row: &mut dyn FnMut(&[Value<'_>]) -> Result<(), Error>,
    ) -> Result<Option<Found>, Error> {
        let result = self.try_select(schema, select, run, row);
        if !matches!(result, Ok(Some(_))) {
            // In the middle of its transaction it is of no use to the next reader.
            self.reader = None;
        }
        result.map_err(|error| match error {
            // A generation that was dropped under a reader fails in one of many ways.
            Error::Database(_) if !self.pool.file.exists() => Error::Gone,
            error => error,
        })
    }

    fn try_select(
        &mut self,
        schema: &ViewSchema,
        select: &Select,
        run: Run,
        row: &mut dyn FnMut(&[Value<'_>]) -> Result<(), Error>,
    ) -> Result<Option<Found>, Error> {
        let reader = match &mut self.reader {
            Some(reader) => reader,
            none => none.insert(Reader::open(&self.pool.file)?),
        };
        reader.bound.begin(run);
        let found = snapshot(&reader.connection, schema, select, row);
        match (found, reader.bound.end()) {
            (Err(Error::TooSlow), Some(Run { waits: true, .. })) => Ok(None),
            (found, _) => found.map(Some),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Not after a panic either.
        if let Some(reader) = self.reader.take().filter(|reader| reader.connection.is_autocommit()) {
            self.pool.idle.lock().expect("nothing panics while holding it").push((reader, Instant::now()));
        }
    }
}

/// A connection that reads a view's file, and what ends a query on it.
struct Reader {
    connection: Connection,
    bound: Arc<Bound>,
}

impl Reader {
    fn open(file: &Path) -> rusqlite::Result<Reader> {
        /// SQLite's virtual instructions between two looks at the clock: some tens of microseconds.
        const INSTRUCTIONS: i32 = 10_000;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = prepare(Connection::open_with_flags(file, flags)?)?;
        array::load_module(&connection)?;
        let bound = Arc::new(Bound::default());
        let within = bound.clone();
        connection.progress_handler(INSTRUCTIONS, Some(move || within.is_over()))?;
        for (name, ignore_case) in [(LIKE, false), (ILIKE, true)] {
            let within = bound.clone();
            let like = move |context: &Context<'_>| like(context, ignore_case, &within);
            let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC;
            connection.create_scalar_function(name, 2, flags, like)?;
        }
        Ok(Reader { connection, bound })
    }
}

/// A query that runs, and what it may.
struct Run {
    deadline: Instant,
    caller_is_gone: Arc<AtomicBool>,
    /// From when on it needs a turn, and where these are. None if it has one, or is bounded anyway.
    quick: Option<(Instant, Arc<Semaphore>)>,
    /// The turn that was free when it was needed, until the query ends.
    turn: Option<OwnedSemaphorePermit>,
    /// It was ended because none was.
    waits: bool,
}

impl Run {
    fn new(caller_is_gone: Arc<AtomicBool>, quick: Option<(Duration, Arc<Semaphore>)>) -> Run {
        let now = Instant::now();
        let quick = quick.map(|(time, turns)| (now + time, turns));
        Run { deadline: now + limits::QUERY_TIME, caller_is_gone, quick, turn: None, waits: false }
    }

    fn is_over(&mut self) -> bool {
        let now = Instant::now();
        if now >= self.deadline || self.caller_is_gone.load(Relaxed) {
            return true;
        }
        if let Some((_, turns)) = self.quick.take_if(|(until, _)| now >= *until) {
            self.turn = turns.try_acquire_owned().ok();
            self.waits = self.turn.is_none();
        }
        self.waits
    }
}

/// What ends the query that runs on a connection. SQLite asks between its instructions; one instruction that takes long
/// has to ask itself.
#[derive(Default)]
struct Bound(Mutex<Option<Run>>);

impl Bound {
    fn begin(&self, run: Run) {
        *self.0.lock().expect("nothing panics while holding it") = Some(run);
    }

    fn end(&self) -> Option<Run> {
        self.0.lock().expect("nothing panics while holding it").take()
    }

    fn is_over(&self) -> bool {
        self.0.lock().expect("nothing panics while holding it").as_mut().is_some_and(Run::is_over)
    }
}

/// Whether a text, the first argument, is as a pattern says, the second; null if there is no text.
fn like(context: &Context<'_>, ignore_case: bool, bound: &Bound) -> rusqlite::Result<Option<bool>> {
    // SQLite keeps it for the statement's other rows.
    let pattern = context.get_or_create_aux(1, |pattern| pattern.as_str().map(|p| Pattern::new(p, ignore_case)))?;
    let ValueRef::Text(text) = context.get_raw(0) else { return Ok(None) };
    match pattern.matches(&String::from_utf8_lossy(text), || bound.is_over()) {
        None => Err(rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_INTERRUPT), None)),
        found => Ok(found),
    }
}

/// The query in one transaction, so that checkpoint and rows belong together.
fn snapshot(
    connection: &Connection,
    schema: &ViewSchema,
    select: &Select,
    row: &mut dyn FnMut(&[Value<'_>]) -> Result<(), Error>,
) -> Result<Found, Error> {
    // Deferred: SQLite takes its snapshot with the first read, which is the checkpoint's.
    connection.prepare_cached("BEGIN DEFERRED")?.execute([])?;
    let checkpoint = stored_checkpoint(connection)?;
    let mut total = None;
    if select.count {
        let (sql, arguments) = select.count_sql(schema);
        let mut statement = connection.prepare_cached(&sql)?;
        let count: i64 = statement.query_row(params_from_iter(arguments), |row| row.get(0))?;
        keep(statement);
        total = Some(count.unsigned_abs());
    }
    let (sql, arguments) = select.rows_sql(schema);
    let (columns, sources) = select.sources();
    let mut each = |values: &[Value<'_>]| match columns.len() == sources.len() {
        true => row(values),
        false => row(&sources.iter().map(|source| values[*source]).collect::<Vec<_>>()),
    };
    let mut statement = connection.prepare_cached(&sql)?;
    each_row(&mut statement, arguments, &mut each)?;
    keep(statement);
    connection.prepare_cached("COMMIT")?.execute([])?;
    Ok(Found { checkpoint, total })
}

/// Leaves a statement to the next query of its shape, unless it takes too much memory for that.
fn keep(statement: CachedStatement<'_>) {
    let bytes = usize::try_from(statement.get_status(StatementStatus::MemUsed)).unwrap_or(usize::MAX);
    if bytes > limits::READER_STATEMENT_BYTES {
        statement.discard();
    }
}

/// Calls `row` for each row, with values by their storage class.
pub(super) fn each_row(
    statement: &mut rusqlite::Statement<'_>,
    arguments: Arguments<'_>,
    row: &mut dyn FnMut(&[Value<'_>]) -> Result<(), Error>,
) -> Result<(), Error> {
    let columns = statement.column_count();
    let mut rows = statement.query(params_from_iter(arguments))?;
    while let Some(found) = rows.next()? {
        let mut values = Vec::with_capacity(columns);
        for i in 0..columns {
            values.push(value(found.get_ref(i)?)?);
        }
        row(&values)?;
    }
    Ok(())
}

fn value(raw: ValueRef<'_>) -> Result<Value<'_>, Error> {
    Ok(match raw {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(value) => Value::Integer(value),
        ValueRef::Real(value) => Value::Real(value),
        ValueRef::Text(text) => Value::Text(std::str::from_utf8(text).map_err(|e| Error::Database(e.to_string()))?),
        ValueRef::Blob(bytes) => Value::Blob(bytes),
    })
}

/// What every connection that reads views has.
pub(super) fn prepare(connection: Connection) -> rusqlite::Result<Connection> {
    connection.busy_timeout(limits::DATABASE_BUSY)?;
    connection.create_collation(DECIMAL, compare_decimals)?;
    connection.set_prepared_statement_cache_capacity(limits::READER_STATEMENTS);
    Ok(connection)
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
                 CREATE TABLE _shadowbox_checkpoint (position INTEGER, appended INTEGER, fingerprint INTEGER, log TEXT);
                 INSERT INTO _shadowbox_checkpoint VALUES (7, 1000000, 0, 'log');
                 CREATE TABLE \"order\" (\"group\" TEXT NOT NULL, n INTEGER, price TEXT, PRIMARY KEY (\"group\")) STRICT, WITHOUT ROWID;
                 INSERT INTO \"order\" VALUES ('a', 1, '10.5'), ('b', 2, '9'), ('B*', NULL, NULL), ('c', 2, '10.50');",
            )
            .unwrap();
        (folder, file, writer)
    }

    async fn select(readers: &Readers, file: &Path, select: &Select) -> Result<(Vec<String>, Found), Error> {
        let place = Place { projection: "p", generation: 1, file };
        let key = |keys: &mut Vec<String>, row: &[Value<'_>]| {
            let Value::Text(key) = row[0] else { panic!("{row:?}") };
            keys.push(key.to_owned());
            Ok(())
        };
        let schema = Arc::new(schema());
        let found = readers.select(place, &schema, select.clone(), |_, _| true, Vec::new(), key);
        let (found, keys) = found.await?;
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
        assert_eq!(found.checkpoint, Some(Position(7)));
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
        check(&[(0, true, like("b%", false))], &[], &["B*", "a", "c"]).await;
        check(&[(2, false, like("1%", false))], &[], &["a", "c"]).await;
        check(&[(2, true, like("1%", true))], &[], &["b"]).await;
    }

    #[tokio::test]
    async fn patterns_know_every_letter_and_are_bounded() {
        let (_folder, file, writer) = generation();
        writer
            .execute_batch("INSERT INTO \"order\" VALUES ('Äpfel', 1, NULL), ('x' || char(0) || 'y', 1, NULL)")
            .unwrap();
        let (readers, schema) = (Readers::default(), schema());
        let rows = async |pattern: &str, ignore_case| {
            let filter =
                Filter { column: 0, negated: false, test: Test::Like { pattern: pattern.into(), ignore_case } };
            let query = Select { filters: vec![filter], ..Select::all(&schema, 100) };
            select(&readers, &file, &query).await.map(|(keys, _)| keys)
        };
        assert_eq!(rows("*äPFEL*", true).await.unwrap(), ["Äpfel"]);
        assert_eq!(rows("*y", false).await.unwrap(), ["x\0y"]);
        assert_eq!(rows("x", false).await.unwrap(), [""; 0]);
        assert!(rows(&"a".repeat(limits::PATTERN_BYTES), true).await.unwrap().is_empty());
        let refused = rows(&"a".repeat(limits::PATTERN_BYTES + 1), true).await.unwrap_err().to_string();
        assert_eq!(refused, "the pattern for column \"group\" has 4097 bytes; the limit is 4096");

        let like = Test::Like { pattern: "B%".into(), ignore_case: false };
        let filter = Filter { column: 0, negated: false, test: like };
        let many = |n| Select { filters: vec![filter.clone(); n], ..Select::all(&schema, 100) };
        assert_eq!(select(&readers, &file, &many(limits::FILTERS)).await.unwrap().0, ["B*"]);
        let refused = select(&readers, &file, &many(limits::FILTERS + 1)).await.unwrap_err().to_string();
        assert!(refused.starts_with("the query has 501 conditions; the limit is 500"), "{refused}");
    }

    #[tokio::test]
    async fn a_pattern_uses_the_key() {
        let (_folder, file, _writer) = generation();
        let reader = Reader::open(&file).unwrap();
        let filter =
            |ignore_case| Filter { column: 0, negated: false, test: Test::Like { pattern: "b%".into(), ignore_case } };
        for (ignore_case, plan) in
            [(false, "SEARCH order USING PRIMARY KEY (group>? AND group<?)"), (true, "SCAN order")]
        {
            let query = Select { filters: vec![filter(ignore_case)], ..Select::all(&schema(), 100) };
            assert_eq!(plan_of(&reader.connection, &query), [plan]);
        }
    }

    #[tokio::test]
    async fn lists_are_one_statement_in_the_order_and_by_the_index_of_one_that_is_written_out() {
        let (_folder, file, writer) = generation();
        writer.execute_batch("CREATE INDEX \"order.0\" ON \"order\" (n)").unwrap();
        let connection = Reader::open(&file).unwrap().connection;
        let list = |column, literals: Vec<Literal>| Select {
            filters: vec![Filter { column, negated: false, test: Test::In(literals) }],
            ..Select::all(&schema(), 100)
        };
        let statements: std::collections::HashSet<_> = (0..256)
            .flat_map(|n| [list(0, vec![Literal::Text("a".into()); n]), list(1, vec![Literal::Integer(1); n])])
            .map(|query| query.rows_sql(&schema()).0)
            .collect();
        assert_eq!(statements.len(), 2);
        for column in [0, 1] {
            let query = list(column, vec![Literal::Integer(1), Literal::Integer(2), Literal::Integer(3)]);
            let sql = query.rows_sql(&schema()).0.replace("SELECT value FROM rarray(?)", "?, ?, ?");
            let mut written = connection.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let written: Vec<String> =
                written.query_map([1, 2, 3, 0], |row| row.get(3)).unwrap().map(Result::unwrap).collect();
            let mut plan = plan_of(&connection, &query);
            plan.retain(|step| {
                !["LIST SUBQUERY", "SCAN rarray", "CREATE BLOOM FILTER"].iter().any(|own| step.starts_with(own))
            });
            assert_eq!(plan, written);
            assert!(plan[0].starts_with("SEARCH order USING"), "{plan:?}");
        }
    }

    #[tokio::test]
    async fn a_large_statement_is_not_kept() {
        let (_folder, file, _writer) = generation();
        let connection = Reader::open(&file).unwrap().connection;
        let filter = Filter { column: 1, negated: false, test: Test::Compare(Comparison::Less, Literal::Integer(1)) };
        for (filters, kept) in [(1, 1), (limits::FILTERS, 0)] {
            let query = Select { filters: vec![filter.clone(); filters], ..Select::all(&schema(), 100) };
            snapshot(&connection, &schema(), &query, &mut |_| Ok(())).unwrap();
            let statement = connection.prepare_cached(&query.rows_sql(&schema()).0).unwrap();
            assert_eq!(statement.get_status(StatementStatus::Run), kept, "{filters} conditions");
        }
    }

    /// What SQLite says that it does for the rows of a query.
    fn plan_of(connection: &Connection, query: &Select) -> Vec<String> {
        let schema = schema();
        let (sql, arguments) = query.rows_sql(&schema);
        let mut plan = connection.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        plan.query_map(params_from_iter(arguments), |row| row.get(3)).unwrap().map(Result::unwrap).collect()
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
        assert_eq!((keys.len(), found.checkpoint), (2, Some(Position(7))), "nothing is committed yet");
        writer.execute_batch("COMMIT").unwrap();
        let (keys, found) = select(&readers, &file, &page).await.unwrap();
        assert_eq!((keys.len(), found.checkpoint), (0, Some(Position(8))));
    }

    #[tokio::test]
    async fn rows_of_the_former_format_have_no_checkpoint() {
        let (_folder, file, writer) = generation();
        writer
            .execute_batch(
                "DROP TABLE _shadowbox_checkpoint;
                 CREATE TABLE _shadowbox_checkpoint (source TEXT PRIMARY KEY, position INTEGER, time INTEGER);
                 INSERT INTO _shadowbox_checkpoint VALUES ('s', 7, 1000000), ('t', 8, 1000000);",
            )
            .unwrap();
        let readers = Readers::default();
        for _ in 0..2 {
            let (keys, found) = select(&readers, &file, &Select::all(&schema(), 10)).await.unwrap();
            assert_eq!((keys.len(), found.checkpoint), (4, None));
        }
        writer.execute_batch("DROP TABLE _shadowbox_checkpoint").unwrap();
        let neither = select(&readers, &file, &Select::all(&schema(), 10)).await;
        assert!(matches!(neither, Err(Error::Database(_))), "{neither:?}");
    }

    #[tokio::test]
    async fn errors_have_types() {
        let (folder, file, _writer) = generation();
        let readers = Readers::default();
        let all = Select::all(&schema(), 10);
        let gone = select(&readers, &folder.path().join("gone.sqlite"), &all).await;
        assert!(matches!(gone, Err(Error::Gone)), "{gone:?}");
        let place = Place { projection: "q", generation: 1, file: &file };
        let too_large = |_: &mut (), _: &[Value<'_>]| Err(Error::TooLarge);
        let ended = readers.select(place, &Arc::new(schema()), all, |_, _| true, (), too_large).await;
        assert!(matches!(ended, Err(Error::TooLarge)), "{ended:?}");

        let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";
        for (deadline, caller_is_gone) in [(Duration::ZERO, false), (limits::QUERY_TIME, true)] {
            let reader = Reader::open(&file).unwrap();
            let run = Run::new(Arc::new(caller_is_gone.into()), None);
            reader.bound.begin(Run { deadline: Instant::now() + deadline, ..run });
            // Many instructions, and one.
            let one = "SELECT text_ilike(hex(zeroblob(4096)), '%1')";
            for sql in [endless, one] {
                let slow = reader.connection.query_row(sql, [], |_| Ok(())).map_err(Error::from);
                assert!(matches!(slow, Err(Error::TooSlow)), "{slow:?}");
            }
        }
    }

    #[tokio::test]
    async fn one_key_at_once_or_as_all_others() {
        let (_folder, file, _writer) = generation();
        let (readers, schema) = (Readers::default(), schema());
        let equal = |column, text: &str| Filter {
            column,
            negated: false,
            test: Test::Compare(Comparison::Equal, Literal::Text(text.into())),
        };
        for (key, price, rows) in [("b", None, 1), ("c", Some("10.5"), 1), ("c", Some("9"), 0), ("gone", None, 0)] {
            let filters = [Some(equal(0, key)), price.map(|price| equal(2, price))];
            let one =
                Select { filters: filters.into_iter().flatten().collect(), count: true, ..Select::all(&schema, 10) };
            assert!(one.is_of_one_key(&schema));
            // The same condition in words that are not looked up at once.
            let mut other = one.clone();
            other.filters[0].test = Test::In(vec![Literal::Text(key.into())]);
            assert!(!other.is_of_one_key(&schema));
            // The first query of a pool has to open the file, and does not run at once either.
            for _ in 0..2 {
                let found = select(&readers, &file, &one).await.unwrap();
                assert_eq!(found.0.len(), rows);
                assert_eq!(found, select(&readers, &file, &other).await.unwrap());
                assert_eq!(found, select(&Readers::default(), &file, &one).await.unwrap());
            }
        }
    }

    #[tokio::test]
    async fn what_takes_long_leaves_room_for_what_does_not() {
        let (_folder, file, writer) = generation();
        let long = "INSERT INTO \"order\" VALUES ('z' || hex(zeroblob(4096)), 1, NULL)";
        writer.execute_batch(long).unwrap();
        let readers = Arc::new(Readers::default());
        // Whoever is asked at all has taken long: texts like that one are matched in two steps.
        let place = Place { projection: "p", generation: 1, file: &file };
        let pool = Arc::new(Pool::new(place, Duration::ZERO));
        readers.pools.lock().unwrap().insert(file.clone(), pool.clone());
        let filter =
            |test| Select { filters: vec![Filter { column: 0, negated: false, test }], ..Select::all(&schema(), 100) };
        let slow = filter(Test::Like { pattern: "Z%0".into(), ignore_case: true });
        let short = filter(Test::In(vec![Literal::Text("a".into())]));
        let keyed = filter(Test::Compare(Comparison::Equal, Literal::Text("b".into())));

        let turns: Vec<_> = (0..limits::READERS_LONG).map(|_| pool.long.clone().try_acquire_owned().unwrap()).collect();
        let queries: Vec<_> = (0..3 * limits::READERS)
            .map(|_| {
                let (readers, file, slow) = (readers.clone(), file.clone(), slow.clone());
                tokio::spawn(async move { select(&readers, &file, &slow).await })
            })
            .collect();
        for _ in 0..10 {
            assert_eq!(select(&readers, &file, &short).await.unwrap().0, ["a"]);
        }
        assert!(queries.iter().all(|query| !query.is_finished()), "they wait");
        // A turn that is free is taken on the way, and given back.
        drop(turns);
        for query in queries {
            assert_eq!(query.await.unwrap().unwrap().0.len(), 1);
        }
        assert_eq!(pool.long.available_permits(), limits::READERS_LONG);

        let _places: Vec<_> = (0..limits::READERS).map(|_| pool.places.clone().try_acquire_owned().unwrap()).collect();
        for _ in 0..2 {
            assert_eq!(select(&readers, &file, &keyed).await.unwrap().0, ["b"]);
        }
    }

    #[tokio::test]
    async fn a_query_that_failed_leaves_nothing_behind() {
        let (_folder, file, writer) = generation();
        let readers = Readers::default();
        let place = Place { projection: "p", generation: 1, file: &file };
        for _ in 0..2 * limits::READERS {
            let row = |_: &mut (), _: &[Value<'_>]| Err(Error::TooLarge);
            let all = Select::all(&schema(), 10);
            let failed = readers.select(place, &Arc::new(schema()), all, |_, _| true, (), row).await;
            assert!(failed.is_err());
        }
        writer.execute_batch("UPDATE _shadowbox_checkpoint SET position = 8").unwrap();
        let (_, found) = select(&readers, &file, &Select::all(&schema(), 10)).await.unwrap();
        assert_eq!(found.checkpoint, Some(Position(8)));
        let checkpointed: i64 = writer.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0)).unwrap();
        assert_eq!(checkpointed, 0, "no snapshot is held");
    }

    #[tokio::test]
    async fn pools_of_former_generations_are_dropped() {
        let (_folder, file, _writer) = generation();
        let readers = Readers::default();
        for generation in 1..=3 {
            let file = file.with_extension(generation.to_string());
            readers.pool(Place { projection: "p", generation, file: &file }, |_, g| g >= 2);
        }
        let mut open: Vec<_> = readers.pools.lock().unwrap().values().map(|pool| pool.generation).collect();
        open.sort_unstable();
        assert_eq!(open, [2, 3]);
    }
}
