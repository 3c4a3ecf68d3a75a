//! The engine: settings of the sandbox, admission of modules, the cache of compiled code.

use std::hash::{Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use wasmtime::component::{Component, HasSelf, Linker, Resource};
use wasmtime::{Config, OptLevel, WasmBacktraceDetails};
use wasmtime_wasi::p2::DynPollable;

use super::instance::{Host, Instance, bindings};
use super::{Error, Failure};
use crate::config::SandboxLimits;
use crate::fault;
use crate::manifest::{CONTRACT, Manifest, hex};
use crate::model::cut;

/// How fine deadlines are. Each tick costs a wake-up of one thread; no deadline needs to be more exact.
const TICK: Duration = Duration::from_millis(10);

/// Compiles and admits modules. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    engine: wasmtime::Engine,
    linker: Linker<Host>,
    cache: Option<PathBuf>,
    sandbox: SandboxLimits,
}

/// An admitted module: compiled, described, valid. Cheap to clone.
#[derive(Clone)]
pub struct Module {
    /// SHA-256 of the file's bytes, hexadecimal.
    pub hash: String,
    /// What it says of itself.
    pub manifest: Manifest,
    pre: bindings::PluginPre<Host>,
    sandbox: SandboxLimits,
}

/// SHA-256 of a module's bytes, hexadecimal: its name wherever modules are stored or shown.
pub fn hash(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

impl Engine {
    /// `cache` is a directory of ours for compiled code; None compiles every time.
    ///
    /// # Errors
    ///
    /// If the cache's directory cannot be made.
    pub fn new(cache: Option<&Path>, sandbox: SandboxLimits) -> Result<Engine, Error> {
        if let Some(directory) = cache {
            std::fs::create_dir_all(directory).and_then(|()| sweep(directory)).map_err(Error::Cache)?;
        }
        let mut config = Config::new();
        config
            // 83 ns a call instead of 287; nothing here is asynchronous inside of a guest.
            .concurrency_support(false)
            .cranelift_opt_level(OptLevel::Speed)
            .epoch_interruption(true)
            // Different NaN bits on different machines would be different rows.
            .cranelift_nan_canonicalization(true)
            // Files and lines in backtraces, of modules that have them.
            .wasm_backtrace_details(WasmBacktraceDetails::Enable)
            .wasm_relaxed_simd(false)
            .wasm_memory64(false)
            // Bounds checks by guard pages: explicit ones cost half as much again.
            .memory_reservation(4 << 30)
            .memory_init_cow(true);
        let engine = wasmtime::Engine::new(&config).expect("the settings above do not depend on input");
        let mut linker = Linker::new(&engine);
        wasmtime_wasi::p2::add_to_linker_sync(&mut linker).expect("an empty linker takes WASI");
        bindings::Plugin::add_to_linker::<_, HasSelf<Host>>(&mut linker, |host| host)
            .expect("names do not clash with WASI");
        forbid_waiting(&mut linker);
        let ticking = engine.weak();
        std::thread::Builder::new()
            .name("epoch".into())
            .spawn(move || {
                // Ends with the last engine, one tick late.
                while let Some(engine) = ticking.upgrade() {
                    engine.increment_epoch();
                    drop(engine);
                    std::thread::sleep(TICK);
                }
            })
            .expect("a thread can be started");
        Ok(Engine { engine, linker, cache: cache.map(Path::to_owned), sandbox })
    }

    /// Turns a file's bytes into a module that can be run: checks what it is, compiles it (or finds it compiled),
    /// asks it to describe itself, and validates what it says. Blocks for as long as compiling takes.
    pub fn admit(&self, bytes: &[u8]) -> Result<Module, Error> {
        match bytes {
            [0, b'a', b's', b'm', 1, 0, 0, 0, ..] => return Err(Error::CoreModule),
            [0, b'a', b's', b'm', _, _, 1, 0, ..] => {}
            _ => return Err(Error::NotWasm),
        }
        let hash = hash(bytes);
        let component = self.compile(bytes, &hash)?;
        self.check_contract(&component)?;
        let compile = |error: wasmtime::Error| Error::Compile(cut(format!("{error:#}")));
        let pre = self.linker.instantiate_pre(&component).map_err(compile)?;
        let pre = bindings::PluginPre::new(pre).map_err(compile)?;
        let describe = || -> Result<String, Failure> { Instance::new(&pre, self.sandbox, None)?.describe() };
        let manifest = Manifest::parse(&describe().map_err(Error::Describe)?)?;
        Ok(Module { hash, manifest, pre, sandbox: self.sandbox })
    }

    /// The version is in the name of the exported interface, so that it is known before anything runs.
    fn check_contract(&self, component: &Component) -> Result<(), Error> {
        const NAME: &str = "shadowbox:plugin/projection@";
        let exports = component.component_type();
        let mut exports = exports.exports(&self.engine).map(|(name, _)| name.to_owned());
        match exports.find_map(|name| name.strip_prefix(NAME).map(str::to_owned)) {
            Some(version) if version == CONTRACT => Ok(()),
            Some(found) => Err(Error::Contract { found: cut(found) }),
            None => Err(Error::NoProjection { expected: format!("{NAME}{CONTRACT}") }),
        }
    }

    fn compile(&self, bytes: &[u8], hash: &str) -> Result<Component, Error> {
        let compile = || {
            Component::from_binary(&self.engine, bytes).map_err(|error| {
                // A file that is still being written ends too early; the folder waits for the rest of it.
                let error = format!("{error:#}");
                let ends = error.contains("unexpected end") || error.contains("out of bounds");
                if ends { Error::NotWasm } else { Error::Compile(cut(error)) }
            })
        };
        let Some(directory) = &self.cache else { return compile() };
        let file = directory.join(format!("{hash}-{:016x}", self.compatibility()));
        if let Some(component) = self.load(&file) {
            return Ok(component);
        }
        let component = compile()?;
        let code = component.serialize().map_err(|e| Error::Compile(cut(format!("{e:#}"))))?;
        if let Err(error) = store(directory, &file, &code) {
            // A disk that is full is no fault of the module's; without the cache it is only slower to start.
            tracing::warn!(?file, %error, "cannot keep the compiled module");
        }
        Ok(component)
    }

    /// Compiled code depends on the engine's version and settings and on this processor.
    fn compatibility(&self) -> u64 {
        #[expect(deprecated, reason = "the one hasher of std whose result is the same in every process")]
        let mut hasher = std::hash::SipHasher::new();
        self.engine.precompile_compatibility_hash().hash(&mut hasher);
        hasher.finish()
    }

    /// None if there is no such file, or not the one that was stored: then it is compiled again.
    fn load(&self, file: &Path) -> Option<Component> {
        let bytes = std::fs::read(file).ok()?;
        let (digest, code) = bytes.split_at_checked(32)?;
        if *digest != *Sha256::digest(code) {
            tracing::warn!(?file, "a compiled module is damaged; compiling it again");
            return None;
        }
        // SAFETY: the file is in our data directory, is what `store` wrote (the digest says so), and `store` writes
        // only what this engine serialized. A .cwasm from anywhere else is never loaded.
        #[expect(unsafe_code, reason = "wasmtime cannot check compiled code; where it comes from is checked above")]
        let component = unsafe { Component::deserialize(&self.engine, code) };
        component.ok()
    }
}

/// A guest that sleeps would hold its thread in the host, where no deadline reaches it. Its clocks stand still, so there
/// is nothing that it could wait for.
fn forbid_waiting(linker: &mut Linker<Host>) {
    let waits = || wasmtime::Error::msg("a plugin cannot wait: its clocks stand still");
    linker.allow_shadowing(true);
    let mut poll = linker.instance("wasi:io/poll@0.2.12").expect("WASI is linked");
    poll.func_wrap("[method]pollable.block", move |_, (_,): (Resource<DynPollable>,)| -> wasmtime::Result<()> {
        Err(waits())
    })
    .and_then(|()| {
        poll.func_wrap("poll", move |_, (_,): (Vec<Resource<DynPollable>>,)| -> wasmtime::Result<(Vec<u32>,)> {
            Err(waits())
        })
    })
    .expect("both are there to be shadowed");
    linker.allow_shadowing(false);
}

/// Removes what writers left that were killed. There are no others: who runs has the data directory.
fn sweep(directory: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            // What is gone already is as good; what cannot be removed costs only space.
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// How files begin that are not whole yet.
const TEMPORARY: &str = ".tmp";

/// Appears whole or not at all.
fn store(directory: &Path, file: &Path, code: &[u8]) -> std::io::Result<()> {
    let mut temporary = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(directory)?;
    temporary.write_all(&Sha256::digest(code))?;
    temporary.write_all(code)?;
    fault::fail("cache.written", &file.to_string_lossy())?;
    temporary.persist(file)?;
    fault::point("cache.stored", &file.to_string_lossy());
    Ok(())
}

impl Module {
    /// A fresh instance that reads rows through `rows`.
    pub fn instantiate(&self, rows: std::sync::Arc<std::sync::Mutex<dyn super::Rows>>) -> Result<Instance, Failure> {
        Instance::new(&self.pre, self.sandbox, Some(rows))
    }
}

/// How many ticks make a deadline; at least the one that may be just over.
pub(super) fn ticks(deadline: Duration) -> u64 {
    (deadline.as_millis() / TICK.as_millis()) as u64 + 1
}
