// Moves batch rows of K and V in place: new row i becomes old row map[i], without a scratch buffer.
//
// A thread owns one column: the same unit (16 bytes, or a word) of the same head and slot in every
// batch row. All threads run the same short list of row moves, which the host has ordered so that no
// row is overwritten while it is still needed; a cycle goes through the one register `held`.
//
// group 0, binding 0: key_cache      [B, H, capacity, D of K]
// group 0, binding 1: value_cache    [B, H, capacity, D of V]
// group 1, binding 0: lists          the moves: (to, source) pairs of rows, HELD for the register
// group 2, binding 0: params         a uniform, or immediate data where the device has it

alias Unit = vec4<u32>;

struct Params {
    // Units of a head.
    key_units: u32,
    value_units: u32,
    heads: u32,
    // The ring: token t lies at slot (start + t) mod capacity; only live slots are touched.
    start: u32,
    len: u32,
    capacity: u32,
    // The moves and where they lie in `lists`.
    moves: u32,
    list_at: u32,
}

@group(0) @binding(0) var<storage, read_write> key_cache: array<Unit>;
@group(0) @binding(1) var<storage, read_write> value_cache: array<Unit>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

const WORKGROUP: u32 = 256u;
const HELD: u32 = 0xffffffffu;

// How far into a head's [capacity, D] the i-th live unit lies.
fn live_unit(i: u32, units: u32) -> u32 {
    let at = params.start * units + i;
    let end = params.capacity * units;
    return select(at, at - end, at >= end);
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    // More heads than workgroups: each workgroup takes several.
    for (var h = group.y; h < params.heads; h += groups.y) {
        move_head(h, group.x * WORKGROUP + local, groups.x * WORKGROUP);
    }
}

// Moves every `step`-th unit of a head, from `first` on.
fn move_head(h: u32, first: u32, step: u32) {
    let key_live = params.len * params.key_units;
    let value_live = params.len * params.value_units;
    let key_head = params.capacity * params.key_units;
    let value_head = params.capacity * params.value_units;

    for (var i = first; i < max(key_live, value_live); i += step) {
        if i < key_live {
            let column = h * key_head + live_unit(i, params.key_units);
            let stride = params.heads * key_head;
            var held = Unit();
            for (var m = 0u; m < params.moves; m++) {
                let to = lists[params.list_at + 2u * m];
                let source = lists[params.list_at + 2u * m + 1u];
                var moved = held;
                if source != HELD {
                    moved = key_cache[column + source * stride];
                }
                if to == HELD {
                    held = moved;
                } else {
                    key_cache[column + to * stride] = moved;
                }
            }
        }
        if i < value_live {
            let column = h * value_head + live_unit(i, params.value_units);
            let stride = params.heads * value_head;
            var held = Unit();
            for (var m = 0u; m < params.moves; m++) {
                let to = lists[params.list_at + 2u * m];
                let source = lists[params.list_at + 2u * m + 1u];
                var moved = held;
                if source != HELD {
                    moved = value_cache[column + source * stride];
                }
                if to == HELD {
                    held = moved;
                } else {
                    value_cache[column + to * stride] = moved;
                }
            }
        }
    }
}
