//! The events of several inputs as one sequence, in the order in which they happened.
//!
//! The order of the log is the order in which projections see events, and it is given once. Archives of several
//! services would stand in it one after the other, the last departure before the first aircraft, if they were appended
//! as files are named. So they are merged: the next event is always the head of the input whose *key* is the smallest,
//! where a key is
//!
//! 1. the largest time that was read from the input so far,
//! 2. then the head's source,
//! 3. then the number of the input.
//!
//! An input's own order is never changed: it is the order of commits in its service, which is closer to the truth than
//! clocks that are set back. That is why the largest time counts and not the head's own: an event with an earlier time
//! than one before it happened after that one, whatever its clock said, and keeps its place among the other inputs'
//! events too. Such events are counted ([`Disorder`]) and nothing is refused. What is worth a look is a time in the far
//! future: the rest of its input stands after everything else.
//!
//! The same inputs always give the same sequence, and what was given before an error is the beginning of what the
//! mended inputs would give: every head is read before the next event is chosen. So an import that broke is mended and
//! run again, and the log is as if it had never been broken.
//!
//! One event of each input is in memory, and a heap chooses among them: the cost of an event grows with the logarithm
//! of the number of inputs.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::model::{NewEvent, Time};

/// The merge of inputs, each an iterator of events with their places in it (numbers of lines, say), which are only kept
/// for [`Disorder`]. Gives the number of the input, from 0, with each event. The first error of an input ends it.
///
/// An input is asked for its next event when the one before it was taken and another one is wanted, not earlier: what
/// is given has not waited for more.
#[derive(Debug)]
pub struct Interleave<I> {
    inputs: Vec<Input<I>>,
    heads: BinaryHeap<Reverse<Head>>,
    /// The inputs without a head: all at first, the one of the last event later.
    unread: Vec<usize>,
}

/// Events of one input that are earlier than one before them there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disorder {
    /// How many they are, of those that were read.
    pub events: u64,
    /// The id of the first of them.
    pub id: String,
    /// Its place in the input.
    pub place: u64,
    /// Its time.
    pub time: Time,
    /// The largest time before it.
    pub after: Time,
}

#[derive(Debug)]
struct Input<I> {
    events: I,
    /// None before the first event.
    latest: Option<Time>,
    disorder: Option<Disorder>,
}

/// The next event of an input. Heads are equal if their keys are; no two heads have the same, the input is in it.
#[derive(Debug)]
struct Head {
    latest: Time,
    event: NewEvent,
    input: usize,
}

impl Head {
    fn key(&self) -> (Time, &str, usize) {
        (self.latest, &self.event.source, self.input)
    }
}

impl Ord for Head {
    fn cmp(&self, other: &Head) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Head) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Head) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Head {}

impl<I: Iterator<Item = Result<(u64, NewEvent), E>>, E> Interleave<I> {
    /// Merges these inputs. Nothing is read yet. One input is given as it is.
    pub fn new(inputs: impl IntoIterator<Item = I>) -> Interleave<I> {
        let inputs: Vec<_> = inputs.into_iter().map(|events| Input { events, latest: None, disorder: None }).collect();
        Interleave { heads: BinaryHeap::with_capacity(inputs.len()), unread: (0..inputs.len()).rev().collect(), inputs }
    }

    /// The inputs that are not in the order of time as far as they were read, by number.
    pub fn disorder(&self) -> impl Iterator<Item = (usize, &Disorder)> {
        self.inputs.iter().enumerate().filter_map(|(number, input)| Some((number, input.disorder.as_ref()?)))
    }
}

impl<I: Iterator<Item = Result<(u64, NewEvent), E>>, E> Iterator for Interleave<I> {
    type Item = Result<(usize, NewEvent), E>;

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(number) = self.unread.pop() {
            let input = &mut self.inputs[number];
            match input.events.next() {
                Some(Ok((place, event))) => {
                    let latest = input.pass(place, &event);
                    self.heads.push(Reverse(Head { latest, event, input: number }));
                }
                Some(Err(error)) => {
                    // Any head might belong after the event that is missing.
                    self.heads.clear();
                    self.unread.clear();
                    return Some(Err(error));
                }
                None => {}
            }
        }
        let Reverse(Head { event, input, .. }) = self.heads.pop()?;
        self.unread.push(input);
        Some(Ok((input, event)))
    }
}

