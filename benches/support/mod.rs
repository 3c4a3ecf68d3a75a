//! What every bench needs: a process for each contestant, measuring it, modules and logs made once, a runtime in this
//! process or the release binary beside it, numbers in order, a table and a JSON file.

#![allow(dead_code, unused_imports, reason = "each bench is a program of its own and uses a part of this")]

mod events;
pub(crate) mod http;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use comfy_table::Table;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shadowbox::config::Written;
use shadowbox::manifest::{CONTRACT, Manifest};
use shadowbox::supervisor::{LiveView, Runtime};

/// Nothing that a bench waits for takes as long; what does stands still.
pub(crate) const DEADLINE: Duration = Duration::from_secs(900);

/// The `main` of a bench. In a child process (see [`child`]) it runs `contestant` with the child's arguments and prints
/// the answer as JSON; under `cargo bench` it runs `bench` and writes what was measured.
pub(crate) fn main(
    name: &str,
    contestant: impl FnOnce(&[&str]) -> Result<Value>,
    bench: impl FnOnce(&mut Report) -> Result<()>,
) -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child", ref arguments @ ..] => println!("{}", contestant(arguments)?),
        // Test runners start benches, too, but without this.
        [.., "--bench"] => {
            let mut report = Report::begin(name)?;
            bench(&mut report)?;
            report.finish()?;
        }
        _ => println!("run it with cargo bench; it takes minutes"),
    }
    Ok(())
}

/// Runs this program once more as a child, so that memory and CPU time are those of one contestant alone.
pub(crate) fn child<T: DeserializeOwned>(arguments: &[&str]) -> Result<T> {
    let output = Command::new(std::env::current_exe()?)
        .arg("child")
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "{arguments:?} failed: {}", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("the answer of {arguments:?}"))
}

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

/// Where benches keep what they make, and write what they measure.
pub(crate) fn workplace() -> PathBuf {
    root().join("target/bench")
}

/// Where compiled modules are kept.
pub(crate) fn cache() -> PathBuf {
    workplace().join("cache")
}

/// A list of numbers from an environment variable, such as `1,3,10`; if it is not set, these.
pub(crate) fn numbers(variable: &str, default: &[u64]) -> Result<Vec<u64>> {
    let Ok(text) = std::env::var(variable) else { return Ok(default.to_vec()) };
    let numbers: Result<Vec<u64>, _> = text.split(',').map(|number| number.trim().parse()).collect();
    let numbers = numbers.with_context(|| format!("{variable}={text:?}: write numbers like 1,3,10"))?;
    ensure!(!numbers.contains(&0), "{variable}={text:?}: nothing can be measured with 0");
    Ok(numbers)
}

/// How many rounds: `SHADOWBOX_BENCH_ROUNDS`, or as many as this bench needs.
pub(crate) fn rounds(default: u64) -> Result<u64> {
    let rounds = numbers("SHADOWBOX_BENCH_ROUNDS", &[default])?;
    ensure!(rounds.len() == 1, "SHADOWBOX_BENCH_ROUNDS must be one number");
    Ok(rounds[0])
}

/// Those that `SHADOWBOX_BENCH_ONLY` names, such as `event-counts,flight-board`; if it is not set, all.
pub(crate) fn chosen<T>(all: &[T], name: impl Fn(&T) -> &str) -> Result<Vec<&T>> {
    let Ok(only) = std::env::var("SHADOWBOX_BENCH_ONLY") else { return Ok(all.iter().collect()) };
    let wanted = |one: &&T| only.split(',').any(|wanted| wanted.trim() == name(one));
    let chosen: Vec<_> = all.iter().filter(wanted).collect();
    let names: Vec<_> = all.iter().map(&name).collect();
    ensure!(!chosen.is_empty(), "SHADOWBOX_BENCH_ONLY={only:?} names none of {}", names.join(", "));
    Ok(chosen)
}

/// A process as Linux sees it.
pub(crate) struct Process(PathBuf);

impl Process {
    pub(crate) fn this() -> Process {
        Process("/proc/self".into())
    }

    pub(crate) fn of(child: &Child) -> Process {
        Process(format!("/proc/{}", child.id()).into())
    }

