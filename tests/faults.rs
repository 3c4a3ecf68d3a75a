//! What if the process dies, or the disk refuses, at exactly this step? Every step that has a name, one after the other.

use std::cell::Cell;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::Value;
use shadowbox::config::limits;
use shadowbox::fault::{POINTS, Point};

use crate::support::history::{self, Disk, FILLER, Fold, Order, VIEWS, check_answer, line, live_module};
use crate::support::{self, World, module, root, wait_for};

/// Events of each source that are appended at a time.
const CHUNK: u64 = 4;

/// Events that nobody wants, appended at a time where it takes many: fewer than are packed as they come.
const FILLERS: u64 = 2_000;

/// A world that comes to every step there is, and is started again whenever it dies.
struct Life {
    world: World,
    disk: Disk,
    /// What is armed in the runtime that runs, or in the next one.
    fault: Option<String>,
    deaths: u32,
    /// How many chunks are appended, and how many events that nobody wants.
    chunks: u64,
    fillers: u64,
    /// Whether it comes to the steps of packing, which takes many events.
    packs: bool,
    /// Whether it comes to those of forgetting.
    forgets: bool,
    /// Everything that is appended or is about to be.
    order: Arc<Order>,
}

impl Life {
    /// Small commits, nothing kept after a promotion, and compiled code from where all of these tests have it.
    fn new(fault: Option<String>) -> Life {
        let world = World::new();
        let config = "keep_generations = 0\n[batch]\nevents = 2\ncommit_rows = 2\n";
        std::fs::write(world.directory.path().join("shadowbox.toml"), config).unwrap();
        if !fault.as_ref().is_some_and(|fault| fault.starts_with("cache.")) {
            let cache = root().join("target/plugins/cache");
            std::fs::create_dir_all(&cache).unwrap();
            std::fs::create_dir(world.data()).unwrap();
            std::os::unix::fs::symlink(cache, world.data().join("cache")).unwrap();
        }
        world.drop_module("ledger", &module("ledger"));
        world.drop_module("order-summary", &module("order-summary"));
        let packs = fault.as_ref().is_some_and(|fault| is_packing(fault));
        let forgets = fault.as_ref().is_some_and(|fault| fault.starts_with("forget."));
        let (disk, order) = (Disk::default(), Arc::default());
        Life { world, disk, fault, deaths: 0, chunks: 0, fillers: 0, packs, forgets, order }
    }

    fn start(&mut self) {
        while let Err(status) = self.world.try_start(&[], self.fault.as_deref()) {
            self.died(status);
        }
    }

    /// Once it has died of what was armed, nothing is armed any more.
    fn died(&mut self, status: ExitStatus) {
        let Some(fault) = self.fault.take() else { panic!("{status}, without a fault\n{}", self.world.log()) };
        assert!(status.signal() == Some(6), "{fault}: {status}\n{}", self.world.log());
        self.deaths += 1;
        self.disk.check(&self.world.data(), &self.order, |_| {});
    }

    /// Does something and waits until it is done; does it again if the runtime has died over it. `act` answers whether
    /// it was accepted.
    fn until(&mut self, what: &str, act: impl Fn(&World) -> bool, done: impl Fn(&World) -> Option<bool>) {
        let mut accepted = false;
        let begin = Instant::now();
        wait_for(what, || {
            if let Some(status) = self.world.ended() {
                self.died(status);
                self.start();
                accepted = false;
            }
            accepted = accepted || act(&self.world);
            let in_time = begin.elapsed() < support::DEADLINE / 2;
            assert!(in_time, "{:?}: waited in vain for {what}\n{}", self.fault, self.world.log());
            (accepted && done(&self.world) == Some(true)).then_some(())
        });
    }

    /// Appends, and waits until all views have it.
    fn append(&mut self) {
        self.append_only();
        self.reached(&VIEWS);
    }

    fn append_only(&mut self) {
        let chunk = self.announce();
        self.until("the append", |world| append(world, chunk), |_| Some(true));
    }

    /// The number of the next chunk, which comes to where the log ends.
    fn announce(&mut self) -> u64 {
        let chunk = self.chunks;
        announce(&self.order, chunk);
        self.chunks += 1;
        chunk
    }

    /// Appends so much that the log packs the older half of it, and what no projection wants.
    fn fill(&mut self) {
        while self.order.len() < limits::SEAL_ROWS + FILLERS {
            let numbers = self.fillers..self.fillers + FILLERS;
            self.order.announce(FILLER, numbers.clone());
            self.fillers = numbers.end;
            let lines: Vec<_> = numbers.map(|n| line(FILLER, n)).collect();
            self.until("the append", |world| post(world, &lines), |_| Some(true));
        }
    }

