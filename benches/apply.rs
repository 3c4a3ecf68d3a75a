//! What does an event cost through the sandbox, by the size of batches and of payloads, against the same code in process?
//! `benches/README.md` says how to run and read it.

#![expect(clippy::print_stdout, reason = "the table is what one runs this for")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shadowbox::config::Written;
use shadowbox::model::{BatchColumn, ColumnSet, Columns, Position, RawEvent, Time};
use shadowbox::plugin::{Engine, RowError, Rows};
use support::{Report, Samples, module_file, root, table, verdict, workplace};

const BATCHES: [usize; 6] = [1, 10, 100, 1_000, 4_096, 16_384];
const PAYLOADS: [usize; 4] = [50, 170, 1_024, 4_096];
/// Events of one file of batches, at most and at least.
const EVENTS: std::ops::RangeInclusive<usize> = 16_384..=65_536;
/// Bytes of payloads in one file, if there can be so few.
const BYTES: usize = 32 << 20;
/// The runtime cuts batches at this many bytes (`batch.bytes`), so that larger ones do not occur.
const BATCH_BYTES: usize = 4 << 20;
/// Flights that the events are about: fewer than a plugin's cache has rows, so that the host is asked for none.
const FLIGHTS: usize = 2_000;
const PASSES: usize = 3;

const CONTESTANTS: [&str; 3] = ["sandbox", "sdk", "plain"];

/// The most that the time in the sandbox may be of the same code's in process.
const RATIO: f64 = 1.6;
/// The batch and the payload that this is said of.
const OF: (usize, usize) = (1_000, 170);

fn main() -> Result<()> {
    support::main("apply", contestant, bench)
}

/// The CPU time of each pass over a file of batches.
#[derive(Serialize, Deserialize)]
struct Passes {
    nanoseconds: Vec<f64>,
    /// A sum over all that came back.
    result: u64,
}

fn contestant(arguments: &[&str]) -> Result<Value> {
    match *arguments {
        ["sandbox", module, batches] => Ok(serde_json::to_value(in_the_sandbox(module, batches)?)?),
        _ => bail!("unknown contestant {arguments:?}"),
    }
}

/// A host that has no rows.
struct NoRows;

impl Rows for NoRows {
    fn get(&mut self, _: u32, _: &[u8]) -> Result<Option<Vec<u8>>, RowError> {
        Ok(None)
    }
}

fn in_the_sandbox(module: &str, batches: &str) -> Result<Passes> {
    let config = Written::default().validate()?;
    let module = Engine::new(Some(&workplace().join("cache")), config.sandbox)?.admit(&std::fs::read(module)?)?;
    let mut instance = module.instantiate(Arc::new(Mutex::new(NoRows)))?;
    let file = std::fs::read(batches)?;
    let (mut nanoseconds, mut result) = (Vec::new(), 0_u64);
    for pass in 0..=PASSES {
        let began = support::thread_nanoseconds()?;
        let mut rest = &file[..];
        while let Some((length, after)) = rest.split_first_chunk() {
            let (batch, after) = after.split_at(u32::from_le_bytes(*length) as usize);
            let changes = instance.apply(batch)?;
            result = result.wrapping_add(changes.iter().map(|byte| u64::from(*byte)).sum());
            rest = after;
        }
        if pass > 0 {
            nanoseconds.push(support::thread_nanoseconds()? - began);
        }
    }
    Ok(Passes { nanoseconds, result })
}

/// The other contestants, built as the module is.
fn build_in_process() -> Result<PathBuf> {
    let target = root().join("target/plugins");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).args(["build", "--profile", "plugin", "-p", "apply-in-process", "--target-dir"]);
    ensure!(cargo.arg(&target).status()?.success(), "the program cannot be built");
    Ok(target.join("plugin/apply-in-process"))
}

