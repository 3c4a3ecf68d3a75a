//! Does a catch-up slow down, or need more memory, when the log is longer? `benches/README.md` says how to run and read it.

#![expect(clippy::print_stdout, reason = "the table is what one runs this for")]

mod support;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shadowbox::log::EventLog;
use support::{Home, Report, Samples, Usage, module_file, table, thousands, verdict};

/// A projection, its view, and what counts in it the events of `FlightScheduled`.
struct Projection {
    name: &'static str,
    view: &'static str,
    scheduled: &'static str,
}

/// The first has a handful of rows however long the log is; the others get one for each flight.
const PROJECTIONS: [Projection; 3] = [
    Projection {
        name: "event-counts",
        view: "event_counts",
        scheduled: "SELECT sum(events) FROM event_counts WHERE event_type = 'FlightScheduled'",
    },
    Projection {
        name: "carrier-performance",
        view: "carrier_performance",
        scheduled: "SELECT sum(scheduled) FROM carrier_performance",
    },
    Projection { name: "flight-board", view: "flight_board", scheduled: "SELECT count(*) FROM flight_board" },
];

/// The least that the rate may be of that of the shortest log.
const RATIO: f64 = 0.8;
/// The most resident memory, MB.
const PEAK_MB: f64 = 300.0;

fn main() -> Result<()> {
    support::main("scale", contestant, bench)
}

#[derive(Serialize, Deserialize)]
struct Run {
    usage: Usage,
    scheduled: u64,
    /// The file with the views.
    view_mb: f64,
}

fn contestant(arguments: &[&str]) -> Result<Value> {
    let [projection, home] = *arguments else { bail!("unknown contestant {arguments:?}") };
    let projection = PROJECTIONS.iter().find(|p| p.name == projection).context("no such projection")?;
    let run = support::in_process(async {
        let (runtime, live, usage) = support::catch_up(&Home::at(home), projection.view).await?;
        runtime.shutdown().await;
        let scheduled =
            Connection::open(&live.file)?.query_row(projection.scheduled, [], |row| row.get::<_, i64>(0))?;
        Ok(Run { usage, scheduled: scheduled as u64, view_mb: megabytes(&live.file)? })
    })?;
    Ok(serde_json::to_value(run)?)
}

fn megabytes(file: &Path) -> Result<f64> {
    Ok(fs::metadata(file)?.len() as f64 / 1e6)
}

fn measure(projection: &Projection, log: &Path, modules: &Path, scheduled: u64) -> Result<Run> {
    let home = Home::new("scale")?;
    home.link_log(log)?;
    let file = module_file(projection.name);
    home.drop_module(&file, &fs::read(modules.join(&file))?)?;
    // The disk is not the question.
    std::io::copy(&mut fs::File::open(log.join("log.sqlite"))?, &mut std::io::sink())?;
    let run: Run = support::child(&[projection.name, home.argument()])?;
    ensure!(run.scheduled == scheduled, "{}: {} of {scheduled} flights", projection.name, run.scheduled);
    Ok(run)
}

fn bench(report: &mut Report) -> Result<()> {
    let rounds = support::rounds(3)?;
    let sizes = support::numbers("SHADOWBOX_BENCH_MILLIONS", &[1, 3, 10])?;
    let chosen = support::chosen(&PROJECTIONS, |projection| projection.name)?;
    let modules = support::modules(&PROJECTIONS.map(|p| p.name))?;
    let logs = sizes.iter().map(|&millions| support::log(millions)).collect::<Result<Vec<_>>>()?;
    let mut counts = Vec::new();
    for log in &logs {
        let log = EventLog::open(log)?;
        let events = log.head_now().next;
        counts.push((events, log.count(&support::wanting("flights", &["FlightScheduled"])?, 0, events)?));
    }
    let mut table = table(&[
        "projection",
        "M events",
        "log MB",
        "view MB",
        "s min",
        "s median",
        "events/s",
        "CPU us/event",
        "at least 0.8 of the first rate",
        "at most 300 MB",
    ]);
    for projection in chosen {
        let mut runs: Vec<Vec<Run>> = sizes.iter().map(|_| Vec::new()).collect();
        // The first round is with the shortest log alone: it fills the cache of compiled modules.
        for round in 0..=rounds {
            for (i, log) in logs.iter().enumerate().take(if round == 0 { 1 } else { logs.len() }) {
                let run = measure(projection, log, &modules, counts[i].1)?;
                if round > 0 {
                    let (millions, seconds) = (sizes[i], run.usage.seconds);
                    println!("{} round {round} of {rounds}: {millions} M events {seconds:.2} s", projection.name);
                    runs[i].push(run);
                }
            }
        }
        let rate = |i: usize| counts[i].0 as f64 / seconds(&runs[i]).median();
        for (i, &millions) in sizes.iter().enumerate() {
            let (seconds, ratio) = (seconds(&runs[i]), rate(i) / rate(0));
            let peak = Samples::new(runs[i].iter().map(|run| run.usage.peak_mb)).max();
            let cpu = Samples::new(runs[i].iter().map(|run| run.usage.cpu_seconds));
            table.add_row([
                projection.name.to_owned(),
                millions.to_string(),
                thousands(megabytes(&logs[i].join("log.sqlite"))?),
                thousands(runs[i][0].view_mb),
                format!("{:.2}", seconds.min()),
                format!("{:.2}", seconds.median()),
                thousands(rate(i)),
                format!("{:.2}", cpu.median() / counts[i].0 as f64 * 1e6),
                verdict(ratio >= RATIO, format!("{ratio:.2}")),
                verdict(peak <= PEAK_MB, format!("{peak:.0}")),
            ]);
        }
        let by_size: Vec<_> = sizes.iter().zip(&runs).collect();
        report.add(projection.name, by_size)?;
    }
    println!("\n{table}");
    Ok(())
}

fn seconds(runs: &[Run]) -> Samples {
    Samples::new(runs.iter().map(|run| run.usage.seconds))
}
