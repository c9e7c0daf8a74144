//! Saved caches: the tokens of layers as a file in the format safetensors. Nothing here knows wgpu.

mod file;
pub(crate) mod sides;

use std::collections::HashMap;
use std::ops::Range;

use safetensors::tensor::{Dtype, SafeTensors};

use self::file::{About, NamedTensor};

use crate::error::{Error, Result, StoringError};
use crate::format::{Format, Plane, TokenBytes};

/// What the file says of itself.
const NAME: &str = "wgpu-kvcache";
const VERSION: &str = "1";

/// Tokens before the live ones at most: positions are 32-bit words.
const MOST_GONE: usize = (u32::MAX / 2) as usize;

/// A layer's tokens, in pages: a ring is saved as one page a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SavedLayer {
    pub(crate) heads: usize,
    /// Elements a head of K and of V.
    pub(crate) dims: [usize; 2],
    pub(crate) formats: [Format; 2],
    /// Whether V is the first elements of each head of K, and not stored.
    pub(crate) is_value_in_key: bool,
    /// Tokens before the live ones that are gone, and those of them that a window has let go.
    pub(crate) dropped: usize,
    pub(crate) let_go: usize,
    /// Tokens of a page.
    pub(crate) page_tokens: usize,
    /// The pages of each row, as many for all, and the first slot and the number of its live tokens.
    pub(crate) pages: Vec<Vec<u32>>,
    pub(crate) spans: Vec<[usize; 2]>,
    /// Of K and of V: the elements of all pages, [page, H, tokens of a page], then their scales.
    pub(crate) sides: [[Vec<u8>; 2]; 2],
}

/// Tokens that are restored at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// For each of the rows so far, which earlier row it continues.
    pub(crate) parents: Vec<u32>,
    /// A row of the file whose tokens they are, for each.
    pub(crate) rows: Vec<usize>,
    /// Which of its live tokens.
    pub(crate) tokens: Range<usize>,
}

/// Layers by number.
pub(crate) type SavedLayers = Vec<(usize, SavedLayer)>;

/// A file of these layers.
pub(crate) fn to_bytes(layers: &[(usize, SavedLayer)]) -> Result<Vec<u8>> {
    let mut about = About::from([
        ("format".to_owned(), NAME.to_owned()),
        ("version".to_owned(), VERSION.to_owned()),
    ]);
    let mut tensors = Vec::new();
    for (number, layer) in layers {
        about.insert(format!("layer.{number}"), layer.about());
        let table = |name: &str, shape: [usize; 2], words: Vec<u32>| NamedTensor {
            name: format!("layer.{number}.{name}"),
            dtype: Dtype::U32,
            shape: shape.to_vec(),
            bytes: bytemuck::cast_slice::<u32, u8>(&words).to_vec().into(),
        };
        let (batch, row_pages) = (layer.pages.len(), layer.pages.first().map_or(0, Vec::len));
        let pages = layer.pages.concat();
        let count = pages.iter().max().map_or(0, |&last| last as usize + 1);
        tensors.push(table("pages", [batch, row_pages], pages));
        let spans = layer.spans.iter().flatten().map(|&it| narrow(it)).collect();
        tensors.push(table("rows", [batch, 2], spans));
        for (at, side) in ["key", "value"].into_iter().enumerate() {
            if at == 1 && layer.is_value_in_key {
                continue;
            }
            let [elements, scales] = &layer.sides[at];
            let format = layer.formats[at];
            let (dtype, row) = element_type(format, layer.dims[at]);
            let shape = |row| vec![count, layer.heads, layer.page_tokens, row];
            let name = format!("layer.{number}.{side}");
            if format.is_quantized() {
                let row = format.blocks(layer.dims[at]).next_multiple_of(2);
                let (name, shape) = (format!("{name}.scales"), shape(row));
                let bytes = scales.into();
                tensors.push(NamedTensor { name, dtype: Dtype::F16, shape, bytes });
            }
            tensors.push(NamedTensor { name, dtype, shape: shape(row), bytes: elements.into() });
        }
    }
    file::write(&about, tensors)
}

/// Refuses the metadata of another library, and of another version.
fn check_format(about: &HashMap<String, String>) -> Result<()> {
    let says = |key: &str| about.get(key).map(String::as_str);
    if says("format") != Some(NAME) {
        return Err(bad("it is not one of this library: its metadata has no format wgpu-kvcache"));
    }
    if says("version") != Some(VERSION) {
        return Err(bad(
            "it is of another version of the file format; this library reads version 1",
        ));
    }
    Ok(())
}

