//! How fast does a new projection catch up with a log through the sandbox, against an honest native program, written by
//! hand for this one purpose, over the same file? `benches/README.md` says how to run and read it.

#![expect(clippy::print_stdout, reason = "the table is what one runs this for")]

#[path = "catch_up/native.rs"]
mod native;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use shadowbox::config::{Written, limits};
use shadowbox::log::{EventLog, cloudevents};
use shadowbox::model::Checkpoint;
use shadowbox::supervisor::Runtime;

/// A projection, and the views whose rows are compared: the one that it is for, and helpers that a reader could want.
struct Projection {
    name: &'static str,
    views: &'static [&'static str],
}

impl Projection {
    fn module(&self) -> String {
        format!("{}.wasm", self.name.replace('-', "_"))
    }
}

const PROJECTIONS: [Projection; 2] = [
    Projection { name: "carrier-performance", views: &["carrier_performance", "flight_carrier"] },
    Projection { name: "flight-board", views: &["flight_board", "facts"] },
];

const CONTESTANTS: [&str; 2] = ["shadowbox", "native"];
const SOURCES: [&str; 3] = ["fleet", "flights", "weather"];

const GOAL_EVENTS_A_SECOND: f64 = 300_000.0;
const GOAL_PEAK_MB: f64 = 500.0;

/// The bundled sample has 36,845 flight events; with these it comes near to the year's million.
const REPETITIONS_OF_THE_SAMPLE: i64 = 27;

/// A catch-up takes seconds; one that takes this long stands still.
const DEADLINE: Duration = Duration::from_secs(300);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // In a process of its own, memory and CPU time are those of one contestant.
        ["contestant", contestant, projection, log, directory] => {
            let run = match contestant {
                "shadowbox" => through_the_sandbox(projection, Path::new(directory))?,
                _ => native::run(projection, Path::new(log), Path::new(directory))?,
            };
            println!("{}", serde_json::to_string(&run)?);
            Ok(())
        }
        // Test runners start benches, too, but without this.
        [.., "--bench"] => compare(),
        _ => {
            println!("run it with cargo bench; it takes minutes");
            Ok(())
        }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

fn workplace() -> PathBuf {
    root().join("target/bench")
}

/// What one contestant did, measured by itself.
#[derive(Clone, Serialize, Deserialize)]
struct Run {
    seconds: f64,
    cpu_seconds: f64,
    peak_mb: f64,
    /// CPU seconds by thread, of those that were there at the end.
    threads: BTreeMap<String, f64>,
    /// The SQLite file with the views.
    file: PathBuf,
    /// How many events were applied, if the contestant knows.
    events: Option<u64>,
}

struct Stopwatch {
    began: Instant,
    cpu_seconds: f64,
}

impl Stopwatch {
    fn start() -> Result<Stopwatch> {
        Ok(Stopwatch { cpu_seconds: cpu_seconds(Path::new("/proc/self/stat"))?, began: Instant::now() })
    }

    fn stop(self, file: PathBuf, events: Option<u64>) -> Result<Run> {
        let seconds = self.began.elapsed().as_secs_f64();
        let cpu_seconds = cpu_seconds(Path::new("/proc/self/stat"))? - self.cpu_seconds;
        Ok(Run { seconds, cpu_seconds, peak_mb: peak_mb()?, threads: threads()?, file, events })
    }
}

/// User and system time of a process or a thread. Linux counts in hundredths of a second here on every platform.
fn cpu_seconds(stat: &Path) -> Result<f64> {
    let text = fs::read_to_string(stat)?;
    // The name in parentheses may have spaces; after it come the state and ten other fields.
    let (_, fields) = text.rsplit_once(')').context("no name in stat")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}

fn peak_mb() -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM in status")?;
    let kilobytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes * 1024.0 / 1e6)
}

fn threads() -> Result<BTreeMap<String, f64>> {
    let mut threads = BTreeMap::new();
    for thread in fs::read_dir("/proc/self/task")? {
        let thread = thread?.path();
        let name = fs::read_to_string(thread.join("comm"))?.trim().to_owned();
        *threads.entry(name).or_insert(0.0) += cpu_seconds(&thread.join("stat"))?;
    }
    threads.retain(|_, seconds| *seconds > 0.0);
    Ok(threads)
}

