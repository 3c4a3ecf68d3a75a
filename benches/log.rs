//! What does the log cost: bytes, reading, appending, packing, and passing over what nobody wants? `benches/README.md` says
//! how to run and read it.

#![expect(clippy::print_stdout, reason = "the table is what one runs this for")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rusqlite::{Connection, OpenFlags, params};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shadowbox::config::limits;
use shadowbox::log::{EventLog, Filter, Summary};
use shadowbox::model::{BatchColumn, ColumnSet, NewEvent, RawEvent, Time};
use support::{Home, Report, Samples, Stopwatch, Usage, table, thousands};

/// What is read of events: a name, and what a plain table is asked for: the time, names, and then what has bytes.
const SCANS: [(&str, &str, &[&str]); 3] = [
    ("all columns", "time, source, type", &["payload", "stream", "id"]),
    ("types, times, payloads", "time, type", &["payload"]),
    ("types, times", "time, type", &[]),
];

/// Threads that append at the same time, each an event after the other, and how long.
const THREADS: [usize; 3] = [1, 8, 64];
const SINGLES_FOR: Duration = Duration::from_secs(3);

/// Appends that are packed meanwhile: so many, so often, for so long.
const STEADY_EVENTS: usize = 100;
const STEADY_TICK: Duration = Duration::from_millis(10);
const STEADY_APPENDS: usize = 1_000;

/// The events that are looked for among millions.
const RARE: u64 = 100;

fn main() -> Result<()> {
    support::main("log", contestant, bench)
}

fn contestant(arguments: &[&str]) -> Result<Value> {
    let path = Path::new;
    Ok(match *arguments {
        ["scan", "log", what, log] => serde_json::to_value(scan_log(what, path(log))?)?,
        ["scan", "plain", what, table] => serde_json::to_value(scan_plain(what, path(table))?)?,
        ["bulk", kind, home, from] => serde_json::to_value(bulk(kind, &Home::at(home), path(from))?)?,
        ["single", kind, home, threads] => serde_json::to_value(singles(kind, &Home::at(home), threads.parse()?)?)?,
        ["steady", packing, home, from] => serde_json::to_value(steady(packing, &Home::at(home), path(from))?)?,
        ["find", log] => serde_json::to_value(find(path(log))?)?,
        _ => bail!("unknown contestant {arguments:?}"),
    })
}

/// A pass over all events.
#[derive(Serialize, Deserialize)]
struct Scan {
    usage: Usage,
    events: u64,
    /// Of what was read, so that all of it was looked at, and was the same for all.
    sum: u64,
}

fn columns(what: &str) -> Result<ColumnSet> {
    Ok(match SCANS.iter().position(|(name, ..)| *name == what).context("no such columns")? {
        0 => ColumnSet::ALL,
        1 => ColumnSet::from_iter([BatchColumn::Payloads]),
        _ => ColumnSet::default(),
    })
}

/// As a projection reads that wants everything. What is cached of a log is of one handle, and a child has but one.
fn scan_log(what: &str, log: &Path) -> Result<Scan> {
    let manifest = support::wanting("*", &[])?;
    let watch = Stopwatch::start()?;
    let log = EventLog::open(log)?;
    let mut reading = log.reading(&manifest, columns(what)?);
    let (mut next, mut events, mut sum) = (0, 0, 0_u64);
    while let (begin, Some(chunk)) = reading.chunk(next)? {
        for i in (begin - chunk.first()) as usize..chunk.events().len() {
            let RawEvent { time, stream, id, payload, .. } = chunk.events().get(i);
            let bytes = (stream.len() + id.len() + payload.len()) as u64;
            sum = sum.wrapping_add(time.microseconds() as u64).wrapping_add(bytes);
        }
        events += chunk.end() - begin;
        next = chunk.end();
    }
    Ok(Scan { usage: watch.stop()?, events, sum })
}

fn scan_plain(what: &str, table: &Path) -> Result<Scan> {
    let (_, names, others) = SCANS.iter().find(|(name, ..)| *name == what).context("no such columns")?;
    let columns: Vec<_> = names.split(", ").chain(others.iter().copied()).collect();
    let named = columns.len() - others.len();
    let watch = Stopwatch::start()?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let table = Connection::open_with_flags(table, flags)?;
    let sql = format!("SELECT {} FROM events ORDER BY position", columns.join(", "));
    let mut statement = table.prepare(&sql)?;
    let mut rows = statement.query([])?;
    let (mut events, mut sum) = (0, 0_u64);
    while let Some(row) = rows.next()? {
        let mut bytes = 0;
        for i in 1..columns.len() {
            let value = row.get_ref(i)?.as_bytes()?;
            // A block has sources and types by number: theirs are no bytes to be counted.
            bytes += if i < named { 0 } else { value.len() as u64 };
        }
        sum = sum.wrapping_add(row.get::<_, i64>(0)? as u64).wrapping_add(bytes);
        events += 1;
    }
    Ok(Scan { usage: watch.stop()?, events, sum })
}

