//! The two caches of an encoder-decoder model in one file, each with its name before those of its tensors.

use std::collections::{BTreeSet, HashMap};

use safetensors::SafeTensors;

use super::file::{self, About, NamedTensor};
use super::{bad, check_format};
use crate::error::Result;

/// The names of the sides.
const SIDES: [&str; 2] = ["self_attention", "cross_attention"];
/// The key of the layers whose cross side is the memory of the encoder.
const UPDATED: &str = "updated";

/// What the file of two caches holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sides {
    /// A file for each side.
    pub(crate) files: [Vec<u8>; 2],
    /// The layers whose cross side was written through the cache of both.
    pub(crate) updated: BTreeSet<usize>,
    /// Batch rows of the cross side, of the layer that has most.
    pub(crate) memory_rows: usize,
}

/// One file of the files of both sides.
pub(crate) fn join(files: [&[u8]; 2], updated: &BTreeSet<usize>) -> Result<Vec<u8>> {
    let mut tensors = Vec::new();
    let mut about = About::new();
    let mut written = BTreeSet::new();
    for (side, bytes) in SIDES.into_iter().zip(files) {
        let (its, file) = file::open(bytes)?;
        check_format(&its)?;
        for (key, text) in its {
            match key.strip_prefix("layer.") {
                Some(number) if side == SIDES[1] => written.extend(number.parse::<usize>()),
                _ => {}
            }
            let is_of_all = !key.starts_with("layer.");
            about.insert(if is_of_all { key } else { format!("{side}.{key}") }, text);
        }
        for (name, tensor) in file.iter() {
            tensors.push(NamedTensor::of(format!("{side}.{name}"), &tensor));
        }
    }
    let updated: Vec<String> = updated.intersection(&written).map(usize::to_string).collect();
    about.insert(UPDATED.to_owned(), updated.join(" "));
    file::write(&about, tensors)
}

/// The sides of a file. Refuses one of a single cache.
pub(crate) fn split(bytes: &[u8]) -> Result<Sides> {
    let (about, file) = file::open(bytes)?;
    check_format(&about)?;
    let Some(updated) = about.get(UPDATED) else {
        return Err(bad(
            "it is of one cache and not of the two sides of an EncoderDecoderCache; restore it into a side",
        ));
    };
    let number = |text: &str| text.parse().map_err(|_| bad(&format!("'{text}' is no layer")));
    let updated = updated.split_whitespace().map(number).collect::<Result<_>>()?;
    let rows =
        file.iter().filter(|(name, _)| name.starts_with(SIDES[1]) && name.ends_with(".rows"));
    let memory_rows = rows.filter_map(|(_, table)| table.shape().first().copied()).max();
    let [own, memory] = SIDES.map(|side| side_of(&about, &file, side));
    Ok(Sides { files: [own?, memory?], updated, memory_rows: memory_rows.unwrap_or(0) })
}

/// The file of a side.
fn side_of(all: &HashMap<String, String>, file: &SafeTensors<'_>, side: &str) -> Result<Vec<u8>> {
    let own = |name: &str| name.strip_prefix(side)?.strip_prefix('.').map(str::to_owned);
    let of_all = ["format", "version"]
        .into_iter()
        .filter_map(|key| all.get(key).map(|text| (key.to_owned(), text.clone())));
    let layers = all.iter().filter_map(|(key, text)| own(key).map(|key| (key, text.clone())));
    let about: About = of_all.chain(layers).collect();
    let tensors =
        file.iter().filter_map(|(name, tensor)| Some(NamedTensor::of(own(name)?, &tensor)));
    file::write(&about, tensors.collect())
}

/// Whether a file is of two sides.
pub(super) fn are_in(about: &HashMap<String, String>) -> bool {
    about.contains_key(UPDATED)
}

#[cfg(test)]
mod tests {
    use super::super::{SavedLayer, parse, tests, to_bytes};
    use super::*;

    /// Rows of one page each.
    fn layer(rows: u32) -> SavedLayer {
        let pages: Vec<[u32; 1]> = (0..rows).map(|row| [row]).collect();
        let pages: Vec<&[u32]> = pages.iter().map(<[u32; 1]>::as_slice).collect();
        tests::layer(&pages, &vec![[0, 1]; pages.len()])
    }

    #[test]
    fn sides_come_out_as_they_went_in() {
        let files = [vec![(0, layer(2)), (3, layer(2))], vec![(0, layer(4)), (5, layer(1))]];
        let files = files.map(|layers| to_bytes(&layers).unwrap());
        let joined = join([&files[0], &files[1]], &BTreeSet::from([0, 2])).unwrap();
        assert_eq!(join([&files[0], &files[1]], &BTreeSet::from([0, 2])), Ok(joined.clone()));
        let sides = split(&joined).unwrap();
        // Layer 2 is updated, and holds nothing.
        assert_eq!(sides, Sides { files, updated: BTreeSet::from([0]), memory_rows: 4 });
        assert!(parse(&joined).is_err() && split(&sides.files[0]).is_err());
        let none = to_bytes(&[]).unwrap();
        let empty = split(&join([&none, &none], &BTreeSet::new()).unwrap()).unwrap();
        assert_eq!((empty.files, empty.memory_rows), ([none.clone(), none], 0));
    }

    #[test]
    fn no_damage_is_a_panic() {
        let file = to_bytes(&[(0, layer(2))]).unwrap();
        let whole = join([&file, &file], &BTreeSet::from([0])).unwrap();
        let mut taken = 0;
        for at in 0..whole.len() {
            for byte in [b'0', b'9', b' ', b'.', 0, 0xff, whole[at] ^ 1] {
                let mut bytes = whole.clone();
                bytes[at] = byte;
                let Ok(sides) = split(&bytes) else { continue };
                taken += sides.files.iter().filter(|file| parse(file).is_ok()).count();
            }
            assert!(split(&whole[..at]).is_err());
        }
        assert!(taken > 0);
    }
}
