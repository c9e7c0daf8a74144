// Weights of one part of a matrix, as the model file stores them. Joined with a text of `format/`, which
// unpacks them, and with the kernel that uses them.
//
// A panel is what a thread unpacks at a time: 32 inputs of four outputs. Outputs lie in groups of 32:
// output i of lane l of group g is row 32 * g + LANES * i + l. So neighbouring lanes read neighbouring
// texels. A step is the inputs whose scales lie together: PANELS panels.
//
// Weights lie in textures because every adapter reads those well. A software adapter above all: llvmpipe
// gathers texels in vectors, while it reads a storage buffer word by word.
//
// A format's text has
// - PANELS, QUANT_TEXELS and SCALE_WORDS: panels a step, and what an output takes in a step
// - Panel and load_panel: one panel, still packed
// - weights: four inputs of a panel

@group(0) @binding(0) var<uniform> part: Part;
@group(0) @binding(1) var quants: texture_2d<u32>; // [octet][step][QUANT_TEXELS][LANES], octet = 4 * group + i
@group(0) @binding(2) var scales: texture_2d<u32>; // [group][step][SCALE_WORDS][LANES], a word for each i

struct Part {
    first: u32,        // output of the whole matrix that is row 0 of this part
    rows: u32,         // outputs of this part
    outputs: u32,      // outputs of the whole matrix
    steps: u32,        // steps of an output
    quants_shift: u32, // log2 of the texels in a row of `quants`
    scales_shift: u32, // of `scales`
}

const LANES: u32 = 8;

// Which four outputs, and which of their panels.
struct Cursor {
    group: u32,
    lane: u32,
    panel: u32,
}

// Texel `i` of what output `output` (0 to 3) takes in the panel's step.
fn quant(at: Cursor, output: u32, i: u32) -> vec4<u32> {
    let step = at.panel / PANELS;
    let texel = (((4u * at.group + output) * part.steps + step) * QUANT_TEXELS + i) * LANES + at.lane;
    return textureLoad(quants, vec2<u32>(texel & ((1u << part.quants_shift) - 1u), texel >> part.quants_shift), 0);
}

// Word `i` of the scales of the step, of each of the four outputs.
fn scale_words(at: Cursor, i: u32) -> vec4<u32> {
    let step = at.panel / PANELS;
    let texel = ((at.group * part.steps + step) * SCALE_WORDS + i) * LANES + at.lane;
    return textureLoad(scales, vec2<u32>(texel & ((1u << part.scales_shift) - 1u), texel >> part.scales_shift), 0);
}

// The low half of each word as f16.
fn low_halves(words: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(
        unpack2x16float(words.x).x,
        unpack2x16float(words.y).x,
        unpack2x16float(words.z).x,
        unpack2x16float(words.w).x,
    );
}

// The four bytes of a word, lowest first.
fn bytes(word: u32) -> vec4<u32> {
    return (vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu);
}

// Four numbers below 2^31. Signed, because a conversion from unsigned takes several instructions where a
// processor has only the signed one.
fn number(integers: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(integers));
}