/// Shadowbox as `shadowbox run` starts it, without HTTP, which does nothing meanwhile.
fn through_the_sandbox(projection: &str, directory: &Path) -> Result<Run> {
    let projection = PROJECTIONS.iter().find(|p| p.name == projection).context("no such projection")?;
    let tokio = tokio::runtime::Runtime::new()?;
    let watch = Stopwatch::start()?;
    let run = tokio.block_on(async {
        let written = Written {
            data: Some(directory.join("data")),
            plugins: Some(directory.join("plugins")),
            ..Written::default()
        };
        let runtime = Runtime::start(written.validate()?).await?;
        let caught_up = async {
            let view = loop {
                // A view appears without a signal.
                match runtime.views().get(projection.views[0]) {
                    Some(view) => break view.clone(),
                    None => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            };
            let heads = runtime.log().heads_now();
            let heads = heads.iter().filter(|(source, _)| view.sources.contains(&source.to_string()));
            let heads: Checkpoint = heads.map(|(source, head)| (source.to_string(), head.position)).collect();
            let mut checkpoint = view.checkpoint.clone();
            checkpoint.wait_for(|now| now.covers(&heads, |_| true)).await.map(|_| view.file)
        };
        let caught_up = tokio::time::timeout(DEADLINE, caught_up).await;
        let Ok(file) = caught_up else { bail!("it stands still: {:#?}", runtime.status()) };
        let run = watch.stop(file?, None)?;
        runtime.shutdown().await;
        Ok(run)
    })?;
    // As the binary does: all is committed.
    tokio.shutdown_background();
    Ok(run)
}

fn compare() -> Result<()> {
    let rounds = match std::env::var("SHADOWBOX_BENCH_ROUNDS") {
        Ok(rounds) => rounds.parse().context("SHADOWBOX_BENCH_ROUNDS must be a number")?,
        Err(_) => 5,
    };
    ensure!(rounds > 0, "no rounds, no numbers");
    let modules = build_modules()?;
    let log = prepare_log()?;
    let load_before = load_average()?;
    println!("load average of the last minute: {load_before}; other work on the machine makes the numbers worse");
    let mut results = Vec::new();
    for projection in &PROJECTIONS {
        // The first round fills the cache of compiled modules and the page cache, and is where rows are compared.
        let first = CONTESTANTS.map(|contestant| measure(contestant, projection, &log, &modules));
        let [ours, natives] = first;
        let (ours, natives) = (ours?, natives?);
        let rows = assert_same_rows(projection, &ours.file, &natives.file)?;
        let events = natives.events.context("the native program counts events")?;
        println!("{}: {events} events, {rows} rows, the same from both", projection.name);
        let mut runs: [Vec<Run>; 2] = Default::default();
        for round in 1..=rounds {
            for (contestant, runs) in CONTESTANTS.iter().zip(&mut runs) {
                let run = measure(contestant, projection, &log, &modules)?;
                println!("{} round {round} of {rounds}: {contestant} {:.2} s", projection.name, run.seconds);
                runs.push(run);
            }
        }
        results.push(Outcome { projection: projection.name, events, rows, runs });
    }
    fs::remove_dir_all(workplace().join("runs"))?;
    let load_after = load_average()?;
    print_tables(&results);
    let json = serde_json::json!({
        "when": jiff::Timestamp::now().to_string(),
        "cpu": cpu_model()?,
        "cores": std::thread::available_parallelism()?.get(),
        "load_average": { "before": load_before, "after": load_after },
        "results": results.iter().map(Outcome::to_json).collect::<Vec<_>>(),
    });
    let path = workplace().join("catch_up.json");
    fs::write(&path, serde_json::to_string_pretty(&json)?)?;
    println!("\nall runs are in {}", path.display());
    Ok(())
}

/// Runs one contestant on a fresh data directory in a process of its own.
fn measure(contestant: &str, projection: &Projection, log: &Path, modules: &Path) -> Result<Run> {
    let directory = workplace().join("runs").join(format!("{}-{contestant}", projection.name));
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    let (data, plugins, cache) = (directory.join("data"), directory.join("plugins"), workplace().join("cache"));
    for directory in [&data, &plugins, &cache] {
        fs::create_dir_all(directory)?;
    }
    // The same file, so that both contestants find it in the page cache or neither does.
    fs::hard_link(log.join("log.sqlite"), data.join("log.sqlite"))?;
    std::os::unix::fs::symlink(cache, data.join("cache"))?;
    let module = projection.module();
    fs::copy(modules.join(&module), plugins.join(&module))?;
    let mut child = Command::new(std::env::current_exe()?);
    child.args(["contestant", contestant, projection.name]).args([log, &directory]);
    let output = child.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{contestant} failed: {}", output.status);
    serde_json::from_slice(&output.stdout).context("the answer of a contestant")
}

/// The modules as their authors build them.
fn build_modules() -> Result<PathBuf> {
    // The directory of the tests' modules, so that they are built once.
    let target = root().join("target/plugins");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).args(["build", "--profile", "plugin", "--target", "wasm32-wasip2", "--target-dir"]);
    cargo.arg(&target).args(PROJECTIONS.iter().flat_map(|p| ["-p", p.name]));
    ensure!(cargo.status()?.success(), "the modules cannot be built");
    // Somebody may build there again while this runs, and another module would have to be compiled again.
    let kept = workplace().join("modules");
    fs::create_dir_all(&kept)?;
    for projection in &PROJECTIONS {
        let file = projection.module();
        fs::copy(target.join("wasm32-wasip2/plugin").join(&file), kept.join(&file))?;
    }
    Ok(kept)
}

