// Copies the live tokens of K and V rows into fresh buffers, each row as often as it is asked for.
//
// Serves repeat-interleave and every other change that needs larger buffers: a selection that grows
// the batch, and growth in tokens, where each row goes out once. The live tokens come out straight,
// from slot 0 on. A thread owns one unit of a head and slot; it reads each source row once.
//
// group 0, binding 0: key_source     [old B, H, old capacity, D of K]
// group 0, binding 1: value_source   [old B, H, old capacity, D of V]
// group 0, binding 2: key_cache      [new B, H, new capacity, D of K]
// group 0, binding 3: value_cache    [new B, H, new capacity, D of V]
// group 1, binding 0: lists          the copies: (to, source) pairs of rows, sorted by source
// group 2, binding 0: params         a uniform, or immediate data where the device has it

alias Unit = vec4<u32>;

struct Params {
    // Units of a head.
    key_units: u32,
    value_units: u32,
    heads: u32,
    // The old ring: token t lies at slot (start + t) mod old_capacity.
    start: u32,
    len: u32,
    old_capacity: u32,
    new_capacity: u32,
    // The copies and where they lie in `lists`.
    copies: u32,
    list_at: u32,
}

@group(0) @binding(0) var<storage, read> key_source: array<Unit>;
@group(0) @binding(1) var<storage, read> value_source: array<Unit>;
@group(0) @binding(2) var<storage, read_write> key_cache: array<Unit>;
@group(0) @binding(3) var<storage, read_write> value_cache: array<Unit>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

const WORKGROUP: u32 = 256u;
const NONE: u32 = 0xffffffffu;

// How far into a head's [old_capacity, D] the i-th live unit lies.
fn live_unit(i: u32, units: u32) -> u32 {
    let at = params.start * units + i;
    let end = params.old_capacity * units;
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
        copy_head(h, group.x * WORKGROUP + local, groups.x * WORKGROUP);
    }
}

// Copies every `step`-th unit of a head, from `first` on.
fn copy_head(h: u32, first: u32, step: u32) {
    let key_live = params.len * params.key_units;
    let value_live = params.len * params.value_units;

    for (var i = first; i < max(key_live, value_live); i += step) {
        if i < key_live {
            let from_column = h * params.old_capacity * params.key_units + live_unit(i, params.key_units);
            let from_stride = params.heads * params.old_capacity * params.key_units;
            let to_column = h * params.new_capacity * params.key_units + i;
            let to_stride = params.heads * params.new_capacity * params.key_units;
            var moved = Unit();
            var loaded = NONE;
            for (var c = 0u; c < params.copies; c++) {
                let to = lists[params.list_at + 2u * c];
                let source = lists[params.list_at + 2u * c + 1u];
                if source != loaded {
                    moved = key_source[from_column + source * from_stride];
                    loaded = source;
                }
                key_cache[to_column + to * to_stride] = moved;
            }
        }
        if i < value_live {
            let from_column = h * params.old_capacity * params.value_units + live_unit(i, params.value_units);
            let from_stride = params.heads * params.old_capacity * params.value_units;
            let to_column = h * params.new_capacity * params.value_units + i;
            let to_stride = params.heads * params.new_capacity * params.value_units;
            var moved = Unit();
            var loaded = NONE;
            for (var c = 0u; c < params.copies; c++) {
                let to = lists[params.list_at + 2u * c];
                let source = lists[params.list_at + 2u * c + 1u];
                if source != loaded {
                    moved = value_source[from_column + source * from_stride];
                    loaded = source;
                }
                value_cache[to_column + to * to_stride] = moved;
            }
        }
    }
}
