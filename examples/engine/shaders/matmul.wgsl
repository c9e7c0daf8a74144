// Matrix product: output[m, n] = sum over k of input[m, k] * weight[n, k], or output plus that.
//
// Joined behind `weights.wgsl` and a text of `format/`. GROUPS and TOKENS are numbers that the host puts in,
// and lines between `//: each` and `//: end` are repeated by it, because not every driver unrolls loops.

@group(0) @binding(3) var<uniform> stage: Stage;
@group(0) @binding(4) var input: texture_2d<f32>;                  // [M, K] of four elements a texel
@group(0) @binding(5) var<storage, read_write> output: array<f32>; // [M, N]

struct Stage {
    rows: u32,   // M: rows of the matrix that the dispatch works on
    banned: u32, // a token that is never chosen
}

// A thread computes 4 * GROUPS outputs of TOKENS rows of the input, so that it unpacks each weight once for all
// rows and reads each input once for all outputs.
const GROUPS: u32 = {GROUPS};
const TOKENS: u32 = {TOKENS};
// SPLIT threads share these outputs, each with every SPLIT-th panel. A GPU needs that to have enough threads for
// a single token; a software adapter does best with one, which needs no barrier.
override SPLIT: u32 = 1;
override ADD: bool = false; // add onto the output: a residual connection

var<workgroup> partial: array<vec4<f32>, GROUPS * TOKENS * SPLIT * LANES>;

@compute @workgroup_size(LANES, SPLIT)
fn main(
    @builtin(workgroup_id) workgroup_id: vec3<u32>,
    @builtin(local_invocation_id) local_id: vec3<u32>,
) {
    let first = workgroup_id.y * TOKENS;
    let lane = local_id.x;

    // Groups past the last and rows past the last read whatever the textures hold; their sums are not stored.
    //: each g in GROUPS
    let group{g} = workgroup_id.x * GROUPS + {g}u;
    //: each m in TOKENS
    var sum{g}_{m} = vec4<f32>();
    //: end
    //: end
    for (var panel = local_id.y; panel < part.steps * PANELS; panel += SPLIT) {
        //: each g in GROUPS
        let panel{g} = load_panel(Cursor(group{g}, lane, panel));
        //: end
        //: each quad in QUADS
        {
            //: each g in GROUPS
            let block{g} = weights(panel{g}, {quad}u);
            //: end
            //: each m in TOKENS
            let input{m} = textureLoad(input, vec2<u32>(panel * 8u + {quad}u, first + {m}u), 0);
            //: each g in GROUPS
            sum{g}_{m} += input{m} * block{g};
            //: end
            //: end
        }
        //: end
    }

    if SPLIT > 1u {
        //: each g in GROUPS
        //: each m in TOKENS
        partial[(({g}u * TOKENS + {m}u) * SPLIT + local_id.y) * LANES + lane] = sum{g}_{m};
        //: end
        //: end
        workgroupBarrier();
        if local_id.y > 0u {
            return;
        }
        for (var s = 1u; s < SPLIT; s++) {
            //: each g in GROUPS
            //: each m in TOKENS
            sum{g}_{m} += partial[(({g}u * TOKENS + {m}u) * SPLIT + s) * LANES + lane];
            //: end
            //: end
        }
    }

    //: each g in GROUPS
    //: each m in TOKENS
    store(first + {m}u, group{g} * 4u * LANES + lane, sum{g}_{m});
    //: end
    //: end
}

// Stores four outputs of a row of the input: rows n, n + LANES ... of the part.
fn store(m: u32, n: u32, sum: vec4<f32>) {
    if m >= stage.rows {
        return;
    }
    for (var i = 0u; i < 4u; i++) {
        let row = n + i * LANES;
        if row < part.rows {
            let to = m * part.outputs + part.first + row;
            if ADD {
                output[to] += sum[i];
            } else {
                output[to] = sum[i];
            }
        }
    }
}
