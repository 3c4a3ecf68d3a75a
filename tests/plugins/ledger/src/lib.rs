//! Accounts that are moved by two services. Each row has a digest of the events in the order in which they came, so two
//! rows are equal only if they were made by the same events in the same order. Other events misbehave on purpose.

use std::sync::atomic::{AtomicI64, Ordering};

use serde::Deserialize;
use shadowbox_plugin::prelude::*;

#[derive(Events)]
enum Fact<'a> {
    #[event("Moved", source = "left")]
    #[event("Moved", source = "right")]
    Moved(Moved<'a>),
    #[event("Closed", source = "left")]
    Closed(Closed<'a>),
    /// Like `Moved`, once the module is mended; before, it cannot be applied, and panics if the amount is negative.
    #[event("Doubtful", source = "left")]
    #[event("Doubtful", source = "right")]
    Doubtful(Moved<'a>),
    #[event("Refused", source = "left")]
    Refused,
    #[event("Panics", source = "left")]
    Panics,
    #[event("Loops", source = "left")]
    Loops,
    #[event("Grows", source = "left")]
    Grows,
    #[event("Exits", source = "left")]
    Exits,
    #[event("Sleeps", source = "left")]
    Sleeps,
    #[event("OnlyVersion2Panics", source = "left")]
    OnlyVersion2Panics,
    #[event("Prints", source = "left")]
    Prints,
    #[event("Looks", source = "left")]
    Looks,
}

#[derive(Deserialize)]
struct Moved<'a> {
    account: &'a str,
    amount: i64,
}

#[derive(Deserialize)]
struct Closed<'a> {
    account: &'a str,
}

/// A row of the view `ledger`.
#[derive(View, Default)]
#[view(name = "ledger", index(amount))]
struct Account {
    #[view(key)]
    account: String,
    amount: i64,
    events: i64,
    /// Depends on the order of the events.
    digest: i64,
    /// Which code touched the row last.
    code: i64,
    updated: Option<Timestamp>,
    #[cfg(feature = "v2")]
    doubled: i64,
}

/// What a plugin sees of the world.
#[derive(View, Default)]
#[view(name = "sights")]
struct Sight {
    #[view(key)]
    what: String,
    seen: String,
}

/// What no plugin may have: it begins again with each instance.
static SEEN: AtomicI64 = AtomicI64::new(0);

const CODE: i64 = if cfg!(feature = "v2") {
    3
} else if cfg!(feature = "tweaked") {
    2
} else {
    1
};

#[cfg(feature = "columns")]
#[projection(name = "ledger", version = 1, views(Account, Sight), forgotten)]
fn ledger(event: Event<Fact>, views: &mut Views) -> Result<()> {
    let seen = if event.forgotten { "forgotten" } else { event.stream };
    views.put(Sight { what: event.id.into(), seen: seen.into() })
}

#[cfg(not(any(feature = "v2", feature = "columns")))]
#[projection(name = "ledger", version = 1, views(Account, Sight))]
fn ledger(event: Event<Fact>, views: &mut Views) -> Result<()> {
    apply(event, views)
}

#[cfg(feature = "v2")]
#[projection(name = "ledger", version = 2, views(Account, Sight))]
fn ledger(event: Event<Fact>, views: &mut Views) -> Result<()> {
    apply(event, views)
}