/// The layers of a file. Everything is checked that restoring relies on.
pub(crate) fn parse(bytes: &[u8]) -> Result<SavedLayers> {
    let (about, file) = file::open(bytes)?;
    check_format(&about)?;
    if sides::are_in(&about) {
        return Err(bad(
            "it holds the two sides of an EncoderDecoderCache; restore it into one of these",
        ));
    }
    let says = |key: &str| about.get(key).map(String::as_str);
    let mut numbers = Vec::new();
    for key in about.keys() {
        if let Some(number) = key.strip_prefix("layer.") {
            numbers.push(
                number.parse::<usize>().map_err(|_| bad(&format!("'{key}' names no layer")))?,
            );
        }
    }
    numbers.sort_unstable();
    let layers = numbers.into_iter().map(|number| {
        let about = says(&format!("layer.{number}")).unwrap_or_default();
        let layer = SavedLayer::parse(&file, number, about);
        layer
            .map(|layer| (number, layer))
            .map_err(|reason| bad(&format!("layer {number}: {reason}")))
    });
    layers.collect()
}

impl SavedLayer {
    /// What the tensors do not say.
    fn about(&self) -> String {
        let Self { dims: [key_dim, value_dim], formats: [key, value], dropped, let_go, .. } = self;
        let value_in_key = u8::from(self.is_value_in_key);
        format!(
            "key={key} value={value} key_dim={key_dim} value_dim={value_dim} \
             value_in_key={value_in_key} dropped={dropped} let_go={let_go}"
        )
    }

    fn parse(file: &SafeTensors<'_>, number: usize, about: &str) -> Result<Self, String> {
        let fields: HashMap<&str, &str> =
            about.split_whitespace().filter_map(|field| field.split_once('=')).collect();
        let field =
            |name: &str| fields.get(name).copied().ok_or(format!("no '{name}' in its metadata"));
        let count = |name: &str| {
            field(name)?
                .parse::<usize>()
                .map_err(|_| format!("'{name}' in its metadata is no count"))
        };
        let format = |name: &str| {
            field(name)?.parse::<Format>().map_err(|error| format!("its {name} is of an {error}"))
        };
        let dims = [count("key_dim")?, count("value_dim")?];
        let formats = [format("key")?, format("value")?];
        let is_value_in_key = count("value_in_key")? != 0;
        if dims.contains(&0) || is_value_in_key && (dims[1] > dims[0] || formats[0] != formats[1]) {
            return Err(format!("its heads are of {dims:?} elements"));
        }
        let tensor = |name: &str| {
            let view = file.tensor(&format!("layer.{number}.{name}"));
            view.map_err(|error| format!("{name}: {error}"))
        };
        let words = |name: &str| -> Result<(Vec<usize>, Vec<u32>), String> {
            let tensor = tensor(name)?;
            if tensor.dtype() != Dtype::U32 || tensor.shape().len() != 2 {
                return Err(format!("{name} is no table of U32"));
            }
            Ok((tensor.shape().to_vec(), bytemuck::pod_collect_to_vec(tensor.data())))
        };
        let (shape, pages) = words("pages")?;
        let [batch, row_pages] = [shape[0], shape[1]];
        let (shape, spans) = words("rows")?;
        if batch == 0 || row_pages == 0 || shape != [batch, 2] {
            return Err("pages and rows are not of the same rows".to_owned());
        }
        let key = tensor("key")?;
        let &[page_count, heads, page_tokens, _] = key.shape() else {
            return Err("key has not four axes".to_owned());
        };
        if page_count == 0 || heads == 0 || page_tokens == 0 {
            return Err("key holds nothing".to_owned());
        }
        let mut sides: [[Vec<u8>; 2]; 2] = Default::default();
        for (at, side) in ["key", "value"].into_iter().enumerate() {
            if at == 1 && is_value_in_key {
                continue;
            }
            let (dtype, row) = element_type(formats[at], dims[at]);
            if formats[at].dtype().is_some_and(|it| it.size() == 2) && dims[at] % 2 == 1 {
                return Err(format!("{side} has an odd number of 16-bit elements a head"));
            }
            let check = |name: &str, dtype: Dtype, row: usize| {
                let tensor = tensor(name)?;
                let shape = [page_count, heads, page_tokens, row];
                if tensor.dtype() != dtype || tensor.shape() != shape {
                    let (got, is) = (tensor.dtype(), tensor.shape());
                    return Err(format!(
                        "{name} is {got:?} {is:?}, and should be {dtype:?} {shape:?}"
                    ));
                }
                Ok(tensor.data().to_vec())
            };
            sides[at][0] = check(side, dtype, row)?;
            if formats[at].is_quantized() {
                let row = formats[at].blocks(dims[at]).next_multiple_of(2);
                sides[at][1] = check(&format!("{side}.scales"), Dtype::F16, row)?;
            }
        }
        if let Some(page) = pages.iter().find(|&&page| page as usize >= page_count) {
            return Err(format!("page {page} is past its {page_count} pages"));
        }
        let slots = row_pages.checked_mul(page_tokens).ok_or("its pages cannot be counted")?;
        let spans: Vec<[usize; 2]> =
            spans.chunks(2).map(|span| [span[0] as usize, span[1] as usize]).collect();
        let is_past =
            |[start, len]: &&[usize; 2]| start.checked_add(*len).is_none_or(|end| end > slots);
        if let Some([start, len]) = spans.iter().find(is_past) {
            return Err(format!("{len} tokens from slot {start} on are past its {slots} slots"));
        }
        if spans.iter().all(|[_, len]| *len == 0) {
            return Err("no row has a token".to_owned());
        }
        let pages = pages.chunks(row_pages).map(<[u32]>::to_vec).collect();
        let (dropped, let_go) = (count("dropped")?, count("let_go")?);
        if dropped > MOST_GONE {
            return Err(format!("{dropped} tokens are gone, more than positions count"));
        }
        if let_go > dropped {
            return Err("more tokens are let go than are gone".to_owned());
        }
        Ok(Self {
            heads,
            dims,
            formats,
            is_value_in_key,
            dropped,
            let_go,
            page_tokens,
            pages,
            spans,
            sides,
        })
    }

