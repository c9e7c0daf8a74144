// How four query rows take in four tokens at a time, which the attention kernels share. Each has `key_quad` and
// `value_quad`: a quad of K and of V of what it calls a slot.

// Invocations a workgroup.
override threads: u32 = 128u;
// How V of a token that a row does not see is masked.
// 0: all rows see the same tokens, so V of the others becomes zero when it is loaded.
// 1: per row, behind a branch that is taken only in rounds with such a token.
// 2: per row in every round, for a software adapter, which runs both sides of a branch.
override masking: u32 = 1u;
// Whether the invocations of a lane hold more elements than a head of K has.
override has_rest: bool = true;

const ROWS: u32 = 4u;

// Four vectors an invocation, for 128 invocations at most.
var<workgroup> shared_vectors: array<vec4<f32>, 512>;

// Four quads of each of the four rows. A matrix holds one quad: column r is row r's.
struct Quads {
    x: mat4x4<f32>,
    y: mat4x4<f32>,
    z: mat4x4<f32>,
    w: mat4x4<f32>,
}

// x to w: query rows; each component: whether the row sees that of four tokens.
struct Seen {
    x: vec4<bool>,
    y: vec4<bool>,
    z: vec4<bool>,
    w: vec4<bool>,
}

// The running softmax of four rows: the highest score so far, and the total weight relative to it.
struct Softmax {
    highest: vec4<f32>,
    total: vec4<f32>,
}

// What four tokens do to four rows.
struct FourTokens {
    // The factor that makes earlier sums relative to the new highest score.
    fade: vec4<f32>,
    // Column r: row r's.
    weights: mat4x4<f32>,
    is_seen: Seen,
    softmax: Softmax,
}

// Four quads of four query rows, scaled.
fn query_quads(item: Item, row: vec4<u32>, quad: vec4<u32>) -> Quads {
    return Quads(
        query_rows(item, row, quad.x),
        query_rows(item, row, quad.y),
        query_rows(item, row, quad.z),
        query_rows(item, row, quad.w),
    );
}

fn query_rows(item: Item, row: vec4<u32>, quad: u32) -> mat4x4<f32> {
    return mat4x4(
        query_quad(item, row.x, quad),
        query_quad(item, row.y, quad),
        query_quad(item, row.z, quad),
        query_quad(item, row.w, quad),
    );
}

// A part of a token's four scores: that of four quads.
fn product_of(slot: u32, quad: vec4<u32>, q: Quads) -> vec4<f32> {
    return key_quad(slot, quad.x) * q.x + key_quad(slot, quad.y) * q.y
        + (key_quad(slot, quad.z) * q.z + key_quad(slot, quad.w) * q.w);
}

// The scores of four tokens, from the sums of their products, and what follows from them.
fn four_tokens(
    item: Item,
    len: u32,
    row: vec4<u32>,
    sight: Sight,
    token: vec4<u32>,
    is_walked: vec4<bool>,
    products: mat4x4<f32>,
    before: Softmax,
) -> FourTokens {
    let s0 = score_token(item, len, row, sight, token.x, is_walked.x, products[0]);
    let s1 = score_token(item, len, row, sight, token.y, is_walked.y, products[1]);
    let s2 = score_token(item, len, row, sight, token.z, is_walked.z, products[2]);
    let s3 = score_token(item, len, row, sight, token.w, is_walked.w, products[3]);
    let highest = max(max(before.highest, max(s0.score, s1.score)), max(s2.score, s3.score));
    let fade = exp(before.highest - highest);
    // Unseen tokens: select zero, since exp(LOWEST - highest) is 1 while highest is LOWEST.
    let w0 = select(vec4(0.0), exp(s0.score - highest), s0.is_seen);
    let w1 = select(vec4(0.0), exp(s1.score - highest), s1.is_seen);
    let w2 = select(vec4(0.0), exp(s2.score - highest), s2.is_seen);
    let w3 = select(vec4(0.0), exp(s3.score - highest), s3.is_seen);
    return FourTokens(
        fade,
        transpose(mat4x4(w0, w1, w2, w3)),
        seen_by_rows(s0.is_seen, s1.is_seen, s2.is_seen, s3.is_seen),
        Softmax(highest, before.total * fade + (w0 + w1) + (w2 + w3)),
    );
}

