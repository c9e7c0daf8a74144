// Copies the live tokens of K and V of a few batch rows, oldest first, with zeros behind shorter rows: [rows, H,
// len, D] for the longest row's len.
//
// For reading back. An invocation copies four units (16 bytes, or a word) of a (batch, head) row. The text is
// joined with one of `layout/`.
//
// group 0, binding 0: key_cache      [slot, D of K], slots as the layout numbers them
// group 0, binding 1: value_cache    [slot, D of V]
// group 0, binding 2: key_target     [rows, H, len, D of K]
// group 0, binding 3: value_target   [rows, H, len, D of V]
// group 1, binding 0: lists          the table of pages, records of ragged rows
// group 2, binding 0: params         a uniform, or immediate data where the device has it

alias Unit = vec4<u32>;

struct Params {
    kv: KvLayout,
    // Units of a head; the first unit of what is copied, in the cache's buffers and in the targets.
    key_units: u32,
    value_units: u32,
    key_base: u32,
    value_base: u32,
    key_target_base: u32,
    value_target_base: u32,
    // The first batch row, and B times H of all of them.
    first: u32,
    rows: u32,
    // Workgroups of a row.
    tiles: u32,
}

@group(0) @binding(0) var<storage, read> key_cache: array<Unit>;
@group(0) @binding(1) var<storage, read> value_cache: array<Unit>;
@group(0) @binding(2) var<storage, read_write> key_target: array<Unit>;
@group(0) @binding(3) var<storage, read_write> value_target: array<Unit>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

const WORKGROUP: u32 = 256u;
// Units of a workgroup: a thread's four are a workgroup apart, so that neighbours read neighbours.
const TILE: u32 = 1024u;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let number = group.x + groups.x * (group.y + groups.y * group.z);
    let row = number / params.tiles;
    if row >= params.rows {
        return;
    }
    let b = params.first + row / params.kv.heads;
    let h = row % params.kv.heads;
    let kv = kv_row(params.kv, b);
    let key_live = kv.len * params.key_units;
    let value_live = kv.len * params.value_units;
    let key_target_row = params.key_target_base + row * params.kv.len * params.key_units;
    let value_target_row = params.value_target_base + row * params.kv.len * params.value_units;
    for (var part = 0u; part < TILE; part += WORKGROUP) {
        let i = number % params.tiles * TILE + part + local;
        if i < params.kv.len * params.key_units {
            var unit = Unit();
            if i < key_live {
                let slot = kv_slot_in_row(kv, b, h, i / params.key_units);
                unit = key_cache[params.key_base + slot * params.key_units + i % params.key_units];
            }
            key_target[key_target_row + i] = unit;
        }
        if i < params.kv.len * params.value_units {
            var unit = Unit();
            if i < value_live {
                let slot = kv_slot_in_row(kv, b, h, i / params.value_units);
                unit = value_cache[params.value_base + slot * params.value_units + i % params.value_units];
            }
            value_target[value_target_row + i] = unit;
        }
    }
}
