//! `shadowbox append`, `shadowbox events` and `shadowbox log`.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use shadowbox::config::limits;
use shadowbox::log::interleave::{Disorder, Interleave};
use shadowbox::log::{EventLog, Filter, cloudevents};
use shadowbox::model::{NewEvent, Position, Time};

use super::Common;
use super::table::table;
use super::text::{in_json, lines, one_line};

#[derive(Args)]
pub(super) struct Append {
    /// The source of events that name none; an event of another source is refused
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Append the files one after the other, as they are given, and not by the times of their events
    #[arg(long)]
    in_file_order: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Files, plain or zstd; - is standard input. Several are interleaved as their events happened
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// The order in which the events of several files are appended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// As they happened; see [`shadowbox::log::interleave`].
    ByTime,
    /// One file after the other.
    AsGiven,
}

impl Append {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let config = common.config(|_| {})?;
        let order = if self.in_file_order { Order::AsGiven } else { Order::ByTime };
        self.check(order)?;
        let log = EventLog::open(&config.data)?;
        let imported = import(&log, &self.files, self.source.as_deref(), order);
        for note in &imported.notes {
            eprintln!("shadowbox: note: {}", lines(note));
        }
        // What was appended before an error is told, too: it is kept.
        let Imported { appended, already, positions, failed, .. } = imported;
        let (first, last) = positions.unzip();
        if self.json {
            let answer = json!({
                "appended": appended, "duplicates": already,
                "first_position": first, "last_position": last, "position": last,
            });
            say_json!("{answer}");
        } else {
            say!("appended {appended} events; {already} were there already");
            if let Some((first, last)) = positions {
                say!("the first is at position {first}, the last at position {last}");
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// What is mistyped should stop everything before it begins.
    fn check(&self, order: Order) -> Result<()> {
        let files = self.files.iter().filter(|file| !is_standard_input(file));
        let n = self.files.len();
        ensure!(n - files.clone().count() <= 1, "standard input (-) is given more than once");
        ensure!(
            order == Order::AsGiven || n <= limits::INTERLEAVED_FILES,
            "{n} files are too many to interleave, since all are open at once; the limit is {}: concatenate the files \
             of each service, or append one after the other with --in-file-order",
            limits::INTERLEAVED_FILES
        );
        for file in files {
            File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
        }
        Ok(())
    }
}

/// What an import came to.
pub(super) struct Imported {
    pub(super) appended: u64,
    pub(super) already: u64,
    /// The lowest and the highest position among all events of the files; None if they have none.
    pub(super) positions: Option<(Position, Position)>,
    /// What is odd in the files and no error.
    pub(super) notes: Vec<String>,
    /// Why it ended early.
    pub(super) failed: Option<anyhow::Error>,
}

/// Appends files, reading and parsing beside writing, with a progress bar on a terminal.
pub(super) fn import(log: &EventLog, files: &[PathBuf], source: Option<&str>, order: Order) -> Imported {
    let size: u64 = files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
    let bar = ProgressBar::new(size).with_style(
        ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {msg} {eta} left").expect("a valid template"),
    );
    let mut imported = Imported { appended: 0, already: 0, positions: None, notes: Vec::new(), failed: None };
    let read = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let (sender, batches) = sync_channel(AHEAD);
        let mut reader =
            Reader { source, read: &read, notes: Vec::new(), batches: sender, events: Vec::new(), bytes: 0 };
        let reader = scope.spawn(move || {
            let done = reader.read(files, order);
            (reader.notes, done)
        });
        for events in batches {
            // Where no runtime packs rows, many small imports leave many.
            let appended = match log.seal(limits::SEAL_ROWS / 2).and_then(|()| log.append(events)) {
                Ok(appended) => appended,
                Err(error) => {
                    imported.failed = Some(error.into());
                    break;
                }
            };
            for event in appended {
                *if event.new { &mut imported.appended } else { &mut imported.already } += 1;
                let (first, last) = imported.positions.get_or_insert((event.position, event.position));
                (*first, *last) = ((*first).min(event.position), (*last).max(event.position));
            }
            // Read ahead of what is written, by no more than a few batches.
            bar.set_position(read.load(Ordering::Relaxed));
            bar.set_message(format!("{} events", imported.appended + imported.already));
        }
        // The receiver is dropped by now, so the reader does not wait for it.
        let (notes, done) = reader.join().expect("the reader does not panic");
        imported.notes = notes;
        imported.failed = imported.failed.take().or(done.err());
    });
    bar.finish_and_clear();
    imported
}

/// Batches that are read ahead while another one is written.
const AHEAD: usize = 2;

/// Reads files into batches, each of which belongs into one transaction.
struct Reader<'a> {
    source: Option<&'a str>,
    /// Bytes read of all files as they are stored.
    read: &'a AtomicU64,
    notes: Vec<String>,
    batches: SyncSender<Vec<NewEvent>>,
    events: Vec<NewEvent>,
    bytes: usize,
}