fn in_process(program: &Path, contestant: &str, batches: &str) -> Result<Passes> {
    let mut command = Command::new(program);
    command.args([contestant, batches, &PASSES.to_string()]).stderr(Stdio::inherit());
    let output = command.output()?;
    ensure!(output.status.success(), "{contestant} failed: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Writes a file of encoded batches, each after its length; answers the events in it and the nanoseconds that encoding one
/// took.
fn write_batches(path: &Path, batch: usize, payload: usize) -> Result<(usize, f64)> {
    let events = (BYTES / payload).clamp(*EVENTS.start(), *EVENTS.end());
    let sources = [Arc::from("flights")];
    let types = ["FlightScheduled", "FlightDeparted", "FlightArrived"].map(Arc::from);
    // The plugin reads payloads alone.
    let wanted = ColumnSet::from_iter([BatchColumn::Payloads]);
    let (mut file, mut columns, mut encoding) = (Vec::new(), Columns::new(wanted), 0.0);
    for i in 0..events {
        // A flight is scheduled, departs and arrives, as in the log.
        let (flight, what) = (i / 3 % FLIGHTS, i % 3);
        let id = format!("2013{:04}-{}{:04}-JFK-0", flight / 24, CARRIERS[flight % CARRIERS.len()], flight);
        let data = json_of_size(payload, &id, what, CARRIERS[flight % CARRIERS.len()]);
        let event = RawEvent {
            position: Position(i as u64),
            time: Time::EPOCH,
            version: what as u64 + 1,
            stream: id.as_bytes(),
            id: id.as_bytes(),
            metadata: b"",
            payload: data.as_bytes(),
            forgotten: false,
        };
        columns.push(0, what as u16, event);
        if columns.len() == batch || i + 1 == events {
            let began = Instant::now();
            let encoded = columns.encode(&sources, &types, wanted, false);
            encoding += began.elapsed().as_secs_f64();
            file.extend_from_slice(&u32::try_from(encoded.len())?.to_le_bytes());
            file.extend_from_slice(&encoded);
            columns.clear();
        }
    }
    std::fs::write(path, file)?;
    Ok((events, encoding * 1e9 / events as f64))
}

const CARRIERS: [&str; 16] =
    ["UA", "AA", "B6", "DL", "EV", "MQ", "US", "WN", "VX", "FL", "AS", "9E", "F9", "HA", "YV", "OO"];

/// What the projection reads comes first, and then fields that it passes over, as long as there is room.
fn json_of_size(size: usize, id: &str, what: usize, carrier: &str) -> String {
    let mut json = match what {
        0 => format!("{{\"flight_id\":\"{id}\",\"carrier\":\"{carrier}\""),
        1 => format!("{{\"flight_id\":\"{id}\",\"dep_delay\":-3"),
        _ => format!("{{\"flight_id\":\"{id}\",\"arr_delay\":12"),
    };
    let fields = [
        ",\"origin\":\"JFK\"",
        ",\"distance\":1400",
        ",\"departs_at\":\"2013-01-01T10:15:00Z\"",
        ",\"tailnum\":\"N14228\"",
    ];
    for field in fields.iter().cycle() {
        if json.len() + field.len() >= size {
            break;
        }
        json.push_str(field);
    }
    json.push('}');
    json
}

/// All passes of all contestants over one file, in nanoseconds for an event.
struct Outcome {
    batch: usize,
    payload: usize,
    /// The nanoseconds in which the host makes an event's part of a batch; in no other column.
    encoding: f64,
    nanoseconds: [Vec<f64>; 3],
}

fn bench(report: &mut Report) -> Result<()> {
    let rounds = support::rounds(3)?;
    let module = support::modules(&["carrier-performance"])?.join(module_file("carrier-performance"));
    let program = build_in_process()?;
    let mut outcomes = Vec::new();
    let file = workplace().join("batches.bin");
    for payload in PAYLOADS {
        for batch in BATCHES.into_iter().filter(|batch| batch * payload <= BATCH_BYTES) {
            let (events, encoding) = write_batches(&file, batch, payload)?;
            let path = file.to_str().context("the workspace's path is UTF-8")?;
            let mut outcome = Outcome { batch, payload, encoding, nanoseconds: Default::default() };
            for _ in 0..rounds {
                let ours: Passes = support::child(&["sandbox", module.to_str().context("UTF-8")?, path])?;
                let [sdk, plain] = [in_process(&program, "sdk", path)?, in_process(&program, "plain", path)?];
                ensure!(sdk.result == ours.result, "the sandbox gives other changes than the same code in process");
                for (nanoseconds, passes) in outcome.nanoseconds.iter_mut().zip([ours, sdk, plain]) {
                    nanoseconds.extend(passes.nanoseconds.iter().map(|ns| ns / events as f64));
                }
            }
            println!("batches of {batch}, payloads of {payload} bytes: {:.0} ns in the sandbox", outcome.median(0));
            outcomes.push(outcome);
        }
    }
    std::fs::remove_file(&file)?;
    report.add("apply", outcomes.iter().map(Outcome::to_json).collect::<Vec<_>>())?;
    print_tables(&outcomes);
    Ok(())
}

impl Outcome {
    fn median(&self, contestant: usize) -> f64 {
        Samples::new(self.nanoseconds[contestant].iter().copied()).median()
    }

    fn min(&self, contestant: usize) -> f64 {
        Samples::new(self.nanoseconds[contestant].iter().copied()).min()
    }

    fn to_json(&self) -> Value {
        let contestants = CONTESTANTS.iter().zip(&self.nanoseconds).map(|(name, ns)| (name.to_string(), json!(ns)));
        json!({
            "batch": self.batch,
            "payload_bytes": self.payload,
            "encoding_ns": self.encoding,
            "ns_an_event": contestants.collect::<serde_json::Map<_, _>>(),
        })
    }
}

fn print_tables(outcomes: &[Outcome]) {
    let mut times = table(&[
        "payload bytes",
        "events a batch",
        "encode, ns an event",
        "sandbox",
        "same code in process",
        "plain fold",
        "sandbox / same code",
        "sandbox / plain",
    ]);
    let mut target = String::new();
    for outcome in outcomes {
        let [sandbox, sdk, plain] = [0, 1, 2].map(|contestant| outcome.median(contestant));
        let ratio = sandbox / sdk;
        if (outcome.batch, outcome.payload) == OF {
            let lowest = outcome.min(0) / outcome.min(1);
            target = verdict(ratio <= RATIO, format!("{ratio:.2} ({lowest:.2} by the minima), at most {RATIO}"));
        }
        times.add_row([
            outcome.payload.to_string(),
            outcome.batch.to_string(),
            format!("{:.0}", outcome.encoding),
            format!("{sandbox:.0}"),
            format!("{sdk:.0}"),
            format!("{plain:.0}"),
            format!("{ratio:.2}"),
            format!("{:.2}", sandbox / plain),
        ]);
    }
    println!("\n{times}\n\nbatches of {}, payloads of {} bytes: {target}", OF.0, OF.1);
}
