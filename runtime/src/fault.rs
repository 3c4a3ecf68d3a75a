//! Fault points: the steps at which a test lets the process die, or an operation fail.
//!
//! A crash between two writes, or a disk that is full just there, cannot be had from outside: what is killed at random
//! rarely dies between a promotion and the removal of the former generation. So every step after which something else
//! is on the disk has a name, in [`POINTS`], and a line in the code. The environment says what happens there:
//!
//! ```text
//! SHADOWBOX_FAULT=promote.done=kill            the process ends at once, as by SIGKILL
//! SHADOWBOX_FAULT=commit.rows=kill:3           when it comes there for the third time
//! SHADOWBOX_FAULT=commit.rows=error:2          the operation fails the first two times, as if the disk were full
//! SHADOWBOX_FAULT=commit.rows@/orders/=error   it fails always, for whatever has `/orders/` in its path or name
//! ```
//!
//! Several of them are separated by commas.
//!
//! There is nothing of it in a build without debug assertions, neither the branch nor the look at the environment: what
//! serves in production cannot be told to fail. The tests run the binary that cargo builds for them, which has it.

/// A step at which something can be made to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// What `SHADOWBOX_FAULT` calls it.
    pub name: &'static str,
    /// Whether the operation can fail there, too. Everywhere the process can die.
    pub fails: bool,
}

/// Every point, in the order in which a projection's life comes to them. The tests go through this list, and fail if
/// one of them is never reached.
pub const POINTS: &[Point] = &[
    // The databases of a data directory are made, and what a crash has left is removed.
    dies("log.made"),
    dies("catalogue.made"),
    // A log of the former format is converted: a part is appended, the former file has another name, so has the new one.
    dies("convert.appended"),
    dies("convert.moved"),
    dies("convert.done"),
    dies("start.stray"),
    dies("start.sweep"),
    // A module is compiled and stored. What fails with the cache costs only time.
    fails("cache.written"),
    dies("cache.stored"),
    fails("module.written"),
    dies("module.stored"),
    // A generation gets its number, its file and its entry, and is opened.
    fails("generation.numbered"),
    fails("generation.filled"),
    fails("generation.made"),
    dies("generation.entered"),
    fails("generation.fenced"),
    fails("generation.origin"),
    // Events are appended. Once they are committed, nothing can take them back.
    fails("append.begun"),
    fails("append.written"),
    dies("append.committed"),
    // The oldest rows of the log are packed into a block.
    fails("seal.begun"),
    fails("seal.written"),
    dies("seal.committed"),
    // Events are forgotten, a transaction each: it is entered, a block is rewritten, it has ended.
    fails("forget.begun"),
    fails("forget.written"),
    dies("forget.committed"),
    // A commit. It can fail after it has happened, too: then nobody who only hears of the error knows which it was.
    fails("commit.begun"),
    fails("commit.rows"),
    fails("commit.checkpoint"),
    fails("commit.done"),
    dies("commit.tidied"),
    // A hot swap: the former code has stopped, the first batch of the new one is committed, that is noted.
    dies("swap.stopped"),
    dies("swap.proved"),
    fails("swap.noted"),
    dies("swap.done"),
    // A promotion, and the removal of a generation that is not needed any more.
    fails("promote.begun"),
    fails("promote.flipped"),
    fails("promote.done"),
    dies("promote.shown"),
    fails("remove.begun"),
    fails("remove.forgotten"),
    dies("remove.unlinked"),
];

const fn dies(name: &'static str) -> Point {
    Point { name, fails: false }
}

const fn fails(name: &'static str) -> Point {
    Point { name, fails: true }
}

/// A step at which the process may be made to die. `of` tells whose step it is: a path, or a projection's name.
#[inline]
pub(crate) fn point(name: &'static str, of: &str) {
    let failed = fail(name, of);
    debug_assert!(failed.is_ok(), "nothing can fail at {name:?}");
}

/// The same, where the operation may also be made to fail.
#[cfg(not(debug_assertions))]
#[inline]
pub(crate) fn fail(_: &'static str, _: &str) -> std::io::Result<()> {
    Ok(())
}

#[cfg(debug_assertions)]
pub(crate) use armed::fail;

#[cfg(debug_assertions)]
mod armed {
    use std::io;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::POINTS;

    /// What the environment says.
    #[derive(Debug)]
    struct Fault {
        name: String,
        of: String,
        kill: bool,
        /// Die at this one; or fail up to this one.
        count: u64,
        hits: AtomicU64,
    }

    pub(crate) fn fail(name: &'static str, of: &str) -> io::Result<()> {
        static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();
        assert!(POINTS.iter().any(|point| point.name == name), "{name:?} is missing in POINTS");
        let faults = FAULTS.get_or_init(|| {
            let text = std::env::var("SHADOWBOX_FAULT").unwrap_or_default();
            let faults = text.split(',').filter(|text| !text.is_empty());
            let parse = |text| parse(text).unwrap_or_else(|| panic!("{text:?} is not POINT[@TEXT]=kill|error[:N]"));
            faults.map(parse).collect()
        });
        let Some(fault) = faults.iter().find(|fault| fault.name == name && of.contains(&fault.of)) else {
            return Ok(());
        };
        let hit = fault.hits.fetch_add(1, Ordering::Relaxed) + 1;
        if fault.kill && hit == fault.count {
            tracing::warn!(name, of, hit, "a fault point ends the process");
            // Nothing is flushed, unlocked or removed: all that the system does is what it does after SIGKILL.
            std::process::abort();
        }
        if !fault.kill && hit <= fault.count {
            tracing::warn!(name, of, hit, "a fault point fails");
            return Err(io::Error::new(io::ErrorKind::StorageFull, format!("fault point {name}")));
        }
        Ok(())
    }

    fn parse(text: &str) -> Option<Fault> {
        let (point, action) = text.split_once('=')?;
        let (name, of) = point.split_once('@').unwrap_or((point, ""));
        let known = POINTS.iter().find(|point| point.name == name)?;
        let (action, count) = action.split_once(':').map_or((action, None), |(action, n)| (action, Some(n)));
        let count = count.map(str::parse).transpose().ok()?;
        let (kill, count) = match action {
            "kill" => (true, count.unwrap_or(1)),
            "error" if known.fails => (false, count.unwrap_or(u64::MAX)),
            _ => return None,
        };
        Some(Fault { name: name.to_owned(), of: of.to_owned(), kill, count, hits: AtomicU64::new(0) })
    }

    #[test]
    fn what_the_environment_may_say() {
        for (text, expected) in [
            ("commit.rows=kill", Some(("commit.rows", "", true, 1))),
            ("commit.rows@/orders/=error:3", Some(("commit.rows", "/orders/", false, 3))),
            ("commit.rows=error", Some(("commit.rows", "", false, u64::MAX))),
            ("promote.shown=error", None),
            ("commit.row=kill", None),
            ("commit.rows=kill:x", None),
            ("commit.rows", None),
        ] {
            let fault = parse(text);
            let found = fault.as_ref().map(|f| (f.name.as_str(), f.of.as_str(), f.kill, f.count));
            assert_eq!(found, expected, "{text}");
        }
    }
}