    pub(crate) fn batch(&self) -> usize {
        self.pages.len()
    }

    /// Live tokens of the longest row.
    pub(crate) fn len(&self) -> usize {
        self.spans.iter().map(|[_, len]| *len).max().unwrap_or(0)
    }

    /// The absolute position of the token behind the live ones.
    pub(crate) fn next_position(&self) -> usize {
        self.dropped.saturating_add(self.len())
    }

    /// How the live tokens from `first` on are restored, so that what rows share is written once: rows part where their
    /// pages do. The first stretch has the rows that differ from the first page on.
    pub(crate) fn stretches(&self, first: usize) -> Vec<Stretch> {
        let (batch, len) = (self.batch(), self.len());
        let is_equal = self.spans.iter().all(|span| *span == self.spans[0]);
        if !is_equal {
            let rows = (0..batch).collect();
            return vec![Stretch { parents: Vec::new(), rows, tokens: first..len }];
        }
        let start = self.spans[0][0];
        let begin = (start + first) / self.page_tokens;
        let end = (start + len).div_ceil(self.page_tokens);
        let mut stretches: Vec<Stretch> = Vec::new();
        // For each row of the file, its row among those of the stretch before.
        let mut of: Vec<u32> = vec![0; batch];
        let mut have = 1;
        for index in begin..end {
            let mut groups: HashMap<(u32, u32), u32> = HashMap::new();
            let (mut rows, mut parents, mut next) = (Vec::new(), Vec::new(), vec![0; batch]);
            for (row, pages) in self.pages.iter().enumerate() {
                let count = narrow(groups.len());
                let group = *groups.entry((of[row], pages[index])).or_insert(count);
                if group == count {
                    rows.push(row);
                    parents.push(of[row]);
                }
                next[row] = group;
            }
            let tokens = (index * self.page_tokens).saturating_sub(start).max(first)
                ..((index + 1) * self.page_tokens - start).min(len);
            of = next;
            match stretches.last_mut() {
                Some(last) if rows.len() == have => last.tokens.end = tokens.end,
                _ => {
                    have = rows.len();
                    stretches.push(Stretch { parents, rows, tokens });
                }
            }
        }
        // In the end all rows of the file, in their order.
        if have != batch || of.iter().enumerate().any(|(row, &group)| row != group as usize) {
            stretches.push(Stretch { parents: of, rows: Vec::new(), tokens: len..len });
        }
        stretches
    }

