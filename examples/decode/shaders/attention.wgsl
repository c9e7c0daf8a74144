// Attention: each query head over one layer of the K/V cache, read in place; causal, grouped.

@group(0) @binding(0) var<uniform> layer: Layer;
@group(0) @binding(1) var<storage, read> query: array<vec4<f32>>;       // [rows, HEADS, QUADS] of quads
@group(0) @binding(2) var<storage, read> keys: array<vec2<u32>>;        // the layer's K as the cache keeps it
@group(0) @binding(3) var<storage, read> values: array<vec2<u32>>;      // the layer's V as the cache keeps it
@group(0) @binding(4) var<storage, read_write> mixed: array<vec4<f32>>; // [rows, HEADS, QUADS] of quads

// Where the tokens of the layer lie: element d of token t of batch row b and K/V head h is element
// b * stride_b + h * stride_h + ((start + t) mod capacity) * stride_t + d.
struct Layer {
    start: u32,         // slot of the oldest token
    capacity: u32,      // slots
    length: u32,        // tokens, the new ones included
    tokens: u32,        // new tokens of each batch row
    key_stride: vec3<u32>,   // of b, h, t
    value_stride: vec3<u32>, // of b, h, t
}

override HEADS: u32;
override KV_HEADS: u32;
override QUADS: u32;     // a quarter of the elements of a head, at most THREADS
override DTYPE: u32 = 0; // of the cache: 0 is f32, 1 is f16, 2 is bf16

const THREADS: u32 = 64;
const LOWEST: f32 = -3.0e38;

var<workgroup> weights: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.x;
    let head = group.y;
    let batch_row = row / layer.tokens;
    let kv_head = head / (HEADS / KV_HEADS);
    // A new token sees the tokens before it and itself, not the new ones after it.
    let visible = layer.length - layer.tokens + row % layer.tokens + 1u;
    let key_base = batch_row * layer.key_stride.x + kv_head * layer.key_stride.y;
    let value_base = batch_row * layer.value_stride.x + kv_head * layer.value_stride.y;
    let query_base = (row * HEADS + head) * QUADS;
    let scale = inverseSqrt(4.0 * f32(QUADS));

    // The softmax is built up over blocks of tokens: `total` and `sum` are relative to the highest
    // score so far.
    var highest = LOWEST;
    var total = 0.0;
    var sum = vec4<f32>();
    for (var first = 0u; first < visible; first += THREADS) {
        // A token a thread: its score.
        let token = first + thread;
        var score = LOWEST;
        if token < visible {
            let base = key_base + slot(token) * layer.key_stride.z;
            var products = vec4<f32>();
            for (var i = 0u; i < QUADS; i++) {
                products += query[query_base + i] * key_quad(base + 4u * i);
            }
            score = dot(products, vec4<f32>(scale));
        }
        weights[thread] = score;
        workgroupBarrier();

        var block_highest = highest;
        for (var i = 0u; i < THREADS; i++) {
            block_highest = max(block_highest, weights[i]);
        }
        workgroupBarrier();
        weights[thread] = select(0.0, exp(score - block_highest), token < visible);
        workgroupBarrier();

        // A quad of the head a thread: the weighted sum of the values.
        if thread < QUADS {
            let rescale = exp(highest - block_highest);
            total *= rescale;
            sum *= rescale;
            for (var i = 0u; i < min(THREADS, visible - first); i++) {
                let base = value_base + slot(first + i) * layer.value_stride.z;
                total += weights[i];
                sum += weights[i] * value_quad(base + 4u * thread);
            }
        }
        highest = block_highest;
        workgroupBarrier();
    }
    if thread < QUADS {
        mixed[query_base + thread] = sum / total;
    }
}

// The slot of a token: the live tokens may wrap around the end of the buffer.
fn slot(token: u32) -> u32 {
    let at = layer.start + token;
    return select(at, at - layer.capacity, at >= layer.capacity);
}

// Four elements of K from element `at` on.
fn key_quad(at: u32) -> vec4<f32> {
    if DTYPE == 0u {
        return bitcast<vec4<f32>>(vec4<u32>(keys[at / 2u], keys[at / 2u + 1u]));
    }
    return unpack(keys[at / 4u]);
}

// Four elements of V from element `at` on.
fn value_quad(at: u32) -> vec4<f32> {
    if DTYPE == 0u {
        return bitcast<vec4<f32>>(vec4<u32>(values[at / 2u], values[at / 2u + 1u]));
    }
    return unpack(values[at / 4u]);
}

// Four numbers of a 16-bit type from two words.
fn unpack(words: vec2<u32>) -> vec4<f32> {
    if DTYPE == 1u {
        return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
    }
    let low = words << vec2<u32>(16u);
    let high = words & vec2<u32>(0xffff0000u);
    return bitcast<vec4<f32>>(vec4<u32>(low.x, high.x, low.y, high.y));
}