    /// User and system time of all threads, also of those that have ended.
    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        cpu_seconds(&self.0.join("stat"))
    }

    /// The most resident memory since the start or [`Process::forget_peak`]; 1 MB is 10^6 bytes.
    pub(crate) fn peak_mb(&self) -> Result<f64> {
        self.status_mb("VmHWM:")
    }

    /// Resident memory now.
    pub(crate) fn resident_mb(&self) -> Result<f64> {
        self.status_mb("VmRSS:")
    }

    /// Lets the peak begin anew from what is resident now.
    pub(crate) fn forget_peak(&self) -> Result<()> {
        Ok(fs::write(self.0.join("clear_refs"), "5")?)
    }

    /// CPU seconds by the threads' names, of those that are there.
    pub(crate) fn threads(&self) -> Result<BTreeMap<String, f64>> {
        let mut threads = BTreeMap::new();
        for thread in fs::read_dir(self.0.join("task"))? {
            let thread = thread?.path();
            // A thread may end while one looks.
            let Ok(name) = fs::read_to_string(thread.join("comm")) else { continue };
            let Ok(seconds) = cpu_seconds(&thread.join("stat")) else { continue };
            *threads.entry(name.trim().to_owned()).or_insert(0.0) += seconds;
        }
        threads.retain(|_, seconds| *seconds > 0.0);
        Ok(threads)
    }

    fn status_mb(&self, field: &str) -> Result<f64> {
        let status = fs::read_to_string(self.0.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
        let kilobytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kilobytes * 1024.0 / 1e6)
    }
}

/// Linux counts in hundredths of a second here, on every platform.
fn cpu_seconds(stat: &Path) -> Result<f64> {
    let text = fs::read_to_string(stat)?;
    // The name in parentheses may have spaces; after it come the state and ten other fields.
    let (_, fields) = text.rsplit_once(')').context("no name in stat")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}

/// The nanoseconds for which this thread has been running. Finer than [`Process::cpu_seconds`]; other processes' turns
/// are not in it.
pub(crate) fn thread_nanoseconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(text.split_whitespace().next().context("an empty schedstat")?.parse()?)
}

/// What one contestant needed, measured by itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Usage {
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) peak_mb: f64,
    /// CPU seconds by thread, of those that were there at the end, since they began.
    pub(crate) threads: BTreeMap<String, f64>,
}

/// Measures this process.
pub(crate) struct Stopwatch {
    began: Instant,
    cpu_seconds: f64,
}

impl Stopwatch {
    pub(crate) fn start() -> Result<Stopwatch> {
        let this = Process::this();
        this.forget_peak()?;
        Ok(Stopwatch { cpu_seconds: this.cpu_seconds()?, began: Instant::now() })
    }

    pub(crate) fn stop(self) -> Result<Usage> {
        let (seconds, this) = (self.began.elapsed().as_secs_f64(), Process::this());
        let cpu_seconds = this.cpu_seconds()? - self.cpu_seconds;
        Ok(Usage { seconds, cpu_seconds, peak_mb: this.peak_mb()?, threads: this.threads()? })
    }
}

/// Modules, each built as its author builds it: examples, or packages of `tests/plugins`. Answers their directory.
pub(crate) fn modules(packages: &[&str]) -> Result<PathBuf> {
    // The directory of the tests' modules, so that they are built once.
    let target = root().join("target/plugins");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).args(["build", "--profile", "plugin", "--target", "wasm32-wasip2", "--target-dir"]);
    cargo.arg(&target).args(packages.iter().flat_map(|package| ["-p", package]));
    ensure!(cargo.status()?.success(), "the modules cannot be built");
    // Somebody may build there again while this runs, and another module would have to be compiled again.
    let kept = workplace().join("modules");
    fs::create_dir_all(&kept)?;
    for file in packages.iter().map(|package| module_file(package)) {
        fs::copy(target.join("wasm32-wasip2/plugin").join(&file), kept.join(&file))?;
    }
    Ok(kept)
}

/// The name of a package's module.
pub(crate) fn module_file(package: &str) -> String {
    format!("{}.wasm", package.replace('-', "_"))
}

/// The directory of a log with so many million events, rounded: flights but for some 30,000, see `events.rs`. All of it is
/// packed but for the last block's worth at most, so that no runtime packs anything in it. It is for reading: take it with
/// [`Home::link_log`] or [`Home::copy_log`].
pub(crate) fn log(millions: u64) -> Result<PathBuf> {
    events::log(millions)
}

/// The same events as somebody has them who has no Shadowbox: an SQLite file with one table `events`, in the order of the
/// log. Made once for each log, and kept beside it.
pub(crate) fn plain(log: &Path) -> Result<PathBuf> {
    events::plain(log)
}

/// The table of such a file.
pub(crate) const PLAIN: &str = "CREATE TABLE events (position INTEGER PRIMARY KEY, source TEXT NOT NULL,
    type TEXT NOT NULL, time INTEGER NOT NULL, stream TEXT NOT NULL, id TEXT NOT NULL, payload BLOB NOT NULL) STRICT;";

/// What a projection declares that wants these sources, all or some types of them, to read the log as it would.
pub(crate) fn wanting(source: &str, types: &[&str]) -> Result<Manifest> {
    let manifest = json!({
        "contract": CONTRACT, "projection": "bench", "version": 1,
        "sources": [{ "source": source, "types": types }],
        "views": [{ "name": "bench", "columns": [{ "name": "key", "type": "text" }], "key": ["key"] }],
    });
    Ok(Manifest::parse(&manifest.to_string())?)
}

