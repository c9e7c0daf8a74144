//! Thousands of steps in which burn allocates and frees memory around the cache: memory stays flat, and nothing differs
//! from burn alone.
//!
//! `WGPU_KVCACHE_BURN_STEPS=10000 cargo test --test long_run` runs more steps than the 150 of the default.

#[path = "decoder/support.rs"]
#[expect(dead_code, reason = "the other tests use the rest")]
mod support;

use burn::tensor::{Tensor, TensorData};
use support::model::{Attend, Form, burn_attention};
use support::*;
use wgpu_kvcache_burn::wgpu_kvcache::{AttentionOptions, Cache, CacheOptions, DynamicKVCache};
use wgpu_kvcache_burn::{AttendOptions, BurnCache};

const WINDOW: usize = 24;

/// burn alone, with a window: `cat`, and the latest tokens of it.
#[derive(Default)]
struct Windowed([Option<[Tensor<4>; 2]>; 2]);

impl Attend for Windowed {
    fn attend(&mut self, layer: usize, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        let [k, v] = [k, v].map(|x| x.swap_dims(1, 2));
        let both = match self.0[layer].take() {
            Some([old_k, old_v]) => [(old_k, k), (old_v, v)].map(|(old, new)| {
                let all = Tensor::cat(vec![old, new], 2);
                let length = all.dims()[2];
                let first = length.saturating_sub(WINDOW);
                all.narrow(2, first, length - first)
            }),
            None => [k, v],
        };
        let [k, v] = both.clone();
        self.0[layer] = Some(both);
        burn_attention(Form::Matmul, q.swap_dims(1, 2), k, v).swap_dims(1, 2)
    }
}

/// Bytes of this process in memory.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

#[test]
fn memory_is_flat_and_nothing_differs_while_burn_allocates_and_frees() {
    let steps = std::env::var("WGPU_KVCACHE_BURN_STEPS");
    let steps: usize = steps.map_or(150, |steps| steps.parse().expect("a number of steps"));
    let shared = shared();
    let device = shared.device();
    let decoder = decoder();
    let windows = [Some(WINDOW); 2];
    let options = CacheOptions::default().with_windows(&windows);
    let cache = DynamicKVCache::with_options(shared.gpu(), options).expect("a cache");
    let mut cache = BurnCache::new(&shared, cache);
    let mut alone = Windowed::default();
    let mut tokens = vec![vec![1], vec![2]];
    // Tensors of burn that come and go.
    let mut held: Vec<(Tensor<1>, f32)> = Vec::new();
    let mut settled = None;
    let mut most = 0.0_f32;
    for step in 0..steps {
        let size = 1 + (step * 7919) % 20_000;
        let value = f32::from(u8::try_from(step % 100).expect("below 100"));
        held.push((Tensor::full([size], value, device) + 1.0, value + 1.0));
        if held.len() > 6 {
            let (tensor, value) = held.swap_remove((step * 31) % 6);
            if step % 10 == 0 {
                let data = tensor.try_into_vec_as::<f32>().expect("f32");
                assert!(data.iter().all(|&x| x == value), "step {step}: a tensor of burn changed");
            }
        }
        let positions = vec![vec![step]; 2];
        let got = decoder.forward(&tokens, &positions, &mut |layer, q, k, v| {
            let attention = AttentionOptions::default().with_window(WINDOW);
            let context = cache.attend(layer, q, k, v, AttendOptions::from(attention).bthd());
            // Made and dropped at once: their memory is the first to be used again.
            let data = TensorData::new(vec![9.0_f32; 2 * 64], [2, 1, 4, 16]);
            let garbage = Tensor::<4>::from_data(data, device);
            context.expect("attention") + garbage.clone() - garbage
        });
        let expected = decoder.forward(&tokens, &positions, &mut alone);
        tokens = best(&expected).into_iter().map(|token| vec![token]).collect();
        let difference = difference(expected, got);
        assert!(difference < 1e-4, "step {step}: {difference}");
        most = most.max(difference);
        if step % (steps / 10).max(1) == 0 || step + 1 == steps {
            let reserved = device.memory_pool_usage().map_or(0, |usage| usage.bytes_reserved);
            let own = cache.inner().stats().bytes_allocated;
            println!("step {step}: burn {reserved}, cache {own}, process {}", resident());
            // A third of the run settles what is compiled, tuned and pooled.
            if step >= steps / 3 {
                let (burn, cache, process) = *settled.get_or_insert((reserved, own, resident()));
                assert!(reserved <= burn + burn / 4, "step {step}: {burn} became {reserved}");
                assert_eq!(own, cache, "step {step}");
                let slack = 48 << 20;
                assert!(resident() <= process + slack, "step {step}: the process grew");
            }
        }
    }
    println!("largest difference {most:e}");
}