/// Where events are appended: our log, or a bare table that is as durable, knows no duplicates and nothing else.
enum Target {
    Log(EventLog),
    Plain(Mutex<Connection>),
}

impl Target {
    fn open(kind: &str, home: &Home) -> Result<Target> {
        match kind {
            "log" => Ok(Target::Log(EventLog::open(&home.data())?)),
            "plain" => {
                let connection = Connection::open(home.path().join("plain.sqlite"))?;
                connection.pragma_update(None, "journal_mode", "wal")?;
                connection.pragma_update(None, "synchronous", "full")?;
                connection.execute_batch(support::PLAIN)?;
                Ok(Target::Plain(Mutex::new(connection)))
            }
            _ => bail!("no such log: {kind}"),
        }
    }

    /// One durable transaction.
    fn append(&self, events: Vec<NewEvent>) -> Result<()> {
        match self {
            Target::Log(log) => ensure!(log.append(events)?.iter().all(|appended| appended.new), "a duplicate"),
            Target::Plain(connection) => {
                let mut connection = connection.lock().expect("no panics while it is held");
                let transaction = connection.transaction()?;
                {
                    let mut insert =
                        transaction.prepare_cached("INSERT INTO events VALUES (NULL, ?, ?, ?, ?, ?, ?)")?;
                    for e in &events {
                        let time = e.time.microseconds();
                        insert.execute(params![e.source, e.event_type, time, e.stream, e.id, e.payload])?;
                    }
                }
                transaction.commit()?;
            }
        }
        Ok(())
    }
}

/// Calls `each` for the events of a log, some thousand at a time, until it has had so many.
fn pages(log: &Path, most: u64, mut each: impl FnMut(Vec<NewEvent>) -> Result<()>) -> Result<()> {
    let log = EventLog::open(log)?;
    let (mut next, mut left) = (Some(0), most);
    while let Some(begin) = next.filter(|_| left > 0) {
        let mut page = Vec::with_capacity(limits::APPEND_EVENTS);
        let limit = limits::APPEND_EVENTS.min(left as usize);
        next = log.events(&Filter::default(), begin, limit, |event| page.push(event.event))?;
        left -= page.len() as u64;
        each(page)?;
    }
    Ok(())
}

#[derive(Serialize, Deserialize)]
struct Bulk {
    events: u64,
    /// Of the appends alone; reading what is appended does not count.
    seconds: f64,
}

fn bulk(kind: &str, home: &Home, from: &Path) -> Result<Bulk> {
    let target = Target::open(kind, home)?;
    let mut bulk = Bulk { events: 0, seconds: 0.0 };
    pages(from, u64::MAX, |page| {
        bulk.events += page.len() as u64;
        let began = Instant::now();
        target.append(page)?;
        bulk.seconds += began.elapsed().as_secs_f64();
        Ok(())
    })?;
    Ok(bulk)
}

