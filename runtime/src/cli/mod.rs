//! The commands, as `--help` shows them.

/// `println!`, but a reader that has had enough (`| head`) or a full disk is an error and no panic. What it prints may have
/// text of somebody else in it, so control characters are shown, see [`text::lines`].
macro_rules! say {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout(), "{}", $crate::cli::text::lines(&format!($($argument)*)))?
    }};
}

/// The same for JSON, which stays JSON.
macro_rules! say_json {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout(), "{}", $crate::cli::text::in_json(&format!($($argument)*)))?
    }};
}

mod dead_letters;
mod demo;
mod events;
mod forget;
mod plugin;
mod proof;
mod serve;
mod table;
pub(crate) mod text;
mod views;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use shadowbox::config::{Config, Written};

/// Feeds event logs to sandboxed WebAssembly projections and serves their views.
///
/// Shadowbox keeps an event log, runs every projection that it finds as a .wasm file in the plugin folder, stores each
/// view together with its checkpoint, swaps or rebuilds a projection when its file changes, and answers queries over
/// HTTP and SQL while all of that goes on.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  shadowbox run                                   start in this folder, on http://127.0.0.1:7070
  shadowbox append orders.jsonl.zst               import events, also while a runtime runs
  cp my_projection.wasm plugins/                  start, or replace, a projection
  shadowbox query 'select * from order_summary'   SQL over all live views
  shadowbox status                                how far every projection is, and what is wrong
  shadowbox plan new.wasm                         what would dropping this module do?
  shadowbox verify order-summary                  are its views the fold of the log?

Exit codes: 0 done, 1 failed, 2 wrong usage; those of verify and plan are in their --help."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Common {
    /// The data directory [default: ./shadowbox-data]
    #[arg(long, global = true, value_name = "DIR")]
    data: Option<PathBuf>,
    /// A configuration file; flags win over it [default: ./shadowbox.toml, if there is one]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the projections of the plugin folder and serve their views until Ctrl-C or SIGTERM
    Run(serve::Run),
    /// Append CloudEvents 1.0, one JSON object a line, plain or zstd
    ///
    /// An event whose source and id are in the log already is no error and appends nothing, so an import that broke is
    /// simply run again. Works while a runtime runs on the same data. A bad line stops it; all before it are kept.
    /// Several files are interleaved as their events happened, by their times; each file keeps its own order.
    Append(events::Append),
    /// Print events of the log as JSON lines, in the log's order
    Events(events::Events),
    /// Show what is in the log, and what it takes
    Log(events::Log),
    /// Forget the content of events for good: from the log, and from all views that took it
    Forget(forget::Forget),
    /// Show the log's head, and every projection: state, generation, position, lag, rate, error
    Status(views::Status),
    /// Run read-only SQL over all live views; views of several projections can be joined
    Query(views::Query),
    /// Rebuild a projection's views from offset zero, while the live ones go on answering
    Rebuild(views::Rebuild),
    /// Prove that a projection's live views are the fold of the log: replay it in the shadow and compare row by row
    Verify(proof::Verify),
    /// Say what dropping a module would do: run it over the log in the shadow and compare; nothing is promoted
    Plan(proof::Plan),
    /// Go back to the former generation of a projection: it catches up and is promoted again
    ///
    /// The module in the plugin folder is not taken up again until another one is in its place.
    Rollback(views::Rollback),
    /// Let a rebuilt generation take the live one's place although that was made from more
    ///
    /// A generation that was begun after content was given up by retention, or that passed over damage, waits for this.
    Promote(forget::Promote),
    /// Start a faulted projection again, from its last commit
    Resume(dead_letters::Resume),
    /// Show or set what a projection does about an event that it cannot apply
    ///
    /// pause: it stops there. park: the event and all later ones of its stream are set aside as dead letters, other
    /// streams go on. skip: the event is set aside, everything else goes on. What is set here wins over the configuration,
    /// also after a restart; default goes back to it.
    Policy(dead_letters::SetPolicy),
    /// List, show, retry or discard the events that a projection has set aside
    #[command(subcommand)]
    DeadLetters(dead_letters::DeadLetters),
    /// Make a new plugin, or check a module
    #[command(subcommand)]
    Plugin(plugin::Plugin),
    /// Build the example plugins, append a sample of real events, and serve their views
    Demo(demo::Demo),
}

/// How a result is printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
    Csv,
}

