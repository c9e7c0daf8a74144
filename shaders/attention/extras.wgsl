// Masks, biases, sinks and row starts of attention. In a call without any of them `no_extras.wgsl` stands here.
//
// group 0, binding 4: mask    f32 added to scores, any strides over (B or 1, Hq or 1, Tq), tokens next to each other
// group 0, binding 5: bits    words of a bit a token: 1 if it is seen; strides likewise
// group 0, binding 6: extras  a header, and values a head or a batch row. Header: of the mask its first element,
//                             strides along B, Hq and Tq, and its tokens; of the bits likewise, in words; then
//                             where the slopes, the sinks and the starts lie, counted from the header
//
// A mask of fewer tokens than there are is of the latest ones.

@group(0) @binding(4) var<storage, read> mask: array<f32>;
@group(0) @binding(5) var<storage, read> bits: array<u32>;
@group(0) @binding(6) var<storage, read> extras: array<u32>;

override has_mask: bool = false;
override has_bits: bool = false;
override has_slopes: bool = false;
override has_sinks: bool = false;
override has_starts: bool = false;

fn header(i: u32) -> u32 {
    return extras[params.extras + i];
}

// Value `i` of a list whose place is word `which` of the header.
fn listed(which: u32, i: u32) -> u32 {
    return extras[params.extras + header(which) + i];
}

// The first token of a batch row that is seen.
fn first_token(b: u32) -> u32 {
    if has_starts {
        return listed(12u, b);
    }
    return 0u;
}

fn with_extras(item: Item, len: u32, row: vec4<u32>, token: u32, scored: Scored) -> Scored {
    var score = scored.score;
    var is_seen = scored.is_seen;
    let head = item.h * params.group + row % params.group;
    let t = row / params.group;
    if has_slopes {
        let slope = bitcast<vec4<f32>>(vec4(
            listed(10u, head.x),
            listed(10u, head.y),
            listed(10u, head.z),
            listed(10u, head.w),
        ));
        // How far the token lies before the query's own; negative behind it.
        let distance = vec4<i32>(len - item.tokens + t - token);
        score -= slope * vec4<f32>(distance);
    }
    if has_mask {
        let column = token + header(4u) - len;
        if column < header(4u) {
            let at = mask_row(item, head, t, 0u) + column;
            let added = vec4(mask[at.x], mask[at.y], mask[at.z], mask[at.w]);
            is_seen &= added > vec4(LOWEST);
            score += added;
        }
    }
    if has_bits {
        let column = token + header(9u) - len;
        if column < header(9u) {
            let at = mask_row(item, head, t, 5u) + column / 32u;
            let words = vec4(bits[at.x], bits[at.y], bits[at.z], bits[at.w]);
            is_seen &= ((words >> vec4(column % 32u)) & vec4(1u)) == vec4(1u);
        }
    }
    return Scored(score, is_seen);
}

// Where four rows of a mask begin, which the header describes from word `which` on.
fn mask_row(item: Item, head: vec4<u32>, t: vec4<u32>, which: u32) -> vec4<u32> {
    let b = select(item.b, 0u, is_packed);
    return header(which) + b * header(which + 1u) + head * header(which + 2u) + (item.first + t) * header(which + 3u);
}

// What the running softmax begins with.
struct Sink {
    highest: vec4<f32>,
    total: vec4<f32>,
}

// One invocation of each row takes the row's sink, as if it were a token.
fn sinks(item: Item, row: vec4<u32>, is_first: bool) -> Sink {
    if !has_sinks || !is_first {
        return Sink(vec4(LOWEST), vec4(0.0));
    }
    let head = item.h * params.group + row % params.group;
    let sink = bitcast<vec4<f32>>(vec4(
        listed(11u, head.x),
        listed(11u, head.y),
        listed(11u, head.z),
        listed(11u, head.w),
    ));
    let highest = max(vec4(LOWEST), sink);
    return Sink(highest, exp(sink - highest));
}
