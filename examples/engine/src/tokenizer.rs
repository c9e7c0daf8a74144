//! Text to token ids and back, with the vocabulary that the model file holds.

use std::collections::HashSet;

use anyhow::{Context, Result, anyhow, bail, ensure};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::{self, DecoderWrapper};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Replace};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, DecodeStream};

use crate::gguf::GgufFile;

/// GGUF's types of tokens: those that text is merged into, those that are never split, and those that are matched in
/// the text before anything is merged.
const NORMAL: i64 = 1;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// How `SentencePiece` writes a space.
const SPACE: &str = "\u{2581}";

/// Bytes that all merges may have, for each byte of the vocabulary. Gemma 3 has 2; a file of another kind could ask for
/// far more memory than it has bytes.
const MERGES: usize = 4;

/// A BPE tokenizer: over bytes, or over characters as in `SentencePiece`.
#[expect(missing_debug_implementations, reason = "it is not for printing")]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The token that begins every text, if the model has one.
    opening: Option<u32>,
    /// The token that ends a text.
    pub end: Option<u32>,
    /// The token that ends an answer in a chat, if the model has one of its own for that.
    pub end_of_turn: Option<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that the file describes.
    ///
    /// # Errors
    ///
    /// If the file describes a kind that is not supported, or lacks a key.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let tokens = file.texts("tokenizer.ggml.tokens")?;
        let kinds = file.integers("tokenizer.ggml.token_type")?;
        ensure!(
            tokens.len() == kinds.len(),
            "the model file lists {} tokens and the kinds of {}",
            tokens.len(),
            kinds.len()
        );
        let mut inner = match file.text("tokenizer.ggml.model")? {
            "gpt2" => byte_level(file, &tokens)?,
            "llama" => sentence_piece(file, &tokens, &kinds)?,
            other => bail!(
                "the model's tokenizer is {other}; gpt2 (byte-level BPE) and llama (SentencePiece) are supported"
            ),
        };
        let of_kind = |wanted: i64| {
            let tokens = tokens.iter().zip(&kinds).filter(move |&(_, &kind)| kind == wanted);
            tokens.map(move |(&token, _)| {
                AddedToken::from(token, wanted == CONTROL).normalized(false)
            })
        };
        for wanted in [CONTROL, USER_DEFINED] {
            inner.add_tokens(of_kind(wanted)).map_err(anyhow::Error::from_boxed)?;
        }

        let id = |name: &str| -> Result<Option<u32>> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            Ok(file.optional_count(&key)?.map(u32::try_from).transpose()?)
        };
        let opening = match file.flag("tokenizer.ggml.add_bos_token") {
            Some(true) => id("bos")?,
            _ => None,
        };
        if let Some(id) = opening {
            ensure!(
                (id as usize) < tokens.len(),
                "tokenizer.ggml.bos_token_id is {id}, and the model file lists {} tokens",
                tokens.len()
            );
        }
        Ok(Self { inner, opening, end: id("eos")?, end_of_turn: id("eot")? })
    }

    /// The ids of a text, without a chat template. The token that opens a text is not put before one that begins with
    /// it.
    ///
    /// # Errors
    ///
    /// If the text cannot be split.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode_more(text)?;
        let opening = self.opening.filter(|opening| ids.first() != Some(opening));
        Ok(opening.into_iter().chain(ids).collect())
    }

    /// The ids of a text that follows other ids: without the token that opens a text.
    ///
    /// # Errors
    ///
    /// If the text cannot be split.
    pub fn encode_more(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(anyhow::Error::from_boxed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of some ids; control tokens have none.
    ///
    /// # Errors
    ///
    /// If the ids cannot be decoded.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(anyhow::Error::from_boxed)
    }

    /// Starts a text that is decoded token by token.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream {
            tokenizer: self,
            inner: self.inner.decode_stream(true),
            ids: Vec::new(),
            given: 0,
        }
    }
}

/// Byte-level BPE, with the merges that the file lists.
fn byte_level(file: &GgufFile, tokens: &[&str]) -> Result<tokenizers::Tokenizer> {
    let split = file.text("tokenizer.ggml.pre")?;
    ensure!(split == "smollm", "the model's pre-tokenizer is {split}; smollm is supported");
    let merges = file.texts("tokenizer.ggml.merges")?;
    let merges = merges.into_iter().map(|merge| {
        let (left, right) =
            merge.split_once(' ').ok_or_else(|| anyhow!("the merge {merge:?} is not a pair"))?;
        Ok((left.to_owned(), right.to_owned()))
    });
    let merges = merges.collect::<Result<Vec<_>>>()?;
    let bpe = BPE::builder().vocab_and_merges(vocabulary(tokens), merges);
    let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(anyhow::Error::from_boxed)?);
    let bytes = ByteLevel::new(false, true, true);
    inner.with_pre_tokenizer(Some(Sequence::new(vec![Digits::new(true).into(), bytes.into()])));
    inner.with_decoder(Some(bytes));
    Ok(inner)
}

