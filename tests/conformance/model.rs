//! The contract, over plain vectors: what a cache must hold, written to be read and not to be fast.
//!
//! The model knows nothing of element types. A token of one head is a string of bytes, so whatever the
//! cache holds can be compared with it bit for bit.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytemuck::pod_collect_to_vec as cast;
use half::{bf16, f16};
use wgpu_kvcache::{CachePosition, DType, HostTensor};

use crate::attention::Random;
use crate::rig::Storing;

/// A row-major (B, H, T, D) tensor on the host, as raw bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) shape: [usize; 4],
    /// Bytes an element.
    pub(crate) element: usize,
    pub(crate) bytes: Vec<u8>,
}

impl Block {
    /// A tensor of noise in which every fourth element is one of those that arithmetic would not keep:
    /// quiet and signalling NaNs with payloads, infinities, negative zero, subnormals. The same `seed`
    /// gives the same tensor.
    pub(crate) fn noise(shape: [usize; 4], element: usize, seed: u64) -> Self {
        const FOUR: [u32; 8] = [
            0x7fc1_2345,
            0x7f80_0001,
            0xffc0_0001,
            0x7f80_0000,
            0xff80_0000,
            0x8000_0000,
            0x0000_0001,
            0x0000_0000,
        ];
        // NaN, infinity and zero in both f16 and bf16.
        const TWO: [u16; 8] = [0x7e01, 0x7c01, 0xfc00, 0x7fc1, 0x7f81, 0xff80, 0x8000, 0x0001];
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes = Vec::new();
        for _ in 0..shape.iter().product() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let random = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes();
            let special = usize::from(random[7] % 8);
            match (random[6] % 4, element) {
                (0, 4) => bytes.extend(FOUR[special].to_le_bytes()),
                (0, 2) => bytes.extend(TWO[special].to_le_bytes()),
                _ => bytes.extend(&random[..element]),
            }
        }
        Self { shape, element, bytes }
    }

    /// A tensor of numbers whose size differs from token to token, as those of a model do, with a few zeros, numbers
    /// that are equally near to two of a format, and, in one token of sixteen, infinities and NaNs.
    pub(crate) fn numbers(shape: [usize; 4], dtype: DType, seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut all = Vec::new();
        for _ in 0..shape[..3].iter().product() {
            let exponent = i32::try_from(random.below(36)).expect("small") - 24;
            let size = 2.0_f32.powi(exponent);
            let is_special = random.below(16) == 0;
            for _ in 0..shape[3] {
                let x = random.floats(1, 0.5)[0];
                all.push(match random.below(16) {
                    0 => 0.0,
                    1 => -0.0,
                    2 => size * (x * 8.0).round() / 16.0,
                    3 if is_special => f32::NAN,
                    4 if is_special => f32::NEG_INFINITY,
                    5 if is_special => 1.0e9 * x,
                    _ => size * x,
                });
            }
        }
        let bytes = match dtype {
            DType::F32 => cast(&all),
            DType::F16 => cast(&all.into_iter().map(f16::from_f32).collect::<Vec<_>>()),
            _ => cast(&all.into_iter().map(bf16::from_f32).collect::<Vec<_>>()),
        };
        Self { shape, element: dtype.size(), bytes }
    }

    /// What was read back.
    pub(crate) fn of(tensor: &HostTensor) -> Self {
        let (shape, element) = (tensor.shape(), tensor.dtype().size());
        Self { shape, element, bytes: tensor.bytes().to_vec() }
    }

    /// The first `dim` elements of every head.
    pub(crate) fn first_elements(&self, dim: usize) -> Self {
        let ([batch, heads, tokens, whole], element) = (self.shape, self.element);
        let rows = self.bytes.chunks(whole * element);
        let bytes = rows.flat_map(|row| row[..dim * element].to_vec()).collect();
        Self { shape: [batch, heads, tokens, dim], element, bytes }
    }

    /// The elements of one token of one head of one row.
    fn token(&self, row: usize, head: usize, token: usize) -> &[u8] {
        let [_, heads, tokens, dim] = self.shape;
        let width = dim * self.element;
        &self.bytes[((row * heads + head) * tokens + token) * width..][..width]
    }
}

