// What kernels that write new tokens share: parameters and bindings, and which token goes to which position.

alias Unit = vec4<u32>;

struct Source {
    offset: u32,
    stride_b: u32,
    stride_h: u32,
    stride_t: u32,
}

struct Params {
    kv: KvLayout,
    key: Source,
    value: Source,
    // Units of a head; none if it is not written.
    key_units: u32,
    value_units: u32,
    // Positions that each row visits.
    entries: u32,
    // Of a (B, T, H, D) source, workgroups that share the heads of a token. If K and V are converted, pieces of a head.
    tiles: u32,
    // A plain run: positions from `first` on, of which the first `zeros` become zero. A list: zero, and how
    // many positions it names.
    first: u32,
    zeros: u32,
    // A list: where it lies in `lists`, and how far the lists of two batch rows are apart. Two words, then
    // (position, token) pairs, lowest position first. Entries past the pairs are positions that no pair names, and
    // become zero: the second word says how many, the first how many unnamed positions lie below them.
    list_at: u32,
    list_stride: u32,
}

@group(0) @binding(0) var<storage, read> key_source: array<Unit>;
@group(0) @binding(1) var<storage, read> value_source: array<Unit>;
@group(0) @binding(2) var<storage, read_write> key_cache: array<Target>;
@group(0) @binding(3) var<storage, read_write> value_cache: array<Target>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(1) @binding(1) var<storage, read_write> witness: atomic<u32>;
@group(2) @binding(0) var<uniform> params: Params;

// Where positions come from. 0: a run. 1: a list of positions. 2: packed tokens; the list has two words a token,
// its batch row and its position, and the source has one batch row.
override position_form: u32 = 0u;

const ZERO: u32 = 0xffffffffu;
const SKIP: u32 = 0xffffffffu;

// Which token goes where.
struct Place {
    // Batch row of the target.
    row: vec4<u32>,
    position: vec4<u32>,
    // Of the source; zero if zeros are written.
    token: vec4<u32>,
    is_zero: vec4<bool>,
    is_written: vec4<bool>,
}

// The places of four of the positions that batch row b visits, of which `is_asked` are there.
fn place_of(b: u32, entry: vec4<u32>, is_asked: vec4<bool>) -> Place {
    var is_there = is_asked;
    var position = params.first + entry;
    var token = select(vec4(ZERO), entry - params.zeros, entry >= vec4(params.zeros));
    if position_form == 1u {
        let list = params.list_at + b * params.list_stride;
        let named = params.zeros;
        let at = list + 2u + 2u * min(entry, vec4(named - 1u));
        position = vec4(lists[at.x], lists[at.y], lists[at.z], lists[at.w]);
        token = vec4(lists[at.x + 1u], lists[at.y + 1u], lists[at.z + 1u], lists[at.w + 1u]);
        if params.entries > named {
            let is_gap = entry >= vec4(named);
            let in_gap = select(vec4(0u), entry - vec4(named), is_gap);
            let gap_position = vec4(
                position_in_gap(list, named, in_gap.x),
                position_in_gap(list, named, in_gap.y),
                position_in_gap(list, named, in_gap.z),
                position_in_gap(list, named, in_gap.w),
            );
            let is_past = is_gap & (in_gap >= vec4(lists[list + 1u]));
            position = select(position, select(gap_position, vec4(SKIP), is_past), is_gap);
            token = select(token, vec4(ZERO), is_gap);
        }
        is_there &= position != vec4(SKIP);
    }
    var target_row = vec4(b);
    if position_form == 2u {
        let at = params.list_at + 2u * min(entry, vec4(params.entries - 1u));
        target_row = vec4(lists[at.x], lists[at.y], lists[at.z], lists[at.w]);
        position = vec4(lists[at.x + 1u], lists[at.y + 1u], lists[at.z + 1u], lists[at.w + 1u]);
        token = entry;
    }
    let is_zero = token == vec4(ZERO);
    // What is not read is at least a token that exists.
    token = select(vec4(0u), token, is_there & !is_zero);
    position = select(vec4(0u), position, is_there);
    return Place(target_row, position, token, is_zero, is_there);
}

// The `i`-th position of a list that becomes zero. Pairs are sorted, so how many unnamed positions lie below each
// one never falls, and the search is binary.
fn position_in_gap(list: u32, named: u32, i: u32) -> u32 {
    let unnamed = lists[list] + i;
    var low = 0u;
    var high = named;
    while low < high {
        let middle = (low + high) / 2u;
        if lists[list + 2u + 2u * middle] - middle <= unnamed {
            low = middle + 1u;
        } else {
            high = middle;
        }
    }
    return unnamed + low;
}

// Where the first tokens of four rows lie in a source.
fn first_units(source: Source, b: u32, h: vec4<u32>) -> vec4<u32> {
    return source.offset + b * source.stride_b + h * source.stride_h;
}
