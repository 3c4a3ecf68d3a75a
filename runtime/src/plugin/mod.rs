//! Plugins: all of wasmtime, narrowed to what a projection needs.
//!
//! [`Engine`] turns the bytes of a file into an admitted [`Module`]; a [`Module`] makes [`Instance`]s; an [`Instance`]
//! applies batches until it fails once, and is dropped then. [`Folder`] watches where modules are dropped.

mod engine;
mod folder;
mod instance;

use std::path::Path;

pub use engine::{Engine, Module, hash};
pub use folder::{Folder, Found, look};
pub use instance::{Details, Instance, RowError, Rows};

use crate::config::{SandboxLimits, limits};
use crate::manifest::{self, Manifest};

/// Why a module is refused: a sentence for whoever dropped it.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Error {
    #[error("cannot read {0:?}: {1}")]
    Read(std::path::PathBuf, std::io::Error),
    #[error("the file has {bytes} bytes; the limit for a module is {limit}")]
    TooLarge { bytes: u64, limit: u64 },
    #[error(
        "it is not a WebAssembly file, or only a part of one; build it with: cargo build --release --target wasm32-wasip2"
    )]
    NotWasm,
    #[error(
        "it is a core WebAssembly module, not a component; build it with: cargo build --release --target wasm32-wasip2"
    )]
    CoreModule,
    #[error(
        "it is built for contract {found}; this runtime speaks {contract}; rebuild it with the SDK of this version",
        contract = manifest::CONTRACT
    )]
    Contract { found: String },
    #[error(
        "it is a component, but no projection: it does not export {expected}; use #[projection] of shadowbox-plugin"
    )]
    NoProjection { expected: String },
    #[error("it does not compile or asks for something that plugins do not get: {0}")]
    Compile(String),
    #[error("describe failed: {0}")]
    Describe(Failure),
    #[error("{0}")]
    Manifest(#[from] manifest::Error),
    #[error("the module cannot be stored as {0:?}: {1}")]
    Store(std::path::PathBuf, std::io::Error),
    #[error("the cache of compiled modules: {0}")]
    Cache(std::io::Error),
}

/// Why a call into a plugin failed. The instance is of no use afterwards.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Failure {
    /// The plugin said so; the only failure that knows its event.
    #[error("{message}")]
    Refused { event: u32, message: String },
    #[error("the plugin ran for more than {milliseconds} ms (sandbox.deadline_ms)")]
    Deadline { milliseconds: u128 },
    #[error("the plugin wanted more than {megabytes} MB of memory (sandbox.memory_mb)")]
    Memory { megabytes: usize },
    #[error("the plugin called exit({code})")]
    Exit { code: i32 },
    /// Everything else that ends a guest: a panic, a wild pointer, a host call with a wrong argument.
    #[error("the plugin trapped: {message}")]
    Trap { message: String },
    /// More than the host takes in one call: changes, in all likelihood, or arguments of its own calls.
    #[error(
        "the plugin handed over more than {} MiB in one call; its changes are too many, or too large",
        limits::CHANGES_BYTES >> 20
    )]
    TooManyChanges,
    /// It returned changes that are not rows of its views.
    #[error("the plugin returned changes that are not valid: {message}")]
    Invalid { message: String },
    /// Not the plugin's fault: a row that it asked for could not be read.
    #[error("a row could not be read: {0}")]
    Host(String),
}

/// Admits a file as `run` would, without running it further.
///
/// # Errors
///
/// Says why the runtime would refuse the file.
pub fn check(file: &Path, sandbox: &SandboxLimits) -> Result<(Manifest, String), Error> {
    let bytes = read(file)?;
    let module = Engine::new(None, *sandbox)?.admit(&bytes)?;
    Ok((module.manifest, module.hash))
}

/// Reads a module file, once and bounded.
pub(crate) fn read(file: &Path) -> Result<Vec<u8>, Error> {
    let failed = |error| Error::Read(file.to_owned(), error);
    let bytes = std::fs::metadata(file).map_err(failed)?.len();
    if bytes > limits::MODULE_BYTES {
        return Err(Error::TooLarge { bytes, limit: limits::MODULE_BYTES });
    }
    std::fs::read(file).map_err(failed)
}
