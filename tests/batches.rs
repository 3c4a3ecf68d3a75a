//! Rows depend on the log alone: not on where batches and commits end, not on restarts, not on when the projection came,
//! and a rebuild gives the same.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use shadowbox::config::{Policy, Written, WrittenBatch, WrittenFailures};
use shadowbox::log::cloudevents;
use shadowbox::model::{NewEvent, Position};
use shadowbox::supervisor::{LiveView, Runtime};

use crate::support::{DEADLINE, event, module, properties};

#[derive(Clone, Debug)]
enum Step {
    Append(Vec<(bool, u8, i64)>),
    Restart,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    events: usize,
    bytes: usize,
    commit_rows: usize,
    commit_interval_ms: u64,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let events = proptest::collection::vec((any::<bool>(), 0..6_u8, -100..100_i64), 1..40);
    proptest::collection::vec(prop_oneof![3 => events.prop_map(Step::Append), 1 => Just(Step::Restart)], 1..8)
}

pub(crate) fn limits() -> impl Strategy<Value = Limits> {
    (1..9_usize, prop_oneof![Just(1_usize), Just(600), Just(1 << 20)], 1..7_usize, prop_oneof![Just(0_u64), Just(1000)])
        .prop_map(|(events, bytes, commit_rows, commit_interval_ms)| Limits {
            events,
            bytes,
            commit_rows,
            commit_interval_ms,
        })
}

/// account -> amount, events, digest; in the order given.
pub(crate) type Rows = BTreeMap<String, (i64, i64, i64)>;

/// The rows of events that stand in a log in this order, from its beginning.
fn fold(events: &[NewEvent]) -> Rows {
    let mut rows = Rows::new();
    for (position, event) in events.iter().enumerate() {
        let payload: serde_json::Value = serde_json::from_slice(&event.payload).unwrap();
        let account = payload["account"].as_str().unwrap().to_owned();
        if event.event_type == "Closed" {
            rows.remove(&account);
            continue;
        }
        let row = rows.entry(account).or_default();
        let from = if event.source == "left" { 1 } else { 2 };
        let digest = row.2.wrapping_mul(31).wrapping_add(position as i64 * 2 + from);
        *row = (row.0 + payload["amount"].as_i64().unwrap(), row.1 + 1, digest);
    }
    rows
}

pub(crate) fn stored(view: &LiveView) -> Rows {
    let connection = rusqlite::Connection::open(&view.file).unwrap();
    let mut statement = connection.prepare("SELECT account, amount, events, digest FROM ledger").unwrap();
    let rows = statement.query_map([], |r| Ok((r.get(0)?, (r.get(1)?, r.get(2)?, r.get(3)?)))).unwrap();
    rows.map(Result::unwrap).collect()
}

pub(crate) async fn start(directory: &Path, limits: Limits, policy: Policy) -> Runtime {
    let batch = WrittenBatch {
        events: Some(limits.events),
        bytes: Some(limits.bytes),
        commit_rows: Some(limits.commit_rows),
        commit_interval_ms: Some(limits.commit_interval_ms),
        ..WrittenBatch::default()
    };
    let failures = WrittenFailures { policy: Some(policy), ..WrittenFailures::default() };
    let written = Written {
        failures,
        data: Some(directory.join("data")),
        plugins: Some(directory.join("plugins")),
        batch,
        ..Written::default()
    };
    Runtime::start(written.validate().unwrap()).await.unwrap()
}

pub(crate) async fn wait(runtime: &Runtime, generation: u64, position: Option<Position>) -> LiveView {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        // A view appears, and changes its generation, without a signal; positions have one.
        if let Some(view) = runtime.views().get("ledger").filter(|view| view.generation >= generation).cloned() {
            if let Some(position) = position {
                tokio::time::timeout_at(deadline, view.reached.wait_for(position)).await.expect("in time");
            }
            return view;
        }
        assert!(tokio::time::Instant::now() < deadline, "{:?}", runtime.status());
        tokio::task::yield_now().await;
    }
}

