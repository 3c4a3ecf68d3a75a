//! How fast is a view made from offset zero through the sandbox, against an honest native program, written by hand for
//! this one purpose, over the same events? `benches/README.md` says how to run and read it.

#![expect(clippy::print_stdout, reason = "the table is what one runs this for")]

#[path = "rebuild/native.rs"]
mod native;
mod support;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use support::{Home, Report, Samples, Stopwatch, Usage, module_file, table, thousands, verdict};

/// A projection, and the views whose rows are compared: the one that it is for, and helpers that a reader could want.
struct Projection {
    name: &'static str,
    views: &'static [&'static str],
    /// The most that our time may be of the native program's.
    ratio: f64,
    /// Events a second that it must take, if it must.
    rate: Option<f64>,
}

const PROJECTIONS: [Projection; 3] = [
    Projection { name: "event-counts", views: &["event_counts"], ratio: 0.7, rate: Some(2_000_000.0) },
    Projection {
        name: "carrier-performance",
        views: &["carrier_performance", "flight_carrier"],
        ratio: 0.75,
        rate: None,
    },
    Projection { name: "flight-board", views: &["flight_board", "facts"], ratio: 1.0, rate: None },
];

/// The most resident memory, MB.
const PEAK_MB: f64 = 300.0;

fn main() -> Result<()> {
    support::main("rebuild", contestant, bench)
}

/// Something that made the views from the beginning.
#[derive(Clone, Serialize, Deserialize)]
struct Made {
    /// The SQLite file with the views.
    file: PathBuf,
    usage: Usage,
}

/// What Shadowbox did: a new projection, and then `rebuild` beside it.
#[derive(Clone, Serialize, Deserialize)]
struct Ours {
    new: Made,
    rebuilt: Made,
}

#[derive(Clone, Serialize, Deserialize)]
struct Native {
    made: Made,
    /// How many events it took.
    events: u64,
}

fn contestant(arguments: &[&str]) -> Result<Value> {
    match *arguments {
        ["shadowbox", view, home] => Ok(serde_json::to_value(shadowbox(view, &Home::at(home))?)?),
        ["native", projection, home, table] => {
            let home = Home::at(home);
            let watch = Stopwatch::start()?;
            let file = home.path().join("views.sqlite");
            let events = native::run(projection, Path::new(table), &file)?;
            let usage = watch.stop()?;
            Ok(serde_json::to_value(Native { made: Made { file, usage }, events })?)
        }
        _ => bail!("unknown contestant {arguments:?}"),
    }
}

fn shadowbox(view: &str, home: &Home) -> Result<Ours> {
    support::in_process(async {
        let (runtime, live, usage) = support::catch_up(home, view).await?;
        let new = Made { file: live.file, usage };
        let watch = Stopwatch::start()?;
        let generation = runtime.rebuild(&live.projection).await?;
        let live = support::view(&runtime, view, |view| view.generation == generation).await;
        let rebuilt = Made { file: live.file, usage: watch.stop()? };
        runtime.shutdown().await;
        Ok(Ours { new, rebuilt })
    })
}

/// All rounds of one projection.
struct Outcome {
    projection: &'static Projection,
    events: u64,
    rows: u64,
    ours: Vec<Ours>,
    native: Vec<Native>,
}

fn bench(report: &mut Report) -> Result<()> {
    let rounds = support::rounds(5)?;
    let chosen = support::chosen(&PROJECTIONS, |projection| projection.name)?;
    let modules = support::modules(&PROJECTIONS.map(|p| p.name))?;
    let log = support::log(1)?;
    let table = support::plain(&log)?;
    let table = table.to_str().context("the workspace's path is UTF-8")?;
    let mut outcomes = Vec::new();
    for projection in chosen {
        let ours = || -> Result<Ours> {
            let home = Home::new("shadowbox")?;
            home.link_log(&log)?;
            let file = module_file(projection.name);
            home.drop_module(&file, &std::fs::read(modules.join(&file))?)?;
            support::child(&["shadowbox", projection.views[0], home.argument()])
        };
        let native = || -> Result<Native> {
            support::child(&["native", projection.name, Home::new("native")?.argument(), table])
        };
        // The first round fills the cache of compiled modules and the page cache, and is where rows are compared.
        let (first, other) = (ours()?, native()?);
        let rows = assert_same_rows(projection, &first.new.file, &other.made.file)?;
        assert_same_rows(projection, &first.rebuilt.file, &other.made.file)?;
        let events = other.events;
        println!("{}: {events} events, {rows} rows, the same from both", projection.name);
        let mut outcome = Outcome { projection, events, rows, ours: Vec::new(), native: Vec::new() };
        for round in 1..=rounds {
            let (ours, native) = (ours()?, native()?);
            println!(
                "{} round {round} of {rounds}: new {:.2} s, rebuilt {:.2} s, native {:.2} s",
                projection.name, ours.new.usage.seconds, ours.rebuilt.usage.seconds, native.made.usage.seconds
            );
            outcome.ours.push(ours);
            outcome.native.push(native);
        }
        report.add(projection.name, outcome.to_json())?;
        outcomes.push(outcome);
    }
    print_tables(&outcomes);
    Ok(())
}

impl Outcome {
    fn usages(&self) -> [(&'static str, Vec<&Usage>); 3] {
        [
            ("shadowbox, new", self.ours.iter().map(|ours| &ours.new.usage).collect()),
            ("shadowbox, rebuild", self.ours.iter().map(|ours| &ours.rebuilt.usage).collect()),
            ("native", self.native.iter().map(|native| &native.made.usage).collect()),
        ]
    }

    fn to_json(&self) -> Value {
        json!({ "events": self.events, "rows": self.rows, "shadowbox": self.ours, "native": self.native })
    }
}

fn print_tables(outcomes: &[Outcome]) {
    let mut times = table(&["projection", "contestant", "s min", "s median", "events/s", "peak MB", "CPU s"]);
    let mut targets = table(&["projection", "contestant", "time, of native", "2 M events/s", "at most 300 MB"]);
    for outcome in outcomes {
        let name = outcome.projection.name;
        let seconds = |usages: &[&Usage]| Samples::new(usages.iter().map(|usage| usage.seconds));
        let usages = outcome.usages();
        let native = seconds(&usages[2].1).median();
        for (contestant, usages) in usages {
            let (seconds, peak) = (seconds(&usages), Samples::new(usages.iter().map(|usage| usage.peak_mb)).max());
            let rate = outcome.events as f64 / seconds.median();
            times.add_row([
                name.to_owned(),
                contestant.to_owned(),
                format!("{:.2}", seconds.min()),
                format!("{:.2}", seconds.median()),
                thousands(rate),
                format!("{peak:.0}"),
                format!("{:.2}", Samples::new(usages.iter().map(|usage| usage.cpu_seconds)).median()),
            ]);
            if contestant == "native" {
                continue;
            }
            let ratio = seconds.median() / native;
            let Projection { rate: goal, ratio: most, .. } = *outcome.projection;
            targets.add_row([
                name.to_owned(),
                contestant.to_owned(),
                verdict(ratio <= most, format!("{ratio:.2} of {most}")),
                goal.map_or(String::new(), |goal| verdict(rate >= goal, thousands(rate))),
                verdict(peak <= PEAK_MB, format!("{peak:.0}")),
            ]);
        }
    }
    println!("\n{times}\n\n{targets}");
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