/// Runs the command that was given.
pub(crate) async fn run(cli: Cli) -> Result<ExitCode> {
    let Cli { command, common } = cli;
    match command {
        Command::Verify(command) => return command.run(&common).await,
        Command::Plan(command) => return command.run(&common).await,
        Command::Run(command) => command.run(&common).await,
        Command::Append(command) => command.run(&common),
        Command::Events(command) => command.run(&common).await,
        Command::Log(command) => command.run(&common),
        Command::Status(command) => command.run(&common).await,
        Command::Query(command) => command.run(&common).await,
        Command::Rebuild(command) => command.run(&common),
        Command::Rollback(command) => command.run(&common),
        Command::Forget(command) => command.run(&common).await,
        Command::Promote(command) => command.run(&common),
        Command::Resume(command) => command.run(&common),
        Command::Policy(command) => command.run(&common),
        Command::DeadLetters(command) => command.run(&common).await,
        Command::Plugin(command) => command.run(&common).await,
        Command::Demo(command) => command.run(&common).await,
    }
    .map(|()| ExitCode::SUCCESS)
}

impl Cli {
    /// The exit code of an error. A proof has two answers; an error is neither of them.
    pub(crate) fn exit_code_of_errors(&self) -> ExitCode {
        match self.command {
            Command::Verify(_) | Command::Plan(_) => ExitCode::from(proof::UNKNOWN),
            _ => ExitCode::FAILURE,
        }
    }
}

/// Everything is logged to standard error; standard output is for results. `SHADOWBOX_LOG` says what, as `RUST_LOG` does
/// elsewhere: `SHADOWBOX_LOG=debug`, `SHADOWBOX_LOG=shadowbox::projection=trace`.
pub(crate) fn log_to_stderr(cli: &Cli) {
    let usual = match cli.command {
        Command::Run(_) => "warn,shadowbox=info",
        _ => "warn",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("SHADOWBOX_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(usual));
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter);
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    match &cli.command {
        Command::Run(run) if run.json => log.json().init(),
        _ => log.fmt_fields(text::log_fields()).with_ansi(terminal).init(),
    }
}

impl Common {
    /// File, then flags, then defaults.
    fn config(&self, flags: impl FnOnce(&mut Written)) -> Result<Config> {
        let usual = Path::new("shadowbox.toml");
        let mut written = match &self.config {
            Some(file) => Written::read(file)?,
            None if usual.exists() => Written::read(usual)?,
            None => Written::default(),
        };
        if let Some(data) = &self.data {
            written.data = Some(data.clone());
        }
        flags(&mut written);
        Ok(written.validate()?)
    }

    /// The configuration for a command that only reads a data directory, which must be there.
    fn existing(&self) -> Result<Config> {
        let config = self.config(|_| {})?;
        ensure!(
            config.data.join("log.sqlite").exists(),
            "there is no shadowbox data in {:?}; name it with --data, or make it with shadowbox run or append",
            config.data
        );
        Ok(config)
    }
}

/// The address of the runtime that runs on this data.
fn running(config: &Config) -> Result<String> {
    let address = shadowbox::supervisor::running(&config.data)
        .with_context(|| format!("no runtime is running on {:?}; start one with shadowbox run", config.data))?;
    Ok(format!("http://{address}"))
}

/// Asks the runtime; an answer that is an error becomes its message.
fn ask<T: serde::de::DeserializeOwned>(method: &str, url: &str) -> Result<T> {
    send(method, url, None)
}

/// The same, with a body.
fn send<T: serde::de::DeserializeOwned>(method: &str, url: &str, body: Option<&serde_json::Value>) -> Result<T> {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let request = ureq::http::Request::builder().method(method).uri(url);
    let request = match body {
        Some(_) => request.header("content-type", "application/json"),
        None => request,
    };
    let request = request.body(body.map(serde_json::Value::to_string).unwrap_or_default())?;
    // As text: a broken pipe in its chain would pass for one of our own output, which is no failure.
    let mut response =
        agent.run(request).map_err(|error| anyhow::anyhow!("cannot reach the runtime at {url}: {error}"))?;
    let ok = response.status().is_success();
    let body = response.body_mut().with_config().limit(64 << 20).read_to_string()?;
    if !ok {
        let error: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
        anyhow::bail!("{}", error["message"].as_str().unwrap_or(&body));
    }
    serde_json::from_str(&body).with_context(|| format!("{url} did not answer as expected"))
}