#[derive(Serialize, Deserialize)]
struct Singles {
    appends_a_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

/// Durable appends of one event each, by some threads at once.
fn singles(kind: &str, home: &Home, threads: usize) -> Result<Singles> {
    let target = Target::open(kind, home)?;
    let began = Instant::now();
    let mut milliseconds = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let appending = |thread: usize| -> Result<Vec<f64>> {
            let mut milliseconds = Vec::new();
            for n in 0.. {
                let event = vec![single(thread, n)];
                let sent = Instant::now();
                if sent - began >= SINGLES_FOR {
                    break;
                }
                target.append(event)?;
                milliseconds.push(sent.elapsed().as_secs_f64() * 1e3);
            }
            Ok(milliseconds)
        };
        let threads: Vec<_> = (0..threads).map(|thread| scope.spawn(move || appending(thread))).collect();
        for thread in threads {
            milliseconds.append(&mut thread.join().expect("it does not panic")?);
        }
        Ok(())
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let all = Samples::new(milliseconds);
    Ok(Singles {
        appends_a_second: all.len() as f64 / seconds,
        p50_ms: all.median(),
        p99_ms: all.at(0.99),
        max_ms: all.max(),
    })
}

fn single(thread: usize, n: u64) -> NewEvent {
    let flight_id = format!("29990101-X{thread}{n:06}-JFK-0");
    NewEvent {
        source: "flights".into(),
        id: format!("flight-{flight_id}/1"),
        stream: format!("flight-{flight_id}"),
        version: 1,
        event_type: "FlightScheduled".into(),
        time: Time::now(),
        metadata: String::new(),
        payload: format!(
            r#"{{"flight_id":"{flight_id}","carrier":"XX","flight":1545,"tailnum":"N14228","origin":"JFK","dest":"IAH","departs_at":"2013-01-01T10:15:00Z","distance":1400}}"#
        )
        .into_bytes(),
    }
}

#[derive(Serialize, Deserialize)]
struct Steady {
    events: u64,
    seconds: f64,
    cpu_seconds: f64,
    blocks: u64,
}

/// Small appends at a steady rate, with rows that are packed meanwhile or stay rows.
fn steady(packing: &str, home: &Home, from: &Path) -> Result<Steady> {
    let mut events = Vec::new();
    pages(from, (STEADY_APPENDS * STEADY_EVENTS) as u64, |mut page| {
        events.append(&mut page);
        Ok(())
    })?;
    let log = EventLog::open(&home.data())?;
    if packing == "packed" {
        log.seal_in_background();
    }
    let watch = Stopwatch::start()?;
    let began = Instant::now();
    for (n, events) in events.chunks(STEADY_EVENTS).enumerate() {
        let due = began + STEADY_TICK * n as u32;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        log.append(events)?;
    }
    let Usage { seconds, cpu_seconds, .. } = watch.stop()?;
    let Summary { events, blocks, .. } = log.summary()?;
    ensure!((blocks > 0) == (packing == "packed"), "{blocks} blocks, though rows are to be {packing}");
    Ok(Steady { events, seconds, cpu_seconds, blocks })
}

/// What somebody looks for, how many there were, and how long it took.
#[derive(Serialize, Deserialize)]
struct Found {
    what: String,
    found: u64,
    milliseconds: f64,
}

/// A log with [`RARE`] events of a source of their own, evenly among those of another one.
fn with_rare(log: &Path) -> Result<PathBuf> {
    let made = log.with_extension("rare");
    if made.exists() {
        return Ok(made);
    }
    println!("making a log with {RARE} rare events");
    let part = log.with_extension("rare.part");
    if part.exists() {
        std::fs::remove_dir_all(&part)?;
    }
    let apart = EventLog::open(log)?.head_now().next / RARE;
    let into = EventLog::open(&part)?;
    let (mut appended, mut rare) = (0, 0);
    pages(log, u64::MAX, |mut page| {
        appended += page.len() as u64;
        while rare < RARE && appended >= (rare + 1) * apart {
            rare += 1;
            let (id, stream) = (format!("rare/{rare}"), format!("rare-{rare}"));
            page.push(NewEvent { source: "rare".into(), id, stream, ..single(0, rare) });
        }
        into.append(page)?;
        Ok(())
    })?;
    ensure!(rare == RARE, "only {rare} rare events");
    into.seal(0)?;
    into.tidy();
    drop(into);
    std::fs::rename(part, &made)?;
    Ok(made)
}

fn find(path: &Path) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    let mut note = |what: &str, began: Instant, found| {
        let milliseconds = began.elapsed().as_secs_f64() * 1e3;
        all.push(Found { what: what.to_owned(), found, milliseconds });
    };
    let began = Instant::now();
    let log = EventLog::open(path)?;
    note("open the log", began, log.head_now().next);

    let manifest = support::wanting("rare", &[])?;
    let began = Instant::now();
    let mut reading = log.reading(&manifest, ColumnSet::ALL);
    let (mut sources, mut types) = (Vec::new(), Vec::new());
    let (mut next, mut found) = (0, 0);
    while let (begin, Some(chunk)) = reading.chunk(next)? {
        reading.masks(&chunk, &mut sources, &mut types);
        let events = chunk.events();
        for i in (begin - chunk.first()) as usize..events.len() {
            let (source, event_type) = (usize::from(events.source(i)), usize::from(events.event_type(i)));
            found += u64::from(sources[source] & types[event_type] != 0);
        }
        next = chunk.end();
    }
    ensure!(found == RARE, "a projection finds {found} of {RARE} events");
    note("a projection that wants the rare source", began, found);

