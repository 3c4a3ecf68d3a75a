//! One sandboxed instance: what it may use, what it sees, and what becomes of its failures.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use wasmtime::component::ResourceTable;
use wasmtime::{ResourceLimiter, Store, Trap, WasmBacktrace};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};
use wasmtime_wasi::random::Deterministic;
use wasmtime_wasi::{HostMonotonicClock, HostWallClock, I32Exit, WasiCtx, WasiCtxView, WasiView};

use super::Failure;
use super::engine::ticks;
use crate::config::{SandboxLimits, limits};
use crate::model::cut;

pub(super) mod bindings {
    wasmtime::component::bindgen!({
        path: "../wit",
        world: "plugin",
        imports: { default: trappable },
    });
}

use bindings::shadowbox::plugin::host;

/// The rows that a plugin can ask for: those of the last commit and the changes after it.
pub trait Rows: Send {
    /// The row of view `view` under the encoded `key`.
    ///
    /// # Errors
    ///
    /// [`RowError::Plugin`] for a view that does not exist or a key that is not one: the plugin's fault.
    /// [`RowError::Host`] if the row cannot be read.
    fn get(&mut self, view: u32, key: &[u8]) -> Result<Option<Vec<u8>>, RowError>;
}

/// Why a row could not be given to a plugin.
#[derive(Debug)]
pub enum RowError {
    /// The plugin asked for nonsense.
    Plugin(String),
    /// The host could not.
    Host(String),
}

/// What an instance holds on the host's side.
pub(super) struct Host {
    wasi: WasiCtx,
    table: ResourceTable,
    rows: Option<Arc<Mutex<dyn Rows>>>,
    output: Output,
    limits: Memory,
    /// Set if a host call failed for a reason that is not the plugin's.
    failed: Option<String>,
    /// When the running call has had its time. The epoch ends it in the guest; a host call has to look for itself.
    until: Instant,
    details: Details,
}

/// What a call left behind beside its result.
#[derive(Debug, Default)]
pub struct Details {
    /// Where the plugin trapped: its functions, the innermost first.
    pub backtrace: Option<String>,
    /// What it printed.
    pub output: Option<String>,
}

impl Host {
    fn row(&mut self, view: u32, key: &[u8]) -> wasmtime::Result<Option<Vec<u8>>> {
        let Some(rows) = &self.rows else { wasmtime::bail!("get was called from describe") };
        let row = rows.lock().expect("a panic would have ended the process").get(view, key);
        row.map_err(|error| match error {
            RowError::Plugin(message) => wasmtime::Error::msg(message),
            RowError::Host(message) => {
                self.failed = Some(message.clone());
                wasmtime::Error::msg(message)
            }
        })
    }
}

impl host::Host for Host {
    fn get(&mut self, view: u32, key: Vec<u8>) -> wasmtime::Result<Option<Vec<u8>>> {
        self.row(view, &key)
    }

    /// Reads key by key and writes row by row: what the plugin declares costs nothing, and one call costs no more than
    /// the limits say.
    fn get_many(&mut self, view: u32, keys: Vec<u8>) -> wasmtime::Result<Vec<u8>> {
        let malformed = |error: &dyn std::fmt::Display| {
            wasmtime::Error::msg(format!("get-many: the keys are not an array of bin: {error}"))
        };
        let mut rest = keys.as_slice();
        let count = rmp::decode::read_array_len(&mut rest).map_err(|e| malformed(&e))?;
        if count > limits::ASKED_KEYS {
            wasmtime::bail!("get-many: {count} keys; the limit for one call is {}", limits::ASKED_KEYS);
        }
        let mut rows = Vec::new();
        let written = "writing to memory cannot fail";
        rmp::encode::write_array_len(&mut rows, count).expect(written);
        for _ in 0..count {
            if Instant::now() >= self.until {
                return Err(Trap::Interrupt.into());
            }
            let length = rmp::decode::read_bin_len(&mut rest).map_err(|e| malformed(&e))?;
            let (key, others) =
                rest.split_at_checked(length as usize).ok_or_else(|| malformed(&"it ends too early"))?;
            rest = others;
            match self.row(view, key)? {
                Some(row) => rmp::encode::write_bin(&mut rows, &row).expect(written),
                None => rmp::encode::write_nil(&mut rows).expect(written),
            }
            if rows.len() > limits::ASKED_BYTES {
                wasmtime::bail!(
                    "get-many: the rows have more than {} bytes, the limit for one call",
                    limits::ASKED_BYTES
                );
            }
        }
        Ok(rows)
    }
}

