//! `shadowbox status`, `query`, `rebuild` and `rollback`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use shadowbox::config::{Config, limits};
use shadowbox::log::EventLog;
use shadowbox::supervisor::{
    GenerationStatus, LogStatus, MadeFrom, ProjectionState, ProjectionStatus, Status as Snapshot, made_from,
};
use shadowbox::view::{
    Catalogue, DeadLetters, Error, GenerationRecord, LetterCounts, ProjectionRecord, Role, mark, readers, render, sql,
};

use super::table::{Table, line, table};
use super::text::{in_json, lines, one_line};
use super::{Common, Format, ask, running};

#[derive(Args)]
pub(super) struct Status {
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let config = common.existing()?;
        let status = match running(&config) {
            Ok(address) => ask("GET", &format!("{address}/status"))?,
            Err(why) => {
                eprintln!("{}", lines(&why.to_string()));
                at_rest(&config).await?
            }
        };
        if self.json {
            say_json!("{}", serde_json::to_string_pretty(&status)?);
        } else {
            print(&status)?;
        }
        Ok(())
    }
}

/// What the files say while no runtime runs.
async fn at_rest(config: &Config) -> Result<Snapshot> {
    let log = EventLog::open(&config.data)?;
    let head = log.head_now();
    let policies = match Catalogue::open_read_only(&config.data).await? {
        Some(catalogue) => catalogue.policies().await?,
        None => BTreeMap::new(),
    };
    let mut projections = Vec::new();
    for (record, held) in live_and_held(config).await? {
        let dead_letters =
            if record.file.exists() { DeadLetters::open(&record.file)?.counts()? } else { LetterCounts::default() };
        let policy = policies.get(&record.projection).copied().unwrap_or(config.policy(&record.projection));
        let (mark, error) = match record.file.exists().then(|| mark(&record.file)).transpose() {
            Ok(mark) => (mark.flatten(), None),
            // Its rows are there, and complete to no position that there is.
            Err(error @ Error::Former { .. }) => (None, Some(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        let made_from = if record.file.exists() { made_from(&log, &record)?.into() } else { MadeFrom::default() };
        let position = mark.as_ref().map(|mark| mark.position);
        let lag_events = log.count(&record.manifest, position.map_or(0, |p| p.0 + 1), head.next)?;
        let reached = mark.map_or(head.first, |mark| mark.appended);
        // Clocks may have been set back.
        let behind = ((head.appended.microseconds() - reached.microseconds()) as f64 / 1e6).max(0.0);
        let lag_seconds = if lag_events > 0 { behind } else { 0.0 };
        projections.push(ProjectionStatus {
            name: record.projection,
            state: ProjectionState::Stopped,
            file: None,
            views: record.manifest.views.iter().map(|v| v.name.clone()).collect(),
            policy,
            live: GenerationStatus {
                generation: record.number,
                version: record.manifest.version,
                module_hash: record.module,
                position: if lag_events > 0 || error.is_some() { position } else { position.max(head.last()) },
                lag_events,
                lag_seconds,
                rate: 0.0,
                error,
                fault: None,
                dead_letters,
                made_from,
            },
            waits: None,
            building: None,
            // A module may have been dropped since; the next start looks.
            rolled_back_from: held,
        });
    }
    let log = LogStatus {
        identity: log.identity().to_owned(),
        head: head.last(),
        appended: head.last().map(|_| head.appended),
        sources: log.sources() as u64,
        types: log.types() as u64,
        error: None,
    };
    Ok(Snapshot { log, projections, refused: Vec::new() })
}

/// The live generations of a data directory, by the names of their projections.
pub(super) async fn live(config: &Config) -> Result<Vec<GenerationRecord>> {
    Ok(live_and_held(config).await?.into_iter().map(|(live, _)| live).collect())
}

/// The same, each with the hash of the module that it was rolled back from.
async fn live_and_held(config: &Config) -> Result<Vec<(GenerationRecord, Option<String>)>> {
    let Some(catalogue) = Catalogue::open_read_only(&config.data).await? else { return Ok(Vec::new()) };
    let projections = catalogue.projections().await?;
    let live = |p: &ProjectionRecord| {
        let live = p.role(Role::Live)?;
        Some((live.clone(), p.held.clone().filter(|held| *held != live.module)))
    };
    Ok(projections.iter().filter_map(live).collect())
}

fn print(status: &Snapshot) -> Result<()> {
    let LogStatus { head, sources, types, .. } = &status.log;
    let plural = |number: u64, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    match head {
        None => say!("the log has no events"),
        Some(head) => say!(
            "the log has {} of {} and {}; its head is at position {head}",
            plural(head.0 + 1, "event"),
            plural(*sources, "source"),
            plural(*types, "type")
        ),
    }
    if let Some(error) = &status.log.error {
        say!("{error}");
    }
    if status.projections.is_empty() {
        say!("no projections; drop a module into the plugin folder of a running shadowbox");
    } else {
        let mut table = table(&["projection", "state", "gen", "module", "position", "lag", "rate"]);
        for p in &status.projections {
            add(&mut table, &p.name, state(p.state), &p.live);
            if let Some(building) = &p.building {
                add(&mut table, "", "building", building);
            }
        }
        say!("{table}");
    }
    for p in status.projections.iter() {
        if let Some(error) = &p.live.error {
            say!("{}: {}", p.name, error);
        }
        if let Some(waits) = &p.waits {
            say!("{}: {}", p.name, waits);
        }
        let MadeFrom { forgotten, complete_from, damaged } = &p.live.made_from;
        if let Some(number) = forgotten {
            say!("{}: its rows may have what was forgotten since (forgetting {number}), until it is rebuilt", p.name);
        }
        if let Some(from) = complete_from {
            say!("{}: complete from position {from} on; content of events before it was not kept", p.name);
        }
        for (first, last) in damaged {
            say!("{}: made without the events {first} to {last}, which could not be read", p.name);
        }
        if let Some(hash) = &p.rolled_back_from {
            let hash = &hash[..hash.len().min(8)];
            say!(
                "{0}: rolled back; module {hash} in the plugin folder is not taken up; drop another one to go on, or go \
                 back to it with shadowbox rollback {0}",
                p.name
            );
        }
        if let Some(backtrace) = p.live.fault.as_ref().and_then(|fault| fault.cause.backtrace.as_ref()) {
            say!("{backtrace}");
        }
        let LetterCounts { parked, skipped } = p.live.dead_letters;
        if parked + skipped > 0 {
            say!("{0}: {parked} parked, {skipped} skipped; see shadowbox dead-letters list {0}", p.name);
        }
    }
    for refused in &status.refused {
        say!("{} is refused: {}", one_line(&refused.file), refused.reason);
    }
    Ok(())
}

fn add(table: &mut Table, name: &str, state: &str, g: &GenerationStatus) {
    let lag = match g.lag_events {
        0 => "0".to_owned(),
        events => format!("{events}, {}", duration(g.lag_seconds)),
    };
    table.add_row([
        name.to_owned(),
        state.to_owned(),
        g.generation.to_string(),
        g.module_hash.chars().take(8).collect(),
        g.position.map_or("-".to_owned(), |p| p.to_string()),
        lag,
        format!("{:.0}/s", g.rate),
    ]);
}

fn state(state: ProjectionState) -> &'static str {
    match state {
        ProjectionState::CatchingUp => "catching up",
        ProjectionState::Live => "live",
        ProjectionState::Rebuilding => "rebuilding",
        ProjectionState::Stalled => "stalled",
        ProjectionState::Faulted => "faulted",
        ProjectionState::Stopped => "stopped",
    }
}

fn duration(seconds: f64) -> String {
    let seconds = seconds as u64;
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min"),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

#[derive(Args)]
#[command(after_help = "\
Example:
  shadowbox query 'select carrier, name, departed from carrier_performance order by departed desc limit 5'")]
pub(super) struct Query {
    /// One SELECT statement in SQLite's dialect; tables are the live views
    sql: String,
    /// How to print the rows
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

impl Query {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let config = common.existing()?;
        query(&config, &self.sql, self.format).await
    }
}

/// Runs SQL over the live views and prints the rows. Only a table that is drawn needs them all at once, and is bounded.
pub(super) async fn query(config: &Config, statement: &str, format: Format) -> Result<()> {
    let terminal = std::io::stdout().is_terminal();
    let mut out = std::io::BufWriter::new(std::io::stdout());
    let mut drawn = table(&[]);
    let mut json = render::JsonRows::new([]);
    let (mut rows, mut size, mut cut, mut bytes) = (0, 0, false, Vec::new());
    let done = sql::query(&live(config).await?, statement, |part| {
        bytes.clear();
        match (format, part) {
            (Format::Table, sql::Part::Columns(names)) if terminal => drawn = table(&names),
            (Format::Table, sql::Part::Row(values)) if terminal => {
                let cells: Vec<_> = values.iter().map(|value| shortened(render::text(None, *value))).collect();
                size += cells.iter().map(|cell| cell.len()).sum::<usize>();
                rows += 1;
                cut = rows > limits::TABLE_ROWS || size > limits::TABLE_BYTES;
                if cut {
                    return Err(readers::Error::TooLarge);
                }
                drawn.add_row(cells);
            }
            (Format::Table, sql::Part::Columns(names)) => bytes.extend_from_slice((line(names) + "\n").as_bytes()),
            (Format::Table, sql::Part::Row(values)) => {
                let cells = values.iter().map(|value| render::text(None, *value));
                bytes.extend_from_slice((line(cells) + "\n").as_bytes());
            }
            (Format::Json, sql::Part::Columns(names)) => {
                json = render::JsonRows::new(names.iter().map(|name| (*name, None)));
            }
            (Format::Json, sql::Part::Row(values)) => {
                bytes.extend_from_slice(if rows == 0 { b"[" } else { b",\n " });
                json.write(values, &mut bytes);
                rows += 1;
                if terminal {
                    bytes = in_json(&String::from_utf8_lossy(&bytes)).into_owned().into_bytes();
                }
            }
            (Format::Csv, sql::Part::Columns(names)) => {
                render::write_csv(names.into_iter().map(|name| cell(name, terminal)), &mut bytes)
            }
            (Format::Csv, sql::Part::Row(values)) => {
                let texts: Vec<_> = values.iter().map(|value| render::text(None, *value)).collect();
                render::write_csv(texts.iter().map(|text| cell(text, terminal)), &mut bytes);
            }
        }
        out.write_all(&bytes).map_err(readers::Error::Output)
    });
    // Where the table is cut, that is the error.
    done.or_else(|error| if cut { Ok(()) } else { Err(error) })?;
    match format {
        Format::Table if terminal => writeln!(out, "{drawn}")?,
        Format::Json => writeln!(out, "{}", if rows == 0 { "[]" } else { "]" })?,
        Format::Table | Format::Csv => {}
    }
    out.flush()?;
    if cut {
        let shown = rows - 1;
        eprintln!("the table is cut after {shown} rows; say limit, or --format csv or json, which have all of them");
    }
    Ok(())
}

/// What a drawn table has room for of a value.
fn shortened(text: Cow<'_, str>) -> Cow<'_, str> {
    match text.char_indices().nth(limits::TABLE_CELL) {
        Some((end, _)) => Cow::Owned(format!("{}…", &text[..end])),
        None => text,
    }
}

/// Files and programs get what is stored.
fn cell(text: &str, terminal: bool) -> Cow<'_, str> {
    if terminal { one_line(text) } else { Cow::Borrowed(text) }
}

#[derive(Args)]
pub(super) struct Rebuild {
    /// The projection's name
    projection: String,
    /// Wait until the new generation is live
    #[arg(long)]
    wait: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// How often a waiting rebuild is looked at.
const LOOK: Duration = Duration::from_millis(100);

impl Rebuild {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let config = common.existing()?;
        let address = running(&config)?;
        let url = format!("{address}/projections/{}", self.projection);
        let begun: serde_json::Value = ask("POST", &format!("{url}/rebuild"))?;
        let generation = begun["generation"].as_u64().unwrap_or_default();
        if self.wait {
            // A later one may have been promoted meanwhile.
            wait(&url, generation, |live| live >= generation)?;
        }
        let done = if self.wait { "is live" } else { "is being built" };
        if self.json {
            say_json!("{}", json!({ "projection": self.projection, "generation": generation, "live": self.wait }));
        } else {
            say!("generation {generation} of {} {done}", self.projection);
        }
        Ok(())
    }
}

#[derive(Args)]
pub(super) struct Rollback {
    /// The projection's name
    projection: String,
    /// Wait until the former generation is live again
    #[arg(long)]
    wait: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl Rollback {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let config = common.existing()?;
        let address = running(&config)?;
        let url = format!("{address}/projections/{}", self.projection);
        let begun: serde_json::Value = ask("POST", &format!("{url}/rollback"))?;
        let generation = begun["generation"].as_u64().unwrap_or_default();
        if self.wait {
            wait(&url, generation, |live| live == generation)?;
        }
        let done = if self.wait { "is live again" } else { "is catching up" };
        if self.json {
            say_json!("{}", json!({ "projection": self.projection, "generation": generation, "live": self.wait }));
        } else {
            say!("generation {generation} of {} {done}", self.projection);
        }
        Ok(())
    }
}

fn wait(url: &str, generation: u64, is_live: impl Fn(u64) -> bool) -> Result<()> {
    let style = "{bar:30} {pos}/{len} events {msg} {eta} left";
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template(style).expect("a valid template"));
    loop {
        let status: ProjectionStatus = ask("GET", url)?;
        if is_live(status.live.generation) {
            bar.finish_and_clear();
            return Ok(());
        }
        let Some(building) = &status.building else {
            bail!("generation {generation} is not being built any more; see shadowbox status");
        };
        if let Some(waits) = &status.waits {
            bail!("{waits}");
        }
        if let Some(error) = building.error.as_ref().filter(|_| status.state != ProjectionState::Rebuilding) {
            bail!("generation {generation} failed, the former one goes on: {error}");
        }
        let done = building.position.map_or(0, |p| p.0 + 1);
        bar.set_length(done + building.lag_events);
        bar.set_position(done);
        bar.set_message(format!("{:.0}/s", building.rate));
        std::thread::sleep(LOOK);
    }
}
