//! How long does it take from a module's file to what its code does, and how long does nothing become visible while one
//! module takes over from another? `benches/README.md` says how to run and read it.

#![expect(clippy::print_stdout, reason = "the table is what one runs this for")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shadowbox::log::EventLog;
use shadowbox::model::{NewEvent, Position, Time};
use shadowbox::supervisor::{LiveView, Runtime};
use support::{Home, Report, Samples, module_file, patched, table, verdict};
use tokio::sync::oneshot;

/// The plugin that the tutorial builds.
const TUTORIAL: &str = "order-summary";

/// A batch of one event is appended so often, durably; later if the disk needs longer.
const TICK: Duration = Duration::from_millis(1);

/// In one process: new projections, and modules that take over from their former.
const STARTS: usize = 5;
const SWAPS: usize = 10;
/// Between two of them, so that each is alone.
const REST: Duration = Duration::from_millis(200);

const SWAP_MS: f64 = 5.0;
const START_MS: f64 = 20.0;
const COMPILE_MS: f64 = 400.0;

fn main() -> Result<()> {
    support::main("reload", contestant, bench)
}

/// Milliseconds, in the order of what was done.
#[derive(Serialize, Deserialize)]
struct Run {
    /// From the file of a new projection to its first visible commit.
    starts: Vec<f64>,
    /// From the file of other code to the first visible event that it applied.
    swaps: Vec<f64>,
    /// The longest time without a newly visible event around each swap.
    swap_gaps: Vec<f64>,
    /// The same where nothing was swapped, in a time as long.
    calm_gaps: Vec<f64>,
    appended: u64,
}

/// When a view had become complete to a later position, and to which.
type Seen = Vec<(Instant, u64)>;

fn contestant(arguments: &[&str]) -> Result<Value> {
    let [home, module] = *arguments else { bail!("unknown contestant {arguments:?}") };
    let (home, module) = (Home::at(home), std::fs::read(module)?);
    let run = support::in_process(async {
        let runtime = home.start().await?;
        let stop = Arc::new(AtomicBool::new(false));
        let appending = std::thread::spawn({
            let (log, stop) = (runtime.log().clone(), stop.clone());
            move || append(&log, &stop)
        });
        tokio::time::sleep(REST).await;
        let mut starts = Vec::new();
        for n in 0..STARTS {
            starts.push(start(&runtime, &home, &module, n).await?);
            tokio::time::sleep(REST).await;
        }
        home.drop_module(&module_file(TUTORIAL), &module)?;
        let live = support::view(&runtime, "order_summary", |_| true).await;
        let (end, ended) = oneshot::channel();
        let watching = tokio::spawn(watch(live.clone(), ended));
        tokio::time::sleep(REST).await;
        let mut windows = Vec::new();
        for n in 0..SWAPS {
            windows.push(swap(&runtime, &home, &variant(&module, n)).await?);
        }
        // As long as it takes to swap, without it.
        let mut calm = Vec::new();
        for (began, ended) in &windows {
            let now = Instant::now();
            tokio::time::sleep(*ended - *began).await;
            calm.push((now, Instant::now()));
        }
        stop.store(true, Ordering::Relaxed);
        let appended = appending.join().expect("the appender does not panic")?;
        support::caught_up(&runtime, &live).await;
        runtime.shutdown().await;
        drop(end);
        let seen = watching.await?;
        Ok(Run {
            starts,
            swaps: first_seen(&live, &seen, &windows, appended)?,
            swap_gaps: windows.iter().map(|window| longest_gap(&seen, window)).collect(),
            calm_gaps: calm.iter().map(|window| longest_gap(&seen, window)).collect(),
            appended,
        })
    })?;
    Ok(serde_json::to_value(run)?)
}

/// Other code: it calls an open order by another name, which tells the rows apart that it made.
fn variant(module: &[u8], n: usize) -> Vec<u8> {
    patched(module, "openplaced", &format!("{}placed", status(n)))
}

fn status(n: usize) -> String {
    format!("op{n:02}")
}

/// Appends an order at each tick until it is told to stop; answers how many.
fn append(log: &EventLog, stop: &AtomicBool) -> Result<u64> {
    let mut appended = 0;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let id = format!("o-{appended:09}");
        log.append([NewEvent {
            source: "orders".into(),
            stream: id.clone(),
            version: 1,
            event_type: "OrderCreated".into(),
            time: Time::now(),
            metadata: String::new(),
            payload: json!({ "order_id": id, "customer": "Ada" }).to_string().into_bytes(),
            id,
        }])?;
        appended += 1;
        // Late is late: what the disk has cost is not made good by hurrying.
        next = (next + TICK).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(appended)
}

/// A projection that nobody has seen; answers how long it took until its view had rows.
async fn start(runtime: &Runtime, home: &Home, module: &[u8], n: usize) -> Result<f64> {
    let (name, view) = (format!("order-s{n:06}"), format!("order_s{n:06}"));
    let module = patched(&patched(module, TUTORIAL, &name), "order_summary", &view);
    let file = module_file(&name);
    let began = Instant::now();
    home.drop_module(&file, &module)?;
    let live = support::view(runtime, &view, |_| true).await;
    // The log has nothing but what it wants, so that its first commit makes it complete to the first position.
    live.reached.wait_for(Position(0)).await;
    let milliseconds = began.elapsed().as_secs_f64() * 1e3;
    // The next one begins in the same quiet.
    std::fs::remove_file(home.plugins().join(file))?;
    let name = Some(name);
    while runtime.status().projections.iter().any(|p| Some(&p.name) == name.as_ref() && p.file.is_some()) {
        tokio::time::sleep(TICK).await;
    }
    Ok(milliseconds)
}

