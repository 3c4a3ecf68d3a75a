//! What every test needs: modules built once, a running `shadowbox`, a client, and waiting with a deadline.

pub(crate) mod history;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use proptest::test_runner::{Config, FailurePersistence, FileFailurePersistence, TestRunner};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than anything takes on a busy machine of two cores; a test that gets here has failed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// Asks until the answer is there.
pub(crate) fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begin.elapsed() < DEADLINE, "waited {DEADLINE:?} in vain for {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Runs properties: as many cases as are worth their time, or as `PROPTEST_CASES` says. A failing seed is kept beside the
/// test's file.
pub(crate) fn properties(cases: u32, file: &'static str) -> TestRunner {
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { Config::default().cases } else { cases };
    let seeds: Box<dyn FailurePersistence> = Box::new(FileFailurePersistence::WithSource("regressions"));
    let failure_persistence = Some(seeds);
    TestRunner::new(Config { cases, source_file: Some(file), failure_persistence, ..Config::default() })
}

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

/// The bytes of a module: an example, `ledger`, or a variant of it such as `ledger+tweaked`.
pub(crate) fn module(name: &str) -> Vec<u8> {
    static MODULES: OnceLock<PathBuf> = OnceLock::new();
    let directory = MODULES.get_or_init(build_modules);
    std::fs::read(directory.join(format!("{}.wasm", name.replace('-', "_")))).expect("it was built")
}

fn build_modules() -> PathBuf {
    // A directory of its own: the build of these tests holds the lock of the other one.
    let target = root().join("target/plugins");
    let built = target.join("wasm32-wasip2/plugin");
    let kept = target.join("for-tests");
    std::fs::create_dir_all(&kept).unwrap();
    let build = |arguments: &[&str]| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(root()).args(["build", "--profile", "plugin", "--target", "wasm32-wasip2", "--target-dir"]);
        let output = cargo.arg(&target).args(arguments).output().expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let examples =
        ["order-summary", "carrier-performance", "orders-across-services", "flight-board", "event-counts", "hostile"];
    build(&examples.iter().flat_map(|name| ["-p", name]).collect::<Vec<_>>());
    for name in examples {
        let file = format!("{}.wasm", name.replace('-', "_"));
        std::fs::copy(built.join(&file), kept.join(&file)).unwrap();
    }
    for variant in ["", "tweaked", "mended", "v2", "broken", "v2,broken", "columns", "stateful"] {
        build(&["-p", "ledger", "--features", variant]);
        let name = if variant.is_empty() { "ledger".to_owned() } else { format!("ledger+{variant}") };
        std::fs::copy(built.join("ledger.wasm"), kept.join(format!("{name}.wasm"))).unwrap();
    }
    kept
}

/// A module in which a text is replaced by another one of the same length wherever it occurs: another name, another
/// contract, at the price of no build.
pub(crate) fn patched(module: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = module.to_vec();
    let mut at = 0;
    let mut found = 0;
    while let Some(i) = bytes[at..].windows(from.len()).position(|window| window == from.as_bytes()) {
        bytes[at + i..at + i + from.len()].copy_from_slice(to.as_bytes());
        at += i + from.len();
        found += 1;
    }
    assert!(found > 0, "{from:?} does not occur");
    bytes
}

/// A CloudEvent as one line.
pub(crate) fn event(source: &str, event_type: &str, id: &str, seconds: i64, data: Value) -> String {
    let time = jiff::Timestamp::from_second(1_700_000_000 + seconds).unwrap();
    json!({
        "specversion": "1.0", "source": source, "type": event_type, "id": id, "subject": "s", "sequence": 1,
        "time": time.to_string(), "data": data,
    })
    .to_string()
}

/// `Moved` for the ledger, number `n` of its source.
pub(crate) fn moved(source: &str, n: i64, account: &str, amount: i64) -> String {
    event(source, "Moved", &format!("{source}-{n}"), n, json!({ "account": account, "amount": amount }))
}

/// A data directory, a plugin folder, and at times a runtime on them.
pub(crate) struct World {
    pub(crate) directory: TempDir,
    /// A command that runs the command which follows it, `setpriv` say; empty for none.
    pub(crate) through: Vec<String>,
    running: Option<(Child, String)>,
}

impl World {
    pub(crate) fn new() -> World {
        let world = World { directory: tempfile::tempdir().unwrap(), through: Vec::new(), running: None };
        std::fs::create_dir(world.plugins()).unwrap();
        world
    }

    /// One with these modules in its folder, running.
    pub(crate) fn running(modules: &[&str]) -> World {
        let mut world = World::new();
        for name in modules {
            world.drop_module(name, &module(name));
        }
        world.start();
        world
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub(crate) fn plugins(&self) -> PathBuf {
        self.directory.path().join("plugins")
    }

    /// Puts a module into the folder in one step.
    pub(crate) fn drop_module(&self, name: &str, bytes: &[u8]) {
        let temporary = self.plugins().join(format!(".{name}.part"));
        std::fs::write(&temporary, bytes).unwrap();
        std::fs::rename(temporary, self.plugins().join(format!("{name}.wasm"))).unwrap();
    }

    /// `shadowbox` with these arguments, in the directory of this world.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut words = self.through.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_shadowbox")]);
        let mut command = Command::new(words.next().expect("at least ours"));
        command.args(words).current_dir(self.directory.path()).args(arguments);
        command
    }

