//! `shadowbox demo`: the five-minute tour by itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use shadowbox::config::Config;
use shadowbox::log::EventLog;

use super::serve::Server;
use super::{Common, Format, events, views};

#[derive(Args)]
pub(super) struct Demo {
    /// Where to listen; port 0 takes a free one [default: 127.0.0.1:7070]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
}

const PLUGINS: [&str; 5] =
    ["order-summary", "carrier-performance", "orders-across-services", "flight-board", "event-counts"];

const EVENTS: [&str; 4] = [
    "tests/data/flights/fleet.jsonl.zst",
    "tests/data/flights/weather.jsonl.zst",
    "tests/data/flights/flights.jsonl.zst",
    "example-plugins/orders-across-services/events.jsonl",
];

impl Demo {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
        ensure!(
            root.join("example-plugins").exists(),
            "the demo builds the example plugins, and {root:?} has none; run it from a checkout of shadowbox"
        );
        let config = common.config(|written| {
            let data = written.data.get_or_insert_with(|| "shadowbox-data/demo".into()).clone();
            written.plugins = Some(data.join("plugins"));
            written.listen = self.listen.or(written.listen.take());
        })?;
        say!("building the example plugins for wasm32-wasip2");
        let modules = build(root)?;
        say!("appending real events: two weeks of flights out of New York, 2013");
        let log = EventLog::open(&config.data)?;
        let files: Vec<PathBuf> = EVENTS.iter().map(|file| root.join(file)).collect();
        let imported = events::import(&log, &files, None, events::Order::ByTime);
        if let Some(error) = imported.failed {
            return Err(error);
        }
        say!("appended {} events; {} were there already", imported.appended, imported.already);
        drop(log);
        for (name, module) in PLUGINS.iter().zip(modules) {
            place(&module, &config.plugins.join(format!("{name}.wasm")))?;
        }
        let shown = config.clone();
        let server = Server::start(config).await?;
        catch_up(&server).await;
        show(&shown, &server).await?;
        server.until_stopped().await
    }
}

/// Builds the examples and answers where their modules are.
fn build(root: &Path) -> Result<Vec<PathBuf>> {
    // A target directory of its own: cargo may still hold the lock of the one that this program is in.
    let target = root.join("target/plugins");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(root)
        .args(["build", "--profile", "plugin", "--target", "wasm32-wasip2", "--target-dir"])
        .arg(&target)
        .args(PLUGINS.iter().flat_map(|name| ["-p", name]))
        .status()
        .context("cannot run cargo; install Rust with rustup")?;
    ensure!(status.success(), "cargo could not build the example plugins");
    let module = |name: &&str| target.join(format!("wasm32-wasip2/plugin/{}.wasm", name.replace('-', "_")));
    Ok(PLUGINS.iter().map(module).collect())
}

/// Copies a module into the watched folder in one step.
fn place(module: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().expect("the file is in the plugin folder");
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {folder:?}"))?;
    let mut copy = tempfile::NamedTempFile::new_in(folder)?;
    std::io::copy(&mut std::fs::File::open(module)?, &mut copy)?;
    copy.persist(to).with_context(|| format!("cannot write {to:?}"))?;
    Ok(())
}

/// How often progress is shown.
const LOOK: Duration = Duration::from_millis(50);

async fn catch_up(server: &Server) {
    let bars = MultiProgress::new();
    let style =
        ProgressStyle::with_template("{prefix:24} {bar:30} {pos}/{len} events {msg}").expect("a valid template");
    let projections = server.runtime.status().projections;
    let bars: Vec<_> = projections
        .iter()
        .map(|p| bars.add(ProgressBar::new(0).with_style(style.clone()).with_prefix(p.name.clone())))
        .collect();
    loop {
        let status = server.runtime.status();
        for (bar, projection) in bars.iter().zip(&status.projections) {
            let done = projection.live.position.map_or(0, |p| p.0 + 1);
            bar.set_length(done + projection.live.lag_events);
            bar.set_position(done);
            bar.set_message(format!("{:.0}/s", projection.live.rate));
        }
        if status.projections.iter().all(|p| p.live.lag_events == 0 || p.live.error.is_some()) {
            bars.iter().for_each(|bar| bar.finish());
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn show(config: &Config, server: &Server) -> Result<()> {
    let tables = [
        "select carrier, name, scheduled, departed, cancelled, dep_delay_sum from carrier_performance
         order by scheduled desc limit 5",
        "select carrier || ' ' || flight as flight, airline, aircraft, dest, status, dep_delay,
         round(wind_speed, 1) as wind, visibility from flight_board order by departs_at limit 5",
    ];
    for (view, sql) in ["carrier_performance", "flight_board"].into_iter().zip(tables) {
        say!("\n{view}");
        views::query(config, sql, Format::Table).await?;
    }
    let url = format!("http://{}", server.address);
    say!(
        r#"
listening on {url}; try:

  # the worst delays out of JFK
  curl '{url}/views/flight_board?origin=eq.JFK&order=dep_delay.desc.nullslast&limit=3&select=flight_id,airline,dep_delay'

  # append an event, and read it back: the query waits until the view has seen that position
  at=$(curl -s -o /dev/null -D - -H 'content-type: application/cloudevents+json' {url}/events -d '{{
    "specversion": "1.0", "id": "demo-1", "source": "fleet", "type": "AirlineRegistered",
    "time": "2026-01-01T00:00:00Z", "data": {{ "carrier": "SB", "name": "Shadowbox Air" }} }}' | grep -i ^shadowbox-position | tr -d '\r')
  curl -H "$at" '{url}/views/carrier_performance?carrier=eq.SB'

  # rebuild a view from offset zero while it goes on answering
  curl -X POST {url}/projections/flight-board/rebuild; curl {url}/projections/flight-board

ctrl-c ends the demo"#
    );
    Ok(())
}
