//! Configuration in two stages: [`Written`] is what a person wrote (file and flags), [`Config`] is what the program
//! uses, complete and validated. Every default and every limit of Shadowbox is in this file, with its reason.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Limits that nobody has needed to change yet. They bound what a plugin, a producer or a reader can cost.
pub mod limits {
    use std::time::Duration;

    /// A manifest's JSON, bytes. The largest that 64 views of 256 columns can need is below this.
    pub const MANIFEST_BYTES: usize = 4 << 20;
    /// Views of one projection.
    pub const VIEWS: usize = 64;
    /// Columns of one view; well below SQLite's 2,000 and Postgres's 1,600.
    pub const COLUMNS: usize = 256;
    /// Subscriptions of one projection, each a pattern of sources: bits of a mask.
    pub const SOURCES: usize = 64;
    /// Event types that a projection names for one source. Each may be a glob, which is compiled.
    pub const TYPES: usize = 1_024;
    /// Secondary indexes of one view. Each is written with every row.
    pub const INDEXES: usize = 32;
    /// An encoded key, bytes. SQLite stores keys beyond a quarter of a page in overflow pages, which is slow.
    pub const KEY_BYTES: usize = 1 << 10;
    /// An encoded row without its key, bytes.
    pub const ROW_BYTES: usize = 1 << 20;
    /// What one `apply` may return, bytes. Must be well below the guest's memory.
    pub const CHANGES_BYTES: usize = 64 << 20;
    /// Changes that one `apply` may return. Small rows cost the host many times their bytes; seven rows an event of the
    /// largest batch are below this, and a batch that has more is halved.
    pub const CHANGES: usize = 500_000;
    /// Keys in one `get-many`. The SDK's cache holds half as many rows.
    pub const ASKED_KEYS: u32 = 65_536;
    /// The rows that one `get-many` may answer, bytes. Must be well below the guest's memory.
    pub const ASKED_BYTES: usize = 64 << 20;
    /// Random bytes in one answer to a plugin, which are constant anyway; std asks for 16.
    pub const RANDOM_BYTES: u64 = 4 << 10;
    /// A message of a plugin's, or about what is in one, bytes: it goes into logs, answers and the status.
    pub const MESSAGE_BYTES: usize = 4 << 10;
    /// A module file, bytes. The examples have less than half a megabyte.
    pub const MODULE_BYTES: u64 = 64 << 20;
    /// An event's payload and metadata together, bytes; NATS and Kafka have 1 MiB by default.
    pub const EVENT_BYTES: usize = 1 << 20;
    /// An event's source, type, id or stream, bytes.
    pub const EVENT_NAME_BYTES: usize = 1 << 10;
    /// Captured standard output and standard error of a plugin, bytes for one batch; the rest is dropped and counted.
    pub const PLUGIN_OUTPUT_BYTES: usize = 16 << 10;
    /// How long an invalid or missing module file must stay so before that is acted upon. Writers that truncate and
    /// write, or unlink and link, need less; a person who waits for the refusal does not notice.
    pub const FOLDER_SETTLE: Duration = Duration::from_millis(400);
    /// How often the watched folder is read even if no notification came: file systems without notifications, and
    /// symlinks whose targets change elsewhere.
    pub const FOLDER_RESCAN: Duration = Duration::from_secs(1);
    /// How often the log is looked at for events that another process appended. The look reads one number.
    pub const LOG_POLL: Duration = Duration::from_millis(5);
    /// The same when other processes have not appended for a while: a runtime that nobody feeds costs next to nothing.
    pub const LOG_POLL_QUIET: Duration = Duration::from_millis(15);
    /// How long that while is.
    pub const LOG_QUIET: Duration = Duration::from_secs(1);
    /// How long a writer waits for another process's lock on a database.
    pub const DATABASE_BUSY: Duration = Duration::from_secs(10);
    /// Events that the log packs into a block, reads at once, and keeps in memory for other projections that are near.
    /// Fewer cost more queries, more make the first event of a batch wait for the last.
    pub const CHUNK_EVENTS: usize = 4096;
    /// Bytes of events that the log packs into a block and reads at once, unless one event alone is larger.
    pub const CHUNK_BYTES: usize = 4 << 20;
    /// Rows after which the log packs the older half of them into blocks. Fewer and the newest events, which are read
    /// soon after they came, are packed and unpacked for it; more make the file larger.
    pub const SEAL_ROWS: u64 = 4 * CHUNK_EVENTS as u64;
    /// Sources that a log can have, and types. A name takes some 100 bytes for the log, and 8 for each projection.
    pub const LOG_NAMES: usize = 1_000_000;
    /// Entries of the index of ids that are merged in one transaction: some 20 ms.
    pub const MERGE_IDS: usize = 65_536;
    /// Events that a projection passes over before it notes how far it is, if there was nothing to apply: after a restart
    /// it passes over them again, some milliseconds.
    pub const PASSED_EVENTS: u64 = 1 << 20;
    /// What the log's write-ahead log is cut back to, bytes, after a long reader has kept it from being reset.
    pub const LOG_JOURNAL_BYTES: u64 = 64 << 20;
    /// Events that wait in memory to be appended, bytes; a producer beyond that is asked to try again.
    pub const APPEND_QUEUE_BYTES: usize = 64 << 20;
    /// Events in a batch after which a projection that comes to rest keeps its instance and its buffers, some 100 KB;
    /// after larger ones it gives them back, and begins with a fresh instance at the next event.
    pub const SMALL_BATCH: usize = 1_000;
    /// Changed rows in a commit after which the database gives its cache back, if nothing follows.
    pub const SMALL_COMMIT: usize = 1_000;
    /// Chunks that are read ahead of a projection that catches up.
    pub const READ_AHEAD_CHUNKS: usize = 4;
    /// Threads that read ahead, for all projections together. One reads as fast as one projection can apply; two, when
    /// there is next to nothing to apply.
    pub const READ_AHEAD_THREADS: usize = 2;
    /// Chunks in memory, bytes, for all projections together; with [`CHUNK_EVENTS`] some hundred thousand small events.
    /// Projections that are farther apart read for themselves.
    pub const LOG_CACHE_BYTES: usize = 32 << 20;
    /// Connections to the log that are kept open for the next who reads, 2 MB each.
    pub const LOG_READERS: usize = 4;
    /// Events in one transaction of an append: blocks are filled, so that none of them is written as a row first.
    pub const APPEND_EVENTS: usize = 3 * CHUNK_EVENTS;
    /// Bytes of events in one transaction of an append.
    pub const APPEND_BYTES: usize = 16 << 20;
    /// Files that one append interleaves. All are open at once, and systems let a process have 1,024 open files by
    /// default, some of which the log needs.
    pub const INTERLEAVED_FILES: usize = 1_000;
    /// Buffers of the files that are interleaved, bytes, for all of them together; a file has a megabyte at most. A zstd
    /// file has two, and zstd's window beside them: 2 MB by default, and less for a file that is small.
    pub const INTERLEAVED_BYTES: usize = 64 << 20;
    /// How many times a projection starts again from its last commit after an error of the host's (a busy or full
    /// disk, say) without having made progress; then it is faulted until somebody resumes it. With [`RETRY_FIRST`]
    /// doubling each time: 3 to 6 seconds in all, beside [`DATABASE_BUSY`] for each try that meets a lock.
    pub const RETRIES: u32 = 6;
    /// The wait before the first retry, at most. Each wait is between half of its length and all of it, so that
    /// projections that failed together do not all come back at the same moment.
    pub const RETRY_FIRST: Duration = Duration::from_millis(100);
    /// A message, a backtrace or captured output in the report of a failed event, bytes; the rest is cut off. It is
    /// stored with the dead letter, and a full park has thousands.
    pub const REPORT_TEXT_BYTES: usize = 16 << 10;
    /// Dead letters in one answer.
    pub const DEAD_LETTERS_LISTED: u64 = 1_000;
    /// Databases that SQLite attaches to one connection, and so live projections in one SQL query.
    pub const ATTACHED: usize = 10;
    /// Queries that run on one view file at once, each on a connection of its own.
    pub const READERS: usize = 4;
    /// Those of them that may take longer than [`QUICK_QUERY`]; the others wait. It leaves places for those that do not.
    pub const READERS_LONG: usize = 2;
    /// What a query may take before it needs one of those turns. If none is free it begins anew when one is, so that a
    /// long query costs so much more at the most. Of n long queries that come at once, each keeps a place from the short
    /// ones for so long.
    pub const QUICK_QUERY: Duration = Duration::from_millis(100);
    /// Connections beside these, for reads by the whole key, which take some microseconds and wait for no other query.
    pub const READERS_KEYED: usize = 2;
    /// Prepared statements that each of them keeps: queries that differ in more than their values, and in how many of
    /// these a list has. One is some kilobytes.
    pub const READER_STATEMENTS: usize = 64;
    /// A prepared statement that is kept, bytes; a larger one is prepared each time. All that are kept for one view are
    /// within 16 MB for each four connections.
    pub const READER_STATEMENT_BYTES: usize = 64 << 10;
    /// Conditions of one query. SQLite's own limit, on how deep an expression is, is 1,000.
    pub const FILTERS: usize = 500;
    /// A pattern of `like` and `ilike`, bytes. Matching takes a step for each character of the text and each 64 of the
    /// pattern: the longest takes some 0.1 s on a text of a megabyte.
    pub const PATTERN_BYTES: usize = 4 << 10;
    /// Columns that one answer has, with their aliases, and terms of its order; SQLite takes 2,000.
    pub const QUERY_TERMS: usize = 1_000;
    /// How long a reader's query may run, and how long it may wait for a connection. Beyond that it is a report, which
    /// belongs on the SQLite file itself.
    pub const QUERY_TIME: Duration = Duration::from_secs(10);
    /// An answer's rows, bytes. With all readers of a file busy, four times this is in memory.
    pub const ANSWER_BYTES: usize = 64 << 20;
    /// Rows of a table that is drawn on a terminal: its widths need all of them, and nobody reads more.
    pub const TABLE_ROWS: usize = 1_000;
    /// The texts of such a table, bytes.
    pub const TABLE_BYTES: usize = 1 << 20;
    /// One of them, characters: ten lines of a terminal.
    pub const TABLE_CELL: usize = 1_000;
    /// Events behind the head that still count as current in `/readyz` while a rebuild runs. Fewer than one batch has,
    /// so that a moment's work does not look like an outage.
    pub const READY_LAG: u64 = 1_000;
    /// Rows of each kind of difference and each view that a proof shows. All are counted; more than these nobody reads.
    pub const PROOF_SAMPLES: u64 = 10;
    /// Events that a proof names for a row that differs: the last ones that changed it.
    pub const PROOF_EVENTS: usize = 5;
    /// Modules that one generation was swapped through and that are kept, so that a proof can replay what each has made of
    /// the rows. After more swaps a proof takes the last one for all.
    pub const MODULES_KEPT: usize = 100;
    /// How often is looked for projections that do not move, at the longest; a look compares a few numbers.
    pub const STALL_LOOK: Duration = Duration::from_secs(1);
    /// How often is looked for events that a source keeps no longer, at the longest; a tenth of the time that it keeps them,
    /// if that is shorter. Each look that finds some has every projection read the log anew from where it is.
    pub const RETENTION_LOOK: Duration = Duration::from_secs(3_600);
    /// The same at the shortest: what a projection has not committed when it looks is read and applied again.
    pub const RETENTION_SOONEST: Duration = Duration::from_secs(10);
    /// Forgettings that a command or an answer shows, the newest ones.
    pub const FORGETTINGS_LISTED: usize = 100;
    /// How long a clean stop may take before the process leaves anyway. Every commit is atomic, so nothing is lost.
    pub const SHUTDOWN: Duration = Duration::from_secs(10);
}

