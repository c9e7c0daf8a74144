// Attention of new tokens over a layer's cache, read where it lies: softmax(q Kᵀ scale) V.
//
// A workgroup computes four query rows of one K/V head over one split of the live tokens. A quad is four
// consecutive elements of a head. The invocations form a grid: `slices` along the head, `lanes` along the
// tokens. Each invocation holds 4 x 4 quads (four rows, four quads of each), or `fours` times as many, and
// reads every lanes-th token. Each lane keeps a running softmax, relative to its highest score so far
// (Milakov and Gimelshein, 2018). At the end the lanes are merged here, and the splits in
// attention_combine.wgsl (flash-decoding: Dao et al., 2023).
//
// The text is joined with `attention/` (parameters, which tokens a row sees, and how four rows take in four tokens), one
// of `layout/` (the slot of a token) and texts of `element/` (the formats of K and V).
//
// A token that a row does not see must not change the row's result, whatever bits it holds. Its weight is
// zero, but zero times an infinity or a NaN is NaN. So its score and its V are replaced by zeros with
// `select`, and so are elements past head_dim. A row that sees no token gets zeros.
//
// Packed queries (`is_packed`) are [total tokens, Hq, D] over several sequences of different length. The host
// lists the work: an item is four query rows of one sequence and a range of its tokens.
//
// group 0, binding 0: query          q, any strides over (B, Hq, Tq); not read if the output's buffer holds it
// group 0, binding 1: key_cache      [slot, D of K], slots as the layout numbers them
// group 0, binding 2: value_cache    [slot, D of V]
// group 0, binding 3: result         the output, any strides over (B, Hq, Tq); with several splits the
//                                    partial results [split, row, D of V + 2]: sums, highest score, total
//                                    weight; if packed [part, H, 4, D of V + 2]. Holds q as well if `is_pooled`
// group 1, binding 0: lists          the table of pages, records of ragged rows, items of packed queries
// group 2, binding 0: params         a uniform, or immediate data where the device has it

// Groups of four quads that an invocation holds. A GPU has registers for one; a software adapter keeps
// registers in memory, so it can hold more.
override fours: u32 = 1u;
// Whether an invocation holds whole heads. Then the loop needs no barrier, which is slow on a software
// adapter, and each lane reads consecutive tokens. On a GPU neighbouring lanes should read neighbouring
// tokens instead, so that loads are coalesced.
override is_alone: bool = false;

