//! A history that is known beforehand: which events each of three sources has, in which order, and what the rows of two
//! projections are at any position of the log. One of them has one source, the other two. How the log orders the sources
//! among each other is decided by the commits, and read from it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use rusqlite::{Connection, OptionalExtension};
use serde_json::{Value, json};

use super::{Answer, event};

/// How far a view is complete, or a log goes; None before the first event.
pub(crate) type Position = Option<u64>;

/// Rows by their key; everything else in them that depends on the position alone, as text.
type Rows = BTreeMap<String, String>;

/// The views that the history fills, with their projections.
pub(crate) const VIEWS: [(&str, &str); 2] = [("ledger", "ledger"), ("order-summary", "order_summary")];

/// A source that nobody wants: its events are only in the log.
pub(crate) const FILLER: &str = "filler";

fn account(source: &str, n: u64) -> String {
    match source {
        // An account of both sources: its digest depends on the order in which they were taken.
        _ if n % 6 == 5 => "shared".to_owned(),
        "left" => format!("l{}", n * n % 13),
        _ => format!("r{}", n * n % 11),
    }
}

fn order(n: u64) -> String {
    format!("o{}", n / 4 % 15)
}

fn closes(source: &str, n: u64) -> bool {
    source == "left" && n % 31 == 30
}

/// An event, by its number in its source, as a line.
pub(crate) fn line(source: &str, n: u64) -> String {
    let (kind, data) = match (source, n % 4) {
        ("orders", 0) => ("OrderCreated", json!({ "order_id": order(n), "customer": format!("c{n}") })),
        ("orders", 3) => ("OrderPlaced", json!({ "order_id": order(n) })),
        ("orders", _) => ("OrderLineAdded", json!({ "order_id": order(n), "quantity": 1, "unit_price_cents": n })),
        (FILLER, _) => ("Nothing", json!({})),
        _ if closes(source, n) => ("Closed", json!({ "account": account(source, n) })),
        _ => ("Moved", json!({ "account": account(source, n), "amount": n })),
    };
    event(source, kind, &format!("{source}-{n}"), n as i64, data)
}

/// Which event of which source stands at each position of a log.
#[derive(Default)]
pub(crate) struct Order(Mutex<Vec<(String, u64)>>);

impl Order {
    /// What will stand there once it is appended.
    pub(crate) fn announce(&self, source: &str, numbers: std::ops::Range<u64>) {
        self.0.lock().unwrap().extend(numbers.map(|n| (source.to_owned(), n)));
    }

    /// How many events are known.
    pub(crate) fn len(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    /// Reads on, if a position is not known yet. In a process of its own: one that closes the file of a log loses the
    /// locks that it has on it, and other processes append meanwhile.
    pub(crate) fn read_to(&self, directory: &Path, position: Position) {
        let mut known = self.0.lock().unwrap();
        let is_known = |known: &[_]| position.is_none_or(|p| p < known.len() as u64);
        if is_known(&known) {
            return;
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_shadowbox"));
        command.current_dir(directory).args(["events", "--data", "data"]);
        if let Some(last) = known.len().checked_sub(1) {
            command.args(["--after", &last.to_string()]);
        }
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            assert_eq!(event["position"], known.len(), "a position is missing, or there twice: {line}");
            let (source, n) = event["id"].as_str().unwrap().rsplit_once('-').unwrap();
            assert_eq!(event["source"], source);
            known.push((source.to_owned(), n.parse().unwrap()));
        }
        assert!(is_known(&known), "the log ends before {position:?}, which somebody was told of");
    }

    /// All that is known.
    pub(crate) fn known(&self) -> Vec<(String, u64)> {
        self.0.lock().unwrap().clone()
    }

    /// True if the rows of a view at `position` have everything that they have at `other`. Positions alone do not tell:
    /// nothing is committed for events that a projection does not want, though it is complete to them.
    pub(crate) fn covers(&self, view: &str, position: Position, other: Position) -> bool {
        let end = |position: Position| position.map_or(0, |p| p as usize + 1);
        let events = self.0.lock().unwrap();
        let wanted = |source: &str| (view == "ledger") == (source != "orders") && source != FILLER;
        position >= other || !events[end(position)..end(other)].iter().any(|(source, _)| wanted(source))
    }
}

/// The plain fold of the history, up to a position that moves.
#[derive(Default)]
pub(crate) struct Fold {
    next: u64,
    ledger: BTreeMap<String, [i64; 3]>,
    orders: BTreeMap<String, (String, &'static str, i64, i64)>,
}

impl Fold {
    /// The rows of a view at a position. Going on from the last one is cheap.
    fn at(&mut self, view: &str, position: Position, order: &Order) -> Rows {
        let end = position.map_or(0, |p| p + 1);
        if self.next > end {
            *self = Fold::default();
        }
        let events = order.0.lock().unwrap();
        assert!(end <= events.len() as u64, "nobody has appended the event at {position:?}");
        for (source, n) in &events[self.next as usize..end as usize] {
            self.apply(source, *n);
            self.next += 1;
        }
        match view {
            "ledger" => self.ledger.iter().map(|(account, row)| (account.clone(), ledger(*row))).collect(),
            _ => self.orders.iter().map(|(id, (c, s, l, t))| (id.clone(), format!("{c} {s} {l} {t}"))).collect(),
        }
    }

