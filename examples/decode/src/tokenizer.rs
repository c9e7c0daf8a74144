//! Text to token ids and back, with the vocabulary and merges that the model file holds.

use anyhow::{Result, anyhow, ensure};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, DecodeStream};

use crate::gguf::GgufFile;

/// GGUF's type of control tokens, which are never split.
const CONTROL: i64 = 3;

/// A byte-level BPE tokenizer.
#[expect(missing_debug_implementations, reason = "it is not for printing")]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The token that begins every text, if the model has one.
    opening: Option<u32>,
    /// The token that ends an answer.
    pub end: Option<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that the file describes.
    ///
    /// # Errors
    ///
    /// If the file describes a kind that is not supported, or lacks a key.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let model = file.text("tokenizer.ggml.model")?;
        ensure!(
            model == "gpt2",
            "the model's tokenizer is {model}; gpt2 (byte-level BPE) is supported"
        );
        let split = file.text("tokenizer.ggml.pre")?;
        ensure!(split == "smollm", "the model's pre-tokenizer is {split}; smollm is supported");

        let tokens = file.texts("tokenizer.ggml.tokens")?;
        let kinds = file.integers("tokenizer.ggml.token_type")?;
        ensure!(
            tokens.len() == kinds.len(),
            "the model file lists {} tokens and the kinds of {}",
            tokens.len(),
            kinds.len()
        );
        let vocabulary: Vocab =
            (0_u32..).zip(&tokens).map(|(id, &token)| (token.to_owned(), id)).collect();
        let merges = file.texts("tokenizer.ggml.merges")?;
        let merges = merges.into_iter().map(|merge| {
            let (left, right) = merge
                .split_once(' ')
                .ok_or_else(|| anyhow!("the merge {merge:?} is not a pair"))?;
            Ok((left.to_owned(), right.to_owned()))
        });
        let bpe = BPE::builder().vocab_and_merges(vocabulary, merges.collect::<Result<Vec<_>>>()?);

        let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(anyhow::Error::from_boxed)?);
        let bytes = ByteLevel::new(false, true, true);
        inner.with_pre_tokenizer(Some(Sequence::new(vec![Digits::new(true).into(), bytes.into()])));
        inner.with_decoder(Some(bytes));
        let control = tokens.iter().zip(&kinds).filter(|&(_, &kind)| kind == CONTROL);
        inner
            .add_special_tokens(control.map(|(&token, _)| AddedToken::from(token, true)))
            .map_err(anyhow::Error::from_boxed)?;

        let id = |key: &str| -> Result<Option<u32>> {
            Ok(file.optional_count(key)?.map(u32::try_from).transpose()?)
        };
        let opening = if file.flag("tokenizer.ggml.add_bos_token") {
            id("tokenizer.ggml.bos_token_id")?
        } else {
            None
        };
        if let Some(id) = opening {
            ensure!(
                (id as usize) < tokens.len(),
                "tokenizer.ggml.bos_token_id is {id}, and the model file lists {} tokens",
                tokens.len()
            );
        }
        Ok(Self { inner, opening, end: id("tokenizer.ggml.eos_token_id")? })
    }

    /// The ids of a text, without a chat template.
    ///
    /// # Errors
    ///
    /// If the text cannot be split.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.opening.into_iter().chain(self.encode_more(text)?).collect())
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