/// What the program uses.
#[derive(Clone, Debug)]
pub struct Config {
    /// The data directory.
    pub data: PathBuf,
    /// The watched folder of modules.
    pub plugins: PathBuf,
    /// Where HTTP listens. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Former generations that are kept for a rollback, each with its own file.
    pub keep_generations: usize,
    /// How long a projection may have lag and make no progress before it is called stalled.
    pub stall_after: Duration,
    /// How events are batched and committed.
    pub batch: BatchLimits,
    /// What a plugin may use.
    pub sandbox: SandboxLimits,
    /// What a reader may ask for.
    pub http: HttpLimits,
    /// What becomes of events that cannot be applied.
    pub failures: Failures,
    /// What is different for single projections, by name.
    pub projections: BTreeMap<String, ProjectionConfig>,
    /// What is said of sources, by globs of their names.
    pub sources: BTreeMap<String, SourceConfig>,
    /// Projections pass over blocks of the log that cannot be read, and note for ever that they did.
    pub skip_damaged: bool,
}

impl Config {
    /// What the configuration says about the bad events of a projection.
    pub fn policy(&self, projection: &str) -> Policy {
        self.projections.get(projection).and_then(|p| p.policy).unwrap_or(self.failures.policy)
    }
}

/// What a projection does about an event that its module cannot apply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// It stops there. Nothing is set aside without somebody having said so.
    #[default]
    Pause,
    /// The event and all later ones of its stream become dead letters; other streams go on.
    Park,
    /// The event becomes a dead letter; everything else goes on, its own stream included.
    Skip,
}