/// Why a call is refused. Which error the crate gives for it is for the tests of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Shapes or element sizes that do not fit each other or the layer.
    Shape,
    /// Not as many positions as tokens or rows.
    PositionCount,
    /// Past the bound.
    Bound,
    /// A layer past the count.
    Layer,
    /// An index past a layer's batch.
    Index,
    /// No indices, or zero repeats.
    Nothing,
    /// More pages than the pool was made for.
    Pages,
    /// A first update with other rows than the layers have that took part in a change of the batch.
    Batch,
    /// Not as many lengths as a layer has rows.
    Rows,
    /// More rows than an engine has given memory for.
    Room,
}

/// K or V of a layer.
#[derive(Clone, Debug)]
struct Side {
    heads: usize,
    dim: usize,
    element: usize,
    /// Row, head, token: the bytes of one token.
    rows: Vec<Vec<Vec<Vec<u8>>>>,
}

impl Side {
    /// A side that `block` fits, with no token in it.
    fn empty(block: &Block) -> Self {
        let [batch, heads, _, dim] = block.shape;
        Self { heads, dim, element: block.element, rows: vec![vec![Vec::new(); heads]; batch] }
    }

    fn fits(&self, block: &Block) -> bool {
        let [batch, heads, _, dim] = block.shape;
        (self.rows.len(), self.heads, self.dim, self.element) == (batch, heads, dim, block.element)
    }

    fn len(&self) -> usize {
        self.rows[0][0].len()
    }

    /// Lengthens every row to `len` tokens with zeros, then writes token t of row b to
    /// `positions[b][t]`, in order, so that a position named twice holds the later token.
    fn write(&mut self, block: &Block, positions: &[Vec<usize>], len: usize) {
        for (b, row) in self.rows.iter_mut().enumerate() {
            for (h, head) in row.iter_mut().enumerate() {
                head.resize(len, vec![0; self.dim * self.element]);
                for (t, &position) in positions[b].iter().enumerate() {
                    head[position] = block.token(b, h, t).to_vec();
                }
            }
        }
    }

    /// Drops the first `dropped[b]` tokens of row b, and makes it `len` tokens long: `kept[b]`, and zeros.
    fn cut_rows(&mut self, dropped: &[usize], kept: &[usize], len: usize) {
        let zero = vec![0; self.dim * self.element];
        for ((row, &dropped), &kept) in self.rows.iter_mut().zip(dropped).zip(kept) {
            for head in row {
                head.drain(..dropped);
                head.truncate(kept);
                head.resize(len, zero.clone());
            }
        }
    }

    fn tokens(&mut self) -> impl Iterator<Item = &mut Vec<Vec<u8>>> {
        self.rows.iter_mut().flatten()
    }

    fn block(&self) -> Block {
        Block {
            shape: [self.rows.len(), self.heads, self.len(), self.dim],
            element: self.element,
            bytes: self.rows.iter().flatten().flatten().flatten().copied().collect(),
        }
    }
}

/// The pages of one layer's rows: a page is a token that the rows which name it hold in common.
#[derive(Clone, Debug, Default)]
struct Pages {
    rows: Vec<Vec<Rc<()>>>,
    spans: Vec<Span>,
    /// Length of the layer.
    len: usize,
}

/// Where a row lies in its pages.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    /// Slot of the oldest live token, counted from the first page.
    start: usize,
    len: usize,
    /// Behind the row, up to the length of the layer, are zeros. Not so below this position: there is what was cut
    /// off, and a row that grows over it has to write zeros first.
    stale: usize,
}

