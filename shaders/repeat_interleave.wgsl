// Copies the live tokens of K and V rows into fresh buffers, each row as often as it is asked for.
//
// Serves repeat-interleave and every other change that needs larger buffers: a selection that grows
// the batch, and growth in tokens, where each row goes out once. The live tokens come out straight,
// from slot 0 on. A thread owns four columns (a unit of a head and slot, in every row) and reads each
// source row once.
//
// group 0, binding 0: key_source     [old B, H, old capacity, D of K]
// group 0, binding 1: value_source   [old B, H, old capacity, D of V]
// group 0, binding 2: key_cache      [new B, H, new capacity, D of K]
// group 0, binding 3: value_cache    [new B, H, new capacity, D of V]
// group 1, binding 0: lists          the copies: (from, how many rows, these)
// group 2, binding 0: params         a uniform, or immediate data where the device has it

alias Unit = vec4<u32>;

struct Params {
    // Units of a head.
    key_units: u32,
    value_units: u32,
    heads: u32,
    // Workgroups of a head.
    tiles: u32,
    // The old ring: token t lies at slot (start + t) mod old_capacity.
    start: u32,
    len: u32,
    old_capacity: u32,
    new_capacity: u32,
    // Where the copies lie in `lists`, and how long the list is.
    list_at: u32,
    list_end: u32,
}

@group(0) @binding(0) var<storage, read> key_source: array<Unit>;
@group(0) @binding(1) var<storage, read> value_source: array<Unit>;
@group(0) @binding(2) var<storage, read_write> key_cache: array<Unit>;
@group(0) @binding(3) var<storage, read_write> value_cache: array<Unit>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

const WORKGROUP: u32 = 256u;
// Columns of a workgroup.
const TILE: u32 = 1024u;
// A thread's four columns are this many apart: eight neighbours read 128 bytes together, a line of a GPU's
// cache, and then the next line. So a CPU, which runs eight threads at a time, sees few streams and long.
const RUN: u32 = 8u;

// Four columns: where they lie in row 0 of the source and of the target, and which of them are there.
struct Columns {
    source: vec4<u32>,
    fresh: vec4<u32>,
    is_live: vec4<bool>,
    source_stride: u32,
    fresh_stride: u32,
}

fn columns(number: u32, first: u32, units: u32) -> Columns {
    // A workgroup that is one too many does as the last one, and writes nothing.
    let h = min(number, params.heads - 1u);
    let live = params.len * units;
    let old_head = params.old_capacity * units;
    let new_head = params.new_capacity * units;
    let i = first + vec4(0u, 1u, 2u, 3u) * RUN;
    // A column past the end is read as the last one, and not written.
    let at = params.start * units + min(i, vec4(live - 1u));
    return Columns(
        h * old_head + select(at, at - old_head, at >= vec4(old_head)),
        h * new_head + i,
        (i < vec4(live)) & vec4(number < params.heads),
        params.heads * old_head,
        params.heads * new_head,
    );
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let number = group.x + groups.x * (group.y + groups.y * group.z);
    let h = number / params.tiles;
    let first = (number - h * params.tiles) * TILE + local / RUN * (4u * RUN) + local % RUN;
    let key = columns(h, first, params.key_units);
    let value = columns(h, first, params.value_units);
    var next = params.list_at;
    // At least one copy of at least one row. Loops break at the end of their bodies, as in gather.wgsl.
    loop {
        let origin = lists[next];
        let k = key.source + origin * key.source_stride;
        let v = value.source + origin * value.source_stride;
        let held = Held(
            Four(key_source[k.x], key_source[k.y], key_source[k.z], key_source[k.w]),
            Four(value_source[v.x], value_source[v.y], value_source[v.z], value_source[v.w]),
        );
        let last = next + 1u + lists[next + 1u];
        next++;
        loop {
            next++;
            store(key, value, lists[next], held);
            if next == last {
                break;
            }
        }
        next++;
        if next == params.list_at + params.list_end {
            break;
        }
    }
}

struct Four {
    x: Unit,
    y: Unit,
    z: Unit,
    w: Unit,
}

// What a thread holds of a row.
struct Held {
    key: Four,
    value: Four,
}

fn store(key: Columns, value: Columns, row: u32, held: Held) {
    let k = key.fresh + row * key.fresh_stride;
    if key.is_live.x {
        key_cache[k.x] = held.key.x;
    }
    if key.is_live.y {
        key_cache[k.y] = held.key.y;
    }
    if key.is_live.z {
        key_cache[k.z] = held.key.z;
    }
    if key.is_live.w {
        key_cache[k.w] = held.key.w;
    }
    let v = value.fresh + row * value.fresh_stride;
    if value.is_live.x {
        value_cache[v.x] = held.value.x;
    }
    if value.is_live.y {
        value_cache[v.y] = held.value.y;
    }
    if value.is_live.z {
        value_cache[v.z] = held.value.z;
    }
    if value.is_live.w {
        value_cache[v.w] = held.value.w;
    }
}
