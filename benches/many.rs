//! What do many projections on one log cost, while they catch up and while they wait? `benches/README.md` says how to run
//! and read it.

#![expect(clippy::print_stdout, reason = "the table is what one runs this for")]

mod support;

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shadowbox::config::Written;
use shadowbox::log::EventLog;
use shadowbox::plugin::Engine;
use shadowbox::supervisor::Runtime;
use support::{Home, Process, Report, Samples, Stopwatch, Usage, module_file, patched, table, thousands, verdict};

/// A light projection; all are copies of it under other names.
const LIGHT: &str = "event-counts";

/// How long nothing happens while idle CPU time is measured, and how long before.
const IDLE: Duration = Duration::from_secs(10);
const SETTLE: Duration = Duration::from_secs(2);

/// The least that [`TOGETHER`] projections must apply a second, in all.
const RATE: f64 = 3_000_000.0;
const TOGETHER: u64 = 50;
/// What so many idle projections may cost: percent of a core in all, and MB of memory each.
const IDLE_PERCENT: f64 = 2.0;
const IDLE_MB: f64 = 4.0;
const WAITING: u64 = 200;

fn main() -> Result<()> {
    support::main("many", contestant, bench)
}

/// A runtime from its start until all of its projections are at the head, and then idle.
#[derive(Serialize, Deserialize)]
struct Run {
    usage: Usage,
    idle_percent: f64,
    idle_mb: f64,
}

/// All projections from offset zero, and the same once more after a restart.
#[derive(Serialize, Deserialize)]
struct Round {
    caught_up: Run,
    restarted: Run,
}

fn contestant(arguments: &[&str]) -> Result<Value> {
    let [home, projections] = *arguments else { bail!("unknown contestant {arguments:?}") };
    let (home, projections): (_, u64) = (Home::at(home), projections.parse()?);
    let run = support::in_process(async {
        let watch = Stopwatch::start()?;
        let runtime = home.start().await?;
        for n in 0..projections {
            let live = support::view(&runtime, &view(n), |_| true).await;
            support::caught_up(&runtime, &live).await;
        }
        let usage = watch.stop()?;
        tokio::time::sleep(SETTLE).await;
        let before = Process::this().cpu_seconds()?;
        tokio::time::sleep(IDLE).await;
        let idle_percent = (Process::this().cpu_seconds()? - before) / IDLE.as_secs_f64() * 100.0;
        let idle_mb = Process::this().resident_mb()?;
        assert_all_counted(&runtime, projections)?;
        runtime.shutdown().await;
        Ok(Run { usage, idle_percent, idle_mb })
    })?;
    Ok(serde_json::to_value(run)?)
}

/// A wrong result is not worth measuring.
fn assert_all_counted(runtime: &Runtime, projections: u64) -> Result<()> {
    let expected = runtime.log().head_now().next;
    let views = runtime.views();
    ensure!(
        views.len() as u64 == projections,
        "{} of {projections} views: {:#?}",
        views.len(),
        runtime.status().refused
    );
    for (name, live) in views.iter() {
        let sql = format!("SELECT sum(events) FROM {name}");
        let counted: i64 = Connection::open(&live.file)?.query_row(&sql, [], |row| row.get(0))?;
        ensure!(counted as u64 == expected, "{name} has counted {counted} of {expected} events");
    }
    Ok(())
}

fn view(n: u64) -> String {
    format!("event_{n:06}")
}

fn bench(report: &mut Report) -> Result<()> {
    let rounds = support::rounds(1)?;
    let sizes = support::numbers("SHADOWBOX_BENCH_PROJECTIONS", &[1, 10, 50, 200])?;
    let module = std::fs::read(support::modules(&[LIGHT])?.join(module_file(LIGHT)))?;
    let log = support::log(1)?;
    let events = EventLog::open(&log)?.head_now().next;
    let renamed = |n: u64| patched(&patched(&module, LIGHT, &view(n).replace('_', "-")), "event_counts", &view(n));
    println!("compiling {} modules, unless they are cached", sizes.iter().max().unwrap_or(&0));
    let engine = Engine::new(Some(&support::cache()), Written::default().validate()?.sandbox)?;
    for n in 0..sizes.iter().copied().max().unwrap_or(0) {
        engine.admit(&renamed(n))?;
    }
    let mut all: Vec<(u64, Vec<Round>)> = Vec::new();
    // None: what the runtime itself needs.
    for projections in std::iter::once(0).chain(sizes) {
        let mut measured = Vec::new();
        for round in 1..=rounds {
            let home = Home::new("many")?;
            home.link_log(&log)?;
            for n in 0..projections {
                home.drop_module(&format!("{}.wasm", view(n)), &renamed(n))?;
            }
            let run = || support::child(&[home.argument(), &projections.to_string()]);
            let measure = Round { caught_up: run()?, restarted: run()? };
            let (first, again) = (measure.caught_up.usage.seconds, measure.restarted.usage.seconds);
            println!("{projections} projections, round {round} of {rounds}: {first:.2} s, restarted {again:.2} s");
            measured.push(measure);
        }
        all.push((projections, measured));
    }
    print_tables(events, &all);
    report.add("events_of_the_log", events)?;
    report.add("by_projections", all)
}

fn print_tables(events: u64, all: &[(u64, Vec<Round>)]) {
    let of = |rounds: &[Round], what: fn(&Round) -> f64| Samples::new(rounds.iter().map(what)).median();
    let mut working =
        table(&["projections", "s median", "applied events/s in all", "CPU s", "peak MB", "at least 3 M/s"]);
    let mut idle = table(&[
        "projections",
        "start-up s, all cached",
        "idle CPU % of a core",
        "idle MB after catch-up",
        "MB each",
        "idle MB after a restart",
        "MB each",
        "below 2 %, 4 MB each",
    ]);
    let base: fn(&Round) -> f64 = |round| round.restarted.idle_mb;
    let none = of(&all[0].1, base);
    for (projections, rounds) in all {
        let (n, seconds) = (*projections as f64, of(rounds, |round| round.caught_up.usage.seconds));
        let rate = n * events as f64 / seconds;
        if *projections > 0 {
            working.add_row([
                projections.to_string(),
                format!("{seconds:.2}"),
                thousands(rate),
                format!("{:.2}", of(rounds, |round| round.caught_up.usage.cpu_seconds)),
                format!("{:.0}", Samples::new(rounds.iter().map(|round| round.caught_up.usage.peak_mb)).max()),
                if *projections == TOGETHER { verdict(rate >= RATE, "3 M/s") } else { String::new() },
            ]);
        }
        let idle_percent = of(rounds, |round| round.caught_up.idle_percent.max(round.restarted.idle_percent));
        let (first, again) = (of(rounds, |round| round.caught_up.idle_mb), of(rounds, base));
        let each = |mb: f64| (mb - none) / n.max(1.0);
        let met = idle_percent < IDLE_PERCENT && each(first).max(each(again)) < IDLE_MB;
        idle.add_row([
            projections.to_string(),
            format!("{:.2}", of(rounds, |round| round.restarted.usage.seconds)),
            format!("{idle_percent:.2}"),
            format!("{first:.0}"),
            format!("{:.2}", each(first)),
            format!("{again:.0}"),
            format!("{:.2}", each(again)),
            if *projections == WAITING { verdict(met, "2 %, 4 MB") } else { String::new() },
        ]);
    }
    println!("\n{working}\n\n{idle}");
}