    /// Forgets an event that no projection wants.
    fn forget(&mut self) {
        self.order.announce(FILLER, 0..1);
        let body = format!("{{\"source\": \"{FILLER}\", \"id\": \"{FILLER}-0\"}}");
        let forget = |world: &World| {
            post(world, &[line(FILLER, 0)])
                && support::post(&world.url("/forget"), "application/json", &body).is_some_and(|a| a.status == 200)
        };
        let forgotten = |world: &World| {
            let done = support::get(&world.url("/forgettings"), &[])?.json();
            let [done] = done.as_array()?.as_slice() else { return Some(false) };
            Some(done["ended"].is_string() && done["events"] == 1)
        };
        self.until("a forgetting", forget, forgotten);
    }

    /// Waits until views have everything, and checks their rows.
    fn reached(&mut self, views: &[(&str, &'static str)]) {
        let order = self.order.clone();
        let last = order.len() - 1;
        for (_, view) in views {
            let view = *view;
            let read = |world: &World| {
                let headers = [("shadowbox-position", &*last.to_string()), ("prefer", "wait=0.2")];
                let answer = support::get(&world.url(&format!("/views/{view}")), &headers)?;
                let complete = answer.status == 200;
                if complete {
                    let position = check_answer(view, &answer, &mut Fold::default(), &order);
                    assert_eq!(position, Some(last), "{view} is complete to all there is, whoever wants it");
                }
                Some(complete)
            };
            self.until(view, |_| true, read);
        }
    }

    /// Drops a module with other code for the same rows, and waits until its first batch has proved it.
    fn swap(&mut self, name: &str) {
        let bytes = module(name);
        let hash = shadowbox::plugin::hash(&bytes);
        let drop_it = |world: &World| {
            world.drop_module("ledger", &bytes);
            true
        };
        self.until("the new module", drop_it, |world| Some(status(world, "ledger")?["module_hash"] == *hash));
        let (order, announced, chunks) = (self.order.clone(), Cell::new(self.chunks), Cell::new(self.chunks));
        let prove_it = |world: &World| {
            let chunk = chunks.get();
            if announced.replace(chunk + 1) == chunk {
                announce(&order, chunk);
            }
            let accepted = append(world, chunk);
            chunks.set(chunk + u64::from(accepted));
            accepted
        };
        let noted = |world: &World| Some(live_module(&world.data(), "ledger")? == hash);
        self.until("the proof", prove_it, noted);
        self.chunks = chunks.get();
        self.reached(&VIEWS);
    }

    fn rebuild(&mut self, generation: u64) {
        let done = |world: &World| {
            let ledger = status(world, "ledger")?;
            Some(ledger["generation"].as_u64() >= Some(generation) && ledger["building"].is_null())
        };
        let ask = |world: &World| done(world) == Some(true) || ask_for_rebuild(world).is_some_and(|a| a.status == 202);
        self.until("the promotion", ask, done);
    }

    /// Comes to everything that can be armed, to most of it more than once.
    fn live(&mut self) {
        self.append();
        if self.packs {
            self.fill();
        }
        if self.forgets {
            self.forget();
        }
        for name in ["ledger+tweaked", "ledger"] {
            self.swap(name);
            let now = status(&self.world, "ledger").map_or(1, |p| p["generation"].as_u64().unwrap());
            self.rebuild(now + 1);
        }
        self.append();
    }

    /// A clean stop, and a last life without faults. Nothing may be missing and nothing left over. Answers how often it
    /// has died.
    fn end(mut self) -> (u32, World) {
        if self.world.ended().is_none() {
            // What is armed may be on the way out.
            let status = self.world.try_stop();
            if !status.success() {
                self.died(status);
            }
        }
        self.fault = None;
        self.disk.check(&self.world.data(), &self.order, |_| {});
        self.start();
        self.append();
        if self.packs {
            wait_for("packed events", || (blocks(&self.world) > 0).then_some(()));
        }
        let now = status(&self.world, "ledger").expect("it runs")["generation"].as_u64().unwrap();
        self.rebuild(now + 1);
        self.append();
        self.world.wait_live("order-summary");
        self.world.stop();
        let strays = history::strays(&self.world.data());
        assert!(strays.is_empty(), "{strays:?} were left behind\n{}", self.world.log());
        let live = self.disk.check(&self.world.data(), &self.order, |_| {});
        let last = self.order.len() - 1;
        VIEWS
            .iter()
            .for_each(|(_, view)| assert!(self.order.covers(view, live[view], Some(last)), "{live:?} of {last}"));
        // Each event is where it was appended, once, and nothing else is there.
        let log = Order::default();
        log.read_to(self.world.directory.path(), Some(last));
        assert!(log.known() == self.order.known(), "the log is not what was appended");
        (self.deaths, self.world)
    }
}

/// A projection's status.
fn status(world: &World, name: &str) -> Option<Value> {
    let all: Value = serde_json::from_str(&support::get(&world.url("/projections"), &[])?.body).ok()?;
    all.as_array()?.iter().find(|p| p["name"] == name).cloned()
}

/// The sources of a chunk, in this order.
const SOURCES: [&str; 3] = ["left", "right", "orders"];

/// The numbers of a chunk's events in each of them.
fn numbers(chunk: u64) -> std::ops::Range<u64> {
    chunk * CHUNK..(chunk + 1) * CHUNK
}

fn announce(order: &Order, chunk: u64) {
    SOURCES.iter().for_each(|source| order.announce(source, numbers(chunk)));
}

fn append(world: &World, chunk: u64) -> bool {
    let lines = SOURCES.into_iter().flat_map(|source| numbers(chunk).map(move |n| line(source, n)));
    post(world, &lines.collect::<Vec<_>>())
}

fn post(world: &World, lines: &[String]) -> bool {
    let body = format!("[{}]", lines.join(","));
    let answer = support::post(&world.url("/events"), "application/cloudevents-batch+json", &body);
    answer.is_some_and(|answer| answer.status == 200)
}

fn ask_for_rebuild(world: &World) -> Option<support::Answer> {
    support::post(&world.url("/projections/ledger/rebuild"), "application/json", "")
}

/// Does something for each item, on a few threads: most of the time is spent waiting.
fn each<T: Send>(items: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    // Built before there are several who need it.
    module("ledger");
    let items = Mutex::new(items.collect::<Vec<_>>());
    let work_off = || {
        while let Some(item) = { items.lock().unwrap().pop() } {
            work(item);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(work_off);
        }
    });
}

/// How many blocks the log of a runtime has. The runtime is another process, which keeps its locks.
fn blocks(world: &World) -> i64 {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let log = rusqlite::Connection::open_with_flags(world.data().join("log.sqlite"), flags).unwrap();
    log.query_row("SELECT count(*) FROM blocks", [], |r| r.get(0)).unwrap()
}

fn is_packing(fault: &str) -> bool {
    fault.starts_with("seal.") || fault.starts_with("merge.")
}

/// All points but those of a conversion, which begins with a log of the former format: see `convert.rs`.
fn points() -> impl Iterator<Item = &'static Point> {
    POINTS.iter().filter(|point| !point.name.starts_with("convert."))
}

