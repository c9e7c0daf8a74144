// Puts the splits of attention.wgsl together: each row's sums, weighted by how high its scores were.
//
// A workgroup takes a query row, a thread an element of it.
//
// group 0, binding 0: partial        [split, row, D of V + 2]: sums, highest score, total weight
// group 0, binding 1: result         the output, any strides over (B, Hq, Tq)
// group 1, binding 0: lists          not read
// group 2, binding 0: params         a uniform, or immediate data where the device has it

struct Rows {
    offset: u32,
    stride_b: u32,
    stride_h: u32,
    stride_t: u32,
}

struct Params {
    // In elements.
    output: Rows,
    value_dim: u32,
    heads: u32,
    // Query heads of a K/V head; new tokens of a batch row.
    group: u32,
    tokens: u32,
    splits: u32,
    // Query rows of all batch rows.
    rows: u32,
}

@group(0) @binding(0) var<storage, read> partial: array<f32>;
@group(0) @binding(1) var<storage, read_write> result: array<f32>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

const THREADS: u32 = 64u;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let stride = params.value_dim + 2u;
    for (var row = group.x; row < params.rows; row += groups.x) {
        var highest = partial[row * stride + params.value_dim];
        for (var split = 1u; split < params.splits; split++) {
            let at = (split * params.rows + row) * stride;
            highest = max(highest, partial[at + params.value_dim]);
        }
        for (var d = local; d < params.value_dim; d += THREADS) {
            var sum = 0.0;
            var total = 0.0;
            for (var split = 0u; split < params.splits; split++) {
                let at = (split * params.rows + row) * stride;
                let weight = exp(partial[at + params.value_dim] - highest);
                sum += weight * partial[at + d];
                total += weight * partial[at + params.value_dim + 1u];
            }
            result[place(row) + d] = sum / total;
        }
    }
}

fn place(row: u32) -> u32 {
    let rows = params.group * params.tokens;
    let r = row % rows;
    let b = row / rows / params.heads;
    let head = row / rows % params.heads * params.group + r % params.group;
    let strides = params.output;
    return strides.offset + b * strides.stride_b + head * strides.stride_h + (r / params.group) * strides.stride_t;
}
