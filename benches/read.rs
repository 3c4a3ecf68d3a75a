//! How fast are views read over HTTP, at rest and while they are rebuilt, against a bare axum handler that returns the
//! same bytes? `benches/README.md` says how to run and read it.

#![expect(clippy::print_stdout, reason = "the table is what one runs this for")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use axum::Router;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::routing::get;
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use support::http::{self, Client, Load};
use support::{Home, Process, Report, Samples, Server, module_file, table, thousands, verdict};

const CONNECTIONS: usize = 8;
/// The flights that are asked for, so that it is not always the same page.
const KEYS: usize = 10_000;
const SECONDS: Duration = Duration::from_secs(2);

/// The least that our requests a second may be of the bare handler's, for keyed reads.
const RATIO: f64 = 0.5;
/// The most that 99 % of keyed reads may take while a rebuild runs.
const P99_MS: f64 = 10.0;

fn main() -> Result<()> {
    support::main("read", contestant, bench)
}

fn contestant(arguments: &[&str]) -> Result<Value> {
    match *arguments {
        ["bare", answer] => serve_bare(serde_json::from_slice(&std::fs::read(answer)?)?),
        _ => bail!("unknown contestant {arguments:?}"),
    }
}

/// An answer of ours, for the bare handler to give to every request.
#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct Same {
    headers: Vec<(String, String)>,
    body: String,
}

impl Same {
    fn read(address: &str, request: &[u8]) -> Result<Same> {
        support::in_process(async {
            let mut client = Client::connect(address).await?;
            let answer = client.send(request).await?;
            let headers = answer.head.lines().skip(1).filter_map(|line| line.split_once(": "));
            // The server adds these two by itself.
            let headers = headers.filter(|(name, _)| !["content-length", "date"].contains(name));
            let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
            Ok(Same { headers: headers.collect(), body: String::from_utf8(answer.body.to_vec())? })
        })
    }
}

/// As `shadowbox` runs its server, in a tokio runtime with a thread for each core.
fn serve_bare(same: Same) -> Result<Value> {
    let headers =
        same.headers.iter().map(|(name, value)| Ok((HeaderName::try_from(name)?, HeaderValue::try_from(value)?)));
    let headers = headers.collect::<Result<HeaderMap>>()?;
    let answer: &'static (HeaderMap, String) = Box::leak(Box::new((headers, same.body)));
    let router = Router::new().route("/views/{view}", get(|| async { (answer.0.clone(), answer.1.as_str()) }));
    tokio::runtime::Runtime::new()?.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        println!("http://{}", listener.local_addr()?);
        std::io::stdout().flush()?;
        axum::serve(listener, router).await?;
        Ok(Value::Null)
    })
}

/// The bare handler in a process of its own, as Shadowbox is.
fn bare(home: &Home, name: &str, same: &Same) -> Result<Server> {
    let file = home.path().join(format!("{name}.json"));
    std::fs::write(&file, serde_json::to_vec(same)?)?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["child", "bare", file.to_str().context("the workspace's path is UTF-8")?])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("it is piped")?).read_line(&mut line)?;
    let address = line.trim().strip_prefix("http://").context("the bare handler did not start")?.to_owned();
    Ok(Server { child, address })
}

/// A kind of request.
struct Kind {
    name: &'static str,
    requests: Arc<[Vec<u8>]>,
    bare: Server,
    rounds: Vec<Round>,
}

struct Round {
    ours: Measured,
    bare: Measured,
    rebuilding: Measured,
}

#[derive(Serialize)]
struct Measured {
    requests: usize,
    requests_a_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    /// CPU time of the server for a request, with whatever else it does meanwhile.
    cpu_us: f64,
}

fn measure(server: &Server, load: impl FnOnce() -> Result<Load>) -> Result<Measured> {
    let before = Process::of(&server.child).cpu_seconds()?;
    let load = load()?;
    let cpu = Process::of(&server.child).cpu_seconds()? - before;
    Ok(Measured {
        requests: load.milliseconds.len(),
        requests_a_second: load.requests_a_second(),
        p50_ms: load.milliseconds.median(),
        p99_ms: load.milliseconds.at(0.99),
        max_ms: load.milliseconds.max(),
        cpu_us: cpu * 1e6 / load.milliseconds.len() as f64,
    })
}

