//! Who follows the log, how much of it waits for each, and since when.
//!
//! An append is looked at once for all followers, by its sources and types. Only those that want one of its events are
//! woken; for the others the log has got longer, and they are complete to its new head without having moved.

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use tokio::sync::watch;

use super::Counts;
use super::names::Names;
use super::select::Select;
use crate::model::{Position, Time};

/// How far the log goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The position of the next event; so many there are.
    pub next: u64,
    /// When the first one was appended; [`Time::EPOCH`] if there is none.
    pub first: Time,
    /// When the newest one was appended; [`Time::EPOCH`] if there is none.
    pub appended: Time,
}

impl Head {
    /// The position of the newest event.
    pub fn last(self) -> Option<Position> {
        self.next.checked_sub(1).map(Position)
    }
}

/// What waits for a follower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Behind {
    /// Events that are wanted and not committed.
    pub events: u64,
    /// When the first of them was appended, at the earliest; None if there are none.
    pub since: Option<Time>,
}

struct State {
    /// Events that were wanted since it began, and those of them that are committed.
    wanted: u64,
    taken: u64,
    /// When the first one was appended that made it be behind.
    since: Option<Time>,
    /// The committed checkpoint.
    checkpoint: Option<Position>,
}

struct Follower {
    select: Mutex<Select>,
    state: Mutex<State>,
    /// Events that were wanted.
    wake: watch::Sender<u64>,
}

struct Board {
    head: Head,
    followers: Vec<Weak<Follower>>,
}

/// The head, and everybody who follows.
pub(super) struct Followers {
    board: Mutex<Board>,
    head: watch::Sender<Head>,
}

impl Followers {
    pub(super) fn new(head: Head) -> Followers {
        Followers { board: Mutex::new(Board { head, followers: Vec::new() }), head: watch::Sender::new(head) }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().expect("no panics while it is held")
    }

    pub(super) fn head(&self) -> Head {
        *self.head.borrow()
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Head> {
        self.head.subscribe()
    }

    /// The log goes on to `head` now. `count` says what is in the part that nobody has been told of.
    pub(super) fn publish<E>(
        &self,
        head: Head,
        names: &Names,
        count: impl FnOnce(u64) -> Result<Counts, E>,
    ) -> Result<(), E> {
        let mut board = self.board();
        if head.next <= board.head.next {
            return Ok(());
        }
        board.followers.retain(|follower| follower.strong_count() > 0);
        if !board.followers.is_empty() {
            let counts = count(board.head.next)?;
            for follower in board.followers.iter().filter_map(Weak::upgrade) {
                follower.add(&counts, head.appended, names);
            }
        }
        let first = if board.head.next == 0 { head.first } else { board.head.first };
        board.head = Head { first, ..head };
        // Whoever waits for a position asks the followers next, so those come first.
        self.head.send_replace(board.head);
        Ok(())
    }

    /// Begins to follow after a checkpoint. `count` says what is between two positions.
    pub(super) fn follow<E>(
        self: &Arc<Self>,
        mut select: Select,
        checkpoint: Option<Position>,
        names: &Names,
        count: impl Fn(u64, u64) -> Result<Counts, E>,
    ) -> Result<Following, E> {
        let begin = checkpoint.map_or(0, |p| p.0 + 1);
        let seen = self.board().head;
        // The long part without a lock, the rest with it.
        let mut wanted = select.count(&count(begin, seen.next)?, names);
        let mut board = self.board();
        wanted += select.count(&count(seen.next.max(begin), board.head.next)?, names);
        // What nobody has been told of yet may be committed already: workers read the file, not what is told.
        let taken = select.count(&count(board.head.next, begin)?, names);
        let since = (wanted > 0).then_some(Time::EPOCH);
        let follower = Arc::new(Follower {
            select: Mutex::new(select),
            state: Mutex::new(State { wanted, taken, since, checkpoint }),
            wake: watch::Sender::new(wanted),
        });
        board.followers.push(Arc::downgrade(&follower));
        Ok(Following { wake: follower.wake.subscribe(), seen: Seen { followers: self.clone(), follower } })
    }
}

impl Select {
    /// How many of the events are wanted.
    pub(super) fn count(&mut self, counts: &Counts, names: &Names) -> u64 {
        let wanted = counts.iter().filter(|((source, event_type), _)| self.wants(*source, *event_type, names));
        wanted.map(|(_, count)| count).sum()
    }
}

impl Follower {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panics while it is held")
    }

    fn add(&self, counts: &Counts, appended: Time, names: &Names) {
        let new = self.select.lock().expect("no panics while it is held").count(counts, names);
        if new > 0 {
            let mut state = self.state();
            if state.wanted <= state.taken && state.wanted + new > state.taken {
                state.since = Some(appended);
            }
            state.wanted += new;
            self.wake.send_replace(state.wanted);
        }
    }
}

/// Follows the log for one reader.
pub struct Following {
    seen: Seen,
    wake: watch::Receiver<u64>,
}

impl Following {
    /// Returns once there are new events that are wanted.
    pub async fn changed(&mut self) {
        // The sender lives as long as this.
        let _ = self.wake.changed().await;
    }

    /// True once after new events that are wanted.
    pub fn has_changed(&mut self) -> bool {
        let changed = self.wake.has_changed().unwrap_or(false);
        self.wake.borrow_and_update();
        changed
    }

    /// So many more of the wanted events are committed, up to this checkpoint.
    pub fn took(&self, events: u64, checkpoint: Option<Position>) {
        let mut state = self.seen.follower.state();
        state.taken += events;
        state.checkpoint = checkpoint;
        if state.taken >= state.wanted {
            state.since = None;
        }
    }

    /// What others may know of it.
    pub fn seen(&self) -> Seen {
        self.seen.clone()
    }
}

/// How far a follower is, for whoever wants to know.
#[derive(Clone)]
pub struct Seen {
    followers: Arc<Followers>,
    follower: Arc<Follower>,
}

impl Seen {
    /// What waits for it.
    pub fn behind(&self) -> Behind {
        let state = self.follower.state();
        Behind { events: state.wanted.saturating_sub(state.taken), since: state.since }
    }

    /// The head of the log, to wait for.
    pub fn head(&self) -> watch::Receiver<Head> {
        self.followers.subscribe()
    }

    /// The position to which it is complete: the head of the log, if nothing that it wants comes after its checkpoint.
    pub fn complete(&self) -> Option<Position> {
        // No append may be told of between the two looks.
        let board = self.followers.board();
        let state = self.follower.state();
        if state.wanted <= state.taken { state.checkpoint.max(board.head.last()) } else { state.checkpoint }
    }
}
