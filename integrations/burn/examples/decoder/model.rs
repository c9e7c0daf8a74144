//! A small decoder with random weights, written in burn, and three ways to attend in it.

#![expect(clippy::cast_precision_loss, reason = "the numbers are small")]

use burn::tensor::activation::{silu, softmax};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Int, Tensor, TensorData};

/// The sizes of a decoder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocabulary: usize,
}

impl Shape {
    pub(crate) fn hidden(&self) -> usize {
        self.heads * self.head_dim
    }
}

#[derive(Debug)]
struct Layer {
    query: Tensor<2>,
    key: Tensor<2>,
    value: Tensor<2>,
    output: Tensor<2>,
    up: Tensor<2>,
    gate: Tensor<2>,
    down: Tensor<2>,
}

/// Attention of one layer, by its number: q (B, T, Hq, D), new K and V (B, T, H, D) to context (B, T, Hq, D).
pub(crate) trait Attend {
    fn attend(&mut self, layer: usize, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4>;
}

impl<F: FnMut(usize, Tensor<4>, Tensor<4>, Tensor<4>) -> Tensor<4>> Attend for F {
    fn attend(&mut self, layer: usize, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        self(layer, q, k, v)
    }
}

/// A decoder: pre-normed attention and a gated MLP, sinusoidal positions.
#[derive(Debug)]
pub(crate) struct Decoder {
    pub(crate) shape: Shape,
    device: Device,
    embeddings: Tensor<2>,
    layers: Vec<Layer>,
    head: Tensor<2>,
}

/// Random numbers from -1 to 1, the same on each machine.
pub(crate) fn noise(seed: &mut u64, count: usize) -> Vec<f32> {
    let mut next = || {
        *seed =
            seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((*seed >> 40) as f32) / ((1_u64 << 23) as f32) - 1.0
    };
    (0..count).map(|_| next()).collect()
}

impl Decoder {
    pub(crate) fn new(shape: Shape, device: &Device) -> Self {
        let seed = &mut 7;
        let mut matrix = |rows: usize, columns: usize| {
            let scale = (3.0 / rows as f32).sqrt();
            let values = noise(seed, rows * columns).into_iter().map(|x| x * scale).collect();
            Tensor::<2>::from_data(TensorData::new::<f32, _>(values, [rows, columns]), device)
        };
        let (hidden, kv) = (shape.hidden(), shape.kv_heads * shape.head_dim);
        let embeddings = matrix(shape.vocabulary, hidden) * (shape.vocabulary as f32 / 3.0).sqrt();
        let head = matrix(hidden, shape.vocabulary);
        let layers = (0..shape.layers).map(|_| Layer {
            query: matrix(hidden, hidden),
            key: matrix(hidden, kv),
            value: matrix(hidden, kv),
            output: matrix(hidden, hidden),
            up: matrix(hidden, 2 * hidden),
            gate: matrix(hidden, 2 * hidden),
            down: matrix(2 * hidden, hidden),
        });
        let layers = layers.collect();
        Self { shape, device: device.clone(), embeddings, layers, head }
    }

    /// Logits (B, T, vocabulary) of B rows of T tokens at these positions.
    pub(crate) fn forward(
        &self,
        tokens: &[Vec<u32>],
        positions: &[Vec<usize>],
        attend: &mut dyn Attend,
    ) -> Tensor<3> {
        let Shape { heads, kv_heads, head_dim, .. } = self.shape;
        let (batch, count, hidden) = (tokens.len(), tokens[0].len(), self.shape.hidden());
        let ids: Vec<i32> = tokens.concat().into_iter().map(|id| id as i32).collect();
        let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [batch * count]), &self.device);
        let angles = positions.concat().into_iter().flat_map(|position| {
            (0..hidden).map(move |i| {
                let rate = (-((i / 2 * 2) as f32) / hidden as f32 * 9.21).exp();
                let angle = position as f32 * rate;
                if i % 2 == 0 { angle.sin() } else { angle.cos() }
            })
        });
        let angles = TensorData::new(angles.collect::<Vec<f32>>(), [batch, count, hidden]);
        let embedded = self.embeddings.clone().select(0, ids).reshape([batch, count, hidden]);
        let mut x = embedded + Tensor::<3>::from_data(angles, &self.device);
        for (number, layer) in self.layers.iter().enumerate() {
            let normed = norm(x.clone());
            let project = |weights: &Tensor<2>, heads: usize| {
                let projected = normed.clone().matmul(weights.clone().unsqueeze());
                projected.reshape([batch, count, heads, head_dim])
            };
            let q = project(&layer.query, heads);
            let (k, v) = (project(&layer.key, kv_heads), project(&layer.value, kv_heads));
            let context = attend.attend(number, q, k, v).reshape([batch, count, hidden]);
            x = x + context.matmul(layer.output.clone().unsqueeze());
            let normed = norm(x.clone());
            let up = normed.clone().matmul(layer.up.clone().unsqueeze());
            let gate = silu(normed.matmul(layer.gate.clone().unsqueeze()));
            x = x + (up * gate).matmul(layer.down.clone().unsqueeze());
        }
        norm(x).matmul(self.head.clone().unsqueeze())
    }
}