/// A module in which a text is replaced by another one of the same length wherever it occurs: another name, or other
/// code, at the price of no build.
pub(crate) fn patched(module: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let (mut bytes, mut at, mut found) = (module.to_vec(), 0, 0);
    while let Some(i) = bytes[at..].windows(from.len()).position(|window| window == from.as_bytes()) {
        bytes[at + i..at + i + from.len()].copy_from_slice(to.as_bytes());
        at += i + from.len();
        found += 1;
    }
    assert!(found > 0, "{from:?} does not occur");
    bytes
}

/// A data directory and a plugin folder, empty at first.
pub(crate) struct Home(PathBuf);

impl Home {
    /// Whatever a former one of this name left is removed. Compiled modules are kept from bench to bench.
    pub(crate) fn new(name: &str) -> Result<Home> {
        Home::with_cache(name, &cache())
    }

    /// One whose compiled modules are in this directory.
    pub(crate) fn with_cache(name: &str, cache: &Path) -> Result<Home> {
        let home = Home(workplace().join("homes").join(name));
        if home.0.exists() {
            fs::remove_dir_all(&home.0)?;
        }
        for directory in [&home.data(), &home.plugins(), cache] {
            fs::create_dir_all(directory)?;
        }
        std::os::unix::fs::symlink(cache, home.data().join("cache"))?;
        Ok(home)
    }

