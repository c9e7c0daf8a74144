// Attention of new tokens over a layer's cache, read where it lies: softmax(q Kᵀ scale) V.
//
// A workgroup takes four query rows that share a K/V head, and one split of the live tokens. Its threads
// lie side by side along the head (slices) and along the tokens (lanes): a thread holds up to four quads
// of elements of each of the four rows, or eight, and meets every lanes-th token. Each lane keeps a softmax of its
// own, relative to the highest score so far (Milakov and Gimelshein, 2018); at the end the lanes are put
// together, and the splits by attention_combine.wgsl (flash-decoding: Dao et al., 2023).
//
// Texts are joined: of `layout/` (where a token lies) and of `element/` (what its words mean).
//
// group 0, binding 0: query          q, any strides over (B, Hq, Tq)
// group 0, binding 1: key_cache      [slot, D of K], slots as the layout numbers them
// group 0, binding 2: value_cache    [slot, D of V]
// group 0, binding 3: result         the output, any strides over (B, Hq, Tq); or, of several splits,
//                                    [split, row, D of V + 2]: sums, highest score, total weight
// group 1, binding 0: lists          the table of pages
// group 2, binding 0: params         a uniform, or immediate data where the device has it

struct Rows {
    offset: u32,
    stride_b: u32,
    stride_h: u32,
    stride_t: u32,
}

struct Params {
    kv: KvLayout,
    // In elements.
    query: Rows,
    output: Rows,
    // Units of a head, and quads of elements.
    key_units: u32,
    value_units: u32,
    key_quads: u32,
    value_quads: u32,
    // Query heads of a K/V head; new tokens of a batch row.
    group: u32,
    tokens: u32,
    // Threads along a head: a power of two.
    slices: u32,
    // Tokens of a split, and how many there are.
    split: u32,
    splits: u32,
    batch: u32,
    scale: f32,
    is_causal: u32,
}

@group(0) @binding(0) var<storage, read> query: array<f32>;
@group(0) @binding(1) var<storage, read> key_cache: array<Unit>;
@group(0) @binding(2) var<storage, read> value_cache: array<Unit>;
@group(0) @binding(3) var<storage, read_write> result: array<f32>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

// Whether a thread holds eight quads. A GPU has no registers for as many, but a software adapter has no
// registers at all, and pays for what its threads tell each other.
override is_wide: bool = false;

const THREADS: u32 = 128u;
const ROWS: u32 = 4u;
const LOWEST: f32 = -3.0e38;

