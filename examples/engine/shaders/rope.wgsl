// Rotary position: turns the heads of a fused projection, and writes Q, K and V apart.

@group(0) @binding(0) var<storage, read> positions: array<u32>;         // [rows]: the position of each token
@group(0) @binding(1) var<storage, read> turns: array<vec2<f32>>;       // [positions, PAIRS] of (cos, sin)
@group(0) @binding(2) var<storage, read> projected: array<f32>;         // [rows, HEADS + 2 * KV_HEADS, 2 * PAIRS]
@group(0) @binding(3) var<storage, read_write> query: array<vec2<f32>>; // [rows, HEADS, PAIRS] of pairs
@group(0) @binding(4) var<storage, read_write> key: array<vec2<f32>>;   // [rows, KV_HEADS, PAIRS] of pairs
@group(0) @binding(5) var<storage, read_write> value: array<vec2<f32>>; // as key

override HEADS: u32;
override KV_HEADS: u32;
override PAIRS: u32;     // half the elements of a head
// A pair is elements i and PAIRS + i of a head, as in GPT-NeoX; otherwise neighbours. Pairs are written as neighbours
// in both cases: scores do not depend on the order of elements if it is the same in queries and keys.
override HALVES: bool = false;

@compute @workgroup_size(64)
fn main(
    @builtin(global_invocation_id) id: vec3<u32>,
) {
    let i = id.x; // a pair of the row
    let row = id.y;
    let queries = HEADS * PAIRS;
    let keys = KV_HEADS * PAIRS;
    let all = queries + 2u * keys;
    if i >= all {
        return;
    }
    let pair_of_head = i % PAIRS;
    var first = 2u * (row * all + i);
    var second = first + 1u;
    if HALVES && i < queries + keys {
        first -= pair_of_head;
        second = first + PAIRS;
    }
    let pair = vec2<f32>(projected[first], projected[second]);
    let turn = turns[positions[row] * PAIRS + pair_of_head];
    let turned = vec2<f32>(pair.x * turn.x - pair.y * turn.y, pair.x * turn.y + pair.y * turn.x);

    if i < queries {
        query[row * queries + i] = turned;
    } else if i < queries + keys {
        key[row * keys + i - queries] = turned;
    } else {
        value[row * keys + i - queries - keys] = pair;
    }
}
