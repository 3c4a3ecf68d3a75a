//! Two appenders, two readers, modules that come and go, rebuilds: and the process is killed again and again, in the
//! middle of all that, while it recovers, and at steps that chance would rarely meet.
//!
//! `SHADOWBOX_TORTURE_KILLS` says how often; `SHADOWBOX_TORTURE_SEED` repeats the decisions of a run that has failed,
//! though not its timing.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use shadowbox::fault::POINTS;

use crate::support::history::{self, Disk, Fold, Order, Position, check_answer, line, parse};
use crate::support::{self, World, module, wait_for};

/// Kills of one run, unless the environment says more.
const KILLS: u64 = 100;

/// Events of each source in the whole run, about: rebuilds must come to their end between the kills now and then.
const EVENTS: u64 = 8_000;

/// Small numbers that look like chance (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len() as u64) as usize]
    }

    fn milliseconds(&mut self, below: u64) -> Duration {
        Duration::from_micros(self.below(below * 1_000))
    }
}

/// A position, and the events from there on.
type Told = (u64, Vec<(&'static str, u64)>);

/// What the threads know of each other.
struct Shared {
    directory: PathBuf,
    url: Mutex<String>,
    /// Events of each source that may be in the log by now.
    allowed: AtomicU64,
    /// What is known of the log's order.
    order: Order,
    /// What an appender was told to be in the log.
    acknowledged: Mutex<Vec<Told>>,
    /// How far readers have seen each view.
    seen: Mutex<BTreeMap<&'static str, Position>>,
    answers: AtomicU64,
    appended: AtomicBool,
    over: AtomicBool,
}

/// Whatever happens, nobody waits for the others for ever.
struct AtTheEnd<'a>(&'a Shared);

impl Drop for AtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.appended.store(true, Ordering::Relaxed);
        self.0.over.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url.lock().unwrap())
    }

    /// Notes an answer to an append.
    fn acknowledge(&self, answer: &Value, events: Vec<(&'static str, u64)>) {
        let (first, last) = (answer["first_position"].as_u64().unwrap(), answer["last_position"].as_u64());
        assert_eq!(last, Some(first + events.len() as u64 - 1), "in one transaction: {answer}");
        assert_eq!(answer["position"].as_u64(), last, "{answer}");
        let (appended, duplicates) = (answer["appended"].as_u64().unwrap(), answer["duplicates"].as_u64().unwrap());
        // A transaction is there or not.
        let all = events.len() as u64;
        assert!([(all, 0), (0, all)].contains(&(appended, duplicates)), "{answer}");
        self.acknowledged.lock().unwrap().push((first, events));
    }

    /// The last position that somebody was told of.
    fn told(&self) -> Position {
        let acknowledged = self.acknowledged.lock().unwrap();
        acknowledged.iter().map(|(first, events)| first + events.len() as u64 - 1).max()
    }

    fn check(&self, view: &str, answer: &support::Answer, fold: &mut Fold) -> Position {
        self.order.read_to(&self.directory, parse(answer.header("shadowbox-position")));
        check_answer(view, answer, fold, &self.order)
    }

    /// Waits until events up to `next` may be appended; false if no more are to be.
    fn may_append(&self, next: u64) -> bool {
        wait_for("leave to append", || {
            let over = self.appended.load(Ordering::Relaxed);
            (over || next <= self.allowed.load(Ordering::Relaxed)).then_some(!over)
        })
    }
}

/// Appends to two sources in one transaction, and sends it again until it is answered.
fn append_over_http(shared: &Shared, mut dice: Dice) {
    let mut next = 0;
    loop {
        let n = 1 + dice.below(20);
        if !shared.may_append(next + n) {
            return;
        }
        let lines = ["left", "orders"].map(|source| (next..next + n).map(move |i| line(source, i)));
        let body = format!("[{}]", lines.into_iter().flatten().collect::<Vec<_>>().join(","));
        let answer = wait_for("an answer to an append", || {
            if shared.over.load(Ordering::Relaxed) {
                return Some(None);
            }
            support::post(&shared.url("/events"), "application/cloudevents-batch+json", &body).map(Some)
        });
        let Some(answer) = answer else { return };
        assert_eq!(answer.status, 200, "{}", answer.body);
        let events = ["left", "orders"].map(|source| (next..next + n).map(move |i| (source, i)));
        shared.acknowledge(&answer.json(), events.into_iter().flatten().collect());
        next += n;
    }
}

