//! The variants of a kernel's WGSL.

use super::Source;
use crate::error::{Error, Result};
use crate::format::{Format, by_words, of_side};
use crate::layout::Layout;

/// What an invocation moves at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Unit {
    /// 16 bytes: `vec4<u32>`.
    #[default]
    Vector,
    /// 4 bytes: `u32`, for rows that are not multiples of 16 bytes.
    Word,
}

impl Unit {
    #[cfg(test)]
    pub(super) const ALL: [Self; 2] = [Self::Vector, Self::Word];

    pub(crate) const fn bytes(self) -> u64 {
        match self {
            Self::Vector => 16,
            Self::Word => 4,
        }
    }

    /// The widest unit that divides rows of this many bytes.
    pub(crate) fn for_rows(row_bytes: [u64; 2]) -> Self {
        if row_bytes.iter().all(|bytes| bytes % 16 == 0) { Self::Vector } else { Self::Word }
    }

    /// A byte count, in units. The caller has checked sizes against the device's limits.
    pub(crate) fn count(self, bytes: u64) -> Result<u32> {
        let units = bytes / self.bytes();
        u32::try_from(units).map_err(|_| Error::too_many("offset or stride, in units", units))
    }
}

/// How parameters are passed to a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ParamsPath {
    /// `var<immediate>`: recorded with the dispatch.
    Immediate,
    /// `var<uniform>` in the arena, at a dynamic offset: for devices without immediates, or with too few bytes.
    Uniform,
}

#[cfg(test)]
impl ParamsPath {
    const ALL: [Self; 2] = [Self::Uniform, Self::Immediate];
}

/// Pipeline constants of a kernel at most.
pub(crate) const CONSTANTS: usize = 16;

/// The first constants of a kernel; the rest are zero.
pub(crate) fn constants<const N: usize>(values: [u32; N]) -> [u32; CONSTANTS] {
    std::array::from_fn(|at| values.get(at).copied().unwrap_or(0))
}

/// How a kernel reads elements of K or of V.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Elements {
    pub(crate) format: Format,
    pub(crate) by_words: bool,
}

impl Elements {
    /// Of slots of these many elements.
    pub(crate) fn new(formats: [Format; 2], strides: [usize; 2]) -> [Self; 2] {
        [0, 1].map(|side| {
            let format = formats[side];
            // Quantized elements are read in one way.
            let by_words = !format.is_quantized() && by_words(strides[side]);
            Self { format, by_words }
        })
    }
}

/// Selects a variant of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    pub(crate) unit: Unit,
    /// For kernels that are joined with a layout's text.
    pub(crate) layout: Option<Layout>,
    /// For kernels that read elements.
    pub(crate) elements: Option<[Elements; 2]>,
    /// Values of the kernel's pipeline constants, in its order.
    pub(crate) constants: [u32; CONSTANTS],
}