impl WasiView for Host {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

/// Bounds memory, and remembers that it did: what a guest makes of a refused allocation is an unspecific trap.
struct Memory {
    limit: usize,
    exceeded: bool,
    /// Bytes that the guest has now; a linear memory never shrinks.
    size: usize,
}

/// Bounds the number of memories, tables and core instances in one component; ours have one memory and a few shims.
const PARTS: usize = 32;

/// Streams, clocks and the like that a guest may hold of the host at one time; std has three.
const RESOURCES: usize = 1_000;

/// Elements of all tables together; function tables of large plugins have some thousands.
const TABLE_ELEMENTS: usize = 100_000;

impl ResourceLimiter for Memory {
    fn memory_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        self.exceeded |= desired > self.limit;
        if desired <= self.limit {
            self.size = desired;
        }
        Ok(desired <= self.limit)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE_ELEMENTS)
    }

    fn instances(&self) -> usize {
        PARTS
    }

    fn tables(&self) -> usize {
        PARTS
    }

    fn memories(&self) -> usize {
        PARTS
    }
}

/// Time stands still at the epoch: rows are a function of events alone.
struct Stopped;

impl HostWallClock for Stopped {
    fn resolution(&self) -> Duration {
        Duration::from_nanos(1)
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

impl HostMonotonicClock for Stopped {
    fn resolution(&self) -> u64 {
        1
    }

    fn now(&self) -> u64 {
        0
    }
}

/// Standard output and standard error of a plugin, up to a limit for each call.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Captured>>);

#[derive(Default)]
struct Captured {
    bytes: Vec<u8>,
    dropped: usize,
}

impl Output {
    /// What was written since the last call.
    fn take(&self) -> Option<String> {
        let captured = std::mem::take(&mut *self.0.lock().expect("no panics while it is held"));
        let mut text = String::from_utf8_lossy(&captured.bytes).trim().to_owned();
        if captured.dropped > 0 {
            text.push_str(&format!(" [and {} more bytes]", captured.dropped));
        }
        (!text.is_empty()).then_some(text)
    }
}

impl IsTerminal for Output {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Output {
    fn async_stream(&self) -> Box<dyn tokio::io::AsyncWrite + Send + Sync> {
        // Only the second version of WASI is linked, which takes the other one.
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

impl OutputStream for Output {
    fn write(&mut self, bytes: bytes::Bytes) -> StreamResult<()> {
        let mut captured = self.0.lock().expect("no panics while it is held");
        let room = limits::PLUGIN_OUTPUT_BYTES - captured.bytes.len();
        let kept = bytes.len().min(room);
        captured.bytes.extend_from_slice(&bytes[..kept]);
        captured.dropped += bytes.len() - kept;
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(64 << 10)
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {}
}

/// A plugin in its sandbox. It fails at most once: after an error it must be dropped.
pub struct Instance {
    store: Store<Host>,
    plugin: bindings::Plugin,
    deadline: Duration,
}

impl Instance {
    pub(super) fn new(
        pre: &bindings::PluginPre<Host>,
        sandbox: SandboxLimits,
        rows: Option<Arc<Mutex<dyn Rows>>>,
    ) -> Result<Instance, Failure> {
        let output = Output::default();
        // Nothing of the host shows: no files, environment, arguments or sockets are given, and what std insists on
        // is constant.
        let wasi = WasiCtx::builder()
            .stdout(output.clone())
            .stderr(output.clone())
            .wall_clock(Stopped)
            .monotonic_clock(Stopped)
            .secure_random(Deterministic::new(vec![42]))
            .insecure_random(Deterministic::new(vec![42]))
            .insecure_random_seed(42)
            .max_random_size(limits::RANDOM_BYTES)
            .allow_tcp(false)
            .allow_udp(false)
            .allow_ip_name_lookup(false)
            .build();
        let limits = Memory { limit: sandbox.memory, exceeded: false, size: 0 };
        let until = Instant::now() + sandbox.deadline;
        let mut table = ResourceTable::new();
        table.set_max_capacity(RESOURCES);
        let host = Host { wasi, table, rows, output, limits, failed: None, until, details: Details::default() };
        let mut store = Store::new(pre.engine(), host);
        store.set_max_component_handles(RESOURCES);
        store.limiter(|host| &mut host.limits);
        store.set_hostcall_fuel(limits::CHANGES_BYTES);
        // A core module may have a start function, which runs now.
        store.set_epoch_deadline(ticks(sandbox.deadline));
        let plugin = pre.instantiate(&mut store).map_err(|error| explain(error, &mut store, sandbox.deadline))?;
        Ok(Instance { store, plugin, deadline: sandbox.deadline })
    }

    /// The manifest's JSON.
    pub(super) fn describe(&mut self) -> Result<String, Failure> {
        self.begin_call();
        let result = self.plugin.shadowbox_plugin_projection().call_describe(&mut self.store);
        result.map_err(|error| explain(error, &mut self.store, self.deadline))
    }

    /// Bytes of linear memory that it has; so much it needed at most.
    pub fn memory(&self) -> usize {
        self.store.data().limits.size
    }

    /// Hands a batch over and returns the encoded changes. What the plugin printed goes to the log.
    pub fn apply(&mut self, batch: &[u8]) -> Result<Vec<u8>, Failure> {
        self.begin_call();
        let result = self.plugin.shadowbox_plugin_projection().call_apply(&mut self.store, batch);
        let changes = match result {
            Ok(Ok(changes)) => changes,
            Ok(Err(failure)) => {
                let host = self.store.data_mut();
                host.details.output = host.output.take();
                return Err(Failure::Refused { event: failure.event, message: cut(failure.message) });
            }
            Err(error) => return Err(explain(error, &mut self.store, self.deadline)),
        };
        if let Some(output) = self.store.data().output.take() {
            tracing::info!(%output, "the plugin printed");
            self.store.data_mut().details.output = Some(output);
        }
        Ok(changes)
    }

    fn begin_call(&mut self) {
        self.store.set_epoch_deadline(ticks(self.deadline));
        let host = self.store.data_mut();
        host.until = Instant::now() + self.deadline;
        host.details = Details::default();
    }

    /// What the last `apply` left behind.
    pub fn details(&mut self) -> Details {
        std::mem::take(&mut self.store.data_mut().details)
    }
}

/// wasmtime's words when a call hands over more bytes than [`limits::CHANGES_BYTES`]; it has no public type for that.
const OUT_OF_HOSTCALL_FUEL: &str = "fuel allocated for hostcalls";

/// What a trap means to a person.
fn explain(error: wasmtime::Error, store: &mut Store<Host>, deadline: Duration) -> Failure {
    let host = store.data_mut();
    if let Some(message) = host.failed.take() {
        return Failure::Host(message);
    }
    let output = host.output.take();
    host.details = Details { backtrace: error.downcast_ref().map(backtrace), output: output.clone() };
    if host.limits.exceeded {
        return Failure::Memory { megabytes: host.limits.limit >> 20 };
    }
    if let Some(I32Exit(code)) = error.downcast_ref() {
        return Failure::Exit { code: *code };
    }
    if let Some(Trap::Interrupt) = error.downcast_ref() {
        return Failure::Deadline { milliseconds: deadline.as_millis() };
    }
    // The outermost message is a backtrace of the guest, the innermost the reason. What std prints when a guest
    // panics says more than the trap that follows.
    let mut reason = cut(error.root_cause().to_string());
    if let Some(Trap::MemoryOutOfBounds) = error.downcast_ref() {
        // A guest's stack is at the bottom of its memory.
        reason.push_str("; a wild pointer does that, and recursion that is too deep");
    }
    if reason.contains(OUT_OF_HOSTCALL_FUEL) {
        return Failure::TooManyChanges;
    }
    let message = match output {
        Some(output) => format!("{output} ({reason})"),
        None => reason,
    };
    Failure::Trap { message }
}

/// The guest's functions, one a line, without what is the same in every one.
fn backtrace(trace: &WasmBacktrace) -> String {
    let text = trace.to_string();
    // The first line only says that this is a backtrace.
    text.split_once('\n').map_or(text.as_str(), |(_, frames)| frames).to_owned()
}