/// Appends to the third source by the command line, which is killed, too.
fn append_by_command(shared: &Shared, mut dice: Dice) {
    let file = shared.directory.join("right.jsonl");
    let (mut next, mut n) = (0, 1);
    while shared.may_append(next + n) {
        std::fs::write(&file, (next..next + n).map(|i| line("right", i) + "\n").collect::<String>()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_shadowbox"));
        command.current_dir(&shared.directory).args(["append", "--json", "--data", "data", "right.jsonl"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if dice.below(4) == 0 {
            let point = dice.pick(&["append.begun", "append.written", "append.committed"]);
            command.env("SHADOWBOX_FAULT", format!("{point}=kill"));
        }
        let mut child = command.spawn().unwrap();
        if dice.below(4) == 0 {
            let (begin, moment) = (Instant::now(), dice.milliseconds(80));
            wait_for("the moment to kill an appender", || (begin.elapsed() >= moment).then_some(()));
            // It may have ended.
            let _ = child.kill();
        }
        let output = child.wait_with_output().unwrap();
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(matches!(output.status.signal(), Some(6 | 9)), "{}: {error}", output.status);
            continue;
        }
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        shared.acknowledge(&answer, (next..next + n).map(|i| ("right", i)).collect());
        (next, n) = (next + n, 1 + dice.below(40));
    }
}

/// Asks for what is acknowledged, and takes what there is.
fn read(shared: &Shared, view: &'static str) {
    let (mut fold, mut last, mut generation) = (Fold::default(), None, 0);
    while !shared.over.load(Ordering::Relaxed) {
        // Whoever's event it was: a view is complete to what its projection does not want, too.
        let wanted = shared.told();
        let header = wanted.map(|position| position.to_string());
        let mut headers = vec![("prefer", "wait=0.1")];
        headers.extend(header.as_deref().map(|header| ("shadowbox-position", header)));
        let begin = Instant::now();
        let answer = support::get(&shared.url(&format!("/views/{view}")), &headers);
        match answer {
            Some(answer) if answer.status == 200 => {
                let position = shared.check(view, &answer, &mut fold);
                assert!(position >= wanted, "{view}: {position:?} for {wanted:?}");
                let covers = shared.order.covers(view, position, last);
                assert!(covers, "{view} went back from {last:?} to {position:?}");
                let now = answer.header("shadowbox-generation").parse().unwrap();
                assert!(now >= generation, "{view} went back from generation {generation} to {now}");
                (last, generation) = (position, now);
                shared.seen.lock().unwrap().insert(view, last);
                shared.answers.fetch_add(1, Ordering::Relaxed);
            }
            Some(answer) if answer.status == 412 => {
                let position = parse(answer.header("shadowbox-position"));
                let covers = shared.order.covers(view, position, last);
                assert!(covers, "{view} went back from {last:?} to {position:?}");
            }
            // There is no such view before the first generation, and a file may go away over a promotion.
            Some(answer) => assert!(answer.status == 404 && last.is_none() || answer.status == 503, "{}", answer.body),
            None => {}
        }
        wait_for("a moment without reading", || (begin.elapsed() >= Duration::from_millis(10)).then_some(()));
    }
}

/// The one who does all that to them.
struct Torturer<'a> {
    shared: &'a Shared,
    world: World,
    dice: Dice,
    disk: Disk,
    kills: u64,
}

impl Torturer<'_> {
    /// One life, from a start to a violent end.
    fn life(&mut self) {
        let fault = (self.dice.below(3) == 0).then(|| {
            let names: Vec<_> = POINTS.iter().map(|point| point.name).collect();
            format!("{}=kill:{}", self.dice.pick(&names), 1 + self.dice.below(4))
        });
        let told = self.shared.told();
        if let Err(status) = self.world.try_start(&[], fault.as_deref()) {
            return self.died(status, fault.as_deref());
        }
        *self.shared.url.lock().unwrap() = self.world.url("");
        if let Some(status) = support::get(&self.world.url("/status"), &[]) {
            let head = status.json()["log"]["head"].as_u64();
            assert!(head >= told, "somebody was told of {told:?}, and the log ends at {head:?}");
        }
        let act = self.dice.below(4);
        if act.is_multiple_of(2) {
            let name = self.dice.pick(&["ledger", "ledger+tweaked", "ledger+v2"]);
            self.world.drop_module("ledger", &module(name));
        }
        if act >= 2 {
            // Whether it begins one or not, or dies over it.
            let projection = self.dice.pick(&["ledger", "order-summary"]);
            support::post(&self.world.url(&format!("/projections/{projection}/rebuild")), "application/json", "");
        }
        let (begin, moment) = (Instant::now(), self.dice.milliseconds(if fault.is_some() { 500 } else { 250 }));
        let ended = wait_for("the moment to kill", || match self.world.ended() {
            Some(status) => Some(Some(status)),
            None => (begin.elapsed() >= moment).then_some(None),
        });
        if let Some(status) = ended {
            return self.died(status, fault.as_deref());
        }
        self.world.kill();
        self.dead();
    }

    fn died(&mut self, status: ExitStatus, fault: Option<&str>) {
        assert!(fault.is_some() && status.signal() == Some(6), "{fault:?}: {status}\n{}", self.world.log());
        self.dead();
    }

    /// What is on the disk is a state that readers could have been shown, and nothing that they were shown is missing.
    fn dead(&mut self) {
        self.kills += 1;
        let seen = self.shared.seen.lock().unwrap().clone();
        let live = self.disk_check();
        for (view, seen) in seen {
            let covers = self.shared.order.covers(view, live[view], seen);
            assert!(covers, "{view} was seen at {seen:?}, and is at {:?}", live[view]);
        }
    }

    fn disk_check(&mut self) -> BTreeMap<&'static str, Position> {
        let Shared { order, directory, .. } = self.shared;
        self.disk.check(&self.world.data(), order, |position| order.read_to(directory, position))
    }

    /// Killed before it is up, perhaps twice.
    fn stillborn(&mut self) {
        for _ in 0..self.dice.below(3) {
            let mut child = self.world.spawn(&[], None);
            let (begin, moment) = (Instant::now(), self.dice.milliseconds(100));
            wait_for("the moment to kill", || (begin.elapsed() >= moment).then_some(()));
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself\n{}", self.world.log());
            child.kill().unwrap();
            child.wait().unwrap();
            self.dead();
        }
    }

    /// A last life, in peace. An append that waits for its answer gets it here.
    fn end(mut self, appenders: [ScopedJoinHandle<'_, ()>; 2]) -> (u64, u64) {
        self.world.drop_module("ledger", &module("ledger"));
        self.world.start();
        *self.shared.url.lock().unwrap() = self.world.url("");
        self.shared.appended.store(true, Ordering::Relaxed);
        for appender in appenders {
            appender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        for (projection, view) in history::VIEWS {
            let status = self.world.wait_until(projection, "the head", |p| {
                p["state"] == "live" && p["lag_events"] == 0 && p["building"].is_null()
            });
            assert!(status["error"].is_null(), "{status:#}");
            let answer = self.world.get(&format!("/views/{view}"));
            let position = self.shared.check(view, &answer, &mut Fold::default());
            assert!(position >= self.shared.told(), "{position:?}");
            assert_eq!(status["position"].as_u64(), position);
            self.world.ok(&["rebuild", projection, "--wait"]);
            let rebuilt = self.world.get(&format!("/views/{view}"));
            assert_eq!(self.shared.check(view, &rebuilt, &mut Fold::default()), position, "{view} rebuilt");
            assert_eq!(without_code(&rebuilt), without_code(&answer), "{view} rebuilt");
        }
        check_log(&self.world, self.shared);
        let generation = self.world.projection("ledger")["generation"].as_u64().unwrap();
        self.shared.over.store(true, Ordering::Relaxed);
        self.world.stop();
        let strays = history::strays(&self.world.data());
        assert!(strays.is_empty(), "{strays:?} were left behind");
        (self.kills, generation)
    }
}

/// Which code touched a row last is no matter of the log: a hot swap leaves what is there as it is.
fn without_code(answer: &support::Answer) -> Value {
    let mut rows = answer.json();
    rows.as_array_mut().unwrap().iter_mut().for_each(|row| drop(row.as_object_mut().unwrap().remove("code")));
    rows
}

/// Every event is there once, the events of each source in their order, and each where its appender was told that it is.
fn check_log(world: &World, shared: &Shared) {
    let log = world.ok(&["events"]);
    let mut next: BTreeMap<&str, u64> = BTreeMap::new();
    let known = shared.order.known();
    assert_eq!(log.lines().count(), known.len());
    for (position, (found, (source, n))) in log.lines().zip(&known).enumerate() {
        let next = next.entry(source).or_default();
        assert_eq!(n, next, "position {position} of the log, of {source}");
        *next += 1;
        let (found, expected): (Value, Value) =
            (serde_json::from_str(found).unwrap(), serde_json::from_str(&line(source, *n)).unwrap());
        assert_eq!(found["position"], position);
        for part in ["source", "id", "type", "time", "data"] {
            assert_eq!(found[part], expected[part], "position {position}");
        }
    }
    for (first, events) in shared.acknowledged.lock().unwrap().iter() {
        for (position, (source, n)) in (*first as usize..).zip(events) {
            assert_eq!(known[position], ((*source).to_owned(), *n), "told to be at {position}");
        }
    }
}

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
#[expect(clippy::print_stderr, reason = "the seed of a run that fails, and what a long run came to")]
fn whenever_it_is_killed_every_view_is_the_fold_of_the_log_up_to_its_position() {
    let kills = environment("SHADOWBOX_TORTURE_KILLS").unwrap_or(KILLS);
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = environment("SHADOWBOX_TORTURE_SEED").unwrap_or_else(now);
    eprintln!("SHADOWBOX_TORTURE_SEED={seed} SHADOWBOX_TORTURE_KILLS={kills}");

    let world = World::new();
    let config = "[batch]\nevents = 50\ncommit_rows = 20\n";
    std::fs::write(world.directory.path().join("shadowbox.toml"), config).unwrap();
    for name in ["ledger", "order-summary"] {
        world.drop_module(name, &module(name));
    }
    let shared = Shared {
        directory: world.directory.path().to_owned(),
        url: Mutex::default(),
        allowed: AtomicU64::new(0),
        order: Order::default(),
        acknowledged: Mutex::default(),
        seen: Mutex::default(),
        answers: AtomicU64::new(0),
        appended: AtomicBool::new(false),
        over: AtomicBool::new(false),
    };
    let mut torturer = Torturer { shared: &shared, world, dice: Dice(seed), disk: Disk::default(), kills: 0 };
    let (kills, generation) = std::thread::scope(|scope| {
        let _end = AtTheEnd(&shared);
        let appenders = [
            scope.spawn(|| append_over_http(&shared, Dice(seed.wrapping_add(1)))),
            scope.spawn(|| append_by_command(&shared, Dice(seed.wrapping_add(2)))),
        ];
        let readers = [scope.spawn(|| read(&shared, "ledger")), scope.spawn(|| read(&shared, "order_summary"))];
        let step = (EVENTS / kills).max(20);
        while torturer.kills < kills && !appenders.iter().chain(&readers).any(|thread| thread.is_finished()) {
            shared.allowed.fetch_add(step, Ordering::Relaxed);
            torturer.life();
            torturer.stillborn();
        }
        torturer.end(appenders)
    });
    let answers = shared.answers.load(Ordering::Relaxed);
    eprintln!("{kills} kills, {generation} generations, {answers} answers, the log to {:?}", shared.told());
    assert!(answers > 0 && generation > 1);
}
