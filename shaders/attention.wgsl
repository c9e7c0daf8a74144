// Attention of new tokens over a layer's cache, read where it lies: softmax(q Kᵀ scale) V.
//
// A workgroup takes four query rows that share a K/V head, and one split of the live tokens. Its threads
// lie side by side along the head (slices) and along the tokens (lanes): a thread holds four quads of
// elements of each of the four rows, or several fours, and meets its lane's share of the tokens. Each lane
// keeps a softmax of its own, relative to the highest score so far (Milakov and Gimelshein, 2018); at the
// end the lanes are put together, and the splits by attention_combine.wgsl (flash-decoding: Dao et al.,
// 2023).
//
// Texts are joined: of `layout/` (where a token lies) and of `element/` (what its words mean).
//
// A token that a row does not see must not change the row's result, whatever bits it holds: its weight is
// zero, but zero times an infinity or a NaN is a NaN. So its score and its V are replaced by zeros, selected
// rather than multiplied away, and so are elements past head_dim.
//
// group 0, binding 0: query          q, any strides over (B, Hq, Tq); not read if the output's buffer holds it
// group 0, binding 1: key_cache      [slot, D of K], slots as the layout numbers them
// group 0, binding 2: value_cache    [slot, D of V]
// group 0, binding 3: result         the output, any strides over (B, Hq, Tq); or, of several splits,
//                                    [split, row, D of V + 2]: sums, highest score, total weight.
//                                    Holds q as well if `is_pooled`
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
    // Units of a head, and quads of elements of V's.
    key_units: u32,
    value_units: u32,
    value_quads: u32,
    // Query heads of a K/V head; new tokens of a batch row.
    group: u32,
    tokens: u32,
    // Threads along a head: a power of two.
    slices: u32,
    // Tokens of a split, and how many there are.
    split: u32,
    splits: u32,
    scale: f32,
    is_causal: u32,
}

@group(0) @binding(0) var<storage, read> query: array<f32>;
@group(0) @binding(1) var<storage, read> key_cache: array<Unit>;
@group(0) @binding(2) var<storage, read> value_cache: array<Unit>;
@group(0) @binding(3) var<storage, read_write> result: array<f32>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

// Threads of a workgroup.
override threads: u32 = 128u;
// Fours of quads that a thread holds. A GPU has registers for one; a software adapter keeps registers in
// memory, and has as many as it likes.
override fours: u32 = 1u;
// Whether a thread holds whole heads, so that lanes tell each other nothing on their way (a software
// adapter pays dearly for a barrier in a loop), and a lane's tokens follow one another: neighbours on a
// GPU should read neighbours, while a CPU runs their loads one by one and fetches ahead of each.
override is_alone: bool = false;
// How V of a token that a row does not see is kept out of the row's sums.
// 0: every row sees the same tokens, so V of others is replaced by zeros as it is loaded.
// 1: per row, but only in rounds with a token that some row does not see: a branch, which a GPU skips.
// 2: per row in every round, for a software adapter, which runs both sides of a branch.
override masking: u32 = 1u;
// Whether the threads of a lane hold more elements than a head of K has.
override has_rest: bool = true;
// Whether q is read from the buffer of the output: one buffer cannot be bound for reading and for writing.
override is_pooled: bool = false;

const ROWS: u32 = 4u;
// Below all scores, and far enough from the end of f32 that no difference is infinite.
const LOWEST: f32 = -1.0e38;

// What threads tell each other: four vectors each, of 128 threads at most.
var<workgroup> told: array<vec4<f32>, 512>;

// Four quads of elements of the four rows; of each a matrix, a row a column.
struct Quads {
    x: mat4x4<f32>,
    y: mat4x4<f32>,
    z: mat4x4<f32>,
    w: mat4x4<f32>,
}

// Which of four tokens each of the four rows sees.
struct Seen {
    x: vec4<bool>,
    y: vec4<bool>,
    z: vec4<bool>,
    w: vec4<bool>,
}

