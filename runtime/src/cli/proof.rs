//! `shadowbox verify` and `shadowbox plan`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::value::RawValue;
use shadowbox::model::{EventName, Position};
use shadowbox::proof::{
    self, Action, Cost, Differing, PlanRequest, Planned, Progress, Run, Tell, Verified, VerifyRequest,
};
use shadowbox::view::compare::{Comparison, Difference, Kind, Total};
use tokio::signal::unix::{SignalKind, signal};

use super::Common;

#[derive(Args)]
#[command(after_help = "\
Exit codes: 0 all rows are equal, 1 rows differ or an event could not be replayed, 2 it cannot be told.

Example:
  shadowbox verify carrier-performance && echo 'complete and right'")]
pub(super) struct Verify {
    /// The projection's name
    projection: String,
    /// First wait until the live generation is complete to this position
    #[arg(long, value_name = "POSITION")]
    at: Option<Position>,
    /// Where batches end and instances are dropped follows from this number [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[command(after_help = "\
Exit codes: 0 it would be taken, 1 it would be refused or fails at an event, 2 it cannot be told.

Example:
  shadowbox plan target/wasm32-wasip2/release/my_orders.wasm --last 100000")]
pub(super) struct Plan {
    /// The module
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
    /// Run only the last N events of the log, through the live module and through this one, both from empty views
    #[arg(long, value_name = "N")]
    last: Option<u64>,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

/// What is neither proved nor disproved.
pub(super) const UNKNOWN: u8 = 2;

impl Verify {
    pub(super) async fn run(self, common: &Common) -> Result<ExitCode> {
        let config = common.existing()?;
        // Short enough to be typed again.
        let seed = self.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().1 % 1_000_000);
        let request = VerifyRequest { projection: self.projection, at: self.at, seed };
        let verified = proof::verify(&config, request, watch()?).await?;
        if self.json {
            say_json!("{}", serde_json::to_string_pretty(&verified)?);
        } else {
            print_verified(&verified)?;
        }
        Ok(ExitCode::from(u8::from(!verified.equal)))
    }
}

impl Plan {
    pub(super) async fn run(self, common: &Common) -> Result<ExitCode> {
        let config = common.existing()?;
        let request = PlanRequest { file: self.file, last: self.last };
        let planned = proof::plan(&config, request, watch()?).await?;
        if self.json {
            say_json!("{}", serde_json::to_string_pretty(&planned)?);
        } else {
            print_planned(&planned)?;
        }
        let failed = planned.run.as_ref().is_some_and(|run| run.failed.is_some());
        Ok(ExitCode::from(u8::from(failed || planned.action == Action::Refused)))
    }
}

/// Shows progress, and ends everything in good order at Ctrl-C or SIGTERM, so that nothing is left behind.
fn watch() -> Result<Tell> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        flag.store(true, Ordering::Relaxed);
    });
    let counted =
        ProgressStyle::with_template("{bar:30} {pos}/{len} events {msg} {eta} left").expect("a valid template");
    let waiting = ProgressStyle::with_template("{spinner} {msg} {pos}").expect("a valid template");
    let bar = ProgressBar::new(0);
    let mut doing = "";
    Ok(Box::new(move |progress: Progress| {
        if doing != progress.doing {
            doing = progress.doing;
            bar.set_style(if progress.of > 0 { counted.clone() } else { waiting.clone() });
            bar.set_message(doing);
        }
        bar.set_length(progress.of);
        bar.set_position(progress.done);
        !interrupted.load(Ordering::Relaxed)
    }))
}

fn print_verified(v: &Verified) -> Result<()> {
    let verdict = match (&v.failed, v.equal) {
        (Some(_), _) => "failed",
        (None, true) => "equal",
        (None, false) => "different",
    };
    say!("{verdict}: {}, generation {}, at {}", v.projection, v.generation, position(v.position));
    let left_out =
        if v.dead_letters == 0 { String::new() } else { format!(", {} dead letters left out", v.dead_letters) };
    say!(
        "  {} events replayed by module {} in {} batches, {} instances dropped (--seed {}){left_out}; {}",
        count(v.cost.events),
        short(&v.module),
        count(v.batches),
        count(v.dropped),
        v.seed,
        cost(&v.cost)
    );
    if let [_, others @ ..] = &v.modules[..] {
        for made in others {
            say!(
                "  the rows after position {} were made by module {}, swapped in",
                position(made.after),
                short(&made.module)
            );
        }
    }
    if let Some(from) = v.complete_from {
        say!(
            "  complete from position {from} on: content of events before it was not kept when the generation was begun"
        );
    }
    if let Some(failed) = &v.failed {
        say!("  the live generation has passed an event that the replay cannot: {failed}");
    }
    for view in &v.views {
        match (&view.found.live, &view.found.shadow) {
            (Some(live), Some(replayed)) if live == replayed => {
                say!("  view {}: {} rows, digest {:032x}", view.view, count(live.rows), live.digest);
            }
            (live, replayed) => {
                let total = |t: &Option<Total>| {
                    t.map_or("none".into(), |t| format!("{} rows, digest {:032x}", count(t.rows), t.digest))
                };
                say!("  view {}: live {}; replayed {}", view.view, total(live), total(replayed));
                say!("    {}", differences(&view.found, "only replayed", "only live"));
            }
        }
        for row in &view.rows {
            print_row(&row.difference, "replayed")?;
            print_events(row)?;
        }
        print_rest(&view.found, view.rows.iter().map(|row| row.difference.kind))?;
    }
    if !v.equal {
        say!("possible causes: the plugin keeps state of its own in guest memory, so that rows depend on batches;");
        say!("  dead letters that were retried later; or somebody has changed the file.");
        say!("  shadowbox rebuild {} makes the fold anew", v.projection);
    }
    Ok(())
}

