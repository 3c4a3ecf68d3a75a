//! A dead letter tried once more, outside of the loop: what a developer needs to see the failure at home.

use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::Error;
use super::failure::{cause, encode, event_at};
use crate::config::SandboxLimits;
use crate::log::EventLog;
use crate::model::{Cause, Event};
use crate::plugin::{self, Engine, Failure, RowError, Rows};
use crate::view::{Changes, CommittedRows, DeadLetter, GenerationRecord, Table};

/// What a replay of an event showed.
pub struct Replay {
    /// The event, from the log.
    pub event: Event,
    /// The rows that the plugin asked for, in that order, each once: `{"view", "key", "row"}`, with the values by
    /// column. `row` has the columns that are not in the key; it is null if there is no such row.
    pub rows: Vec<Value>,
    /// Why it failed; None if it would be applied now.
    pub cause: Option<Cause>,
}

/// Applies the event of a dead letter on a fresh instance of the generation's module, to the rows that are committed
/// now, and throws the changes away. `data` is the data directory; whether a runtime works on it does not matter.
///
/// # Errors
///
/// If the module, the event or a row cannot be read. That the event fails is no error.
pub fn replay(
    data: &Path,
    sandbox: SandboxLimits,
    log: &EventLog,
    generation: &GenerationRecord,
    letter: &DeadLetter,
) -> Result<Replay, Error> {
    let event = event_at(log, letter.event.position)?;
    if event.forgotten {
        let Event { position, event, .. } = event;
        return Err(Error::Host(format!(
            "the content of event {:?} at position {position} is forgotten, so nobody can try it again; discard the letter",
            event.id
        )));
    }
    let bytes = plugin::read(&data.join("modules").join(format!("{}.wasm", generation.module)))?;
    let module = Engine::new(Some(&data.join("cache")), sandbox)?.admit(&bytes)?;
    let tables: Arc<[Table]> = generation.manifest.views.iter().map(Table::new).collect();
    let committed = CommittedRows::open(&generation.file, tables.clone())?;
    let recorder = Arc::new(Mutex::new(Recorder { committed, asked: Vec::new() }));
    let host = |failure: Failure| Error::Host(failure.to_string());
    let mut instance = module.instantiate(recorder.clone()).map_err(host)?;
    let applied = instance.apply(&encode(&module.manifest, std::slice::from_ref(&event)));
    let failure = match applied {
        Ok(changes) => Changes::default().absorb(&tables, changes).err().map(|message| Failure::Invalid { message }),
        Err(failure @ Failure::Host(_)) => return Err(host(failure)),
        Err(failure) => Some(failure),
    };
    let cause = failure.map(|failure| cause(&module.hash, &failure, instance.details()));
    let asked = std::mem::take(&mut recorder.lock().expect("no panics while it is held").asked);
    let rows = asked.iter().map(|(view, key, row)| tables[*view as usize].json(key, row.as_deref())).collect();
    Ok(Replay { event, rows, cause })
}

/// Answers from a file, and keeps what was asked.
struct Recorder {
    committed: CommittedRows,
    asked: Vec<(u32, Vec<u8>, Option<Vec<u8>>)>,
}

impl Rows for Recorder {
    fn get(&mut self, view: u32, key: &[u8]) -> Result<Option<Vec<u8>>, RowError> {
        let row = match self.committed.get(view, key) {
            Ok(row) => row.map_err(RowError::Plugin)?,
            Err(error) => return Err(RowError::Host(error.to_string())),
        };
        if !self.asked.iter().any(|(v, k, _)| *v == view && k == key) {
            self.asked.push((view, key.to_vec(), row.clone()));
        }
        Ok(row)
    }
}