    let look = |filter: Filter| -> Result<u64> {
        let (mut next, mut found) = (Some(0), 0);
        while let Some(begin) = next {
            next = log.events(&filter, begin, usize::MAX, |_| found += 1)?;
        }
        Ok(found)
    };
    let source = Some("rare".to_owned());
    let filters = [
        ("events --source rare", RARE, Filter { source: source.clone(), ..Filter::default() }),
        ("events --source rare --type *", RARE, Filter { source, event_type: Some("*".into()), ..Filter::default() }),
        ("events --stream rare-50", 1, Filter { stream: Some("rare-50".into()), ..Filter::default() }),
        ("events --id rare/50", 1, Filter { id: Some("rare/50".into()), ..Filter::default() }),
        ("events --id, of none", 0, Filter { id: Some("no such id".into()), ..Filter::default() }),
    ];
    for (what, expected, filter) in filters {
        let began = Instant::now();
        let found = look(filter)?;
        ensure!(found == expected, "{what}: {found} of {expected} events");
        note(what, began, found);
    }
    Ok(all)
}

fn bench(report: &mut Report) -> Result<()> {
    let rounds = support::rounds(3)?;
    let millions = support::numbers("SHADOWBOX_BENCH_MILLIONS", &[10])?;
    let log = support::log(1)?;
    let plain = support::plain(&log)?;
    print_sizes(report, &log, &plain)?;
    scans(report, rounds, &log, &plain)?;
    bulks(report, rounds, &log)?;
    print_singles(report, rounds)?;
    print_steady(report, rounds, &log)?;
    for millions in millions {
        print_found(report, rounds, millions)?;
    }
    Ok(())
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().context("the workspace's path is UTF-8")
}

/// So that the disk is not the question.
fn warm(file: &Path) -> Result<()> {
    std::io::copy(&mut std::fs::File::open(file)?, &mut std::io::sink())?;
    Ok(())
}

fn print_sizes(report: &mut Report, log: &Path, plain: &Path) -> Result<()> {
    let summary = EventLog::open(log)?.summary()?;
    let plain = std::fs::metadata(plain)?.len();
    let mut table = table(&["what", "MB", "bytes an event"]);
    for (what, bytes) in [
        ("the log's file", summary.file_bytes),
        ("its blocks", summary.block_bytes),
        ("its rows", summary.row_bytes),
        ("its index of ids", summary.index_bytes),
        ("the same before packing", summary.raw_bytes),
        ("a plain table", plain),
    ] {
        let each = bytes as f64 / summary.events as f64;
        table.add_row([what.to_owned(), format!("{:.1}", bytes as f64 / 1e6), format!("{each:.1}")]);
    }
    println!("\n{} events in {} blocks\n\n{table}", thousands(summary.events as f64), summary.blocks);
    report.add("plain_bytes", plain)?;
    report.add("summary", summary)
}

fn scans(report: &mut Report, rounds: u64, log: &Path, plain: &Path) -> Result<()> {
    warm(&log.join("log.sqlite"))?;
    warm(plain)?;
    let mut table = table(&["read", "from", "ns an event min", "ns an event median", "CPU ns an event", "peak MB"]);
    for (what, ..) in SCANS {
        let mut passes: [Vec<Scan>; 2] = Default::default();
        for _ in 0..rounds {
            for (passes, (kind, file)) in passes.iter_mut().zip([("log", log), ("plain", plain)]) {
                passes.push(support::child(&["scan", kind, what, utf8(file)?])?);
            }
        }
        let expected = (passes[0][0].events, passes[0][0].sum);
        for (passes, from) in passes.iter().zip(["the log", "a plain table"]) {
            ensure!(passes.iter().all(|p| (p.events, p.sum) == expected), "{what}: {from} has other events");
            let of = |of: fn(&Usage) -> f64| Samples::new(passes.iter().map(|p| of(&p.usage) * 1e9 / p.events as f64));
            table.add_row([
                what.to_owned(),
                from.to_owned(),
                format!("{:.0}", of(|u| u.seconds).min()),
                format!("{:.0}", of(|u| u.seconds).median()),
                format!("{:.0}", of(|u| u.cpu_seconds).median()),
                format!("{:.0}", Samples::new(passes.iter().map(|p| p.usage.peak_mb)).max()),
            ]);
            report.add(&format!("scan of {what} from {from}"), passes)?;
        }
    }
    println!("\n{table}");
    Ok(())
}

