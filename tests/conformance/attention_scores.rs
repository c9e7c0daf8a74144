//! Attention where scores are as high as ±1e4: one token decides, or two that nearly tie.
//!
//! An f32 near 1e4 is exact to a thousandth, which softmax would make an error of a thousandth. So q and K
//! are small whole numbers, which every type holds and of which every sum is exact: what is tested is
//! softmax, and not the rounding of scores.

use wgpu_kvcache::{Attention, DType};

use crate::attention::{
    BOUND, Case, Lie, Random, attend, distance, filled, forms, half_of, lies_and_dtypes,
};
use crate::gpu;
use crate::wait::ReadLayer;

/// What a score of 1 is in products of q and K.
const ONE: i32 = 4;

/// What an element of q is, but for the first, which is 1.
const OTHERS: i16 = 8;

/// What each query row is multiplied by, in turn. Turned over, the lowest score is the highest.
const FACTORS: [f32; 4] = [1.0, -1.0, 0.5, -0.5];

/// How the scores of a head are spread.
#[derive(Clone, Copy, Debug)]
enum Scores {
    /// All at 1e4, one 200 above, and one 200 below.
    High,
    /// The same at -1e4.
    Low,
    /// At 1e4 or at -1e4, one above, and one below.
    Mixed,
    /// Between -1000 and 1000, two near 1e4 that are a quarter apart, and two near -1e4.
    Tied,
}

impl Scores {
    /// Each token's score, times `ONE`. `places` are those of the highest, of the lowest, and of what
    /// nearly ties with each.
    fn of(self, len: usize, places: [usize; 4], random: &mut Random) -> Vec<i32> {
        let tall = 10_000 * ONE;
        let wide = || i32::try_from(random.below(2000)).expect("small") - 1000;
        let mut scores: Vec<i32> = match self {
            Self::High => vec![tall; len],
            Self::Low => vec![-tall; len],
            Self::Mixed => (0..len).map(|_| [tall, -tall][random.below(2)]).collect(),
            Self::Tied => std::iter::repeat_with(wide).take(len).map(|score| score * ONE).collect(),
        };
        let (top, bottom) = match self {
            Self::High => (tall + 200 * ONE, tall - 200 * ONE),
            Self::Low => (-tall + 200 * ONE, -tall - 200 * ONE),
            Self::Mixed => (tall + 200 * ONE, -tall - 200 * ONE),
            Self::Tied => (tall, -tall),
        };
        if matches!(self, Self::Tied) {
            scores[places[2]] = top - 1;
            scores[places[3]] = bottom + 1;
        }
        scores[places[1]] = bottom;
        scores[places[0]] = top;
        scores
    }
}

/// A token's K, of which the product with q is `score` where the signs are those of q.
fn key(score: i32, signs: &[i8], random: &mut Random) -> Vec<f32> {
    let rest = score.div_euclid(i32::from(OTHERS));
    let others = i32::try_from(signs.len() - 1).expect("few");
    // As even as whole numbers can be: (rest + i) / others, over all i, add up to rest.
    let mut elements: Vec<i32> = (0..others).map(|i| (rest + i).div_euclid(others)).collect();
    // Neighbours that differ, and add up to the same.
    for pair in elements.chunks_exact_mut(2) {
        let more = i32::try_from(random.below(17)).expect("small") - 8;
        pair[0] += more;
        pair[1] -= more;
    }
    elements.insert(0, score.rem_euclid(i32::from(OTHERS)));
    let exact = |(element, &sign): (i32, &i8)| {
        f32::from(i16::try_from(element).expect("small")) * f32::from(sign)
    };
    elements.into_iter().zip(signs).map(exact).collect()
}