pub(crate) fn new_world() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(directory.path().join("plugins")).unwrap();
    std::fs::create_dir_all(directory.path().join("data")).unwrap();
    // Compiled code is shared between the cases.
    let cache = crate::support::root().join("target/plugins/cache");
    std::fs::create_dir_all(&cache).unwrap();
    std::os::unix::fs::symlink(cache, directory.path().join("data/cache")).unwrap();
    std::fs::write(directory.path().join("plugins/ledger.wasm"), module("ledger")).unwrap();
    directory
}

/// Numbers events by their source. Their times are as they may be: some are the same, and some go back.
#[derive(Default)]
struct Producer {
    next: [u64; 2],
    all: Vec<NewEvent>,
}

impl Producer {
    fn produce(&mut self, moves: &[(bool, u8, i64)]) -> Vec<NewEvent> {
        let mut produced = Vec::new();
        for (right, account, amount) in moves {
            let source = if *right { "right" } else { "left" };
            let number = self.next[usize::from(*right)];
            self.next[usize::from(*right)] += 1;
            let data = serde_json::json!({ "account": format!("a{account}"), "amount": amount });
            // Now and then an account is closed, and one of the events is for nobody.
            let kind = match amount {
                7 if !right => "Closed",
                _ => "Moved",
            };
            let line = event(source, kind, &number.to_string(), self.all.len() as i64 / 3 + amount % 2, data);
            let event = cloudevents::parse(line.as_bytes(), None).unwrap();
            self.all.push(event.clone());
            produced.push(event);
        }
        produced
    }

    fn position(&self) -> Option<Position> {
        (self.all.len() as u64).checked_sub(1).map(Position)
    }
}

async fn follow(steps: &[Step], limits: Limits) {
    let world = new_world();
    let mut producer = Producer::default();
    let mut runtime = start(world.path(), limits, Policy::Pause).await;
    for step in steps {
        match step {
            Step::Append(moves) => drop(runtime.log().append(producer.produce(moves)).unwrap()),
            Step::Restart => {
                runtime.shutdown().await;
                drop(runtime);
                runtime = start(world.path(), limits, Policy::Pause).await;
            }
        }
    }
    let view = wait(&runtime, 1, producer.position()).await;
    let live = stored(&view);
    assert_eq!(live, fold(&producer.all), "the order of the log is that of the appends, whatever the source");
    runtime.rebuild("ledger").await.unwrap();
    let rebuilt = wait(&runtime, 2, producer.position()).await;
    assert_eq!(stored(&rebuilt), live, "a rebuild gives the same rows");
    runtime.shutdown().await;
}

/// Everything was there before.
async fn catch_up(moves: &[(bool, u8, i64)], limits: Limits) {
    let world = new_world();
    let mut producer = Producer::default();
    let events = producer.produce(moves);
    shadowbox::log::EventLog::open(&world.path().join("data")).unwrap().append(events).unwrap();
    let runtime = start(world.path(), limits, Policy::Pause).await;
    let view = wait(&runtime, 1, producer.position()).await;
    assert_eq!(stored(&view), fold(&producer.all));
    runtime.shutdown().await;
}

#[test]
fn any_batches_and_any_restarts_give_the_rows_of_a_plain_fold_and_of_a_rebuild() {
    let tokio = tokio::runtime::Runtime::new().unwrap();
    let run = |(steps, limits): (Vec<Step>, Limits)| {
        tokio.block_on(follow(&steps, limits));
        Ok(())
    };
    properties(24, file!()).run(&(steps(), limits()), run).unwrap();
}

#[test]
fn what_was_there_before_is_taken_in_the_order_of_the_log() {
    let tokio = tokio::runtime::Runtime::new().unwrap();
    let moves = proptest::collection::vec((any::<bool>(), 0..6_u8, -100..100_i64), 1..120);
    let run = |(moves, limits): (Vec<_>, Limits)| {
        tokio.block_on(catch_up(&moves, limits));
        Ok(())
    };
    properties(24, file!()).run(&(moves, limits()), run).unwrap();
}
