// Matrix product: output[m, n] = sum over k of input[m, k] * weight[n, k], or that added onto output.

@group(0) @binding(0) var<uniform> stage: Stage;
@group(0) @binding(1) var<uniform> shape: Shape;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>; // [N / LANES, K / 4, LANES] of quads
@group(0) @binding(3) var<storage, read> input: array<vec4<f32>>;  // [M, K]
@group(0) @binding(4) var<storage, read_write> output: array<f32>; // [M, N]

struct Stage {
    rows: u32,   // M: rows of the matrix that the dispatch works on
    tokens: u32, // new tokens of each batch row
    past: u32,   // tokens before these
    banned: u32, // a token that is never chosen
}

struct Shape {
    outputs: u32, // N
    quads: u32,   // K / 4
}

// A thread computes one output of TILE rows of the input, so that each weight is read once for all of them:
// 1 for a single token, 8 for beams and prompts.
override TILE: u32 = 1;
// SPLIT threads share one output, each with every SPLIT-th quad of K. A GPU needs them to have enough threads
// for a single token; on a CPU adapter one thread an output is several times faster, because it needs no barrier.
override SPLIT: u32 = 1;
override OUTPUTS: u32 = 64; // outputs a workgroup
override ADD: bool = false; // add onto the output: a residual connection

// LANES neighbouring outputs lie side by side for each quad of K, so that neighbouring threads read neighbouring
// quads, and each such block of outputs is one piece of memory, which is read from its first byte to its last.
const LANES: u32 = 8;

var<workgroup> partial: array<f32, 1024>; // [TILE, SPLIT, OUTPUTS]

@compute @workgroup_size(OUTPUTS, SPLIT)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let n = group.x * OUTPUTS + local.x;
    let first = group.y * TILE;
    let quads = shape.quads;
    // Threads past the last output work on it too, and store nothing: all threads must meet at the barrier.
    let output_or_last = min(n, shape.outputs - 1u);
    let block = output_or_last / LANES * quads * LANES + output_or_last % LANES;

    // Rows past the last read whatever the buffer holds; their sums are not stored.
    var a0 = vec4<f32>();
    var a1 = vec4<f32>();
    var a2 = vec4<f32>();
    var a3 = vec4<f32>();
    var a4 = vec4<f32>();
    var a5 = vec4<f32>();
    var a6 = vec4<f32>();
    var a7 = vec4<f32>();
    var at = first * quads + local.y;
    for (var k = local.y; k < quads; k += SPLIT) {
        let w = weight[block + k * LANES];
        a0 += w * input[at];
        if TILE > 1u {
            a1 += w * input[at + quads];
            a2 += w * input[at + 2u * quads];
            a3 += w * input[at + 3u * quads];
            a4 += w * input[at + 4u * quads];
            a5 += w * input[at + 5u * quads];
            a6 += w * input[at + 6u * quads];
            a7 += w * input[at + 7u * quads];
        }
        at += SPLIT;
    }

    let one = vec4<f32>(1.0);
    var sums = array<f32, 8>(
        dot(a0, one), dot(a1, one), dot(a2, one), dot(a3, one),
        dot(a4, one), dot(a5, one), dot(a6, one), dot(a7, one),
    );
    if SPLIT > 1u {
        for (var m = 0u; m < TILE; m++) {
            partial[(m * SPLIT + local.y) * OUTPUTS + local.x] = sums[m];
        }
        workgroupBarrier();
        if local.y > 0u {
            return;
        }
        for (var m = 0u; m < TILE; m++) {
            for (var s = 1u; s < SPLIT; s++) {
                sums[m] += partial[(m * SPLIT + s) * OUTPUTS + local.x];
            }
        }
    }
    if n >= shape.outputs {
        return;
    }
    for (var m = 0u; m < min(TILE, stage.rows - first); m++) {
        let i = (first + m) * shape.outputs + n;
        if ADD {
            output[i] += sums[m];
        } else {
            output[i] = sums[m];
        }
    }
}