@compute @workgroup_size(threads)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
) {
    // Four rows' number, the K/V row, and the split. Where there are too many fours for a side of the grid
    // they go on along the third.
    let group = vec3(
        workgroup.x + workgroups.x * (workgroup.z / params.splits),
        workgroup.y,
        workgroup.z % params.splits,
    );
    let b = group.y / params.kv.heads;
    let h = group.y % params.kv.heads;
    let rows = params.group * params.tokens;
    // Past the last row it comes again, and is not written.
    let row = min(group.x * ROWS + vec4(0u, 1u, 2u, 3u), vec4(rows - 1u));
    let slices = params.slices;
    let lanes = threads / slices;
    let slice = local % slices;
    let lane = local / slices;

    // How many tokens each row sees: a new token sees those before it and itself.
    let unseen = select(vec4(0u), params.tokens - 1u - row / params.group, params.is_causal != 0u);
    let seen = kv_len(params.kv, b) - unseen;
    let begin = group.z * params.split;
    let end = min(begin + params.split, max(max(seen.x, seen.y), max(seen.z, seen.w)));

    // A quad of the four rows is a matrix: a quad of K times it is four scores at once.
    let quad0 = slice + vec4(0u, 1u, 2u, 3u) * slices;
    let quad1 = quad0 + 4u * slices;
    let quad2 = quad0 + 8u * slices;
    let quad3 = quad0 + 12u * slices;
    let q0 = query_quads(b, h, row, quad0);
    var q1 = Quads();
    var q2 = Quads();
    var q3 = Quads();
    if fours > 1u {
        q1 = query_quads(b, h, row, quad1);
    }
    if fours > 2u {
        q2 = query_quads(b, h, row, quad2);
    }
    if fours > 3u {
        q3 = query_quads(b, h, row, quad3);
    }

    var highest = vec4(LOWEST);
    var total = vec4(0.0);
    var sum0 = Quads();
    var sum1 = Quads();
    var sum2 = Quads();
    var sum3 = Quads();
    // A round is four tokens of a lane. Alone it is one: what a CPU runs and holds for more does not fit into
    // its nearest cache.
    var first = begin + lane;
    var step = 4u * lanes;
    // A split that no row sees is gone through once, and weighs nothing.
    var rounds = max((max(end, begin) - begin + step - 1u) / step, 1u);
    if is_alone {
        step = 1u;
        rounds = max((max(end, begin) - begin + lanes - 1u) / lanes, 1u);
        // Long runs have an odd length, so that they do not all begin in the same set of a CPU's cache.
        rounds |= u32(rounds >= 16u);
        first = begin + lane * rounds;
    }
    loop {
        let before = highest;
        if is_alone {
            let slot = kv_slot(params.kv, b, h, min(first, end - 1u));
            // A row that does not see the token gives it no weight, not a weight of e to the zero.
            let is_seen = vec4(first) < min(seen, vec4(end));
            let score = select(vec4(LOWEST), score_of(slot, quad0, q0, q1, q2, q3), is_seen);
            highest = max(highest, score);
            let fade = exp(before - highest);
            let weight = select(vec4(0.0), exp(score - highest), is_seen);
            total = total * fade + weight;
            sum0 = with_value(sum0, fade, slot, quad0, weight, is_seen);
            if fours > 1u {
                sum1 = with_value(sum1, fade, slot, quad1, weight, is_seen);
            }
            if fours > 2u {
                sum2 = with_value(sum2, fade, slot, quad2, weight, is_seen);
            }
            if fours > 3u {
                sum3 = with_value(sum3, fade, slot, quad3, weight, is_seen);
            }
        } else {
            let token = first + vec4(0u, 1u, 2u, 3u) * lanes;
            let held = min(token, vec4(end - 1u));
            let slot = vec4(
                kv_slot(params.kv, b, h, held.x),
                kv_slot(params.kv, b, h, held.y),
                kv_slot(params.kv, b, h, held.z),
                kv_slot(params.kv, b, h, held.w),
            );
            let scores = over_slices(local, mat4x4(
                score_of(slot.x, quad0, q0, q1, q2, q3),
                score_of(slot.y, quad0, q0, q1, q2, q3),
                score_of(slot.z, quad0, q0, q1, q2, q3),
                score_of(slot.w, quad0, q0, q1, q2, q3),
            ));
            let ends = min(seen, vec4(end));
            let is_seen = Seen(
                token < vec4(ends.x),
                token < vec4(ends.y),
                token < vec4(ends.z),
                token < vec4(ends.w),
            );
            let s0 = select(vec4(LOWEST), scores[0], vec4(token.x) < ends);
            let s1 = select(vec4(LOWEST), scores[1], vec4(token.y) < ends);
            let s2 = select(vec4(LOWEST), scores[2], vec4(token.z) < ends);
            let s3 = select(vec4(LOWEST), scores[3], vec4(token.w) < ends);
            highest = max(max(highest, max(s0, s1)), max(s2, s3));
            let fade = exp(before - highest);
            // As above: no weight where a row does not see a token.
            let w0 = select(vec4(0.0), exp(s0 - highest), vec4(token.x) < ends);
            let w1 = select(vec4(0.0), exp(s1 - highest), vec4(token.y) < ends);
            let w2 = select(vec4(0.0), exp(s2 - highest), vec4(token.z) < ends);
            let w3 = select(vec4(0.0), exp(s3 - highest), vec4(token.w) < ends);
            total = total * fade + (w0 + w1) + (w2 + w3);
            let weights = transpose(mat4x4(w0, w1, w2, w3));
            sum0 = with_values(sum0, fade, slot, quad0, weights, is_seen);
            if fours > 1u {
                sum1 = with_values(sum1, fade, slot, quad1, weights, is_seen);
            }
            if fours > 2u {
                sum2 = with_values(sum2, fade, slot, quad2, weights, is_seen);
            }
            if fours > 3u {
                sum3 = with_values(sum3, fade, slot, quad3, weights, is_seen);
            }
        }
        first += step;
        rounds--;
        if rounds == 0u {
            break;
        }
    }

    // The lanes put together, relative to the highest score of all.
    let all_highest = over_lanes(local, highest, true);
    let fade = exp(highest - all_highest);
    let all_total = over_lanes(local, total * fade, false);

    let sums = Sums(group, row, fade, all_highest, all_total);
    write_fours(local, sums, 0u, sum0);
    if fours > 1u {
        write_fours(local, sums, 4u, sum1);
    }
    if fours > 2u {
        write_fours(local, sums, 8u, sum2);
    }
    if fours > 3u {
        write_fours(local, sums, 12u, sum3);
    }
}