/// The directory of a log with the events, made once for each input.
fn prepare_log() -> Result<PathBuf> {
    let given = std::env::var_os("SHADOWBOX_BENCH_EVENTS");
    let directory = root().join(given.as_deref().unwrap_or("tests/data/flights".as_ref()));
    let repetitions = if given.is_some() { 1 } else { REPETITIONS_OF_THE_SAMPLE };
    let mut digest = Sha256::new();
    digest.update(repetitions.to_le_bytes());
    for source in SOURCES {
        let file = directory.join(format!("{source}.jsonl.zst"));
        digest.update(fs::read(&file).with_context(|| file.display().to_string())?);
    }
    let digest: String = digest.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let (made, part) = (workplace().join(&digest), workplace().join(format!("{digest}.part")));
    if made.exists() {
        return Ok(made);
    }
    println!("making the log of {}", directory.display());
    if part.exists() {
        fs::remove_dir_all(&part)?;
    }
    let log = EventLog::open(&part)?;
    let mut events = Vec::with_capacity(limits::APPEND_EVENTS);
    for source in SOURCES {
        for n in 0..if source == "flights" { repetitions } else { 1 } {
            let file = fs::File::open(directory.join(format!("{source}.jsonl.zst")))?;
            for line in BufReader::new(zstd::Decoder::new(file)?).lines() {
                let line = shift(line?, n)?;
                events.push(cloudevents::parse(line.as_bytes(), Some(source))?);
                if events.len() == limits::APPEND_EVENTS {
                    log.append(&events)?;
                    events.clear();
                }
            }
        }
    }
    log.append(&events)?;
    drop(log);
    // The file is all: what is linked into a data directory comes without its write-ahead log.
    let connection = Connection::open(part.join("log.sqlite"))?;
    let busy: i64 = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    ensure!(busy == 0, "the log is in use");
    connection.close().map_err(|(_, error)| error)?;
    fs::rename(part, &made)?;
    Ok(made)
}

/// The event of a flight, two weeks times `n` later by its id alone. Its times stay, or there would be no weather for it.
fn shift(line: String, n: i64) -> Result<String> {
    if n == 0 {
        return Ok(line);
    }
    let id = line.split("\"subject\":\"flight-").nth(1).and_then(|rest| rest.split('"').next());
    let id = id.with_context(|| format!("no flight in {line}"))?;
    let (date, rest) = id.split_at_checked(8).with_context(|| format!("no date in {id}"))?;
    let date = jiff::civil::Date::strptime("%Y%m%d", date)?;
    let later = date.checked_add(jiff::Span::new().try_weeks(2 * n)?)?;
    Ok(line.replace(id, &format!("{}{rest}", later.strftime("%Y%m%d"))))
}

