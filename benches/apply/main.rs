//! The fold of `carrier-performance` in process, for the bench `apply`, in a program of its own so that it can be built as
//! modules are: as one piece, fully optimised.
//!
//! `apply-in-process sdk|plain BATCHES PASSES` applies the encoded batches of a file over and over and prints how long each
//! pass took. `sdk` is the plugin's own code, compiled for this machine: the same batches in, the same changes out.
//! `plain` is what one would write without a contract: it borrows from the events where they are, and only notes which
//! rows have changed.

#![expect(clippy::print_stdout, reason = "the answer goes to whoever started it")]

#[path = "../../example-plugins/carrier-performance/src/lib.rs"]
#[allow(unreachable_pub, reason = "it is a crate of its own, where this is reachable")]
mod carriers;

use anyhow::{Context, Result, bail};
use rustc_hash::{FxHashMap, FxHashSet};
use serde::Deserialize;
use serde_bytes::Bytes;
use shadowbox_plugin::__private::InProcess;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [contestant, file, passes] = &arguments[..] else {
        bail!("usage: apply-in-process sdk|plain BATCHES PASSES");
    };
    let file = std::fs::read(file)?;
    let mut batches = Vec::new();
    let mut rest = &file[..];
    while let Some((length, after)) = rest.split_first_chunk() {
        let (batch, after) = after.split_at(u32::from_le_bytes(*length) as usize);
        batches.push(batch);
        rest = after;
    }
    let passes = passes.parse()?;
    let (nanoseconds, result) = match contestant.as_str() {
        "sdk" => {
            let mut instance = InProcess::new(carriers::carrier_performance);
            time(passes, &batches, |batch| {
                let changes = instance.apply(batch).map_err(anyhow::Error::msg)?;
                Ok(changes.iter().map(|byte| u64::from(*byte)).sum())
            })?
        }
        "plain" => {
            let batches = batches.iter().map(|batch| Ok(rmp_serde::from_slice(batch)?)).collect::<Result<Vec<_>>>()?;
            let mut carriers = Plain::default();
            time(passes, &batches, |batch| carriers.apply(batch))?
        }
        _ => bail!("unknown contestant {contestant:?}"),
    };
    println!("{}", serde_json::json!({ "nanoseconds": nanoseconds, "result": result }));
    Ok(())
}

/// The CPU time of each pass but the first, which fills tables and caches, in nanoseconds; and the sum of all results.
fn time<T>(passes: usize, batches: &[T], mut apply: impl FnMut(&T) -> Result<u64>) -> Result<(Vec<f64>, u64)> {
    let (mut nanoseconds, mut result) = (Vec::new(), 0_u64);
    for pass in 0..=passes {
        let began = thread_nanoseconds()?;
        for batch in batches {
            result = result.wrapping_add(apply(batch)?);
        }
        if pass > 0 {
            nanoseconds.push(thread_nanoseconds()? - began);
        }
    }
    Ok((nanoseconds, result))
}

/// As the bench measures itself.
fn thread_nanoseconds() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(text.split_whitespace().next().context("an empty schedstat")?.parse()?)
}

/// A batch, decoded before the clock runs.
#[derive(Deserialize)]
struct Batch<'a> {
    #[serde(borrow)]
    types: Vec<&'a str>,
    #[serde(borrow, rename = "type")]
    numbers: &'a Bytes,
    #[serde(borrow)]
    payloads: &'a Bytes,
    #[serde(borrow)]
    payload_ends: &'a Bytes,
}

#[derive(Default)]
struct Plain<'a> {
    carriers: Vec<Carrier<'a>>,
    by_code: FxHashMap<&'a str, usize>,
    flights: FxHashMap<&'a str, usize>,
    changed_carriers: FxHashSet<usize>,
    changed_flights: FxHashSet<&'a str>,
}

#[derive(Default)]
struct Carrier<'a> {
    code: &'a str,
    scheduled: i64,
    departed: i64,
    arrived: i64,
    dep_delay_sum: i64,
    arr_delay_sum: i64,
}

#[derive(Deserialize)]
struct Scheduled<'a> {
    flight_id: &'a str,
    carrier: &'a str,
}

#[derive(Deserialize)]
struct Departed<'a> {
    flight_id: &'a str,
    dep_delay: i64,
}

#[derive(Deserialize)]
struct Arrived<'a> {
    flight_id: &'a str,
    arr_delay: i64,
}

impl<'a> Plain<'a> {
    fn apply(&mut self, batch: &Batch<'a>) -> Result<u64> {
        let mut start = 0;
        let ends = batch.payload_ends.as_chunks().0.iter().map(|end| u32::from_le_bytes(*end) as usize);
        let payloads: &'a [u8] = batch.payloads;
        for (number, end) in batch.numbers.as_chunks().0.iter().zip(ends) {
            let payload = &payloads[start..end];
            start = end;
            match batch.types[usize::from(u16::from_le_bytes(*number))] {
                "FlightScheduled" => {
                    let e: Scheduled<'a> = serde_json::from_slice(payload)?;
                    let carriers = &mut self.carriers;
                    let carrier = *self.by_code.entry(e.carrier).or_insert_with(|| {
                        carriers.push(Carrier { code: e.carrier, ..Carrier::default() });
                        carriers.len() - 1
                    });
                    self.flights.insert(e.flight_id, carrier);
                    self.changed_flights.insert(e.flight_id);
                    self.changed_carriers.insert(carrier);
                    self.carriers[carrier].scheduled += 1;
                }
                "FlightDeparted" => {
                    let e: Departed<'a> = serde_json::from_slice(payload)?;
                    let carrier = self.of_flight(e.flight_id)?;
                    carrier.departed += 1;
                    carrier.dep_delay_sum += e.dep_delay;
                }
                "FlightArrived" => {
                    let e: Arrived<'a> = serde_json::from_slice(payload)?;
                    let carrier = self.of_flight(e.flight_id)?;
                    carrier.arrived += 1;
                    carrier.arr_delay_sum += e.arr_delay;
                }
                other => bail!("there is no {other} in these batches"),
            }
        }
        // Reads what a commit would read, so that none of the above can be left out.
        let mut sum = self.changed_flights.len() as u64;
        for carrier in self.changed_carriers.drain() {
            let c = &self.carriers[carrier];
            let numbers = [c.code.len() as i64, c.scheduled, c.departed, c.arrived, c.dep_delay_sum, c.arr_delay_sum];
            sum = sum.wrapping_add(numbers.iter().sum::<i64>() as u64);
        }
        self.changed_flights.clear();
        Ok(sum)
    }

    fn of_flight(&mut self, flight_id: &str) -> Result<&mut Carrier<'a>> {
        let carrier = *self.flights.get(flight_id).context("a flight that was never scheduled")?;
        self.changed_carriers.insert(carrier);
        Ok(&mut self.carriers[carrier])
    }
}