fn bulks(report: &mut Report, rounds: u64, log: &Path) -> Result<()> {
    let mut table = table(&["appended in bulk to", "s median", "events/s"]);
    let mut runs: [Vec<Bulk>; 2] = Default::default();
    for _ in 0..rounds {
        for (runs, kind) in runs.iter_mut().zip(["log", "plain"]) {
            runs.push(support::child(&["bulk", kind, Home::new("log-bulk")?.argument(), utf8(log)?])?);
        }
    }
    for (runs, into) in runs.iter().zip(["the log", "a plain table"]) {
        let seconds = Samples::new(runs.iter().map(|run| run.seconds)).median();
        table.add_row([into.to_owned(), format!("{seconds:.2}"), thousands(runs[0].events as f64 / seconds)]);
        report.add(&format!("bulk into {into}"), runs)?;
    }
    println!("\n{table}");
    Ok(())
}

fn print_singles(report: &mut Report, rounds: u64) -> Result<()> {
    let mut table = table(&["threads", "one event each, durable, to", "appends/s", "p50 ms", "p99 ms", "max ms"]);
    for threads in THREADS {
        let mut runs: [Vec<Singles>; 2] = Default::default();
        for _ in 0..rounds {
            for (runs, kind) in runs.iter_mut().zip(["log", "plain"]) {
                let home = Home::new("log-single")?;
                runs.push(support::child(&["single", kind, home.argument(), &threads.to_string()])?);
            }
        }
        for (runs, into) in runs.iter().zip(["the log", "a plain table"]) {
            let median = |of: fn(&Singles) -> f64| Samples::new(runs.iter().map(of)).median();
            table.add_row([
                threads.to_string(),
                into.to_owned(),
                thousands(median(|run| run.appends_a_second)),
                format!("{:.2}", median(|run| run.p50_ms)),
                format!("{:.2}", median(|run| run.p99_ms)),
                format!("{:.1}", Samples::new(runs.iter().map(|run| run.max_ms)).max()),
            ]);
            report.add(&format!("singles by {threads} threads into {into}"), runs)?;
        }
    }
    println!("\n{table}");
    Ok(())
}

fn print_steady(report: &mut Report, rounds: u64, log: &Path) -> Result<()> {
    let rate = STEADY_EVENTS as f64 / STEADY_TICK.as_secs_f64();
    let mut table = table(&["rows are", "events/s", "blocks", "CPU % of a core", "CPU us an event"]);
    let mut runs: [Vec<Steady>; 2] = Default::default();
    for _ in 0..rounds {
        for (runs, packing) in runs.iter_mut().zip(["left", "packed"]) {
            runs.push(support::child(&["steady", packing, Home::new("log-steady")?.argument(), utf8(log)?])?);
        }
    }
    for (runs, packing) in runs.iter().zip(["left", "packed"]) {
        let median = |of: fn(&Steady) -> f64| Samples::new(runs.iter().map(of)).median();
        table.add_row([
            packing.to_owned(),
            thousands(median(|run| run.events as f64 / run.seconds)),
            runs[0].blocks.to_string(),
            format!("{:.1}", median(|run| run.cpu_seconds / run.seconds * 100.0)),
            format!("{:.1}", median(|run| run.cpu_seconds / run.events as f64 * 1e6)),
        ]);
        report.add(&format!("steady, rows {packing}"), runs)?;
    }
    println!("\n{} events/s, {STEADY_EVENTS} an append\n\n{table}", thousands(rate));
    Ok(())
}

fn print_found(report: &mut Report, rounds: u64, millions: u64) -> Result<()> {
    let log = with_rare(&support::log(millions)?)?;
    warm(&log.join("log.sqlite"))?;
    let runs = (0..rounds).map(|_| support::child(&["find", utf8(&log)?])).collect::<Result<Vec<Vec<Found>>>>()?;
    let events = runs[0][0].found as f64;
    let mut table = table(&["in a log of", "what", "events", "ms median", "ns by the events of the log"]);
    for (i, Found { what, found, .. }) in runs[0].iter().enumerate() {
        let milliseconds = Samples::new(runs.iter().map(|run| run[i].milliseconds)).median();
        table.add_row([
            format!("{millions} M"),
            what.clone(),
            thousands(*found as f64),
            format!("{milliseconds:.1}"),
            format!("{:.2}", milliseconds * 1e6 / events),
        ]);
    }
    println!("\n{table}");
    report.add(&format!("found in {millions} M"), runs)
}