/// Panics at the first row that differs; answers how many the main view has. A wrong result is not worth measuring.
fn assert_same_rows(projection: &Projection, ours: &Path, natives: &Path) -> Result<u64> {
    let mut counts = Vec::new();
    let (ours, natives) = (Connection::open(ours)?, Connection::open(natives)?);
    for view in projection.views {
        let columns = |connection: &Connection| -> rusqlite::Result<Vec<(String, i64)>> {
            let mut statement = connection.prepare("SELECT name, pk FROM pragma_table_info(?)")?;
            let columns = statement.query_map([view], |row| Ok((row.get(0)?, row.get(1)?)))?;
            columns.collect()
        };
        let here = columns(&ours)?;
        assert_eq!(here, columns(&natives)?, "the columns and the key of {view}");
        let mut key: Vec<_> = here.iter().filter(|(_, place)| *place > 0).collect();
        key.sort_by_key(|(_, place)| *place);
        let key: Vec<_> = key.into_iter().map(|(name, _)| name.as_str()).collect();
        let sql = format!("SELECT * FROM {view} ORDER BY {}", key.join(", "));
        let (mut ours, mut natives) = (ours.prepare(&sql)?, natives.prepare(&sql)?);
        let (mut ours, mut natives) = (ours.query([])?, natives.query([])?);
        let row = |row: Option<&rusqlite::Row<'_>>| -> rusqlite::Result<Option<Vec<rusqlite::types::Value>>> {
            row.map(|row| (0..here.len()).map(|i| row.get(i)).collect()).transpose()
        };
        let mut count = 0;
        loop {
            let (ours, natives) = (row(ours.next()?)?, row(natives.next()?)?);
            assert_eq!(ours, natives, "row {count} of {view}");
            if ours.is_none() {
                break;
            }
            count += 1;
        }
        counts.push(count);
    }
    assert!(counts[0] > 0, "{} has no rows", projection.views[0]);
    Ok(counts[0])
}

fn load_average() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split_whitespace().next().context("an empty loadavg")?.parse()?)
}

fn cpu_model() -> Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let model = text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
    Ok(model.unwrap_or("unknown").to_owned())
}

/// All runs of one projection, in the order of the contestants.
struct Outcome {
    projection: &'static str,
    events: u64,
    rows: u64,
    runs: [Vec<Run>; 2],
}

fn sorted(runs: &[Run], what: impl Fn(&Run) -> f64) -> Vec<f64> {
    let mut values: Vec<f64> = runs.iter().map(what).collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(runs: &[Run], what: impl Fn(&Run) -> f64) -> f64 {
    let values = sorted(runs, what);
    let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    (low + high) / 2.0
}

impl Outcome {
    fn events_a_second(&self, contestant: usize) -> f64 {
        self.events as f64 / median(&self.runs[contestant], |run| run.seconds)
    }

    fn peak_mb(&self, contestant: usize) -> f64 {
        sorted(&self.runs[contestant], |run| run.peak_mb).last().copied().unwrap_or_default()
    }

    fn ratio(&self) -> f64 {
        median(&self.runs[0], |run| run.seconds) / median(&self.runs[1], |run| run.seconds)
    }

    fn goal_is_met(&self) -> bool {
        self.events_a_second(0) >= GOAL_EVENTS_A_SECOND && self.peak_mb(0) < GOAL_PEAK_MB
    }

    fn to_json(&self) -> serde_json::Value {
        let contestants = CONTESTANTS.iter().zip(&self.runs).enumerate().map(|(i, (name, runs))| {
            let json = serde_json::json!({
                "seconds_min": sorted(runs, |run| run.seconds)[0],
                "seconds_median": median(runs, |run| run.seconds),
                "events_a_second": self.events_a_second(i),
                "peak_mb": self.peak_mb(i),
                "cpu_seconds_median": median(runs, |run| run.cpu_seconds),
                "runs": runs,
            });
            (name.to_string(), json)
        });
        serde_json::json!({
            "projection": self.projection,
            "events": self.events,
            "rows": self.rows,
            "ratio_of_medians": self.ratio(),
            "goal_is_met": self.goal_is_met(),
            "contestants": contestants.collect::<serde_json::Map<_, _>>(),
        })
    }
}

fn print_tables(outcomes: &[Outcome]) {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(["projection", "contestant", "s min", "s median", "events/s", "peak MB", "CPU s"]);
    let mut ratios = comfy_table::Table::new();
    ratios.load_preset(comfy_table::presets::ASCII_MARKDOWN);
    ratios.set_header(["projection", "shadowbox / native", "at least 300,000 events/s and below 500 MB"]);
    for outcome in outcomes {
        for (i, (contestant, runs)) in CONTESTANTS.iter().zip(&outcome.runs).enumerate() {
            table.add_row([
                outcome.projection.to_owned(),
                contestant.to_string(),
                format!("{:.2}", sorted(runs, |run| run.seconds)[0]),
                format!("{:.2}", median(runs, |run| run.seconds)),
                format!("{:.0}", outcome.events_a_second(i)),
                format!("{:.0}", outcome.peak_mb(i)),
                format!("{:.2}", median(runs, |run| run.cpu_seconds)),
            ]);
        }
        let met = if outcome.goal_is_met() { "met" } else { "missed" };
        ratios.add_row([outcome.projection.to_owned(), format!("{:.2}", outcome.ratio()), met.to_owned()]);
    }
    println!("\n{table}\n\n{ratios}");
}
