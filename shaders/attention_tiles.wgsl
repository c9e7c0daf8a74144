// Attention of many new tokens over a layer's cache, as `attention.wgsl` computes it, for GPUs: the query rows of a
// workgroup share the K and V that it reads.
//
// A workgroup computes the rows of many teams of one K/V head over one split of the live tokens. A team is `slices`
// invocations along the head, which hold four query rows. All invocations together read K and V of `tile_tokens` tokens
// into workgroup memory, as f32; then each team takes them in, four at a time. So a token is read, and its pages looked
// up and its format undone, once for all rows of the workgroup, where `attention.wgsl` does so for each four rows.
//
// The text is joined with `attention/`, one of `layout/` and texts of `element/`, as `attention.wgsl` is, and masks what
// a row does not see in the same way. What it calls a slot is a token's place in the tile.
//
// group 0, binding 0: query          q, any strides over (B, Hq, Tq); not read if the output's buffer holds it
// group 0, binding 1: key_cache      [slot, D of K], slots as the layout numbers them
// group 0, binding 2: value_cache    [slot, D of V]
// group 0, binding 3: result         the output, any strides over (B, Hq, Tq); with several splits the
//                                    partial results [split, row, D of V + 2]: sums, highest score, total
//                                    weight. Holds q as well if `is_pooled`
// group 1, binding 0: lists          the table of pages, records of ragged rows
// group 2, binding 0: params         a uniform, or immediate data where the device has it

// Tokens of a tile: a multiple of four.
override tile_tokens: u32 = 4u;

// A tile: of each token the quads of K, then those of V.
var<workgroup> tile: array<vec4<f32>, 512>;

@compute @workgroup_size(threads)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
) {
    let slices = params.slices;
    let slice = local % slices;
    let teams = threads / slices;
    // As in `attention.wgsl`, with the rows of all teams in the place of four.
    let split = workgroup.z % params.splits;
    let first_tile = teams * (workgroup.x + workgroups.x * (workgroup.z / params.splits));
    let shared_item = Item(
        workgroup.y / params.kv.heads,
        0u,
        params.tokens,
        first_tile,
        split * params.split,
        (split + 1u) * params.split,
        split,
        workgroup.y % params.kv.heads,
        workgroup.y,
    );
    let h = shared_item.h;
    let kv_b = min(shared_item.b, params.kv.batch - 1u);
    let kv = kv_row(params.kv, kv_b);
    let most_row = params.group * params.tokens - 1u;

    // What the teams see lies between what the first and the last row see. All invocations walk alike, since they
    // read together: nothing of this may depend on the team.
    let first_row = first_tile * ROWS;
    let last_row = first_row + teams * ROWS - 1u;
    let edges = min(vec4(first_row, first_row, last_row, last_row), vec4(most_row));
    let walk = walk_of(sight_of(shared_item, kv.len, edges));
    let begin = shared_item.begin;
    let end = min(shared_item.end, walk.end);
    let last = max(end, 1u) - 1u;

    var item = shared_item;
    item.tile = first_tile + local / slices;
    // Rows past the last one are clamped to it, and not written.
    let row = min(item.tile * ROWS + vec4(0u, 1u, 2u, 3u), vec4(most_row));
    let sight = sight_of(item, kv.len, row);
    let quad = slice + vec4(0u, 1u, 2u, 3u) * slices;
    let q = query_quads(item, row, quad);

    let sink = sinks(item, row, begin == 0u);
    var softmax = Softmax(sink.highest, sink.total);
    var sum = Quads();
    // A split that no row sees takes in one tile, in which all weights are zero.
    var first = begin;
    loop {
        // Wait until all have taken in the tile before.
        workgroupBarrier();
        fill(local, kv, kv_b, h, walk, first, last);
        workgroupBarrier();
        for (var n = 0u; n < tile_tokens; n += 4u) {
            let slot = n + vec4(0u, 1u, 2u, 3u);
            let number = first + slot;
            let walked = min(number, vec4(last));
            let token = vec4(
                token_at(walk, walked.x),
                token_at(walk, walked.y),
                token_at(walk, walked.z),
                token_at(walk, walked.w),
            );
            let products = over_slices(local, mat4x4(
                product_of(slot.x, quad, q),
                product_of(slot.y, quad, q),
                product_of(slot.z, quad, q),
                product_of(slot.w, quad, q),
            ));
            let four = four_tokens(item, kv.len, row, sight, token, number < vec4(end), products, softmax);
            softmax = four.softmax;
            sum = with_values(sum, slot, quad, four);
        }
        first += tile_tokens;
        if first >= end {
            break;
        }
    }

    let sums = Sums(item, row, vec4(1.0), softmax.highest, softmax.total);
    write_rows(sums, quad.x, sum.x);
    write_rows(sums, quad.y, sum.y);
    write_rows(sums, quad.z, sum.z);
    write_rows(sums, quad.w, sum.w);
}

// Reads K and V of the tokens from number `first` of the walk on: neighbouring invocations read neighbouring quads.
// Past the last one they read that again.
fn fill(local: u32, kv: KvLayout, kv_b: u32, h: u32, walk: Walk, first: u32, last: u32) {
    let quads = params.key_quads + params.value_quads;
    for (var i = local; i < tile_tokens * quads; i += threads) {
        let token = token_at(walk, min(first + i / quads, last));
        let slot = kv_slot_in_row(kv, kv_b, h, token);
        let quad = i % quads;
        if quad < params.key_quads {
            tile[i] = kv_key_quad(params.kv, slot, quad);
        } else {
            tile[i] = kv_value_quad(params.kv, slot, quad - params.key_quads);
        }
    }
}

// Zeros past the end of a head: there q is zero, too, but zero times an infinity would be a NaN.
fn key_quad(slot: u32, quad: u32) -> vec4<f32> {
    let at = slot * (params.key_quads + params.value_quads);
    if has_rest {
        return select(vec4(0.0), tile[at + min(quad, params.key_quads - 1u)], quad < params.key_quads);
    }
    return tile[at + quad];
}

fn value_quad(slot: u32, quad: u32) -> vec4<f32> {
    return tile[slot * (params.key_quads + params.value_quads) + params.key_quads + quad];
}

// Writes one quad of a team's rows, if it lies within the head.
fn write_rows(sums: Sums, quad: u32, quads: mat4x4<f32>) {
    let first = sums.item.tile * ROWS;
    for (var r = 0u; r < ROWS; r++) {
        if quad < params.value_quads && first + r < params.group * params.tokens {
            write_sum(sums, r, quad, quads[r]);
        }
    }
}
