// What the attention kernels share: parameters and bindings, which tokens a query row sees, how q is read, and how
// results are written. One of `extras.wgsl` and `no_extras.wgsl` follows.
//
// A query row is one query head at one new token. Rows of a K/V head are numbered query head first, then token.

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
    // Quads of a head of K and of V.
    key_quads: u32,
    value_quads: u32,
    // Batch rows of the queries: those of K and V, or any number over a single one.
    batch: u32,
    // Query heads a K/V head; new tokens a batch row.
    group: u32,
    tokens: u32,
    // Invocations along a head: a power of two.
    slices: u32,
    // Tokens a split; number of splits.
    split: u32,
    splits: u32,
    scale: f32,
    is_causal: u32,
    // With `has_window`: tokens that a query looks back on, its own included, and the first tokens that it sees
    // as well.
    window: u32,
    first_tokens: u32,
    // With `has_cap`: the scores' bound.
    cap: f32,
    // Packed queries: the first word of the items in `lists`, and the number of items. `splits` is 1 if items
    // write to the output, and 2 if they write partial results.
    items: u32,
    item_count: u32,
    // The first word of the header of masks and biases, of which `extras.wgsl` tells.
    extras: u32,
}

@group(0) @binding(0) var<storage, read> query: array<u32>;
@group(0) @binding(1) var<storage, read> key_cache: array<KeyUnit>;
@group(0) @binding(2) var<storage, read> value_cache: array<ValueUnit>;
@group(0) @binding(3) var<storage, read_write> result: array<u32>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

// Whether q is read from the buffer of the output: one buffer cannot be bound for reading and for writing.
override is_pooled: bool = false;
// Whether queries are packed.
override is_packed: bool = false;
// Types of q and of the output: 0 f32, 1 f16, 2 bf16. Heads of 16-bit types begin at a whole word.
override query_type: u32 = 0u;
override output_type: u32 = 0u;
// Whether queries look back on a window.
override has_window: bool = false;
// Whether scores are bounded.
override has_cap: bool = false;

// Below all scores, and far enough from the end of f32 that no difference is infinite.
const LOWEST: f32 = -1.0e38;

// The work of a workgroup, eight words in `lists` if queries are packed.
struct Item {
    // Batch row of the queries: a sequence of the step, if packed.
    b: u32,
    // The row's first packed query token (zero if not packed), and its number of query tokens.
    first: u32,
    tokens: u32,
    // Which query rows.
    tile: u32,
    // Begin and end of the walk, see `Walk`.
    begin: u32,
    end: u32,
    // Which partial result.
    part: u32,
    // K/V head; not in the list.
    h: u32,
    // Batch row and K/V head as one number, if not packed; not in the list. Computed from b and h where it is
    // needed, it makes llvmpipe's code for the whole kernel 1.7 times slower.
    row_of_kv: u32,
}

// The item of a workgroup, from the host's list.
fn packed_item(workgroup: vec3<u32>, workgroups: vec3<u32>) -> Item {
    // Workgroups past the last item repeat it, and write the same values.
    let number = min(workgroup.x + workgroups.x * workgroup.z, params.item_count - 1u);
    let at = params.items + 8u * number;
    return Item(
        lists[at],
        lists[at + 1u],
        lists[at + 2u],
        lists[at + 3u],
        lists[at + 4u],
        lists[at + 5u],
        lists[at + 6u],
        workgroup.y,
        0u,
    );
}

// Which tokens four query rows see: token t if begins <= t < ends, and with `has_window` also the first tokens
// from `base` on.
struct Sight {
    begins: vec4<u32>,
    ends: vec4<u32>,
    base: u32,
}

// The live tokens are `len`; the latest `item.tokens` of them are the queries' own.
fn sight_of(item: Item, len: u32, row: vec4<u32>) -> Sight {
    let later = item.tokens - 1u - row / params.group;
    // One past a query's own token.
    let own_end = len - min(later, vec4(len));
    let ends = select(vec4(len), own_end, params.is_causal != 0u);
    if has_window {
        let base = min(first_token(item.b), len);
        let begins = own_end - min(own_end, vec4(params.window));
        return Sight(max(begins, vec4(base)), ends, base);
    }
    return Sight(vec4(0u), ends, 0u);
}