impl Policy {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Pause => "pause",
            Policy::Park => "park",
            Policy::Skip => "skip",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Policy, String> {
        let known = [Policy::Pause, Policy::Park, Policy::Skip].into_iter().find(|p| p.name() == text);
        known.ok_or_else(|| format!("{text:?} is not a policy; use pause, park or skip"))
    }
}

/// What becomes of events that cannot be applied.
#[derive(Clone, Copy, Debug)]
pub struct Failures {
    /// For all projections that say nothing else.
    pub policy: Policy,
    /// Dead letters of one generation, parked and skipped; one more, and the projection stops. Some events are bad;
    /// if thousands are, it is the module, and somebody should look.
    pub max_dead_letters: u64,
}

/// What is different for one projection.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProjectionConfig {
    /// Instead of [`Failures::policy`].
    pub policy: Option<Policy>,
}

/// What is said of the sources that a glob matches.
#[derive(Clone, Debug, Default)]
pub struct SourceConfig {
    /// How long the content of events is kept after they were appended; None for ever. Of the globs that match a source its
    /// own name counts, else the longest.
    pub keep: Option<Duration>,
}

/// How events are batched and committed.
#[derive(Clone, Copy, Debug)]
pub struct BatchLimits {
    /// Events handed to a plugin in one call, at most. In a larger batch more changes of a row are one: with 16,384
    /// instead of 4,096 the flight-board example takes a sixth less time. But a batch costs memory on both sides, and
    /// the deadline is for all of it.
    pub events: usize,
    /// Bytes of events handed over in one call, unless one event alone is larger.
    pub bytes: usize,
    /// Changed rows that are collected before a commit while catching up. A transaction of 50,000 rows costs
    /// 1 us a row, one of 1,000 costs 7 us.
    pub commit_rows: usize,
    /// Bytes of changed rows that are collected before a commit.
    pub commit_bytes: usize,
    /// The longest that a change waits for its commit while catching up; at the head nothing waits.
    pub commit_interval: Duration,
}

