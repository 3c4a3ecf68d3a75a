//! Shadowbox: a host runtime that tails event logs and feeds the events to sandboxed WebAssembly plugins.
//!
//! Each plugin is a *projection*: it folds events into *views*, tables that anyone can query. This crate is the runtime
//! as a library; the binary `shadowbox` is its command line. In reading order:
//!
//! - [`model`]: positions, times, checkpoints, events and batches: the words that every other module uses.
//! - [`manifest`]: what a plugin declares about itself.
//! - [`config`]: configuration, and every limit with its reason.
//! - [`fault`]: the steps at which tests let the process die or an operation fail.
//! - [`log`]: where events come from: one sequence of all sources, whose order is decided once, for everybody.
//! - [`plugin`]: all of wasmtime: the engine, one sandboxed instance, the watched folder.
//! - [`view`]: rows, the files that hold them, the only transaction that changes them, and queries.
//! - [`projection`]: where these three meet: the loop read, apply, commit, and what happens to generations.
//! - [`supervisor`]: what should run against what runs; the handle on a running Shadowbox.
//! - [`proof`]: whether a live view is the fold of the log, and what another module would make of it.
//! - [`http`]: queries, events in, status.
//!
//! # Invariants
//!
//! 1. Rows and checkpoint change in one transaction, by one function ([`view::Generation::commit`]), which compares the
//!    stored checkpoint with the one it expects. Whoever is behind the fence loses, loudly. A commit of unknown outcome
//!    is never retried: the generation is opened anew, and what is found there counts.
//! 2. A view is a pure function of the log and its module. The log decides the order of events, so a position is one
//!    number; a plugin sees no clock, no randomness, no files, no network and no batch boundaries. Guest memory is only a
//!    cache; any instance may be dropped between two batches.
//!    What rows lack of the log as it was appended (content that was forgotten or is not kept, damage that was passed over)
//!    is kept with them ([`view::Origin`]), and nothing that was read before something was forgotten is committed after the
//!    file was next opened.
//! 3. Nothing is skipped in silence. On any failure the default is to stop that projection at that event, loudly, and
//!    to leave the others alone.
//! 4. Every queue, batch, retry, deadline, memory and answer has a limit in [`config`].
//! 5. Only `plugin/` names wasmtime, only `log/` and `view/` name a database, only `http/` names axum, only `main.rs`
//!    and `cli/` print.
//! 6. [`projection::lifecycle`] has no clock, no I/O, no async.
//! 7. Reload and rebuild are one mechanism: begin a generation, catch up, promote it in one step, drop the old one.
//! 8. Modules depend downwards: `main`, then `http` and `proof`, then `supervisor`, then `projection`, then `plugin`,
//!    `view` and `log`, which never name each other, then `model`, `manifest` and `config`.

pub mod config;
pub mod fault;
pub mod http;
pub mod log;
pub mod manifest;
pub mod model;
pub mod plugin;
pub mod projection;
pub mod proof;
pub mod supervisor;
pub mod view;