@compute @workgroup_size(threads)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
) {
    // x: which four query rows; y: batch row and K/V head; z: split. If x exceeds one dimension of the grid,
    // it continues along z.
    let split = workgroup.z % params.splits;
    var item = Item(
        workgroup.y / params.kv.heads,
        0u,
        params.tokens,
        workgroup.x + workgroups.x * (workgroup.z / params.splits),
        split * params.split,
        (split + 1u) * params.split,
        split,
        workgroup.y % params.kv.heads,
        workgroup.y,
    );
    if is_packed {
        item = packed_item(workgroup, workgroups);
    }
    let b = item.b;
    let h = item.h;
    let kv_b = min(b, params.kv.batch - 1u);
    let kv = kv_row(params.kv, kv_b);
    let rows = params.group * item.tokens;
    // Rows past the last one are clamped to it, and not written.
    let row = min(item.tile * ROWS + vec4(0u, 1u, 2u, 3u), vec4(rows - 1u));
    let slices = params.slices;
    let lanes = threads / slices;
    let slice = local % slices;
    let lane = local / slices;

    let sight = sight_of(item, kv.len, row);
    let walk = walk_of(sight);
    let begin = item.begin;
    let end = min(item.end, walk.end);
    let last = max(end, 1u) - 1u;

    // One quad of the four rows is a matrix; a quad of K times this matrix gives four partial scores.
    let quad0 = slice + vec4(0u, 1u, 2u, 3u) * slices;
    let quad1 = quad0 + 4u * slices;
    let quad2 = quad0 + 8u * slices;
    let quad3 = quad0 + 12u * slices;
    // In a loop, here as where results are written, and not four times in a row: a software adapter takes long to
    // compile a text as long as that.
    var q0 = Quads();
    var q1 = Quads();
    var q2 = Quads();
    var q3 = Quads();
    for (var f = 0u; f < fours; f++) {
        let quads = query_quads(item, row, quad0 + 4u * f * slices);
        switch f {
            case 0u: { q0 = quads; }
            case 1u: { q1 = quads; }
            case 2u: { q2 = quads; }
            default: { q3 = quads; }
        }
    }

    // The sink of a head stands for a token that is seen before all others, whose V is zero.
    let sink = sinks(item, row, begin + lane == 0u);
    var highest = sink.highest;
    var total = sink.total;
    var sum0 = Quads();
    var sum1 = Quads();
    var sum2 = Quads();
    var sum3 = Quads();
    // A round is four tokens a lane, or one if `is_alone`: the state for more would not fit a CPU's L1 cache.
    var first = begin + lane;
    var step = 4u * lanes;
    // A split that no row sees runs one round, in which all weights are zero.
    var rounds = max((max(end, begin) - begin + step - 1u) / step, 1u);
    if is_alone {
        step = 1u;
        rounds = max((max(end, begin) - begin + lanes - 1u) / lanes, 1u);
        // An odd length keeps the lanes' runs from starting in the same set of a CPU's cache.
        rounds |= u32(rounds >= 16u);
        first = begin + lane * rounds;
    }
    loop {
        if is_alone {
            let before = highest;
            let token = token_at(walk, min(first, last));
            let slot = kv_slot_in_row(kv, kv_b, h, token);
            let product = score_of(slot, quad0, q0, q1, q2, q3);
            let scored = score_token(item, kv.len, row, sight, token, first < end, product);
            let is_seen = scored.is_seen;
            highest = max(highest, scored.score);
            let fade = exp(before - highest);
            // Unseen tokens: select zero, since exp(LOWEST - highest) is 1 while highest is LOWEST.
            let weight = select(vec4(0.0), exp(scored.score - highest), is_seen);
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
            let number = first + vec4(0u, 1u, 2u, 3u) * lanes;
            let walked = min(number, vec4(last));
            let token = vec4(
                token_at(walk, walked.x),
                token_at(walk, walked.y),
                token_at(walk, walked.z),
                token_at(walk, walked.w),
            );
            let slot = vec4(
                kv_slot_in_row(kv, kv_b, h, token.x),
                kv_slot_in_row(kv, kv_b, h, token.y),
                kv_slot_in_row(kv, kv_b, h, token.z),
                kv_slot_in_row(kv, kv_b, h, token.w),
            );
            let products = over_slices(local, mat4x4(
                score_of(slot.x, quad0, q0, q1, q2, q3),
                score_of(slot.y, quad0, q0, q1, q2, q3),
                score_of(slot.z, quad0, q0, q1, q2, q3),
                score_of(slot.w, quad0, q0, q1, q2, q3),
            ));
            let four = four_tokens(item, kv.len, row, sight, token, number < vec4(end), products, Softmax(highest, total));
            highest = four.softmax.highest;
            total = four.softmax.total;
            sum0 = with_values(sum0, slot, quad0, four);
            if fours > 1u {
                sum1 = with_values(sum1, slot, quad1, four);
            }
            if fours > 2u {
                sum2 = with_values(sum2, slot, quad2, four);
            }
            if fours > 3u {
                sum3 = with_values(sum3, slot, quad3, four);
            }
        }
        first += step;
        rounds--;
        if rounds == 0u {
            break;
        }
    }

    // Merge the lanes, relative to the highest score of all.
    let all_highest = over_lanes(local, highest, true);
    let fade = exp(highest - all_highest);
    let all_total = over_lanes(local, total * fade, false);

    let sums = Sums(item, row, fade, all_highest, all_total);
    for (var f = 0u; f < fours; f++) {
        var quads = sum0;
        switch f {
            case 0u: {}
            case 1u: { quads = sum1; }
            case 2u: { quads = sum2; }
            default: { quads = sum3; }
        }
        write_fours(local, sums, 4u * f, quads);
    }
}

// An invocation's part of a token's four scores.
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
    if is_alone && KEY_IS_QUANTIZED {
        // The quads of an invocation are a run, and share a scale. Zeros past the end of a head are stored.
        if has_rest && quad.x >= params.key_quads {
            return vec4(0.0);
        }
        let k = kv_key_run(params.kv, slot, quad.x / 4u);
        return k[0] * q.x + k[1] * q.y + (k[2] * q.z + k[3] * q.w);
    }
    return product_of(slot, quad, q);
}

// sums * fade + V of one token * weight, for four quads.
fn with_value(
    sums: Quads,
    fade: vec4<f32>,
    slot: u32,
    quad: vec4<u32>,
    weight: vec4<f32>,
    is_seen: vec4<bool>,
) -> Quads {
    if is_alone && VALUE_IS_QUANTIZED {
        let v = kv_value_run(params.kv, slot, min(quad.x, params.value_quads - 1u) / 4u);
        return Quads(
            scaled(sums.x, fade) + outer(v[0], weight, is_seen),
            scaled(sums.y, fade) + outer(v[1], weight, is_seen),
            scaled(sums.z, fade) + outer(v[2], weight, is_seen),
            scaled(sums.w, fade) + outer(v[3], weight, is_seen),
        );
    }
    let at = min(quad, vec4(params.value_quads - 1u));
    return Quads(
        scaled(sums.x, fade) + outer(value_quad(slot, at.x), weight, is_seen),
        scaled(sums.y, fade) + outer(value_quad(slot, at.y), weight, is_seen),
        scaled(sums.z, fade) + outer(value_quad(slot, at.z), weight, is_seen),
        scaled(sums.w, fade) + outer(value_quad(slot, at.w), weight, is_seen),
    );
}

