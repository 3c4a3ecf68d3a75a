//! `shadowbox dead-letters`, `policy` and `resume`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use shadowbox::config::Config;
use shadowbox::log::{EventLog, cloudevents};
use shadowbox::supervisor::{PolicyStatus, replay};
use shadowbox::view::{self, DeadLetter, GenerationRecord};

use super::table::table;
use super::text::one_line;
use super::views::live;
use super::{Common, ask, running, send};

#[derive(Args)]
pub(super) struct Resume {
    /// The projection's name
    projection: String,
}

impl Resume {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let address = running(&common.existing()?)?;
        let _: Value = ask("POST", &format!("{address}/projections/{}/resume", self.projection))?;
        say!("{} goes on from its last commit", self.projection);
        Ok(())
    }
}

#[derive(Args)]
pub(super) struct SetPolicy {
    /// The projection's name
    projection: String,
    /// pause, park, skip, or default for what the configuration says; without it the policy is shown
    policy: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl SetPolicy {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let url = format!("{}/projections/{}/policy", running(&common.existing()?)?, self.projection);
        let status: PolicyStatus = match &self.policy {
            Some(policy) => send("PUT", &url, Some(&json!({ "policy": policy })))?,
            None => ask("GET", &url)?,
        };
        let PolicyStatus { policy, set, configured } = status;
        if self.json {
            say_json!("{}", serde_json::to_string(&status)?);
        } else if set {
            say!("{}: {policy}; it was set by a command, the configuration says {configured}", self.projection);
        } else {
            say!("{}: {policy}, by the configuration", self.projection);
        }
        Ok(())
    }
}

#[derive(Subcommand)]
pub(super) enum DeadLetters {
    /// List them in order
    List(List),
    /// Show one: its event, why it failed, the plugin's backtrace and output
    Show(Show),
    /// Apply them now, in order; a stream of which nothing is left goes on by itself
    ///
    /// What fails again stays, with the new reason, and so does what comes after it in its stream.
    Retry(Treat),
    /// Forget them without applying them; their events stay in the log
    Discard(Treat),
}

