//! How soon after an append does a query over HTTP see it, and how many events a second does a view keep up with?
//! `benches/README.md` says how to run and read it.

#![expect(clippy::print_stdout, reason = "the table is what one runs this for")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use shadowbox::log::EventLog;
use shadowbox::model::{NewEvent, Time};
use support::http::{self, Client};
use support::{Home, Report, Samples, Server, module_file, table, thousands, verdict};
use tokio::sync::{mpsc, watch};

/// Events a second, and how long.
const RATES: [(u64, Duration); 3] =
    [(10, Duration::from_secs(10)), (1_000, Duration::from_secs(5)), (20_000, Duration::from_secs(5))];
/// From this rate on, events are appended through the library, by another process than the runtime's and several at once.
const LIBRARY: u64 = 20_000;
/// Appends of the library a second.
const APPENDS: u64 = 200;
/// The rates of which the highest that is sustained is looked for, and for how long each is.
const SUSTAINED: [u64; 6] = [20_000, 35_000, 50_000, 75_000, 100_000, 150_000];
const SUSTAINED_FOR: Duration = Duration::from_secs(4);
/// Requests of `POST /events` that are under way at a time, at most.
const APPENDERS: usize = 4;
/// Readers that wait at a time, at most: so many that none has to wait for the end of another's waiting.
const READERS: usize = 32;

/// The most that half and 99 % of the events may take at 1,000 events a second.
const P50_MS: f64 = 3.0;
const P99_MS: f64 = 15.0;
const LAG_MS: f64 = 100.0;
const SUSTAINED_TARGET: u64 = 50_000;

fn main() -> Result<()> {
    support::main("tail", |arguments| bail!("unknown contestant {arguments:?}"), bench)
}

/// The event numbered `n`: one more flight, which is a row of `flight_carrier`.
fn flight_id(n: u64) -> String {
    format!("29990101-XX{n}-JFK-0")
}

fn payload(n: u64) -> String {
    format!(
        r#"{{"flight_id":"{}","carrier":"XX","flight":1545,"tailnum":"N14228","origin":"JFK","dest":"IAH","departs_at":"2013-01-01T10:15:00Z","distance":1400}}"#,
        flight_id(n)
    )
}

fn event(n: u64) -> NewEvent {
    NewEvent {
        source: "flights".into(),
        id: format!("flight-{}/1", flight_id(n)),
        stream: format!("flight-{}", flight_id(n)),
        version: 1,
        event_type: "FlightScheduled".into(),
        time: Time::now(),
        metadata: String::new(),
        payload: payload(n).into_bytes(),
    }
}

/// An event that was appended, of which one waits until it is seen.
#[derive(Clone)]
struct Sample {
    n: u64,
    /// When the append began.
    began: Instant,
    /// When it was answered: the event is durable then, and the reader knows where it is.
    answered: Instant,
    /// The header with its position.
    position: String,
}

/// Milliseconds of each sample.
#[derive(Default)]
struct Seen {
    /// From the append's begin to its answer.
    append: Vec<f64>,
    /// From the append's begin to the row, for a reader that asks for the position as soon as it is known.
    waiting: Vec<f64>,
    /// From the answer of the append to the row, for the same.
    after_answer: Vec<f64>,
    /// From the append's begin to the row, for a reader that knows of no position and asks again and again.
    polling: Vec<f64>,
    /// The events a second that were appended in fact.
    rate: f64,
}

fn bench(report: &mut Report) -> Result<()> {
    let modules = support::modules(&["carrier-performance"])?;
    let home = Home::new("tail")?;
    home.copy_log(&support::log(1)?)?;
    let file = module_file("carrier-performance");
    home.drop_module(&file, &std::fs::read(modules.join(&file))?)?;
    let server = home.serve()?;
    server.wait_live("carrier-performance")?;
    let mut next = 0;
    let mut latencies = Vec::new();
    for (rate, time) in RATES {
        let seen = run(&server, &home, rate, time, &mut next)?;
        println!("{rate} events/s: {:.1} ms until half are seen", Samples::new(seen.waiting.iter().copied()).median());
        latencies.push((rate, seen));
    }
    let mut sustained = Vec::new();
    for rate in SUSTAINED {
        // What the one before has left behind is not of this one.
        server.wait_live("carrier-performance")?;
        let seen = run(&server, &home, rate, SUSTAINED_FOR, &mut next)?;
        let lag = Samples::new(seen.after_answer.iter().copied());
        println!("{rate} events/s: {:.0} appended, lag {:.1} ms for 99 %", seen.rate, lag.at(0.99));
        let ended = !seen.keeps_up(rate);
        sustained.push((rate, seen));
        if ended {
            break;
        }
    }
    report.add("latencies", latencies.iter().map(|(rate, seen)| seen.to_json(*rate)).collect::<Vec<_>>())?;
    report.add("sustained", sustained.iter().map(|(rate, seen)| seen.to_json(*rate)).collect::<Vec<_>>())?;
    print_tables(&latencies, &sustained);
    Ok(())
}