/// What a plugin may use.
#[derive(Clone, Copy, Debug)]
pub struct SandboxLimits {
    /// Linear memory of one instance, bytes.
    pub memory: usize,
    /// How long one call may run.
    pub deadline: Duration,
}

/// Who is answered, and what a reader may ask for.
#[derive(Clone, Debug)]
pub struct HttpLimits {
    /// Names of this server, in requests of HTTP, beside its addresses and `localhost`; a name that is not known may be
    /// that of a page which was let lead here. With a name behind which others live, their pages can do what its user can.
    pub hosts: Vec<String>,
    /// Rows in one answer. A query without `limit` gets at most this many, and `Content-Range` says so.
    pub max_rows: u64,
    /// How long a reader that asks for a position waits for it if it does not say.
    pub default_wait: Duration,
    /// The longest that a reader may ask to wait.
    pub max_wait: Duration,
    /// The largest body of `POST /events`, bytes.
    pub max_body: usize,
}

/// What a person wrote. Absent means the default.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each field is described in Config, where it gets its value")]
pub struct Written {
    pub data: Option<PathBuf>,
    pub plugins: Option<PathBuf>,
    pub listen: Option<String>,
    pub keep_generations: Option<usize>,
    pub stall_after_ms: Option<u64>,
    #[serde(default)]
    pub batch: WrittenBatch,
    #[serde(default)]
    pub sandbox: WrittenSandbox,
    #[serde(default)]
    pub http: WrittenHttp,
    #[serde(default)]
    pub failures: WrittenFailures,
    #[serde(default)]
    pub projections: BTreeMap<String, ProjectionConfig>,
    #[serde(default)]
    pub sources: BTreeMap<String, WrittenSource>,
    /// A flag alone: nobody should do it for good.
    #[serde(skip)]
    pub skip_damaged: bool,
}

/// `[sources."GLOB"]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each field is described in SourceConfig")]
pub struct WrittenSource {
    pub keep: Option<String>,
}

/// `[batch]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each field is described in BatchLimits")]
pub struct WrittenBatch {
    pub events: Option<usize>,
    pub bytes: Option<usize>,
    pub commit_rows: Option<usize>,
    pub commit_bytes: Option<usize>,
    pub commit_interval_ms: Option<u64>,
}