    /// Runs a command to its end; `--data` is given.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(arguments);
        command.arg("--data").arg(self.data()).stdin(Stdio::null()).output().unwrap()
    }

    /// The same; it must succeed. Answers its standard output.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Appends lines by the command line; answers the position of the last of them, as a header has it.
    pub(crate) fn append(&self, lines: &[String]) -> String {
        let file = self.directory.path().join("events.jsonl");
        std::fs::write(&file, lines.join("\n")).unwrap();
        let answer: Value = serde_json::from_str(&self.ok(&["append", "--json", file.to_str().unwrap()])).unwrap();
        answer["position"].to_string()
    }

    pub(crate) fn start(&mut self) {
        self.start_with(&[]);
    }

    /// Starts a runtime and waits until it says where it listens.
    pub(crate) fn start_with(&mut self, arguments: &[&str]) {
        if let Err(status) = self.try_start(arguments, None) {
            panic!("did not start: {status}\n{}", self.log());
        }
    }

    /// The same, with a fault point armed; if it ends before it listens, answers how.
    pub(crate) fn try_start(&mut self, arguments: &[&str], fault: Option<&str>) -> Result<(), ExitStatus> {
        assert!(self.running.is_none());
        let mut child = self.spawn(arguments, fault);
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let Some(address) = line.trim().split("http://").nth(1) else { return Err(child.wait().unwrap()) };
        self.running = Some((child, format!("http://{address}")));
        Ok(())
    }

    /// Starts a runtime and waits for nothing; it is the caller's.
    pub(crate) fn spawn(&self, arguments: &[&str], fault: Option<&str>) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(self.log_file()).unwrap();
        self.command(&["run", "--plugins", "plugins", "--data", "data", "--listen", "127.0.0.1:0"])
            .args(arguments)
            .envs(fault.map(|fault| ("SHADOWBOX_FAULT", fault)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// How it ended, if it has by itself.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.running.as_mut()?.0.try_wait().unwrap()?;
        self.running = None;
        Some(status)
    }

    fn log_file(&self) -> PathBuf {
        self.directory.path().join("shadowbox.log")
    }

    /// What the runtime has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// The process that runs.
    pub(crate) fn process(&self) -> u32 {
        self.running.as_ref().expect("it runs").0.id()
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        let (mut child, _) = self.running.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM; it must end well.
    pub(crate) fn stop(&mut self) {
        let status = self.try_stop();
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// The same; answers how it ended.
    pub(crate) fn try_stop(&mut self) -> ExitStatus {
        let (mut child, _) = self.running.take().expect("it runs");
        let killed = Command::new("kill").arg(child.id().to_string()).status().unwrap();
        assert!(killed.success());
        wait_for("a clean stop", || child.try_wait().unwrap())
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.running.as_ref().expect("it runs").1)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.get_with(path, &[])
    }

    pub(crate) fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let request = headers.iter().fold(agent().get(self.url(path)), |r, (name, value)| r.header(*name, *value));
        Answer::read(request.call().unwrap_or_else(|e| panic!("{path}: {e}\n{}", self.log())))
    }

    pub(crate) fn post(&self, path: &str, content_type: &str, body: &str) -> Answer {
        let request = agent().post(self.url(path)).header("content-type", content_type);
        Answer::read(request.send(body).unwrap())
    }

    pub(crate) fn put(&self, path: &str, body: &Value) -> Answer {
        let request = agent().put(self.url(path)).header("content-type", "application/json");
        Answer::read(request.send(body.to_string()).unwrap())
    }

    /// A projection's status, or null.
    pub(crate) fn projection(&self, name: &str) -> Value {
        let all = self.get("/projections").json();
        all.as_array().unwrap().iter().find(|p| p["name"] == name).cloned().unwrap_or(Value::Null)
    }

    /// Waits until a projection is as asked.
    pub(crate) fn wait_until(&self, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let begin = Instant::now();
        wait_for(what, || {
            last = self.projection(name);
            assert!(begin.elapsed() < DEADLINE - Duration::from_secs(5), "{what}: {last:#}\n{}", self.log());
            is(&last).then(|| last.clone())
        })
    }

    /// Waits until a projection has applied everything and no build is under way.
    pub(crate) fn wait_live(&self, name: &str) -> Value {
        self.wait_until(name, "the head", |p| p["state"] == "live" && p["lag_events"] == 0)
    }

    /// All rows of a view, as complete as `position` says.
    pub(crate) fn rows_at(&self, view: &str, position: &str) -> Vec<Value> {
        let headers = [("shadowbox-position", position), ("prefer", "wait=60")];
        let answer = self.get_with(&format!("/views/{view}"), &headers);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json().as_array().unwrap().clone()
    }

    /// The result of SQL, as CSV.
    pub(crate) fn query(&self, sql: &str) -> String {
        self.ok(&["query", "--format", "csv", sql])
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some((mut child, _)) = self.running.take() {
            // It may have ended; that is what the test was about then.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// None if nobody answers, or not to the end.
pub(crate) fn get(url: &str, headers: &[(&str, &str)]) -> Option<Answer> {
    let request = headers.iter().fold(agent().get(url), |r, (name, value)| r.header(*name, *value));
    Answer::try_read(request.call().ok()?)
}

/// The same for a body that is posted.
pub(crate) fn post(url: &str, content_type: &str, body: &str) -> Option<Answer> {
    Answer::try_read(agent().post(url).header("content-type", content_type).send(body).ok()?)
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(DEADLINE)).build().into()
}

/// An answer over HTTP.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    fn read(response: ureq::http::Response<ureq::Body>) -> Answer {
        Answer::try_read(response).expect("a whole answer")
    }

    fn try_read(mut response: ureq::http::Response<ureq::Body>) -> Option<Answer> {
        let text = |v: &ureq::http::HeaderValue| v.to_str().unwrap_or_default().to_owned();
        let headers = response.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect();
        let status = response.status().as_u16();
        let mut body = String::new();
        response.body_mut().as_reader().read_to_string(&mut body).ok()?;
        Some(Answer { status, headers, body })
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(n, _)| n == name).map_or("", |(_, value)| value)
    }
}
