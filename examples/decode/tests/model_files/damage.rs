//! What is done to a file.

use proptest::prelude::*;
use proptest::sample::Index;

use crate::seed::Seed;

/// One thing that is done to a file. Places are fitted to the length that it has by then.
#[derive(Clone, Debug)]
pub(crate) enum Damage {
    Flip {
        at: Index,
        bit: u8,
    },
    Set {
        at: Index,
        byte: u8,
    },
    /// Writes over one of the numbers that count, size or point.
    Number {
        which: Index,
        number: u64,
    },
    /// Writes a number anywhere.
    Word {
        at: Index,
        is_wide: bool,
        number: u64,
    },
    Truncate {
        at: Index,
    },
    Extend {
        bytes: Vec<u8>,
    },
    Remove {
        at: Index,
        length: usize,
    },
    /// Puts a piece of one of the seeds somewhere, in place of what is there or before it.
    Splice {
        seed: Index,
        from: Index,
        length: usize,
        at: Index,
        is_insert: bool,
    },
}

fn number() -> impl Strategy<Value = u64> {
    let edge = (0..64_u32, -2_i64..=2);
    prop_oneof![
        3 => 0..300_u64,
        3 => edge.prop_map(|(bits, off)| (1_u64 << bits).wrapping_add_signed(off)),
        1 => any::<u64>(),
        1 => any::<f32>().prop_map(|number| u64::from(number.to_bits())),
    ]
}

pub(crate) fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<Index>;
    prop_oneof![
        2 => (at(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        2 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Set { at, byte }),
        6 => (at(), number()).prop_map(|(which, number)| Damage::Number { which, number }),
        2 => (at(), any::<bool>(), number())
            .prop_map(|(at, is_wide, number)| Damage::Word { at, is_wide, number }),
        1 => at().prop_map(|at| Damage::Truncate { at }),
        1 => prop::collection::vec(any::<u8>(), 1..64).prop_map(|bytes| Damage::Extend { bytes }),
        1 => (at(), 1..64_usize).prop_map(|(at, length)| Damage::Remove { at, length }),
        2 => (at(), at(), 1..200_usize, at(), any::<bool>()).prop_map(
            |(seed, from, length, at, is_insert)| {
                Damage::Splice { seed, from, length, at, is_insert }
            }
        ),
    ]
}

impl Damage {
    pub(crate) fn apply(&self, bytes: &mut Vec<u8>, numbers: &[(usize, usize)], seeds: &[Seed]) {
        if bytes.is_empty() {
            return;
        }
        let put = |bytes: &mut Vec<u8>, at: usize, piece: &[u8]| {
            let end = bytes.len().min(at + piece.len());
            if at < end {
                bytes[at..end].copy_from_slice(&piece[..end - at]);
            }
        };
        match self {
            Self::Flip { at, bit } => *at.get_mut(bytes) ^= 1 << bit,
            Self::Set { at, byte } => *at.get_mut(bytes) = *byte,
            Self::Number { which, number } => {
                let (at, width) = *which.get(numbers);
                put(bytes, at, &number.to_le_bytes()[..width]);
            }
            Self::Word { at, is_wide, number } => {
                let at = at.index(bytes.len());
                put(bytes, at, &number.to_le_bytes()[..if *is_wide { 8 } else { 4 }]);
            }
            Self::Truncate { at } => bytes.truncate(at.index(bytes.len())),
            Self::Extend { bytes: more } => bytes.extend(more),
            Self::Remove { at, length } => {
                let at = at.index(bytes.len());
                bytes.drain(at..bytes.len().min(at + length));
            }
            Self::Splice { seed, from, length, at, is_insert } => {
                let source = &seed.get(seeds).bytes;
                let (from, at) = (from.index(source.len()), at.index(bytes.len()));
                let piece = &source[from..source.len().min(from + length)];
                if *is_insert {
                    bytes.splice(at..at, piece.iter().copied());
                } else {
                    put(bytes, at, piece);
                }
            }
        }
    }
}