fn print_events(row: &Differing) -> Result<()> {
    match (row.changes, row.events.len() as u64) {
        (0, _) => say!("      changed by no event of the replay"),
        (changes, shown) => {
            let all = if changes > shown { format!("{} events, the last", count(changes)) } else { "".into() };
            let name =
                |e: &EventName| format!("{:?} {:?} of source {:?} at {}", e.event_type, e.id, e.source, e.position);
            let names = row.events.iter().map(name);
            say!(
                "      changed by {all}{}{}",
                if all.is_empty() { "" } else { ": " },
                names.collect::<Vec<_>>().join(", ")
            );
        }
    }
    Ok(())
}

fn print_planned(p: &Planned) -> Result<()> {
    let what = match p.action {
        Action::New => "a new projection",
        Action::HotSwap => "a hot swap",
        Action::Rebuild => "a rebuild",
        Action::Nothing => "nothing",
        Action::Refused => "refused",
    };
    let projection = p.projection.as_ref().map_or(String::new(), |name| format!(" (projection {name})"));
    say!("{}{projection}: {what}", p.file);
    for reason in &p.reasons {
        say!("  {reason}");
    }
    if let Some(run) = &p.run {
        print_run(p, run)?;
    }
    Ok(())
}

fn print_run(p: &Planned, run: &Run) -> Result<()> {
    say!("it wants {} of the {} events of the log", count(run.wanted), count(run.log));
    let range = run.last.map_or(String::new(), |last| format!(", of the last {}", count(last)));
    say!(
        "run in the shadow: {} events{range}, up to {}; {}",
        count(run.cost.events),
        position(run.until),
        cost(&run.cost)
    );
    if let Some(from) = run.complete_from {
        say!("  complete from position {from} on: content of events before it is not kept any more");
    }
    if let Some(failed) = &run.failed {
        say!("  {}: {}", if failed.by_live { "the live module fails" } else { "it fails" }, failed.error);
        return Ok(());
    }
    match (&p.live, run.last) {
        (Some(live), None) => say!("compared with generation {}, module {}:", live.generation, short(&live.module)),
        (Some(live), Some(_)) => say!("compared with what module {} makes of the same events:", short(&live.module)),
        (None, _) => {}
    }
    for view in &run.views {
        match (&view.found.live, &view.found.shadow) {
            (None, Some(total)) => say!("  view {}: new, {} rows", view.view, count(total.rows)),
            (Some(total), None) => say!("  view {}: removed, {} rows", view.view, count(total.rows)),
            _ => say!("  view {}: {}", view.view, differences(&view.found, "added", "removed")),
        }
        for row in &view.found.samples {
            print_row(row, "then")?;
        }
        print_rest(&view.found, view.found.samples.iter().map(|row| row.kind))?;
    }
    Ok(())
}

fn differences(found: &Comparison, added: &str, removed: &str) -> String {
    let [equal, changed, more, less] = [found.equal, found.changed, found.added, found.removed].map(count);
    format!("{equal} rows equal, {changed} changed, {more} {added}, {less} {removed}")
}

fn print_row(row: &Difference, shadow: &str) -> Result<()> {
    let key = row.key.iter().map(|(name, value)| format!("{name} {}", brief(value))).collect::<Vec<_>>().join(", ");
    let (sign, alone) = match row.kind {
        Kind::Changed => ('~', false),
        Kind::Added => ('+', true),
        Kind::Removed => ('-', true),
    };
    let columns = row.columns.iter().map(|c| match (&c.live, &c.shadow) {
        (Some(live), Some(then)) if !alone => format!("{} live {}, {shadow} {}", c.column, brief(live), brief(then)),
        (live, then) => format!("{} {}", c.column, live.as_ref().or(then.as_ref()).map_or("".into(), |v| brief(v))),
    });
    say!("    {sign} {key}: {}", columns.collect::<Vec<_>>().join("; "));
    Ok(())
}

/// What the samples leave out.
fn print_rest(found: &Comparison, shown: impl Iterator<Item = Kind>) -> Result<()> {
    let rest = (found.changed + found.added + found.removed).saturating_sub(shown.count() as u64);
    if rest > 0 {
        say!("    and {} more", count(rest));
    }
    Ok(())
}

/// A value as JSON, cut where it is long.
fn brief(value: &RawValue) -> String {
    const LONGEST: usize = 60;
    let text = value.get();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

fn position(position: Option<Position>) -> String {
    position.map_or_else(|| "the beginning".to_owned(), |position| position.to_string())
}

fn cost(cost: &Cost) -> String {
    let mb = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
    let process = cost.process_memory.map_or(String::new(), |bytes| format!(", {} of the process", mb(bytes)));
    format!("{:.2} s, at most {} of sandbox memory{process}", cost.seconds, mb(cost.sandbox_memory as u64))
}

fn short(hash: &str) -> &str {
    &hash[..hash.len().min(8)]
}

/// 1,234,567
fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