// What threads tell each other: four vectors each.
var<workgroup> told: array<vec4<f32>, 512>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let b = group.y / params.kv.heads;
    let h = group.y % params.kv.heads;
    let rows = params.group * params.tokens;
    // Past the last row it comes again, and is not written.
    let row = min(group.x * ROWS + vec4(0u, 1u, 2u, 3u), vec4(rows - 1u));
    let lanes = THREADS / params.slices;
    let slice = local % params.slices;
    let lane = local / params.slices;

    // How many tokens each row sees: a new token sees those before it and itself.
    let unseen = select(vec4(0u), params.tokens - 1u - row / params.group, params.is_causal != 0u);
    let seen = params.kv.len - unseen;
    let begin = group.z * params.split;
    let end = min(begin + params.split, max(max(seen.x, seen.y), max(seen.z, seen.w)));

    // A quad of each of the four rows is a matrix: a quad of K times it is four scores at once.
    let quad = slice + vec4(0u, 1u, 2u, 3u) * params.slices;
    let q0 = query_quads(b, h, row, quad.x);
    let q1 = query_quads(b, h, row, quad.y);
    let q2 = query_quads(b, h, row, quad.z);
    let q3 = query_quads(b, h, row, quad.w);
    let far = quad + 4u * params.slices;
    var q4 = mat4x4<f32>();
    var q5 = mat4x4<f32>();
    var q6 = mat4x4<f32>();
    var q7 = mat4x4<f32>();
    if is_wide {
        q4 = query_quads(b, h, row, far.x);
        q5 = query_quads(b, h, row, far.y);
        q6 = query_quads(b, h, row, far.z);
        q7 = query_quads(b, h, row, far.w);
    }
    // What lies past the head is read as its last quad: its q is zero, and its sum is not written.
    let key_at = min(quad, vec4(params.key_quads - 1u));
    let key_far = min(far, vec4(params.key_quads - 1u));
    let value_at = min(quad, vec4(params.value_quads - 1u));
    let value_far = min(far, vec4(params.value_quads - 1u));

    var highest = vec4(LOWEST);
    var total = vec4(0.0);
    var sum0 = mat4x4<f32>();
    var sum1 = mat4x4<f32>();
    var sum2 = mat4x4<f32>();
    var sum3 = mat4x4<f32>();
    var sum4 = mat4x4<f32>();
    var sum5 = mat4x4<f32>();
    var sum6 = mat4x4<f32>();
    var sum7 = mat4x4<f32>();
    for (var first = begin; first < end; first += 4u * lanes) {
        let token = first + lane + vec4(0u, 1u, 2u, 3u) * lanes;
        let held = min(token, vec4(end - 1u));
        let slot = vec4(
            kv_slot(params.kv, b, h, held.x),
            kv_slot(params.kv, b, h, held.y),
            kv_slot(params.kv, b, h, held.z),
            kv_slot(params.kv, b, h, held.w),
        );
        var part = scores(slot, key_at, q0, q1, q2, q3);
        if is_wide {
            part += scores(slot, key_far, q4, q5, q6, q7);
        }
        workgroupBarrier();
        told[local] = part[0];
        told[local + THREADS] = part[1];
        told[local + 2u * THREADS] = part[2];
        told[local + 3u * THREADS] = part[3];
        workgroupBarrier();
        // All slices of a lane add up the same numbers in the same order.
        var sums = mat4x4<f32>();
        var i = lane * params.slices;
        loop {
            sums += mat4x4(told[i], told[i + THREADS], told[i + 2u * THREADS], told[i + 3u * THREADS]);
            i++;
            continuing {
                break if i == (lane + 1u) * params.slices;
            }
        }
        let ends = min(seen, vec4(end));
        let s0 = select(vec4(LOWEST), sums[0], vec4(token.x) < ends);
        let s1 = select(vec4(LOWEST), sums[1], vec4(token.y) < ends);
        let s2 = select(vec4(LOWEST), sums[2], vec4(token.z) < ends);
        let s3 = select(vec4(LOWEST), sums[3], vec4(token.w) < ends);
        let before = highest;
        highest = max(max(highest, max(s0, s1)), max(s2, s3));
        let fade = exp(before - highest);
        // A row that sees none of these tokens gives them no weight, not a weight of e to the zero.
        let w0 = select(vec4(0.0), exp(s0 - highest), vec4(token.x) < ends);
        let w1 = select(vec4(0.0), exp(s1 - highest), vec4(token.y) < ends);
        let w2 = select(vec4(0.0), exp(s2 - highest), vec4(token.z) < ends);
        let w3 = select(vec4(0.0), exp(s3 - highest), vec4(token.w) < ends);
        total = total * fade + (w0 + w1) + (w2 + w3);
        let weights = transpose(mat4x4(w0, w1, w2, w3));
        sum0 = scaled(sum0, fade) + values(slot, value_at.x) * weights;
        sum1 = scaled(sum1, fade) + values(slot, value_at.y) * weights;
        sum2 = scaled(sum2, fade) + values(slot, value_at.z) * weights;
        sum3 = scaled(sum3, fade) + values(slot, value_at.w) * weights;
        if is_wide {
            sum4 = scaled(sum4, fade) + values(slot, value_far.x) * weights;
            sum5 = scaled(sum5, fade) + values(slot, value_far.y) * weights;
            sum6 = scaled(sum6, fade) + values(slot, value_far.z) * weights;
            sum7 = scaled(sum7, fade) + values(slot, value_far.w) * weights;
        }
    }

    // The lanes put together, relative to the highest score of all.
    told[local + THREADS] = highest;
    let all_highest = over_lanes(local, true);
    let fade = exp(highest - all_highest);
    workgroupBarrier();
    told[local + THREADS] = total * fade;
    let all_total = over_lanes(local, false);

    write_quads(local, group, row, 0u, scaled(sum0, fade), all_highest, all_total);
    if params.slices < params.value_quads {
        write_quads(local, group, row, 1u, scaled(sum1, fade), all_highest, all_total);
    }
    if 2u * params.slices < params.value_quads {
        write_quads(local, group, row, 2u, scaled(sum2, fade), all_highest, all_total);
    }
    if 3u * params.slices < params.value_quads {
        write_quads(local, group, row, 3u, scaled(sum3, fade), all_highest, all_total);
    }
    if is_wide {
        if 4u * params.slices < params.value_quads {
            write_quads(local, group, row, 4u, scaled(sum4, fade), all_highest, all_total);
        }
        if 5u * params.slices < params.value_quads {
            write_quads(local, group, row, 5u, scaled(sum5, fade), all_highest, all_total);
        }
        if 6u * params.slices < params.value_quads {
            write_quads(local, group, row, 6u, scaled(sum6, fade), all_highest, all_total);
        }
        if 7u * params.slices < params.value_quads {
            write_quads(local, group, row, 7u, scaled(sum7, fade), all_highest, all_total);
        }
    }
}

// One quad of four query rows, scaled; a row a column.
fn query_quads(b: u32, h: u32, row: vec4<u32>, quad: u32) -> mat4x4<f32> {
    return mat4x4(
        query_quad(b, h, row.x, quad),
        query_quad(b, h, row.y, quad),
        query_quad(b, h, row.z, quad),
        query_quad(b, h, row.w, quad),
    );
}

