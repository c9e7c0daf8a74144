//! What the tests share: the device, the decoder of the example, and a comparison of greedy runs.

#[path = "../../examples/decoder/model.rs"]
pub(crate) mod model;

use std::sync::OnceLock;

use burn::tensor::Tensor;
use model::{Concatenated, Decoder, Form, Shape};
use wgpu_kvcache_burn::wgpu_kvcache::KVCache;
use wgpu_kvcache_burn::{AttendOptions, BurnCache, SharedDevice};

pub(crate) const SHAPE: Shape =
    Shape { layers: 2, heads: 4, kv_heads: 2, head_dim: 16, vocabulary: 50 };
pub(crate) const PROMPT: [u32; 11] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5];

/// burn starts its runtime once in a process.
pub(crate) fn shared() -> SharedDevice {
    static SHARED: OnceLock<SharedDevice> = OnceLock::new();
    SHARED.get_or_init(|| SharedDevice::new().expect("a device")).clone()
}

pub(crate) fn decoder() -> Decoder {
    Decoder::new(SHAPE, shared().device())
}

#[derive(Clone, Copy)]
pub(crate) enum Order {
    Bhtd,
    Bthd,
}

/// Attention of the decoder through a cache of this crate.
pub(crate) fn through<C: KVCache>(
    cache: &mut BurnCache<C>,
    order: Order,
) -> impl FnMut(usize, Tensor<4>, Tensor<4>, Tensor<4>) -> Tensor<4> {
    move |layer, q, k, v| match order {
        Order::Bthd => {
            cache.attend(layer, q, k, v, AttendOptions::default().bthd()).expect("attention")
        }
        Order::Bhtd => {
            let [q, k, v] = [q, k, v].map(|x| x.swap_dims(1, 2));
            cache.attend(layer, q, k, v, Default::default()).expect("attention").swap_dims(1, 2)
        }
    }
}

/// The largest difference of two tensors.
pub(crate) fn difference(a: Tensor<3>, b: Tensor<3>) -> f32 {
    let [a, b] = [a, b].map(|x| x.try_into_vec_as::<f32>().expect("f32"));
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(&b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |most, x| if x > most || x.is_nan() { x } else { most })
}

/// The most likely next token of each row, after the last one.
pub(crate) fn best(logits: &Tensor<3>) -> Vec<u32> {
    let [batch, count, words] = logits.dims();
    let logits = logits.try_to_vec_as::<f32>().expect("f32");
    let row = |b: usize| &logits[((b + 1) * count - 1) * words..][..words];
    let most = |row: &[f32]| (0..words).max_by(|&i, &j| row[i].total_cmp(&row[j])).expect("words");
    (0..batch).map(|b| u32::try_from(most(row(b))).expect("a small vocabulary")).collect()
}

/// Decodes with `cat` and with `cache`, side by side.
pub(crate) fn compare_greedy<C: KVCache>(mut cache: BurnCache<C>, order: Order) {
    let decoder = decoder();
    let mut alone = Concatenated::new(Form::Matmul, SHAPE.layers);
    let mut tokens = vec![PROMPT.to_vec(), PROMPT.iter().rev().copied().collect()];
    let mut position = 0;
    for step in 0..30 {
        let count = tokens[0].len();
        let positions = vec![(position..position + count).collect::<Vec<_>>(); 2];
        position += count;
        let expected = decoder.forward(&tokens, &positions, &mut alone);
        let got = decoder.forward(&tokens, &positions, &mut through(&mut cache, order));
        let next = best(&expected);
        assert_eq!(next, best(&got), "step {step}");
        let difference = difference(expected, got);
        assert!(difference < 1e-4, "step {step}: {difference}");
        tokens = next.into_iter().map(|token| vec![token]).collect();
    }
    assert_eq!(cache.seq_length(1).expect("a length"), PROMPT.len() + 29);
}
