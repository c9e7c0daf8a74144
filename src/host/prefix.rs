//! Which pages hold the K and V of which tokens: a map from page-sized runs of token ids to pages. Pure host
//! logic.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::host::pool::PagePool;

/// Prefixes of sequences, a node a full page. A node's run of tokens counts only behind its parent's, since K and
/// V depend on all tokens before. Each node holds a reference to its page, so a prefix outlives its sequence until
/// the page is needed (as in vLLM, Kwon et al., 2023, and in `SGLang`'s radix tree, Zheng et al., 2024).
#[derive(Debug, Default)]
pub(crate) struct PrefixMap {
    first: Children,
    nodes: HashMap<u32, Node>,
    /// The number of the next node.
    next: u32,
    /// Counts uses.
    clock: u64,
}

type Children = HashMap<Box<[u32]>, u32>;

#[derive(Debug)]
struct Node {
    parent: Option<u32>,
    tokens: Box<[u32]>,
    page: u32,
    children: Children,
    /// When it was used last.
    used: u64,
}

impl PrefixMap {
    fn children(&self, parent: Option<u32>) -> &Children {
        parent.map_or(&self.first, |parent| &self.nodes[&parent].children)
    }

    fn children_mut(&mut self, parent: Option<u32>) -> &mut Children {
        match parent {
            None => &mut self.first,
            Some(parent) => {
                &mut self.nodes.get_mut(&parent).expect("a parent outlives its children").children
            }
        }
    }

    /// The pages of the longest known prefix of `tokens`, whole pages only.
    pub(crate) fn find(&self, tokens: &[u32], page_tokens: usize) -> Vec<u32> {
        self.path(tokens, page_tokens).into_iter().map(|node| self.nodes[&node].page).collect()
    }

    fn path(&self, tokens: &[u32], page_tokens: usize) -> Vec<u32> {
        let mut path = Vec::new();
        for run in tokens.chunks_exact(page_tokens) {
            let Some(&node) = self.children(path.last().copied()).get(run) else { break };
            path.push(node);
        }
        path
    }

    /// Notes a use of the longest known prefix.
    pub(crate) fn touch(&mut self, tokens: &[u32], page_tokens: usize) {
        self.clock += 1;
        for node in self.path(tokens, page_tokens) {
            self.nodes.get_mut(&node).expect("a node of the path").used = self.clock;
        }
    }

    /// Adds the full pages of a sequence that begins with `tokens` and lies in `pages`. Runs that are known keep
    /// the page that they have.
    pub(crate) fn insert(
        &mut self,
        tokens: &[u32],
        pages: &[u32],
        page_tokens: usize,
        pool: &mut PagePool,
    ) {
        self.clock += 1;
        let mut parent = None;
        for (run, &page) in tokens.chunks_exact(page_tokens).zip(pages) {
            if let Some(&node) = self.children(parent).get(run) {
                self.nodes.get_mut(&node).expect("a child that is named").used = self.clock;
                parent = Some(node);
                continue;
            }
            let number = self.next;
            self.next += 1;
            pool.share(page);
            self.children_mut(parent).insert(run.into(), number);
            let (tokens, children, used) = (run.into(), Children::new(), self.clock);
            self.nodes.insert(number, Node { parent, tokens, page, children, used });
            parent = Some(number);
        }
    }

    /// Up to `wanted` nodes whose pages no sequence refers to, least recently used first, children before their
    /// parents. Without them the map is as it was for all others.
    pub(crate) fn evictable(&self, wanted: usize, pool: &PagePool) -> Vec<u32> {
        let is_unused = |node: &Node| pool.count(node.page) == 1;
        let mut left: HashMap<u32, usize> = HashMap::new();
        let leaves = self.nodes.iter().filter(|(_, node)| node.children.is_empty());
        let leaves = leaves.filter(|(_, node)| is_unused(node));
        let mut heap: BinaryHeap<_> =
            leaves.map(|(&number, node)| Reverse((node.used, number))).collect();
        let mut evicted = Vec::new();
        while evicted.len() < wanted {
            let Some(Reverse((_, number))) = heap.pop() else { break };
            evicted.push(number);
            let Some(parent) = self.nodes[&number].parent else { continue };
            let node = &self.nodes[&parent];
            let left = left.entry(parent).or_insert(node.children.len());
            *left -= 1;
            if *left == 0 && is_unused(node) {
                heap.push(Reverse((node.used, parent)));
            }
        }
        evicted
    }

