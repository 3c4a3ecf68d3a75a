//! `shadowbox append` and `shadowbox events`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use shadowbox::config::limits;
use shadowbox::log::{EventLog, cloudevents};
use shadowbox::model::{NewEvent, Position};

use super::Common;

#[derive(Args)]
pub(super) struct Append {
    /// The source of events that name none; an event of another source is refused
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Files, plain or zstd; - is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Events that belong into one transaction, and how much of the input has been read with them.
struct Chunk {
    events: Vec<NewEvent>,
    read: u64,
}

/// Chunks that are read ahead while another one is written.
const AHEAD: usize = 2;

impl Append {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let config = common.config(|_| {})?;
        // A name that is mistyped should stop everything before it begins.
        for file in self.files.iter().filter(|file| *file != Path::new("-")) {
            File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
        }
        let log = EventLog::open(&config.data)?;
        let imported = import(&log, &self.files, self.source.as_deref());
        // What was appended before an error is told, too: it is kept.
        let Imported { appended, already, last, failed } = imported;
        if self.json {
            say!("{}", json!({ "appended": appended, "already": already, "last": last }));
        } else {
            say!("appended {appended} events; {already} were there already");
            for (source, position) in &last {
                say!("{source} is at position {position}");
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// What an import came to.
pub(super) struct Imported {
    pub(super) appended: u64,
    pub(super) already: u64,
    /// The last position of each source that was in the files.
    pub(super) last: BTreeMap<String, Position>,
    /// Why it ended early.
    pub(super) failed: Option<anyhow::Error>,
}

/// Appends files, reading and parsing beside writing, with a progress bar on a terminal.
pub(super) fn import(log: &EventLog, files: &[PathBuf], source: Option<&str>) -> Imported {
    let size: u64 = files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
    let bar = ProgressBar::new(size).with_style(
        ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {msg} {eta} left").expect("a valid template"),
    );
    let mut imported = Imported { appended: 0, already: 0, last: BTreeMap::new(), failed: None };
    std::thread::scope(|scope| {
        let (sender, chunks) = sync_channel(AHEAD);
        let reader = scope.spawn(move || read_files(files, source, &sender));
        for Chunk { events, read } in chunks {
            let appended = match log.append(&events) {
                Ok(appended) => appended,
                Err(error) => {
                    imported.failed = Some(error.into());
                    break;
                }
            };
            for event in appended {
                *if event.new { &mut imported.appended } else { &mut imported.already } += 1;
                imported.last.insert(event.source, event.position);
            }
            bar.set_position(read);
            bar.set_message(format!("{} events", imported.appended + imported.already));
        }
        // The receiver is dropped by now, so the reader does not wait for it.
        let read = reader.join().expect("the reader does not panic");
        imported.failed = imported.failed.take().or(read.err());
    });
    bar.finish_and_clear();
    let heads = log.heads_now();
    for (source, position) in &mut imported.last {
        // An event that was there already may stand before the head.
        *position = heads.get(source.as_str()).map_or(*position, |head| head.position);
    }
    imported
}

fn read_files(files: &[PathBuf], source: Option<&str>, chunks: &SyncSender<Chunk>) -> Result<()> {
    let mut before = 0;
    for path in files {
        before = read_file(path, source, before, chunks)?;
    }
    Ok(())
}

/// Counts what is read of the file as it is stored.
struct Counted<R> {
    inner: R,
    read: Arc<std::sync::atomic::AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.read.fetch_add(n as u64, std::sync::atomic::Ordering::Relaxed);
        Ok(n)
    }
}

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

fn read_file(path: &Path, source: Option<&str>, before: u64, chunks: &SyncSender<Chunk>) -> Result<u64> {
    let name = if path == Path::new("-") { "standard input".into() } else { path.display().to_string() };
    let input: Box<dyn Read> = if path == Path::new("-") {
        if std::io::stdin().is_terminal() {
            tracing::warn!("reading events from the terminal; end with ctrl-d");
        }
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(File::open(path).with_context(|| format!("cannot open {name:?}"))?)
    };
    let read = Arc::new(std::sync::atomic::AtomicU64::new(before));
    let mut input = BufReader::with_capacity(1 << 20, Counted { inner: input, read: read.clone() });
    let begin = input.fill_buf().with_context(|| format!("cannot read {name:?}"))?;
    let mut lines: Box<dyn BufRead> = if begin.starts_with(&ZSTD_MAGIC) {
        Box::new(BufReader::with_capacity(1 << 20, zstd::Decoder::with_buffer(input)?))
    } else {
        Box::new(input)
    };
    let mut line = Vec::new();
    let (mut events, mut bytes) = (Vec::new(), 0);
    let mut number = 0;
    // False if the writer has given up; it says why.
    let flush = |events: &mut Vec<NewEvent>| {
        let read = read.load(std::sync::atomic::Ordering::Relaxed);
        events.is_empty() || chunks.send(Chunk { events: std::mem::take(events), read }).is_ok()
    };
    loop {
        line.clear();
        number += 1;
        // One byte more than an event may have, so that a file without line ends is not read as one line.
        let longest = (2 * limits::EVENT_BYTES) as u64 + 1;
        let ended = (&mut lines).take(longest).read_until(b'\n', &mut line);
        let parsed = ended.map_err(|e| anyhow!(e)).and_then(|n| {
            anyhow::ensure!((n as u64) < longest, "the line is longer than {} bytes", longest - 1);
            match line.trim_ascii() {
                _ if n == 0 => Ok(None),
                [] => Ok(Some(None)),
                json => Ok(Some(Some(cloudevents::parse(json, source)?))),
            }
        });
        match parsed {
            Ok(Some(Some(event))) => {
                bytes += line.len();
                events.push(event);
                if events.len() >= limits::APPEND_EVENTS || bytes >= limits::APPEND_BYTES {
                    bytes = 0;
                    if !flush(&mut events) {
                        return Ok(0);
                    }
                }
            }
            Ok(Some(None)) => {}
            Ok(None) => {
                flush(&mut events);
                return Ok(read.load(std::sync::atomic::Ordering::Relaxed));
            }
            Err(error) => {
                // All before the bad line are kept.
                flush(&mut events);
                return Err(error.context(format!("{name}:{number}")));
            }
        }
    }
}

#[derive(Args)]
pub(super) struct Events {
    /// Only events of this source [default: all, source by source]
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Only events after this position of their source
    #[arg(long, value_name = "POSITION")]
    after: Option<u64>,
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
        let mut heads = log.heads();
        let mut done: BTreeMap<String, Option<Position>> = BTreeMap::new();
        let mut left = self.limit.unwrap_or(usize::MAX);
        let mut out = BufWriter::new(std::io::stdout().lock());
        let mut line = Vec::new();
        loop {
            let sources: Vec<String> = match &self.source {
                Some(source) => vec![source.clone()],
                None => heads.borrow_and_update().keys().map(|s| s.to_string()).collect(),
            };
            for source in sources {
                let after = done.entry(source.clone()).or_insert(self.after.map(Position));
                while left > 0 {
                    let mut written = Ok(());
                    let n = log.events(&source, *after, left.min(PAGE), |event| {
                        *after = Some(event.position);
                        line.clear();
                        cloudevents::write(&event.event, Some(event.position), &mut line);
                        line.push(b'\n');
                        if written.is_ok() {
                            written = out.write_all(&line);
                        }
                    })?;
                    written?;
                    left -= n;
                    if n == 0 {
                        break;
                    }
                }
            }
            out.flush()?;
            if !self.follow || left == 0 {
                return Ok(());
            }
            heads.changed().await?;
        }
    }
}