fn query_quad(b: u32, h: u32, row: u32, quad: u32) -> vec4<f32> {
    let at = place(params.query, b, h, row);
    let d = 4u * quad + vec4(0u, 1u, 2u, 3u);
    let i = at + min(d, vec4(params.kv.key_dim - 1u));
    let elements = vec4(query[i.x], query[i.y], query[i.z], query[i.w]);
    return params.scale * select(vec4(0.0), elements, d < vec4(params.kv.key_dim));
}

// Where a query row begins: rows of a K/V head count its query heads first, then the new tokens.
fn place(lie: Rows, b: u32, h: u32, row: u32) -> u32 {
    let head = h * params.group + row % params.group;
    return lie.offset + b * lie.stride_b + head * lie.stride_h + (row / params.group) * lie.stride_t;
}

// Four quads' part of the scores of four tokens, a token a column; rows as they lie in q.
fn scores(
    slot: vec4<u32>,
    quad: vec4<u32>,
    q0: mat4x4<f32>,
    q1: mat4x4<f32>,
    q2: mat4x4<f32>,
    q3: mat4x4<f32>,
) -> mat4x4<f32> {
    return mat4x4(
        score(slot.x, quad, q0, q1, q2, q3),
        score(slot.y, quad, q0, q1, q2, q3),
        score(slot.z, quad, q0, q1, q2, q3),
        score(slot.w, quad, q0, q1, q2, q3),
    );
}

fn score(
    slot: u32,
    quad: vec4<u32>,
    q0: mat4x4<f32>,
    q1: mat4x4<f32>,
    q2: mat4x4<f32>,
    q3: mat4x4<f32>,
) -> vec4<f32> {
    return key_quad(slot, quad.x) * q0 + key_quad(slot, quad.y) * q1
        + (key_quad(slot, quad.z) * q2 + key_quad(slot, quad.w) * q3);
}

// The same quad of four tokens' V; a token a column.
fn values(slot: vec4<u32>, quad: u32) -> mat4x4<f32> {
    return mat4x4(
        value_quad(slot.x, quad),
        value_quad(slot.y, quad),
        value_quad(slot.z, quad),
        value_quad(slot.w, quad),
    );
}

// Each row's column times a factor of its own.
fn scaled(sums: mat4x4<f32>, by: vec4<f32>) -> mat4x4<f32> {
    return mat4x4(sums[0] * by.x, sums[1] * by.y, sums[2] * by.z, sums[3] * by.w);
}

// The maximum, or the sum, over the lanes of what each thread put at told[local + THREADS]. All slices of
// a lane put the same there.
fn over_lanes(local: u32, is_max: bool) -> vec4<f32> {
    workgroupBarrier();
    for (var stride = THREADS / 2u; stride >= params.slices; stride /= 2u) {
        if local < stride {
            let mine = told[THREADS + local];
            let other = told[THREADS + local + stride];
            told[THREADS + local] = select(mine + other, max(mine, other), is_max);
        }
        workgroupBarrier();
    }
    return told[THREADS];
}

// Adds up the i-th quads of all lanes, and writes them: one for each row and slice.
fn write_quads(
    local: u32,
    group: vec3<u32>,
    row: vec4<u32>,
    i: u32,
    sums: mat4x4<f32>,
    highest: vec4<f32>,
    total: vec4<f32>,
) {
    workgroupBarrier();
    told[local] = sums[0];
    told[local + THREADS] = sums[1];
    told[local + 2u * THREADS] = sums[2];
    told[local + 3u * THREADS] = sums[3];
    workgroupBarrier();
    // ROWS * slices quads to write; each is first added up in parts of four lanes.
    let slices = params.slices;
    let parts = THREADS / (ROWS * slices);
    let written = local / parts;
    let from_lane = 4u * (local % parts);
    let at = (written / slices) * THREADS + written % slices;
    let part = (told[at + from_lane * slices] + told[at + (from_lane + 1u) * slices])
        + (told[at + (from_lane + 2u) * slices] + told[at + (from_lane + 3u) * slices]);
    workgroupBarrier();
    told[local] = part;
    workgroupBarrier();
    let r = local / slices;
    let quad = i * slices + local % slices;
    if r >= ROWS || quad >= params.value_quads || group.x * ROWS + r >= params.group * params.tokens {
        return;
    }
    var sum = vec4(0.0);
    for (var p = 0u; p < parts; p++) {
        sum += told[local * parts + p];
    }
    if params.splits == 1u {
        let at = place(params.output, group.y / params.kv.heads, group.y % params.kv.heads, row[r]);
        write_elements(at, quad, sum / total[r]);
    } else {
        let rows = params.group * params.tokens;
        let all = params.batch * params.kv.heads * rows;
        let at = (group.z * all + group.y * rows + row[r]) * (params.kv.value_dim + 2u);
        write_elements(at, quad, sum);
        if quad == 0u {
            result[at + params.kv.value_dim] = highest[r];
            result[at + params.kv.value_dim + 1u] = total[r];
        }
    }
}

fn write_elements(at: u32, quad: u32, elements: vec4<f32>) {
    for (var i = 0u; i < min(4u, params.kv.value_dim - 4u * quad); i++) {
        result[at + 4u * quad + i] = elements[i];
    }
}