impl Pages {
    /// A row that writes into a page has one of its own afterwards, and new ones where it ends. `ends` are the
    /// lengths of the rows afterwards.
    fn write(&mut self, size: usize, positions: &[Vec<usize>], ends: &[usize], new_len: usize) {
        let starts = self.spans.iter().map(|span| span.start);
        let pages = (starts.max().unwrap_or(0) + new_len).div_ceil(size);
        for ((row, span), (positions, &end)) in
            self.rows.iter_mut().zip(&mut self.spans).zip(positions.iter().zip(ends))
        {
            let is_stale = span.stale > span.len;
            let gap = if is_stale { span.len..end } else { self.len..new_len };
            let touched: BTreeSet<usize> = positions
                .iter()
                .copied()
                .chain(gap)
                .map(|position| (span.start + position) / size)
                .collect();
            for page in touched {
                if let Some(named) = row.get_mut(page) {
                    // As good as the old one where no other row named that.
                    *named = Rc::new(());
                }
            }
            row.resize_with(pages, || Rc::new(()));
            if is_stale && new_len > self.len {
                span.stale = new_len;
            }
            span.len = end;
        }
        self.len = new_len;
    }

    fn truncate(&mut self, size: usize, lens: &[usize], len: usize) {
        for (span, &kept) in self.spans.iter_mut().zip(lens) {
            if kept < span.len {
                span.stale = span.stale.max(span.len);
            }
            span.len = span.len.min(kept);
            span.stale = span.stale.min(len);
        }
        self.fit(size, len);
    }

    fn crop(&mut self, size: usize, dropped: &[usize], len: usize) {
        for (span, &dropped) in self.spans.iter_mut().zip(dropped) {
            // The row has nothing there: the layer ends later than before, counted from the row's start.
            let is_new = dropped > 0 && self.len < dropped + len;
            span.start += dropped;
            span.len = span.len.saturating_sub(dropped);
            span.stale = if is_new { len } else { span.stale.saturating_sub(dropped).min(len) };
        }
        self.fit(size, len);
    }

    /// Gives back the pages that no row needs.
    fn fit(&mut self, size: usize, len: usize) {
        self.len = len;
        if len == 0 {
            self.spans.fill(Span::default());
            return self.rows.iter_mut().for_each(Vec::clear);
        }
        let starts = || self.spans.iter().map(|span| span.start);
        let from = starts().min().unwrap_or(0) / size;
        let to = (starts().max().unwrap_or(0) + len).div_ceil(size);
        for row in &mut self.rows {
            row.truncate(to);
            row.drain(..from.min(row.len()));
        }
        self.spans.iter_mut().for_each(|span| span.start -= from * size);
    }

    fn select(&mut self, size: usize, rows: &[usize]) {
        self.rows = rows.iter().map(|&row| self.rows[row].clone()).collect();
        self.spans = rows.iter().map(|&row| self.spans[row]).collect();
        self.fit(size, self.len);
    }

    /// Pages in use, and those of them that several rows name.
    fn counts(&self) -> (usize, usize) {
        let mut named = BTreeMap::new();
        for page in self.rows.iter().flatten() {
            *named.entry(Rc::as_ptr(page)).or_insert(0) += 1;
        }
        (named.len(), named.values().filter(|&&count| count > 1).count())
    }
}

/// What a cache must hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    /// Tokens a row and layers, of a static cache.
    pub(crate) bounds: Option<(usize, usize)>,
    /// K and V of the layers that hold something.
    layers: BTreeMap<usize, [Side; 2]>,
    /// The length of each row of these layers.
    lens: BTreeMap<usize, Vec<usize>>,
    /// Tokens of a page, of a paged cache, and the pages of each layer.
    pages: Option<(usize, BTreeMap<usize, Pages>)>,
    /// Pages that a layer has at most.
    most_pages: Option<usize>,
    /// Bytes of K and of V that there are, in memory of an engine's, and how it stores them.
    room: Option<(u64, Storing)>,
    /// Whether layers that are not written took no part in a change of the batch.
    is_batch_changed: bool,
}

