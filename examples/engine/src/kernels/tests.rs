//! Each format's kernels against a plain decoder on the host, over random blocks; `layers.rs`: the other kernels.

mod layers;

use std::process::Command;

use half::{bf16, f16};

use super::*;
use crate::format::GROUP;
use crate::weights::{PartRange, PartWriter};

/// Values of scales: zero, both signs, and subnormal halves.
const SCALES: [u16; 12] = [
    0x0000, 0x8000, 0x0001, 0x8001, 0x03ff, 0x83ff, 0x0400, 0x2e66, 0xae66, 0x3c00, 0x1419, 0x9e21,
];

/// Rows: two groups and an incomplete third one.
const OUTPUTS: usize = 70;

/// A block: numbers, bytes, and the offsets of its f16 scales.
fn block(format: Format) -> (usize, usize, &'static [usize]) {
    match format {
        Format::F32 => (1, 4, &[]),
        Format::F16 | Format::BF16 => (1, 2, &[]),
        Format::Q4_0 => (32, 18, &[0]),
        Format::Q4_1 => (32, 20, &[0, 2]),
        Format::Q5_0 => (32, 22, &[0]),
        Format::Q8_0 => (32, 34, &[0]),
        Format::Q4K => (256, 144, &[0, 2]),
        Format::Q6K => (256, 210, &[208]),
    }
}

/// The numbers of a block, as llama.cpp defines them.
fn decode(format: Format, b: &[u8]) -> Vec<f32> {
    let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    // Number i of 32 in 16 bytes: the low halves hold the first 16 numbers, the high halves the others.
    let nibble = |at: usize, i: usize| if i < 16 { b[at + i] & 15 } else { b[at + i - 16] >> 4 };
    match format {
        Format::F32 => vec![f32::from_le_bytes([b[0], b[1], b[2], b[3]])],
        Format::F16 => vec![half(0)],
        Format::BF16 => vec![bf16::from_le_bytes([b[0], b[1]]).to_f32()],
        Format::Q4_0 => (0..32).map(|i| half(0) * (f32::from(nibble(2, i)) - 8.0)).collect(),
        Format::Q4_1 => (0..32).map(|i| half(0) * f32::from(nibble(4, i)) + half(2)).collect(),
        Format::Q5_0 => {
            let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
            let fifth = |i: usize| if high >> i & 1 == 1 { 16.0 } else { 0.0 };
            (0..32).map(|i| half(0) * (f32::from(nibble(6, i)) + fifth(i) - 16.0)).collect()
        }
        Format::Q8_0 => (0..32).map(|i| half(0) * f32::from(b[2 + i].cast_signed())).collect(),
        Format::Q4K => (0..256)
            .map(|i| {
                let (sub, scales) = (i / 32, &b[4..16]);
                let (scale, min) = if sub < 4 {
                    (scales[sub] & 63, scales[sub + 4] & 63)
                } else {
                    (
                        scales[sub + 4] & 15 | scales[sub - 4] >> 6 << 4,
                        scales[sub + 4] >> 4 | scales[sub] >> 6 << 4,
                    )
                };
                let byte = b[16 + sub / 2 * 32 + i % 32];
                let q = if sub % 2 == 0 { byte & 15 } else { byte >> 4 };
                half(0) * f32::from(scale) * f32::from(q) - half(2) * f32::from(min)
            })
            .collect(),
        Format::Q6K => (0..256)
            .map(|i| {
                let (part, l) = (i / 128, i % 128);
                let low = b[64 * part + l % 64];
                let low = if l < 64 { low & 15 } else { low >> 4 };
                let high = b[128 + 32 * part + l % 32] >> (l / 32 * 2) & 3;
                let q = i16::from(low | high << 4) - 32;
                let scale = f32::from(b[192 + i / 16].cast_signed());
                half(208) * scale * f32::from(q)
            })
            .collect(),
    }
}