    fn apply(&mut self, source: &str, n: u64) {
        match source {
            FILLER => {}
            "orders" => {
                let row = self.orders.entry(order(n)).or_default();
                match n % 4 {
                    0 => *row = (format!("c{n}"), "open", 0, 0),
                    3 => row.1 = "placed",
                    _ => (row.2, row.3) = (row.2 + 1, row.3 + n as i64),
                }
            }
            _ if closes(source, n) => drop(self.ledger.remove(&account(source, n))),
            _ => {
                let [amount, events, digest] = self.ledger.entry(account(source, n)).or_default();
                *amount += n as i64;
                *events += 1;
                let from = if source == "left" { 1 } else { 2 };
                *digest = digest.wrapping_mul(31).wrapping_add(self.next as i64 * 2 + from);
            }
        }
    }
}

fn ledger([amount, events, digest]: [i64; 3]) -> String {
    format!("{amount} {events} {digest}")
}

/// A position as a header has it; nothing before the first event.
pub(crate) fn parse(header: &str) -> Position {
    (!header.is_empty()).then(|| header.parse().unwrap())
}

/// An answer must have exactly the rows of the position that it states, which this returns. The order must be known so
/// far.
pub(crate) fn check_answer(view: &str, answer: &Answer, fold: &mut Fold, order: &Order) -> Position {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let position = parse(answer.header("shadowbox-position"));
    let answer_rows: Vec<Value> = serde_json::from_str(&answer.body).unwrap();
    let number = |row: &Value, column: &str| row[column].as_i64().unwrap();
    let text = |row: &Value, column: &str| row[column].as_str().unwrap().to_owned();
    let row = |row: &Value| match view {
        "ledger" => {
            let values = [number(row, "amount"), number(row, "events"), number(row, "digest")];
            (text(row, "account"), ledger(values))
        }
        _ => {
            let (customer, status) = (text(row, "customer"), text(row, "status").to_lowercase());
            let sums = format!("{} {}", number(row, "lines"), number(row, "total_cents"));
            (text(row, "order_id"), format!("{customer} {status} {sums}"))
        }
    };
    let found: Rows = answer_rows.iter().map(row).collect();
    assert_eq!(found, fold.at(view, position, order), "{view} at {position:?}");
    position
}

/// What is on the disk while nothing runs. Databases are copied before they are opened: opening one after a crash
/// repairs it, and that is what the runtime has to do.
#[derive(Default)]
pub(crate) struct Disk {
    folds: HashMap<PathBuf, Fold>,
}

impl Disk {
    /// Every generation that the catalogue has, whatever it is to its projection, must be whole and have exactly the
    /// rows of its checkpoint, to which `know` makes the order known. Answers the checkpoints of the live ones, by view.
    pub(crate) fn check(
        &mut self,
        data: &Path,
        order: &Order,
        know: impl Fn(Position),
    ) -> BTreeMap<&'static str, Position> {
        let (mut live, mut former) = (BTreeMap::new(), Vec::new());
        for (projection, number, role) in generations(data) {
            let view = VIEWS.iter().find(|(p, _)| *p == projection).unwrap().1;
            let file = data.join("views").join(&projection).join(format!("{number}.sqlite"));
            let (_folder, copy) = open_copy(&file);
            let whole: String = copy.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
            assert_eq!(whole, "ok", "{file:?}");
            let mark = copy.query_row("SELECT position FROM _shadowbox_checkpoint", [], |r| r.get::<_, i64>(0));
            let position = mark.optional().unwrap().map(|p| p as u64);
            know(position);
            let found = rows(view, &copy);
            let fold = self.folds.entry(file.clone()).or_default();
            assert_eq!(found, fold.at(view, position, order), "{role} {file:?} at {position:?}");
            match role.as_str() {
                "live" => assert!(live.insert(view, position).is_none(), "two live generations of {projection}"),
                "former" => former.push((view, position)),
                _ => {}
            }
        }
        for (view, position) in former {
            let covers = order.covers(view, live[view], position);
            assert!(covers, "{view} went back from {position:?} to {:?}", live[view]);
        }
        live
    }
}

fn rows(view: &str, connection: &Connection) -> Rows {
    let sql = match view {
        "ledger" => "SELECT account, amount, events, digest FROM ledger",
        _ => "SELECT order_id, lines, total_cents, customer, status FROM order_summary",
    };
    let row = |r: &rusqlite::Row<'_>| {
        let (key, a, b): (String, i64, i64) = (r.get(0)?, r.get(1)?, r.get(2)?);
        if view == "ledger" {
            return Ok((key, ledger([a, b, r.get(3)?])));
        }
        let (customer, status): (String, String) = (r.get(3)?, r.get(4)?);
        Ok((key, format!("{customer} {} {a} {b}", status.to_lowercase())))
    };
    connection.prepare(sql).unwrap().query_map([], row).unwrap().map(Result::unwrap).collect()
}

