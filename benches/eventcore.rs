//! How fast does EventCore 2.1, by its own runner, make the same view from the same events? `benches/README.md` says how to
//! run and read it.

#![expect(clippy::print_stdout, reason = "the table is what one runs this for")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rusqlite::{Connection, OpenFlags};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shadowbox::config::limits;
use shadowbox::log::{EventLog, Filter};
use shadowbox::model::NewEvent;
use support::{Home, Report, Samples, Stopwatch, Usage, module_file, root, table, thousands, verdict, workplace};

/// How EventCore keeps events and rows; `benches/README.md` describes them.
const SETTINGS: [&str; 3] = ["durable", "relaxed", "memory"];
/// The one to compare with: it keeps what it has made, and waits for no disk, as we do.
const COMPARED: usize = 1;
const EVENTS: u64 = 100_000;
const VIEWS: [&str; 2] = ["carrier_performance", "flight_carrier"];

/// How many times its rate ours must be.
const TIMES: f64 = 50.0;

fn main() -> Result<()> {
    support::main("eventcore", contestant, bench)
}

/// What a contestant made, and how.
#[derive(Serialize, Deserialize)]
struct Made {
    #[serde(flatten)]
    usage: Usage,
    file: PathBuf,
}

fn contestant(arguments: &[&str]) -> Result<Value> {
    let ["shadowbox", home] = *arguments else { bail!("unknown contestant {arguments:?}") };
    support::in_process(async {
        let watch = Stopwatch::start()?;
        let runtime = Home::at(home).start().await?;
        let view = support::view(&runtime, VIEWS[0], |_| true).await;
        support::caught_up(&runtime, &view).await;
        let started = Made { usage: watch.stop()?, file: view.file };
        let watch = Stopwatch::start()?;
        let generation = runtime.rebuild(&view.projection).await?;
        let view = support::view(&runtime, VIEWS[0], |view| view.generation == generation).await;
        let rebuilt = Made { usage: watch.stop()?, file: view.file };
        runtime.shutdown().await;
        Ok(serde_json::to_value([started, rebuilt])?)
    })
}

fn bench(report: &mut Report) -> Result<()> {
    let rounds = support::rounds(3)?;
    let events = support::numbers("SHADOWBOX_BENCH_EVENTCORE", &[EVENTS])?[0];
    let module = support::modules(&["carrier-performance"])?.join(module_file("carrier-performance"));
    let program = build()?;
    let log = beginning(&support::log(1)?, events)?;
    let plain = support::plain(&log)?;
    let (mut started, mut rebuilt): (Vec<Made>, Vec<Made>) = Default::default();
    let mut theirs: [Vec<Made>; 3] = Default::default();
    for round in 0..=rounds {
        let home = Home::new("shadowbox")?;
        home.link_log(&log)?;
        home.drop_module(&module_file("carrier-performance"), &std::fs::read(&module)?)?;
        let [new, rebuild]: [Made; 2] = support::child(&["shadowbox", home.argument()])?;
        // The first round fills the cache of compiled modules and the page cache.
        if round == 0 {
            continue;
        }
        println!(
            "round {round} of {rounds}: shadowbox {:.2} s, rebuild {:.2} s",
            new.usage.seconds, rebuild.usage.seconds
        );
        for (setting, theirs) in SETTINGS.iter().zip(&mut theirs) {
            let home = Home::new("eventcore")?;
            let other = run(&program, setting, &plain, &home, events)?;
            println!("round {round} of {rounds}: eventcore, {setting} {:.2} s", other.usage.seconds);
            if round == 1 && *setting != "memory" {
                assert_same_rows(&rebuild.file, &other.file)?;
            }
            theirs.push(other);
        }
        started.push(new);
        rebuilt.push(rebuild);
    }
    report.add("events", events)?;
    report.add("shadowbox", &started)?;
    report.add("shadowbox_rebuild", &rebuilt)?;
    for (setting, theirs) in SETTINGS.iter().zip(&theirs) {
        report.add(setting, theirs)?;
    }
    print_table(events, &started, &rebuilt, &theirs);
    Ok(())
}

/// The program in its own workspace, which no other build is to know of.
fn build() -> Result<PathBuf> {
    let (place, target) = (root().join("benches/eventcore"), workplace().join("eventcore-build"));
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(place).args(["build", "--release", "--locked", "--target-dir"]).arg(&target);
    ensure!(cargo.status()?.success(), "the program cannot be built; it needs its crates from the registry");
    Ok(target.join("release/eventcore-contestant"))
}

