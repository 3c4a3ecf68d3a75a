//! Numbers and values of varying length as bytes, and back, distrusting every byte.

use std::collections::HashMap;

use super::{Damage, MAX_SECTION_BYTES};
use crate::model::{Packed, Time};

/// The values lie back to back as they are.
const PLAIN: u8 = 0;
/// The distinct values do, and each value is an index into them.
const DICTIONARY: u8 = 1;

/// Appends numbers as distances from the least, each in as few bytes as the largest distance needs; none if all are
/// the same.
pub(super) fn put_numbers(out: &mut Vec<u8>, numbers: &[u64]) {
    let least = numbers.iter().copied().min().unwrap_or(0);
    let most = numbers.iter().copied().max().unwrap_or(0) - least;
    let width = [0_usize, 1, 2, 4].into_iter().find(|width| most >> (8 * width) == 0).unwrap_or(8);
    out.extend_from_slice(&least.to_le_bytes());
    out.push(width as u8);
    for number in numbers {
        out.extend_from_slice(&(number - least).to_le_bytes()[..width]);
    }
}

/// Appends times as steps from one to the next, in the largest unit that divides them all: most clocks that events come
/// from count in milliseconds or seconds.
pub(super) fn put_times(out: &mut Vec<u8>, times: &[Time]) {
    let steps: Vec<i64> = times.windows(2).map(|pair| pair[1].microseconds() - pair[0].microseconds()).collect();
    let unit = steps.iter().fold(0, |unit, step| gcd(unit, step.unsigned_abs())).max(1);
    out.extend_from_slice(&times[0].microseconds().to_le_bytes());
    out.extend_from_slice(&unit.to_le_bytes());
    // The sign is the lowest bit, so that small steps are small numbers in both directions.
    let signed = |step: &i64| ((step / unit as i64) << 1 ^ step >> 63) as u64;
    put_numbers(out, &steps.iter().map(signed).collect::<Vec<_>>());
}

fn gcd(a: u64, b: u64) -> u64 {
    let (mut a, mut b) = (a, b);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Appends the lengths of values to `numbers` and the values to `bytes`; of values that repeat enough, each only once.
pub(super) fn put_values(numbers: &mut Vec<u8>, bytes: &mut Vec<u8>, values: &[&[u8]], may_repeat: bool) {
    let total = values.iter().map(|v| v.len()).sum::<usize>();
    assert!(total <= MAX_SECTION_BYTES, "whoever fills a block keeps far below this");
    let dictionary = if may_repeat && total > 0 { dictionary(values, total / 2) } else { None };
    let stored = dictionary.as_ref().map_or(values, |(distinct, _)| distinct);
    numbers.push(if dictionary.is_some() { DICTIONARY } else { PLAIN });
    numbers.extend_from_slice(&(stored.len() as u32).to_le_bytes());
    put_numbers(numbers, &stored.iter().map(|v| v.len() as u64).collect::<Vec<_>>());
    bytes.reserve(stored.iter().map(|v| v.len()).sum());
    stored.iter().for_each(|v| bytes.extend_from_slice(v));
    if let Some((_, indexes)) = &dictionary {
        put_numbers(numbers, indexes);
    }
}

/// The distinct values, and for each value the index of its own. None if the distinct ones have more than so many
/// bytes: zstd finds what repeats too, and a dictionary of nearly everything only costs another copy.
fn dictionary<'a>(values: &[&'a [u8]], most: usize) -> Option<(Vec<&'a [u8]>, Vec<u64>)> {
    let mut known: HashMap<&[u8], u64, foldhash::fast::RandomState> = HashMap::default();
    let (mut distinct, mut bytes) = (Vec::new(), 0);
    let mut indexes = Vec::with_capacity(values.len());
    for value in values {
        indexes.push(*known.entry(value).or_insert_with(|| {
            bytes += value.len();
            distinct.push(*value);
            distinct.len() as u64 - 1
        }));
        if bytes > most {
            return None;
        }
    }
    Some((distinct, indexes))
}