impl Reader<'_> {
    fn read(&mut self, files: &[PathBuf], order: Order) -> Result<()> {
        let together = if order == Order::ByTime { files.len() } else { 1 };
        let done = files.chunks(together).try_for_each(|files| self.merge(files));
        // All before a bad line are kept.
        let rest = self.flush();
        done.and(rest)
    }

    fn merge(&mut self, files: &[PathBuf]) -> Result<()> {
        let buffer = (limits::INTERLEAVED_BYTES / files.len()).min(1 << 20);
        let opened = files.iter().enumerate().map(|(number, path)| {
            let lines = Lines::open(path, buffer, self.source, self.read);
            lines.with_context(|| match number {
                0 => format!("cannot read {:?}", name(path)),
                _ => format!("cannot read {:?} beside {number} other files", name(path)),
            })
        });
        let mut merged = Interleave::new(opened.collect::<Result<Vec<_>>>()?);
        let done = merged.by_ref().try_for_each(|next| self.push(next?.1));
        self.notes.extend(merged.disorder().map(|(number, disorder)| note(&name(&files[number]), disorder)));
        done
    }

    fn push(&mut self, event: NewEvent) -> Result<()> {
        let names = event.source.len() + event.id.len() + event.stream.len() + event.event_type.len();
        self.bytes += names + event.metadata.len() + event.payload.len();
        self.events.push(event);
        if self.events.len() < limits::APPEND_EVENTS && self.bytes < limits::APPEND_BYTES {
            return Ok(());
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<()> {
        self.bytes = 0;
        match std::mem::take(&mut self.events) {
            none if none.is_empty() => Ok(()),
            // The writer's own error is the one that is told.
            events => self.batches.send(events).map_err(|_| anyhow!("nobody writes what is read")),
        }
    }
}

fn note(file: &str, disorder: &Disorder) -> String {
    let Disorder { events, id, place, time, after } = disorder;
    let first = format!("{id:?} at line {place} ({time}, after {after})");
    match events {
        1 => format!(
            "{file}: 1 event is earlier than one before it in the file: {first}; it stands where the file has it"
        ),
        _ => format!(
            "{file}: {events} events are earlier than one before them in the file; the first is {first}; they stand \
             where the file has them"
        ),
    }
}

fn is_standard_input(path: &Path) -> bool {
    path == Path::new("-")
}

fn name(path: &Path) -> String {
    if is_standard_input(path) { "standard input".into() } else { path.display().to_string() }
}

/// The events of a file, with the numbers of their lines.
struct Lines<'a> {
    name: String,
    source: Option<&'a str>,
    input: Box<dyn BufRead + 'a>,
    line: Vec<u8>,
    number: u64,
}

/// Counts what is read of a file as it is stored.
struct Counted<'a, R> {
    inner: R,
    read: &'a AtomicU64,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// What the system says when a process has too many open files, on Linux and macOS.
const EMFILE: i32 = 24;

/// A line buffer that had to become larger than this is given back: there may be a thousand of them.
const LINE_KEPT: usize = 64 << 10;

impl<'a> Lines<'a> {
    fn open(path: &Path, buffer: usize, source: Option<&'a str>, read: &'a AtomicU64) -> Result<Lines<'a>> {
        let input: Box<dyn Read> = if is_standard_input(path) {
            if std::io::stdin().is_terminal() {
                tracing::warn!("reading events from the terminal; end with ctrl-d");
            }
            Box::new(std::io::stdin().lock())
        } else {
            Box::new(File::open(path).map_err(|error| match error.raw_os_error() {
                Some(EMFILE) => anyhow!(
                    "this process may not open more (ulimit -n); raise that limit, or append one file after the \
                     other with --in-file-order"
                ),
                _ => anyhow!(error),
            })?)
        };
        let mut input = BufReader::with_capacity(buffer, Counted { inner: input, read });
        let input: Box<dyn BufRead> = if input.fill_buf()?.starts_with(&ZSTD_MAGIC) {
            Box::new(BufReader::with_capacity(buffer, zstd::Decoder::with_buffer(input)?))
        } else {
            Box::new(input)
        };
        Ok(Lines { name: name(path), source, input, line: Vec::new(), number: 0 })
    }

    /// The event of the next line, if it is not empty; None at the end of the file.
    fn next_line(&mut self) -> Result<Option<Option<NewEvent>>> {
        self.line.clear();
        self.line.shrink_to(LINE_KEPT);
        self.number += 1;
        // One byte more than an event may have, so that a file without line ends is not read as one line.
        let longest = (2 * limits::EVENT_BYTES) as u64 + 1;
        let n = (&mut self.input).take(longest).read_until(b'\n', &mut self.line)?;
        ensure!((n as u64) < longest, "the line is longer than {} bytes", longest - 1);
        match self.line.trim_ascii() {
            _ if n == 0 => Ok(None),
            [] => Ok(Some(None)),
            json => Ok(Some(Some(cloudevents::parse(json, self.source)?))),
        }
    }
}