// Four quads of four query rows, scaled.
fn query_quads(b: u32, h: u32, row: vec4<u32>, quad: vec4<u32>) -> Quads {
    return Quads(
        query_rows(b, h, row, quad.x),
        query_rows(b, h, row, quad.y),
        query_rows(b, h, row, quad.z),
        query_rows(b, h, row, quad.w),
    );
}

fn query_rows(b: u32, h: u32, row: vec4<u32>, quad: u32) -> mat4x4<f32> {
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
    var elements: vec4<f32>;
    if is_pooled {
        elements = vec4(result[i.x], result[i.y], result[i.z], result[i.w]);
    } else {
        elements = vec4(query[i.x], query[i.y], query[i.z], query[i.w]);
    }
    return params.scale * select(vec4(0.0), elements, d < vec4(params.kv.key_dim));
}

// Where a query row begins: rows of a K/V head count its query heads first, then the new tokens.
fn place(lie: Rows, b: u32, h: u32, row: u32) -> u32 {
    let head = h * params.group + row % params.group;
    return lie.offset + b * lie.stride_b + head * lie.stride_h + (row / params.group) * lie.stride_t;
}

// A thread's part of a token's scores, read as it lies in memory; rows as they lie in q.
fn score_of(slot: u32, quad: vec4<u32>, q0: Quads, q1: Quads, q2: Quads, q3: Quads) -> vec4<f32> {
    var sum = score(slot, quad, q0);
    if fours > 1u {
        sum += score(slot, quad + 4u * params.slices, q1);
    }
    if fours > 2u {
        sum += score(slot, quad + 8u * params.slices, q2);
    }
    if fours > 3u {
        sum += score(slot, quad + 12u * params.slices, q3);
    }
    return sum;
}

fn score(slot: u32, quad: vec4<u32>, q: Quads) -> vec4<f32> {
    return key_quad(slot, quad.x) * q.x + key_quad(slot, quad.y) * q.y
        + (key_quad(slot, quad.z) * q.z + key_quad(slot, quad.w) * q.w);
}

// The scores of a lane's tokens: all of its slices add up the same numbers in the same order.
fn over_slices(local: u32, part: mat4x4<f32>) -> mat4x4<f32> {
    workgroupBarrier();
    told[local] = part[0];
    told[local + threads] = part[1];
    told[local + 2u * threads] = part[2];
    told[local + 3u * threads] = part[3];
    workgroupBarrier();
    var sums = mat4x4<f32>();
    var i = local - local % params.slices;
    let end = i + params.slices;
    loop {
        sums += mat4x4(told[i], told[i + threads], told[i + 2u * threads], told[i + 3u * threads]);
        i++;
        if i == end {
            break;
        }
    }
    return sums;
}