/// Reads what was put. Whatever it is given, it answers with values or with damage.
pub(super) struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// `what` is read, for messages.
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Reader<'a> {
        Reader { what, rest: bytes }
    }

    /// Damage unless this holds.
    pub(super) fn check(&self, holds: bool, otherwise: &str) -> Result<(), Damage> {
        if holds { Ok(()) } else { Err(Damage { what: format!("{} {otherwise}", self.what) }) }
    }

    /// All must have been read.
    pub(super) fn end(self) -> Result<(), Damage> {
        self.check(self.rest.is_empty(), "is too long")
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Damage> {
        self.check(count <= self.rest.len(), "is too short")?;
        let (bytes, rest) = self.rest.split_at(count);
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Damage> {
        Ok(self.bytes(N)?.try_into().expect("as many as asked for"))
    }

    pub(super) fn u8(&mut self) -> Result<u8, Damage> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u32(&mut self) -> Result<u32, Damage> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Damage> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn time(&mut self) -> Result<Time, Damage> {
        let time = Time::from_microseconds(self.u64()? as i64);
        time.ok_or_else(|| Damage { what: format!("{} has an impossible time", self.what) })
    }

    /// As many as `count`, which must not be beyond what a block can have. They may be any numbers.
    pub(super) fn numbers(&mut self, count: usize) -> Result<Vec<u64>, Damage> {
        fn widened<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> u64) -> Vec<u64> {
            bytes.as_chunks().0.iter().map(|chunk| number(*chunk)).collect()
        }
        let least = self.u64()?;
        let width = usize::from(self.u8()?);
        let bytes = self.bytes(width * count)?;
        match width {
            0 => Ok(vec![least; count]),
            1 => Ok(widened(bytes, |[b]| least.wrapping_add(b.into()))),
            2 => Ok(widened(bytes, |b| least.wrapping_add(u16::from_le_bytes(b).into()))),
            4 => Ok(widened(bytes, |b| least.wrapping_add(u32::from_le_bytes(b).into()))),
            8 => Ok(widened(bytes, |b| least.wrapping_add(u64::from_le_bytes(b)))),
            _ => Err(Damage { what: format!("{} has numbers of an unknown width", self.what) }),
        }
    }

    /// The microseconds of at least one time. All are from the first to the second bound, and both are among them.
    pub(super) fn times(&mut self, count: usize, bounds: (Time, Time)) -> Result<Vec<i64>, Damage> {
        let (mut here, unit) = (self.u64()? as i64, self.u64()? as i64);
        let (mut least, mut most) = (here, here);
        let mut times = Vec::with_capacity(count);
        times.push(here);
        for number in self.numbers(count - 1)? {
            let step = (number >> 1) as i64 ^ -((number & 1) as i64);
            here = here.wrapping_add(step.wrapping_mul(unit));
            (least, most) = (least.min(here), most.max(here));
            times.push(here);
        }
        let bounds = (bounds.0.microseconds(), bounds.1.microseconds());
        self.check((least, most) == bounds, "has other times than the header says")?;
        Ok(times)
    }

    /// As many values as `count`, of `bytes` without a copy if they lie there as they are.
    pub(super) fn values(&mut self, count: usize, bytes: Vec<u8>) -> Result<Packed, Damage> {
        let (form, stored) = (self.u8()?, self.u32()? as usize);
        self.check(stored <= count && (stored == count || form == DICTIONARY), "has another number of values")?;
        let lengths = self.numbers(stored)?;
        let packed = Packed::new(bytes, &lengths);
        let packed = packed.ok_or_else(|| Damage { what: format!("{} has lengths that do not add up", self.what) })?;
        match form {
            PLAIN => Ok(packed),
            DICTIONARY => {
                let indexes = self.numbers(count)?;
                self.check(indexes.iter().all(|i| *i < stored as u64), "has a value beyond its dictionary")?;
                // A few bytes can stand for very many.
                let total = indexes.iter().map(|i| lengths[*i as usize]).sum::<u64>();
                self.check(total <= MAX_SECTION_BYTES as u64, "has values beyond the limit")?;
                Ok(gather(total as usize, indexes.iter().map(|i| [packed.get(*i as usize), &[]])))
            }
            _ => Err(Damage { what: format!("{} has values of an unknown form", self.what) }),
        }
    }
}

/// Values that are put together from two pieces each, with about so many bytes in all.
pub(super) fn gather<'a>(total: usize, values: impl ExactSizeIterator<Item = [&'a [u8]; 2]>) -> Packed {
    let mut bytes = Vec::with_capacity(total);
    let mut lengths = Vec::with_capacity(values.len());
    for [first, second] in values {
        bytes.extend_from_slice(first);
        bytes.extend_from_slice(second);
        lengths.push((first.len() + second.len()) as u64);
    }
    Packed::new(bytes, &lengths).expect("the lengths of what was added")
}