fn run(program: &Path, setting: &str, plain: &Path, home: &Home, events: u64) -> Result<Made> {
    let mut command = Command::new(program);
    command.arg(setting).args([plain, home.path()]).arg(events.to_string()).stderr(Stdio::inherit());
    let output = command.output()?;
    ensure!(output.status.success(), "eventcore, {setting} failed: {}", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("the answer of eventcore, {setting}"))
}

/// A log with all airlines and the first flight events of another one, so many together.
fn beginning(log: &Path, events: u64) -> Result<PathBuf> {
    let made = log.with_extension(format!("first-{events}"));
    if made.exists() {
        return Ok(made);
    }
    let part = log.with_extension("first.part");
    if part.exists() {
        std::fs::remove_dir_all(&part)?;
    }
    let (from, into) = (EventLog::open(log)?, EventLog::open(&part)?);
    let wanted = |e: &NewEvent| e.source == "flights" || e.event_type == "AirlineRegistered";
    let (mut copied, mut next) = (0, Some(0));
    while let Some(begin) = next.filter(|_| copied < events) {
        let mut page = Vec::new();
        next = from.events(&Filter::default(), begin, limits::APPEND_EVENTS, |event| {
            if wanted(&event.event) && copied < events {
                copied += 1;
                page.push(event.event);
            }
        })?;
        into.append(page)?;
    }
    ensure!(copied == events, "the log has only {copied} events");
    into.seal(0)?;
    into.tidy();
    drop((from, into));
    std::fs::rename(part, &made)?;
    Ok(made)
}

/// A wrong result is not worth measuring.
fn assert_same_rows(ours: &Path, theirs: &Path) -> Result<()> {
    let connection = Connection::open_with_flags(ours, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.execute("ATTACH DATABASE ? AS theirs", [theirs.to_str().context("the workspace's path is UTF-8")?])?;
    for view in VIEWS {
        let differ: i64 = connection.query_row(
            &format!(
                "SELECT (SELECT count(*) FROM (SELECT * FROM main.{view} EXCEPT SELECT * FROM theirs.{view}))
                 + (SELECT count(*) FROM (SELECT * FROM theirs.{view} EXCEPT SELECT * FROM main.{view}))"
            ),
            [],
            |row| row.get(0),
        )?;
        let rows: i64 = connection.query_row(&format!("SELECT count(*) FROM main.{view}"), [], |row| row.get(0))?;
        ensure!(rows > 0 && differ == 0, "{view}: {differ} of {rows} rows differ");
    }
    Ok(())
}

fn print_table(events: u64, started: &[Made], rebuilt: &[Made], theirs: &[Vec<Made>; 3]) {
    let mut times = table(&["contestant", "s min", "s median", "events/s", "peak MB", "CPU s", "rebuild is faster"]);
    let median = |made: &[Made]| Samples::new(made.iter().map(|made| made.usage.seconds)).median();
    let times_faster = |made: &[Made]| median(made) / median(rebuilt);
    let settings = SETTINGS.iter().map(|setting| format!("eventcore, {setting}"));
    let contestants =
        ["shadowbox, with its start", "shadowbox, rebuild"].map(str::to_owned).into_iter().chain(settings);
    let all = [started, rebuilt].into_iter().chain(theirs.iter().map(Vec::as_slice));
    for (contestant, made) in contestants.zip(all) {
        let of = |what: fn(&Usage) -> f64| Samples::new(made.iter().map(|made| what(&made.usage)));
        times.add_row([
            contestant,
            format!("{:.3}", of(|usage| usage.seconds).min()),
            format!("{:.3}", median(made)),
            thousands(events as f64 / median(made)),
            format!("{:.0}", of(|usage| usage.peak_mb).max()),
            format!("{:.2}", of(|usage| usage.cpu_seconds).median()),
            format!("{:.1} times", times_faster(made)),
        ]);
    }
    let factor = times_faster(&theirs[COMPARED]);
    let factor = verdict(factor >= TIMES, format!("{factor:.0} times, at least {TIMES}"));
    println!("\n{events} events\n\n{times}\n\nagainst {}: {factor}", SETTINGS[COMPARED]);
}