// One quad of V times each row's weight; zero for rows that do not see the token.
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

// The maximum or the sum of `mine` over the lanes. All slices of a lane pass the same value.
fn over_lanes(local: u32, mine: vec4<f32>, is_max: bool) -> vec4<f32> {
    // Wait until all have read the earlier content.
    workgroupBarrier();
    shared_vectors[threads + local] = mine;
    workgroupBarrier();
    for (var stride = threads / 2u; stride >= params.slices; stride /= 2u) {
        if local < stride {
            let near = shared_vectors[threads + local];
            let far = shared_vectors[threads + local + stride];
            shared_vectors[threads + local] = select(near + far, max(near, far), is_max);
        }
        workgroupBarrier();
    }
    return shared_vectors[threads];
}

// Adds up quads i to i + 3 of each invocation over all lanes, and writes them.
fn write_fours(local: u32, sums: Sums, i: u32, quads: Quads) {
    if threads <= 32u {
        // With few invocations, workgroup memory holds all four at once.
        workgroupBarrier();
        share(local, 0u, quads.x, sums.fade);
        share(local, 1u, quads.y, sums.fade);
        share(local, 2u, quads.z, sums.fade);
        share(local, 3u, quads.w, sums.fade);
        write_shared(local, sums, i, 4u);
        return;
    }
    for (var k = 0u; k < 4u; k++) {
        var quad = quads.x;
        switch k {
            case 0u: {}
            case 1u: { quad = quads.y; }
            case 2u: { quad = quads.z; }
            default: { quad = quads.w; }
        }
        write_quads(local, sums, i + k, quad);
    }
}

// Adds up quad i over all lanes, and writes it, if it lies within the head.
fn write_quads(local: u32, sums: Sums, i: u32, quads: mat4x4<f32>) {
    if i * params.slices < params.value_quads {
        workgroupBarrier();
        share(local, 0u, quads, sums.fade);
        write_shared(local, sums, i, 1u);
    }
}

fn share(local: u32, k: u32, quads: mat4x4<f32>, fade: vec4<f32>) {
    let faded = scaled(quads, fade);
    let at = local + k * ROWS * threads;
    shared_vectors[at] = faded[0];
    shared_vectors[at + threads] = faded[1];
    shared_vectors[at + 2u * threads] = faded[2];
    shared_vectors[at + 3u * threads] = faded[3];
}

// Adds up `count` quads from workgroup memory over all lanes, quad i of each invocation first, and writes
// one result for each quad, row and slice.
fn write_shared(local: u32, sums: Sums, i: u32, count: u32) {
    workgroupBarrier();
    let slices = params.slices;
    // With fewer results than invocations, several invocations share the lanes of one result.
    let all = count * ROWS * slices;
    let parts = threads / all;
    var sum = sum_over_lanes(local / parts, local % parts * (count * ROWS), count * ROWS);
    if parts > 1u {
        workgroupBarrier();
        shared_vectors[local] = sum;
        workgroupBarrier();
        sum = vec4(0.0);
        for (var p = 0u; p < parts; p++) {
            sum += shared_vectors[min(local, all - 1u) * parts + p];
        }
    }
    let r = local / slices % ROWS;
    let quad = (i + local / (slices * ROWS)) * slices + local % slices;
    let rows = params.group * sums.item.tokens;
    // No invocation returns early: barriers follow, and they must be in uniform control flow.
    if local < all && quad < params.value_quads && sums.item.tile * ROWS + r < rows {
        write_sum(sums, r, quad, sum);
    }
}

// The sum of one quad in workgroup memory over `count` lanes; `number` is row * slices + slice.
fn sum_over_lanes(number: u32, first_lane: u32, count: u32) -> vec4<f32> {
    let slices = params.slices;
    var at = number / slices * threads + number % slices + first_lane * slices;
    let end = at + count * slices;
    var sum = vec4(0.0);
    loop {
        sum += shared_vectors[at];
        at += slices;
        if at == end {
            break;
        }
    }
    return sum;
}

// Zeros past the end of a head: there q is zero, too, but zero times an infinity would be a NaN.
fn key_quad(slot: u32, quad: u32) -> vec4<f32> {
    if has_rest {
        let elements = kv_key_quad(params.kv, slot, min(quad, params.key_quads - 1u));
        return select(vec4(0.0), elements, quad < params.key_quads);
    }
    return kv_key_quad(params.kv, slot, quad);
}

fn value_quad(slot: u32, quad: u32) -> vec4<f32> {
    return kv_value_quad(params.kv, slot, quad);
}