// Sums so far, faded, and four quads of V of four tokens by their weights.
fn with_values(
    sums: Quads,
    fade: vec4<f32>,
    slot: vec4<u32>,
    quad: vec4<u32>,
    weights: mat4x4<f32>,
    is_seen: Seen,
) -> Quads {
    // Quads past the head are clamped to its last one, and their sums are not written.
    let at = min(quad, vec4(params.value_quads - 1u));
    return Quads(
        scaled(sums.x, fade) + weighed(values(slot, at.x, is_seen), weights, is_seen),
        scaled(sums.y, fade) + weighed(values(slot, at.y, is_seen), weights, is_seen),
        scaled(sums.z, fade) + weighed(values(slot, at.z, is_seen), weights, is_seen),
        scaled(sums.w, fade) + weighed(values(slot, at.w, is_seen), weights, is_seen),
    );
}

// Sums so far, faded, and four quads of V of one token by its weights.
fn with_value(
    sums: Quads,
    fade: vec4<f32>,
    slot: u32,
    quad: vec4<u32>,
    weight: vec4<f32>,
    is_seen: vec4<bool>,
) -> Quads {
    let at = min(quad, vec4(params.value_quads - 1u));
    return Quads(
        scaled(sums.x, fade) + outer(value_quad(slot, at.x), weight, is_seen),
        scaled(sums.y, fade) + outer(value_quad(slot, at.y), weight, is_seen),
        scaled(sums.z, fade) + outer(value_quad(slot, at.z), weight, is_seen),
        scaled(sums.w, fade) + outer(value_quad(slot, at.w), weight, is_seen),
    );
}

// A quad, once for each row that sees it, by its weight.
fn outer(quad: vec4<f32>, weight: vec4<f32>, is_seen: vec4<bool>) -> mat4x4<f32> {
    if masking == 0u {
        let seen = select(vec4(0.0), quad, is_seen.x);
        return mat4x4(seen * weight.x, seen * weight.y, seen * weight.z, seen * weight.w);
    }
    return mat4x4(
        select(vec4(0.0), quad, is_seen.x) * weight.x,
        select(vec4(0.0), quad, is_seen.y) * weight.y,
        select(vec4(0.0), quad, is_seen.z) * weight.z,
        select(vec4(0.0), quad, is_seen.w) * weight.w,
    );
}

// The same quad of four tokens' V; a token a column.
fn values(slot: vec4<u32>, quad: u32, is_seen: Seen) -> mat4x4<f32> {
    let x = value_quad(slot.x, quad);
    let y = value_quad(slot.y, quad);
    let z = value_quad(slot.z, quad);
    let w = value_quad(slot.w, quad);
    if masking == 0u {
        return masked(mat4x4(x, y, z, w), is_seen.x);
    }
    return mat4x4(x, y, z, w);
}

// Four tokens' V by each row's weights: a token a column becomes a row of q a column.
fn weighed(values: mat4x4<f32>, weights: mat4x4<f32>, is_seen: Seen) -> mat4x4<f32> {
    if masking == 2u || (masking == 1u && !all(is_seen.x & is_seen.y & is_seen.z & is_seen.w)) {
        return mat4x4(
            masked(values, is_seen.x) * weights[0],
            masked(values, is_seen.y) * weights[1],
            masked(values, is_seen.z) * weights[2],
            masked(values, is_seen.w) * weights[3],
        );
    }
    return values * weights;
}

// Zeros in place of the tokens that are not seen.
fn masked(values: mat4x4<f32>, is_seen: vec4<bool>) -> mat4x4<f32> {
    return mat4x4(
        select(vec4(0.0), values[0], is_seen.x),
        select(vec4(0.0), values[1], is_seen.y),
        select(vec4(0.0), values[2], is_seen.z),
        select(vec4(0.0), values[3], is_seen.w),
    );
}

// Each row's column times a factor of its own.
fn scaled(sums: mat4x4<f32>, by: vec4<f32>) -> mat4x4<f32> {
    return mat4x4(sums[0] * by.x, sums[1] * by.y, sums[2] * by.z, sums[3] * by.w);
}

// The maximum, or the sum, over the lanes of what each thread tells. All slices of a lane tell the same.
fn over_lanes(local: u32, mine: vec4<f32>, is_max: bool) -> vec4<f32> {
    // Others may still be reading what was told before.
    workgroupBarrier();
    told[threads + local] = mine;
    workgroupBarrier();
    for (var stride = threads / 2u; stride >= params.slices; stride /= 2u) {
        if local < stride {
            let near = told[threads + local];
            let far = told[threads + local + stride];
            told[threads + local] = select(near + far, max(near, far), is_max);
        }
        workgroupBarrier();
    }
    return told[threads];
}