#[cfg_attr(feature = "columns", allow(dead_code, reason = "this variant does nothing but to read"))]
fn apply(event: Event<Fact>, views: &mut Views) -> Result<()> {
    if cfg!(feature = "broken") {
        panic!("this module is broken");
    }
    match event.data {
        Fact::Doubtful(moved) if !cfg!(feature = "mended") => {
            // Asked for before the failure, so that it is known which row the event was about.
            let amount = views.get::<Account>(moved.account).map_or(0, |row| row.amount);
            if moved.amount < 0 {
                no_debts(amount, moved.amount);
            }
            bail!("{} has {amount}, and {} is doubtful", moved.account, moved.amount)
        }
        Fact::Moved(moved) | Fact::Doubtful(moved) => views.upsert::<Account>(moved.account, |row| {
            row.amount += moved.amount;
            row.events += 1;
            let from = if event.source == "left" { 1 } else { 2 };
            row.digest = row.digest.wrapping_mul(31).wrapping_add(event.position as i64 * 2 + from);
            row.code = if cfg!(feature = "stateful") { SEEN.fetch_add(1, Ordering::Relaxed) } else { CODE };
            row.updated = Some(event.time);
            #[cfg(feature = "v2")]
            {
                row.doubled = row.amount * 2;
            }
        }),
        Fact::Closed(closed) => views.delete::<Account>(closed.account),
        Fact::Refused => bail!("the event says so"),
        Fact::Panics => panic!("the event says so"),
        Fact::OnlyVersion2Panics if cfg!(feature = "v2") => panic!("the event says so"),
        Fact::OnlyVersion2Panics => Ok(()),
        Fact::Loops => loop {
            std::hint::spin_loop();
        },
        Fact::Grows => {
            let mut hoard: Vec<Vec<u8>> = Vec::new();
            loop {
                hoard.push(vec![1; 1 << 20]);
                std::hint::black_box(&hoard);
            }
        }
        Fact::Exits => std::process::exit(3),
        #[expect(clippy::print_stdout, reason = "a flood of output is what this event is for")]
        Fact::Prints => {
            for _ in 0..10_000 {
                println!("a line that nobody needs");
            }
            Ok(())
        }
        // The sandbox ends it at once, so nobody waits for it.
        Fact::Sleeps => {
            std::thread::sleep(std::time::Duration::from_secs(3_600));
            Ok(())
        }
        Fact::Looks => look(views),
    }
}

/// To be found in a backtrace.
#[inline(never)]
fn no_debts(amount: i64, change: i64) {
    panic!("no debts: {amount} and {change}");
}

/// Everything of the world that could make a row depend on when or where it was made.
fn look(views: &mut Views) -> Result<()> {
    use std::hash::{BuildHasher, RandomState};
    use std::io::Read;
    let epoch = std::time::SystemTime::UNIX_EPOCH;
    let sights = [
        ("time", format!("{:?}", std::time::SystemTime::now().duration_since(epoch))),
        ("elapsed", format!("{:?}", std::time::Instant::now().elapsed())),
        ("random", RandomState::new().hash_one(0).to_string()),
        ("environment", format!("{:?}", std::env::vars().collect::<Vec<_>>())),
        ("arguments", format!("{:?}", std::env::args().collect::<Vec<_>>())),
        ("file", format!("{:?}", std::fs::read("/etc/hostname").map_err(|e| e.kind()))),
        ("folder", format!("{:?}", std::fs::read_dir("/").map_err(|e| e.kind()).map(drop))),
        ("written", format!("{:?}", std::fs::write("/tmp/x", "x").map_err(|e| e.kind()))),
        ("current folder", format!("{:?}", std::env::current_dir().map_err(|e| e.kind()))),
        ("program", format!("{:?}", std::env::current_exe().map_err(|e| e.kind()))),
        ("input", format!("{:?}", std::io::stdin().read_to_end(&mut Vec::new()).map_err(|e| e.kind()))),
        ("thread", format!("{:?}", std::thread::Builder::new().spawn(|| ()).map_err(|e| e.kind()).map(drop))),
        ("threads", format!("{:?}", std::thread::available_parallelism().map_err(|e| e.kind()))),
        ("process", format!("{:?}", std::process::Command::new("/bin/true").status().map_err(|e| e.kind()).map(drop))),
        ("order", format!("{:?}", (0..50).collect::<std::collections::HashSet<_>>())),
        ("network", format!("{:?}", std::net::TcpStream::connect("127.0.0.1:7070").map_err(|e| e.kind()).map(drop))),
    ];
    for (what, seen) in sights {
        views.put(Sight { what: what.to_owned(), seen })?;
    }
    Ok(())
}

#[cfg(all(test, not(feature = "mended")))]
mod tests {
    use super::*;

    /// Another test saves this failure from a running host, and compares it with what is loaded here.
    #[test]
    #[should_panic = "no debts: 5 and -7"]
    fn a_failure_of_a_running_host_is_one_of_this_test() {
        let kit = TestKit::new(ledger).load("tests/bad-event");
        assert_eq!(kit.row::<Account>("ada").map(|row| (row.amount, row.events)), Some((5, 1)));
        let _ = kit.given_saved();
    }
}
