// Writes new tokens of K and V into a layer, each at its position, in one dispatch.
//
// A thread owns four units (vectors of 16 bytes, or words) that lie near one another in the source: of the
// tokens of one (batch, head) row or, in a (B, T, H, D) source, of the heads of one token. Bits are moved,
// never numbers, so one kernel serves every format that comes in as it is stored. `append/common.wgsl` is joined
// (parameters, bindings, positions), and a text of `layout/`: it says where a position lies.
//
// group 0, binding 0: key_source     new K, any strides over (B, H, T), units of a head adjacent
// group 0, binding 1: value_source   new V, likewise
// group 0, binding 2: key_cache      [slot, D of K], slots as the layout numbers them
// group 0, binding 3: value_cache    [slot, D of V]
// group 1, binding 0: lists          positions that are not a plain run, as in `append/common.wgsl`; pages, records of
//                                    ragged rows
// group 1, binding 1: witness        counts the calls that ran
// group 2, binding 0: params         a uniform, or immediate data where the device has it

alias Target = Unit;

// A head is this many units wide, rounded up to a power of two, or this many of them are a workgroup's share.
override tile_units: u32 = 16u;
// Threads along what lies side by side in the source: the units of a row's tokens or, in a (B, T, H, D)
// source, of a token's heads.
override tile_threads: u32 = 16u;
// How many such rows, or tokens, a workgroup takes.
override tile_height: u32 = 16u;
// Whether the source is (B, T, H, D).
override is_bthd: bool = false;
// Whether there is one position only, as in a decode step.
override is_single: bool = false;
// Whether it is the scales of quantized K and V that are written: then a unit is a word.
override is_scales: bool = false;

// A thread's four units are this many apart, as in columns.wgsl.
const RUN: u32 = 8u;

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
        b = group.y / params.tiles;
        h = (group.y - b * params.tiles) * width + across;
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

    let place = place_of(b, entry, is_written);
    let token = place.token;
    let position = place.position;
    let target_row = place.row;
    is_written = place.is_written;
    let is_zero = place.is_zero;
    let slot = vec4(
        kv_slot(params.kv, target_row.x, h.x, position.x),
        kv_slot(params.kv, target_row.y, h.y, position.y),
        kv_slot(params.kv, target_row.z, h.z, position.z),
        kv_slot(params.kv, target_row.w, h.w, position.w),
    );
    let key_unit = min(unit, vec4(max(params.key_units, 1u) - 1u));
    write_keys(
        first_units(params.key, b, h) + token * params.key.stride_t + key_unit,
        select(0u, params.kv.key_scales, is_scales) + slot * params.key_units + key_unit,
        is_zero,
        is_written & (unit < vec4(params.key_units)),
    );
    let value_unit = min(unit, vec4(max(params.value_units, 1u) - 1u));
    write_values(
        first_units(params.value, b, h) + token * params.value.stride_t + value_unit,
        select(0u, params.kv.value_scales, is_scales) + slot * params.value_units + value_unit,
        is_zero,
        is_written & (unit < vec4(params.value_units)),
    );
    if all(group == vec3(0u)) & all(local == vec3(0u)) {
        atomicAdd(&witness, 1u);
    }
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