/// Notes each commit, until the view is complete and the sender is gone.
async fn watch(live: LiveView, mut end: oneshot::Receiver<()>) -> Seen {
    let mut seen = Vec::new();
    loop {
        let next = live.reached.now().map_or(Position(0), Position::next);
        tokio::select! {
            () = live.reached.wait_for(next) => {
                let now = Instant::now();
                seen.extend(live.reached.now().map(|position| (now, position.0)));
            }
            _ = &mut end => return seen,
        }
    }
}

/// Drops other code for the live projection; answers when, and when it was all over.
async fn swap(runtime: &Runtime, home: &Home, module: &[u8]) -> Result<(Instant, Instant)> {
    let hash = shadowbox::plugin::hash(module);
    let began = Instant::now();
    home.drop_module(&module_file(TUTORIAL), module)?;
    loop {
        let status = runtime.status();
        let projection = status.projections.iter().find(|p| p.name == TUTORIAL).context("it is live")?;
        ensure!(projection.live.error.is_none(), "{:?}", projection.live.error);
        if projection.live.module_hash == hash {
            break;
        }
        ensure!(began.elapsed() < support::DEADLINE, "it is not swapped: {:#?}", status.refused);
        tokio::time::sleep(TICK).await;
    }
    tokio::time::sleep(REST).await;
    Ok((began, Instant::now()))
}

/// Milliseconds from the beginning of each swap until an event was visible that the new code had applied.
fn first_seen(live: &LiveView, seen: &Seen, windows: &[(Instant, Instant)], appended: u64) -> Result<Vec<f64>> {
    let connection = Connection::open(&live.file)?;
    // A wrong result is not worth measuring.
    let rows: i64 = connection.query_row("SELECT count(*) FROM order_summary", [], |row| row.get(0))?;
    ensure!(rows as u64 == appended, "{rows} rows of {appended} orders");
    let mut milliseconds = Vec::new();
    for (n, (began, _)) in windows.iter().enumerate() {
        let first = "SELECT min(order_id) FROM order_summary WHERE status = ?";
        let first: String = connection.query_row(first, [status(n)], |row| row.get(0))?;
        // The log has nothing but orders, so that positions are their numbers.
        let position: u64 = first.trim_start_matches("o-").parse()?;
        let visible = seen.iter().find(|(_, reached)| *reached >= position).context("an event that was never seen")?;
        milliseconds.push((visible.0 - *began).as_secs_f64() * 1e3);
    }
    Ok(milliseconds)
}

/// The longest time between two commits, of those that lie in a window at least in part; milliseconds.
fn longest_gap(seen: &Seen, window: &(Instant, Instant)) -> f64 {
    let gaps = seen.windows(2).filter(|pair| pair[1].0 > window.0 && pair[0].0 < window.1);
    gaps.map(|pair| (pair[1].0 - pair[0].0).as_secs_f64() * 1e3).fold(0.0, f64::max)
}

fn bench(report: &mut Report) -> Result<()> {
    let rounds = support::rounds(5)?;
    let module = support::modules(&[TUTORIAL])?.join(module_file(TUTORIAL));
    let module = module.to_str().context("the workspace's path is UTF-8")?;
    let cache = support::workplace().join("homes/reload-cache");
    let (mut cold, mut cached) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        if cache.exists() {
            std::fs::remove_dir_all(&cache)?;
        }
        // The second process finds what the first one compiled.
        for (what, runs) in [("cold", &mut cold), ("cached", &mut cached)] {
            let run: Run = support::child(&[Home::with_cache("reload", &cache)?.argument(), module])?;
            let (start, swap) = (median(&run.starts), median(&run.swaps));
            println!("round {round} of {rounds}, {what}: starts {start:.1} ms, swaps {swap:.1} ms");
            runs.push(run);
        }
    }
    let mut table = table(&["from the file to", "code", "samples", "ms median", "ms p90", "ms max", "median's target"]);
    let mut row = |what: &str, code: &str, runs: &[Run], of: fn(&Run) -> &Vec<f64>, target: Option<f64>| {
        let samples = Samples::new(runs.iter().flat_map(|run| of(run).iter().copied()));
        let median = samples.median();
        table.add_row([
            what.to_owned(),
            code.to_owned(),
            samples.len().to_string(),
            format!("{median:.1}"),
            format!("{:.1}", samples.at(0.9)),
            format!("{:.1}", samples.max()),
            target.map_or(String::new(), |target| verdict(median <= target, format!("{target} ms"))),
        ]);
    };
    row("first rows of a new projection", "compiled", &cold, |run| &run.starts, Some(COMPILE_MS));
    row("first rows of a new projection", "cached", &cached, |run| &run.starts, Some(START_MS));
    row("first event by other code", "compiled", &cold, |run| &run.swaps, Some(COMPILE_MS));
    row("first event by other code", "cached", &cached, |run| &run.swaps, Some(START_MS));
    row("nothing visible, at a swap", "compiled", &cold, |run| &run.swap_gaps, Some(SWAP_MS));
    row("nothing visible, at a swap", "cached", &cached, |run| &run.swap_gaps, Some(SWAP_MS));
    row("nothing visible, no swap", "", &cached, |run| &run.calm_gaps, None);
    println!("\n{table}");
    report.add("compiled", cold)?;
    report.add("cached", cached)
}

fn median(values: &[f64]) -> f64 {
    Samples::new(values.iter().copied()).median()
}
