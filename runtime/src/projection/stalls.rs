//! Which generations have lag and do not move.
//!
//! By positions alone: a worker that hangs cannot be asked, and one that sleeps through new events says that it is well.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::model::Position;

/// What was seen of generations at the last looks, by projection and number.
#[derive(Default)]
pub struct Stalls {
    seen: HashMap<(String, u64), Seen>,
}

struct Seen {
    /// Whether it has something to do.
    behind: bool,
    checkpoint: Option<Position>,
    /// Since when there has been something to do, and the checkpoint has not moved.
    since: Instant,
    looked: Instant,
}

impl Stalls {
    /// Looks at a generation, which has stood at `checkpoint` at `now`, and has something to do if `behind`.
    pub fn look(&mut self, generation: (&str, u64), behind: bool, checkpoint: Option<Position>, now: Instant) {
        let key = (generation.0.to_owned(), generation.1);
        let seen = self.seen.entry(key).or_insert(Seen { behind, checkpoint, since: now, looked: now });
        if (seen.behind, seen.checkpoint) != (behind, checkpoint) {
            (seen.behind, seen.checkpoint, seen.since) = (behind, checkpoint, now);
        }
        seen.looked = now;
    }

    /// Forgets generations that were not there at the look of `now`.
    pub fn forget_others(&mut self, now: Instant) {
        self.seen.retain(|_, seen| seen.looked == now);
    }

    /// For how long a generation that still stands at `checkpoint` has had something to do without doing it.
    pub fn quiet(&self, generation: (&str, u64), checkpoint: Option<Position>, now: Instant) -> Duration {
        let seen = self.seen.get(&(generation.0.to_owned(), generation.1));
        let seen = seen.filter(|seen| seen.behind && seen.checkpoint == checkpoint);
        seen.map_or(Duration::ZERO, |seen| now.saturating_duration_since(seen.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_is_the_time_with_lag_and_without_progress() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let checkpoint = |position| Some(Position(position));
        let mut stalls = Stalls::default();
        for (second, behind, position, expected) in [
            // At the head for a long time is no stall; the time counts from when there was something to do.
            (0, false, 1, 0),
            (100, false, 1, 0),
            (101, true, 1, 0),
            (110, true, 1, 9),
            // Progress resets it, also if it is not enough.
            (111, true, 2, 0),
            (130, true, 2, 19),
            (131, false, 3, 0),
        ] {
            stalls.look(("p", 1), behind, checkpoint(position), at(second));
            assert_eq!(stalls.quiet(("p", 1), checkpoint(position), at(second)).as_secs(), expected, "{second}");
        }
        stalls.look(("p", 1), true, checkpoint(3), at(140));
        assert_eq!(stalls.quiet(("p", 1), checkpoint(4), at(150)), Duration::ZERO, "it has moved since the look");
        assert_eq!(stalls.quiet(("p", 2), checkpoint(3), at(150)), Duration::ZERO, "another generation");
        stalls.forget_others(at(141));
        assert_eq!(stalls.quiet(("p", 1), checkpoint(3), at(150)), Duration::ZERO);
    }
}