/// What only the first start makes.
const ONCE: [&str; 2] = ["log.made", "catalogue.made"];

#[test]
fn who_is_killed_at_any_step_goes_on_from_what_is_on_the_disk() {
    let all = points().flat_map(|point| [(point.name, 1), (point.name, 2)]);
    each(all.filter(|(name, hit)| *hit == 1 || !ONCE.contains(name)), |(name, hit)| {
        let fault = format!("{name}=kill:{hit}");
        let mut life = Life::new(Some(fault.clone()));
        if name.starts_with("start.") {
            life.fault = None;
            life.start();
            life.append();
            life.world.kill();
            let (views, modules) = (life.world.data().join("views/ledger"), life.world.data().join("modules"));
            // A crash leaves files of generations whose numbers were given out.
            let catalogue = rusqlite::Connection::open(life.world.data().join("catalogue.sqlite")).unwrap();
            let sql = "UPDATE numbers SET last = 98 WHERE projection = 'ledger'";
            assert_eq!(catalogue.execute(sql, []).unwrap(), 1);
            drop(catalogue);
            let left = ["97.sqlite", "98.sqlite-wal"].map(|file| views.join(file));
            for file in left.into_iter().chain(["97.wasm", ".tmp98"].map(|file| modules.join(file))) {
                std::fs::write(file, "left over").unwrap();
            }
            life.fault = Some(fault.clone());
        }
        life.start();
        life.live();
        let (deaths, world) = life.end();
        assert_eq!(deaths, 1, "{fault} was not reached\n{}", world.log());
    });
}

fn failing() -> impl Iterator<Item = &'static str> {
    points().filter(|Point { fails, .. }| *fails).map(|point| point.name)
}

