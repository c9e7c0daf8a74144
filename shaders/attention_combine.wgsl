// Merges the splits of attention.wgsl: each row's sums, weighted by their highest scores.
//
// A workgroup takes one query row, an invocation two elements of it. If queries are packed, the host lists the
// work: an item is four query rows of one sequence, whose partial results follow one another.
//
// group 0, binding 0: partial        [split, row, D of V + 2]: sums, highest score, total weight; if packed
//                                    [part, H, 4, D of V + 2]
// group 0, binding 1: result         the output, any strides over (B, Hq, Tq)
// group 1, binding 0: lists          items of packed queries
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
    // Query heads a K/V head; new tokens a batch row.
    group: u32,
    tokens: u32,
    splits: u32,
    // Query rows of all batch rows; if packed, of all items and heads.
    rows: u32,
    // Packed queries: the first word of the items in `lists`.
    items: u32,
}

@group(0) @binding(0) var<storage, read> partial: array<f32>;
@group(0) @binding(1) var<storage, read_write> result: array<u32>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

// Whether queries are packed.
override is_packed: bool = false;
// Type of the output: 0 f32, 1 f16, 2 bf16. Heads of 16-bit types begin at a whole word.
override output_type: u32 = 0u;

const THREADS: u32 = 64u;
const ROWS: u32 = 4u;

// The partial results of a query row.
struct Parts {
    // Number of the first one, numbers from one to the next, and how many.
    first: u32,
    stride: u32,
    count: u32,
    // First element of the row in the output.
    target_at: u32,
    is_row: bool,
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let stride = params.value_dim + 2u;
    for (var row = group.x; row < params.rows; row += groups.x) {
        let parts = parts_of(row);
        if !parts.is_row {
            continue;
        }
        var highest = partial[parts.first * stride + params.value_dim];
        for (var split = 1u; split < parts.count; split++) {
            let at = (parts.first + split * parts.stride) * stride;
            highest = max(highest, partial[at + params.value_dim]);
        }
        for (var d = 2u * local; d < params.value_dim; d += 2u * THREADS) {
            let next = min(d + 1u, params.value_dim - 1u);
            var sum = vec2(0.0);
            var total = 0.0;
            for (var split = 0u; split < parts.count; split++) {
                let at = (parts.first + split * parts.stride) * stride;
                let weight = exp(partial[at + params.value_dim] - highest);
                sum += weight * vec2(partial[at + d], partial[at + next]);
                total += weight * partial[at + params.value_dim + 1u];
            }
            // A row that sees no token gets zeros.
            let pair = select(sum / total, vec2(0.0), total == 0.0);
            if output_type == 0u {
                result[parts.target_at + d] = bitcast<u32>(pair.x);
                if next > d {
                    result[parts.target_at + next] = bitcast<u32>(pair.y);
                }
            } else {
                result[(parts.target_at + d) / 2u] = word_of(pair, output_type);
            }
        }
    }
}

fn parts_of(row: u32) -> Parts {
    let strides = params.output;
    if is_packed {
        // Rows are numbered item first, then K/V head, then the item's four query rows. An item is eight words:
        // first packed token, tokens of the sequence, which four rows, first part, number of parts,
        // and three zeros.
        let at = params.items + 8u * (row / (params.heads * ROWS));
        let h = row / ROWS % params.heads;
        let r = lists[at + 2u] * ROWS + row % ROWS;
        let is_row = r < params.group * lists[at + 1u];
        let head = h * params.group + r % params.group;
        let token = lists[at] + r / params.group;
        let first = (lists[at + 3u] * params.heads + h) * ROWS + row % ROWS;
        let target_at = strides.offset + head * strides.stride_h + token * strides.stride_t;
        return Parts(first, params.heads * ROWS, lists[at + 4u], target_at, is_row);
    }
    let rows = params.group * params.tokens;
    let r = row % rows;
    let b = row / rows / params.heads;
    let head = row / rows % params.heads * params.group + r % params.group;
    let token = r / params.group;
    let target_at = strides.offset + b * strides.stride_b + head * strides.stride_h + token * strides.stride_t;
    return Parts(row, params.rows, params.splits, target_at, true);
}