impl Model {
    /// A dynamic cache.
    pub(crate) fn dynamic() -> Self {
        Self::default()
    }

    /// A static cache of `layers` layers of at most `bound` tokens.
    pub(crate) fn fixed(bound: usize, layers: usize) -> Self {
        Self { bounds: Some((bound, layers)), ..Self::default() }
    }

    /// The same, in pages of `size` tokens.
    pub(crate) fn in_pages(self, size: usize) -> Self {
        Self { pages: Some((size, BTreeMap::new())), ..self }
    }

    /// The same, with so many bytes of K and of V a layer.
    pub(crate) fn of_at_most_bytes(self, bytes: u64, storing: Storing) -> Self {
        Self { room: Some((bytes, storing)), ..self }
    }

    /// Whether a layer of such K and V, of bound length, has no room for `batch` rows.
    fn is_too_large(&self, batch: usize, heads: usize, sides: [(usize, usize); 2]) -> bool {
        let (Some((bytes, storing)), Some((bound, _))) = (self.room, self.bounds) else {
            return false;
        };
        (batch * heads * bound) as u64 * storing.token_bytes(sides) > bytes
    }

    /// Whether some layer has no room for as many rows as `batch` makes of its own.
    fn has_no_room(&self, batch: impl Fn(usize) -> usize) -> bool {
        self.layers.values().any(|sides| {
            let (heads, rows) = (sides[0].heads, sides[0].rows.len());
            let sides = sides.each_ref().map(|side| (side.element, side.dim));
            batch(rows) != rows && self.is_too_large(batch(rows), heads, sides)
        })
    }

    /// The same, with at most `most_pages` pages a layer.
    pub(crate) fn of_at_most(self, most_pages: Option<usize>) -> Self {
        Self { most_pages, ..self }
    }

    /// Whether a layer that is written for the first time has to have the rows of the others.
    pub(crate) fn is_batch_changed(&self) -> bool {
        self.is_batch_changed
    }

    /// Pages in use and pages shared, of the layer that uses most.
    pub(crate) fn pages(&self) -> Option<(usize, usize)> {
        let (_, layers) = self.pages.as_ref()?;
        Some(layers.values().map(Pages::counts).max_by_key(|counts| counts.0).unwrap_or_default())
    }

    /// The layers that hold something.
    pub(crate) fn layers(&self) -> Vec<usize> {
        self.layers.keys().copied().collect()
    }

    pub(crate) fn len(&self, layer: usize) -> usize {
        self.layers.get(&layer).map_or(0, |[key, _]| key.len())
    }

    pub(crate) fn batch(&self, layer: usize) -> usize {
        self.layers.get(&layer).map_or(0, |[key, _]| key.rows.len())
    }

    /// Live tokens of each row.
    pub(crate) fn row_lens(&self, layer: usize) -> &[usize] {
        self.lens.get(&layer).map_or(&[], Vec::as_slice)
    }

    /// Bytes of one live row of K and V together.
    pub(crate) fn row_bytes(&self, layer: usize) -> usize {
        self.layers.get(&layer).map_or(0, |sides| {
            sides.iter().map(|side| side.heads * side.len() * side.dim * side.element).sum()
        })
    }

    pub(crate) fn get(&self, layer: usize) -> Option<(Block, Block)> {
        self.layers.get(&layer).map(|[key, value]| (key.block(), value.block()))
    }

