//! Parameters of kernels: structs of words with the same layout as `struct Params` in WGSL.

/// Declares the parameters of a kernel with the fields of its WGSL struct; a test compares both.
macro_rules! params {
    ($(#[$meta:meta])* struct $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
        pub(super) struct $name {
            $(pub(super) $field: $type,)*
        }

        impl $name {
            #[expect(clippy::cast_possible_truncation, reason = "the assertion compares it")]
            pub(super) const BYTES: u32 = {
                assert!(size_of::<Self>() <= crate::gpu::arena::PARAMS_BYTES as usize);
                size_of::<Self>() as u32
            };
        }

        #[cfg(test)]
        impl $name {
            /// Name, offset and size of each field, in bytes.
            pub(super) const FIELDS: &[(&str, usize, usize)] = &[$((
                stringify!($field),
                std::mem::offset_of!($name, $field),
                size_of::<$type>(),
            ),)*];
        }
    };
}
pub(super) use params;

/// The address of a tensor, in units or elements: its first element, and its strides along (B, H, T).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Strided {
    pub(super) offset: u32,
    pub(super) stride_b: u32,
    pub(super) stride_h: u32,
    pub(super) stride_t: u32,
}

#[cfg(test)]
mod tests {
    use super::super::{
        SOURCES, Source, append, append_converted, attention, collect, gather, repeat_interleave,
    };
    use crate::layout::{KvLayout, Layout};

    /// Name, offset and size of each member of a struct, in bytes.
    fn members(text: &str, name: &str) -> Vec<(String, usize, usize)> {
        let module = naga::front::wgsl::parse_str(text)
            .unwrap_or_else(|error| panic!("{}", error.emit_to_string(text)));
        let found = module.types.iter().find(|(_, it)| it.name.as_deref() == Some(name));
        let (_, found) = found.unwrap_or_else(|| panic!("no struct {name}"));
        let naga::TypeInner::Struct { members, .. } = &found.inner else {
            panic!("{name} is no struct")
        };
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).expect("a module that was parsed");
        let of = |member: &naga::StructMember| {
            let size = layouter[member.ty].size as usize;
            (member.name.clone().unwrap_or_default(), member.offset as usize, size)
        };
        members.iter().map(of).collect()
    }

    type Fields = &'static [(&'static str, usize, usize)];

    fn owned(fields: Fields) -> Vec<(String, usize, usize)> {
        fields.iter().map(|&(name, offset, size)| (name.to_owned(), offset, size)).collect()
    }

    fn text(source: &Source) -> String {
        let variant = super::super::Variant {
            layout: source.layouts.first().copied(),
            elements: source
                .formats
                .first()
                .map(|&formats| super::super::Elements::new(formats, [4; 2])),
            ..Default::default()
        };
        variant.text(source, super::super::ParamsPath::Uniform)
    }

    #[test]
    fn parameters_are_laid_out_as_the_shaders_read_them() {
        let all: [(&Source, Fields); 10] = [
            (&append::SOURCE, append::Params::FIELDS),
            (&append_converted::CONVERTED, append::Params::FIELDS),
            (&attention::SOURCE, attention::Params::FIELDS),
            (&attention::EXTRAS, attention::Params::FIELDS),
            (&attention::TILES, attention::Params::FIELDS),
            (&attention::TILES_EXTRAS, attention::Params::FIELDS),
            (&attention::COMBINE, attention::CombineParams::FIELDS),
            (&collect::SOURCE, collect::Params::FIELDS),
            (&gather::SOURCE, gather::Params::FIELDS),
            (&repeat_interleave::SOURCE, repeat_interleave::Params::FIELDS),
        ];
        assert_eq!(all.len(), SOURCES.len());
        for (source, fields) in all {
            assert_eq!(members(&text(source), "Params"), owned(fields), "{}", source.label);
        }
    }

    #[test]
    fn a_layout_is_sixteen_words_in_every_text() {
        let expected = [
            "heads",
            "key_dim",
            "value_dim",
            "len",
            "start",
            "capacity",
            "table",
            "table_stride",
            "batch",
            "rows",
            "key_units",
            "value_units",
            "key_scales",
            "value_scales",
        ];
        for layout in Layout::ALL {
            let text = format!("fn kv_table(i: u32) -> u32 {{ return i; }}\n{}", layout.wgsl());
            let words = members(&text, "KvLayout");
            assert_eq!(words.len(), Layout::WORDS);
            assert_eq!(size_of::<KvLayout>(), 4 * Layout::WORDS);
            for (at, (name, offset, size)) in words.iter().enumerate() {
                assert_eq!((*offset, *size), (4 * at, 4));
                assert!(expected.get(at).map_or(name.starts_with("reserved"), |it| it == name));
            }
        }
        let filled = KvLayout {
            heads: 1,
            key_dim: 2,
            value_dim: 3,
            len: 4,
            start: 5,
            capacity: 6,
            ..Default::default()
        };
        let filled = KvLayout { table: 7, table_stride: 8, batch: 9, rows: 10, ..filled };
        let filled = KvLayout { key_units: 11, value_units: 12, ..filled };
        let filled = KvLayout { key_scales: 13, value_scales: 14, ..filled };
        let words: [u32; Layout::WORDS] = bytemuck::cast(filled);
        assert_eq!(words, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0, 0]);
    }
}
