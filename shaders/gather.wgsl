// Moves batch rows of K and V in place: new row i becomes old row map[i], without a scratch buffer.
//
// A thread owns four columns (`columns.wgsl` is joined). All threads run the same short list of row moves,
// which the host has ordered so that no row is overwritten while it is still needed; a cycle goes through
// registers.
//
// group 0, binding 0: key_cache      [B, H, capacity, D of K]
// group 0, binding 1: value_cache    [B, H, capacity, D of V]
// group 1, binding 0: lists          the moves: copies (from, how many rows, these), then cycles (how
//                                    many rows, these)
// group 1, binding 1: witness        counts the calls that ran
// group 2, binding 0: params         a uniform, or immediate data where the device has it

alias Unit = vec4<u32>;

struct Params {
    // Units of a head; the first unit of what moves, in the buffer.
    key_units: u32,
    value_units: u32,
    key_base: u32,
    value_base: u32,
    heads: u32,
    // Workgroups of a head.
    tiles: u32,
    // The ring: token t lies at slot (start + t) mod capacity; only live slots are touched.
    start: u32,
    len: u32,
    capacity: u32,
    // Words of `lists`: the first of the moves, the first of the cycles, one past the last.
    list_at: u32,
    cycles_at: u32,
    list_end: u32,
}

@group(0) @binding(0) var<storage, read_write> key_cache: array<Unit>;
@group(0) @binding(1) var<storage, read_write> value_cache: array<Unit>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(1) @binding(1) var<storage, read_write> witness: atomic<u32>;
@group(2) @binding(0) var<uniform> params: Params;

// Which moves there are, so that a kernel runs no others. Loops break at the end of their bodies: a software
// adapter runs to its end a body that all threads have left before, and takes a `continuing` block for the
// beginning of the next round.
override has_copies: bool = true;
override has_cycles: bool = true;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let number = group.x + groups.x * (group.y + groups.y * group.z);
    let mine = share(number, local);
    let key = columns(mine, params.key_base, params.key_units, params.start, params.capacity);
    let value = columns(mine, params.value_base, params.value_units, params.start, params.capacity);
    var next = params.list_at;
    if has_copies {
        let end = params.list_at + params.cycles_at;
        loop {
            let held = load(key, value, lists[next]);
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
            if next == end {
                break;
            }
        }
    }
    if has_cycles {
        let end = params.list_at + params.list_end;
        loop {
            let last = next + lists[next];
            next++;
            var to = lists[next];
            let held = load(key, value, to);
            loop {
                next++;
                let source = lists[next];
                store(key, value, to, load(key, value, source));
                to = source;
                if next == last {
                    break;
                }
            }
            store(key, value, to, held);
            next++;
            if next == end {
                break;
            }
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
        Four(key_cache[k.x], key_cache[k.y], key_cache[k.z], key_cache[k.w]),
        Four(value_cache[v.x], value_cache[v.y], value_cache[v.z], value_cache[v.w]),
    );
}