    pub(crate) fn update(
        &mut self,
        layer: usize,
        key: &Block,
        value: &Block,
        position: CachePosition<'_>,
    ) -> Result<(), Refused> {
        let [batch, _, tokens, _] = key.shape;
        if key.shape[..3] != value.shape[..3] {
            return Err(Refused::Shape);
        }
        if self.bounds.is_some_and(|(_, layers)| layer >= layers) {
            return Err(Refused::Layer);
        }
        let sides = self.layers.get(&layer);
        if sides.is_some_and(|[k, v]| !k.fits(key) || !v.fits(value)) {
            return Err(Refused::Shape);
        }
        let has_batch = |[key, _]: &[Side; 2]| key.rows.len() == batch;
        if self.is_batch_changed && sides.is_none() && !self.layers.values().any(has_batch) {
            return Err(Refused::Batch);
        }
        let len = self.len(layer);
        let positions = spelled_out(position, batch, tokens, len)?;
        let end = positions.iter().flatten().max().map_or(0, |highest| highest + 1);
        if self.bounds.is_some_and(|(bound, _)| end > bound) {
            return Err(Refused::Bound);
        }
        let sizes = [key, value].map(|block| (block.element, block.shape[3]));
        if sides.is_none() && self.is_too_large(batch, key.shape[1], sizes) {
            return Err(Refused::Room);
        }
        let own = self.lens.get(&layer).cloned().unwrap_or_else(|| vec![0; batch]);
        let ends: Vec<usize> = match position {
            CachePosition::PerRow(_) => {
                let end = |list: &Vec<usize>| list.iter().max().map_or(0, |highest| highest + 1);
                own.iter().zip(&positions).map(|(&own, list)| own.max(end(list))).collect()
            }
            _ => vec![len.max(end); batch],
        };
        if let Some((size, layers)) = &mut self.pages {
            let unwritten = || Pages {
                rows: vec![Vec::new(); batch],
                spans: vec![Span::default(); batch],
                len: 0,
            };
            let mut pages = layers.get(&layer).cloned().unwrap_or_else(unwritten);
            pages.write(*size, &positions, &ends, len.max(end));
            if self.most_pages.is_some_and(|most| pages.counts().0 > most) {
                return Err(Refused::Pages);
            }
            layers.insert(layer, pages);
        }
        self.lens.insert(layer, ends);
        let sides =
            self.layers.entry(layer).or_insert_with(|| [Side::empty(key), Side::empty(value)]);
        sides[0].write(key, &positions, len.max(end));
        sides[1].write(value, &positions, len.max(end));
        Ok(())
    }

    pub(crate) fn crop(&mut self, max_length: usize) {
        if let Some((size, layers)) = &mut self.pages {
            for pages in layers.values_mut().filter(|pages| pages.len > max_length) {
                let dropped = pages.len - max_length;
                pages.crop(*size, &vec![dropped; pages.rows.len()], max_length);
            }
        }
        for (layer, lens) in &mut self.lens {
            let dropped = self.layers[layer][0].len().saturating_sub(max_length);
            lens.iter_mut().for_each(|len| *len = len.saturating_sub(dropped));
        }
        for tokens in self.layers.values_mut().flatten().flat_map(Side::tokens) {
            tokens.drain(..tokens.len().saturating_sub(max_length));
        }
    }

    pub(crate) fn truncate(&mut self, length: usize) {
        for tokens in self.layers.values_mut().flatten().flat_map(Side::tokens) {
            tokens.truncate(length);
        }
        self.lens.values_mut().flatten().for_each(|len| *len = (*len).min(length));
        if let Some((size, layers)) = &mut self.pages {
            for pages in layers.values_mut().filter(|pages| pages.len > length) {
                pages.spans.iter_mut().for_each(|span| {
                    (span.len, span.stale) = (span.len.min(length), span.stale.min(length));
                });
                pages.fit(*size, length);
            }
        }
    }