/// `[sandbox]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each field is described in SandboxLimits")]
pub struct WrittenSandbox {
    pub memory_mb: Option<usize>,
    pub deadline_ms: Option<u64>,
}

/// `[http]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each field is described in HttpLimits")]
pub struct WrittenHttp {
    #[serde(default)]
    pub hosts: Vec<String>,
    pub max_rows: Option<u64>,
    pub default_wait_ms: Option<u64>,
    pub max_wait_ms: Option<u64>,
    pub max_body_mb: Option<usize>,
}

/// `[failures]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each field is described in Failures")]
pub struct WrittenFailures {
    pub policy: Option<Policy>,
    pub max_dead_letters: Option<u64>,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Error {
    #[error("cannot read the configuration file {path:?}: {error}")]
    Read { path: PathBuf, error: std::io::Error },
    #[error("the configuration file {path:?} is not valid: {error}")]
    Parse { path: PathBuf, error: Box<toml::de::Error> },
    #[error("{key} = {value} is not valid; use {allowed}")]
    Value { key: &'static str, value: String, allowed: String },
}

impl Written {
    /// Reads a file. Unknown keys are errors.
    pub fn read(path: &Path) -> Result<Written, Error> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::Read { path: path.to_owned(), error })?;
        toml::from_str(&text).map_err(|error| Error::Parse { path: path.to_owned(), error: Box::new(error) })
    }

    /// Fills in the defaults and validates.
    pub fn validate(self) -> Result<Config, Error> {
        let listen = self.listen.unwrap_or_else(|| "127.0.0.1:7070".into());
        let listen = listen.parse().map_err(|_| Error::Value {
            key: "listen",
            value: format!("{listen:?}"),
            allowed: "an address and a port like 127.0.0.1:7070".into(),
        })?;
        let (b, s, h, f) = (self.batch, self.sandbox, self.http, self.failures);
        Ok(Config {
            data: self.data.unwrap_or_else(|| "shadowbox-data".into()),
            plugins: self.plugins.unwrap_or_else(|| "plugins".into()),
            listen,
            keep_generations: within("keep_generations", self.keep_generations, 1, 0, 100)?,
            // Three batches that use up their deadline, or three times the wait for a lock: what is only slow is not
            // called stalled, and an operator who looks hears of it.
            stall_after: ms(within("stall_after_ms", self.stall_after_ms, 30_000, 100, 86_400_000)?),
            batch: BatchLimits {
                // Beyond 65,536 the dictionaries' 16-bit indexes could overflow.
                events: within("batch.events", b.events, 16_384, 1, 65_536)?,
                bytes: within("batch.bytes", b.bytes, 8 << 20, 1, 64 << 20)?,
                commit_rows: within("batch.commit_rows", b.commit_rows, 50_000, 1, 1_000_000)?,
                commit_bytes: within("batch.commit_bytes", b.commit_bytes, 32 << 20, 1, 1 << 30)?,
                commit_interval: ms(within("batch.commit_interval_ms", b.commit_interval_ms, 1000, 0, 60_000)?),
            },
            sandbox: SandboxLimits {
                memory: within("sandbox.memory_mb", s.memory_mb, 256, 2, 4096)? << 20,
                // A batch takes a few milliseconds; this only has to tell slow from endless.
                deadline: ms(within("sandbox.deadline_ms", s.deadline_ms, 10_000, 10, 600_000)?),
            },
            http: HttpLimits {
                hosts: h.hosts.into_iter().map(host).collect::<Result<_, _>>()?,
                max_rows: within("http.max_rows", h.max_rows, 10_000, 1, 10_000_000)?,
                default_wait: ms(within("http.default_wait_ms", h.default_wait_ms, 5_000, 0, 60_000)?),
                max_wait: ms(within("http.max_wait_ms", h.max_wait_ms, 60_000, 0, 600_000)?),
                max_body: within("http.max_body_mb", h.max_body_mb, 16, 1, 1024)? << 20,
            },
            failures: Failures {
                policy: f.policy.unwrap_or_default(),
                max_dead_letters: within("failures.max_dead_letters", f.max_dead_letters, 10_000, 1, 1_000_000)?,
            },
            projections: self.projections,
            sources: self.sources.into_iter().map(source).collect::<Result<_, _>>()?,
            skip_damaged: self.skip_damaged,
        })
    }
}