/// Random rows of a format, with every kind of scale.
fn rows(format: Format, inputs: usize, seed: &[u8]) -> (Vec<u8>, Vec<f32>) {
    let (numbers, bytes, scales) = block(format);
    let mut state = seed.iter().fold(7_u64, |state, &byte| state * 31 + u64::from(byte));
    let mut random = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u8::try_from(state >> 56).expect("eight bits")
    };
    let (mut stored, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..OUTPUTS * inputs / numbers {
        let mut block: Vec<u8> = (0..bytes).map(|_| random()).collect();
        for &at in scales {
            let scale = SCALES[usize::from(random()) % SCALES.len()];
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        if numbers == 1 {
            // Finite numbers of any sign, small ones included.
            let number =
                (f32::from(random()) - 127.5) * [1.0, 1e-3, 1e-6][usize::from(random()) % 3];
            block = match format {
                Format::F16 => f16::from_f32(number).to_le_bytes().to_vec(),
                Format::BF16 => bf16::from_f32(number).to_le_bytes().to_vec(),
                _ => number.to_le_bytes().to_vec(),
            };
        }
        plain.extend(decode(format, &block));
        stored.extend(block);
    }
    (stored, plain)
}

/// The matrix on the device, in two parts.
fn upload(gpu: &Gpu, format: Format, inputs: usize, stored: &[u8]) -> Matrix {
    let row_bytes = stored.len() / OUTPUTS;
    let total = u32::try_from(OUTPUTS).expect("few");
    let parts = [(0, GROUP), (GROUP, OUTPUTS)].map(|(from, to)| {
        let [first, rows] = [from, to - from].map(|n| u32::try_from(n).expect("few"));
        let range = PartRange { first, rows, total };
        let mut writer = PartWriter::new(gpu, "test", format, inputs, range).expect("whole blocks");
        for rows in stored[from * row_bytes..to * row_bytes].chunks(GROUP * row_bytes) {
            writer.write_group(rows);
        }
        writer.finish().0
    });
    Matrix { parts: parts.into() }
}

fn buffer(gpu: &Gpu, words: &[u32], usage: wgpu::BufferUsages) -> wgpu::Buffer {
    use wgpu::util::DeviceExt;
    gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(words),
        usage: usage | wgpu::BufferUsages::COPY_SRC,
    })
}

/// Numbers in a texture, `columns` per row.
fn texture(gpu: &Gpu, columns: usize, numbers: &[f32]) -> wgpu::TextureView {
    let rows = numbers.len() / columns;
    let [width, height] = [columns / 4, rows].map(|n| u32::try_from(n).expect("few"));
    let size = wgpu::Extent3d { width, height, depth_or_array_layers: 1 };
    let texture = gpu.device().create_texture(&wgpu::TextureDescriptor {
        label: None,
        size,
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format: wgpu::TextureFormat::Rgba32Float,
        usage: wgpu::TextureUsages::TEXTURE_BINDING | wgpu::TextureUsages::COPY_DST,
        view_formats: &[],
    });
    let layout = wgpu::TexelCopyBufferLayout {
        offset: 0,
        bytes_per_row: Some(16 * width),
        rows_per_image: None,
    };
    gpu.queue().write_texture(texture.as_image_copy(), bytemuck::cast_slice(numbers), layout, size);
    texture.create_view(&wgpu::TextureViewDescriptor::default())
}

fn read(gpu: &Gpu, buffer: &wgpu::Buffer) -> Vec<f32> {
    let copy = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: buffer.size(),
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let mut encoder =
        gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &copy, 0, buffer.size());
    gpu.queue().submit([encoder.finish()]);
    copy.map_async(wgpu::MapMode::Read, .., |result| result.expect("a mapping"));
    gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("a device");
    bytemuck::cast_slice(&copy.get_mapped_range(..).expect("a mapping")).to_vec()
}

/// Inputs of the matrices: with an incomplete last step, if the format allows it.
fn widths(format: Format) -> [usize; 2] {
    match block(format).0 {
        256 => [256, 512],
        32 => [96, 128],
        _ => [20, 64],
    }
}