impl<I> Input<I> {
    /// Takes note of the next event's time; answers the largest one by now.
    fn pass(&mut self, place: u64, event: &NewEvent) -> Time {
        match self.latest {
            Some(latest) if event.time < latest => {
                let first = || Disorder { events: 0, id: event.id.clone(), place, time: event.time, after: latest };
                self.disorder.get_or_insert_with(first).events += 1;
                latest
            }
            _ => *self.latest.insert(event.time),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// What an event is here: its time and its source.
    type Brief = (i64, &'static str);

    /// An event as it is given: its input, its number there, its time and its source.
    type Given = (usize, usize, i64, String);

    fn time(seconds: i64) -> Time {
        Time::from_microseconds(seconds * 1_000_000).unwrap()
    }

    /// Inputs whose events are named by their numbers; each stands on a line of its own, with an empty one after it.
    fn inputs(files: &[Vec<Brief>]) -> Vec<Vec<Result<(u64, NewEvent), String>>> {
        let event = |(number, &(seconds, source)): (usize, &Brief)| {
            let event = NewEvent {
                source: source.to_owned(),
                id: number.to_string(),
                stream: String::new(),
                version: 0,
                event_type: "T".to_owned(),
                time: time(seconds),
                metadata: String::new(),
                payload: Vec::new(),
            };
            Ok((2 * number as u64 + 1, event))
        };
        files.iter().map(|file| file.iter().enumerate().map(event).collect()).collect()
    }

    fn given(input: usize, event: NewEvent) -> Given {
        (input, event.id.parse().unwrap(), event.time.microseconds() / 1_000_000, event.source)
    }

    fn merge(files: &[Vec<Brief>]) -> Vec<Given> {
        let merged = Interleave::new(inputs(files).into_iter().map(Vec::into_iter));
        merged.map(|next| next.map(|(input, event)| given(input, event)).unwrap()).collect()
    }

    /// The definition at the top of this file, looking at every head for every event.
    fn by_definition(files: &[Vec<Brief>]) -> Vec<Given> {
        let mut next = vec![0; files.len()];
        let mut merged = Vec::new();
        let key = |input: usize, number: usize| {
            let largest = files[input][..=number].iter().map(|(time, _)| *time).max();
            (largest, files[input][number].1, input)
        };
        while let Some(input) =
            (0..files.len()).filter(|&i| next[i] < files[i].len()).min_by_key(|&input| key(input, next[input]))
        {
            let (time, source) = files[input][next[input]];
            merged.push((input, next[input], time, source.to_owned()));
            next[input] += 1;
        }
        merged
    }

    /// Few times and sources, so that equal ones are common.
    fn files() -> impl Strategy<Value = Vec<Vec<Brief>>> {
        let event = (-3..12_i64, proptest::sample::select(vec!["fleet", "flights", "weather"]));
        vec(vec(event, 0..12), 0..7)
    }

    proptest! {
        #[test]
        fn it_is_what_the_definition_says(files in files()) {
            prop_assert_eq!(merge(&files), by_definition(&files));
        }

        #[test]
        fn every_event_is_given_once_and_each_input_keeps_its_order(files in files()) {
            let merged = merge(&files);
            for (number, file) in files.iter().enumerate() {
                let of_file = merged.iter().filter(|(input, ..)| *input == number);
                let brief: Vec<_> = of_file.map(|(_, place, time, source)| (*place, *time, source.clone())).collect();
                let expected: Vec<_> =
                    file.iter().enumerate().map(|(place, (time, source))| (place, *time, source.to_string())).collect();
                prop_assert_eq!(brief, expected);
            }
            prop_assert_eq!(merged.len(), files.iter().map(Vec::len).sum::<usize>());
        }

        #[test]
        fn sorted_inputs_give_the_sorted_whole(mut files in files()) {
            files.iter_mut().for_each(|file| file.sort());
            let merged = merge(&files);
            let mut sorted = merged.clone();
            sorted.sort_by_key(|(input, number, time, source)| (*time, source.clone(), *input, *number));
            prop_assert_eq!(merged, sorted);
        }

        #[test]
        fn one_input_is_given_as_it_is(file in files().prop_map(|files| files.concat())) {
            let numbers = merge(std::slice::from_ref(&file)).into_iter().map(|(_, number, ..)| number);
            prop_assert_eq!(numbers.collect::<Vec<_>>(), (0..file.len()).collect::<Vec<_>>());
        }

        #[test]
        fn disorder_is_counted_and_the_first_event_of_it_named(files in files()) {
            let mut merged = Interleave::new(inputs(&files).into_iter().map(Vec::into_iter));
            merged.by_ref().for_each(drop);
            let expected = files.iter().enumerate().filter_map(|(input, file)| {
                let latest = |number: usize| file[..number].iter().map(|(time, _)| *time).max();
                let mut late = (0..file.len()).filter(|&n| latest(n) > Some(file[n].0)).peekable();
                let first = *late.peek()?;
                let (id, place) = (first.to_string(), 2 * first as u64 + 1);
                let (events, after) = (late.count() as u64, time(latest(first)?));
                Some((input, Disorder { events, id, place, time: time(file[first].0), after }))
            });
            let found: Vec<_> = merged.disorder().map(|(input, disorder)| (input, disorder.clone())).collect();
            prop_assert_eq!(found, expected.collect::<Vec<_>>());
        }

        #[test]
        fn what_comes_before_an_error_is_the_beginning_of_the_mended_whole(
            files in files(), broken: prop::sample::Index, at: prop::sample::Index,
        ) {
            let whole = merge(&files);
            prop_assume!(!whole.is_empty());
            // The event at that place is what does not parse.
            let (input, number, ..) = whole[broken.index(whole.len())].clone();
            let number = at.index(number + 1);
            let mut parts = inputs(&files);
            parts[input][number] = Err("bad".to_owned());
            let mut merged = Interleave::new(parts.into_iter().map(Vec::into_iter));
            let mut before = Vec::new();
            let error = loop {
                match merged.next() {
                    Some(Ok((input, event))) => before.push(given(input, event)),
                    Some(Err(error)) => break error,
                    None => panic!("the error was passed over"),
                }
            };
            prop_assert_eq!(error, "bad");
            prop_assert!(merged.next().is_none(), "it goes on after an error");
            prop_assert_eq!(&before[..], &whole[..before.len()]);
            // Nothing that is known to belong before it is held back: the one before it is the last.
            let last = before.last().map(|(input, number, ..)| (*input, *number));
            prop_assert_eq!(last, number.checked_sub(1).map(|before| (input, before)));
        }
    }

    #[test]
    fn an_event_with_an_earlier_time_stays_behind_the_one_before_it() {
        let merged = merge(&[vec![(5, "b"), (1, "b"), (6, "b")], vec![(2, "a"), (5, "a"), (5, "c"), (6, "a")]]);
        let brief: Vec<_> = merged.iter().map(|(_, _, time, source)| (*time, source.as_str())).collect();
        assert_eq!(brief, [(2, "a"), (5, "a"), (5, "b"), (1, "b"), (5, "c"), (6, "a"), (6, "b")]);
    }

    #[test]
    fn an_input_is_not_read_ahead_of_what_is_given() {
        let read = std::cell::Cell::new(0);
        let file = inputs(&[vec![(1, "a"), (2, "a"), (3, "a")]]).remove(0);
        let mut merged = Interleave::new([file.into_iter().inspect(|_| read.set(read.get() + 1))]);
        assert_eq!(read.get(), 0);
        for expected in 1..=3 {
            merged.next().unwrap().unwrap();
            assert_eq!(read.get(), expected);
        }
        assert!(merged.next().is_none() && merged.next().is_none());
    }

    #[test]
    fn thousands_of_inputs_are_merged() {
        let files: Vec<_> = (0..5_000).map(|n| vec![(n % 7, "a"), (7 + n % 11, "a")]).collect();
        let merged = merge(&files);
        assert_eq!(merged.len(), 10_000);
        assert!(merged.is_sorted_by_key(|(input, _, time, _)| (*time, *input)));
    }
}