fn within<T: PartialOrd + std::fmt::Display>(
    key: &'static str,
    written: Option<T>,
    default: T,
    min: T,
    max: T,
) -> Result<T, Error> {
    match written {
        None => Ok(default),
        Some(value) if value >= min && value <= max => Ok(value),
        Some(value) => {
            Err(Error::Value { key, value: value.to_string(), allowed: format!("a number from {min} to {max}") })
        }
    }
}

/// A name as requests have it, but without a port, which may be that of a proxy.
fn host(name: String) -> Result<String, Error> {
    let label =
        |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    match name.split('.').all(label) {
        true => Ok(name),
        false => Err(Error::Value {
            key: "http.hosts",
            value: format!("{name:?}"),
            allowed: "names without scheme and port, like shadowbox.example.com".into(),
        }),
    }
}

fn source((glob, written): (String, WrittenSource)) -> Result<(String, SourceConfig), Error> {
    let refuse = |key: &'static str, value: &str, allowed: &str| Error::Value {
        key,
        value: format!("{value:?}"),
        allowed: allowed.to_owned(),
    };
    globset::Glob::new(&glob).map_err(|_| refuse("sources", &glob, "a source's name, or a glob like sensors/*"))?;
    let keep = written.keep.map(|keep| {
        let days = jiff::SpanRelativeTo::days_are_24_hours();
        let span: Option<jiff::Span> = keep.parse().ok();
        let length = span.and_then(|span| span.to_duration(days).ok()).and_then(|length| length.try_into().ok());
        let length = length.filter(|length: &Duration| *length >= Duration::from_secs(1));
        length
            .ok_or_else(|| refuse("sources.keep", &keep, "a length of time of a second or more, like 400d, 12h or 90m"))
    });
    Ok((glob, SourceConfig { keep: keep.transpose()? }))
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(toml: &str) -> Result<Config, String> {
        let written: Written = toml::from_str(toml).map_err(|e| e.to_string())?;
        written.validate().map_err(|e| e.to_string())
    }

    #[test]
    fn an_empty_file_is_the_defaults_and_bad_values_are_named() {
        assert_eq!(check("").unwrap().listen.to_string(), "127.0.0.1:7070");
        assert_eq!(check("[sandbox]\nmemory_mb = 64").unwrap().sandbox.memory, 64 << 20);
        let day = Duration::from_secs(86_400);
        let kept = check("[sources.\"sensors/*\"]\nkeep = \"400d\"").unwrap();
        assert_eq!(kept.sources["sensors/*"].keep, Some(400 * day));
        let parking = check("[failures]\npolicy = \"skip\"\n[projections.orders]\npolicy = \"park\"").unwrap();
        assert_eq!((parking.policy("orders"), parking.policy("flights")), (Policy::Park, Policy::Skip));
        let named = check("[http]\nhosts = [\"a.example.com\", \"shadowbox\"]").unwrap();
        assert_eq!(named.http.hosts, ["a.example.com", "shadowbox"]);
        for (toml, expected) in [
            ("[http]\nhosts = [\"http://a.example\"]", "http.hosts = \"http://a.example\" is not valid; use names"),
            ("[http]\nhosts = [\"a.example:80\"]", "http.hosts = \"a.example:80\" is not valid"),
            ("[http]\nhosts = [\"*\"]", "http.hosts = \"*\" is not valid"),
            ("[http]\nhosts = [\"\"]", "http.hosts = \"\" is not valid"),
            ("plugin = \"x\"", "unknown field `plugin`"),
            ("[batch]\nevent = 1", "unknown field `event`"),
            ("listen = \"localhost\"", "listen = \"localhost\" is not valid; use an address"),
            (
                "[projections.orders]\npolicy = \"stop\"",
                "unknown variant `stop`, expected one of `pause`, `park`, `skip`",
            ),
            ("[sources.\"a/*\"]\nkeep = \"soon\"", "sources.keep = \"soon\" is not valid; use a length of time"),
            ("[sources.a]\nkeep = \"0s\"", "sources.keep = \"0s\" is not valid; use a length of time of a second"),
            ("[sources.\"a[\"]\nkeep = \"1d\"", "sources = \"a[\" is not valid; use a source's name"),
            ("[failures]\nmax_dead_letters = 0", "failures.max_dead_letters = 0 is not valid; use a number from 1"),
            ("[sandbox]\nmemory_mb = 1", "sandbox.memory_mb = 1 is not valid; use a number from 2 to 4096"),
        ] {
            let error = check(toml).unwrap_err();
            assert!(error.contains(expected), "{toml}: {error}");
        }
    }
}
