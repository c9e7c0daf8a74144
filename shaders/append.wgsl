// Writes new tokens of K and V into a layer, each at its position, in one dispatch.
//
// A thread owns four units (vectors of 16 bytes, or words) that lie near one another in the source: of the
// tokens of one (batch, head) row or, in a (B, T, H, D) source, of the heads of one token. Bits are moved,
// never numbers, so one kernel serves f32, f16 and bf16. A text of `layout/` is joined: it says where a
// position lies.
//
// group 0, binding 0: key_source     new K, any strides over (B, H, T), units of a head adjacent
// group 0, binding 1: value_source   new V, likewise
// group 0, binding 2: key_cache      [slot, D of K], slots as the layout numbers them
// group 0, binding 3: value_cache    [slot, D of V]
// group 1, binding 0: lists          positions that are not a plain run, as below; pages, records of ragged
//                                    rows
// group 1, binding 1: witness        counts the calls that ran
// group 2, binding 0: params         a uniform, or immediate data where the device has it

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
    // Units of a head.
    key_units: u32,
    value_units: u32,
    // Positions that each row visits.
    entries: u32,
    // Workgroups that share the heads of a token, in a (B, T, H, D) source.
    head_tiles: u32,
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
@group(0) @binding(2) var<storage, read_write> key_cache: array<Unit>;
@group(0) @binding(3) var<storage, read_write> value_cache: array<Unit>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(1) @binding(1) var<storage, read_write> witness: atomic<u32>;
@group(2) @binding(0) var<uniform> params: Params;

// A head is this many units wide, rounded up to a power of two, or this many of them are a workgroup's share.
override tile_units: u32 = 16u;
// Threads along what lies side by side in the source: the units of a row's tokens or, in a (B, T, H, D)
// source, of a token's heads.
override tile_threads: u32 = 16u;
// How many such rows, or tokens, a workgroup takes.
override tile_height: u32 = 16u;
// Whether the source is (B, T, H, D).
override is_bthd: bool = false;
// Where positions come from. 0: a run. 1: a list of positions. 2: packed tokens; the list has two words a token,
// its batch row and its position, and the source has one batch row.
override position_form: u32 = 0u;
// Whether there is one position only, as in a decode step.
override is_single: bool = false;

// A thread's four units are this many apart, as in columns.wgsl.
const RUN: u32 = 8u;
const ZERO: u32 = 0xffffffffu;
const SKIP: u32 = 0xffffffffu;

// Nothing branches before the stores: a thread that is one too many reads what another reads, and writes
// nothing. A software adapter, which runs eight threads as one, then need not ask which of them are there.
@compute @workgroup_size(tile_threads, tile_height)
fn main(
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    // Of one position, a thread's first unit is the only one that there is.
    let run = select(min(RUN, tile_threads), tile_threads, is_single);
    let i = local.x / run * (4u * run) + local.x % run + vec4(0u, 1u, 2u, 3u) * run;
    let unit = group.z * tile_units + i % tile_units;
    let width = 4u * tile_threads / tile_units;
    let across = i / tile_units;

    // Which head, and which of the positions that its row visits.
    var b: u32;
    var h: vec4<u32>;
    var entry: vec4<u32>;
    var is_written: vec4<bool>;
    if is_bthd {
        b = group.y / params.head_tiles;
        h = (group.y - b * params.head_tiles) * width + across;
        is_written = h < vec4(params.kv.heads);
        h = min(h, vec4(params.kv.heads - 1u));
        entry = vec4(group.x * tile_height + local.y);
    } else {
        let row = group.y * tile_height + local.y;
        let batch = select(params.kv.batch, 1u, position_form == 2u);
        let rows = batch * params.kv.heads;
        is_written = vec4(row < rows);
        b = min(row, rows - 1u) / params.kv.heads;
        h = vec4(min(row, rows - 1u) - b * params.kv.heads);
        entry = group.x * width + across;
    }
    is_written &= entry < vec4(params.entries);

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
        is_written &= position != vec4(SKIP);
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
    token = select(vec4(0u), token, is_written & !is_zero);
    position = select(vec4(0u), position, is_written);
    let slot = vec4(
        kv_slot(params.kv, target_row.x, h.x, position.x),
        kv_slot(params.kv, target_row.y, h.y, position.y),
        kv_slot(params.kv, target_row.z, h.z, position.z),
        kv_slot(params.kv, target_row.w, h.w, position.w),
    );
    let key_unit = min(unit, vec4(params.key_units - 1u));
    write_keys(
        first_units(params.key, b, h) + token * params.key.stride_t + key_unit,
        slot * params.key_units + key_unit,
        is_zero,
        is_written & (unit < vec4(params.key_units)),
    );
    let value_unit = min(unit, vec4(params.value_units - 1u));
    write_values(
        first_units(params.value, b, h) + token * params.value.stride_t + value_unit,
        slot * params.value_units + value_unit,
        is_zero,
        is_written & (unit < vec4(params.value_units)),
    );
    if all(group == vec3(0u)) & all(local == vec3(0u)) {
        atomicAdd(&witness, 1u);
    }
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

fn write_keys(at: vec4<u32>, to: vec4<u32>, is_zero: vec4<bool>, is_written: vec4<bool>) {
    let x = select(key_source[at.x], Unit(), is_zero.x);
    var y = Unit();
    var z = Unit();
    var w = Unit();
    if !is_single {
        y = select(key_source[at.y], Unit(), is_zero.y);
        z = select(key_source[at.z], Unit(), is_zero.z);
        w = select(key_source[at.w], Unit(), is_zero.w);
    }
    if is_written.x {
        key_cache[to.x] = x;
    }
    if is_written.y {
        key_cache[to.y] = y;
    }
    if is_written.z {
        key_cache[to.z] = z;
    }
    if is_written.w {
        key_cache[to.w] = w;
    }
}

fn write_values(at: vec4<u32>, to: vec4<u32>, is_zero: vec4<bool>, is_written: vec4<bool>) {
    let x = select(value_source[at.x], Unit(), is_zero.x);
    var y = Unit();
    var z = Unit();
    var w = Unit();
    if !is_single {
        y = select(value_source[at.y], Unit(), is_zero.y);
        z = select(value_source[at.z], Unit(), is_zero.z);
        w = select(value_source[at.w], Unit(), is_zero.w);
    }
    if is_written.x {
        value_cache[to.x] = x;
    }
    if is_written.y {
        value_cache[to.y] = y;
    }
    if is_written.z {
        value_cache[to.z] = z;
    }
    if is_written.w {
        value_cache[to.w] = w;
    }
}
