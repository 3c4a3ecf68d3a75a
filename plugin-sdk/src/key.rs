//! Hashing and comparing keys, eight bytes at a time: a sandbox compares single bytes otherwise, in a call for each key.

/// Multiplies well: the one of FxHash.
const FACTOR: u64 = 0xf135_7aea_2e62_a9c5;

/// Makes a hash of the columns of a key. Without a seed: a guest behaves the same every time.
#[doc(hidden)]
#[derive(Default)]
pub struct KeyHasher(u64);

impl KeyHasher {
    #[doc(hidden)]
    #[inline]
    pub fn number(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(FACTOR);
    }

    #[doc(hidden)]
    #[inline]
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        match bytes.last_chunk() {
            Some(last) => {
                let words = bytes.as_chunks().0;
                words.iter().for_each(|word| self.number(u64::from_le_bytes(*word)));
                // Once more some of the same bytes, unless the length is a multiple of eight.
                self.number(u64::from_le_bytes(*last));
            }
            None => self.number(short(bytes)),
        }
    }

    /// A product carries upwards only, and the last characters of a key are the high bits of its last word: so they are
    /// folded down and multiplied once more, for tables that take the low bits.
    #[inline]
    pub(crate) fn finish(self) -> u64 {
        let product = (self.0 ^ (self.0 >> 32)).wrapping_mul(FACTOR);
        product ^ (product >> 32)
    }
}

/// Whether two keys of bytes are the same.
#[inline]
pub(crate) fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    match (a.last_chunk(), b.last_chunk()) {
        (Some(last_a), Some(last_b)) => {
            let word = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
            let words = a.as_chunks().0.iter().zip(b.as_chunks().0);
            // Keys that are made of a date or a prefix and a number differ at the end.
            word(last_a) == word(last_b) && words.into_iter().all(|(a, b)| word(a) == word(b))
        }
        _ => short(a) == short(b),
    }
}

/// Up to seven bytes as a number.
#[inline]
fn short(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hash(bytes: &[u8]) -> u64 {
        let mut hasher = KeyHasher::default();
        hasher.bytes(bytes);
        hasher.finish()
    }

    proptest! {
        #[test]
        fn bytes_are_the_same_as_slices_are(a: Vec<u8>, b: Vec<u8>, at: prop::sample::Index, flip in 0_u8..2) {
            prop_assert_eq!(same(&a, &b), a == b);
            let mut b = a.clone();
            if let Some(byte) = (!a.is_empty()).then(|| &mut b[at.index(a.len())]) {
                *byte ^= flip;
            }
            prop_assert_eq!(same(&a, &b), a == b);
            // Not so for all bytes, of course; but one that differs must matter wherever it stands.
            prop_assert_eq!(hash(&a) == hash(&b), a == b);
        }
    }

    #[test]
    fn keys_spread_wherever_they_differ() {
        let short: fn(u32) -> String = |n| n.to_string();
        let at_the_end = |n| format!("20130101-UA{n:04}");
        let in_the_middle = |n| format!("2013{n:04}-UA1545-EWR-0");
        let at_the_beginning = |n| format!("{n:04}0101-UA1545-EWR");
        for key in [short, at_the_end, in_the_middle, at_the_beginning] {
            let low = (0..10_000).map(|n| hash(key(n).as_bytes()) & 0xffff);
            let places = low.collect::<std::collections::HashSet<u64>>().len();
            // Evenly thrown they would take 9,276.
            assert!(places > 9_000, "{places} of 65,536 places for 10,000 keys like {}", key(0));
        }
    }
}
