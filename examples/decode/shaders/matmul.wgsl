// Matrix product: output[m, n] = sum over k of input[m, k] * weight[n, k], or output plus that.

@group(0) @binding(0) var<uniform> stage: Stage;
@group(0) @binding(1) var<uniform> shape: Shape;
@group(0) @binding(2) var<storage, read> weight: array<mat4x4<f32>>;     // [N / 4 / LANES, K / 4, LANES] of blocks
@group(0) @binding(3) var<storage, read> input: array<vec4<f32>>;        // [M, K]
@group(0) @binding(4) var<storage, read_write> output: array<vec4<f32>>; // [M, N]

struct Stage {
    rows: u32,   // M: rows of the matrix that the dispatch works on
    tokens: u32, // new tokens of each batch row
    past: u32,   // tokens before these
    banned: u32, // a token that is never chosen
}

struct Shape {
    outputs: u32, // N / 4
    inputs: u32,  // K / 4
}

// A thread computes four outputs of TILE rows of the input (1, 4 or 8). It takes the weights in
// blocks of 4 by 4, so that it reads each weight once for all rows and each input once for all four
// outputs: reading is what takes time. A column of a block holds the weights of one k.
override TILE: u32 = 1;
// SPLIT threads share four outputs, each with every SPLIT-th block along K. A GPU needs that to
// have enough threads for a single token; a software adapter does best with one, which needs no
// barrier.
override SPLIT: u32 = 1;
override ADD: bool = false; // add onto the output: a residual connection

// The blocks of neighbouring threads lie side by side, and those of a workgroup are one piece of
// memory.
const LANES: u32 = 8;

var<workgroup> partial: array<vec4<f32>, TILE * SPLIT * LANES>;

@compute @workgroup_size(LANES, SPLIT)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let first = group.y * TILE;
    var at = (group.x * shape.inputs + local.y) * LANES + local.x;
    var i = first * shape.inputs + local.y;
    let row = shape.inputs;

    // Rows past the last read whatever the buffer holds; their sums are not stored.
    var sum0 = vec4<f32>();
    var sum1 = vec4<f32>();
    var sum2 = vec4<f32>();
    var sum3 = vec4<f32>();
    var sum4 = vec4<f32>();
    var sum5 = vec4<f32>();
    var sum6 = vec4<f32>();
    var sum7 = vec4<f32>();
    for (var k = local.y; k < shape.inputs; k += SPLIT) {
        let block = weight[at];
        sum0 += block * input[i];
        if TILE > 1u {
            sum1 += block * input[i + row];
            sum2 += block * input[i + 2u * row];
            sum3 += block * input[i + 3u * row];
        }
        if TILE > 4u {
            sum4 += block * input[i + 4u * row];
            sum5 += block * input[i + 5u * row];
            sum6 += block * input[i + 6u * row];
            sum7 += block * input[i + 7u * row];
        }
        at += SPLIT * LANES;
        i += SPLIT;
    }

    var sums = array<vec4<f32>, 8>(sum0, sum1, sum2, sum3, sum4, sum5, sum6, sum7);
    if SPLIT > 1u {
        for (var m = 0u; m < TILE; m++) {
            partial[(m * SPLIT + local.y) * LANES + local.x] = sums[m];
        }
        workgroupBarrier();
        if local.y > 0u {
            return;
        }
        for (var m = 0u; m < TILE; m++) {
            for (var s = 1u; s < SPLIT; s++) {
                sums[m] += partial[(m * SPLIT + s) * LANES + local.x];
            }
        }
    }

    let n = group.x * LANES + local.x;
    if n >= shape.outputs {
        return;
    }
    for (var m = 0u; m < min(TILE, stage.rows - first); m++) {
        let to = (first + m) * shape.outputs + n;
        if ADD {
            output[to] += sums[m];
        } else {
            output[to] = sums[m];
        }
    }
}
