// Writes new tokens of K and V into a layer, each at its position, in one dispatch.
//
// A thread owns one unit (a vector of 16 bytes, or a word) of a head and visits a few tokens of one
// (batch, head) row. Bits are moved, never numbers, so one kernel serves f32, f16 and bf16.
//
// group 0, binding 0: key_source     new K, any strides over (B, H, T), units of a head adjacent
// group 0, binding 1: value_source   new V, likewise
// group 0, binding 2: key_cache      [B, H, capacity, D of K]
// group 0, binding 3: value_cache    [B, H, capacity, D of V]
// group 1, binding 0: lists          (position, token) pairs, where positions are not a plain run
// group 2, binding 0: params         a uniform, or immediate data where the device has it

alias Unit = vec4<u32>;

struct Source {
    offset: u32,
    stride_b: u32,
    stride_h: u32,
    stride_t: u32,
}

struct Params {
    key: Source,
    value: Source,
    // Units of a head.
    key_units: u32,
    value_units: u32,
    heads: u32,
    // B times H.
    rows: u32,
    // The ring: token t lies at slot (start + t) mod capacity.
    start: u32,
    capacity: u32,
    // Positions that each row visits.
    entries: u32,
    // A plain run: positions from `first` on, of which the first `zeros` become zero.
    first: u32,
    zeros: u32,
    // A list: where it lies in `lists`, and how far the lists of two batch rows are apart.
    has_list: u32,
    list_at: u32,
    list_stride: u32,
}

@group(0) @binding(0) var<storage, read> key_source: array<Unit>;
@group(0) @binding(1) var<storage, read> value_source: array<Unit>;
@group(0) @binding(2) var<storage, read_write> key_cache: array<Unit>;
@group(0) @binding(3) var<storage, read_write> value_cache: array<Unit>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

// A workgroup covers this many units, tokens and rows; the host picks them by the shape of the update,
// so that neither one token nor a long prompt leaves most threads idle.
override tile_units: u32 = 16u;
override tile_tokens: u32 = 1u;
override tile_rows: u32 = 16u;

const TOKENS_PER_THREAD: u32 = 4u;
const ZERO: u32 = 0xffffffffu;
const SKIP: u32 = 0xffffffffu;

@compute @workgroup_size(tile_units, tile_tokens, tile_rows)
fn main(
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    // More rows than workgroups: each workgroup takes several.
    let step = groups.z * tile_rows;
    for (var row = group.z * tile_rows + local.z; row < params.rows; row += step) {
        write_row(row, group.x * tile_units + local.x, group.y * tile_tokens * TOKENS_PER_THREAD + local.y);
    }
}

// Writes one unit of a few tokens of a row, from `first_entry` on, a tile of tokens apart.
fn write_row(row: u32, unit: u32, first_entry: u32) {
    let b = row / params.heads;
    let h = row % params.heads;
    let key_from = params.key.offset + b * params.key.stride_b + h * params.key.stride_h + unit;
    let value_from = params.value.offset + b * params.value.stride_b + h * params.value.stride_h + unit;
    let list = params.list_at + b * params.list_stride;
    let row_slots = row * params.capacity;

    var entry = first_entry;
    for (var i = 0u; i < TOKENS_PER_THREAD; i++) {
        if entry >= params.entries {
            break;
        }
        var position = params.first + entry;
        var token = select(ZERO, entry - params.zeros, entry >= params.zeros);
        if params.has_list != 0u {
            position = lists[list + 2u * entry];
            token = lists[list + 2u * entry + 1u];
        }
        entry += tile_tokens;
        if position == SKIP {
            continue;
        }
        // start < capacity and position < capacity: one subtraction is the whole modulus.
        var slot = params.start + position;
        if slot >= params.capacity {
            slot -= params.capacity;
        }
        if unit < params.key_units {
            var moved = Unit();
            if token != ZERO {
                moved = key_source[key_from + token * params.key.stride_t];
            }
            key_cache[(row_slots + slot) * params.key_units + unit] = moved;
        }
        if unit < params.value_units {
            var moved = Unit();
            if token != ZERO {
                moved = value_source[value_from + token * params.value.stride_t];
            }
            value_cache[(row_slots + slot) * params.value_units + unit] = moved;
        }
    }
}