/// What the catalogue has: projection, number and role of each generation. Works while a runtime runs, too.
pub(crate) fn generations(data: &Path) -> Vec<(String, u64, String)> {
    let file = data.join("catalogue.sqlite");
    if !file.exists() {
        return Vec::new();
    }
    let (_folder, copy) = open_copy(&file);
    let row = |r: &rusqlite::Row<'_>| Ok((r.get(0)?, r.get::<_, i64>(1)? as u64, r.get(2)?));
    match copy.prepare("SELECT projection, number, role FROM generations ORDER BY projection, number") {
        Ok(mut select) => select.query_map([], row).unwrap().map(Result::unwrap).collect(),
        // It was killed before it had made the table.
        Err(_) => Vec::new(),
    }
}

/// The hash of the module that the catalogue has for the live generation, of a runtime that runs.
pub(crate) fn live_module(data: &Path, projection: &str) -> Option<String> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let catalogue = Connection::open_with_flags(data.join("catalogue.sqlite"), flags).ok()?;
    let sql = "SELECT module FROM generations WHERE projection = ? AND role = 'live'";
    catalogue.query_row(sql, [projection], |r| r.get(0)).ok()
}

fn open_copy(file: &Path) -> (tempfile::TempDir, Connection) {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy.sqlite");
    for suffix in ["", "-wal", "-journal"] {
        let part = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
        if part(file).exists() {
            std::fs::copy(part(file), part(&copy)).unwrap_or_else(|e| panic!("{file:?}{suffix}: {e}"));
        }
    }
    assert!(copy.exists(), "{file:?} is missing");
    let connection = Connection::open(&copy).unwrap();
    (folder, connection)
}

/// Files of a data directory that belong to nothing: what a crash left and nobody has removed.
pub(crate) fn strays(data: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let known: Vec<PathBuf> = generations(data)
        .into_iter()
        .map(|(projection, number, _)| data.join("views").join(projection).join(format!("{number}.sqlite")))
        .collect();
    let views = entries(&data.join("views")).flat_map(|projection| entries(&projection).collect::<Vec<_>>());
    let stray = |file: &PathBuf| {
        let name = file.to_str().unwrap();
        !known.iter().any(|known| {
            name.strip_prefix(known.to_str().unwrap()).is_some_and(|rest| ["", "-wal", "-shm"].contains(&rest))
        })
    };
    let temporary = |file: &PathBuf| file.file_name().unwrap().to_str().unwrap().starts_with('.');
    let parts = ["cache", "modules"].into_iter().flat_map(|folder| entries(&data.join(folder)).filter(temporary));
    views.filter(stray).chain(parts.collect::<Vec<_>>()).collect()
}