/// Runs a case whose heads have their highest score in turn at each of `places`.
fn check(
    attention: &mut Attention,
    case: &Case,
    scores: Scores,
    places: [usize; 4],
    random: &mut Random,
) {
    let gpu = gpu();
    let Case { batch, heads, group, len, tokens, dim, value_dim, .. } = *case;
    let signs: Vec<Vec<i8>> =
        (0..heads).map(|_| (0..dim).map(|_| [1, -1][random.below(2)]).collect()).collect();
    let mut k = Vec::new();
    for (h, signs) in signs.iter().enumerate() {
        let mut places = places;
        places.rotate_left(h);
        for score in scores.of(len, places, random) {
            k.extend(key(score, signs, random));
        }
    }
    // All batch rows have the same K, so that it does not matter which of them share pages.
    let k = k.repeat(batch);
    let v = random.floats(batch * heads * len * value_dim, 1.0);
    let mut q = Vec::new();
    for head in 0..batch * heads * group {
        for t in 0..tokens {
            let factor = FACTORS[(head % group + 2 * t) % 4];
            let signs = &signs[head / group % heads];
            q.push(factor * f32::from(signs[0]));
            q.extend(signs[1..].iter().map(|&sign| factor * f32::from(OTHERS * i16::from(sign))));
        }
    }
    let cache = filled(&gpu, case, &k, &v);
    let Some((got, expected)) = attend(&gpu, attention, case, &q, cache.as_ref()) else { return };
    let (stored, _) = cache.read(0).expect("it is submitted").expect("it was written");
    assert!(stored.to_f32() == k, "{case:?}: K is not exact");
    for (row, (got, expected)) in got.chunks(value_dim).zip(expected.chunks(value_dim)).enumerate()
    {
        let apart = distance(got, expected);
        assert!(apart < BOUND, "{case:?}, {scores:?}, {places:?}, row {row}: off by {apart:e}");
    }
}

/// A causal case of so many new tokens.
fn case((lie, dtype): (Lie, DType), number: usize, len: usize, tokens: usize) -> Case {
    let short = if dtype == DType::F32 { 47 } else { 46 };
    let sizes = half_of((lie, dtype), [[32; 2], [short; 2], [128, 256], [80; 2]]);
    // One size has one query in a contiguous layer and several in others, the next the other way round.
    let dim = sizes[usize::from((tokens == 1) == (lie == Lie::Contiguous))][number % 2];
    Case {
        lie,
        dtype,
        batch: 1,
        heads: 4,
        group: 2,
        len,
        tokens,
        dim,
        value_dim: dim,
        is_causal: true,
        scale: Some(0.25),
        forms: forms(number),
    }
}

const SCORES: [Scores; 4] = [Scores::High, Scores::Low, Scores::Mixed, Scores::Tied];

/// The first, the last and middle tokens, in rows that no or few workgroups share.
#[test]
fn in_short_rows() {
    let mut attention = Attention::new(&gpu());
    let mut random = Random(17);
    for (number, combination) in lies_and_dtypes().into_iter().enumerate() {
        for (nth, scores) in SCORES.into_iter().enumerate() {
            for (len, tokens, places) in [
                (1, 1, [0; 4]),
                (5, 4, [0, 2, 3, 4]),
                (130, 1, [0, 64, 65, 129]),
                (700, 3, [0, 127, 128, 699]),
            ] {
                let mut case = case(combination, number + nth, len, tokens);
                (case.batch, case.group) = (2, 3);
                check(&mut attention, &case, scores, places, &mut random);
            }
        }
    }
}

/// Rows that are split. With four K/V heads a CPU takes splits of 1024 tokens and a GPU of 256 of them,
/// so both have a border at each multiple of 1024.
#[test]
fn at_the_borders_of_splits() {
    let mut attention = Attention::new(&gpu());
    let mut random = Random(19);
    let places = [[0, 1023, 1024, 4095], [2047, 4095, 3072, 2048]];
    for (number, combination) in lies_and_dtypes().into_iter().enumerate() {
        for (nth, scores) in SCORES.into_iter().enumerate() {
            let case = case(combination, number + nth, 4096, 2);
            check(&mut attention, &case, scores, places[(number + nth) % 2], &mut random);
        }
    }
}

/// The numbers are what they are meant to be: the highest score of a head is where it should be.
#[test]
fn keys_have_the_scores_that_were_asked_for() {
    let mut random = Random(23);
    for dim in [32, 47, 256] {
        for score in [0, 1, -1, 39_999, 40_000, 40_800, -40_800] {
            let signs: Vec<i8> = (0..dim).map(|_| [1, -1][random.below(2)]).collect();
            let key = key(score, &signs, &mut random);
            let products = key.iter().zip(&signs).enumerate().map(|(d, (&k, &sign))| {
                let q = if d == 0 { 1 } else { OTHERS };
                f64::from(k) * f64::from(i16::from(sign) * q)
            });
            assert_eq!(products.sum::<f64>(), f64::from(score));
            assert!(key.iter().all(|k| k.abs() <= 256.0), "bf16 would round it");
        }
    }
}