    /// K and V of live tokens of some rows as they lie in buffers of their own: the elements of [rows, H, tokens], then
    /// the scales. Zeros past the end of a shorter row.
    pub(crate) fn buffers(&self, rows: &[usize], tokens: Range<usize>) -> [Vec<u8>; 2] {
        let bytes = TokenBytes::new(self.formats, self.dims, self.is_value_in_key);
        let mut buffers: [Vec<u8>; 2] = Default::default();
        for (plane, Plane { row_bytes, .. }) in bytes.planes(0).enumerate() {
            for (side, buffer) in buffers.iter_mut().enumerate() {
                let size = usize::try_from(row_bytes[side]).unwrap_or(usize::MAX);
                let from = &self.sides[side][plane];
                if size == 0 {
                    continue;
                }
                for &row in rows {
                    let [start, len] = self.spans[row];
                    for head in 0..self.heads {
                        for token in tokens.clone() {
                            if token >= len {
                                buffer.resize(buffer.len() + size, 0);
                                continue;
                            }
                            let slot = start + token;
                            let page = self.pages[row][slot / self.page_tokens] as usize;
                            let at = (page * self.heads + head) * self.page_tokens
                                + slot % self.page_tokens;
                            buffer.extend(&from[at * size..][..size]);
                        }
                    }
                }
            }
        }
        buffers
    }
}

/// How elements of a format stand in a file: their type, and how many a token of a head has.
fn element_type(format: Format, dim: usize) -> (Dtype, usize) {
    let blocks = format.blocks(dim) * format.block_bytes();
    match format {
        Format::F32 => (Dtype::F32, dim),
        Format::F16 => (Dtype::F16, dim),
        Format::BF16 => (Dtype::BF16, dim),
        Format::Q8_0 => (Dtype::I8, blocks),
        Format::Q4_0 => (Dtype::U8, blocks),
    }
}

fn bad(reason: &str) -> Error {
    StoringError::BadSave { reason: reason.into() }.into()
}