fn norm(x: Tensor<3>) -> Tensor<3> {
    let mean = x.clone().powf_scalar(2.0).mean_dim(2);
    x / (mean + 1e-5).sqrt()
}

/// How burn attends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Two matmuls and a softmax.
    Matmul,
    /// `burn::tensor::module::attention`.
    Module,
}

/// Attention of burn: q (B, Hq, Tq, D) over K and V (B, H, L, D); the queries are the latest tokens.
pub(crate) fn burn_attention(form: Form, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    let [batch, heads, count, dim] = q.dims();
    let [_, kv_heads, length, _] = k.dims();
    let value_dim = v.dims()[3];
    let group = heads / kv_heads;
    // One token: the query heads of a K/V head are its rows, and no mask is needed.
    if count == 1 {
        let q = q.reshape([batch, kv_heads, group, dim]);
        return plain(form, q, k, v, None).reshape([batch, heads, 1, value_dim]);
    }
    let repeat = |x: Tensor<4>| {
        let dim = x.dims()[3];
        let wide = x.unsqueeze_dim::<5>(2).expand([batch, kv_heads, group, length, dim]);
        wide.reshape([batch, heads, length, dim])
    };
    let first = length - count;
    let bias = (0..count)
        .flat_map(|i| (0..length).map(move |j| if j <= first + i { 0.0_f32 } else { -1e9 }));
    let bias = TensorData::new(bias.collect::<Vec<_>>(), [1, 1, count, length]);
    let bias = Tensor::<4>::from_data(bias, &q.device());
    plain(Form::Matmul, q, repeat(k), repeat(v), Some(bias))
}

fn plain(
    form: Form,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    bias: Option<Tensor<4>>,
) -> Tensor<4> {
    if form == Form::Module {
        return attention(q, k, v, None, bias, AttentionModuleOptions::default());
    }
    let scale = 1.0 / (q.dims()[3] as f32).sqrt();
    let scores = q.matmul(k.transpose()) * scale;
    let scores = match bias {
        Some(bias) => scores + bias,
        None => scores,
    };
    softmax(scores, 3).matmul(v)
}

/// burn alone: K and V grow by a `cat` at each step.
#[derive(Debug)]
pub(crate) struct Concatenated {
    pub(crate) form: Form,
    pub(crate) layers: Vec<Option<[Tensor<4>; 2]>>,
}

impl Concatenated {
    pub(crate) fn new(form: Form, layers: usize) -> Self {
        Self { form, layers: vec![None; layers] }
    }

    /// New row i is old row `beams[i]`.
    pub(crate) fn reorder(&mut self, beams: &[u32]) {
        for both in self.layers.iter_mut().flatten() {
            let ids: Vec<i32> = beams.iter().map(|&beam| beam as i32).collect();
            let data = TensorData::new(ids, [beams.len()]);
            let ids = Tensor::<1, Int>::from_data(data, &both[0].device());
            *both = both.clone().map(|x| x.select(0, ids.clone()));
        }
    }
}

impl Attend for Concatenated {
    fn attend(&mut self, layer: usize, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        let new = [k.swap_dims(1, 2), v.swap_dims(1, 2)];
        let both = match self.layers[layer].take() {
            Some([k, v]) => {
                let [new_k, new_v] = new;
                [Tensor::cat(vec![k, new_k], 2), Tensor::cat(vec![v, new_v], 2)]
            }
            None => new,
        };
        let [k, v] = both.clone();
        self.layers[layer] = Some(both);
        burn_attention(self.form, q.swap_dims(1, 2), k, v).swap_dims(1, 2)
    }
}

/// burn alone: K and V of a fixed capacity, written by `slice_assign`.
#[derive(Debug)]
pub(crate) struct Assigned {
    pub(crate) form: Form,
    pub(crate) layers: Vec<Option<[Tensor<4>; 2]>>,
    pub(crate) length: Vec<usize>,
}

impl Assigned {
    pub(crate) fn new(
        form: Form,
        shape: Shape,
        batch: usize,
        capacity: usize,
        device: &Device,
    ) -> Self {
        let dims = [batch, shape.kv_heads, capacity, shape.head_dim];
        let empty = || Some([(); 2].map(|()| Tensor::<4>::zeros(dims, device)));
        let layers = (0..shape.layers).map(|_| empty()).collect();
        Self { form, layers, length: vec![0; shape.layers] }
    }
}

impl Attend for Assigned {
    fn attend(&mut self, layer: usize, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        let [batch, count, heads, dim] = k.dims();
        let first = self.length[layer];
        let end = first + count;
        self.length[layer] = end;
        let [old_k, old_v] = self.layers[layer].take().expect("it is put back");
        let at = [0..batch, 0..heads, first..end, 0..dim];
        let k = old_k.slice_assign(at.clone(), k.swap_dims(1, 2));
        let v = old_v.slice_assign(at, v.swap_dims(1, 2));
        self.layers[layer] = Some([k.clone(), v.clone()]);
        let [k, v] = [k, v].map(|x| x.narrow(2, 0, end));
        burn_attention(self.form, q.swap_dims(1, 2), k, v).swap_dims(1, 2)
    }
}