    /// One that is there already, for a child process.
    pub(crate) fn at(path: &str) -> Home {
        Home(path.into())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The path as an argument for a child.
    pub(crate) fn argument(&self) -> &str {
        self.0.to_str().expect("the workspace's path is UTF-8")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.0.join("data")
    }

    pub(crate) fn plugins(&self) -> PathBuf {
        self.0.join("plugins")
    }

    /// Takes the log of a directory, see [`log`], for reading alone: it is the same file, so that all contestants find it
    /// in the page cache or none does.
    pub(crate) fn link_log(&self, log: &Path) -> Result<()> {
        Ok(fs::hard_link(log.join("log.sqlite"), self.data().join("log.sqlite"))?)
    }

    /// Takes a copy of a log, to append to.
    pub(crate) fn copy_log(&self, log: &Path) -> Result<()> {
        fs::copy(log.join("log.sqlite"), self.data().join("log.sqlite"))?;
        Ok(())
    }

    /// Puts a module into the plugin folder in one step.
    pub(crate) fn drop_module(&self, file: &str, module: &[u8]) -> Result<()> {
        let part = self.plugins().join(format!(".{file}.part"));
        fs::write(&part, module)?;
        Ok(fs::rename(part, self.plugins().join(file))?)
    }

    /// A runtime in this process, as `shadowbox run` starts it, without HTTP.
    pub(crate) async fn start(&self) -> Result<Runtime> {
        let written = Written { data: Some(self.data()), plugins: Some(self.plugins()), ..Written::default() };
        Ok(Runtime::start(written.validate()?).await?)
    }

    /// The release binary beside this process, with HTTP.
    pub(crate) fn serve(&self) -> Result<Server> {
        let log = fs::File::create(self.0.join("shadowbox.log"))?;
        let mut child = Command::new(env!("CARGO_BIN_EXE_shadowbox"))
            .current_dir(&self.0)
            .args(["run", "--plugins", "plugins", "--data", "data", "--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("it is piped")?).read_line(&mut line)?;
        let address = line.trim().split("http://").nth(1).map(str::to_owned);
        let server = Server { child, address: address.unwrap_or_default() };
        ensure!(!server.address.is_empty(), "it did not start; see {}", self.0.join("shadowbox.log").display());
        Ok(server)
    }
}

/// A running `shadowbox`, which is killed with this.
pub(crate) struct Server {
    pub(crate) child: Child,
    /// Host and port.
    pub(crate) address: String,
}

impl Server {
    pub(crate) fn get(&self, path: &str) -> Result<Value> {
        let url = format!("http://{}{path}", self.address);
        Ok(ureq::get(&url).call()?.body_mut().read_json()?)
    }

    /// Waits until a projection is live and has applied all that is in the log.
    pub(crate) fn wait_live(&self, projection: &str) -> Result<()> {
        let began = Instant::now();
        loop {
            let all = self.get("/projections")?;
            let found = all.as_array().into_iter().flatten().find(|p| p["name"] == projection);
            if found.is_some_and(|p| p["state"] == "live" && p["lag_events"] == 0) {
                return Ok(());
            }
            ensure!(began.elapsed() < DEADLINE, "{projection} stands still: {all:#}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended; then the bench has failed already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `what` in a tokio runtime like the binary's, with a deadline, and leaves as the binary does.
pub(crate) fn in_process<T>(what: impl Future<Output = Result<T>>) -> Result<T> {
    let tokio = tokio::runtime::Runtime::new()?;
    let done = tokio.block_on(async { tokio::time::timeout(DEADLINE, what).await });
    tokio.shutdown_background();
    match done {
        Ok(done) => done,
        Err(_) => bail!("it stands still"),
    }
}

/// Starts a runtime on a home, and waits until a view is complete; tells what that took, from before the start.
pub(crate) async fn catch_up(home: &Home, view_name: &str) -> Result<(Runtime, LiveView, Usage)> {
    let watch = Stopwatch::start()?;
    let runtime = home.start().await?;
    let live = view(&runtime, view_name, |_| true).await;
    caught_up(&runtime, &live).await;
    Ok((runtime, live, watch.stop()?))
}

/// Waits until a view is there that `is` accepts.
pub(crate) async fn view(runtime: &Runtime, name: &str, is: impl Fn(&LiveView) -> bool) -> LiveView {
    loop {
        // A view appears without a signal.
        match runtime.views().get(name) {
            Some(view) if is(view) => return view.clone(),
            _ => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

/// Waits until a view is complete to the present head of the log.
pub(crate) async fn caught_up(runtime: &Runtime, view: &LiveView) {
    if let Some(head) = runtime.log().head_now().last() {
        view.reached.wait_for(head).await;
    }
}

/// Measured values, in order.
#[derive(Clone, Debug)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// # Panics
    ///
    /// If there are none.
    pub(crate) fn new(values: impl IntoIterator<Item = f64>) -> Samples {
        let mut values: Vec<f64> = values.into_iter().collect();
        assert!(!values.is_empty(), "nothing was measured");
        values.sort_by(f64::total_cmp);
        Samples(values)
    }

    pub(crate) fn min(&self) -> f64 {
        self.0[0]
    }

    pub(crate) fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    pub(crate) fn median(&self) -> f64 {
        (self.0[(self.0.len() - 1) / 2] + self.0[self.0.len() / 2]) / 2.0
    }

    /// The smallest value that at least this part of all values (0 to 1) does not exceed.
    pub(crate) fn at(&self, part: f64) -> f64 {
        let rank = (part * self.0.len() as f64).ceil() as usize;
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// An empty table in Markdown, as `benches/README.md` has them.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(header);
    table
}

/// A cell of a column whose header says what was aimed at: what it is, or what was measured, and how it came out.
pub(crate) fn verdict(met: bool, what: impl std::fmt::Display) -> String {
    format!("{what}: {}", if met { "met" } else { "missed" })
}

/// With separators, as people read it: `1,032,984`.
pub(crate) fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 && !out.ends_with('-') {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// What a bench measured, with what one must know of the machine to compare it.
pub(crate) struct Report {
    name: String,
    load_before: f64,
    began: Instant,
    results: serde_json::Map<String, Value>,
}

impl Report {
    fn begin(name: &str) -> Result<Report> {
        let load_before = load_average()?;
        println!("load average of the last minute: {load_before}; other work on the machine makes the numbers worse");
        Ok(Report { name: name.to_owned(), load_before, began: Instant::now(), results: serde_json::Map::new() })
    }

    /// Keeps something for the JSON.
    pub(crate) fn add(&mut self, what: &str, measured: impl Serialize) -> Result<()> {
        self.results.insert(what.to_owned(), serde_json::to_value(measured)?);
        Ok(())
    }

    fn finish(self) -> Result<()> {
        let load_after = load_average()?;
        let cores = std::thread::available_parallelism()?.get();
        let json = json!({
            "bench": self.name,
            "when": jiff::Timestamp::now().to_string(),
            "took_seconds": self.began.elapsed().as_secs_f64(),
            "cpu": cpu_model()?,
            "cores": cores,
            "memory_mb": memory_mb()?,
            "load_average": { "before": self.load_before, "after": load_after },
            "results": self.results,
        });
        let homes = workplace().join("homes");
        if homes.exists() {
            fs::remove_dir_all(homes)?;
        }
        let path = workplace().join(format!("{}.json", self.name));
        fs::create_dir_all(workplace())?;
        fs::write(&path, serde_json::to_string_pretty(&json)?)?;
        println!("\n{}, {cores} cores; load average {} before, {load_after} after", cpu_model()?, self.load_before);
        println!("everything that was measured is in {}", path.display());
        Ok(())
    }
}

fn load_average() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split_whitespace().next().context("an empty loadavg")?.parse()?)
}

fn cpu_model() -> Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let model = text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
    Ok(model.unwrap_or("unknown").to_owned())
}

fn memory_mb() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).context("no MemTotal")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<f64>()? * 1024.0 / 1e6)
}