/// What lies in memory has counts that 32 bits hold.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of two tokens of one head of two f16 elements; the bytes of a token are its page and slot.
    pub(super) fn layer(pages: &[&[u32]], spans: &[[usize; 2]]) -> SavedLayer {
        let count = pages.iter().copied().flatten().max().map_or(0, |last| last + 1);
        let all: Vec<u8> = (0..count)
            .flat_map(|page| {
                (0..2).flat_map(move |slot| [u8::try_from(page).expect("few"), slot, 7, 7])
            })
            .collect();
        SavedLayer {
            heads: 1,
            dims: [2, 2],
            formats: [Format::F16; 2],
            is_value_in_key: false,
            dropped: 3,
            let_go: 1,
            page_tokens: 2,
            pages: pages.iter().map(|row| row.to_vec()).collect(),
            spans: spans.to_vec(),
            sides: [[all.clone(), Vec::new()], [all, Vec::new()]],
        }
    }

    #[test]
    fn files_are_read_as_they_were_written() {
        let saved = vec![
            (0, layer(&[&[0, 1], &[0, 2]], &[[1, 3], [1, 3]])),
            (7, layer(&[&[0]], &[[0, 2]])),
        ];
        assert_eq!(parse(&to_bytes(&saved).unwrap()), Ok(saved));
    }

    #[test]
    fn the_same_layers_give_the_same_bytes() {
        let saved: Vec<_> = (0..9).map(|at| (at, layer(&[&[0, 1]], &[[0, 3]]))).collect();
        let first = to_bytes(&saved).unwrap();
        for _ in 0..20 {
            assert_eq!(to_bytes(&saved).unwrap(), first);
        }
        // As the crate's own writer has it, but for the order of the metadata.
        let (about, file) = file::open(&first).unwrap();
        let theirs = safetensors::serialize(file.tensors(), Some(about)).unwrap();
        assert_eq!(theirs.len(), first.len());
        let data = |bytes: &[u8]| bytes[bytes.len() - 9 * (2 * 4 + 2 * 4 + 2 * 16)..].to_vec();
        assert_eq!(data(&theirs), data(&first));
        assert_eq!(parse(&theirs), Ok(saved));
    }

    #[test]
    fn damaged_and_foreign_files_are_errors() {
        let whole = to_bytes(&[(0, layer(&[&[0, 1]], &[[0, 3]]))]).unwrap();
        for end in 0..whole.len() {
            assert!(parse(&whole[..end]).is_err(), "cut at {end}");
        }
        let none = Vec::<(String, safetensors::tensor::TensorView<'_>)>::new();
        let foreign = safetensors::serialize(none, None).unwrap();
        let error = parse(&foreign).unwrap_err();
        assert!(error.to_string().contains("wgpu-kvcache"), "{error}");
        // A page that is not there, tokens that are not there.
        for wrong in [layer(&[&[0, 1]], &[[0, 5]]), layer(&[&[0, 1]], &[[0, 0]])] {
            assert!(parse(&to_bytes(&[(0, wrong)]).unwrap()).is_err());
        }
        let mut wrong = layer(&[&[0, 1]], &[[0, 3]]);
        wrong.sides[0][0].truncate(8);
        assert!(to_bytes(&[(0, wrong)]).is_err());
        // More tokens gone than positions count.
        let wrong = SavedLayer { dropped: usize::MAX, ..layer(&[&[0, 1]], &[[0, 3]]) };
        assert!(parse(&to_bytes(&[(0, wrong)]).unwrap()).is_err());
    }

    /// Every row of every table of three rows and three pages, in the order that the stretches write them.
    #[test]
    fn stretches_write_each_row_and_share_what_rows_share() {
        for code in 0..7_usize.pow(3) {
            let table =
                [code % 7, code / 7 % 7, code / 49].map(|it| u32::try_from(it).expect("few"));
            // A tree: row r has page 0, then one of two, then one of its own or a shared one.
            let pages: Vec<Vec<u32>> =
                table.iter().map(|&it| vec![0, 1 + it / 3, 4 + it]).collect();
            let pages: Vec<&[u32]> = pages.iter().map(Vec::as_slice).collect();
            for (start, len, first) in [(0, 6, 0), (1, 5, 0), (1, 4, 2), (0, 5, 3)] {
                let layer = layer(&pages, &[[start, len]; 3]);
                let mut rows: Vec<Vec<u8>> = vec![Vec::new()];
                let mut written = 0;
                for (at, stretch) in layer.stretches(first).iter().enumerate() {
                    if at > 0 || !stretch.parents.is_empty() {
                        rows =
                            stretch.parents.iter().map(|&it| rows[it as usize].clone()).collect();
                    }
                    let [key, _] = layer.buffers(&stretch.rows, stretch.tokens.clone());
                    let size = 4 * stretch.tokens.len();
                    written += key.len() / 4;
                    for (row, tokens) in rows.iter_mut().zip(key.chunks(size.max(1))) {
                        row.extend(tokens);
                    }
                }
                let [expected, _] = layer.buffers(&[0, 1, 2], first..len);
                assert_eq!(rows.concat(), expected, "{pages:?}, {start}, {len}, {first}");
                assert!(written <= expected.len() / 4);
            }
        }
    }

    /// Whatever the bytes, parsing answers, and what it takes can be restored.
    ///
    /// `KV_FUZZ_SECONDS` sets how long it tries, `KV_FUZZ_CASES` how many files at least.
    #[test]
    fn no_damage_is_a_panic() {
        let number = |name: &str, default: u64| {
            std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
        };
        let (seconds, cases) = (number("KV_FUZZ_SECONDS", 0), number("KV_FUZZ_CASES", 20_000));
        let begin = std::time::Instant::now();
        let mut quantized = layer(&[&[0]], &[[0, 2]]);
        quantized.formats = [Format::Q8_0, Format::F16];
        quantized.sides[0] = [vec![1; 64], vec![2; 8]];
        let saved = [(0, layer(&[&[0, 1], &[0, 2]], &[[1, 3], [0, 3]])), (1, quantized)];
        let whole = to_bytes(&saved).unwrap();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |end: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state >> 20).expect("64 bits") % end
        };
        let (mut taken, mut tried) = (0, 0);
        while tried < cases || begin.elapsed().as_secs() < seconds {
            tried += 1;
            let mut bytes = whole.clone();
            for _ in 0..1 + next(3) {
                let at = next(bytes.len());
                match next(5) {
                    0 => bytes.truncate(at + 1),
                    1 => bytes[at] ^= 1 << next(8),
                    // Digits of the header, and words of the tables.
                    2 => bytes[at] = b'0' + u8::try_from(next(10)).expect("a digit"),
                    3 => drop(bytes.splice(at..at, [b'0'; 3])),
                    _ => bytes[at] = u8::try_from(next(256)).expect("a byte"),
                }
            }
            let Ok(layers) = parse(&bytes) else { continue };
            taken += 1;
            for (_, layer) in layers {
                for stretch in layer.stretches(0) {
                    let size = stretch.rows.len() * stretch.tokens.len() * layer.heads;
                    if size < 1 << 20 {
                        let _ = layer.buffers(&stretch.rows, stretch.tokens);
                    }
                }
            }
        }
        assert!(taken > tried / 100 && taken < tried, "{taken} of {tried} files were taken");
    }
}