/// BPE as in `SentencePiece`: of all neighbours that form a token, those that form the one with the best score are merged
/// first. Characters without a token become the tokens of their bytes.
fn sentence_piece(
    file: &GgufFile,
    tokens: &[&str],
    kinds: &[i64],
) -> Result<tokenizers::Tokenizer> {
    // Missing, it means true.
    ensure!(
        file.flag("tokenizer.ggml.add_space_prefix") == Some(false),
        "the model's tokenizer puts a space before a text (tokenizer.ggml.add_space_prefix), which is not supported"
    );
    let scores = file.numbers("tokenizer.ggml.scores")?;
    ensure!(
        tokens.len() == scores.len(),
        "the model file lists {} tokens and the scores of {}",
        tokens.len(),
        scores.len()
    );
    let merges = merges_by_score(tokens, kinds, &scores)?;
    let mut bpe = BPE::builder().vocab_and_merges(vocabulary(tokens), merges).byte_fallback(true);
    if let Some(unknown) = file.optional_count("tokenizer.ggml.unknown_token_id")? {
        let unknown = tokens.get(unknown).with_context(|| {
            let count = tokens.len();
            format!("tokenizer.ggml.unknown_token_id is {unknown}, and the model file lists {count} tokens")
        })?;
        bpe = bpe.unk_token((*unknown).to_owned());
    }
    let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(anyhow::Error::from_boxed)?);
    let replace = |from, to| Replace::new(from, to).map_err(anyhow::Error::from_boxed);
    inner.with_normalizer(Some(replace(" ", SPACE)?)).map_err(anyhow::Error::from_boxed)?;
    inner.with_decoder(Some(decoders::sequence::Sequence::new(vec![
        replace(SPACE, " ")?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ])));
    Ok(inner)
}

/// All pairs of normal tokens that form a normal token, that with the best score first.
fn merges_by_score(
    tokens: &[&str],
    kinds: &[i64],
    scores: &[f64],
) -> Result<Vec<(String, String)>> {
    let normal = || {
        let tokens = tokens.iter().zip(scores).zip(kinds);
        tokens.filter(|&(_, &kind)| kind == NORMAL).map(|((&token, &score), _)| (token, score))
    };
    let known: HashSet<&str> = normal().map(|(token, _)| token).collect();
    let most = MERGES * known.iter().map(|token| token.len()).sum::<usize>();
    let mut bytes = 0;
    let mut merges = Vec::new();
    for (token, score) in normal() {
        for (middle, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(middle);
            if known.contains(left) && known.contains(right) {
                merges.push((score, left, right));
                bytes += token.len();
            }
        }
        ensure!(
            bytes <= most,
            "the vocabulary's tokens can be merged from others in more ways than the {most} bytes of memory that are allowed for them"
        );
    }
    merges.sort_by(|(score, ..), (other, ..)| other.total_cmp(score));
    Ok(merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect())
}

/// The id of each token.
fn vocabulary(tokens: &[&str]) -> Vocab {
    (0_u32..).zip(tokens).map(|(id, &token)| (token.to_owned(), id)).collect()
}

/// A text that is decoded token by token, in whole characters: a character that spans tokens is held back until its
/// last byte.
#[expect(missing_debug_implementations, reason = "it is not for printing")]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    inner: DecodeStream<
        'a,
        ModelWrapper,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >,
    ids: Vec<u32>,
    /// Bytes of text returned so far.
    given: usize,
}

impl TextStream<'_> {
    /// Adds a token and returns the text that it completes, which may be empty.
    ///
    /// # Errors
    ///
    /// If the id cannot be decoded.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.inner.step(id).map_err(anyhow::Error::from_boxed)?.unwrap_or_default();
        self.given += text.len();
        Ok(text)
    }

    /// The rest of the text: an incomplete character becomes a replacement character.
    ///
    /// # Errors
    ///
    /// If the ids cannot be decoded.
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        Ok(text.get(self.given..).unwrap_or_default().to_owned())
    }
}
