// Arg-max: the best token of each row, the lowest id among equals, never the banned one.

@group(0) @binding(0) var<uniform> stage: Stage;
@group(0) @binding(1) var<storage, read> logits: array<f32>;       // [rows, VOCABULARY]
@group(0) @binding(2) var<storage, read_write> chosen: array<u32>; // [rows]

struct Stage {
    rows: u32,   // rows of the matrix that the dispatch works on
    banned: u32, // a token that is never chosen
}

override VOCABULARY: u32;

const THREADS: u32 = 256;

var<workgroup> logit_of: array<f32, THREADS>;
var<workgroup> token_of: array<u32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.x;
    var best = -3.0e38;
    var token = 0u;
    for (var i = thread; i < VOCABULARY; i += THREADS) {
        let logit = logits[row * VOCABULARY + i];
        if logit > best && i != stage.banned {
            best = logit;
            token = i;
        }
    }
    logit_of[thread] = best;
    token_of[thread] = token;
    workgroupBarrier();

    if thread == 0u {
        for (var i = 1u; i < THREADS; i++) {
            if logit_of[i] > best || (logit_of[i] == best && token_of[i] < token) {
                best = logit_of[i];
                token = token_of[i];
            }
        }
        chosen[row] = token;
    }
}