fn bench(report: &mut Report) -> Result<()> {
    let rounds = support::rounds(3)?;
    let modules = support::modules(&["flight-board"])?;
    let home = Home::new("read")?;
    home.link_log(&support::log(1)?)?;
    let file = module_file("flight-board");
    home.drop_module(&file, &std::fs::read(modules.join(&file))?)?;
    let ours = home.serve()?;
    ours.wait_live("flight-board")?;

    let keys = keys(&home)?;
    let view = "/views/flight_board";
    let keyed: Arc<[_]> = keys.iter().map(|key| http::get(&format!("{view}?flight_id=eq.{key}"), &[])).collect();
    let list = |key: &String| http::get(&format!("{view}?flight_id=gte.{key}&origin=eq.JFK&limit=20"), &[]);
    let list: Arc<[_]> = keys.iter().map(list).collect();
    let mut kinds = Vec::new();
    for (name, requests) in [("keyed", keyed), ("list", list)] {
        let same = Same::read(&ours.address, &requests[0])?;
        ensure!(same.body.starts_with("[{"), "there are no rows: {}", same.body);
        let bare = bare(&home, name, &same)?;
        ensure!(Same::read(&bare.address, &requests[0])? == same, "the bare handler answers something else");
        println!("{name}: {} bytes", same.body.len());
        kinds.push(Kind { name, requests, bare, rounds: Vec::new() });
    }
    let never = Arc::new(AtomicBool::new(false));
    for round in 0..=rounds {
        for kind in &mut kinds {
            let at_rest = |server: &Server| {
                measure(server, || http::load(&server.address, CONNECTIONS, &kind.requests, SECONDS, &never))
            };
            let (ours_at_rest, bare) = (at_rest(&ours)?, at_rest(&kind.bare)?);
            let rebuilding = while_rebuilding(&ours, &kind.requests)?;
            println!(
                "{} round {round} of {rounds}: {:.0} requests/s, bare {:.0}; {:.0} while rebuilding",
                kind.name, ours_at_rest.requests_a_second, bare.requests_a_second, rebuilding.requests_a_second
            );
            // The first round warms the caches.
            if round > 0 {
                kind.rounds.push(Round { ours: ours_at_rest, bare, rebuilding });
            }
        }
    }
    for kind in &kinds {
        let rounds =
            kind.rounds.iter().map(|r| json!({ "shadowbox": r.ours, "bare": r.bare, "rebuilding": r.rebuilding }));
        report.add(kind.name, rounds.collect::<Vec<_>>())?;
    }
    print_tables(&kinds);
    Ok(())
}

/// Keys of the view, from all over it.
fn keys(home: &Home) -> Result<Vec<String>> {
    let view = Connection::open(home.data().join("views/flight-board/1.sqlite"))?;
    let mut statement = view.prepare("SELECT flight_id FROM flight_board WHERE origin = 'JFK'")?;
    let all: Vec<String> = statement.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    ensure!(all.len() > KEYS, "only {} flights are from JFK", all.len());
    // A stride that is prime to the length visits all of them out of order.
    let stride = (1_000_003..).find(|stride| gcd(*stride, all.len()) == 1).expect("there is one");
    Ok((0..KEYS).map(|i| all[i * stride % all.len()].clone()).collect())
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Reads from the begin of a rebuild until its promotion.
fn while_rebuilding(ours: &Server, requests: &Arc<[Vec<u8>]>) -> Result<Measured> {
    let url = format!("http://{}/projections/flight-board/rebuild", ours.address);
    let begun: Value = ureq::post(&url).send_empty()?.body_mut().read_json()?;
    let generation = begun["generation"].as_u64().context("no generation in the answer")?;
    let promoted = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let look = scope.spawn(|| -> Result<()> {
            let wait = || -> Result<()> {
                while ours.get("/projections/flight-board")?["generation"] != generation {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Ok(())
            };
            let result = wait();
            promoted.store(true, Relaxed);
            result
        });
        let measured = measure(ours, || http::load(&ours.address, CONNECTIONS, requests, support::DEADLINE, &promoted));
        look.join().expect("it does not panic")?;
        measured
    })
}

fn print_tables(kinds: &[Kind]) {
    let mut times = table(&["read", "contestant", "requests/s", "p50 ms", "p99 ms", "max ms", "server's CPU us"]);
    let mut targets = table(&["read", "requests/s / bare", "p99 while rebuilding, ms"]);
    for kind in kinds {
        let median = |of: &dyn Fn(&Round) -> f64| Samples::new(kind.rounds.iter().map(of)).median();
        type Of = fn(&Round) -> &Measured;
        let contestants: [(_, Of); 3] = [
            ("bare axum", |round| &round.bare),
            ("shadowbox", |round| &round.ours),
            ("shadowbox while rebuilding", |round| &round.rebuilding),
        ];
        for (contestant, of) in contestants {
            times.add_row([
                kind.name.to_owned(),
                contestant.to_owned(),
                thousands(median(&|r| of(r).requests_a_second)),
                format!("{:.2}", median(&|r| of(r).p50_ms)),
                format!("{:.2}", median(&|r| of(r).p99_ms)),
                format!("{:.1}", Samples::new(kind.rounds.iter().map(|r| of(r).max_ms)).max()),
                format!("{:.0}", median(&|r| of(r).cpu_us)),
            ]);
        }
        let ratio = median(&|r| r.ours.requests_a_second / r.bare.requests_a_second);
        let p99 = median(&|r| r.rebuilding.p99_ms);
        let keyed = kind.name == "keyed";
        targets.add_row([
            kind.name.to_owned(),
            if keyed {
                verdict(ratio >= RATIO, format!("{ratio:.2}, at least {RATIO}"))
            } else {
                format!("{ratio:.2}")
            },
            if keyed { verdict(p99 < P99_MS, format!("{p99:.1}, under {P99_MS}")) } else { format!("{p99:.1}") },
        ]);
    }
    println!("\n{times}\n\n{targets}");
}