#[test]
fn what_fails_once_at_any_step_recovers_by_itself() {
    each(failing(), |name| {
        let mut life = Life::new(Some(format!("{name}=error:1")));
        life.start();
        life.live();
        let (deaths, world) = life.end();
        assert_eq!(deaths, 0);
        assert!(world.log().contains("a fault point fails"), "{name} was not reached\n{}", world.log());
    });
}

#[test]
fn what_fails_always_at_any_step_is_said_loudly_and_the_others_go_on() {
    const OTHER: &[(&str, &str)] = &[("order-summary", "order_summary")];
    each(failing(), |name| {
        let of = match name {
            "module.written" => shadowbox::plugin::hash(&module("ledger")),
            "cache.written" => String::new(),
            name if name.starts_with("append.") || name.starts_with("forget.") || is_packing(name) => String::new(),
            _ => "ledger".to_owned(),
        };
        let fault = format!("{name}@{of}=error");
        let mut life = Life::new(Some(fault.clone()));
        // Later than the first generation, too.
        // A generation is asked only once what it is made from.
        let of_a_rebuild =
            name.starts_with("generation.") && name != "generation.origin" || name.starts_with("promote.");
        if of_a_rebuild {
            life.fault = None;
            life.start();
            life.append();
            life.world.kill();
            life.fault = Some(fault.clone());
        }
        life.start();
        let said = |life: &mut Life, what: &str, place: fn(&World) -> Option<String>| {
            life.until(what, |_| true, |world| Some(place(world)?.contains(name)));
        };
        let faulted = |life: &mut Life| {
            life.until("the fault", |_| true, |world| Some(status(world, "ledger")?["state"] == "faulted"));
        };
        let refused = |world: &World| Some(support::get(&world.url("/status"), &[])?.json()["refused"].to_string());
        let error = |world: &World| Some(status(world, "ledger")?["error"].to_string());
        match name {
            // It costs time or space, and that is all; the log says so.
            "cache.written" | "remove.begun" | "remove.forgotten" | "promote.done" => life.live(),
            // Each commit happens, although it seems to fail.
            "commit.done" => (0..2).for_each(|_| life.append()),
            "swap.noted" => {
                life.append();
                life.world.drop_module("ledger", &module("ledger+tweaked"));
                let hash = shadowbox::plugin::hash(&module("ledger+tweaked"));
                life.until("the swap", |_| true, |world| Some(status(world, "ledger")?["module_hash"] == *hash));
                (0..2).for_each(|_| life.append());
            }
            "append.begun" | "append.written" => {
                let answer = life.world.post("/events", "application/cloudevents+json", &line("left", 0));
                assert!(answer.status == 500 && answer.body.contains("send it again"), "{}", answer.body);
                assert_eq!(life.world.get("/status").json()["log"]["head"], Value::Null);
            }
            // Rows are as good as blocks; the log says it.
            "seal.begun" | "seal.written" | "merge.begun" | "merge.written" => {
                life.live();
                assert!(life.world.log().contains("cannot pack events"), "{}", life.world.log());
            }
            // Whoever asks hears of it, and may ask again.
            "forget.begun" | "forget.written" => {
                life.append();
                assert!(post(&life.world, &[line(FILLER, 0)]));
                life.order.announce(FILLER, 0..1);
                let body = format!("{{\"source\": \"{FILLER}\", \"id\": \"{FILLER}-0\"}}");
                let answer = life.world.post("/forget", "application/json", &body);
                assert!(
                    answer.status == 500 && answer.body.contains("goes on when it is asked for again"),
                    "{}",
                    answer.body
                );
                life.append();
            }
            "module.written" => {
                life.append_only();
                said(&mut life, "the refusal", refused);
                life.reached(OTHER);
            }
            "commit.begun" | "commit.rows" | "commit.checkpoint" => {
                life.append_only();
                faulted(&mut life);
                said(&mut life, "the fault", error);
                life.reached(OTHER);
            }
            "generation.fenced" | "generation.origin" => {
                faulted(&mut life);
                said(&mut life, "the fault", error);
                life.append_only();
                life.reached(OTHER);
            }
            "generation.numbered" | "generation.filled" | "generation.made" => {
                let answer = ask_for_rebuild(&life.world).unwrap();
                assert!(answer.status == 409 && answer.body.contains(name), "{}", answer.body);
                life.append();
                said(&mut life, "the error", error);
            }
            "promote.begun" | "promote.flipped" => {
                assert_eq!(ask_for_rebuild(&life.world).unwrap().status, 202);
                said(&mut life, "the error", error);
                life.append();
            }
            other => panic!("what becomes of a projection if {other:?} fails always?"),
        }
        assert!(life.world.log().contains("a fault point fails"), "{fault} was not reached\n{}", life.world.log());
        assert_eq!(life.end().0, 0);
    });
}