impl Variant {
    /// The WGSL of this variant of a kernel.
    pub(crate) fn text(&self, source: &Source, path: ParamsPath) -> String {
        let mut text = source.wgsl.to_owned() + &source.joined.concat();
        if self.unit == Unit::Word {
            text = text.replace("alias Unit = vec4<u32>;", "alias Unit = u32;");
        }
        if path == ParamsPath::Immediate {
            text = text.replace(
                "@group(2) @binding(0) var<uniform> params: Params;",
                "var<immediate> params: Params;",
            );
        }
        for (side, elements) in ["key", "value"].iter().zip(self.elements.iter().flatten()) {
            text.push_str(&elements.format.side_wgsl(side, elements.by_words));
        }
        if let Some([vectors, words]) = source.sides {
            let texts = if self.unit == Unit::Word { words } else { vectors };
            ["key", "value"].iter().for_each(|side| text.push_str(&of_side(&texts.concat(), side)));
        }
        if let Some(layout) = self.layout {
            text.push_str(layout.wgsl());
            if layout.has_table() {
                text.push_str("fn kv_table(i: u32) -> u32 {\n    return lists[i];\n}\n");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::gpu::kernels::limits::{TILES_BYTES, WORKGROUP_BYTES};

    fn some_or_none<T: Copy>(all: &[T]) -> Vec<Option<T>> {
        if all.is_empty() { vec![None] } else { all.iter().copied().map(Some).collect() }
    }

    /// Every variant of every kernel, with its name.
    fn all() -> Vec<(String, String, ParamsPath)> {
        let mut all = Vec::new();
        for source in super::super::SOURCES {
            let has_units = source.wgsl.contains("Unit");
            let has_units = has_units || source.sides.is_some();
            for unit in Unit::ALL.into_iter().take(if has_units { 2 } else { 1 }) {
                for layout in some_or_none(source.layouts) {
                    let both = |formats| [[4, 4], [2, 2]].map(|dims| Elements::new(formats, dims));
                    let mut elements: Vec<_> =
                        source.formats.iter().copied().flat_map(both).collect();
                    elements.dedup();
                    for elements in some_or_none(&elements) {
                        for path in ParamsPath::ALL {
                            let variant = Variant { unit, layout, elements, ..Variant::default() };
                            let name = format!("{}, {variant:?}, {path:?}", source.label);
                            all.push((name, variant.text(source, path), path));
                        }
                    }
                }
            }
        }
        all
    }

    /// Valid within WebGPU's baseline. Immediates are only used if the device has them.
    #[test]
    fn every_variant_is_valid_for_the_baseline() {
        use naga::valid::{Capabilities, ValidationFlags, Validator};
        for (name, text, path) in all() {
            // `unpack2x16float` is a part of WGSL; naga lists it as optional because old GL lacks it.
            let baseline = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
            let capabilities = match path {
                ParamsPath::Uniform => baseline,
                ParamsPath::Immediate => baseline | Capabilities::IMMEDIATES,
            };
            let module = naga::front::wgsl::parse_str(&text)
                .unwrap_or_else(|error| panic!("{name}: {}", error.emit_to_string(&text)));
            Validator::new(ValidationFlags::all(), capabilities)
                .validate(&module)
                .unwrap_or_else(|error| panic!("{name}: {error:?}"));
            let storage = module
                .global_variables
                .iter()
                .filter(|(_, it)| matches!(it.space, naga::AddressSpace::Storage { .. }))
                .count();
            assert!(storage <= 8, "{name}: {storage} storage buffers");
            let shared: u32 = module
                .global_variables
                .iter()
                .filter(|(_, it)| it.space == naga::AddressSpace::WorkGroup)
                .map(|(_, it)| module.types[it.ty].inner.size(module.to_ctx()))
                .sum();
            let is_tiled = name.contains("in tiles");
            let most = if is_tiled { TILES_BYTES } else { WORKGROUP_BYTES };
            assert!(shared <= most, "{name}: {shared} bytes shared");
        }
    }

    /// Chrome's compiler, `tint`, accepts every variant that a browser can use: it parses them and writes WGSL, and
    /// SPIR-V, MSL and HLSL if the installed build of `tint` has these writers. Without `tint` the test passes. A line
    /// on stderr says what was not checked.
    #[test]
    fn every_variant_passes_tint_if_it_is_installed() {
        let print = |line: &str| {
            // To stderr itself: the test harness hides the output of a passing test.
            std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("a stderr");
        };
        if Command::new("tint").arg("--help").output().is_err() {
            return print("tint is not installed: shaders are validated by naga alone\n");
        }
        let folder = std::env::temp_dir().join(format!("kvcache-tint-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for temporary files");
        let file = folder.join("shader.wgsl");
        let mut missing = Vec::new();
        let variants = all().into_iter().filter(|(_, _, path)| *path == ParamsPath::Uniform);
        for (name, text, _) in variants {
            std::fs::write(&file, &text).expect("a writable folder");
            for format in ["wgsl", "spirv", "msl", "hlsl"] {
                if missing.contains(&format) {
                    continue;
                }
                let mut tint = Command::new("tint");
                tint.args(["--format", format, "--output-name"]).arg(folder.join("out")).arg(&file);
                let answer = tint.output().expect("tint runs");
                let said = String::from_utf8_lossy(&answer.stderr).into_owned()
                    + &String::from_utf8_lossy(&answer.stdout);
                if said.contains("not enabled") || said.contains("invalid value") {
                    missing.push(format);
                    continue;
                }
                assert!(answer.status.success(), "{name}, to {format}: {said}");
            }
        }
        std::fs::remove_dir_all(&folder).expect("the folder made above");
        assert!(!missing.contains(&"wgsl"), "tint parses and writes WGSL");
        if !missing.is_empty() {
            print(&format!("this build of tint does not write {}\n", missing.join(", ")));
        }
    }

    #[test]
    fn every_variant_differs_from_every_other() {
        let all = all();
        for (i, (name, text, _)) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|(_, other, _)| other != text), "{name} comes twice");
        }
    }
}