/// The embedding copies a row's numbers, so it shows each of them.
#[test]
fn every_format_unpacks_to_the_numbers_that_it_stores() {
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    for &format in Format::ALL {
        for inputs in widths(format) {
            let (stored, plain) = rows(format, inputs, b"embedding");
            let matrix = upload(&gpu, format, inputs, &stored);
            let width = [("WIDTH", f64::from(u32::try_from(inputs).expect("few")))];
            let kernel = kernel(&gpu, "embed", &embed_wgsl(format), EMBED_BINDS, &width);
            let embed = Embed([(format, kernel)].into());
            let ids: Vec<u32> = (0..).take(OUTPUTS).collect();
            let tokens = buffer(&gpu, &ids, wgpu::BufferUsages::STORAGE);
            let hidden = buffer(&gpu, &vec![0; OUTPUTS * inputs], wgpu::BufferUsages::STORAGE);
            let bound = embed.bind(&gpu, &matrix, &tokens, &hidden).expect("bind groups");
            gpu.submit_pass("test", |pass| embed.dispatch(pass, &bound, 64, 70));
            for (i, (got, due)) in read(&gpu, &hidden).into_iter().zip(plain).enumerate() {
                // A driver may round the product and the sum of a number once or twice.
                let bound = due.abs() * 1e-6 + 1e-6 * block_scale(format, &stored, inputs, i);
                assert!((got - due).abs() <= bound, "{format:?}, number {i}: {got} for {due}");
            }
        }
    }
}

/// The magnitude of the terms of number `i`: a difference of two large numbers may be small.
fn block_scale(format: Format, stored: &[u8], inputs: usize, i: usize) -> f32 {
    let (numbers, bytes, scales) = block(format);
    let block = (i / inputs * (inputs / numbers) + i % inputs / numbers) * bytes;
    let most = match format {
        Format::Q4K => 63.0 * 15.0,
        Format::Q4_1 => 15.0,
        _ => return 0.0,
    };
    let scale =
        |at: usize| f16::from_le_bytes([stored[block + at], stored[block + at + 1]]).to_f32();
    scales.iter().map(|&at| scale(at).abs() * most).sum()
}

/// The products of a format, added to their output, in the form for a software adapter or for a GPU.
fn product(gpu: &Gpu, format: Format, is_split: bool) -> MatMul {
    let (split, groups) = if is_split { (16.0, [1, 1, 1]) } else { (1.0, [1, 2, 4]) };
    let constants = [("SPLIT", split), ("ADD", 1.0)];
    let tiles = [(1, groups[0]), (4, groups[1]), (8, groups[2])].map(|(tokens, groups)| {
        let wgsl = matmul_wgsl(format, tokens, groups);
        (Tile { tokens, groups }, kernel(gpu, "product", &wgsl, MATMUL_BINDS, &constants))
    });
    MatMul([(format, Product { tiles })].into())
}

/// A product of `tokens` rows with random rows of a format, against sums in f64.
fn check_product(
    gpu: &Gpu,
    product: &MatMul,
    format: Format,
    inputs: usize,
    tokens: usize,
    seed: u8,
) {
    let (stored, plain) = rows(format, inputs, &[seed]);
    let matrix = upload(gpu, format, inputs, &stored);
    let columns = inputs.next_multiple_of(256);
    let number = |row: usize, column: usize| {
        let mixed = (row * 7919 + column * 104_729 + usize::from(seed)) % 1000;
        f32::from(u16::try_from(mixed).expect("few")) / 500.0 - 1.0
    };
    let input: Vec<f32> = (0..tokens.next_multiple_of(8) * columns)
        .map(|i| (i / columns, i % columns))
        .map(|(row, column)| if column < inputs { number(row, column) } else { 0.0 })
        .collect();
    let count = u32::try_from(tokens).expect("few");
    let stage = buffer(gpu, &[count, 0], wgpu::BufferUsages::UNIFORM);
    let one = 1.0_f32.to_bits();
    let output = buffer(gpu, &vec![one; tokens * OUTPUTS], wgpu::BufferUsages::STORAGE);
    let input_texels = texture(gpu, columns, &input);
    let stage = Bound::Buffer(stage.as_entire_buffer_binding());
    let bound = product.bind(gpu, &stage, &matrix, &input_texels, &output).expect("bind groups");
    gpu.submit_pass("test", |pass| product.dispatch(pass, &bound, count));
    for (i, got) in read(gpu, &output).into_iter().enumerate() {
        let (token, row) = (i / OUTPUTS, i % OUTPUTS);
        let terms = (0..inputs)
            .map(|k| f64::from(input[token * columns + k]) * f64::from(plain[row * inputs + k]));
        let (due, size) =
            terms.fold((1.0, 1.0), |(sum, size), term| (sum + term, size + term.abs()));
        let error = (f64::from(got) - due).abs();
        assert!(
            error <= 1e-5 * size,
            "{format:?}, {inputs} inputs, {tokens} tokens, seed {seed}, row {row} of token {token}: {got} for {due}"
        );
    }
}