impl Iterator for Lines<'_> {
    type Item = Result<(u64, NewEvent)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.next_line() {
                Ok(Some(Some(event))) => return Some(Ok((self.number, event))),
                Ok(Some(None)) => {}
                Ok(None) => return None,
                Err(error) => return Some(Err(error.context(format!("{}:{}", self.name, self.number)))),
            }
        }
    }
}

#[derive(Args)]
#[command(after_help = "\
What is asked for must all hold. Sources and types are looked up in the heads of the packed blocks, times too, a stream in
the column of streams, an id in the index of ids; what these rule out is not read.")]
pub(super) struct Events {
    /// Only events of sources that match
    #[arg(long, value_name = "GLOB")]
    source: Option<String>,
    /// Only events of types that match
    #[arg(long = "type", value_name = "GLOB")]
    event_type: Option<String>,
    /// Only events of this stream
    #[arg(long, value_name = "NAME")]
    stream: Option<String>,
    /// Only events with this id
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Only events whose time is not before this
    #[arg(long, value_name = "TIME")]
    since: Option<Time>,
    /// Only events whose time is before this
    #[arg(long, value_name = "TIME")]
    until: Option<Time>,
    /// Only events after this position
    #[arg(long, value_name = "POSITION")]
    after: Option<Position>,
    /// At most so many events
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Go on with new events as they come
    #[arg(long)]
    follow: bool,
}

/// Events read at a time.
const PAGE: usize = 1_000;

impl Events {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let config = common.existing()?;
        let log = EventLog::open(&config.data)?;
        let Events { source, event_type, stream, id, since, until, after, limit, follow } = self;
        let filter = Filter { source, event_type, stream, id, since, until };
        let mut head = log.head();
        let mut next = after.map_or(0, |after| after.0.saturating_add(1));
        let mut left = limit.unwrap_or(usize::MAX);
        let mut out = BufWriter::new(std::io::stdout().lock());
        let mut line = Vec::new();
        let terminal = std::io::stdout().is_terminal();
        loop {
            let end = head.borrow_and_update().next;
            while left > 0 && next < end {
                let mut written = Ok(());
                let mut count = 0;
                let more = log.events(&filter, next, left.min(PAGE), |event| {
                    // What is appended meanwhile is for the next look.
                    if event.position.0 >= end {
                        return;
                    }
                    count += 1;
                    line.clear();
                    cloudevents::write(&event, &mut line);
                    if terminal {
                        line = in_json(&String::from_utf8_lossy(&line)).into_owned().into_bytes();
                    }
                    line.push(b'\n');
                    if written.is_ok() {
                        written = out.write_all(&line);
                    }
                })?;
                written?;
                // Looking further may take long.
                out.flush()?;
                left -= count;
                next = more.unwrap_or(end).min(end);
            }
            if !follow || left == 0 {
                return Ok(());
            }
            head.changed().await?;
        }
    }
}

#[derive(Args)]
pub(super) struct Log {
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

impl Log {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let config = common.existing()?;
        let log = EventLog::open(&config.data)?;
        let forgettings = log.forgettings(limits::FORGETTINGS_LISTED)?;
        let log = log.summary()?;
        if self.json {
            let mut all = serde_json::to_value(&log)?;
            all["forgettings"] = serde_json::to_value(&forgettings)?;
            say_json!("{}", serde_json::to_string_pretty(&all)?);
            return Ok(());
        }
        let mut table = table(&["", "events", "bytes"]);
        let time = |time: Option<Time>| time.map_or("-".to_owned(), |time| time.to_string());
        let packed = log.events.saturating_sub(log.rows);
        table.add_row(["rows".to_owned(), log.rows.to_string(), log.row_bytes.to_string()]);
        table.add_row([format!("{} blocks", log.blocks), packed.to_string(), log.block_bytes.to_string()]);
        table.add_row(["index of ids".to_owned(), packed.to_string(), log.index_bytes.to_string()]);
        table.add_row(["the file".to_owned(), log.events.to_string(), log.file_bytes.to_string()]);
        say!("{table}");
        say!("{} sources, {} types", log.sources, log.types);
        if log.block_bytes > 0 {
            let ratio = log.raw_bytes as f64 / log.block_bytes as f64;
            say!("the blocks hold {} bytes, {ratio:.1} times what they take", log.raw_bytes);
        }
        say!("the oldest event was appended at {}, the newest at {}", time(log.first), time(log.last));
        for f in forgettings {
            let what = match (&f.before, &f.stream, &f.id) {
                (Some(before), ..) => format!("what source {:?} had before {before}", f.source),
                (None, Some(stream), None) => format!("stream {stream:?} of source {:?}", f.source),
                (None, _, Some(id)) => format!("event {id:?} of source {:?}", f.source),
                (None, None, None) => format!("a stream of source {:?}, and its name", f.source),
            };
            let ended = if f.ended.is_some() { "" } else { " (not ended)" };
            let reason = f.reason.map_or(String::new(), |reason| format!(": {}", one_line(&reason)));
            let by = one_line(&f.by);
            say!("forgetting {}, {}, by {by}{ended}: {} events, {what}{reason}", f.number, f.begun, f.events);
        }
        Ok(())
    }
}