/// Appends at a rate for a time, while one reader waits for positions and another one polls.
fn run(server: &Server, home: &Home, rate: u64, time: Duration, next: &mut u64) -> Result<Seen> {
    let first = *next;
    let count = rate * time.as_millis() as u64 / 1_000;
    *next += count;
    support::in_process(async {
        let (samples, mut received) = mpsc::unbounded_channel::<Sample>();
        let (newest, polled) = watch::channel(None);
        let began = Instant::now();
        let appending = match rate < LIBRARY {
            true => tokio::spawn(post(server.address.clone(), rate, first..first + count, samples)),
            false => {
                let data = home.data();
                tokio::task::spawn_blocking(move || {
                    append(&EventLog::open(&data)?, rate, first..first + count, &samples)
                })
            }
        };
        let poller = tokio::spawn(poll(server.address.clone(), polled));
        // Each sample is waited for on one of a few connections; what comes meanwhile is waited for by the others.
        let mut seen = Seen::default();
        let (idle, mut ready) = mpsc::unbounded_channel();
        for _ in 0..READERS {
            idle.send(Client::connect(&server.address).await?)?;
        }
        let (done, mut results) = mpsc::unbounded_channel();
        while let Some(sample) = received.recv().await {
            newest.send_replace(Some(sample.clone()));
            seen.append.push(milliseconds(sample.answered - sample.began));
            let mut client = ready.recv().await.context("connections come back")?;
            let (idle, done) = (idle.clone(), done.clone());
            tokio::spawn(async move {
                let result = wait(&mut client, &sample).await;
                // Both are there until all samples are.
                let _ = (done.send(result), idle.send(client));
            });
        }
        appending.await??;
        seen.rate = count as f64 / began.elapsed().as_secs_f64();
        drop((done, newest));
        while let Some(result) = results.recv().await {
            let (waiting, after_answer) = result?;
            seen.waiting.push(waiting);
            seen.after_answer.push(after_answer);
        }
        seen.polling = poller.await??;
        Ok(seen)
    })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// One event with each request, as a service does it; each event at its time, on the next connection that is free.
async fn post(
    address: String,
    rate: u64,
    events: std::ops::Range<u64>,
    samples: mpsc::UnboundedSender<Sample>,
) -> Result<()> {
    let (start, first, next) = (Instant::now(), events.start, Arc::new(AtomicU64::new(events.start)));
    let clients = (0..APPENDERS).map(|_| {
        let (address, samples, next, end) = (address.clone(), samples.clone(), next.clone(), events.end);
        tokio::spawn(async move {
            let mut client = Client::connect(&address).await?;
            loop {
                let n = next.fetch_add(1, Relaxed);
                if n >= end {
                    return Ok::<_, anyhow::Error>(());
                }
                let due = start + Duration::from_nanos((n - first) * 1_000_000_000 / rate);
                tokio::time::sleep_until(due.into()).await;
                let e = event(n);
                let body = format!(
                    r#"{{"specversion":"1.0","id":"{}","source":"{}","type":"{}","subject":"{}","sequence":1,"time":"{}","data":{}}}"#,
                    e.id,
                    e.source,
                    e.event_type,
                    e.stream,
                    e.time,
                    payload(n)
                );
                let request =
                    http::request("POST", "/events", &[("content-type", "application/cloudevents+json")], &body);
                // Not when it was due: a timer's lateness is no latency.
                let began = Instant::now();
                let answer = client.send(&request).await?;
                ensure!(answer.status == 200, "{}\n{}", answer.head, String::from_utf8_lossy(answer.body));
                let position = answer.header("shadowbox-position").context("no position")?.to_owned();
                // Whoever receives them has failed if it is gone, and says so.
                let _ = samples.send(Sample { n, began, answered: Instant::now(), position });
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await??;
    }
    Ok(())
}

/// Through the library, several events at once; one of each append is a sample.
fn append(
    log: &EventLog,
    rate: u64,
    events: std::ops::Range<u64>,
    samples: &mpsc::UnboundedSender<Sample>,
) -> Result<()> {
    let (start, batch) = (Instant::now(), rate / APPENDS);
    let mut n = events.start;
    while n < events.end {
        let due = start + Duration::from_nanos((n - events.start) * 1_000_000_000 / rate);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let events: Vec<_> = (n..n + batch).map(event).collect();
        let began = Instant::now();
        let appended = log.append(events)?;
        let last = appended.last().context("nothing was appended")?;
        n += batch;
        let position = last.position.to_string();
        let _ = samples.send(Sample { n: n - 1, began, answered: Instant::now(), position });
    }
    Ok(())
}

fn path(n: u64) -> String {
    format!("/views/flight_carrier?flight_id=eq.{}", flight_id(n))
}

/// Asks for the row as of its position.
async fn wait(client: &mut Client, sample: &Sample) -> Result<(f64, f64)> {
    let headers = [("shadowbox-position", sample.position.as_str()), ("prefer", "wait=30")];
    let answer = client.send(&http::get(&path(sample.n), &headers)).await?;
    let now = Instant::now();
    ensure!(answer.status == 200, "{}\n{}", answer.head, String::from_utf8_lossy(answer.body));
    ensure!(answer.body.starts_with(b"[{"), "the answer is complete to {}, and has no row", sample.position);
    Ok((milliseconds(now - sample.began), milliseconds(now - sample.answered)))
}

/// Asks for the newest sample's row until it is there, then for the newest one's of then.
async fn poll(address: String, mut newest: watch::Receiver<Option<Sample>>) -> Result<Vec<f64>> {
    let mut client = Client::connect(&address).await?;
    let mut seen = Vec::new();
    while newest.changed().await.is_ok() {
        let Some(sample) = newest.borrow_and_update().clone() else { continue };
        let request = http::get(&path(sample.n), &[]);
        loop {
            let answer = client.send(&request).await?;
            ensure!(answer.status == 200, "{}\n{}", answer.head, String::from_utf8_lossy(answer.body));
            if answer.body.starts_with(b"[{") {
                seen.push(milliseconds(sample.began.elapsed()));
                break;
            }
        }
    }
    Ok(seen)
}

/// What a column shows.
#[derive(Serialize)]
struct Parts {
    samples: usize,
    p50_ms: f64,
    p99_ms: f64,
    p999_ms: f64,
    max_ms: f64,
}

fn parts(values: &[f64]) -> Parts {
    let all = Samples::new(values.iter().copied());
    Parts { samples: all.len(), p50_ms: all.median(), p99_ms: all.at(0.99), p999_ms: all.at(0.999), max_ms: all.max() }
}

impl Seen {
    /// Whether the view kept up with this rate, and the appender, too.
    fn keeps_up(&self, rate: u64) -> bool {
        parts(&self.after_answer).p99_ms < LAG_MS && self.rate >= 0.98 * rate as f64
    }

    fn to_json(&self, rate: u64) -> Value {
        json!({
            "rate": rate,
            "appended_a_second": self.rate,
            "append": parts(&self.append),
            "waiting_reader": parts(&self.waiting),
            "waiting_reader_after_the_answer": parts(&self.after_answer),
            "polling_reader": parts(&self.polling),
        })
    }
}

fn print_tables(latencies: &[(u64, Seen)], sustained: &[(u64, Seen)]) {
    let mut times = table(&["events/s", "appended by", "what", "samples", "p50 ms", "p99 ms", "p99.9 ms", "max ms"]);
    let mut target = String::new();
    for (rate, seen) in latencies {
        let by = if *rate < LIBRARY { "POST /events" } else { "library" };
        for (what, values) in [
            ("the append itself", &seen.append),
            ("append to visible, waiting reader", &seen.waiting),
            ("append to visible, polling reader", &seen.polling),
        ] {
            let Parts { samples, p50_ms, p99_ms, p999_ms, max_ms } = parts(values);
            let numbers = [p50_ms, p99_ms, p999_ms, max_ms].map(|ms| format!("{ms:.2}"));
            let words = [thousands(*rate as f64), by.to_owned(), what.to_owned(), samples.to_string()];
            times.add_row(words.into_iter().chain(numbers));
        }
        if *rate == 1_000 {
            let Parts { p50_ms, p99_ms, .. } = parts(&seen.waiting);
            let met = p50_ms <= P50_MS && p99_ms <= P99_MS;
            target = verdict(met, format!("p50 {p50_ms:.1} ms, p99 {p99_ms:.1} ms, at most {P50_MS} and {P99_MS}"));
        }
    }
    let mut keeping_up = table(&["events/s", "appended/s", "lag p50 ms", "lag p99 ms", "lag max ms"]);
    let mut highest = 0;
    for (rate, seen) in sustained {
        let lag = parts(&seen.after_answer);
        let numbers = [lag.p50_ms, lag.p99_ms, lag.max_ms].map(|ms| format!("{ms:.1}"));
        keeping_up.add_row([thousands(*rate as f64), thousands(seen.rate)].into_iter().chain(numbers));
        if seen.keeps_up(*rate) {
            highest = *rate;
        }
    }
    let sustained = format!("{} events/s sustained with lag under {LAG_MS} ms", thousands(highest as f64));
    println!("\n{times}\n\nat 1,000 events/s: {target}\n\n{keeping_up}\n");
    println!("{}", verdict(highest >= SUSTAINED_TARGET, sustained));
}
