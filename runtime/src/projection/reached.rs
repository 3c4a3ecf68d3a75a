//! To where a generation's rows are complete, for readers.

use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::watch;

use crate::log::Seen;
use crate::model::Position;
use crate::view::Origin;

/// Follows one generation, whether somebody works on it or not. What it says never goes back.
#[derive(Clone)]
pub struct Reached {
    state: Arc<Mutex<State>>,
    /// The committed checkpoint, and everything else that changes the answer but the head of the log.
    moved: Arc<watch::Sender<Option<Position>>>,
}

struct State {
    told: Option<Position>,
    /// Of the worker that works on it.
    seen: Option<Seen>,
    origin: Origin,
}

impl Reached {
    /// Nobody works on the generation; it is complete to its checkpoint.
    pub(super) fn new(checkpoint: Option<Position>, origin: Origin) -> Reached {
        Reached {
            state: Arc::new(Mutex::new(State { told: checkpoint, seen: None, origin })),
            moved: Arc::new(watch::Sender::new(checkpoint)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panics while it is held")
    }

    /// A worker has opened it.
    pub(super) fn begin(&self, seen: Seen) {
        self.state().seen = Some(seen);
        self.moved.send_modify(|_| {});
    }

    /// What the rows are made from is known anew.
    pub fn made_from(&self, origin: Origin) {
        self.state().origin = origin;
    }

    /// What the rows are made from.
    pub fn origin(&self) -> Origin {
        self.state().origin.clone()
    }

    /// A commit has ended.
    pub(super) fn commit(&self, checkpoint: Option<Position>) {
        self.moved.send_replace(checkpoint);
    }

    /// The worker has ended. The answer is what it was; what is appended from now on does not count.
    pub(super) fn end(&self) {
        let mut state = self.state();
        state.tell();
        state.seen = None;
    }

    /// The committed checkpoint.
    pub fn checkpoint(&self) -> Option<Position> {
        *self.moved.borrow()
    }

    /// The position to which the rows are complete that are committed now: at least the checkpoint, and the head of the
    /// log if nothing that is wanted comes after that.
    pub fn now(&self) -> Option<Position> {
        let checkpoint = self.checkpoint();
        let mut state = self.state();
        state.told = state.told.max(checkpoint);
        state.tell()
    }

    /// What waits for the worker, and since when; None if there is no worker.
    pub fn behind(&self) -> Option<crate::log::Behind> {
        self.state().seen.as_ref().map(Seen::behind)
    }

    /// Returns once the rows are complete to a position.
    pub async fn wait_for(&self, position: Position) {
        let mut moved = self.moved.subscribe();
        loop {
            moved.borrow_and_update();
            let head = self.state().seen.as_ref().map(Seen::head);
            if self.now() >= Some(position) {
                return;
            }
            match head {
                Some(mut head) => {
                    // What is seen of the head must not be held while something else is waited for.
                    let appended = async { drop(head.wait_for(|head| head.last() >= Some(position)).await) };
                    tokio::select! {
                        _ = moved.changed() => {}
                        () = appended => {
                            // The position is in the log; from here on only commits count.
                            if self.now() >= Some(position) {
                                return;
                            }
                            let _ = moved.changed().await;
                        }
                    }
                }
                // The sender lives as long as this.
                None => drop(moved.changed().await),
            }
        }
    }
}

impl State {
    fn tell(&mut self) -> Option<Position> {
        self.told = self.told.max(self.seen.as_ref().and_then(Seen::complete));
        self.told
    }
}