// What all sums of a workgroup are written with.
struct Sums {
    group: vec3<u32>,
    row: vec4<u32>,
    // What brings a thread's sums to the highest score of all.
    fade: vec4<f32>,
    highest: vec4<f32>,
    total: vec4<f32>,
}

// Adds up four quads of all lanes, the i-th of each thread and on, and writes them.
fn write_fours(local: u32, sums: Sums, i: u32, quads: Quads) {
    if threads <= 32u {
        // Few threads have room to tell all four at once.
        workgroupBarrier();
        tell(local, 0u, quads.x, sums.fade);
        tell(local, 1u, quads.y, sums.fade);
        tell(local, 2u, quads.z, sums.fade);
        tell(local, 3u, quads.w, sums.fade);
        write_told(local, sums, i, 4u);
        return;
    }
    write_quads(local, sums, i, quads.x);
    write_quads(local, sums, i + 1u, quads.y);
    write_quads(local, sums, i + 2u, quads.z);
    write_quads(local, sums, i + 3u, quads.w);
}

// Adds up the i-th quads of all lanes, and writes them, if there are any.
fn write_quads(local: u32, sums: Sums, i: u32, quads: mat4x4<f32>) {
    if i * params.slices < params.value_quads {
        workgroupBarrier();
        tell(local, 0u, quads, sums.fade);
        write_told(local, sums, i, 1u);
    }
}

fn tell(local: u32, k: u32, quads: mat4x4<f32>, fade: vec4<f32>) {
    let faded = scaled(quads, fade);
    let at = local + k * ROWS * threads;
    told[at] = faded[0];
    told[at + threads] = faded[1];
    told[at + 2u * threads] = faded[2];
    told[at + 3u * threads] = faded[3];
}

// Adds up the `count` quads that all lanes have told, the i-th of each thread and on, and writes them: one
// for each quad, row and slice.
fn write_told(local: u32, sums: Sums, i: u32, count: u32) {
    workgroupBarrier();
    let slices = params.slices;
    // All threads are busy: where these are fewer quads, the lanes of one are added up in parts.
    let all = count * ROWS * slices;
    let parts = threads / all;
    var sum = told_by(local / parts, local % parts * (count * ROWS), count * ROWS);
    if parts > 1u {
        workgroupBarrier();
        told[local] = sum;
        workgroupBarrier();
        sum = vec4(0.0);
        for (var p = 0u; p < parts; p++) {
            sum += told[min(local, all - 1u) * parts + p];
        }
    }
    let r = local / slices % ROWS;
    let quad = (i + local / (slices * ROWS)) * slices + local % slices;
    let rows = params.group * params.tokens;
    // No thread leaves early: barriers follow, and some compilers want to see that all come to them.
    if local < all && quad < params.value_quads && sums.group.x * ROWS + r < rows {
        write_sum(sums, r, quad, sum);
    }
}

// Writes one quad of row r: of the output or, of several splits, of this one's part of it.
fn write_sum(sums: Sums, r: u32, quad: u32, sum: vec4<f32>) {
    let b = sums.group.y / params.kv.heads;
    let h = sums.group.y % params.kv.heads;
    if params.splits == 1u {
        write_elements(place(params.output, b, h, sums.row[r]), quad, sum / sums.total[r]);
    } else {
        let rows = params.group * params.tokens;
        let results = params.kv.batch * params.kv.heads * rows;
        let at = (sums.group.z * results + sums.group.y * rows + sums.row[r]) * (params.kv.value_dim + 2u);
        write_elements(at, quad, sum);
        if quad == 0u {
            result[at + params.kv.value_dim] = sums.highest[r];
            result[at + params.kv.value_dim + 1u] = sums.total[r];
        }
    }
}

// The sum of one of the told quads (its number counts slices first, then rows) over `count` lanes.
fn told_by(number: u32, first_lane: u32, count: u32) -> vec4<f32> {
    let slices = params.slices;
    var at = number / slices * threads + number % slices + first_lane * slices;
    let end = at + count * slices;
    var sum = vec4(0.0);
    loop {
        sum += told[at];
        at += slices;
        if at == end {
            break;
        }
    }
    return sum;
}

fn write_elements(at: u32, quad: u32, elements: vec4<f32>) {
    for (var i = 0u; i < min(4u, params.kv.value_dim - 4u * quad); i++) {
        result[at + 4u * quad + i] = elements[i];
    }
}