    /// The page of a node.
    pub(crate) fn page(&self, node: u32) -> u32 {
        self.nodes[&node].page
    }

    /// Forgets nodes, children before their parents. Their references are the caller's from then on.
    pub(crate) fn remove(&mut self, nodes: &[u32]) {
        for number in nodes {
            let Some(node) = self.nodes.remove(number) else { continue };
            self.children_mut(node.parent).remove(&node.tokens);
        }
    }

    /// Forgets everything, and drops the references.
    pub(crate) fn clear(&mut self, pool: &mut PagePool) {
        let mut pages: Vec<u32> = self.pages().collect();
        // In order, so that a run of calls always uses the same pages.
        pages.sort_unstable();
        pages.into_iter().rev().for_each(|page| pool.release(page));
        *self = Self::default();
    }

    /// The pages that are referred to.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u32> {
        self.nodes.values().map(|node| node.page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages in the pool that only the map refers to, for a prefix of these tokens.
    fn insert(map: &mut PrefixMap, pool: &mut PagePool, tokens: &[u32]) -> Vec<u32> {
        let pages: Vec<u32> = tokens.chunks(2).map(|_| pool.take()).collect();
        map.insert(tokens, &pages, 2, pool);
        pages.iter().for_each(|&page| pool.release(page));
        pages
    }

    #[test]
    fn the_longest_prefix_is_found_by_whole_pages() {
        let (mut map, mut pool) = (PrefixMap::default(), PagePool::default());
        let first = insert(&mut map, &mut pool, &[1, 2, 3, 4, 5]);
        assert_eq!(map.find(&[1, 2, 3, 4, 5, 6], 2), first[..2]);
        assert_eq!(map.find(&[1, 2, 3], 2), first[..1]);
        assert!(map.find(&[1, 3, 3, 4], 2).is_empty());
        // The same run behind another prefix is another page.
        let second = insert(&mut map, &mut pool, &[9, 9, 3, 4]);
        assert_eq!(map.find(&[9, 9, 3, 4], 2), second);
        // A known prefix keeps its pages.
        let third = insert(&mut map, &mut pool, &[1, 2, 7, 8]);
        assert_eq!(map.find(&[1, 2, 7, 8], 2), [first[0], third[1]]);
        assert!(pool.is_sound(map.pages()));
        assert_eq!(pool.used(), 5);
    }

    #[test]
    fn what_no_sequence_uses_goes_least_recently_used_first() {
        let (mut map, mut pool) = (PrefixMap::default(), PagePool::default());
        let old = insert(&mut map, &mut pool, &[1, 2, 3, 4]);
        let new = insert(&mut map, &mut pool, &[5, 6, 7, 8]);
        let branch = insert(&mut map, &mut pool, &[5, 6, 9, 9]);
        map.touch(&[1, 2], 2);
        let pages = |nodes: &[u32]| -> Vec<u32> { nodes.iter().map(|&it| map.page(it)).collect() };
        // Children go before their parents, though these were used before.
        assert_eq!(pages(&map.evictable(9, &pool)), [old[1], new[1], branch[1], new[0], old[0]]);
        // A page that a sequence refers to stays, and so do its parents.
        pool.share(branch[1]);
        assert_eq!(pages(&map.evictable(9, &pool)), [old[1], new[1], old[0]]);
        assert_eq!(pages(&map.evictable(1, &pool)), [old[1]]);
        let gone = map.evictable(2, &pool);
        gone.iter().for_each(|&node| pool.release(map.page(node)));
        map.remove(&gone);
        assert_eq!(map.find(&[1, 2, 3, 4], 2), old[..1]);
        assert_eq!(map.find(&[5, 6, 7, 8], 2), new[..1]);
        assert!(pool.is_sound(map.pages().chain([branch[1]])));
        map.clear(&mut pool);
        assert!(pool.is_sound([branch[1]].into_iter()));
    }
}
