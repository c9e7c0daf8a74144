// Writes new tokens of K and V into a layer, each at its position, in one dispatch.
//
// A thread owns one unit (a vector of 16 bytes, or a word) of a head and four tokens of one (batch, head)
// row. Bits are moved, never numbers, so one kernel serves f32, f16 and bf16. A text of `layout/` is
// joined: it says where a position lies.
//
// group 0, binding 0: key_source     new K, any strides over (B, H, T), units of a head adjacent
// group 0, binding 1: value_source   new V, likewise
// group 0, binding 2: key_cache      [slot, D of K], slots as the layout numbers them
// group 0, binding 3: value_cache    [slot, D of V]
// group 1, binding 0: lists          (position, token) pairs, where positions are not a plain run; pages
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
    // B times H.
    rows: u32,
    // Positions that each row visits.
    entries: u32,
    // Whether workgroups in a row take the rows of the same tokens, not the tokens of the same row.
    is_rows_first: u32,
    // A plain run: positions from `first` on, of which the first `zeros` become zero.
    first: u32,
    zeros: u32,
    // A list: where it lies in `lists`, and how far the lists of two batch rows are apart.
    list_at: u32,
    list_stride: u32,
}

@group(0) @binding(0) var<storage, read> key_source: array<Unit>;
@group(0) @binding(1) var<storage, read> value_source: array<Unit>;
@group(0) @binding(2) var<storage, read_write> key_cache: array<Unit>;
@group(0) @binding(3) var<storage, read_write> value_cache: array<Unit>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

// A workgroup covers this many units, rows and fours of tokens; the host picks them by the shape and the
// strides of the update, so that neither one token nor a long prompt leaves most threads idle, and
// neighbours read neighbours.
override tile_units: u32 = 16u;
override tile_rows: u32 = 16u;
override tile_tokens: u32 = 1u;
// Whether positions come as a list.
override has_list: bool = false;
// Whether there is one position only, as in a decode step.
override is_single: bool = false;

const ZERO: u32 = 0xffffffffu;
const SKIP: u32 = 0xffffffffu;

// Nothing branches before the stores: a thread that is one too many reads what another reads, and writes
// nothing. A software adapter, which runs eight threads as one, then need not ask which of them are there.
@compute @workgroup_size(tile_units, tile_rows, tile_tokens)
fn main(
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let tile = select(group.xy, group.yx, params.is_rows_first != 0u);
    let unit = group.z * tile_units + local.x;
    let row_at = tile.y * tile_rows + local.y;
    let row = min(row_at, params.rows - 1u);
    let b = row / params.kv.heads;
    let h = row - b * params.kv.heads;

    // A thread's tokens follow one another, so that a CPU sees few streams of memory, and long ones.
    let first = (tile.x * tile_tokens + local.z) * 4u;
    let entry = first + vec4(0u, 1u, 2u, 3u);
    var is_written = (entry < vec4(params.entries)) & vec4(row_at < params.rows);
    var position = params.first + entry;
    var token = select(vec4(ZERO), entry - params.zeros, entry >= vec4(params.zeros));
    if has_list {
        let at = params.list_at + b * params.list_stride + 2u * min(entry, vec4(params.entries - 1u));
        position = vec4(lists[at.x], lists[at.y], lists[at.z], lists[at.w]);
        token = vec4(lists[at.x + 1u], lists[at.y + 1u], lists[at.z + 1u], lists[at.w + 1u]);
        is_written &= position != vec4(SKIP);
    }
    let is_zero = token == vec4(ZERO);
    // What is not read is at least a token that exists.
    token = select(vec4(0u), token, is_written & !is_zero);
    position = select(vec4(0u), position, is_written);
    let slot = vec4(
        kv_slot(params.kv, b, h, position.x),
        kv_slot(params.kv, b, h, position.y),
        kv_slot(params.kv, b, h, position.z),
        kv_slot(params.kv, b, h, position.w),
    );
    let key_unit = min(unit, params.key_units - 1u);
    write_keys(
        first_unit(params.key, b, h) + token * params.key.stride_t + key_unit,
        slot * params.key_units + key_unit,
        is_zero,
        is_written & vec4(unit < params.key_units),
    );
    let value_unit = min(unit, params.value_units - 1u);
    write_values(
        first_unit(params.value, b, h) + token * params.value.stride_t + value_unit,
        slot * params.value_units + value_unit,
        is_zero,
        is_written & vec4(unit < params.value_units),
    );
}

// Where the first token of a row lies in a source.
fn first_unit(source: Source, b: u32, h: u32) -> u32 {
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
