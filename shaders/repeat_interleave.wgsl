// Copies the live tokens of K and V rows into fresh buffers, each row as often as it is asked for.
//
// Serves repeat-interleave and every other change that needs larger buffers: a selection that grows
// the batch, and growth in tokens, where each row goes out once. The live tokens come out straight,
// from slot 0 on. A thread owns four columns (`columns.wgsl` is joined) and reads each source row once.
//
// group 0, binding 0: key_source     [old B, H, old capacity, D of K]
// group 0, binding 1: value_source   [old B, H, old capacity, D of V]
// group 0, binding 2: key_cache      [new B, H, new capacity, D of K]
// group 0, binding 3: value_cache    [new B, H, new capacity, D of V]
// group 1, binding 0: lists          the copies: (from, how many rows, these)
// group 1, binding 1: witness        counts the calls that ran
// group 2, binding 0: params         a uniform, or immediate data where the device has it

alias Unit = vec4<u32>;

struct Params {
    // Units of a head; the first unit of what is copied, in the old buffers and in the new ones.
    key_units: u32,
    value_units: u32,
    key_from_base: u32,
    value_from_base: u32,
    key_base: u32,
    value_base: u32,
    heads: u32,
    // Workgroups of a head.
    tiles: u32,
    // The old ring: token t lies at slot (start + t) mod old_capacity.
    start: u32,
    len: u32,
    old_capacity: u32,
    new_capacity: u32,
    // First word of the list of copies in `lists`, and its length in words.
    list_at: u32,
    list_end: u32,
}

@group(0) @binding(0) var<storage, read> key_source: array<Unit>;
@group(0) @binding(1) var<storage, read> value_source: array<Unit>;
@group(0) @binding(2) var<storage, read_write> key_cache: array<Unit>;
@group(0) @binding(3) var<storage, read_write> value_cache: array<Unit>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(1) @binding(1) var<storage, read_write> witness: atomic<u32>;
@group(2) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let number = group.x + groups.x * (group.y + groups.y * group.z);
    let mine = share(number, local);
    let key_from = columns(mine, params.key_from_base, params.key_units, params.start, params.old_capacity);
    let value_from = columns(mine, params.value_from_base, params.value_units, params.start, params.old_capacity);
    let key = columns(mine, params.key_base, params.key_units, 0u, params.new_capacity);
    let value = columns(mine, params.value_base, params.value_units, 0u, params.new_capacity);
    var next = params.list_at;
    // At least one copy of at least one row. Loops break at the end of their bodies, as in gather.wgsl.
    loop {
        let held = load(key_from, value_from, lists[next]);
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
    if number + local == 0u {
        atomicAdd(&witness, 1u);
    }
}

fn load(key: Columns, value: Columns, row: u32) -> Held {
    let k = key.at + row * key.row_stride;
    let v = value.at + row * value.row_stride;
    return Held(
        Four(key_source[k.x], key_source[k.y], key_source[k.z], key_source[k.w]),
        Four(value_source[v.x], value_source[v.y], value_source[v.z], value_source[v.w]),
    );
}