// From which rows see each of four tokens.
fn seen_by_rows(x: vec4<bool>, y: vec4<bool>, z: vec4<bool>, w: vec4<bool>) -> Seen {
    return Seen(
        vec4(x.x, y.x, z.x, w.x),
        vec4(x.y, y.y, z.y, w.y),
        vec4(x.z, y.z, z.z, w.z),
        vec4(x.w, y.w, z.w, w.w),
    );
}

// The products of four tokens, summed over the slices. All slices add the same numbers in the same order, so they agree bit for bit.
fn over_slices(local: u32, part: mat4x4<f32>) -> mat4x4<f32> {
    workgroupBarrier();
    shared_vectors[local] = part[0];
    shared_vectors[local + threads] = part[1];
    shared_vectors[local + 2u * threads] = part[2];
    shared_vectors[local + 3u * threads] = part[3];
    workgroupBarrier();
    var sums = mat4x4<f32>();
    var i = local - local % params.slices;
    let end = i + params.slices;
    loop {
        sums += mat4x4(shared_vectors[i], shared_vectors[i + threads], shared_vectors[i + 2u * threads], shared_vectors[i + 3u * threads]);
        i++;
        if i == end {
            break;
        }
    }
    return sums;
}

// The sums with what four tokens add, for four quads.
fn with_values(sums: Quads, slot: vec4<u32>, quad: vec4<u32>, four: FourTokens) -> Quads {
    // Quads past head_dim are clamped to the last one; their sums are not written.
    let at = min(quad, vec4(params.value_quads - 1u));
    return Quads(
        scaled(sums.x, four.fade) + weighed(values(slot, at.x, four.is_seen), four.weights, four.is_seen),
        scaled(sums.y, four.fade) + weighed(values(slot, at.y, four.is_seen), four.weights, four.is_seen),
        scaled(sums.z, four.fade) + weighed(values(slot, at.z, four.is_seen), four.weights, four.is_seen),
        scaled(sums.w, four.fade) + weighed(values(slot, at.w, four.is_seen), four.weights, four.is_seen),
    );
}

// The same quad of V of four tokens: column t is token t's.
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

// V of four tokens (column t: token t) times the rows' weights; column r of the result is row r's.
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

// Unseen tokens replaced by zeros.
fn masked(values: mat4x4<f32>, is_seen: vec4<bool>) -> mat4x4<f32> {
    return mat4x4(
        select(vec4(0.0), values[0], is_seen.x),
        select(vec4(0.0), values[1], is_seen.y),
        select(vec4(0.0), values[2], is_seen.z),
        select(vec4(0.0), values[3], is_seen.w),
    );
}

// Column r times by[r].
fn scaled(sums: mat4x4<f32>, by: vec4<f32>) -> mat4x4<f32> {
    return mat4x4(sums[0] * by.x, sums[1] * by.y, sums[2] * by.z, sums[3] * by.w);
}

// What is written of four rows, beside the sums themselves.
struct Sums {
    item: Item,
    row: vec4<u32>,
    // The factor that makes an invocation's sums relative to the highest score of all.
    fade: vec4<f32>,
    highest: vec4<f32>,
    total: vec4<f32>,
}

// Writes one quad of row r: to the output or, with several splits, to this split's partial result.
fn write_sum(sums: Sums, r: u32, quad: u32, sum: vec4<f32>) {
    let item = sums.item;
    if params.splits == 1u {
        let total = sums.total[r];
        let elements = select(sum / total, vec4(0.0), total == 0.0);
        write_output(row_start(params.output, item, sums.row[r]), quad, elements);
    } else {
        let rows = params.group * params.tokens;
        let all = params.batch * params.kv.heads * rows;
        var number = item.part * all + item.row_of_kv * rows + sums.row[r];
        if is_packed {
            number = (item.part * params.kv.heads + item.h) * ROWS + r;
        }
        let at = number * (params.kv.value_dim + 2u);
        write_floats(at, quad, sum);
        if quad == 0u {
            result[at + params.kv.value_dim] = bitcast<u32>(sums.highest[r]);
            result[at + params.kv.value_dim + 1u] = bitcast<u32>(sums.total[r]);
        }
    }
}