    /// Keeps the first `lengths[b]` tokens of row b, or the latest.
    pub(crate) fn cut_rows(&mut self, lengths: &[usize], is_crop: bool) -> Result<(), Refused> {
        if self.lens.values().any(|lens| lens.len() != lengths.len()) {
            return Err(Refused::Rows);
        }
        for (layer, lens) in &mut self.lens {
            let kept: Vec<usize> =
                lens.iter().zip(lengths).map(|(&len, &most)| len.min(most)).collect();
            let dropped: Vec<usize> = lens
                .iter()
                .zip(&kept)
                .map(|(len, kept)| if is_crop { len - kept } else { 0 })
                .collect();
            let new_len = kept.iter().copied().max().unwrap_or(0);
            for side in self.layers.get_mut(layer).into_iter().flatten() {
                side.cut_rows(&dropped, &kept, new_len);
            }
            if let Some((size, layers)) = &mut self.pages {
                let pages = layers.get_mut(layer).expect("it was written");
                match is_crop {
                    true => pages.crop(*size, &dropped, new_len),
                    false => pages.truncate(*size, &kept, new_len),
                }
            }
            *lens = kept;
        }
        Ok(())
    }

    pub(crate) fn reset(&mut self) {
        self.layers.clear();
        self.lens.clear();
        self.is_batch_changed = false;
        if let Some((_, layers)) = &mut self.pages {
            layers.clear();
        }
    }

    pub(crate) fn select(&mut self, indices: &[u32]) -> Result<(), Refused> {
        if indices.is_empty() {
            return Err(Refused::Nothing);
        }
        let indices: Vec<usize> = indices.iter().map(|&index| index as usize).collect();
        let highest = indices.iter().copied().max().unwrap_or(0);
        if self.layers.values().any(|[key, _]| highest >= key.rows.len()) {
            return Err(Refused::Index);
        }
        if self.has_no_room(|_| indices.len()) {
            return Err(Refused::Room);
        }
        let is_same = |batch: usize| indices.iter().copied().eq(0..batch);
        self.is_batch_changed |= self.layers.values().any(|[key, _]| !is_same(key.rows.len()));
        for side in self.layers.values_mut().flatten() {
            side.rows = indices.iter().map(|&index| side.rows[index].clone()).collect();
        }
        for lens in self.lens.values_mut() {
            *lens = indices.iter().map(|&index| lens[index]).collect();
        }
        if let Some((size, layers)) = &mut self.pages {
            layers.values_mut().for_each(|pages| pages.select(*size, &indices));
        }
        Ok(())
    }

    pub(crate) fn repeat_interleave(&mut self, repeats: usize) -> Result<(), Refused> {
        if repeats == 0 {
            return Err(Refused::Nothing);
        }
        if self.has_no_room(|batch| batch * repeats) {
            return Err(Refused::Room);
        }
        self.is_batch_changed |= repeats > 1 && !self.layers.is_empty();
        for side in self.layers.values_mut().flatten() {
            side.rows = side.rows.iter().flat_map(|row| vec![row.clone(); repeats]).collect();
        }
        for lens in self.lens.values_mut() {
            *lens = lens.iter().flat_map(|&len| vec![len; repeats]).collect();
        }
        if let Some((size, layers)) = &mut self.pages {
            for pages in layers.values_mut() {
                let rows: Vec<usize> =
                    (0..pages.rows.len() * repeats).map(|row| row / repeats).collect();
                pages.select(*size, &rows);
            }
        }
        Ok(())
    }
}

/// Positions as one list for each row, whatever form they came in.
fn spelled_out(
    position: CachePosition<'_>,
    batch: usize,
    tokens: usize,
    len: usize,
) -> Result<Vec<Vec<usize>>, Refused> {
    let wide = |list: &[u32]| list.iter().map(|&position| position as usize).collect::<Vec<_>>();
    let rows = match position {
        CachePosition::Append => vec![(len..len + tokens).collect(); batch],
        CachePosition::At(position) => vec![wide(&[position]); batch],
        CachePosition::PerToken(list) => vec![wide(list); batch],
        CachePosition::PerRow(rows) => rows.iter().map(|list| wide(list)).collect(),
        other => unreachable!("no history has {other:?}"),
    };
    if rows.len() != batch || rows.iter().any(|row| row.len() != tokens) {
        return Err(Refused::PositionCount);
    }
    Ok(rows)
}
