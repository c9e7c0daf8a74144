//! A layer's pool of pages on the GPU: [page, H, tokens of a page, D].

use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::kernels::{CopyShape, Dispatch, GatherShape, MOST_MOVES};
use crate::host::plan::{self, MoveList};
use crate::storage::store::{Shape, Store};

/// Dispatches, and the bytes that they write.
pub(crate) type Copies = (Vec<Dispatch>, u64);

/// Memory for `pages` pages.
pub(crate) fn new_pool(
    gpu: &Gpu,
    layer: usize,
    shape: Shape,
    page_tokens: usize,
    pages: usize,
) -> Result<Store> {
    Store::new(gpu, layer, shape.bytes(pages, page_tokens)?)
}

/// A copy of the first `used` pages of a pool of `old_pages` into a pool of `new_pages`. Pages keep their numbers.
pub(crate) fn copy_pool(
    gpu: &Gpu,
    shape: Shape,
    page_tokens: usize,
    [old, new]: [&Store; 2],
    [old_pages, new_pages, used]: [usize; 3],
) -> Result<Copies> {
    if used == 0 {
        return Ok((Vec::new(), 0));
    }
    // The pool's first pages are one row of one long head.
    let page_slots = shape.heads * page_tokens;
    let copies = &plan::list_copies(&[(0, 0)], MOST_MOVES)[0];
    let [from, to] = [old_pages, new_pages].map(|pages| shape.planes(pages, page_tokens));
    let dispatches = from.zip(to).map(|(from, to)| {
        let copy = CopyShape {
            planes: [from, to],
            heads: 1,
            start: 0,
            len: used * page_slots,
            old_capacity: old_pages * page_slots,
            new_capacity: new_pages * page_slots,
            copies: &copies.words,
        };
        gpu.kernels().copy_rows([old.bindings(), new.bindings()], &copy)
    });
    Ok((dispatches.collect::<Result<_>>()?, shape.bytes(used, page_tokens)?.iter().sum()))
}

/// Copies of pages inside a pool of `pages` pages.
pub(crate) fn copy_pages(
    gpu: &Gpu,
    shape: Shape,
    [pages, page_tokens]: [usize; 2],
    store: &Store,
    moves: &[MoveList],
) -> Result<Copies> {
    let (mut dispatches, mut moved) = (Vec::with_capacity(moves.len()), 0);
    for moves in moves {
        for plane in shape.planes(pages, page_tokens) {
            let copy = GatherShape {
                plane,
                heads: shape.heads,
                start: 0,
                len: page_tokens,
                capacity: page_tokens,
                moves: &moves.words,
                cycles_at: moves.cycles_at,
            };
            dispatches.push(gpu.kernels().gather(store.gather_bindings(gpu)?, &copy)?);
        }
        moved += shape.bytes(moves.written, page_tokens)?.iter().sum::<u64>();
    }
    Ok((dispatches, moved))
}