#[test]
fn a_projection_whose_first_generation_cannot_be_made_is_shown_as_refused() {
    let mut life = Life::new(Some("generation.made@ledger=error".to_owned()));
    life.start();
    let refused = |world: &World| Some(support::get(&world.url("/status"), &[])?.json()["refused"].to_string());
    life.until("the refusal", |_| true, |world| Some(refused(world)?.contains("generation.made")));
    life.world.kill();
    life.fault = None;
    life.start();
    life.append();
}

#[test]
fn a_view_does_not_go_back_if_the_commit_before_its_promotion_only_seems_to_fail() {
    let world = World::new();
    let config = "[batch]\nevents = 20\ncommit_rows = 1000000\ncommit_interval_ms = 60000\n";
    std::fs::write(world.directory.path().join("shadowbox.toml"), config).unwrap();
    world.drop_module("ledger", &module("ledger"));
    // The live generation is still catching up, uncommitted, when it is told to stop for the promotion.
    world.append(&(0..20_000).map(|n| line("left", n)).collect::<Vec<_>>());
    let fault = "commit.done@/1.sqlite=error:1,promote.shown=kill";
    let (disk, order) = (Disk::default(), Arc::<Order>::default());
    order.announce("left", 0..20_000);
    let mut life =
        Life { world, disk, fault: None, deaths: 0, chunks: 0, fillers: 0, packs: false, forgets: false, order };
    life.world.try_start(&[], Some(fault)).unwrap();
    ask_for_rebuild(&life.world);
    let status = wait_for("the promotion", || life.world.ended());
    assert_eq!(status.signal(), Some(6), "{}", life.world.log());
    assert!(life.world.log().contains("stopped without the last commit"), "{}", life.world.log());
    life.disk.check(&life.world.data(), &life.order, |_| {});
}

#[test]
fn a_promotion_that_only_seems_to_fail_does_not_cost_the_view_its_file() {
    let mut life = Life::new(Some("promote.done@ledger=error".to_owned()));
    life.start();
    life.append();
    life.rebuild(2);
    // This drops what is being built, if the manager believes that there still is such a thing.
    life.world.drop_module("ledger", &module("ledger+v2"));
    life.append();
    life.world.kill();
    life.fault = None;
    life.start();
    life.append();
}

#[test]
fn what_a_kill_has_left_of_views_and_compiled_code_is_removed() {
    let mut life = Life::new(Some("cache.written=kill".to_owned()));
    life.start();
    assert_eq!(life.deaths, 1);
    let orphan = life.world.data().join("views/ledger/9.sqlite-wal");
    life.append();
    life.world.kill();
    std::fs::write(&orphan, "of a database that is gone").unwrap();
    let catalogue = rusqlite::Connection::open(life.world.data().join("catalogue.sqlite")).unwrap();
    catalogue.execute("UPDATE numbers SET last = 9", []).unwrap();
    drop(catalogue);
    let copy = life.world.data().join("views/ledger/copy of 1.sqlite");
    std::fs::write(&copy, "somebody's own").unwrap();
    life.start();
    assert!(!orphan.exists());
    assert_eq!(history::strays(&life.world.data()), [copy]);
}

#[test]
fn a_module_that_could_not_be_stored_is_tried_again() {
    let mut life = Life::new(Some("module.written=error:2".to_owned()));
    life.start();
    // Nobody touches the folder.
    life.append();
}

#[test]
fn a_stored_module_that_is_damaged_is_stored_again() {
    let mut life = Life::new(None);
    life.start();
    life.append();
    life.world.stop();
    let stored = life.world.data().join(format!("modules/{}.wasm", shadowbox::plugin::hash(&module("ledger"))));
    std::fs::write(&stored, "").unwrap();
    life.start();
    life.append();
    assert!(std::fs::read(&stored).unwrap() == module("ledger"));
}

#[test]
fn a_broken_file_in_place_of_a_module_leaves_its_projection_running() {
    let mut life = Life::new(None);
    life.start();
    life.append();
    life.world.drop_module("ledger", b"no module at all");
    let refused = |world: &World| Some(support::get(&world.url("/status"), &[])?.json()["refused"].to_string());
    life.until("the refusal", |_| true, |world| Some(refused(world)?.contains("ledger.wasm")));
    life.append();
}