/// Every tile, complete and incomplete, over random blocks: the form for a software adapter.
#[test]
fn every_format_multiplies() {
    multiply(false);
}

/// The same with invocations that share an output: the form for a GPU.
#[test]
fn every_format_multiplies_where_threads_share_an_output() {
    multiply(true);
}

fn multiply(is_split: bool) {
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    for &format in Format::ALL {
        let product = product(&gpu, format, is_split);
        let [short, long] = widths(format);
        for seed in 0..6 {
            for (inputs, tokens) in [(short, 1), (long, 1), (short, 3), (long, 8), (short, 11)] {
                check_product(&gpu, &product, format, inputs, tokens, seed);
            }
        }
    }
}

/// The constants of a format's text agree with the host's table.
#[test]
fn texts_and_layouts_agree() {
    for &format in Format::ALL {
        let constant = |name: &str| -> usize {
            let start = format!("const {name}: u32 = ");
            let line =
                format.wgsl().lines().find_map(|line| line.strip_prefix(&start)).expect(name);
            line.split(';').next().expect("a number").parse().expect("a number")
        };
        let step = 32 * constant("PANELS");
        let layout = format.layout(step);
        assert_eq!(layout.steps, 1, "{format:?}");
        assert_eq!(layout.group_quants(), GROUP * constant("QUANT_TEXELS"), "{format:?}");
        assert_eq!(layout.group_scales(), 8 * constant("SCALE_WORDS"), "{format:?}");
    }
}

/// Chrome's compiler, `tint`, accepts every text. Without it the test passes, and a line on stderr says so.
#[test]
fn every_text_passes_tint_if_it_is_installed() {
    if Command::new("tint").arg("--help").output().is_err() {
        let line = b"tint is not installed: shaders are validated by naga alone\n";
        std::io::Write::write_all(&mut std::io::stderr(), line).expect("a stderr");
        return;
    }
    let folder = std::env::temp_dir().join(format!("decode-tint-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for temporary files");
    let file = folder.join("shader.wgsl");
    let of_formats = Format::ALL.iter().flat_map(|&format| {
        [embed_wgsl(format), matmul_wgsl(format, 1, 1), matmul_wgsl(format, 4, 2)]
    });
    let norms = [
        include_str!("../../shaders/rms_norm.wgsl"),
        include_str!("../../shaders/post_norm.wgsl"),
        include_str!("../../shaders/head_norm.wgsl"),
    ];
    let others = [
        include_str!("../../shaders/rope.wgsl"),
        include_str!("../../shaders/gate.wgsl"),
        include_str!("../../shaders/to_texture.wgsl"),
        include_str!("../../shaders/argmax.wgsl"),
    ];
    let texts = of_formats.chain(norms.map(normalising)).chain(others.map(str::to_owned));
    for text in texts {
        std::fs::write(&file, &text).expect("a writable folder");
        let mut tint = Command::new("tint");
        tint.args(["--format", "wgsl", "--output-name"]).arg(folder.join("out")).arg(&file);
        let answer = tint.output().expect("tint runs");
        let message = String::from_utf8_lossy(&answer.stderr);
        assert!(answer.status.success(), "{message}\nin\n{text}");
    }
    std::fs::remove_dir_all(&folder).expect("the folder made above");
}