#[derive(Args)]
pub(super) struct List {
    /// The projection's name
    projection: String,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct Show {
    /// The projection's name
    projection: String,
    /// The dead letter's number
    number: u64,
    /// Try the event once more on the side, and write what a test needs to see the failure: the event, and the rows that
    /// the plugin asked for. TestKit::load of the crate shadowbox-plugin reads it
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct Treat {
    /// The projection's name
    projection: String,
    #[command(flatten)]
    which: Which,
    /// The source of the stream, if several have one of that name
    #[arg(long, value_name = "NAME", requires = "stream")]
    source: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The dead letter's number
    number: Option<u64>,
    /// All of a stream
    #[arg(long, value_name = "NAME")]
    stream: Option<String>,
    /// All
    #[arg(long)]
    all: bool,
}

impl DeadLetters {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let config = common.existing()?;
        match self {
            DeadLetters::List(list) => list.run(&config).await,
            DeadLetters::Show(show) => show.run(&config).await,
            DeadLetters::Retry(treat) => treat.run(&config, "retry"),
            DeadLetters::Discard(treat) => treat.run(&config, "discard"),
        }
    }
}

/// The live generation of a projection, from the files: dead letters can be looked at whether or not a runtime runs.
async fn generation(config: &Config, projection: &str) -> Result<GenerationRecord> {
    let live = live(config).await?;
    let names: Vec<_> = live.iter().map(|record| record.projection.clone()).collect();
    live.into_iter().find(|record| record.projection == projection).with_context(|| {
        let known =
            if names.is_empty() { "there are none yet".into() } else { format!("there are: {}", names.join(", ")) };
        format!("there is no projection {projection:?}; {known}")
    })
}

impl List {
    async fn run(self, config: &Config) -> Result<()> {
        let letters = view::DeadLetters::open(&generation(config, &self.projection).await?.file)?;
        let letters = letters.list(0, i64::MAX as u64)?;
        if self.json {
            say_json!("{}", serde_json::to_string_pretty(&letters)?);
        } else if letters.is_empty() {
            say!("{} has no dead letters", self.projection);
        } else {
            let mut table = table(&["number", "state", "source", "position", "stream", "type", "id", "reason"]);
            for DeadLetter { number, state, event, cause } in letters {
                table.add_row([
                    number.to_string(),
                    state.name().to_owned(),
                    event.source,
                    event.position.to_string(),
                    event.stream,
                    event.event_type,
                    event.id,
                    // Others wait for the first one of their stream.
                    cause.map_or_else(String::new, |cause| short(&cause.message)),
                ]);
            }
            say!("{table}");
        }
        Ok(())
    }
}

/// How much of a reason a table shows, characters.
const REASON: usize = 160;

/// A message on one line, cut to what a table has room for.
fn short(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(REASON).collect()
}

impl Show {
    async fn run(self, config: &Config) -> Result<()> {
        let generation = generation(config, &self.projection).await?;
        let Some(letter) = view::DeadLetters::open(&generation.file)?.get(self.number)? else {
            bail!("{} has no dead letter {}; see shadowbox dead-letters list", self.projection, self.number);
        };
        if self.json {
            say_json!("{}", serde_json::to_string_pretty(&letter)?);
        } else {
            print(&letter)?;
        }
        if let Some(directory) = &self.save {
            let (config, directory) = (config.clone(), directory.clone());
            // On a thread of its own: calls into a sandbox block.
            tokio::task::spawn_blocking(move || save(&config, &generation, &letter, &directory)).await??;
        }
        Ok(())
    }
}

fn print(letter: &DeadLetter) -> Result<()> {
    let DeadLetter { number, state, event, cause } = letter;
    say!("dead letter {number}, {}", state.name());
    say!("  event    {} ({}) of {}", one_line(&event.id), one_line(&event.event_type), event.time);
    say!("  position {}", event.position);
    say!("  source   {}", one_line(&event.source));
    if !event.stream.is_empty() {
        say!("  stream   {}", one_line(&event.stream));
    }
    let Some(cause) = cause else {
        say!("  it was not tried: an earlier event of its stream is parked");
        return Ok(());
    };
    say!("  module   {}", cause.module_hash);
    say!("  reason   {}", cause.message);
    for (what, text) in [("backtrace", &cause.backtrace), ("output", &cause.output)] {
        if let Some(text) = text {
            say!("{what}:\n{}", text);
        }
    }
    Ok(())
}

/// Writes what [`replay`] finds as files that people read and `TestKit::load` too.
fn save(config: &Config, generation: &GenerationRecord, letter: &DeadLetter, directory: &Path) -> Result<()> {
    let log = EventLog::open(&config.data)?;
    let replay = replay(&config.data, config.sandbox, &log, generation, letter)?;
    let mut event = Vec::new();
    cloudevents::write(&replay.event, &mut event);
    event.push(b'\n');
    let rows: String = replay.rows.iter().map(|row| format!("{row}\n")).collect();
    let manifest: Value = serde_json::from_str(&generation.manifest.json)?;
    let manifest = serde_json::to_string_pretty(&manifest)? + "\n";
    let letter = serde_json::to_string_pretty(letter)? + "\n";
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {directory:?}"))?;
    for (name, content) in [
        ("events.jsonl", event),
        ("rows.jsonl", rows.into_bytes()),
        ("manifest.json", manifest.into_bytes()),
        ("letter.json", letter.into_bytes()),
    ] {
        let path = directory.join(name);
        std::fs::write(&path, content).with_context(|| format!("cannot write {path:?}"))?;
    }
    say!("wrote {}", directory.display());
    match replay.cause {
        Some(cause) => say!("the event still fails: {}", short(&cause.message)),
        None => say!("the event would be applied now; retry it"),
    }
    say!("as a test: TestKit::new(my_projection).load({:?}).given_saved()", directory.display().to_string());
    Ok(())
}

impl Treat {
    fn run(self, config: &Config, what: &str) -> Result<()> {
        let Which { number, stream, all: _ } = self.which;
        let selector = match (number, stream) {
            (Some(number), _) => json!({ "number": number }),
            (None, Some(stream)) => json!({ "stream": stream, "source": self.source }),
            (None, None) => json!({ "all": true }),
        };
        let url = format!("{}/projections/{}/dead-letters/{what}", running(config)?, self.projection);
        let outcome: Value = send("POST", &url, Some(&selector))?;
        if self.json {
            say_json!("{}", serde_json::to_string_pretty(&outcome)?);
        } else {
            match what {
                "retry" => say!("applied {}", outcome["applied"]),
                _ => say!("discarded {}", outcome["discarded"]),
            }
            if let Some(forgotten) = outcome["forgotten"].as_u64().filter(|forgotten| *forgotten > 0) {
                say!("{forgotten} are gone, because the content of their events is forgotten");
            }
            for failed in outcome["failed"].as_array().into_iter().flatten() {
                let message = short(failed["message"].as_str().unwrap_or_default());
                say!("{} failed again: {message}", failed["number"]);
            }
            say!("{} are parked, {} skipped", outcome["left"]["parked"], outcome["left"]["skipped"]);
        }
        let failed = outcome["failed"].as_array().map_or(0, Vec::len);
        ensure!(failed == 0, "{failed} failed again; see shadowbox dead-letters show {}", self.projection);
        Ok(())
    }
}