fn is_in_sight(sight: Sight, token: u32) -> vec4<bool> {
    if has_window {
        // Tokens before the base are never asked for.
        let is_begun = (vec4(token) >= sight.begins) | vec4(token < sight.base + params.first_tokens);
        return is_begun & (vec4(token) < sight.ends);
    }
    return vec4(token) < sight.ends;
}

// How a workgroup goes through the tokens that any of its rows may see: number i of the walk is token base + i
// for the first tokens, and base + skip + i from there on. Tokens between lie before every row's window.
struct Walk {
    base: u32,
    skip: u32,
    // How many there are.
    end: u32,
}

fn walk_of(sight: Sight) -> Walk {
    let ends = sight.ends;
    let end = max(max(ends.x, ends.y), max(ends.z, ends.w));
    if has_window {
        let begins = sight.begins;
        let begin = min(min(begins.x, begins.y), min(begins.z, begins.w));
        let skip = begin - min(begin, sight.base + params.first_tokens);
        return Walk(sight.base, skip, end - min(end, sight.base + skip));
    }
    return Walk(0u, 0u, end);
}

fn token_at(walk: Walk, i: u32) -> u32 {
    if has_window {
        return walk.base + i + select(walk.skip, 0u, i < params.first_tokens);
    }
    return i;
}

// A token's scores for four query rows, and whether the rows see it.
struct Scored {
    score: vec4<f32>,
    is_seen: vec4<bool>,
}

// The scores with what changes them: first the bound, then biases and masks. LOWEST where a row does not see the
// token.
fn score_token(item: Item, len: u32, row: vec4<u32>, sight: Sight, token: u32, is_walked: bool, product: vec4<f32>) -> Scored {
    var score = product;
    if has_cap {
        // Past 15 the hyperbolic tangent is 1 in f32; some devices overflow on the way there.
        score = params.cap * tanh(clamp(score / params.cap, vec4(-15.0), vec4(15.0)));
    }
    let is_seen = is_in_sight(sight, token) & vec4(is_walked);
    let all = with_extras(item, len, row, token, Scored(score, is_seen));
    return Scored(select(vec4(LOWEST), all.score, all.is_seen), all.is_seen);
}

// Four consecutive elements of a query row, scaled; zeros past head_dim.
fn query_quad(item: Item, row: u32, quad: u32) -> vec4<f32> {
    let at = row_start(params.query, item, row);
    let d = 4u * quad + vec4(0u, 1u, 2u, 3u);
    var elements: vec4<f32>;
    if query_type == 0u {
        let i = at + min(d, vec4(params.kv.key_dim - 1u));
        elements = bitcast<vec4<f32>>(vec4(query_word(i.x), query_word(i.y), query_word(i.z), query_word(i.w)));
    } else {
        let i = at / 2u + min(2u * quad + vec2(0u, 1u), vec2((params.kv.key_dim - 1u) / 2u));
        elements = vec4(pair_of(query_word(i.x), query_type), pair_of(query_word(i.y), query_type));
    }
    return params.scale * select(vec4(0.0), elements, d < vec4(params.kv.key_dim));
}

fn query_word(i: u32) -> u32 {
    if is_pooled {
        return result[i];
    }
    return query[i];
}

// The first element of a query row.
fn row_start(strides: Rows, item: Item, row: u32) -> u32 {
    let head = item.h * params.group + row % params.group;
    let token = item.first + row / params.group;
    // Packed queries are one batch row.
    let b = select(item.b, 0u, is_packed);
    return strides.offset + b * strides.stride_b + head * strides.stride_h + token * strides.stride_t;
}

fn kv_key_unit(i: u32) -> KeyUnit {
    return key_cache[i];
}

fn kv_value_unit(i: u32) -> ValueUnit {
    return value_cache[i];
}

// Writes a quad of the output, whose head begins at element `at`.
fn write_output(at: u32, quad: u32, elements: vec4<f32>) {
    if output_type == 0u {
        write_floats(at, quad, elements);
        return;
    }
    let first = at / 2u + 2u * quad;
    result[first] = word_of(elements.xy, output_type);
    if 4u * quad + 2u < params.kv.value_dim {
        result[first + 1u] = word_of(elements.zw, output_type);
    }
}

fn write_floats(at: u32, quad: u32, elements: vec4<f32>) {
    for (var i = 0u; i < min(4u, params.kv.value_dim - 4u * quad); i++) {
        result[at + 4u * quad + i] = bitcast<u32>(elements[i]);
    }
}
